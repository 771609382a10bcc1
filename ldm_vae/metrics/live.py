"""What a validation during training leaves in RUN/report, so that the page shows pictures while the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_vae.data.source import Source
from ldm_vae.metrics import result
from ldm_vae.metrics.batches import spread
from ldm_vae.metrics.evaluate import Evaluation
from ldm_vae.metrics.metric import Metric
from ldm_vae.metrics.pictures import keep_pictures
from ldm_vae.metrics.protocol import PINNED

PICTURES = 6


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
) -> None:
    """Write RUN/report/metrics.json and pictures; to be called by the main process after `evaluate_reconstruction`.

    Args:
        vae: the averaged weights that were measured, on `device`.
        source_name: where the images came from, as the config says.
        metrics: those of the evaluation.
    """
    report = run / "report"
    kinds = dict.fromkeys(spread(len(source), PICTURES), "shown")
    keep_pictures(report, [vae], source, kinds, metrics, device, resolution=resolution, batch_size=batch_size)
    about = result.describe_vae(vae, f"{run.name}, averaged weights", str(run))
    data = {"source": source_name, "resolution": resolution, "quarantined": 0}
    computed = result.settings(device, batch_size)
    found = result.result(PINNED, about, data, computed, evaluation, source.key)
    result.write(report / "metrics.json", found)
