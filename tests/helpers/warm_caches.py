"""Caches of forked programs, filled once before the forks: the modules of every verb, model, loss and discriminator,
shapes without values, the page's templates, a sentence of the card. Nothing here computes (see fork_server.py)."""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
import warnings

import torch
from tiny_classes import tiny

from ldm_vae import cli
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.fine_tuning import idle_parameters
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.last_layer import place_of
from ldm_vae.autoencoder.lengths import hop_of, lengths_of
from ldm_vae.core.config import options
from ldm_vae.export import card
from ldm_vae.models.vq import Config as VQConfig
from ldm_vae.report.page import templates

for package in ("ldm_vae.models", "ldm_vae.losses", "ldm_vae.discriminators"):
    for kind in options(package):
        importlib.import_module(f"{package}.{kind}")
small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
with torch.device("meta"):
    networks = [AutoencoderConfig(**small).build(), VQConfig(**small, num_vq_embeddings=16, latent_channels=3).build()]
cli.parser()
for network in networks:
    geometry_of(network)
    place_of(network)
    idle_parameters(network, None)
warnings.simplefilter("ignore")  # as in every child
with torch.device("meta"):  # the classes of clips and sounds that most programs run with
    films, sounds = tiny("AutoencoderKLWan"), tiny("AutoencoderOobleck", audio_channels=1, sampling_rate=8000)
for one, measures in ((films, (geometry_of, lengths_of)), (sounds, (geometry_of, hop_of))):
    for measure in measures:
        measure(one)
card.pipeline_words()
for name in templates().list_templates(["j2"]):
    templates().get_template(name)
inspect.getmodule(sys._getframe())  # its table of all modules' files, of which every section of a config asks
# out of the children's collections: a full one looks at a million objects and copies their pages, 0.9 s of a run's 1.8
gc.collect()
gc.freeze()
