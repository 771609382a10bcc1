"""How a program finds out what it was started as: one process or several, and whether that is what was meant.

Accelerate can turn "two processes" into one, or into two that do not know of each other, without a word (CPU launches
do: `distributed_type: MULTI_CPU` starts one process, `--multi_gpu` without a GPU starts two independent ones). Every
program builds its Accelerator here.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from ldm_vae.errors import UsageError

SEVERAL_ON_A_CPU = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m PROGRAM"


def build_accelerator(mixed_precision: str = "no", **settings: Any) -> Accelerator:
    """An Accelerator on the GPUs that are there, else on the CPU (gloo when several processes were launched).

    Raises:
        UsageError: the launch is not what it seems, the precision cannot be had, or a wrapper other than DDP is asked.
    """
    cpu = not torch.cuda.is_available()
    if cpu and mixed_precision == "fp16":
        raise UsageError(
            "mixed_precision: fp16 needs a GPU (Accelerate drops the loss scaler on a CPU without a word); "
            "expected no or bf16 here"
        )
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision, **settings)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(
            f"launch: {launched} processes were started, but each of them sees {accelerator.num_processes} and would "
            f"train its own model; start several processes on a CPU with: {SEVERAL_ON_A_CPU}"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UsageError(
            f"launch: {accelerator.distributed_type.value} is not supported; plain DDP is enough, since the weights, "
            "gradients and Adam moments of an 84 M parameter autoencoder take 1.3 GB"
        )
    return accelerator
