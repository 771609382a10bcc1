"""Results of a validation during training in RUN/report, so that the page shows pictures while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from ldm_vae.core.pictures import save, sheet
from ldm_vae.data.source import Source
from ldm_vae.data.transforms import preprocessing_identity
from ldm_vae.metrics import result
from ldm_vae.metrics.batches import spread
from ldm_vae.metrics.evaluate import Evaluation
from ldm_vae.metrics.metric import Metric
from ldm_vae.metrics.pictures import FOLDER, INDEX, keep_pictures
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.samples import keep_samples

PICTURES = 6
KINDS = ("original", "reconstruction")


def record_validation(
    run: Path,
    vae: Any,
    source: Source,
    source_name: str,
    evaluation: Evaluation,
    metrics: Sequence[Metric],
    device: torch.device,
    *,
    resolution: int,
    batch_size: int,
    images_seen: int,
) -> Path:
    """Write RUN/report/metrics.json, its pictures, of sounds with files to listen to, and a sheet of the pictures that
    stays; to be called by the main process after `evaluate_reconstruction`. Returns the sheet,
    RUN/report/validation/images-N.png: a column for each image (the first frame of a clip, the spectrogram of a sound),
    the original above its reconstruction.

    Args:
        vae: the averaged weights that were measured, on `device`.
        source_name: where the images came from, as the config says.
        metrics: those of the evaluation.
    """
    report = run / "report"
    kinds = dict.fromkeys(spread(len(source), PICTURES), "shown")
    keep_pictures(report, [vae], source, kinds, metrics, device, resolution=resolution, batch_size=batch_size)
    frames = source.decoding.frames
    if source.decoding.signal != "audio":
        keep_samples(report, vae, evaluation.latents, resolution, device, source.decoding.alpha, frames)
    about = result.describe_vae(vae, f"{run.name}, averaged weights", str(run), frames)
    prepared = preprocessing_identity(source.decoding)
    data = {"source": source_name, "quarantined": 0, "preprocessing": prepared}
    data |= result.about_signal(source.decoding, resolution)
    computed = result.settings(device, batch_size)
    found = result.result(PINNED, about, data, computed, evaluation, source.key)
    result.write(report / "metrics.json", found)
    return _sheet(report, images_seen)


def _sheet(report: Path, images_seen: int) -> Path:
    rows = json.loads((report / FOLDER / INDEX).read_text(encoding="utf-8"))
    files = [row["vaes"][0]["reconstruction"].replace("reconstruction", kind) for kind in KINDS for row in rows]
    images = [pil_to_tensor(Image.open(report / FOLDER / file).convert("RGB")) for file in files]
    path = report / "validation" / f"images-{images_seen:09d}.png"
    path.parent.mkdir(exist_ok=True)
    save(sheet(images, len(rows)), path)
    return path
