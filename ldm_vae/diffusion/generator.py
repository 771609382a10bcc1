"""A trained diffusion model with all that makes pictures of its samples; written once, loaded from a run.

    generator = Generator.load("runs/diffusion", vae)       # RUN/denoiser: a network of diffusers and how to call it
    pixels = generator.pixels(range(8))                     # [8, C, H, W]; the same keys give the same pictures
    pixels = generator.pixels(range(8), label="flower", sampling=SamplingConfig(guidance=2.0))

Legend: B batch, C image channels, H W pixels, c latent channels, h w latent positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.finite import check_weights
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.weights.networks import CONFIG, load_folder, read_config
from ldm_vae.core import atomic_io, rng
from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import parse_json, why_unreadable
from ldm_vae.diffusion.flow import (
    Denoiser,
    SamplingConfig,
    flow_scheduler,
    sample,
)

FOLDER, CALL = "denoiser", "flow.json"


@dataclass(frozen=True)
class Generator:
    """A trained diffusion model. denoiser: in eval mode; vae: decodes; shape (c, h, w) of a latent, normalised as
    `normalisation` says; sampling: the default; classes: the values that labels stand for; shift: of the times, as in
    training; seed: of the noise."""

    denoiser: Denoiser
    vae: Any
    shape: tuple[int, ...]
    normalisation: Normalisation
    sampling: SamplingConfig
    classes: tuple[Any, ...] = ()
    shift: float = 1.0
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def noise(self, keys: Sequence[int]) -> torch.Tensor:
        """Noise that samples start from, [B, c, h, w] on the CPU."""
        return rng.normal(self.seed, "samples", keys, self.shape)

    def labels(self, keys: Sequence[int]) -> list[int]:
        """Every class in turn; the label that stands for none where there are no classes."""
        return [key % len(self.classes) if self.classes else 0 for key in keys]

    def latents(self, keys: Sequence[int], label: Any = None, sampling: SamplingConfig | None = None) -> torch.Tensor:
        """Samples [B, c, h, w], one for each key, of the class `label` or of every class in turn.

        Raises:
            UsageError: there is no such class.
        """
        if label is not None and label not in self.classes:
            exist = ", ".join(map(str, self.classes[:12])) or "none"
            raise UsageError(f"label: no class {label!r}; there are {exist}")
        numbers = self.labels(keys) if label is None else [self.classes.index(label)] * len(keys)
        return sample(
            self.denoiser, self.noise(keys).to(self.device), torch.tensor(numbers, device=self.device),
            sampling or self.sampling, shift=self.shift, classes=len(self.classes),
        )  # fmt: skip

    @torch.no_grad()
    def decode(self, scaled: torch.Tensor) -> torch.Tensor:
        """latents [B, c, h, w] => pixels [B, C, H, W], fp32, not clamped, on the CPU."""
        return finite.decode(self.vae, self.normalisation.undo(scaled.to(self.vae.device))).cpu()

    def pixels(self, keys: Sequence[int], label: Any = None, sampling: SamplingConfig | None = None) -> torch.Tensor:
        """Decoded samples [B, C, H, W]."""
        return self.decode(self.latents(keys, label, sampling))

    def batches(self, count: int, batch_size: int) -> Iterator[torch.Tensor]:
        """`count` decoded samples, keys 0, 1, ..."""
        for start in range(0, count, batch_size):
            yield self.pixels(range(start, min(start + batch_size, count)))

    # --- files --------------------------------------------------------------------------------------------------------

    def write(self, run: Path) -> Path:
        """RUN/denoiser: what diffusers' `from_pretrained` reads (network and scheduler), and flow.json."""
        out = run / FOLDER
        with atomic_io.whole_folder(out, atomic_io.anything) as folder:
            self._fill(folder)
        return out

    def _fill(self, folder: Path) -> None:
        self.denoiser.network.save_pretrained(folder)
        flow_scheduler(self.shift).save_pretrained(folder)
        call = {
            "shape": self.shape,
            "classes": self.classes,
            "shift": self.shift,
            "seed": self.seed,
            "normalisation": self.normalisation.to_config(),
            "sampling": self.sampling.model_dump(),
        }
        (folder / CALL).write_text(json.dumps(call, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, run: str | Path, vae: Any) -> Generator:
        """Load from a run folder, with the VAE whose latents it learned.

        Raises:
            UsageError: the folder has no finished diffusion model, or not a whole one.
        """
        folder, place = Path(run) / FOLDER, f"run {run}"
        if not (folder / CALL).is_file():
            raise UsageError(f"{place}: expected {FOLDER}/{CALL}, which train.diffusion writes at its end")
        network = load_folder(folder, place, _model_class(folder, place)).float().requires_grad_(False)
        check_weights(network, f"{place}: its {FOLDER}")
        try:
            call = parse_json(read_bytes(folder / CALL))
            channels, height, width = call["shape"]
            return cls(
                denoiser=Denoiser(network, len(call["classes"])).eval(),
                vae=vae,
                shape=(channels, height, width),
                normalisation=Normalisation.from_config(call["normalisation"], str(folder / CALL)),
                sampling=SamplingConfig(**call["sampling"]),
                classes=tuple(call["classes"]),
                shift=call["shift"],
                seed=call["seed"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = why_unreadable(folder / CALL, error)
            raise UsageError(f"{place}: {FOLDER}/{CALL} cannot be read: {reason}") from error

    def to(self, device: torch.device) -> Generator:
        """The same on a device."""
        return replace(self, denoiser=self.denoiser.to(device), vae=self.vae.to(device))


def _model_class(folder: Path, place: str) -> dict[str, Any]:
    """The model of diffusers that a config.json names, by that name; those trained here where it names none."""
    name = str(read_config(folder / CONFIG, place).get("_class_name"))
    model = getattr(diffusers, name, None)
    if isinstance(model, type) and issubclass(model, diffusers.ModelMixin):
        return {name: model}
    return {one.__name__: one for one in (diffusers.DiTTransformer2DModel, diffusers.UNet2DModel)}
