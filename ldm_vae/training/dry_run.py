"""Cost of a run before it is started: `--dry_run`. Nothing is computed or fetched, of the data only the list is read:
the real training step runs on tensors without content, its operations and memory are counted.

Legend: B batch, C image channels, T frames of a clip, H W pixels, c latent channels, t h w latent positions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ldm_vae.autoencoder.checkpointing import enable_checkpointing
from ldm_vae.autoencoder.fine_tuning import set_trainable
from ldm_vae.autoencoder.geometry import check_resolution, downsampling_factor, geometry_of
from ldm_vae.autoencoder.latents import Moments, decode, encode
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.meta import without_values
from ldm_vae.autoencoder.normalisation_law import law_in_words
from ldm_vae.autoencoder.preparation import code_rate
from ldm_vae.autoencoder.signals import frames_of
from ldm_vae.autoencoder.trainable import count_parameters
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.flop_counter import Cost, gpu_autocast
from ldm_vae.core.frozen_module import Frozen
from ldm_vae.core.text import an
from ldm_vae.data.holdout import is_held_out, numbers_of
from ldm_vae.data.stream import length
from ldm_vae.kernels.group_norm import fuse_norms
from ldm_vae.run.optim import trainable_parameters
from ldm_vae.training.adversary import Adversary
from ldm_vae.training.codebooks import add_codebooks
from ldm_vae.training.config import (
    Training,
    build_autoencoder,
    build_discriminator,
    build_network,
    build_objective,
    learning,
)
from ldm_vae.training.decoder_only import drop_encoder
from ldm_vae.training.smallest_crop import check_smallest, crop_size
from ldm_vae.training.step import TrainingStep

GB = 1e9
# resident memory of a process on a CPU over what its tensors hold, beside LIBRARIES: 1.42 to 1.43 in trainings of 0.2
# to 0.4 GB; with MALLOC_MMAP_THRESHOLD_=65536, where the C library's heap keeps nothing, 1.12: convolutions' workspace
RESIDENT = 1.5
LIBRARIES = 0.9e9  # torch and what else is imported


@dataclass(frozen=True)
class Plan:
    """Cost of a run: parameters by network; GFLOP an image of each forward pass, and of a whole step with the adversary
    active; bytes of the tensors of a process by what holds them (a teacher's network, which is not loaded, left
    out)."""

    parameters: dict[str, int]
    forward_gflop: dict[str, float]
    step_gflop: float
    bytes: dict[str, int]


def plan(settings: Training, processes: int = 1) -> Plan:
    """Count a step of this config: shapes alone, on any machine, in seconds.

    Raises:
        UsageError: the config cannot be built.
    """
    accelerator = Accelerator(cpu=True)
    # gradients that wait for the next micro-batch lie beside its activations: two show what any number holds
    micro_batches = accelerator.gradient_accumulation_steps = min(2, settings.gradient_accumulation_steps)
    base = _base(settings)
    fake = FakeTensorMode()
    if base is not None:
        with FakeCopyMode(fake):
            base = copy.deepcopy(base)
    with fake, gpu_autocast(settings.mixed_precision):
        if base is None:  # the weights of init_from are not wanted, its shape is `model`
            vae = build_autoencoder(settings.model_copy(update={"init_from": None}))
        else:
            vae = learning(base, settings.trainable, getattr(settings.data, "frames", None))
        check_smallest(settings, vae)
        if settings.gradient_checkpointing:
            enable_checkpointing(vae)
        network = build_network(settings, vae, outline=True)
        if settings.channels_last:
            fuse_norms(network)
        objective = build_objective(settings, outline=True)
        objective.attach(network)
        critic = build_discriminator(settings, outline=True)
        size = crop_size(settings)
        images = torch.empty(settings.train_batch_size, settings.model.in_channels, *size)
        noise = torch.empty(len(images), *network.noise_shape(*size))
        latents = torch.empty(len(images), *network.latent_shape(*size))
        parts: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
            "encoder": (partial(encode, vae), (images,)),
            "decoder": (partial(decode, vae), (latents,)),
        }
        stored = None
        if settings.latent_store is not None:
            drop_encoder(vae)
            del parts["encoder"]
            stored = Moments(latents, latents, geometry_of(vae).is_point)
        clips = images.new_empty(len(images), settings.seen_channels, *size)
        seen = {"pixels": frames_of(clips), "clips": clips, "sounds": clips}
        for name, term in objective.terms.items():
            if (domain := str(term.domain)) in seen:
                some, wanted = seen[domain], settings.losses[name].frames
                if wanted is not None:
                    some = some[: wanted * len(images)]
                parts[name] = (term, (some, some))
        parts |= {} if critic is None else {"discriminator": (critic, (seen[getattr(critic, "domain", "pixels")],))}
        forward = {
            name: _flops(function, arguments) / len(images) / 1e9 for name, (function, arguments) in parts.items()
        }
        optimizer = settings.optimizer.build(trainable_parameters([network, objective]), settings.learning_rate)
        critic_optimizer = None if critic is None else settings.optimizer.build(trainable_parameters([critic]), 1e-4)
        step = TrainingStep(
            accelerator, network, objective, optimizer, Adversary(settings.adversary), critic, critic_optimizer,
            settings.max_grad_norm,
        )  # fmt: skip
        for one in filter(None, (optimizer, critic_optimizer)):
            # an update is hundreds of small operations; none is counted, and it holds one parameter more at a time
            one.step = lambda *_: None  # type: ignore[assignment, method-assign]
        with Cost() as cost:
            for _ in range(micro_batches):
                step(images, noise, settings.adversary.start_images, stored)
    held = [vae] if critic is None else [vae, critic]
    weights = sum(_bytes(module) for module in held)
    looking = [part for root in (network, objective, *held[1:]) for part in root.modules()]
    looked_through = {id(part.network): part.network for part in looking if isinstance(part, Frozen)}
    frozen = sum(_bytes(module) for module in looked_through.values())
    learned = trainable_parameters([network, *held[1:]])
    updated = [*learned, *trainable_parameters([objective])]
    return Plan(
        parameters={"autoencoder": count_parameters(vae.parameters())}
        | ({} if critic is None else {"discriminator": count_parameters(critic.parameters())}),
        forward_gflop=forward,
        step_gflop=cost.flops / len(images) / micro_batches / 1e9,
        bytes={
            "weights": weights,
            "averaged weights": _bytes(vae),
            # beside the gradients themselves
            **({"buckets of DDP": 4 * count_parameters(learned)} if processes > 1 else {}),
            **({"networks that losses look through": frozen} if frozen else {}),
            "Adam's moments": 2 * sum(parameter.nbytes for parameter in updated),
            "activations and gradients": cost.peak_bytes,
        },
    )


def _flops(function: Any, arguments: tuple[torch.Tensor, ...]) -> int:
    with Cost() as cost, torch.no_grad():
        function(*arguments)
    return int(cost.flops)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


# --- as text ----------------------------------------------------------------------------------------------------------


def describe(settings: Training, processes: int = 1) -> str:
    """Text that `--dry_run` prints: the resolved config as YAML, then the plan as comments. Data and base weights that
    are not on this machine are said to be so.

    Raises:
        UsageError: the config does not hold together.
    """
    vae = _outline(settings)
    check_resolution(crop_size(settings)[-1], vae)
    found = plan(settings, processes)
    global_batch = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    latent = build_network(settings, vae, outline=True).latent_shape(*crop_size(settings))
    millions = {name: f"{count / 1e6:.2f} M" for name, count in found.parameters.items()}
    forward = {name: f"{count:.3g}" for name, count in found.forward_gflop.items() if count}
    memory = {name: f"{count / GB:.2f}" for name, count in found.bytes.items()}
    peak = sum(found.bytes.values())
    size = crop_size(settings)
    one, several = ("clip", f"clips of {size[0]} frames") if len(size) == 3 else ("image", "images")
    batch = f"{settings.train_batch_size} {several} of {settings.resolution} px"
    if settings.samples is not None:
        one, batch = "excerpt", f"{settings.train_batch_size} excerpts of {settings.samples} samples"
    lines = {
        "class": f"{type(vae).__name__}; normalisation {law_in_words(vae)}",
        "parameters": f"{_listed(millions)}; f {downsampling_factor(vae)}, latents {' x '.join(map(str, latent))}",
        "codes": code_rate(vae),
        f"GFLOP {an(one)}": f"forward {_listed(forward)}; a training step with all that plays {found.step_gflop:.4g}",
        "memory, GB": f"{_listed(memory)}; peak about {peak / GB:.1f} in a process with {batch}",
        "on a CPU": "" if torch.cuda.is_available() else _on_a_cpu(peak),
        "init_from": _found_base(settings),
        "data": _found_data(settings.data, global_batch, settings.max_train_images, settings.holdout),
        "validation_data": _found_data(settings.validation_data),
    }
    comments = "".join(f"# {name + ':':16} {text}\n" for name, text in lines.items() if text)
    return f"{config.dump(settings)}{comments}"


def _on_a_cpu(peak: int) -> str:
    return (
        f"resident up to about {(RESIDENT * peak + LIBRARIES) / GB:.1f} GB: {RESIDENT} times, as the C library keeps "
        f"part of what tensors gave back, and {LIBRARIES / GB} of libraries, which each data worker takes again"
    )


def _base(settings: Training) -> Any:
    """The network whose shape is the model's, where no config says it."""
    if not settings.is_built_from:
        return None
    base = load_autoencoder(str(settings.init_from))
    return add_codebooks(settings, settings.model.build_from(base, f"init_from {settings.init_from}"), base)


