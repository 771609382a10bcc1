"""`ldm-vae export SRC OUT`: write a trained VAE as the folder or file that another program loads."""

from __future__ import annotations

import dataclasses
import sys

from ldm_vae.export.request import Request as Request

HELP = "write a VAE for diffusers, ComfyUI, kohya, A1111, onnxruntime or transformers, with measured scaling"
DESCRIPTION = """\
Write SRC in another program's format, read it back and compare. Success is reported only after the comparison.

  ldm-vae export runs/mine my-vae                                       # for AutoencoderKL.from_pretrained("my-vae")
  ldm-vae export runs/mine my-vae --stats photographs --resolution 256  # measure the scaling over these images first
  ldm-vae export my-vae my-vae.safetensors --target comfyui             # one file, with ComfyUI's tensor names
  ldm-vae export my-vae my-onnx --target onnx                           # encoder.onnx and decoder.onnx
  ldm-vae export runs/codec my-dac --target dac                         # for transformers' DacModel
  ldm-vae export sd-vae.safetensors my-vae                              # convert back
  ldm-vae export runs/mine my-vae --checkpoint best                     # of a run that is not over, or went too far

SRC is a run folder (its EMA weights; --checkpoint takes those of one of its checkpoints and measures their scaling as
the end of the run does), a diffusers folder, a hub id, or a single file (names of LDM, of its class's own project or of
diffusers, bare or inside a full checkpoint). Exactly one normalisation is written, `--normalisation scale` (Stable
Diffusion, SDXL), `shift` (SD3, FLUX) or `channel` (per channel, SDXL's formula). docs/export.md lists what each program
ignores.
"""


def run(request: Request) -> None:
    from ldm_vae.core.errors import WorkError
    from ldm_vae.export.workflow import export
    from ldm_vae.run.selection import at_checkpoint
    from ldm_vae.training.scaling import measure_checkpoint

    source = at_checkpoint(request.source, request.checkpoint)
    done = export(dataclasses.replace(request, source=source), measure_checkpoint)
    for line in done.lines:
        print(line)
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if done.warnings and request.strict:
        raise WorkError(
            f"{request.place}: written, with {len(done.warnings)} warning(s), which --strict counts as failure"
        )
