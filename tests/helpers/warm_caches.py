"""Caches of forked programs, filled once before the forks: every verb's module, shapes without values, the page's
templates, a sentence of the card. Nothing here computes (see fork_server.py)."""

from __future__ import annotations

import warnings

import torch
from tiny_classes import tiny

from ldm_vae import cli
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.fine_tuning import idle_parameters
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.last_layer import place_of
from ldm_vae.autoencoder.lengths import hop_of, lengths_of
from ldm_vae.export import card
from ldm_vae.report.page import templates

with torch.device("meta"):
    network = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4).build()
cli.parser()
geometry_of(network)
place_of(network)
idle_parameters(network, None)
with torch.device("meta"), warnings.catch_warnings():  # the classes of clips and sounds that most programs run with
    warnings.simplefilter("ignore")  # of torch, about a class of sounds
    films, sounds = tiny("AutoencoderKLWan"), tiny("AutoencoderOobleck", audio_channels=1, sampling_rate=8000)
for one, measures in ((films, (geometry_of, lengths_of)), (sounds, (geometry_of, hop_of))):
    for measure in measures:
        measure(one)
card.pipeline_words()
for name in templates().list_templates(["j2"]):
    templates().get_template(name)
