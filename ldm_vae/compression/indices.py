"""Lossy: the indices of a VQ autoencoder, coded under an autoregressive prior; -log2 p(indices) bits.

An image is padded by its own border to whole crops of the prior and encoded whole; its indices are cut into those
crops, each of which the prior codes by itself. Step by step with cached keys and values in both directions: a pass over
all steps at once, as in training, rounds otherwise.

Legend: N crops, q codebooks, h w indices of a crop, S steps, n indices of a step, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ldm_vae.autoencoder import finite, latents
from ldm_vae.autoencoder.codebooks import codes_of
from ldm_vae.autoencoder.fingerprint import decoder_fingerprint, encoder_fingerprint, fingerprint
from ldm_vae.autoencoder.geometry import downsampling_factor
from ldm_vae.compression.entropy_coder import (
    Code,
    OtherContentError,
    Symbols,
    categorical,
    coders,
    content_of,
)
from ldm_vae.core.errors import UsageError
from ldm_vae.core.progress import Progress
from ldm_vae.data.transforms import to_pixels, to_uint8
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.prior.order import from_steps, to_steps
from ldm_vae.priors.transformer import Causal, Walk

LANES = 16  # crops that are coded side by side; a decoder needs the same number, so it is part of the format

Coding = Callable[[npt.NDArray[np.float64], Symbols | None], Symbols]


class Indices:
    """Images uint8 [C, H, W] of any sizes <=> a code; what comes back is what the network makes of their indices."""

    kind = "indices"

    def __init__(self, generator: CodeGenerator, name: str) -> None:
        """Raises UsageError for a prior without a likelihood, with classes, of clips, or of another codebook."""
        self.generator, self.vae = generator, generator.vae
        place, (books, codes) = f"--prior {name}", codes_of(self.vae) or (None, 0)
        if (books or 1, codes) != (generator.shape[0], generator.codes):
            wanted, there = _in_words(generator.shape[0], generator.codes), _in_words(books, codes)
            raise UsageError(f"{place}: is of {wanted} codes, and --vae has {there}")
        if not isinstance(generator.prior, Causal):
            raise UsageError(
                f"{place}: kind {generator.model.kind} gives a bound and no likelihood to code with; expected kind "
                "transformer"
            )
        if generator.classes:
            raise UsageError(
                f"{place}: is of {len(generator.classes)} classes, and an image has none here; train one with "
                "conditional: false"
            )
        if len(generator.shape) != 3:
            raise UsageError(f"{place}: is of clips, expected one of images")
        self.prior: Causal = generator.prior
        of_vae = (encoder_fingerprint(self.vae), decoder_fingerprint(self.vae))
        self.networks = (*of_vae, fingerprint(self.prior.network.state_dict()))
        self.factor = downsampling_factor(self.vae)

    def encode(self, images: Sequence[torch.Tensor]) -> Code:
        crops = torch.cat([self.crops(image) for image in Progress(images, desc="encode", unit="img")])
        encoder = coders().queue.RangeEncoder()

        def put(probabilities: npt.NDArray[np.float64], symbols: Symbols | None) -> Symbols:
            assert symbols is not None
            encoder.encode(symbols, categorical(), probabilities)
            return symbols

        self._walk(put, len(crops), crops)
        return Code(encoder.get_compressed(), content_of([crops]))

    def decode(self, code: Code, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Images of these sizes (H, W). Raises OtherContentError where the indices are not those that were encoded."""
        crops = self.decode_crops(code, sum(math.prod(self._grid(*size)) for size in sizes))
        images = []
        for height, width in Progress(sizes, desc="decode", unit="img"):
            rows, columns = self._grid(height, width)
            own, crops = crops[: rows * columns], crops[rows * columns :]
            # [rows columns, q, h, w] => [1, q, rows h, columns w]
            whole = own.view(rows, columns, *own.shape[1:]).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]
            images.append(to_uint8(self.generator.decode(whole)[0, :, :height, :width]))
        return images

    def decode_crops(self, code: Code, count: int) -> torch.Tensor:
        """Indices [N, q, h, w] of so many crops. Raises OtherContentError where they are not those that were
        encoded."""
        decoder = coders().queue.RangeDecoder(code.words)

        def take(probabilities: npt.NDArray[np.float64], _: Symbols | None) -> Symbols:
            found: Symbols = decoder.decode(categorical(), probabilities)
            return found

        try:
            crops = self._walk(take, count)
        except (ValueError, AssertionError) as error:  # words that no encoder writes
            raise OtherContentError from error
        if content_of([crops]) != code.content:
            raise OtherContentError
        return crops

    def crops(self, image: torch.Tensor) -> torch.Tensor:
        """Indices [N, q, h, w] of the crops of an image uint8 [C, H, W]."""
        (rows, columns), (_, h, w) = self._grid(*image.shape[1:]), self.generator.shape
        below, right = (
            count * side * self.factor - given
            for count, side, given in zip((rows, columns), (h, w), image.shape[1:], strict=True)
        )
        pixels = F.pad(to_pixels(image)[None], (0, right, 0, below), mode="replicate")
        indices = latents.nearest_codes(self.vae, finite.encode(self.vae, pixels).mean)
        # a VQModel's [1, h, w] are of one codebook
        whole = indices.view(1, self.generator.shape[0], rows, h, columns, w)
        return whole[0].permute(1, 3, 0, 2, 4).flatten(0, 1)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Crops of an image below and beside each other."""
        _, h, w = self.generator.shape
        return -(-height // (h * self.factor)), -(-width // (w * self.factor))

    def _walk(self, code: Coding, count: int, crops: torch.Tensor | None = None) -> torch.Tensor:
        """Code so many crops, LANES side by side; crops [N, q, h, w], or None where they are decoded. Returns them."""
        places, blank = self.prior.network.places, self.prior.blank
        known = None if crops is None else to_steps(crops.flatten(1), places, blank)
        found = []
        for start in Progress(range(0, count, LANES), desc="code", unit=f"x {LANES} crops"):
            lanes = min(LANES, count - start)
            walk: Any = Walk(self.prior.network, torch.zeros(lanes, dtype=torch.long))
            before, steps = None, []
            for step, real in enumerate(places >= 0):
                probabilities = walk.next(before)[:, real].double().softmax(dim=-1).flatten(0, 1).numpy()
                given = None if known is None else known[start : start + lanes, step, real].flatten().int().numpy()
                before = torch.full((lanes, len(real)), blank)
                before[:, real] = torch.from_numpy(code(probabilities, given)).long().view(lanes, -1)
                steps.append(before)
            found.append(from_steps(torch.stack(steps, dim=1), places))
        return torch.cat(found).view(-1, *self.generator.shape)


def _in_words(books: int | None, codes: int) -> str:
    return f"{books} x {codes}" if (books or 1) > 1 else str(codes or "none")
