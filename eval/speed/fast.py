"""`eval.speed gpu_fast | gpu_regions | gpu_batch | gpu_encoder | gpu_denoiser`: what makes a step faster on a CUDA
device, one thing after the other, each beside the plain one in turns. Shapes and precision are eval/speed/gpu.py's.

- gpu_fast: our training step as it is, then with one change added to those before it: `fused_norm` (channels last, each
  norm and its SiLU one kernel), `lpips_bf16` (LPIPS in bfloat16, channels last; `lpips_gradient`: what that does to its
  gradient), `critic_channels_last`, `adam_fused`, `benchmark` (cuDNN tries its algorithms), `graph` (one CUDA graph);
- gpu_regions: torch.compile of the residual blocks, LPIPS and the discriminator, each for itself; minutes to compile;
- gpu_batch: images a second of the plain step and of the one with everything, batch 1 to 32;
- gpu_encoder: the encoder alone, 32 images at a time: plain under autocast, then changed likewise, and what that does
  to the posterior's mean (`difference`: from fp32, over its size);
- gpu_denoiser: a step of the diffusion trainer, DiT-B/2 on latents of 4 x 32 x 32; `mfu`: counted operations over time
  and what a matrix product reaches.

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
from accelerate import Accelerator
from tqdm.auto import tqdm

from ldm_vae.autoencoder import latents
from ldm_vae.core.flop_counter import Cost
from ldm_vae.denoisers.dit import Config as DiTConfig
from ldm_vae.diffusion.flow import Denoiser
from ldm_vae.kernels.group_norm import FusedResnetBlock, fuse_norms
from ldm_vae.perceptual.lpips import LPIPS
from ldm_vae.run.optim import OptimizerConfig

from . import encode
from .gpu import WORK, need_a_gpu, synchronised
from .recipes import (
    Networks,
    Step,
    Work,
    ours,
)
from .timing import interleave, row
from .variants import Bfloat16

BATCHES = (1, 2, 4, 8, 16, 32)
ENCODED_BATCH = 32
ENCODERS: dict[str, tuple[str, ...]] = {
    "encoder": (),
    "encoder_half": ("half",),
    "encoder_fused_norm": ("fused_norm",),
    "encoder_fused_half": ("fused_norm", "half"),
    "encoder_benchmark": ("fused_norm", "half", "benchmark"),
    "encoder_graph": ("fused_norm", "half", "benchmark", "graph"),
}
DENOISERS: dict[str, tuple[str, ...]] = {"step": (), "adam_fused": ("adam_fused",), "graph": ("adam_fused", "graph")}
LATENTS = 128  # to an update of the denoiser

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


def begin(work: Work, changes: tuple[str, ...]) -> Begun:
    """Our step with these changes, on images of its own; compiled, allocated and captured where it is to be."""
    networks, images = Networks(work), work.images()
    for name in changes:
        if name in CHANGES:
            CHANGES[name](networks)
    if "graph" in changes:
        for optimizer in (networks.optimizer, networks.critic_optimizer):
            for group in optimizer.param_groups:
                group["capturable"] = True
    with measured_memory() as memory:
        run = bound(ours(networks), images, "benchmark" in changes)
        run()
        run()
        if "graph" in changes:
            run = captured(run)
            run()
    return Begun(synchronised(run) if work.device == "cuda" else run, memory())


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
    for name, make in tqdm(makers.items(), desc="first steps", disable=None, leave=False):
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


def lpips_gradient(work: Work) -> list[dict[str, Any]]:
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


# --- the encoder ------------------------------------------------------------------------------------------------------


def encoder(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    need_a_gpu()
    return encoders(WORK, ENCODED_BATCH, options.rounds)


def encoders(
    work: Work, batch: int, rounds_: int, ways: Mapping[str, tuple[str, ...]] = ENCODERS
) -> list[dict[str, Any]]:
    pixels = replace(work, batch=batch).images()
    exact = _encoded(work, (), pixels, "no")[1]()
    found: dict[str, float] = {}

    def make(name: str, changes: tuple[str, ...]) -> Begun:
        with measured_memory() as memory:
            run, mean = _encoded(work, changes, pixels, work.precision)
        found[name] = float((mean() - exact).norm() / exact.norm())
        return Begun(run, memory())

    makers = {name: partial(make, name, changes) for name, changes in ways.items()}
    result = rows("gpu", makers, batch, rounds_)
    for one in result:
        one["difference"] = found.get(one["name"].removeprefix("gpu_"))
    return result


def _encoded(
    work: Work, changes: tuple[str, ...], pixels: torch.Tensor, precision: str
) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """(the encoder at work, the means that it last gave)."""
    vae = encode.network(work.widths, work.groups).to(work.device)
    dtype = {"bf16": torch.bfloat16, "no": torch.float32}[precision]
    if "fused_norm" in changes:
        vae.to(memory_format=torch.channels_last)
        fuse_norms(vae)
    if "half" in changes:
        vae.to(dtype)
    last: list[torch.Tensor] = [pixels]

    @torch.no_grad()
    def run() -> None:
        torch.backends.cudnn.benchmark = "benchmark" in changes
        with torch.autocast(work.device, dtype, enabled=dtype != torch.float32):
            last[0] = latents.encode(vae, pixels.to(dtype) if "half" in changes else pixels).mean
        torch.backends.cudnn.benchmark = False

    run()
    run()
    whole: Callable[[], None] = captured(run) if "graph" in changes else run
    whole()
    return synchronised(whole) if work.device == "cuda" else whole, lambda: last[0].float()


# --- the diffusion trainer --------------------------------------------------------------------------------------------


def denoiser(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    from .roofline import peaks

    need_a_gpu()
    peak = peaks(WORK.device).flops[torch.bfloat16]
    found = []
    for batch in (LATENTS, 2 * LATENTS):
        found += denoisers(WORK, DiTConfig(), batch, (4, 32, 32), peak, options.rounds)
        torch.cuda.empty_cache()
    return found


def denoisers(
    work: Work,
    shape: DiTConfig,
    batch: int,
    size: tuple[int, int, int],
    peak: float,
    rounds_: int,
    ways: Mapping[str, tuple[str, ...]] = DENOISERS,
) -> list[dict[str, Any]]:
    def make(changes: tuple[str, ...]) -> Begun:
        with measured_memory() as memory:
            run = denoiser_step(work, shape, batch, size, changes)
            run()
            run()
            if "graph" in changes:
                run = captured(run)
                run()
        return Begun(synchronised(run) if work.device == "cuda" else run, memory())

    makers = {name: partial(make, changes) for name, changes in ways.items()}
    result = rows("gpu_denoiser", makers, batch, rounds_, at=batch, against="batch")
    with Cost() as cost:
        denoiser_step(work, shape, batch, size)()
    for one in result:
        one["mfu"] = cost.flops / one["median_s"] / peak if "median_s" in one else None
    return result


def denoiser_step(
    work: Work, shape: DiTConfig, batch: int, size: tuple[int, int, int], changes: tuple[str, ...] = ()
) -> Callable[[], None]:
    """A step of train.diffusion on the device, but for the noise, which is keyed on the host."""
    torch.manual_seed(work.seed)
    network = Denoiser(shape.build(size[0], size[1:], classes=1000).to(work.device).train(), 1000)
    optimizer = OptimizerConfig(kind="adamw", betas=(0.9, 0.999), eps=1e-8).build(network.parameters(), 1e-4)
    for group in optimizer.param_groups:
        group |= {"foreach": None, "fused": True} if "adam_fused" in changes else {}
        group["capturable"] = "graph" in changes
    accelerator = Accelerator(cpu=work.device == "cpu", mixed_precision=work.precision, device_placement=False)
    model = accelerator.prepare(network)
    clean, noise = torch.randn(2, batch, *size, device=work.device)
    times, labels = torch.rand(batch, device=work.device), torch.randint(1000, (batch,), device=work.device)
    t = times.view(-1, 1, 1, 1)

    def run() -> None:
        predicted = model((1 - t) * clean + t * noise, times, labels)
        loss = (predicted - (noise - clean)).square().mean()
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(network.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return run
