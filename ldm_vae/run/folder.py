"""The shared part of every training run: common knobs, the run folder, due events, saving and resuming.

The loops are train/autoencoder.py, train/diffusion.py and train/prior.py; what only one of them has is declared where
it is used.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import nn

from ldm_vae.core import atomic_io, config, config_help
from ldm_vae.core.config import Section
from ldm_vae.core.errors import SIGNALS, Stopped, UsageError, WorkError
from ldm_vae.core.launch import DDP_TIMEOUT, build_accelerator, check_ranks_agree, check_same
from ldm_vae.core.numbers import Count, Positive, Seed
from ldm_vae.core.overrides import HELP
from ldm_vae.core.ownership import own
from ldm_vae.core.programs import words_of
from ldm_vae.core.progress import Progress
from ldm_vae.core.text import not_among
from ldm_vae.kernels.group_norm import fuse_norms
from ldm_vae.run import checkpoint
from ldm_vae.run.metrics_log import Averages
from ldm_vae.run.trackers import check_tracker, start_tracker

RunType = TypeVar("RunType", bound="RunConfig")


class RunConfig(Section):
    """Knobs that every run has."""

    output_dir: Path
    """The run folder; an existing one of the same config is resumed."""
    seed: Seed = 0
    """Of the weights, the order of the data and all noise; each draw is keyed."""
    train_batch_size: int = Field(8, gt=0, le=2**20)
    """Images per process and micro-batch."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-batches per update; an adversary's adaptive weight is computed in each."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward passes; weights stay fp32. fp16 needs a GPU."""
    max_train_images: int = Field(1_000_000, gt=0)
    """The run ends when so many images have been seen."""
    learning_rate: float = Field(1e-4, gt=0)
    """Absolute (latent-diffusion multiplies 4.5e-6 by the global batch)."""
    lr_warmup_images: Count = 0
    """Linear warm-up."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up."""
    max_grad_norm: Positive | None = None
    """Clip each network's gradient to this norm."""
    ema_halflife_images: Count = 500_000
    """Half-life of the averaged weights, at most 5 % of the images seen; they are what is measured and exported."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time, the same result."""
    channels_last: bool = False
    """Lay convolutions out channels last, each norm fused with the SiLU behind it: for GPUs with tensor cores; the same
    result to rounding."""
    torch_compile: bool = False
    """Compile the networks in place: names in checkpoints and exports stay clean. The first step takes minutes."""
    torch_compile_backend: str = "inductor"
    """Of torch.compile; aot_eager shows whether a failure is the compiler's."""
    log_every_images: int = Field(10_000, gt=0)
    """One line of averages in metrics.jsonl."""
    checkpoint_every_images: int = Field(100_000, gt=0)
    """A checkpoint that resume starts from."""
    checkpoints_total_limit: int | None = Field(2, gt=0)
    """How many checkpoints are kept; a best one, where there is such a thing, is kept beside them."""
    dataloader_num_workers: int = Field(2, ge=0, le=1024)
    """Processes that read the data, per training process; the result does not depend on it."""
    ddp_timeout: int = Field(DDP_TIMEOUT, gt=0)
    """Seconds that a process waits for another one which hangs before the run ends (one that died is noticed at once).
    Longer than what the main process does alone: pictures, the final measurement of the scaling."""
    report_to: str | None = None
    """A tracker of Accelerate: tensorboard, wandb, ...; metrics.jsonl is always written."""

    @model_validator(mode="after")
    def _check_backend(self) -> RunConfig:
        if self.torch_compile and self.torch_compile_backend not in torch.compiler.list_backends(exclude_tags=()):
            exist = torch.compiler.list_backends(exclude_tags=())
            raise ValueError(f"torch_compile_backend: {not_among(self.torch_compile_backend, exist)}")
        return self


# a resumed run may change how long it goes on, what it keeps and tells, and on how many processes it runs
MAY_CHANGE = (
    "train_batch_size",  # with another number of processes the same global batch is another batch of each
    "max_train_images",
    "log_every_images",
    "checkpoint_every_images",
    "checkpoints_total_limit",
    "dataloader_num_workers",
    "ddp_timeout",
    "report_to",
    "torch_compile",
    "torch_compile_backend",
    "channels_last",
)


# --- the command line -------------------------------------------------------------------------------------------------


