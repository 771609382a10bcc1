"""Caches of forked trainings, filled once before the forks: shapes without values, the page's templates, a sentence of
the card. Nothing here computes (see fork_server.py)."""

from __future__ import annotations

import torch

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.fine_tuning import idle_parameters
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.last_layer import place_of
from ldm_vae.export import card
from ldm_vae.report.page import templates

with torch.device("meta"):
    network = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4).build()
geometry_of(network)
place_of(network)
idle_parameters(network, None)
card.pipeline_words()
for name in templates().list_templates(["j2"]):
    templates().get_template(name)
