"""Quantizers: ways to train a codebook, one file each; the file name is the name under `model.quantizer.kind`.

A file holds `Config(Part)` whose `build(vae)` gives a Bottleneck (`autoencoder/bottleneck.py`) for a diffusers VQModel.
The codebook is the VQModel's own `quantize.embedding`, so what is trained is what is exported; at inference VQModel
takes the nearest row. Its losses are terms of the objective (losses/codebook.py, commitment.py, code_kl.py).

Legend: N vectors, c their channels, K codes.
"""

from __future__ import annotations

import torch


def usage(counts: torch.Tensor, threshold: float = 0.0) -> dict[str, torch.Tensor]:
    """Usage of a codebook, from (decayed) counts [K]: perplexity exp(entropy), between 1 and K, and the share of codes
    whose count is above the threshold."""
    shares = counts / counts.sum().clamp_min(torch.finfo(counts.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {"codes/perplexity": entropy.exp(), "codes/usage": (counts > threshold).to(counts.dtype).mean()}
