"""Launch: build the Accelerator of one process or several, and refuse a launch that is not what was meant.

Accelerate can turn "two processes" into one, or into two that do not know of each other, without a word (CPU launches
do: `distributed_type: MULTI_CPU` starts one process, `--multi_gpu` without a GPU starts two independent ones). Every
program builds its Accelerator here.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

from ldm_vae.core import parent_process
from ldm_vae.core.errors import UsageError, WorkError

SEVERAL_ON_A_CPU = (
    "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
    "-m PROGRAM"
)

DDP_TIMEOUT = 600  # seconds; torch's own are 600 (nccl) and 1800 (gloo)
ON_THEIR_OWN = 7 * 24 * 3600  # where processes meet once, at the end: the first to be done waits for the slowest

ACCELERATE = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")  # ACCELERATE_USE_...


def build_accelerator(
    mixed_precision: str | None = None, *, ddp_timeout: int = DDP_TIMEOUT, **settings: Any
) -> Accelerator:
    """An Accelerator on the GPUs that are there, else on the CPU (gloo when several processes were launched).

    Args:
        mixed_precision: the config's; None for a program without that knob, which computes in fp32.
        ddp_timeout: seconds that a process waits for another one at a collective before it gives up.

    Raises:
        UsageError: the launch is not what it seems or would change what the config says, the precision cannot be had,
            or a wrapper other than DDP is asked.
    """
    _watch_the_launcher()
    # before the Accelerator is built, which takes over some of the launcher's values and drops others without a word
    check_agreement(mixed_precision, settings.get("gradient_accumulation_steps"), os.environ, _launcher_command())
    mixed_precision = mixed_precision or "no"
    cpu = not torch.cuda.is_available() or _flag(os.environ, "ACCELERATE_USE_CPU")
    if cpu and mixed_precision == "fp16":
        raise UsageError(
            "mixed_precision: fp16 needs a GPU (Accelerate drops the loss scaler on a CPU without a word); "
            "expected no or bf16 here"
        )
    # by what the launcher asked for: on a CPU Accelerate turns FSDP into DDP without a word
    asked = [name for name in SHARDED if _flag(os.environ, f"ACCELERATE_USE_{name}")]
    if asked:
        raise UsageError(
            f"launch: {asked[0]} is not supported; plain DDP is enough, since the weights, gradients and Adam moments "
            "of an 84 M parameter autoencoder take 1.3 GB"
        )
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise UsageError(
            f"launch: --dynamo_backend {backend} would put `_orig_mod.` into the names of weights; expected no, and "
            "torch_compile: true in the config"
        )
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout))
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=[waiting], **settings)
    # afterwards: only now is it known how many processes this one sees
    check_processes(accelerator.num_processes, os.environ, _launcher_command())
    if mixed_precision == "fp16" and accelerator.scaler is None:  # ACCELERATE_TORCH_DEVICE puts it on a CPU after all
        raise UsageError(f"mixed_precision: fp16 needs a GPU, got device {accelerator.device}; expected no or bf16")
    return accelerator


def check_processes(seen: int, environment: Mapping[str, str], launcher: Sequence[str]) -> None:
    """Raises UsageError unless `seen` processes are what was launched (environment) and asked for (command line)."""
    started = int(environment.get("WORLD_SIZE", "1"))
    if started != seen:
        raise UsageError(
            f"launch: {started} processes were started, but each of them sees {seen} and would work on its own; "
            f"several processes on a CPU: {SEVERAL_ON_A_CPU}"
        )
    asked = _processes_asked(launcher)
    if started == 1 and asked > 1:
        raise UsageError(
            f"launch: {asked} processes were asked for and one was started, which is what Accelerate does without "
            f"--multi_gpu; several processes on a CPU: {SEVERAL_ON_A_CPU}"
        )


def check_agreement(
    mixed_precision: str | None, accumulation: int | None, environment: Mapping[str, str], launcher: Sequence[str]
) -> None:
    """Raises UsageError where the launcher, or a variable of the environment that Accelerate reads, asks for another
    precision, number of micro-batches or clipping than the config (None: the program has no such knob); says so on
    stderr where the config's value holds anyhow.

    Accelerate takes ACCELERATE_GRADIENT_ACCUMULATION_STEPS for the number of micro-batches, whatever it is told, and
    leaves the launcher's precision aside.
    """
    # the launcher passes some options on in the environment, others only its own command line shows
    options = _options(launcher) if _is_accelerate(launcher) else {}
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", options.get("gradient_accumulation_steps"))
    # the variable wins over the option
    if steps is not None and steps != str(accumulation or steps):
        raise UsageError(
            f"gradient_accumulation_steps: the config says {accumulation}, the launch {steps} (--"
            "gradient_accumulation_steps or ACCELERATE_GRADIENT_ACCUMULATION_STEPS); expected the same, or only the "
            "config's"
        )
    if steps is not None and not steps.isdecimal():
        raise UsageError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS: expected a number, got {steps!r}; leave it out")
    if accumulation is not None and "gradient_clipping" in options:
        raise UsageError(
            "launch: --gradient_clipping is for DeepSpeed and would be left aside; expected max_grad_norm in the config"
        )
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == (mixed_precision or "no"):
        return
    if asked != "no" and mixed_precision is not None:
        raise UsageError(
            f"mixed_precision: the config says {mixed_precision}, the launch {asked} (--mixed_precision or "
            "ACCELERATE_MIXED_PRECISION); expected the same, or no for the launch"
        )
    # the launcher's own default is no, which is no wish unless it was written
    if (asked != "no" or "mixed_precision" in options) and environment.get("RANK", "0") == "0":
        held = "fp32, which is all this program computes in," if mixed_precision is None else mixed_precision
        print(f"launch: --mixed_precision {asked} is left aside; {held} holds", file=sys.stderr)


def _flag(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes", "y", "on", "t")  # as Accelerate reads it


def _launcher_command() -> list[str]:
    """Command line of `accelerate launch` when it is this process's parent."""
    try:
        launcher = psutil.Process().parent()
        return launcher.cmdline() if launcher is not None else []
    except psutil.Error:  # it is gone, or not ours to see
        return []


