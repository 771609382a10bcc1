"""Patches: orders of the channels that squares of latent positions become.

Legend: c latent channels.
"""

from __future__ import annotations

import torch


def positions_first(patched: torch.Tensor, patch: int) -> torch.Tensor:
    """Channels (c, row, column) => (row, column, c)."""
    return _swapped(patched, patched.shape[-3] // patch**2, patch**2)


def channels_first(patched: torch.Tensor, patch: int) -> torch.Tensor:
    """Channels (row, column, c) => (c, row, column)."""
    return _swapped(patched, patch**2, patched.shape[-3] // patch**2)


def _swapped(patched: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    *before, _, height, width = patched.shape
    return patched.reshape(*before, outer, inner, height, width).transpose(-4, -3).reshape(patched.shape)