def _outline(settings: Training) -> Any:
    base = _base(settings)
    with torch.device("meta"):
        vae = add_codebooks(settings, settings.model.build()) if base is None else without_values(base)
    set_trainable(vae, settings.trainable)
    return vae


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _found_base(settings: Training) -> str:
    if settings.init_from is None:
        return ""
    if Path(settings.init_from).exists():
        build_autoencoder(settings)  # raises where its shape is not `model`
        return f"{settings.init_from}, whose shape is `model`"
    cached = [_cached(settings.init_from, name) for name in ("config.json", "vae/config.json")]
    return f"{settings.init_from}, in the hub's cache" if any(cached) else f"not found here: {settings.init_from}"


def _cached(hub_id: str, name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(hub_id, name), str)
    except ValueError:  # not a hub id
        return False


def _found_data(data: Any, global_batch: int = 0, max_images: int = 0, holdout: float | None = None) -> str:
    if data is None:
        return ""
    if data.kind == "hub" and not Path(data.path).exists():
        return f"not looked for: {data.path} is a hub id"
    try:
        source = data.build()
        count = length(source)
    except (UsageError, WorkError):
        return f"not found here: {data.path}"
    if count is None:
        return f"read in order, its length is unknown: {data.path}"
    if not global_batch:
        return f"{count:,} images in {data.path}"
    train, held = count, ""
    if holdout is not None:
        train -= int(is_held_out(numbers_of(source), holdout).sum())
        held = f", {count - train:,} of them held out and {train:,} to train on, less copies of the former"
    return (
        f"{count:,} images in {data.path}{held}; an epoch is {train / global_batch:.4g} updates of {global_batch}, "
        f"the run {max_images / train:.3g} epochs, {max_images // global_batch:,} updates"
    )
