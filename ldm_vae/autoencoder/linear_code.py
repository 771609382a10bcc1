"""The linear code: principal components of f x f patches, the best that a linear encoder and decoder can do of a size.

A patch p of f x f pixels has mean m and covariance S = V diag(s^2) V^T (eigenvalues falling). Of c channels the code is

    z = diag(1 / s_c) V_c^T (p - m)        of unit variance, uncorrelated
    p' = m + V_c diag(s_c) z               and no other linear pair of maps leaves a smaller squared error

A network of the same latent size that reconstructs worse has not yet learned what least squares knows (Baldi & Hornik,
"Neural networks and principal component analysis", 1989).

Of clips a patch has t frames of f x f pixels. The first frame of a clip is a patch of t frames that are all alike, as
the classes of clips are causal: 1 + t k frames are 1 + k patches.

Legend: B batch, C image channels, T frames, H W pixels, f patch side, t frames of a patch, c latent channels, h w
patches, P = t f f C numbers of a patch (frames first, channels last).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError

SMALLEST = 1e-6  # of the largest standard deviation: a component below it is constant, and is not blown up to unit size


def to_patches(images: torch.Tensor, factor: int, frames: int = 1) -> torch.Tensor:
    """images [B, C, H, W] => patches [B, h, w, P], clips [B, C, 1 + t k, H, W] => [B, 1 + k, h, w, P]; a rest below f
    at the right and at the bottom is left out. Sounds [B, C, L] => [B, n, P], f samples of a patch."""
    if images.ndim == 3:
        return images.unfold(2, factor, factor).permute(0, 2, 3, 1).flatten(2)
    if images.ndim == 5:
        front = images[:, :, :1].expand(-1, -1, frames - 1, -1, -1)
        tiles = torch.cat([front, images], dim=2).unfold(2, frames, frames).unfold(3, factor, factor)
        tiles = tiles.unfold(4, factor, factor)  # [B, C, 1 + k, h, w, t, f, f]
        return tiles.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(4)
    tiles = images.unfold(2, factor, factor).unfold(3, factor, factor)  # [B, C, h, w, f, f]
    return tiles.permute(0, 2, 3, 4, 5, 1).flatten(3)


def from_patches(patches: torch.Tensor, factor: int, frames: int = 1) -> torch.Tensor:
    """patches [B, h, w, P] => images [B, C, H, W], [B, 1 + k, h, w, P] => clips [B, C, 1 + t k, H, W],
    [B, n, P] => sounds [B, C, L]."""
    if patches.ndim == 3:
        return patches.reshape(len(patches), -1, patches.shape[2] // factor).transpose(1, 2)
    *batch, rows, columns, _ = patches.shape
    tiles = patches.reshape(-1, rows, columns, frames, factor, factor, patches.shape[-1] // (frames * factor**2))
    images = tiles.permute(0, 6, 3, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4)  # [.., C, t, H, W]
    if len(batch) == 1:
        return images[:, :, 0]
    clips = images.reshape(*batch, *images.shape[1:]).transpose(1, 2).flatten(2, 3)  # [B, C, t + t k, H, W]
    return clips[:, :, frames - 1 :]


class PatchMoments:
    """Count, sum [P] and products [P, P] of the patches of all images seen, in fp64.

    8-bit pixels are added up as the integers they are, which fp64 holds exactly below 2^53 (10^11 patches): the sums do
    not depend on the order of the images, the batches or the number of processes, to the bit.
    """

    def __init__(
        self, factor: int, channels: int, device: torch.device | str = "cpu", frames: int = 1, axes: int = 2
    ) -> None:
        self.factor, self.frames, self.axes = factor, frames, axes
        numbers = frames * factor**axes * channels
        # one tensor, so that one reduction adds up the ranks: a patch with a 1 behind it gives count, sums and products
        self.products = torch.zeros(numbers + 1, numbers + 1, dtype=torch.float64, device=device)

    def update(self, pixels: torch.Tensor) -> None:
        """pixels [B, C, H, W] on the scale 0..255, or clips [B, C, T, H, W]; samples [B, C, L] as they are."""
        rows = to_patches(pixels.to(self.products.device), self.factor, self.frames).flatten(0, -2).double()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        self.products += rows.T @ rows

    @property
    def shape(self) -> str:
        """Of a patch, in words."""
        if self.axes == 1:
            return f"{self.factor} samples"
        frames = "" if self.frames == 1 else f"{self.frames} frames of "
        return f"{frames}{self.factor} x {self.factor} pixels"

    def add_up(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add up over the ranks; `total` sums a tensor over all of them."""
        self.products = total(self.products)

    def code(self, latent_channels: int) -> LinearCode:
        """The code of c channels of what was seen, for pixels in [-1, 1].

        Raises:
            UsageError: a patch has fewer numbers than c, there was no image, or all are of one colour.
        """
        numbers = len(self.products) - 1
        if latent_channels > numbers:
            raise UsageError(
                f"model.latent_channels: a linear code has at most one channel for each of the {numbers} numbers of a "
                f"patch of {self.shape}, got {latent_channels}"
            )
        products = self.products.cpu()
        count, sums = products[-1, -1], products[-1, :-1]
        if not count:
            raise UsageError("data: a linear code needs images, and there was none that could be used")
        # a sound has no offset of its own, and AutoencoderOobleck's last layer has none to give
        mean = sums / count if self.axes == 2 else torch.zeros_like(sums)
        covariance = products[:-1, :-1] / count - mean[:, None] * mean
        variances, vectors = torch.linalg.eigh(covariance)
        variances, vectors = variances.flip(0)[:latent_channels], vectors.flip(1)[:, :latent_channels]
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        vectors = vectors * largest.sign()  # an eigenvector's sign is open; the largest entry is made positive
        size, centre = (127.5, 1.0) if self.axes == 2 else (1.0, 0.0)
        deviations = variances.clamp_min(0).sqrt() / size
        if not deviations[0] > 0:
            raise UsageError("data: all pixels of the training crops are equal; a linear code needs images that differ")
        deviations = deviations.clamp_min(SMALLEST * float(deviations[0]))
        return LinearCode(self.factor, mean / size - centre, vectors.contiguous(), deviations, self.frames, self.axes)


