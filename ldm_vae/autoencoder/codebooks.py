"""Codebooks: the quantizer of a network's latents that its class of diffusers has no place for, kept beside it.

It is the module `quantizer` of the network, so that checkpoints, averages, fingerprints and optimisers have it like any
other; in a folder its weights are `quantizer.safetensors` and its shape is `quantizer.json`, beside the files of
diffusers, which know nothing of it. `latents.py` asks it where a VQModel's own codebook would be asked.

Legend: B batch, c channels of z, p positions (h w, t h w, or n), N = B p vectors, q codebooks, K codes, d channels of a
code.
"""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from ldm_vae.core.config import Section
from ldm_vae.core.errors import UsageError

NAME = "quantizer"
CONFIG, WEIGHTS = f"{NAME}.json", f"{NAME}.safetensors"
MOST_BITS = 30  # of an index of one codebook: stores keep int32


class Shape(Section):
    """Content of quantizer.json."""

    kind: Literal["residual", "lfq", "bsq"]
    channels: int = Field(gt=0, le=2**16)
    codebooks: int = Field(1, gt=0, le=1024)
    codes: int = Field(gt=1, le=2**MOST_BITS)
    code_dim: int | None = Field(None, gt=0, le=2**16)
    distance: Literal["euclidean", "cosine"] = "euclidean"

    @model_validator(mode="after")
    def _check(self) -> Shape:
        if self.kind != "residual" and (self.codebooks, self.codes) != (1, 2**self.channels):
            raise ValueError(f"{self.kind}: expected one codebook of 2 ** channels codes")
        if self.kind == "residual" and self.codebooks * self.codes * (self.code_dim or self.channels) > 2**32:
            raise ValueError("codes: expected codebooks of at most 2 ** 32 numbers together")
        return self

    def build(self) -> Codebooks:
        """The module; of random rows where it has some."""
        return ResidualCodebooks(self) if self.kind == "residual" else Corners(self)


