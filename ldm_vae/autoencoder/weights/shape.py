"""The shape of a KL autoencoder as its tensors tell it.

Legend: c latent channels, n resolutions (f = 2 ** (n - 1)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_vae.core.errors import UsageError

Shapes = Mapping[str, tuple[int, ...]]


def told_by(shapes: Shapes, place: str) -> dict[str, Any]:
    """The diffusers config of an autoencoder from its tensors' LDM names and shapes, all but the GroupNorms' groups.

    Raises:
        UsageError: the tensors are not those of a KL autoencoder.
    """
    stages = sorted({int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down.")})
    try:
        widths = [shapes[f"encoder.down.{stage}.block.0.conv1.weight"][0] for stage in stages]
        moments = shapes["quant_conv.weight" if "quant_conv.weight" in shapes else "encoder.conv_out.weight"][0]
        channels = shapes["decoder.conv_in.weight"][1]
        image = shapes["encoder.conv_in.weight"][1], shapes["decoder.conv_out.weight"][0]
    except KeyError as error:
        raise UsageError(f"{place}: holds no whole KL autoencoder: tensor {error.args[0]} is missing") from error
    if moments != 2 * channels:
        raise UsageError(
            f"{place}: the encoder gives {moments} channels for a decoder of {channels}; a KL autoencoder gives "
            "twice as many (is it a VQ model?)"
        )
    attention = [f"encoder.down.{stage}.attn.0.q.weight" in shapes for stage in stages]
    return {
        "in_channels": image[0],
        "out_channels": image[1],
        "latent_channels": channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": len({n.split(".")[4] for n in shapes if n.startswith("encoder.down.0.block.")}),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attention)),
    }


def infer_config(shapes: Shapes, place: str) -> dict[str, Any]:
    """Infer the whole config, as `told_by` but with the number of GroupNorm groups, which leaves no trace in a file:
    LDM's is 32, always.

    Raises:
        UsageError: the tensors are not those of a KL autoencoder, or 32 does not divide its widths.
    """
    config = told_by(shapes, place)
    widths = list(config["block_out_channels"])
    if not widths or any(width % 32 for width in widths):
        raise UsageError(
            f"{place}: widths {widths} are not multiples of 32 groups, so its shape cannot be told from the file "
            "alone; give the folder of its config.json with --config FOLDER"
        )
    return config | {"norm_num_groups": 32, "sample_size": 256}
