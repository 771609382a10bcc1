"""Entropies of binary codes: each vector sure of its code, all codes in use (Yu et al., MAGVIT-v2, ICLR 2024, eq. 5;
Zhao, Xiong & Kraehenbuehl 2024, section 3.2).

The distribution of a vector over the 2 ** L codes of L bits is a product over its bits, so its entropy is a sum over
them: exact. The mean of such products is none: its entropy is taken over all codes, as a product of two halves of the
bits [2 ** (L/2), 2 ** (L/2)] in one matrix product, or over each bit alone, which is an upper bound of it (BSQ's).

Legend: N vectors, L bits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ldm_vae.autoencoder.codebooks import precise, rows_of
from ldm_vae.autoencoder.trainable import Reconstruction
from ldm_vae.core.errors import UsageError
from ldm_vae.core.micro_batches import LastUpdate
from ldm_vae.losses import TermConfig

MOST_BITS = 20  # whose codes are all counted: a table of 4 MB


class CodeEntropy(nn.Module):
    """mean over vectors of H(q) - diversity * H(mean q), nats per vector.

    The second is no mean over images. Its gradient is that of the cross-entropy to the last update's mean (in the
    first update to this batch's), which is a mean: 1 x 8 and 8 x 1 then train alike.
    """

    domain = "latents"
    needs = "codes"

    def __init__(self, diversity: float, batch: str) -> None:
        super().__init__()
        self.diversity, self.batch = diversity, batch
        self.used = LastUpdate()
        self._figures: dict[str, torch.Tensor] = {}

    def forward(self, reconstruction: Reconstruction) -> torch.Tensor:
        codes = reconstruction.codes
        if codes is None or codes.logits is None:
            raise UsageError("losses.code_entropy: expected a quantizer of bits, lfq or bsq; other codes have no bits")
        logits = rows_of(codes.logits)
        if self.batch == "codes" and logits.shape[1] > MOST_BITS:
            raise UsageError(
                f"losses.code_entropy.batch: codes is for at most {MOST_BITS} bits, the code has {logits.shape[1]}; "
                "expected bits"
            )
        # of a bit: softplus(l) - l sigmoid(l); F.softplus leaves out what is below 2e-9
        each = -(F.logsigmoid(-logits) + logits * logits.sigmoid()).sum(dim=1).mean()
        mean = mean_of_codes(logits) if self.batch == "codes" else mean_of_bits(logits)
        known = self.used.see(mean.detach()).clamp_min(torch.finfo(mean.dtype).tiny)
        together = -(mean * known.log()).sum()
        self._figures = {"of_a_vector": each, "of_all": together}
        return each - self.diversity * together

    def figures(self) -> dict[str, torch.Tensor]:
        return self._figures

    def after_update(self) -> None:
        self.used.after_update()

    def leave_out(self) -> None:
        self.used.leave_out()


def mean_of_codes(logits: torch.Tensor) -> torch.Tensor:
    """logits [N, L] of bits => probabilities of all codes [2 ** (L - L // 2), 2 ** (L // 2)], a mean over vectors; the
    first bit is the highest of the row's number."""
    halves = []
    for part in logits.tensor_split([logits.shape[1] - logits.shape[1] // 2], dim=1):
        product = part.new_ones(len(part), 1)
        for bit in part.unbind(1):
            product = torch.stack([product * (-bit).sigmoid()[:, None], product * bit.sigmoid()[:, None]], dim=2)
            product = product.flatten(1)
        halves.append(product)
    with precise(logits):  # autocast would take bf16 for a matrix product
        return halves[0].mT @ halves[1] / len(logits)


def mean_of_bits(logits: torch.Tensor) -> torch.Tensor:
    """logits [N, L] of bits => probabilities of each bit's two values [2, L], a mean over vectors."""
    return torch.stack([(-logits).sigmoid(), logits.sigmoid()]).mean(dim=1)


class Config(TermConfig):
    """Sure codes, and all of them in use."""

    kind: Literal["code_entropy"] = "code_entropy"
    weight: float = 0.1
    """Of both entropies (implementations of MAGVIT-v2 and BSQ: 0.1)."""
    diversity: float = Field(1.0, ge=0)
    """Factor on the entropy of all vectors together, which is to be large."""
    batch: Literal["codes", "bits"] = "codes"
    """That entropy: over all 2 ** L codes, exact, up to 20 bits; or bit by bit, an upper bound, for any number."""

    def build(self) -> CodeEntropy:
        return CodeEntropy(self.diversity, self.batch)
