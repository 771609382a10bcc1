"""Programs with a measuring protocol in sight."""

import ldm_vae as ldm_vae  # before torch: ldm_vae/core/parent_process.py
