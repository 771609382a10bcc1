"""A trained prior with all that makes pictures of its samples; written once, loaded from a run.

    generator = CodeGenerator.load("runs/prior", vae)         # RUN/prior: the network and how to call it
    pixels = generator.pixels(range(8))                       # [8, C, H, W]; the same keys give the same pictures
    indices = generator.indices(range(8), label="flower", sampling=SamplingConfig(top_p=0.9))

Legend: B batch, q codebooks, p positions, C image channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.codebooks import beside
from ldm_vae.autoencoder.finite import check_weights
from ldm_vae.autoencoder.weights.files import open_folder
from ldm_vae.autoencoder.weights.networks import fill
from ldm_vae.core import atomic_io, config
from ldm_vae.core.config import Part, Section, choice
from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import parse_json, why_unreadable
from ldm_vae.prior.model import Prior
from ldm_vae.prior.sampling import SamplingConfig

FOLDER, CALL = "prior", "prior.json"


class Call(Section):
    """Settings of a trained network: of its making, and of its samples."""

    model: choice("ldm_vae.priors")  # type: ignore[valid-type]
    codes: int
    shape: tuple[int, ...]
    classes: tuple[Any, ...]
    seed: int
    sampling: SamplingConfig


@dataclass(frozen=True)
class CodeGenerator:
    """A trained prior. prior: in eval mode; model: what it was built from; vae: decodes; shape (q, *p) of an image's
    indices of `codes`; sampling: the default; classes: the values that labels stand for; seed: of the samples."""

    prior: Prior
    model: Part
    vae: Any
    codes: int
    shape: tuple[int, ...]
    sampling: SamplingConfig
    classes: tuple[Any, ...] = ()
    seed: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    def labels(self, keys: Sequence[int], label: Any = None) -> torch.Tensor:
        """Labels [B]: of the class `label`, or every class in turn; the one that stands for none where there are none.

        Raises:
            UsageError: there is no such class.
        """
        if label is not None and label not in self.classes:
            exist = ", ".join(map(str, self.classes[:12])) or "none"
            raise UsageError(f"label: no class {label!r}; there are {exist}")
        fixed = None if label is None else self.classes.index(label)
        numbers = [key % max(1, len(self.classes)) if fixed is None else fixed for key in keys]
        return torch.tensor(numbers, device=self.device)

    @torch.no_grad()
    def indices(self, keys: Sequence[int], label: Any = None, sampling: SamplingConfig | None = None) -> torch.Tensor:
        """Samples [B, q, *p], one for each key, of the class `label` or of every class in turn."""
        return self.prior.sample(self.labels(keys, label), self.seed, keys, sampling or self.sampling)

    @torch.no_grad()
    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        """indices [B, q, *p] => pixels [B, C, H, W], fp32, not clamped, on the CPU."""
        # a VQModel has one codebook, and its indices no place for a number of them
        given = indices[:, 0] if beside(self.vae) is None else indices
        return finite.decode_indices(self.vae, given.to(self.vae.device)).cpu()

    def image_pixels(self) -> int:
        """Pixels of an image (of a clip, of all its frames), without its channels: what bits per pixel count."""
        return math.prod(self.decode(torch.zeros(1, *self.shape, dtype=torch.long)).shape[2:])

    def pixels(self, keys: Sequence[int], label: Any = None, sampling: SamplingConfig | None = None) -> torch.Tensor:
        """Decoded samples [B, C, H, W]."""
        return self.decode(self.indices(keys, label, sampling))

    def batches(self, count: int, batch_size: int) -> Iterator[torch.Tensor]:
        """`count` decoded samples, keys 0, 1, ..."""
        for start in range(0, count, batch_size):
            yield self.pixels(range(start, min(start + batch_size, count)))

    # --- files --------------------------------------------------------------------------------------------------------

    def write(self, run: Path) -> Path:
        """RUN/prior: the network as diffusers writes it, and prior.json."""
        out = run / FOLDER
        with atomic_io.whole_folder(out, atomic_io.anything) as folder:
            self.prior.save(folder)
            call = Call(model=self.model, codes=self.codes, shape=self.shape, classes=self.classes, seed=self.seed,
                        sampling=self.sampling)  # fmt: skip
            (folder / CALL).write_text(call.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return out

    @classmethod
    def load(cls, run: str | Path, vae: Any) -> CodeGenerator:
        """Load from a run folder, with the VAE whose codes it learned.

        Raises:
            UsageError: the folder has no finished prior, or not a whole one.
        """
        folder, place = Path(run) / FOLDER, f"run {run}"
        if not (folder / CALL).is_file():
            raise UsageError(f"{place}: expected {FOLDER}/{CALL}, which train.prior writes at its end")
        try:
            tree = parse_json(read_bytes(folder / CALL))
        except (OSError, ValueError) as error:
            reason = why_unreadable(folder / CALL, error)
            raise UsageError(f"{place}: {FOLDER}/{CALL} cannot be read: {reason}") from error
        call = config.validate(Call, tree, f"{place}: {FOLDER}/{CALL}")
        prior: Prior = call.model.build(call.codes, call.shape, len(call.classes))
        fill(prior.network, open_folder(folder, place))
        check_weights(prior.network, f"{place}: its {FOLDER}")
        return cls(
            prior.float().requires_grad_(False).eval(), call.model, vae, call.codes, call.shape, call.sampling,
            call.classes, call.seed,
        )  # fmt: skip

    def to(self, device: torch.device) -> CodeGenerator:
        """The same on a device."""
        return replace(self, prior=self.prior.to(device), vae=self.vae.to(device))
