"""`eval.speed gpu_fast | gpu_regions | gpu_batch`: what makes a step faster on a CUDA
device, one thing after the other, each beside the plain one in turns. Shapes and precision are eval/speed/gpu.py's.

- gpu_fast: our training step as it is, then with one change added to those before it: `fused_norm` (channels last, each
  norm and its SiLU one kernel), `lpips_bf16` (LPIPS in bfloat16, channels last; `lpips_gradient`: what that does to its
  gradient), `critic_channels_last`, `adam_fused`, `benchmark` (cuDNN tries its algorithms), `graph` (one CUDA graph);
- gpu_regions: torch.compile of the residual blocks, LPIPS and the discriminator, each for itself; minutes to compile;
- gpu_batch: images a second of the plain step and of the one with everything, batch 1 to 32;

What cannot run is a row that says so (`failed`), and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ldm_vae.core.progress import Progress
from ldm_vae.kernels.group_norm import FusedResnetBlock, fuse_norms
from ldm_vae.perceptual.lpips import LPIPS

from .gpu import WORK, need_a_gpu, synchronised
from .recipes import (
    Networks,
    Step,
    Workload,
    ours,
)
from .timing import interleave, row
from .variants import Bfloat16

BATCHES = (1, 2, 4, 8, 16, 32)


# --- what is changed --------------------------------------------------------------------------------------------------


def fused_norm(networks: Networks) -> None:
    networks.network.to(memory_format=torch.channels_last)
    fuse_norms(networks.network)


def lpips_bf16(networks: Networks) -> None:
    networks.lpips = Bfloat16(networks.lpips.network, networks.lpips.smallest)
    networks.lpips.network.to(memory_format=torch.channels_last)


def critic_channels_last(networks: Networks) -> None:
    networks.critic.to(memory_format=torch.channels_last)


def adam_fused(networks: Networks) -> None:
    for optimizer in (networks.optimizer, networks.critic_optimizer):
        for group in optimizer.param_groups:
            group |= {"foreach": None, "fused": True}


def regions_compiled(networks: Networks) -> None:
    for module in networks.network.modules():
        if isinstance(module, FusedResnetBlock):
            module.compile()
    networks.lpips.compile()
    networks.critic.compile()


Change = Callable[[Networks], None]
CHANGES: dict[str, Change] = {
    "fused_norm": fused_norm,
    "lpips_bf16": lpips_bf16,
    "critic_channels_last": critic_channels_last,
    "adam_fused": adam_fused,
    "regions": regions_compiled,
}
# each a name and what it adds to the one before it
STAGES: dict[str, tuple[str, ...]] = {
    "step": (),
    "step_benchmark": ("benchmark",),
    "fused_norm": ("fused_norm",),
    "lpips_bf16": ("fused_norm", "lpips_bf16"),
    "critic_channels_last": ("fused_norm", "lpips_bf16", "critic_channels_last"),
    "adam_fused": ("fused_norm", "lpips_bf16", "adam_fused"),
    "benchmark": ("fused_norm", "lpips_bf16", "adam_fused", "benchmark"),
    "graph": ("fused_norm", "lpips_bf16", "adam_fused", "benchmark", "graph"),
}
EAGER, EVERYTHING = STAGES["benchmark"], STAGES["graph"]
REGIONS: dict[str, tuple[str, ...]] = {
    "step": (),
    "eager": EAGER,
    "compiled": (*EAGER, "regions"),
    "compiled_graph": (*EVERYTHING, "regions"),
}


@dataclass
class Begun:
    """A step that has run, and the most megabytes that it held."""

    run: Callable[[], None]
    memory_mb: int = 0


def begin(work: Workload, changes: tuple[str, ...]) -> Begun:
    """Our step with these changes, on images of its own; compiled, allocated and captured where it is to be."""
    networks, images = Networks(work), work.images()
    for name in changes:
        if name in CHANGES:
            CHANGES[name](networks)
    if "graph" in changes:
        for optimizer in (networks.optimizer, networks.critic_optimizer):
            for group in optimizer.param_groups:
                group["capturable"] = True
    return warmed_up(lambda: bound(ours(networks), images, "benchmark" in changes), "graph" in changes, work.device)


def warmed_up(make: Callable[[], Callable[[], None]], graph: bool, device: str) -> Begun:
    """Make a step and run it twice, then as one CUDA graph if asked; the memory of it all."""
    with measured_memory() as memory:
        run = make()
        run()
        run()
        if graph:
            run = captured(run)
            run()
    return Begun(synchronised(run) if device == "cuda" else run, memory())


def bound(step: Step, images: torch.Tensor, benchmark: bool = False) -> Callable[[], None]:
    def run() -> None:
        torch.backends.cudnn.benchmark = benchmark
        step(images)
        torch.backends.cudnn.benchmark = False

    return run


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The same work on the same memory, launched as one CUDA graph; it must have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_kept: object = run) -> None:  # what `run` closes over is the memory that the graph works on
        graph.replay()

    return replay


@contextlib.contextmanager
def measured_memory() -> Iterator[Callable[[], int]]:
    """Megabytes that torch's CUDA allocator held at most since the block began; 0 without CUDA."""
    if not torch.cuda.is_available():
        yield lambda: 0
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: round((torch.cuda.max_memory_allocated() - before) / 1e6)


