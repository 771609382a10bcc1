"""Collectives for metrics: everybody's tensor, or their sum, on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world_size() -> int:
    """Processes that measure together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: torch.Tensor) -> torch.Tensor:
    """value [...] of one shape on every rank => [ranks, ...] on the CPU, the same on every rank."""
    if world_size() == 1:
        return value.detach().cpu()[None]
    mine = value.detach().to(_device()).contiguous()
    everybody = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everybody, mine)
    return torch.stack(everybody).cpu()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """rows [n, ...], n another on every rank, perhaps 0 => all of them [sum of n, ...] in rank order, on the CPU."""
    counts = gather(torch.tensor(len(rows))).tolist()
    padded = torch.cat([rows, rows.new_zeros((max(counts) - len(rows), *rows.shape[1:]))])
    return torch.cat([part[:count] for part, count in zip(gather(padded), counts, strict=True)])


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of value [...], on the CPU; for tensors too large to be held once per rank."""
    if world_size() == 1:
        return value.detach().cpu()
    summed = value.detach().to(_device(), copy=True)
    dist.all_reduce(summed)
    return summed.cpu()


def _device() -> torch.device:
    # nccl moves GPU memory only
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
