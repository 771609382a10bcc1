"""The networks of a diffusion model on latents, one file each; the file name is the name under `denoiser.kind`.

A file holds `Config(Part)` whose `build(channels, size, classes)` gives a network of diffusers that is called as
`network(noised, timestep, class_labels=labels).sample`: noised [B, c, h, w], timestep [B] from 0 to 1000, labels [B]
from 0 to `classes`, of which the last stands for "no label". It is saved with `save_pretrained`.
"""
