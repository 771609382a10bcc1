"""Collectives for terms and quantizers, on the device and without an Accelerator.

A value that is no mean over images (a share of used codes, the sign of a difference) is the same for 1 x 8 and 8 x 1
only if it is computed from the whole batch.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def rank() -> int:
    """This process among those that train together: in its process group, else as its launcher says, else 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    given = os.environ.get("RANK", "")
    return int(given) if given.isdecimal() else 0


def world_size() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of value [...], without a graph, the same bits on every rank."""
    summed = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(summed)
    return summed


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks of value [...], without a graph."""
    return total(value) / world_size()


def everybody(value: torch.Tensor) -> torch.Tensor:
    """value [n, ...] of one shape on every rank => [ranks * n, ...], in the order of the ranks, which is the order of
    the global batch; without a graph."""
    value = value.detach().contiguous()
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)
