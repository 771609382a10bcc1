"""Export as a folder of transformers.DacModel: codes, sounds and feature extractor, read back and compared with the
network before it is published.

Legend: B batch, L samples, q codebooks, n latent positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import beside, put_beside
from ldm_vae.autoencoder.dac import to_dac, why_not
from ldm_vae.autoencoder.geometry import downsampling_factor
from ldm_vae.autoencoder.preparation import code_rate, recorded
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import preprocessing
from ldm_vae.export.card import Card
from ldm_vae.export.replacement import check_replaceable

TOLERANCE = 1e-5  # of full scale; measured: 0
POSITIONS = 64  # latent positions of the sounds that are compared

USAGE = """```python
import torch
from transformers import DacModel
dac = DacModel.from_pretrained("{name}")
with torch.no_grad():
    codes = dac.encode(sounds).audio_codes  # [B, 1, L] at {rate} Hz, L a multiple of {hop} => [B, {q}, L / {hop}]
    decoded = dac.decode(audio_codes=codes[:, :{some}]).audio_values  # of {some} of {q} codebooks, [B, L]
```"""


def check_carried(vae: Any) -> None:
    """Raises UsageError for a network that DacModel cannot carry."""
    if (reason := why_not(vae)) is not None:
        raise UsageError(f"--target dac: transformers' DacModel does not carry this network: {reason}")


def write_dac(vae: Any, out: Path, card: Card, files: Mapping[str, bytes]) -> list[str]:
    """Write a folder of DacModel and its DacFeatureExtractor to `out`, replacing an older export; lines on what was
    written and compared. `vae` is what `configured_copy` gave, and is used up.

    Raises:
        WorkError: what is read back codes or decodes otherwise; nothing is written.
    """
    import transformers

    model, books, rate, hop = to_dac(vae), beside(vae), code_rate(vae), downsampling_factor(vae)
    assert books is not None
    count, some = books.shape.codebooks, max(1, books.shape.codebooks // 2)
    card.metadata = {"library_name": "transformers", "pipeline_tag": "audio-to-audio", **card.metadata}
    card.loading = USAGE.format(name=card.name, rate=vae.config.sampling_rate, hop=hop, q=count, some=some)
    card.sections = {"Rate": f"{rate}; of k codebooks k of {count} parts of it."} | card.sections
    everything = dict(files)
    if (found := recorded(vae)) is not None:
        everything[preprocessing.FILE] = found.to_bytes()
    extractor = transformers.DacFeatureExtractor(sampling_rate=int(vae.config.sampling_rate), hop_length=hop)
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        with atomic_io.whole_folder(out, check_replaceable) as folder:
            model.save_pretrained(folder)
            extractor.save_pretrained(folder)
            said = _compare(vae, transformers.DacModel.from_pretrained(folder, local_files_only=True).eval())
            put_beside(vae, None)  # the class carries the codebooks: the card names no files of ours
            for name, content in (everything | {"README.md": card.text(vae).encode()}).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
    finally:
        if bars:
            transformers.logging.enable_progress_bar()
    return [f"wrote {out} (transformers' DacModel), {said}", f"codes: {rate}"]


@torch.no_grad()
def _compare(vae: Any, loaded: Any) -> str:
    """Codes of noise and of every row of the codebooks, and what all codebooks and the first alone decode to."""
    draw, books = torch.Generator().manual_seed(0), beside(vae)
    assert books is not None
    q, codes = books.shape.codebooks, books.shape.codes
    x = torch.randn(2, 1, POSITIONS * downsampling_factor(vae), generator=draw) * 0.3
    rows = torch.stack([torch.randperm(codes, generator=draw) for _ in range(q)])[None]
    z = books.vectors(rows)
    pairs = [(latents.nearest_codes(vae, latents.encode(vae, x).mean), loaded.encode(x).audio_codes),
             (books.indices(z), loaded.quantizer(z)[1])]  # fmt: skip
    count, other = sum(ours.numel() for ours, _ in pairs), sum(int((one != two).sum()) for one, two in pairs)
    # of two rows at one distance rounding takes either, and all later codes of that position follow
    if other > count / 1000:
        raise WorkError(f"reload check: DacModel gives {other:,} of {count:,} codes otherwise")
    largest = 0.0
    for given in (rows[:, :, :POSITIONS], rows[:, :1, :POSITIONS]):
        ours, theirs = latents.decode_indices(vae, given)[:, 0], loaded.decode(audio_codes=given).audio_values
        largest = max(largest, float((ours - theirs).abs().max()))
    if not largest <= TOLERANCE:
        raise WorkError(f"reload check: DacModel decodes codes to sounds that differ by {largest:.3g}")
    same = "all equal" if not other else f"all but {other:,} equal, at ties within rounding"
    return f"read back: {count:,} codes {same}, decoded samples differ by {largest:.1g} at most"
