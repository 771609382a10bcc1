"""`ldm-vae probe VAE... DATA --output DIR`: compare VAEs by how well a diffusion model learns their latents."""

from __future__ import annotations

from ldm_vae.commands.train import ADD_HELP, PREFIX_CHARS, Request

__all__ = ["ADD_HELP", "DESCRIPTION", "HELP", "PREFIX_CHARS", "Request", "run"]

HELP = "train the same small diffusion model on the latents of several VAEs"
DESCRIPTION = ""  # the program's own help is shown


def run(request: Request) -> None:
    from ldm_vae.core import programs

    programs.run("eval/diffusability.py", [*request.arguments] or ["--help"])
