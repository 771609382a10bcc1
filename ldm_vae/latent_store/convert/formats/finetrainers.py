"""The precomputed latents of finetrainers: one .pt for each sample, in the names of its `data/precomputation.py`.

    finetrainers-precomputed-data/latent-N.pt    N: the sample's place in the store
        latents    [1, 2 c, t, h, w], mean and logvar, raw: its trainer draws from them anew at each step
                   ([1, t, 2 c, h, w] of cogvideox)
        latents_mean, latents_std    [c] (wan: of the deviations one over them), for wan and ltx_video
        num_frames, height, width    t, h and w, for ltx_video

Its `--precomputation_reuse` reads them beside condition-N.pt, the prompts, which a store has not. The files are pickles
of tensors: they are written here and never read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.autoencoder.latents import LOGVAR_RANGE
from ldm_vae.core.errors import UsageError
from ldm_vae.core.progress import Progress
from ldm_vae.latent_store.convert.formats import Options
from ldm_vae.latent_store.convert.sidecar import Carried
from ldm_vae.latent_store.format.layout import TENSOR_NAMES
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.maintain.merge_split import StoredPiece

CLIPS = True
MODELS = ("wan", "ltx_video", "hunyuan_video", "cogvideox")
CHANNELS = ("wan", "ltx_video")  # files that hold the normalisation
FOLDER = "finetrainers-precomputed-data"


def cannot_carry(manifest: Manifest, options: Options) -> list[str]:
    """Parts of a store that the files cannot hold, one phrase each."""
    if options.model not in MODELS:
        raise UsageError(
            f"--model: latents are made for one kind of model; expected {', '.join(MODELS)}, got {options.model}"
        )
    identity = manifest.identity
    if identity.codes is not None:
        raise UsageError("--to: the store holds indices of codes, which this format has no place for")
    lost = []
    if identity.store == "moments" and options.model == "wan":
        lost.append("the posterior's deviation as it is: finetrainers normalises logvar of wan as it does the mean")
    if identity.store != "moments":
        lost.append(f"a posterior: the store has none, so logvar is {LOGVAR_RANGE[0]:g}, and no noise is drawn")
    if len(identity.views) > 1:
        lost.append(f"the views {', '.join(identity.views[1:])}: there is a place for the clip itself only")
    if identity.pixels:
        lost.append("the stored pixels")
    if options.model in CHANNELS:
        manifest.normalisation  # noqa: B018 (raises where the VAE names none)
    else:
        lost.append("the normalisation: finetrainers multiplies by the scaling_factor of its own VAE")
    lost.append("keys, captions and other columns: file N is sample N of the store, and condition-N.pt is its prompt's")
    lost.append("the VAE, the quarantine and checksums")
    return lost


def write(folder: Path, manifest: Manifest, pieces: Sequence[StoredPiece], options: Options) -> None:
    """Write OUT/finetrainers-precomputed-data."""
    (folder / FOLDER).mkdir()
    number = itertools.count()
    for piece in Progress(pieces, desc="convert", unit="shards", leave=False):
        for tensors, _ in piece.read(np.arange(len(piece.keys))):
            mean = _torch(manifest, tensors[TENSOR_NAMES[manifest.identity.store][0]])
            has_logvar = manifest.identity.store == "moments"
            logvar = _torch(manifest, tensors["logvar"]) if has_logvar else torch.full_like(mean, LOGVAR_RANGE[0])
            for own in zip(mean, logvar, strict=True):
                item = _item(manifest, str(options.model), *own)
                torch.save(item, folder / FOLDER / f"latent-{next(number)}.pt")


def _torch(manifest: Manifest, values: Any) -> torch.Tensor:
    stored = torch.from_numpy(np.ascontiguousarray(values))
    return stored.view(torch.bfloat16) if manifest.identity.dtype == "bf16" else stored


def _item(manifest: Manifest, model: str, mean: torch.Tensor, logvar: torch.Tensor) -> dict[str, Any]:
    """Conditions of one sample, whose mean and logvar are [c, t, h, w], or [c, h, w] of an image."""
    moments = torch.cat([mean, logvar])[None]
    moments = moments if moments.ndim == 5 else moments[:, :, None]
    item: dict[str, Any] = {"latents": moments.transpose(1, 2).contiguous() if model == "cogvideox" else moments}
    if model == "ltx_video":
        item |= dict(zip(("num_frames", "height", "width"), moments.shape[2:], strict=True))
    if model in CHANNELS:
        law = manifest.normalisation.per_channel(len(mean))
        std = torch.tensor(law.latents_std)
        item |= {"latents_mean": torch.tensor(law.latents_mean), "latents_std": 1.0 / std if model == "wan" else std}
    return item


def carried(path: Path) -> Carried | None:
    """Raises UsageError: there is no way back."""
    raise UsageError(
        f"--from finetrainers: the files of {path} are pickles, which are not read; the store that they were written "
        "from has all that they hold"
    )
