"""What metrics need of a process group: everybody's tensor, on every rank."""

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
    # nccl moves GPU memory only
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    mine = value.detach().to(device).contiguous()
    everybody = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everybody, mine)
    return torch.stack(everybody).cpu()