def _is_accelerate(command: Sequence[str]) -> bool:
    return any(Path(word).name in ACCELERATE for word in command)


def _options(launcher: Sequence[str]) -> dict[str, str]:
    """The options of `accelerate launch` itself by name, without those of the program behind them."""
    start = next(place for place, word in enumerate(launcher) if Path(word).name in ACCELERATE) + 1
    options = {}
    for word, following in itertools.pairwise([*launcher[start:], ""]):
        if word in ("-m", "--module") or word.endswith(".py"):
            break
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            options[name[2:].replace("-", "_")] = value if equals else following
    return options


def _processes_asked(launcher: Sequence[str]) -> int:
    """`--num_processes N` of the launcher, or what its `--config_file` says; 1 when it says nothing."""
    if not _is_accelerate(launcher):
        return 1
    options = _options(launcher)
    if "num_processes" in options:
        return int(options["num_processes"])
    if "config_file" in options:
        return processes_of(Path(options["config_file"]))
    return 1


def processes_of(config: Path) -> int:
    """`num_processes` of a config file of Accelerate."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    return int(settings.get("num_processes", 1))


def check_same(accelerator: Accelerator, what: str, number: int) -> None:
    """Raises WorkError, on every rank, unless a number that each rank has read from a file is the same on all."""
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device)).tolist()
    if len({*numbers}) > 1:
        raise WorkError(
            f"{what}: the processes have {numbers}; the run folder must be on storage that all of them share"
        )


def check_ranks_agree(accelerator: Accelerator, modules: Mapping[str, nn.Module]) -> None:
    """Raises WorkError, on every rank, that names the first tensor which is not bit-equal on all of them."""
    if accelerator.num_processes == 1:
        return
    names, prints = [], []
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            if not isinstance(tensor, torch.Tensor):  # a term's extra state
                continue
            # two sums of the bit patterns stand for a tensor, so one small collective compares all of them
            bits = tensor.detach().double().flatten().view(torch.int64)
            places = torch.arange(1, len(bits) + 1, device=bits.device)
            names.append(f"{prefix}.{name}")
            prints.append(torch.stack([bits.sum(), (bits * places).sum()]))  # the second sees an exchange of values
    everyone = accelerator.gather(torch.stack(prints)[None])  # [ranks, tensors, 2]
    differs = (everyone != everyone[:1]).any(dim=2)
    if differs.any():
        # the first in the order of the modules: what diverged later follows from it
        first = int(differs.any(dim=0).nonzero()[0])
        ranks = differs[:, first].nonzero().flatten().tolist()
        raise WorkError(f"ranks diverged: {names[first]} on rank(s) {ranks} is not what rank 0 has")


@functools.cache  # one thread for a process
def _watch_the_launcher() -> None:
    """End this process when its launcher is gone: the next launch does its work, in the same folder. It ends
    wherever it is, which may be a collective that waits for days, and as if it had been killed; nothing is lost by it.
    """
    # Accelerate is torch's launcher for several processes and its own for one; a script that starts ranks by hand, or
    # a shell, may well end before them
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and (
        parent_process.is_gone() or _is_accelerate(_launcher_command())
    )
    if alone or "TORCHELASTIC_RUN_ID" in os.environ:
        # a daemon: it does not keep a program from its ordinary end
        threading.Thread(target=_end_with_the_launcher, name="launcher", daemon=True).start()


def _end_with_the_launcher() -> None:
    while not parent_process.is_gone():
        time.sleep(0.5)
    print("error: the launcher is gone; this process stops, what it finished is kept", file=sys.stderr, flush=True)
    # not sys.exit: this is not the main thread, and that one may wait in a collective
    os._exit(1)


class StopSignal:
    """Handler of SIGTERM and SIGINT: the signal is remembered, and all ranks agree on it at the end of a step."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.number:  # the second time nobody wants to wait
            raise SystemExit(128 + number)
        self.number = number

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal that any rank has got, or 0."""
        if accelerator.num_processes == 1:
            return self.number
        # a rank that stopped alone would leave the others waiting in their next collective
        numbers = accelerator.gather(torch.tensor([self.number], device=accelerator.device))
        return int(numbers.max())
