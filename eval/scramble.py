"""A VAE made worse on purpose: the same reconstructions from latents that are hard to learn, to try eval.diffusability.

    python -m eval.scramble VAE DATA OUT --resolution 64

The channels' covariance over DATA has strong directions, which carry the picture, and weak ones, which refine it. OUT
is VAE with that order turned round: a direction of variance v gets variance k / v (k such that the sum stays), by a
matrix in quant_conv whose inverse is in post_quant_conv. So every image is encoded and decoded as before, to rounding,
while a diffusion model, whose error is spread evenly, now errs most where the picture is. OUT's posterior is a point
(its variance would be no diagonal any more).

Legend: c latent channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm_vae.autoencoder import finite, latents
from ldm_vae.autoencoder.geometry import only_kl, resolution_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation_law import normalisation_of
from ldm_vae.autoencoder.preparation import preparation_of
from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.request import Parser
from ldm_vae.data.flags import DataFlags, add_data_arguments
from ldm_vae.data.transforms import to_pixels
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.metrics.batches import image_batches, spread


@torch.no_grad()
def scramble(vae: Any, pixels: torch.Tensor) -> None:
    """Change `vae` in place, by what its latents of pixels [B, C, H, W] are like."""
    rows = finite.encode(vae, pixels).mean.double().permute(0, 2, 3, 1).flatten(0, 2)
    variances, directions = torch.linalg.eigh(rows.T.cov())
    gains = 1.0 / variances  # of deviations: v becomes k / v
    gains *= (variances.sum() / (gains.square() * variances).sum()).sqrt()
    matrix = directions @ torch.diag(gains) @ directions.T
    mix(vae, matrix)


@torch.no_grad()
def mix(vae: Any, matrix: torch.Tensor) -> None:
    """z becomes matrix z [c, c] behind the encoder, and its inverse is undone before the decoder."""
    channels = len(matrix)
    first, second = vae.quant_conv, vae.post_quant_conv
    weight, bias = first.weight.double().flatten(1), first.bias.double()
    first.weight[:channels] = (matrix @ weight[:channels])[:, :, None, None].to(first.weight)
    first.bias[:channels] = (matrix @ bias[:channels]).to(first.bias)
    first.weight[channels:] = 0.0
    first.bias[channels:] = latents.LOGVAR_RANGE[0]
    second.weight.copy_((second.weight.double().flatten(1) @ matrix.inverse())[:, :, None, None])


def main() -> None:
    parser = Parser(program="eval.scramble", description=__doc__)
    parser.add_argument("vae", metavar="VAE", help="a diffusers folder, a run folder, a hub id or a single file")
    parser.add_argument("data", metavar="DATA", help="images that the covariance is measured on")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the other VAE goes")
    parser.add_argument("--resolution", type=int, help="side of the crops in pixels (default: the VAE's sample_size)")
    parser.add_argument("--images", type=int, default=128, help="how many of DATA are used (128)")
    add_data_arguments(parser)
    options = parser.parse_args()
    vae = load_autoencoder(options.vae)
    only_kl(vae, f"vae {options.vae}")
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise UsageError(f"vae {options.vae}: expected one with quant_conv and post_quant_conv, which hold the matrix")
    options.resolution = resolution_of(options.resolution, vae, options.vae)
    preparation = preparation_of({options.vae: vae}, DataFlags.of(options))
    source = preparation.open(options.data)
    chosen = spread(len(source), options.images)
    batches = image_batches(source, chosen, options.resolution, batch_size=16)
    pixels = to_pixels(torch.cat([batch.pixels for batch in batches]))
    before = finite.decode(vae, finite.encode(vae, pixels).mean)
    scramble(vae, pixels)
    off = (finite.decode(vae, finite.encode(vae, pixels).mean) - before).abs().max()
    normalisation = normalisation_of(vae, f"VAE {options.vae}")
    write_vae(vae, options.out, normalisation, sample_size=options.resolution)
    print(*preparation.notes, sep="\n", end="\n" * bool(preparation.notes))
    print(f"wrote {options.out}: no pixel of {len(pixels)} reconstructions differs by more than {float(off):.1e} of 2")


if __name__ == "__main__":
    run_program(main)
