"""Networks and images as `ldm-vae compress` and `decompress` are given them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm_vae.autoencoder.geometry import image_channels
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import preparation_of
from ldm_vae.compression.bits_back import BitsBack, load_likelihood
from ldm_vae.compression.file import Codec
from ldm_vae.compression.indices import Indices
from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import nearest_path
from ldm_vae.data.decoding import BadImage, read_image
from ldm_vae.data.files import read_bytes
from ldm_vae.data.flags import NO_FLAGS
from ldm_vae.data.named_images import NamedImage
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.run.selection import at_checkpoint

EXACT = {1: "L", 3: "RGB", 4: "RGBA"}  # mode of files whose values are kept as they are, by channels


def open_codec(vae: str, prior: str | None = None, checkpoint: str | None = None) -> Codec:
    """Open the networks on the CPU: a VQ autoencoder with a prior, else a VAE with its likelihood.

    Raises:
        UsageError: they are not there, or cannot compress.
    """
    if prior is None:
        return BitsBack(*load_likelihood(vae, checkpoint))
    return Indices(CodeGenerator.load(prior, load_autoencoder(at_checkpoint(vae, checkpoint))), prior)


def read_images(images: Sequence[NamedImage], codec: Codec) -> list[torch.Tensor]:
    """Pixels uint8 [C, H, W] of each, decoded as the VAE records.

    Raises:
        UsageError: one cannot be read, or not be coded; for a lossless code, its file holds other values than the VAE
            takes.
    """
    decoding = preparation_of({"": codec.vae}, NO_FLAGS).decoding
    channels, found = image_channels(codec.vae), []
    for image in images:
        try:
            read = read_image(read_bytes(image.path), decoding)
        except BadImage as error:
            raise UsageError(f"IMAGE {image.path}: {error.reason}{nearest_path(image.path)}") from error
        if isinstance(codec, BitsBack):
            if read.mode != EXACT.get(channels) or read.made_of is not None:
                raise UsageError(
                    f"IMAGE {image.path}: is {read.mode}, and a lossless code of a VAE of {channels} channels keeps "
                    f"{EXACT.get(channels, 'nothing')} of 8 bits"
                )
            codec.check(read.pixels, str(image.path))
        found.append(read.pixels)
    return found
