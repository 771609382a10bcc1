"""`eval.speed roofline`: where the time of a step goes, by kind of operation, beside what this device could do at best.

The training step as a whole, then its parts each for themselves (autoencoder, LPIPS, discriminator, adaptive weight,
update), then the encoder and a step of the diffusion trainer; plain, and with what eval/speed/fast.py changes (CUDA
graphs apart). A row is one kind of operation in one part:

- `median_s`: of torch's profiler, the kernels that operations of this kind launched (on a CPU, their own time);
- `flop` (torch's FLOP counter), `bytes` (every input read once, every output written once; views are free);
- `floor_s`: the sum over operations of max(flop / peak, bytes / bandwidth), both measured in this run: a matrix product
  in the type that the operation computes in (fp32 convolutions on CUDA: TF32), and a copy;
- `attained`: floor_s / median_s.

The row `all` of a part has its time by the clock: what is beyond the sum of its kinds is the host's. Layout changes are
kernels by which cuDNN turns activations around inside of a convolution; they have no floor, since nothing needs them.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm_vae.autoencoder import latents
from ldm_vae.core.flop_counter import COUNTS
from ldm_vae.denoisers.dit import Config as DiTConfig
from ldm_vae.kernels.group_norm import fuse_norms
from ldm_vae.run.optim import trainable_parameters
from ldm_vae.training.adaptive_weight import adaptive_ratio

from . import encode
from .denoisers import LATENTS, denoiser_step
from .encoders import ENCODED_BATCH
from .fast import (
    CHANGES,
    EAGER,
)
from .gpu import WORK as GPU_WORK
from .peaks import Peaks, peaks, seconds_of
from .recipes import Networks, Workload, ours

WORK = Workload(widths=(32, 64, 64, 64), resolution=64, batch=1)  # a minute or two of two cores
OTHER, LAYOUT = "elementwise and sums", "layout changes"
# the first pattern that the name of an operation has decides
KINDS = {
    "fused norm and SiLU": "group_norm_silu",
    "norm": "group_norm|layer_norm",
    "SiLU": "silu",
    "attention": "attention|_flash",
    "convolution": "conv",
    "matrix product": "mm$|linear|matmul|einsum",
    "optimiser": "adam|foreach",
    "resampling": "upsample|_pad|pool",
    "copy": "copy|clone|::cat|contiguous|fill|zero",
}
_LAYOUT = re.compile("nchwTo|nhwcTo|NchwTo|NhwcTo|convertTensor|tensorTransform", re.IGNORECASE)
_FREE = re.compile(r"::(new_)?empty|::detach|::lift|::_unsafe_view|::is_|::set_")  # move nothing

Part = Callable[[], object]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    work = GPU_WORK if torch.cuda.is_available() else WORK
    best = peaks(work.device)
    rows = best.rows()
    # in fp32 there is nothing that LPIPS in half precision would go with
    fast = tuple(name for name in EAGER if work.precision == "bf16" or name != "lpips_bf16")
    for name, changes in {"plain": (), "fast": fast}.items():
        for part, function in parts(work, changes).items():
            rows += measured(f"{name} {part}", function, best, options.rounds)
    return rows


# --- the parts --------------------------------------------------------------------------------------------------------


def parts(work: Workload, changes: tuple[str, ...]) -> dict[str, Part]:
    """Each part of a training step, of encoding and of a diffusion step, as a call."""
    networks, images = Networks(work), work.images()
    for name in changes:
        if name in CHANGES:
            CHANGES[name](networks)
    noise = torch.randn(len(images), *networks.network.latent_shape(*images.shape[2:]), device=work.device)
    with torch.no_grad():
        made = networks.model(images, noise)
    fake = made.pixels.detach()
    cotangent = torch.randn_like(fake)
    optimizers = (networks.optimizer, networks.critic_optimizer)
    weights = [trainable_parameters([networks.network]), trainable_parameters([networks.critic])]

    whole = ours(networks)  # LPIPS and all

    def step() -> None:
        whole(images)

    def autoencoder() -> None:
        networks.optimizer.zero_grad()
        found = networks.model(images, noise)
        ((found.pixels * cotangent).sum() + found.moments.kl().sum()).backward()

    def lpips() -> None:
        place = fake.clone().requires_grad_()
        torch.autograd.grad(networks.lpips(place, images), place)

    def discriminator() -> None:
        place = fake.clone().requires_grad_()
        torch.autograd.grad(networks.critic(place).mean(), place)
        networks.critic_optimizer.zero_grad()
        networks.critic(torch.cat([images, fake])).mean().backward()

    def adaptive_weight() -> None:
        layer = networks.network.last_layer
        adaptive_ratio(networks.accelerator, layer, made, cotangent, cotangent)

    def update() -> None:
        for parameters, optimizer in zip(weights, optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
            optimizer.step()

    vae = encode.network(work.widths, work.groups).to(work.device)
    pixels = replace(work, batch=ENCODED_BATCH if work.device == "cuda" else work.batch).images()
    if "fused_norm" in changes:
        vae.to(memory_format=torch.channels_last)
        fuse_norms(vae)
        vae.to(torch.bfloat16 if work.precision == "bf16" else torch.float32)

    @torch.no_grad()
    def encoder() -> None:
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
            latents.encode(vae, pixels.to(vae.dtype))

    shape = DiTConfig() if work.device == "cuda" else DiTConfig(num_layers=2, num_attention_heads=2)
    batch = LATENTS if work.device == "cuda" else 4
    functions = (step, autoencoder, lpips, discriminator, adaptive_weight, update, encoder)
    benchmark = "benchmark" in changes
    found = {function.__name__: _with_algorithms(function, benchmark) for function in functions}
    return found | {"denoiser": denoiser_step(work, shape, batch, (4, 32, 32), changes)}


def _with_algorithms(function: Part, benchmark: bool) -> Part:
    def call() -> None:
        torch.backends.cudnn.benchmark = benchmark
        function()
        torch.backends.cudnn.benchmark = False

    return call


# --- what they cost ---------------------------------------------------------------------------------------------------


def measured(name: str, function: Part, best: Peaks, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of operation, the longest first, behind one for all of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = seconds_of(function, rounds, device)
    with Ledger(best) as ledger:
        function()
    seconds = profiled(function, device)
    kinds = sorted(seconds.keys() | ledger.floor.keys(), key=lambda kind: -seconds[kind])
    rows = [_row(name, "all", clock, sum(ledger.flop.values()), sum(ledger.bytes.values()), sum(ledger.floor.values()))]
    rows += [_row(name, kind, seconds[kind], ledger.flop[kind], ledger.bytes[kind], ledger.floor[kind])
             for kind in kinds]  # fmt: skip
    return rows


def _row(part: str, kind: str, seconds: float, flop: float, moved: float, floor: float) -> dict[str, Any]:
    attained = floor / seconds if seconds else 0.0
    return {"name": f"{part}: {kind}", "median_s": seconds, "flop": flop, "bytes": moved, "floor_s": floor,
            "attained": attained}  # fmt: skip


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations, bytes and least seconds of what runs inside, by kind."""

    def __init__(self, best: Peaks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._best = best
        self.flop: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self.floor: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if func.is_view or _FREE.search(name):
            return out
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if not written and func._schema.is_mutable:  # a list of tensors in place returns nothing
            written = read
        count = COUNTS.get(func.overloadpacket)
        flop = 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        moved = sum(tensor.nbytes for tensor in [*read, *written])
        kind = kind_of(name) or OTHER
        self.flop[kind] += flop
        self.bytes[kind] += moved
        self.floor[kind] += self._best.seconds(flop, moved, read[0].dtype if read else torch.float32)
        return out


def kind_of(operation: str) -> str | None:
    """The kind of an operation by its name, such as aten::convolution_backward; None for one of no kind."""
    base = operation.partition(".")[0]
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, base)), None)


def profiled(function: Part, device: str) -> dict[str, float]:
    """Seconds of one call by kind."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as found:
        function()
        if device == "cuda":
            torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in found.events() or ():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        kind = _nearest(event)
        if device == "cpu":
            seconds[kind] += event.self_cpu_time_total / 1e6 if "::" in event.name else 0.0
        for kernel in event.kernels:
            seconds[LAYOUT if _LAYOUT.search(kernel.name) else kind] += kernel.duration / 1e6
    return seconds


def _nearest(event: Any) -> str:
    """The kind of the operation, or of that around it: a convolution adds its bias by an operation of its own, and what
    an operation of this project calls is its own too."""
    nearest = None
    while event is not None:
        if event.name.startswith("ldm_vae::"):
            return kind_of(event.name) or OTHER
        if nearest is None and "::" in event.name:
            nearest = kind_of(event.name)
        event = event.cpu_parent
    return nearest or OTHER