def start_from_command_line(
    section: type[RunType],
    program: str,
    manual: str | None,
    describe: Callable[[RunType, int], str],
    train: Callable[[RunType], None],
) -> None:
    """`PROGRAM CONFIG [--section.key value]`: print the manual, the plan (--dry_run), or train."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in HELP:
        print(f"{manual}\n{config_help.kinds(section)}")
        return
    flags = [flag for flag in arguments[1:] if flag not in ("--dry_run", "--dry-run")]
    settings = config.load(section, arguments[0], [flag for flag in flags if flag not in HELP])
    if set(flags) & {*HELP}:
        config_help.show(settings, " ".join([*words_of(program), arguments[0]]))
    main = os.environ.get("RANK", "0") == "0"
    if len(flags) < len(arguments) - 1:
        if main:
            print(describe(settings, int(os.environ.get("WORLD_SIZE", "1"))), end="")
    else:
        with own(settings.output_dir, "output_dir") if main else contextlib.nullcontext():
            train(settings)


def start(settings: RunConfig) -> Accelerator:
    """The Accelerator of a run; an absent tracker or a launch that is not what it seems ends here, in seconds."""
    check_tracker(settings.report_to)
    return build_accelerator(
        settings.mixed_precision,
        ddp_timeout=settings.ddp_timeout,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=settings.report_to,
        project_dir=str(settings.output_dir),
    )


# --- the folder -------------------------------------------------------------------------------------------------------


def check_run_folder(settings: RunConfig, may_change: Collection[str] = MAY_CHANGE) -> None:
    """Raises UsageError for a folder that holds a run of another config."""
    path = settings.output_dir / "config.yaml"
    if path.exists():
        before = config.load(type(settings), path)
        changed = {key: values for key, values in config.differences(before, settings).items() if key not in may_change}
        if changed:
            listed = ", ".join(f"{key} (was {old}, now {new})" for key, (old, new) in changed.items())
            raise UsageError(f"output_dir: {settings.output_dir} holds a run of another config: {listed}")


def prepare_run_folder(settings: RunConfig, accelerator: Accelerator, may_change: Collection[str] = MAY_CHANGE) -> None:
    """Write RUN/config.yaml. Raises UsageError for a folder that holds a run of another config."""
    check_run_folder(settings, may_change)
    path = settings.output_dir / "config.yaml"
    # every rank has compared its config with the old file before that is replaced
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        atomic_io.replace(path, atomic_io.data(config.dump(settings).encode()))
    if settings.report_to is not None:
        start_tracker(accelerator, config.flatten(settings))


def global_batch(settings: RunConfig, accelerator: Accelerator) -> int:
    """Images of one update, over all processes and micro-batches."""
    return int(settings.train_batch_size * accelerator.num_processes * settings.gradient_accumulation_steps)


class Best(Section):
    """The best checkpoint so far, and its score."""

    score: float
    checkpoint: str = Field(pattern=rf"^{checkpoint.PREFIX}[0-9]+$")


class Info(Section):
    """The plain values of a checkpoint."""

    images_seen: int = Field(ge=0)
    global_batch: int = Field(gt=0)
    best: Best | None = None


def resume(
    settings: RunConfig, accelerator: Accelerator, stateful: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest whole checkpoint into `stateful`; its path and the plain values saved with it."""
    newest = checkpoint.newest(settings.output_dir / "checkpoints", accelerator.print)
    # ranks that see different folders would resume at different places and hang, or train on apart
    check_same(accelerator, "checkpoints", -1 if newest is None else checkpoint.images_of(newest))
    if newest is None:
        return None
    saved = checkpoint.load(newest, stateful)
    try:
        info = config.validate(Info, saved, "its state.json").model_dump()
    except UsageError as error:
        raise WorkError(f"checkpoint {newest}: {error}; delete it to go on from the one before it") from error
    accelerator.print(f"resumed from {newest} at {info['images_seen']:,} images")
    before, now = info["global_batch"], global_batch(settings, accelerator)
    if before != now:
        accelerator.print(f"the global batch was {before}, now it is {now}: the order of images is kept")
    return newest, info


def save(
    settings: RunConfig,
    accelerator: Accelerator,
    images_seen: int,
    stateful: Mapping[str, Any],
    networks: Mapping[str, nn.Module],
    averages: Averages,
    best: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Save a checkpoint of all that is `stateful`, and further `files` by name, after checking that the ranks'
    `networks` are equal; older ones are pruned.

    Raises:
        WorkError: the ranks diverged, or it cannot be written.
    """
    folder = settings.output_dir / "checkpoints"
    # before anything is written: a checkpoint of diverged ranks would hide the divergence
    check_ranks_agree(accelerator, networks)
    # a collective, hence on all ranks; rank 0 then saves the sums for all
    averages.synchronise(accelerator)
    if accelerator.is_main_process:
        info = {"images_seen": images_seen, "best": best, "global_batch": global_batch(settings, accelerator)}
        checkpoint.save(folder, images_seen, stateful, config.dump(settings), info, files)
        checkpoint.prune(folder, settings.checkpoints_total_limit, None if best is None else best["checkpoint"])
    accelerator.wait_for_everyone()
    return folder / checkpoint.name(images_seen)


def stopped(accelerator: Accelerator, number: int, saved: Path | None) -> Stopped:
    """Say that a signal has ended the run, where its checkpoint is and what goes on; the error to raise."""
    accelerator.print(f"stopped by {SIGNALS[number]}, saved {saved}; the same command resumes")
    return Stopped(number)


# --- in the loop ------------------------------------------------------------------------------------------------------


def prepare_network(network: nn.Module, settings: RunConfig) -> None:
    """Memory layout and compilation of a network that is about to train, in place."""
    if settings.channels_last:
        for weight in network.parameters():  # of a network with time of either rank, where `network.to` raises
            if (layout := {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)) is not None:
                weight.data = weight.data.contiguous(memory_format=layout)
        fuse_norms(network)
    if settings.torch_compile:
        # torch.compile(network) would put `_orig_mod.` into every name, and encode and decode would go past it
        network.compile(backend=settings.torch_compile_backend)


def progress_bar(settings: RunConfig, images_seen: int) -> Progress:
    """Images seen of `max_train_images`; where there is no terminal, a line of every interval of the log."""
    return Progress(
        total=settings.max_train_images, initial=images_seen, unit="img", desc="train", on_report=True
    )  # fmt: skip


def what_is_due(settings: RunConfig, images_seen: int, batch: int, **every: int | None) -> dict[str, bool]:
    """Events that are due after an update of `batch` images: each when a multiple of its interval has been crossed
    (None: never), and all at the end of the run."""
    ends = images_seen >= settings.max_train_images
    return {
        name: interval is not None and (ends or images_seen // interval > (images_seen - batch) // interval)
        for name, interval in every.items()
    }
