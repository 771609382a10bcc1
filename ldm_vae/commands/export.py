"""`ldm-vae export SRC OUT`: write a trained VAE as the folder or file that another program loads."""

from __future__ import annotations

import argparse
import sys

from ldm_vae.data.flags import DataFlags, add_data_arguments

HELP = "write a VAE for diffusers, ComfyUI, kohya or A1111, its scaling measured"
DESCRIPTION = """\
Write SRC where another program finds it, read it back, compare, and only then say so.

  ldm-vae export runs/mine my-vae                                       # for AutoencoderKL.from_pretrained("my-vae")
  ldm-vae export runs/mine my-vae --stats photographs --resolution 256  # measure the scaling over these images first
  ldm-vae export my-vae my-vae.safetensors --target comfyui             # one file, in the names that ComfyUI reads
  ldm-vae export sd-vae.safetensors my-vae                              # and back

SRC is a run folder (its averaged weights), a diffusers folder, a hub id, or a single file (LDM or diffusers names, bare
or inside a full checkpoint). Exactly one normalisation is written, `--normalisation scale` (Stable Diffusion, SDXL),
`shift` (SD3, FLUX) or `channel` (per channel, SDXL's formula). docs/export.md says what each program ignores.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="run folder, diffusers folder, hub id or single file")
    parser.add_argument("out", metavar="OUT", help="folder to write; for a single-file target also NAME.safetensors")
    parser.add_argument("--target", choices=("diffusers", "comfyui", "kohya", "a1111"), default="diffusers")
    parser.add_argument(
        "--config", metavar="FOLDER", help="for a single file: folder with the config.json of its shape"
    )
    parser.add_argument(
        "--stats", metavar="STORE|DATA", help="measure the normalisation: a latent store of this encoder, or images"
    )
    parser.add_argument(
        "--normalisation", choices=("scale", "shift", "channel"), help="which one is written (default: SRC's kind)"
    )
    parser.add_argument(
        "--normalisation_from",
        metavar="BASE",
        help="keep this VAE's: right for a fine-tuned decoder, whose diffusion model knows BASE's latents",
    )
    parser.add_argument("--resolution", type=int, help="side of the images in pixels, for DATA and for config.json")
    parser.add_argument("--batch_size", type=int, default=8, help="images per forward pass over DATA (default 8)")
    parser.add_argument("--stats_images", type=int, metavar="N", help="at most N images of DATA (default all)")
    parser.add_argument("--variant", choices=("fp16",), help="diffusers: a half-precision copy too; file: only that")
    parser.add_argument(
        "--max_shard_size", default="10GB", metavar="SIZE", help="diffusers: divide larger weight files"
    )
    parser.add_argument("--pipeline", action="store_true", help="write OUT/vae, as in a pipeline's folder")
    parser.add_argument(
        "--preview", action="store_true", help="print and save the map latents -> colours (needs --stats)"
    )
    parser.add_argument(
        "--drift_from", metavar="VAE", help="say in the card how far it is from this base (with --stats)"
    )
    parser.add_argument(
        "--license", help="licence for the card's head, e.g. apache-2.0 (default: that of a local base)"
    )
    parser.add_argument("--base_model", help="hub id of what was fine-tuned, for the card's head")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload OUT to owner/name afterwards")
    parser.add_argument("--private", action="store_true", help="with --push_to_hub: a private repository")
    parser.add_argument("--strict", action="store_true", help="exit 1 when the target cannot load or ignores something")
    parser.add_argument(
        "--weights_only_pickle", action="store_true", help="read an old .ckpt or .pt (tensors only, no code is run)"
    )
    add_data_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ldm_vae.core.errors import WorkError
    from ldm_vae.export.workflow import Request, export

    request = Request(
        source=arguments.source,
        out=Path(arguments.out) / "vae" if arguments.pipeline else Path(arguments.out),
        target=arguments.target,
        config=arguments.config,
        stats=arguments.stats,
        normalisation=arguments.normalisation,
        normalisation_from=arguments.normalisation_from,
        resolution=arguments.resolution,
        batch_size=arguments.batch_size,
        stats_images=arguments.stats_images,
        preview=arguments.preview,
        half=arguments.variant == "fp16",
        max_shard_size=arguments.max_shard_size,
        push_to_hub=arguments.push_to_hub,
        private=arguments.private,
        pipeline=arguments.pipeline,
        license=arguments.license,
        base_model=arguments.base_model,
        drift_from=arguments.drift_from,
        allow_pickle=arguments.weights_only_pickle,
        flags=DataFlags.of(arguments),
    )
    done = export(request)
    for line in done.lines:
        print(line)
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if done.warnings and arguments.strict:
        raise WorkError(
            f"{request.out}: written, with {len(done.warnings)} warning(s), which --strict counts as failure"
        )
