"""`python -m ldm_vae` is `ldm-vae`, so that `accelerate launch -m ldm_vae encode ...` works."""

from ldm_vae.cli import main

main()
