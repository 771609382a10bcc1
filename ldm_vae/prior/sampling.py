"""Draws from the probabilities of codes: temperature, top-k, top-p (Holtzman et al., ICLR 2020).

Legend: K codes.
"""

from __future__ import annotations

import torch
from pydantic import Field

from ldm_vae.core.config import Section


class SamplingConfig(Section):
    """Settings of the sampler. By default samples are drawn from the distribution that was learned."""

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it: below 1 likely codes become more likely."""
    top_k: int | None = Field(None, gt=0)
    """Only the k most likely codes of each place."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Only the most likely codes that together have at least this probability."""
    steps: int = Field(12, gt=0, le=10_000)
    """Of kind masked: rounds of unmasking."""


def restrict(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """logits [..., K] => those of the distribution that is drawn from; codes that are left out have -inf."""
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p is not None:
        ordered, code = logits.sort(dim=-1, descending=True)
        likely = ordered.softmax(dim=-1)
        # a code stays while those before it have less than top_p, so the first one always does
        out = likely.cumsum(dim=-1) - likely >= config.top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, code, out), -torch.inf)
    return logits


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Codes [...] by inversion: the first one at which the cumulative probability exceeds `uniform` [...], fp64 in
    [0, 1). logits [..., K]; fp64, since at 16,384 codes the sum of fp32 probabilities is off by more than some are."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # times the total, which is 1 but for rounding: never beyond the last code that has a probability
    return torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:], right=True)[..., 0]
