"""Priors over codes: orders, sampling, rates and training. The networks are in ldm_vae/priors."""
