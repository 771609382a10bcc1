"""Fingerprints of the encoder and the decoder: SHA-256 of their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from ldm_vae.autoencoder.fine_tuning import is_encoders


def encoder_fingerprint(vae: nn.Module) -> str:
    """SHA-256 of what turns pixels into moments (or indices): encoder, quant_conv and, in a VQModel, the codebook."""
    return fingerprint({name: tensor for name, tensor in vae.state_dict().items() if is_encoders(name)})


def decoder_fingerprint(vae: nn.Module) -> str:
    """SHA-256 of what turns latents into pixels: decoder and post_quant_conv."""
    ours = {name: tensor for name, tensor in vae.state_dict().items() if not is_encoders(name)}
    return fingerprint({name: tensor for name, tensor in ours.items() if not name.startswith("bn.")})


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a network's tensors in the order of its modules: name, shape and fp32 bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
