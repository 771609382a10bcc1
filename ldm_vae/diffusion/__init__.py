"""Diffusion models on latents: flow matching, samplers, and how well they learn."""
