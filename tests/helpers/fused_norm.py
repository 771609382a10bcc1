"""A program that calls the fused norm, in a process that has not imported its kernel."""

from __future__ import annotations

import importlib
import sys

import torch


def main() -> None:
    """Print whether that call imported the kernel, and Triton."""
    importlib.import_module("ldm_vae.run.folder")
    from ldm_vae.kernels.group_norm import group_norm_silu

    before = "triton" in sys.modules
    group_norm_silu(torch.ones(1, 4, 2, 2), 2, torch.ones(4), torch.ones(4), 1e-6)
    print("ldm_vae.kernels.group_norm_triton" in sys.modules, "triton" in sys.modules and not before)
