"""A model's distribution against a true one whose outcomes can all be listed.

Outcomes that a model cannot tell apart (images that have the same codes) are one outcome, with the sum of their
probabilities: `merged`. What a model gives to anything that is not listed is its mass outside.

Legend: N images, G outcomes.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def merged(descriptions: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distinct outcomes [G, ...] of descriptions [N, ...], their probabilities [G], the outcome of each image [N]."""
    outcomes, of = torch.unique(descriptions.flatten(1), dim=0, return_inverse=True)
    mass = torch.zeros(len(outcomes), dtype=torch.float64).index_add_(0, of, probabilities.double())
    return outcomes.view(-1, *descriptions.shape[1:]), mass, of


def entropy_bits(probabilities: torch.Tensor) -> float:
    """Entropy of probabilities [G]."""
    return float(-torch.special.xlogy(probabilities, probabilities).sum()) / math.log(2)


def compare(truth: torch.Tensor, nats: torch.Tensor, draws: int) -> dict[str, Any]:
    """Distance of a model from the truth over all outcomes there are, in fp64.

    truth [G] sums to 1; nats [G]: the model's -log p of each outcome, infinite for one that it excludes.

    cross_entropy_bits    mean -log2 p of the model over the truth: what an ideal code of it takes an image
    kl_bits               KL(truth || model), by how much that is above the entropy
    total_variation       half of the sum of |difference|, the mass outside included: 0 to 1
    outside               the model's mass on what is not an outcome
    coverage              expected share of the truth's mass whose outcome is among so many draws of the model
    """
    truth, model = truth.double(), torch.exp(-nats.double())
    outside = max(0.0, 1.0 - float(model.sum()))
    # an outcome without mass costs nothing, whatever the model says of it
    cross = float(torch.where(truth > 0, truth * nats.double(), 0.0).sum()) / math.log(2)
    seen = -torch.expm1(draws * torch.log1p(-model.clamp(max=1.0)))
    return {
        "cross_entropy_bits": cross if math.isfinite(cross) else None,
        "kl_bits": cross - entropy_bits(truth) if math.isfinite(cross) else None,
        "total_variation": 0.5 * (float((truth - model).abs().sum()) + outside),
        "outside": outside,
        "coverage": float((truth * seen).sum()),
    }


def look_up(outcomes: torch.Tensor, descriptions: torch.Tensor) -> torch.Tensor:
    """The outcome [N] that each of descriptions [N, ...] is, among outcomes [G, ...]; -1 for none of them."""
    known = {tuple(row): number for number, row in enumerate(outcomes.flatten(1).tolist())}
    return torch.tensor([known.get(tuple(row), -1) for row in descriptions.flatten(1).tolist()], dtype=torch.long)


def sampled(truth: torch.Tensor, chosen: torch.Tensor) -> dict[str, float]:
    """Of drawn outcomes [N] (-1: none of the list): the share that is one, and the share of the truth's mass [G] that
    is among them."""
    listed = chosen >= 0
    return {"valid": float(listed.double().mean()), "coverage": float(truth[torch.unique(chosen[listed])].sum())}