@dataclass(frozen=True)
class LinearCode:
    """A fitted linear code: factor f; of pixels in [-1, 1], in fp64: mean [P], components V [P, c] of length 1,
    deviations s [c], falling; frames t; axes along which a patch has f positions, 1 of sounds."""

    factor: int
    mean: torch.Tensor
    components: torch.Tensor
    deviations: torch.Tensor
    frames: int = 1
    axes: int = 2

    @property
    def channels(self) -> int:
        """C of an image, clip or sound."""
        return len(self.mean) // (self.frames * int(self.factor**self.axes))

    @property
    def latent_channels(self) -> int:
        return len(self.deviations)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W] in [-1, 1] => z [B, c, h, w] in fp64, each channel of mean 0 and variance 1 over what
        the code was fitted on; clips [B, C, T, H, W] => [B, c, 1 + k, h, w], sounds [B, C, L] => [B, c, n]."""
        rows = to_patches(images.double(), self.factor, self.frames) - self.mean.to(images.device)
        return (rows @ (self.components / self.deviations).to(images.device)).movedim(-1, 1)

    def of_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """patches [n, P] on the scale 0..255, of sounds as they are => z [n, c]."""
        values = patches.double() / 127.5 - 1 if self.axes == 2 else patches.double()
        return (values - self.mean) @ (self.components / self.deviations)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, c, h, w] => images [B, C, H, W] in fp64, not clamped; [B, c, 1 + k, h, w] => clips."""
        rows = z.double().movedim(1, -1) @ (self.components * self.deviations).T.to(z.device)
        return from_patches(rows + self.mean.to(z.device), self.factor, self.frames)


ROUNDS = 10  # of Lloyd's algorithm; it falls fast at first


def k_means(vectors: torch.Tensor, codes: int, seed: int) -> torch.Tensor:
    """vectors [n, c] => a codebook [codes, c] by Lloyd's algorithm from a keyed draw of them. A code that loses all its
    vectors stays where it is; of fewer vectors than codes, codes repeat with a little noise."""
    draw = rng.generator(seed, "codebook")
    book = vectors[torch.from_numpy(draw.permutation(len(vectors)))[torch.arange(codes) % len(vectors)]]
    book = book + 1e-6 * vectors.std() * torch.from_numpy(draw.standard_normal(tuple(book.shape)))
    for _ in range(ROUNDS):
        nearest = torch.cat([torch.cdist(part, book).argmin(dim=1) for part in torch.split(vectors, 4096)])
        sums = torch.zeros_like(book).index_add_(0, nearest, vectors)
        counts = torch.bincount(nearest, minlength=codes)[:, None]
        book = torch.where(counts > 0, sums / counts.clamp_min(1), book)
    return book
