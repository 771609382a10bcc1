"""Export as a diffusers folder: one normalisation in config.json, read back and compared before it is published.

Legend: c latent channels, h w latent positions.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import beside, put_beside
from ldm_vae.autoencoder.geometry import some_latents
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import give, own_normalisation
from ldm_vae.autoencoder.preparation import record, recorded
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import parse_json
from ldm_vae.data import preprocessing
from ldm_vae.export.card import Card, card_name
from ldm_vae.export.replacement import check_replaceable
from ldm_vae.latent_store.format.statistics import LatentStatistics

STATISTICS = "latent_statistics.json"


def write_vae(
    vae: Any,
    out: Path,
    normalisation: Normalisation | None,
    *,
    sample_size: int | None = None,
    card: str | None = None,
    statistics: LatentStatistics | None = None,
    force_upcast: bool | None = None,
    half: bool = False,
    max_shard_size: str = "10GB",
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `vae` to the folder `out`, replacing an older export; the model itself is not changed. The record of its
    preprocessing goes with it.

    A quantizer beside the network (`autoencoder/codebooks.py`) goes into files of its own.

    The folder is written beside its final name, loaded with `from_pretrained`, compared (weights bit for bit, and a
    decode), and only then renamed.

    Args:
        normalisation: the one that config.json will name; None keeps the one that the model's config names.
        sample_size: side of the images in pixels that it was trained on; diffusers cuts its tiles by it.
        card: README.md; a plain one by default.
        statistics: what was measured: goes to the card and to latent_statistics.json, so that another normalisation
            can be written later without measuring again.
        force_upcast: whether pipelines run it in fp32 although they run in fp16; None keeps what the config says.
        half: also write the weights in fp16, for `from_pretrained(..., variant="fp16")`.
        max_shard_size: a larger weight file is divided, as diffusers does it.
        files: further files of the folder, by path in it.

    Raises:
        UsageError: `out` is somebody else's folder, or the model's config names two normalisations at once.
        WorkError: what was read back is not what was written; `out` is as it was before.

    >>> from pathlib import Path
    >>> from diffusers import AutoencoderKL
    >>> from ldm_vae import Normalisation, load_autoencoder, write_vae
    >>> out = write_vae(load_autoencoder("my-vae"), Path("exported"), Normalisation(0.9))
    >>> AutoencoderKL.from_pretrained("exported").config.scaling_factor
    0.9
    """
    copy = configured_copy(vae, normalisation, sample_size=sample_size, force_upcast=force_upcast)
    return write_configured(
        copy, out, card=card, statistics=statistics, half=half, max_shard_size=max_shard_size, files=files
    )


def write_configured(
    copy: Any,
    out: Path,
    *,
    card: str | None = None,
    statistics: LatentStatistics | None = None,
    half: bool = False,
    max_shard_size: str = "10GB",
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write what `configured_copy` gave, as `write_vae` does. It is used up: in fp16 afterwards where `half` is asked
    for."""
    everything = dict(files or {})
    if (found := recorded(copy)) is not None:
        everything[preprocessing.FILE] = found.to_bytes()
    if statistics is not None:
        everything[STATISTICS] = (json.dumps(statistics.to_json(), indent=1) + "\n").encode()
    text = Card(card_name(out), statistics).text(copy) if card is None else card
    everything["README.md"] = text.encode()
    if (books := beside(copy)) is not None:  # in files of its own: the class has no place for it
        everything |= books.files()
        put_beside(copy, None)
    # nothing of it has its name before the weights were read back
    with atomic_io.whole_folder(out, check_replaceable) as folder:
        _save(copy, folder, max_shard_size)
        if half:
            # after fp32, since `half` changes the copy in place
            _save(copy.half(), folder, max_shard_size, variant="fp16")
        for name, content in everything.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return out


def _save(vae: Any, folder: Path, max_shard_size: str, **variant: str) -> None:
    """Write the weights, read them back and compare."""
    try:
        vae.save_pretrained(folder, safe_serialization=True, max_shard_size=max_shard_size, **variant)
    except ValueError as error:
        raise UsageError(f"max_shard_size: expected a size such as 500MB or 2GB, got {max_shard_size}") from error
    compare(vae, load_folder(vae, folder, **variant))


def read_statistics(path: Path) -> LatentStatistics:
    """Read the `statistics` of an export from the latent_statistics.json that `write_vae` wrote."""
    try:
        return LatentStatistics.from_json(parse_json(read_bytes(path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read as latent statistics: {error}") from error


def configured_copy(vae: Any, normalisation: Normalisation | None = None, **changes: Any) -> Any:
    """A model of the same class, weights (shared when they are on the CPU) and record of preprocessing whose config is
    as it will be written: with this normalisation, and with those of the `changes` that are not None."""
    if normalisation is None:
        own_normalisation(vae)  # which raises where it names two, or one that nobody can divide by
    # a config also holds what diffusers notes for itself; what the class takes is what is written
    taken = inspect.signature(type(vae).__init__).parameters
    config = {name: value for name, value in vae.config.items() if name in taken}
    # the config's own network without values: the weights are assigned below, not copied
    with init_empty_weights():
        # an AutoencoderTiny has no sample_size
        known = {name: value for name, value in changes.items() if value is not None and name in taken}
        copy = type(vae).from_config(config | known)
        if (books := beside(vae)) is not None:
            put_beside(copy, books.shape.build())
    weights = {name: value.detach().cpu() for name, value in vae.state_dict().items()}
    copy.load_state_dict(weights, strict=True, assign=True)
    if normalisation is not None:
        give(copy, normalisation)
    record(copy, recorded(vae))
    return copy.eval().requires_grad_(False)


def load_folder(like: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` of a local folder, of the class and dtype of `like`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return type(like).from_pretrained(folder, local_files_only=True, torch_dtype=like.dtype, **options)


@torch.no_grad()
def compare(written: Any, loaded: Any) -> float:
    """The largest difference of one decode, in pixels of [-1, 1]; the weights must be equal bit for bit.

    Raises:
        WorkError: a tensor differs, is missing or is left over, or the decode differs by more than 1e-4.
    """
    expected, came = written.state_dict(), loaded.state_dict()
    if expected.keys() != came.keys():
        raise WorkError(f"reload check: tensor {min(expected.keys() ^ came.keys())} is on one side only")
    for name, value in expected.items():
        if value.dtype != came[name].dtype or not torch.equal(value, came[name]):
            raise WorkError(f"reload check: tensor {name} is not what was written")
    # equal weights under another config can still decode otherwise
    z = some_latents(written)
    before, after = latents.decode(written, z), latents.decode(loaded.to("cpu").eval(), z)
    largest = float((before - after).abs().max())
    if not largest <= 1e-4 and torch.isfinite(before).all():
        raise WorkError(f"reload check: a decode differs by {largest:.3g}")
    return largest
