"""Programs with the loop in sight; they import ldm_vae only, and nothing imports them."""
