"""The request of `ldm-vae export`. Nothing heavy is imported: `--help` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm_vae.core.request import argument, flag
from ldm_vae.data.flags import DataFlags, data_flags


@dataclass(frozen=True, kw_only=True)
class Request:
    """Request of `ldm-vae export`."""

    source: str = argument("SRC", "run folder, diffusers folder, hub id or single file")
    out: str = argument("OUT", "folder to write; for a single-file target also NAME.safetensors")
    target: Literal["diffusers", "comfyui", "kohya", "a1111"] = flag(
        "what will load it (default: diffusers)", "diffusers"
    )
    config: str | None = flag("for a single file: folder with the config.json of its shape", metavar="FOLDER")
    stats: str | None = flag(
        "measure the normalisation: a latent store of this encoder, or images", metavar="STORE|DATA"
    )
    normalisation: Literal["scale", "shift", "channel"] | None = flag("which one is written (default: SRC's kind)")
    normalisation_from: str | None = flag(
        "keep this VAE's: right for a fine-tuned decoder, whose diffusion model knows BASE's latents", metavar="BASE"
    )
    resolution: int | None = flag("side of the images in pixels, for DATA and for config.json")
    batch_size: int = flag("images per forward pass over DATA (default 8)", 8)
    stats_images: int | None = flag("at most N images of DATA (default all)", metavar="N")
    variant: Literal["fp16"] | None = flag("diffusers: a half-precision copy too; file: only that")
    max_shard_size: str = flag("diffusers: divide larger weight files", "10GB", metavar="SIZE")
    pipeline: bool = flag("write OUT/vae, as in a pipeline's folder", False)
    preview: bool = flag("print and save the map latents -> colours (needs --stats)", False)
    drift_from: str | None = flag("say in the card how far it is from this base (with --stats)", metavar="VAE")
    license: str | None = flag("licence for the card's head, e.g. apache-2.0 (default: that of a local base)")
    base_model: str | None = flag("hub id of what was fine-tuned, for the card's head")
    push_to_hub: str | None = flag("upload OUT to owner/name afterwards", metavar="REPO")
    private: bool = flag("with --push_to_hub: a private repository", False)
    strict: bool = flag("exit 1 when the target cannot load or ignores something", False)
    weights_only_pickle: bool = flag("read an old .ckpt or .pt (tensors only, no code is run)", False)
    flags: DataFlags = data_flags()

    @property
    def place(self) -> Path:
        """The folder or file to write."""
        return Path(self.out) / "vae" if self.pipeline else Path(self.out)

    @property
    def half(self) -> bool:
        """True where weights in fp16 are asked for."""
        return self.variant == "fp16"
