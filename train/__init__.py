"""Programs with the loop in sight; they import ldm_vae only, and nothing imports them."""

import ldm_vae as ldm_vae  # before torch: ldm_vae/core/parent_process.py
