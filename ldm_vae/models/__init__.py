"""The kinds of autoencoder, one file each; the file name is the name under `model.kind`.

A file holds `Config(Part)` with `shape()`, the knobs that stand in the model's config.json, `build()`, which gives a
randomly initialised model of diffusers, or `build_from(base, place)`, which gives one of that of `init_from`, and
`bottleneck(vae)`, which gives what lies between its encoder and its decoder while training
(ldm_vae/autoencoder/bottleneck.py).
"""
