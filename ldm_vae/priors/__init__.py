"""Priors over the codes of an image or a clip, one file each; the file name is the name under `model.kind`.

A file holds `Config(Part)` whose `build(codes, shape, classes)` gives a `Prior` (`ldm_vae/prior/model.py`) of indices
[B, *shape] from 0 to `codes` - 1, with shape (q, *p): q codebooks, and positions h, w of an image or t, h, w of a clip;
labels [B] from 0 to `classes`, of which the last stands for "no label".
"""
