"""How well the discriminator is: what the logits say, before a person sees it in the pictures."""

from __future__ import annotations

import torch


def logit_statistics(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Share of real and of fake patches that the discriminator gets right, and the margin between the two means.

    Both shares near 1 and a growing margin: the discriminator has won, and its gradient says nothing more. Both near
    0.5: it has learned nothing yet.
    """
    real, fake = real_logits.detach(), fake_logits.detach()
    return {
        "health/real_accuracy": (real > 0).float().mean(),
        "health/fake_accuracy": (fake < 0).float().mean(),
        "health/logit_margin": real.mean() - fake.mean(),
    }
