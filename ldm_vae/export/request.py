"""The request of `ldm-vae export`. Nothing heavy is imported: `--help` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm_vae.core.request import argument, flag
from ldm_vae.data.flags import DataFlags, data_flags
from ldm_vae.run.selection import checkpoint_flag


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of `ldm-vae export`."""

    source: str = argument("SRC", "run folder, diffusers folder, hub id or single file")
    out: str = argument("OUT", "folder to write; for a single-file target also NAME.safetensors")
    target: Literal["diffusers", "single_file", "comfyui", "kohya", "a1111", "onnx", "dac"] = flag(
        "what loads the result: diffusers (a folder; default), its from_single_file, another program, onnxruntime, "
        "DacModel of transformers",
        "diffusers",
    )
    checkpoint: str | None = checkpoint_flag()
    config: str | None = flag("for a single file: folder with its config.json", metavar="FOLDER")
    stats: str | None = flag(
        "latent store of this encoder, or images to measure: source of the normalisation, unless SRC has a base's",
        metavar="STORE|DATA",
    )
    normalisation: Literal["scale", "shift", "channel"] | None = flag(
        "measured normalisation to write, also in place of a base's (default: SRC's kind)"
    )
    normalisation_from: str | None = flag(
        "use BASE's normalisation: for a fine-tuned decoder, whose diffusion model was trained on BASE's latents",
        metavar="BASE",
    )
    resolution: int | None = flag(
        "side of the images in pixels, for DATA (default: SRC's sample_size) and for config.json"
    )
    batch_size: int = flag("images per forward pass over DATA (default 8)", 8)
    stats_images: int | None = flag("use at most N images of DATA (default: all)", metavar="N")
    variant: Literal["fp16"] | None = flag("diffusers: add a half-precision copy; single file: write fp16 only")
    max_shard_size: str = flag("diffusers: split larger weight files", "10GB", metavar="SIZE")
    pipeline: bool = flag("write OUT/vae, as in a pipeline's folder", False)
    preview: bool = flag("print and save the map from latents to colours (needs --stats)", False)
    drift_from: str | None = flag("report the drift from this base in the card (with --stats)", metavar="VAE")
    license: str | None = flag("licence for the card's metadata, e.g. apache-2.0 (default: that of a local base)")
    base_model: str | None = flag("hub id of the base model, for the card's metadata")
    push_to_hub: str | None = flag("upload OUT to the hub repository owner/name", metavar="REPO")
    private: bool = flag("with --push_to_hub: create a private repository", False)
    strict: bool = flag("exit with status 1 if the target cannot load the file or ignores a setting", False)
    weights_only_pickle: bool = flag("read an old .ckpt or .pt (tensors only; no code is executed)", False)
    flags: DataFlags = data_flags()

    @property
    def place(self) -> Path:
        """The folder or file to write."""
        return Path(self.out) / "vae" if self.pipeline else Path(self.out)

    @property
    def half(self) -> bool:
        """True where weights in fp16 are asked for."""
        return self.variant == "fp16"
