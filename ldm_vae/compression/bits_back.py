"""Lossless: bits-back coding with ANS (Townsend, Bird & Barber, "BB-ANS", ICLR 2019), image after image on one stack.

    take   z ~ q(z | x)  off the stack      the bits that were there choose z
    put    x by p(x | z), then z by p(z)

An image adds -log2 p(x | z) - log2 p(z) + log2 q(z | x) bits: the negative evidence lower bound, for one sample z. Only
the first image needs bits to begin with, the seed. z is in one of BINS intervals of equal mass under the prior N(0, 1),
and stands for the interval's median; x in `levels` values, by the likelihood's own masses.

Legend: C image channels, H W pixels, c latent channels, h w latent positions, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.fingerprint import decoder_fingerprint, encoder_fingerprint, fingerprint
from ldm_vae.autoencoder.geometry import image_channels, latent_size, only_kl, step_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.weights.checkpoint import TENSORS, is_checkpoint
from ldm_vae.autoencoder.weights.files import open_weights
from ldm_vae.compression.entropy_coder import (
    MOST_BITS,
    Code,
    OtherContentError,
    Symbols,
    Words,
    categorical,
    coders,
    content_of,
)
from ldm_vae.core import config, rng
from ldm_vae.core.errors import UsageError
from ldm_vae.core.progress import Progress
from ldm_vae.data.transforms import to_pixels
from ldm_vae.run.selection import at_checkpoint
from ldm_vae.training.config import Training, build_objective
from ldm_vae.training.objective import Objective

BINS = 2**12  # of a latent value; from 2^8 to 2^16 the rate of the digits is the same to 0.4 %, the noise of a draw
ROWS = 1024  # values whose tables of probabilities are in memory at a time
HEAD = 2  # words of a stack's head, which is never taken

Table = Callable[[slice], npt.NDArray[np.float64]]


def load_likelihood(source: str, which: str | None = None) -> tuple[Any, Objective]:
    """The VAE of a run's checkpoint (`which`; by default the last), and its objective with the averaged parameters.

    Raises:
        UsageError: it is no run, or its objective is no likelihood of discrete levels.
    """
    place = f"--vae {source}"
    if not is_checkpoint(source):
        if not (Path(source) / "checkpoints").is_dir():
            raise UsageError(
                f"{place}: expected a run folder with checkpoints/, which hold the variance of the likelihood; a VQ "
                "autoencoder needs --prior"
            )
        source = at_checkpoint(source, which or "last")
    folder = Path(source)
    objective = build_objective(config.load(Training, folder / "config.yaml", []), outline=True)
    name, vae = objective.likelihood, load_autoencoder(source)
    levels = getattr(objective.terms[name], "levels", None) if name is not None else None
    if name is None or levels is None or levels > 256:
        has = "no likelihood" if name is None else f"{name} with {levels or 'no'} levels"
        raise UsageError(
            f"{place}: expected a VAE trained with a likelihood of discrete pixel values (losses.gaussian_nll.levels, "
            f"at most 256), its config has {has}"
        )
    saved = open_weights(folder / TENSORS, place).entries
    for parameter, value in objective.terms[name].named_parameters():
        # one that is not learned is not saved
        if (entry := saved.get(f"ema_objective.terms.{name}.{parameter}")) is not None:
            value.data.copy_(entry.read())
    return vae, objective.requires_grad_(False)


class BitsBack:
    """Images uint8 [C, H, W] of any sizes <=> a stack."""

    kind = "bits_back"

    def __init__(self, vae: Any, objective: Objective) -> None:
        """Raises UsageError for a network without a Gaussian posterior."""
        only_kl(vae, "--vae")
        assert objective.likelihood is not None
        self.vae: Any = vae
        self.likelihood = cast(Any, objective.terms[objective.likelihood])
        self.levels: int = self.likelihood.levels
        own = dict(self.likelihood.named_parameters())
        levels = {"levels": torch.tensor(self.levels)}
        self.networks = (encoder_fingerprint(vae), decoder_fingerprint(vae), fingerprint(own | levels))
        self.step = step_of(vae)
        quantiles = torch.arange(2 * BINS + 1, dtype=torch.float64) / (2 * BINS)
        ends = torch.special.ndtri(quantiles)  # of the intervals, and between two of them the median
        self.edges, self.medians = ends[::2], ends[1::2]

    def check(self, image: torch.Tensor, name: str) -> None:
        """Raises UsageError for an image uint8 [C, H, W] with a value that is none of the levels."""
        other = image[self._image(self.levels_of(image)) != image]
        if len(other):
            raise UsageError(
                f"IMAGE {name}: has the value {int(other[0])}, which is none of the {self.levels} levels (from 0 to "
                "255, evenly spread) of the likelihood"
            )

    def encode(self, images: Sequence[torch.Tensor]) -> Code:
        """Images that have passed `check`."""
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        needs = [HEAD + -(-MOST_BITS * int(np.prod(self._latent(*size))) // 32) for size in sizes]
        seed = max(needs)
        while (words := self._stack(images, needs, seed)) is None:
            seed *= 2  # images that took more than they gave
        begun = _seed(seed)
        shared = min(len(begun), len(words))
        kept = int(np.argmin(np.append(begun[:shared] == words[:shared], False)))
        return Code(words[kept:], content_of(images), seed, kept)

    def _stack(self, images: Sequence[torch.Tensor], needs: Sequence[int], seed: int) -> Words | None:
        stack = coders().stack.AnsCoder(_seed(seed))
        for image, need in zip(Progress(images, desc="compress", unit="img"), needs, strict=True):
            if stack.num_words() < need:
                return None
            shape, posterior = self._posterior(image)
            bins = _pop(stack, int(np.prod(shape)), posterior)
            _push(stack, self.levels_of(image).flatten().numpy(), self._pixels(bins, shape, image.shape))
            stack.encode_reverse(bins, self._prior())
        words: Words = stack.get_compressed()
        return words

    def decode(self, code: Code, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Images of these sizes (H, W). Raises OtherContentError where they are not those that were encoded."""
        channels, images = image_channels(self.vae), list[torch.Tensor]()
        try:
            stack = coders().stack.AnsCoder(np.concatenate([_seed(code.seed)[: code.kept], code.words]))
            # what was put last comes first
            for size in Progress(sizes[::-1], desc="decompress", unit="img"):
                shape = self._latent(*size)
                bins = stack.decode(self._prior(), int(np.prod(shape)))
                values = _pop(stack, channels * size[0] * size[1], self._pixels(bins, shape, (channels, *size)))
                image = self._image(torch.from_numpy(values).view(channels, *size))
                _push(stack, bins, self._posterior(image)[1])
                images.insert(0, image)
            left = stack.get_compressed()
        except ValueError as error:  # words that no stack leaves
            raise OtherContentError from error
        if content_of(images) != code.content or not np.array_equal(left, _seed(code.seed)):
            raise OtherContentError
        return images

    # --- probabilities ------------------------------------------------------------------------------------------------

    def _latent(self, height: int, width: int) -> tuple[int, ...]:
        """(c, h, w) of an image, padded to whole steps."""
        padded = [-(-side // self.step) * self.step for side in (height, width)]
        return latent_size(self.vae, *padded)

    def _posterior(self, image: torch.Tensor) -> tuple[tuple[int, ...], Table]:
        """The latent's shape (c, h, w), and masses of the intervals [n, BINS] of its values."""
        below, right = (-side % self.step for side in image.shape[1:])
        pixels = F.pad(to_pixels(image)[None], (0, right, 0, below), mode="replicate")
        moments = finite.encode(self.vae, pixels)
        mean = moments.mean.double().flatten()[:, None]
        deviation = torch.exp(0.5 * moments.logvar.double()).flatten()[:, None]

        def masses(rows: slice) -> npt.NDArray[np.float64]:
            below_edge = torch.special.ndtr((self.edges - mean[rows]) / deviation[rows])
            found: npt.NDArray[np.float64] = below_edge.diff(dim=1).numpy()
            return found

        return tuple(moments.mean.shape[1:]), masses

    def _pixels(self, bins: Symbols, shape: Sequence[int], size: Sequence[int]) -> Table:
        """Masses of the levels [n, L] of an image's values; size (C, H, W)."""
        z = self.medians[torch.from_numpy(bins).long()].float().view(1, *shape)
        decoded = finite.decode(self.vae, z)[0, :, : size[1], : size[2]].flatten()
        return lambda rows: self.likelihood.masses(decoded[rows]).numpy()

    @staticmethod
    def _prior() -> Any:
        return coders().model.Uniform(BINS)

    def levels_of(self, image: torch.Tensor) -> torch.Tensor:
        """Levels int32 from 0, of an image uint8."""
        return (image.double() * ((self.levels - 1) / 255)).round().int()

    def _image(self, levels: torch.Tensor) -> torch.Tensor:
        return (levels.double() * (255 / (self.levels - 1))).round().to(torch.uint8)


def _seed(count: int) -> Words:
    """Words that a stack begins with; the last is not 0, which constriction forbids."""
    words = np.frombuffer(rng.generator(0, "bits back").bytes(4 * count), "<u4").astype(np.uint32)
    words[-1:] |= 1
    return words


def _push(stack: Any, symbols: Symbols, table: Table) -> None:
    for start in reversed(range(0, len(symbols), ROWS)):
        rows = slice(start, min(start + ROWS, len(symbols)))
        stack.encode_reverse(symbols[rows], categorical(), table(rows))


def _pop(stack: Any, count: int, table: Table) -> Symbols:
    parts = [
        stack.decode(categorical(), table(slice(start, min(start + ROWS, count)))) for start in range(0, count, ROWS)
    ]
    return np.concatenate(parts)