class Codebooks(nn.Module):
    """Quantizer of z [B, c, *p] of any rank, in fp32: indices [B, q, *p] int64, of which the first k say more or less
    of z."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def indices(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, c, *p] => indices [B, q, *p]."""
        raise NotImplementedError

    def vectors(self, indices: torch.Tensor) -> torch.Tensor:
        """indices [B, k, *p] of the first k <= q codebooks => z [B, c, *p]."""
        raise NotImplementedError

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z at its codes, the gradient straight through."""
        return z + (self.vectors(self.indices(z)).to(z) - z).detach()

    def files(self) -> dict[str, bytes]:
        """quantizer.json, and quantizer.safetensors where there are weights."""
        text = json.dumps(self.shape.model_dump(mode="json"), indent=2) + "\n"
        weights = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        return {CONFIG: text.encode()} | ({WEIGHTS: safetensors.torch.save(weights)} if weights else {})


class ResidualCodebooks(Codebooks):
    """Each codebook holds what those before it have left of a vector (Zeghidour et al., SoundStream, 2021), so the
    first k indices are the code of k codebooks. Factorised: it is projected to d channels, and a code back to c
    (descript-audio-codec). By cosine: the row of the smallest angle is taken, at its own length."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        d = shape.code_dim or shape.channels
        # small, as VQModel's: the first codes of a level add little before its rows have moved
        self.rows = nn.Parameter(
            torch.empty(shape.codebooks, shape.codes, d).uniform_(-1 / shape.codes, 1 / shape.codes)
        )
        pairs = shape.codebooks if shape.code_dim is not None else 0
        self.into = nn.ModuleList(nn.Linear(shape.channels, d) for _ in range(pairs))
        self.out = nn.ModuleList(nn.Linear(d, shape.channels) for _ in range(pairs))

    def look_up(self, level: int, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [N, c] as a level sees them, with their graph [N, d], and the indices of its codes [N]."""
        seen = self.into[level](residual) if self.into else residual
        z = seen.detach()
        with torch.no_grad(), precise(z):
            book = self.rows[level].to(z.dtype)
            if self.shape.distance == "cosine":
                return seen, (F.normalize(z, dim=1) @ F.normalize(book, dim=1).t()).argmax(dim=1)
            # |z - r|^2 without |z|^2, which decides nothing: fewer operations than cdist for the one position of a hop
            return seen, torch.addmm((book * book).sum(dim=1), z, book.t(), alpha=-2).argmin(dim=1)

    def share(self, level: int, codes: torch.Tensor) -> torch.Tensor:
        """Rows of a level [N, d] => what they say of vectors [N, c]."""
        return self.out[level](codes) if self.out else codes

    @torch.no_grad()
    def indices(self, z: torch.Tensor) -> torch.Tensor:
        with precise(z):
            residual, found = rows_of(z).to(self.rows), []
            for level in range(self.shape.codebooks):
                found.append(self.look_up(level, residual)[1])
                residual = residual - self.share(level, self.rows[level][found[-1]])
        return torch.stack([positions_of(level[:, None], z)[:, 0] for level in found], dim=1)

    def vectors(self, indices: torch.Tensor) -> torch.Tensor:
        with precise(indices):
            shares = [self.share(level, self.rows[level][own.flatten()]) for level, own in enumerate(indices.unbind(1))]
        return positions_of(torch.stack(shares).sum(dim=0), indices)


class Corners(Codebooks):
    """Sign of each channel: the corners of a cube, +-1 (LFQ; Yu et al., ICLR 2024), or of the one within the unit
    sphere, +-1/sqrt(c) (BSQ; Zhao, Xiong & Kraehenbuehl 2024). An index has the sign of channel 0 as its highest
    bit."""

    def indices(self, z: torch.Tensor) -> torch.Tensor:
        return bits_to_index(z > 0)

    def vectors(self, indices: torch.Tensor) -> torch.Tensor:
        places = torch.arange(self.shape.channels - 1, -1, -1, device=indices.device)
        bits = (indices.movedim(1, -1) >> places) & 1
        return (2.0 * bits.movedim(-1, 1) - 1.0) * corner(self.shape.channels, self.shape.kind == "bsq")


def binary(kind: Literal["lfq", "bsq"], channels: int) -> Codebooks:
    """The codes of z of so many channels. Raises UsageError for more than an index has bits."""
    if channels > MOST_BITS:
        raise UsageError(
            f"quantizer.kind: {kind} makes a bit of each of z's channels, at most {MOST_BITS}; z has {channels}"
        )
    return Shape(kind=kind, channels=channels, codes=2**channels).build()


def corner(channels: int, sphere: bool) -> float:
    """Absolute value of a corner's channels."""
    return channels**-0.5 if sphere else 1.0


def bits_to_index(bits: torch.Tensor) -> torch.Tensor:
    """bits [B, c, *p] => indices [B, 1, *p] of one codebook."""
    index = torch.zeros_like(bits[:, :1], dtype=torch.long)
    for bit in bits.unbind(1):
        index = 2 * index + bit[:, None]
    return index


def precise(like: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Around what is not for half precision, in which close codes have one distance."""
    # device meta knows no autocast
    return contextlib.nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def rows_of(z: torch.Tensor) -> torch.Tensor:
    """[B, c, *p] => [N, c]."""
    return z.movedim(1, -1).flatten(0, -2)


def positions_of(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[N, c] => [B, c, *p], of the batch and positions of `like` [B, ., *p]."""
    return rows.view(len(like), *like.shape[2:], rows.shape[1]).movedim(-1, 1)


def nearest(rows: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of book [K, c] for each of rows [N, c]: by the very function of diffusers' VQModel, so that
    ties fall alike."""
    with torch.no_grad(), precise(rows):
        return torch.cdist(rows, book.to(rows.dtype)).argmin(dim=1)


# --- beside a network -------------------------------------------------------------------------------------------------


def beside(vae: Any) -> Codebooks | None:
    """The quantizer that is kept beside a network, None where there is none."""
    found = vars(vae).get("_modules", {}).get(NAME)
    return found if isinstance(found, Codebooks) else None


def put_beside(vae: Any, books: Codebooks | None) -> Any:
    """Give a network that quantizer, or take it away; the network."""
    if books is None:
        vae._modules.pop(NAME, None)
    else:
        vae.add_module(NAME, books)
    return vae


def check_count(count: int, there: int | None, name: str) -> None:
    """Raises UsageError unless something, of that name, has so many codebooks of those that are `there`."""
    if there is None:
        raise UsageError(f"--codebooks: is of residual codes, and {name} has none; leave it out")
    if not 1 <= count <= there:
        raise UsageError(f"--codebooks: expected 1 to {there}, as many as {name} has, got {count}")


def keep_first(vae: Any, count: int, name: str) -> Any:
    """Leave of the quantizer beside a network, of that name, the first so many codebooks: a code of less rate. The
    network."""
    books = beside(vae)
    check_count(count, None if books is None else books.shape.codebooks, name)
    assert books is not None
    fewer = books.shape.model_copy(update={"codebooks": count}).build()
    state = books.state_dict()
    fewer.load_state_dict({key: state[key][:count] if key == "rows" else state[key] for key in fewer.state_dict()})
    return put_beside(vae, fewer.to(vae.device).eval().requires_grad_(False))


def codes_of(vae: Any) -> tuple[int | None, int] | None:
    """Codebooks q and codes K of each, of the indices that a network gives: [B, q, *p], or [B, *p] of a VQModel, whose
    q is None. None where it gives no indices."""
    if (books := beside(vae)) is not None:
        return books.shape.codebooks, books.shape.codes
    from diffusers import VQModel  # here: a worker that reads latents imports this file, and has no need of diffusers

    return (None, int(vae.config.num_vq_embeddings)) if isinstance(vae, VQModel) else None


def rate_in_words(books: int | None, codes: int, hop: int, rate: int | None) -> str:
    """Rate of q codebooks of K codes, all alike likely: `24 bits a position`, of sounds with bits per second, from the
    samples of a position and those of a second."""
    bits = (books or 1) * math.log2(codes)
    return f"{bits:.4g} bits a position" + ("" if rate is None else f", {bits * rate / hop:,.0f} bits per second")


def in_words(books: Codebooks) -> str:
    """A sentence on a network's quantizer, for a card and for `ldm-vae export`."""
    shape = books.shape
    count = f"{shape.codebooks} codebooks of" if shape.codebooks > 1 else "a codebook of"
    weights = f"its weights are {WEIGHTS}, its shape {CONFIG}" if books.state_dict() else f"it is {CONFIG}"
    return (
        f"quantizer {shape.kind}: {count} {shape.codes:,} codes, which no class of diffusers carries; {weights}; "
        "ldm_vae.load_autoencoder reads it, and from_pretrained alone gives the network without it"
    )


def only_without(vae: Any, what: str) -> None:
    """Raises UsageError for a network with a quantizer beside it; `what` cannot carry one."""
    if (books := beside(vae)) is not None:
        raise UsageError(
            f"{what}: cannot carry the quantizer {books.shape.kind} beside this network; expected `--target diffusers`,"
            f" whose folder keeps it as {CONFIG}"
        )
