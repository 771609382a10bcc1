"""Fingerprints of the encoder and the decoder: SHA-256 of their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ldm_vae.autoencoder.fine_tuning import is_encoders


def encoder_fingerprint(vae: nn.Module) -> str:
    """SHA-256 of what turns pixels into moments (or indices): encoder, quant_conv and, in a VQModel, the codebook."""
    return _fingerprint(vae.state_dict(), is_encoders)


def decoder_fingerprint(vae: nn.Module) -> str:
    """SHA-256 of what turns latents into pixels: decoder and post_quant_conv."""
    return _fingerprint(vae.state_dict(), lambda name: not is_encoders(name) and not name.startswith("bn."))


def _fingerprint(tensors: Mapping[str, torch.Tensor], belongs: Callable[[str], bool]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():  # diffusers' key order is the module's, hence stable
        if belongs(name):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