def begun_all(prefix: str, makers: Mapping[str, Callable[[], Begun]]) -> tuple[dict[str, Begun], list[dict[str, Any]]]:
    """Contenders, and a row for each that cannot run: a GPU is not at hand every day, so the others go on."""
    begun, failed = {}, []
    for name, make in Progress(makers.items(), desc="first steps", leave=False):
        try:
            begun[name] = make()
        except Exception as error:
            traceback.print_exc()
            failed.append(
                {"name": f"{prefix}_{name}", "failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            )
    return begun, failed


def rows(
    prefix: str, makers: Mapping[str, Callable[[], Begun]], images: int, rounds: int, **more: Any
) -> list[dict[str, Any]]:
    """Every contender beside the first."""
    begun, failed = begun_all(prefix, makers)
    times = interleave({name: one.run for name, one in begun.items()}, rounds, prefix)
    first = next(iter(begun), None)
    return failed + [
        row(f"{prefix}_{name}", times, name, None if name == first else first,
            images_per_s=images / statistics.median(times[name]), memory_mb=one.memory_mb, **more)
        for name, one in begun.items()
    ]  # fmt: skip


# --- the training step ------------------------------------------------------------------------------------------------


def training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json. Raises UsageError without a CUDA device, as do the others."""
    need_a_gpu()
    makers = {name: partial(begin, WORK, changes) for name, changes in STAGES.items()}
    return [*rows("gpu", makers, WORK.batch, options.rounds), *lpips_gradient(WORK)]


def regions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    need_a_gpu()
    # compiled graphs count against one limit for each function, however many blocks have it
    torch._dynamo.config.recompile_limit = 64
    makers = {name: partial(begin, WORK, changes) for name, changes in REGIONS.items()}
    return rows("gpu_regions", makers, WORK.batch, options.rounds)


def batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    need_a_gpu()
    found = []
    for batch in BATCHES:
        work = replace(WORK, batch=batch)
        stages = {"step": (), "eager": EAGER, "everything": EVERYTHING}
        makers = {name: partial(begin, work, changes) for name, changes in stages.items()}
        found += rows("gpu_batch", makers, batch, min(options.rounds, 5), at=batch, against="batch")
        torch.cuda.empty_cache()
    return found


def lpips_gradient(work: Workload) -> list[dict[str, Any]]:
    """Errors of LPIPS' gradient against fp32, over its size: as it is (TF32 on CUDA), in bfloat16."""
    networks = Networks(replace(work, batch=1))
    trunk, smallest = networks.lpips.network, networks.lpips.smallest
    target = replace(work, batch=1).images()
    pixels = target + 0.1 * torch.randn_like(target)

    def gradient(term: LPIPS, wide: bool = False) -> torch.Tensor:
        place = pixels.clone().requires_grad_()
        (found,) = torch.autograd.grad(term(place, target), place)
        return found.double()

    plain = gradient(networks.lpips)
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = gradient(networks.lpips)
    half = gradient(Bfloat16(trunk, smallest))
    size = float(exact.norm())
    return [
        {"name": f"lpips_gradient_{name}", "value": float((one - exact).norm()) / size, "unit": "of its size"}
        for name, one in (("as_it_is", plain), ("bf16", half))
    ]
