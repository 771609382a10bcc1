"""Count the cost of each term of the objective beside the autoencoder: the table of docs/objectives.md.

    python -m eval.objective_cost                  # GFLOP an image at 256 px, on tensors without content, in seconds

The autoencoder is that of configs/kl_f8_d4.yaml (of vq_f8_16384 for the terms of a codebook). A term is counted with
its backward as far as the reconstruction or the latents; a term that watches a frozen network counts its forward too.
A teacher's encoder, whose size is the user's, is counted as one of the same shape as the autoencoder's. An image is a
clip of one frame to terms of clips; `ldm-vae train CONFIG --dry_run` counts a run on clips, with the frames that terms
choose.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Codes
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.trainable import Reconstruction, TrainableAutoencoder
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.flop_counter import Cost
from ldm_vae.core.request import Parser
from ldm_vae.models.vq import Config as VQModelConfig

NEEDS_TEACHER = ("drift",)
BITS = 18  # of the codes of code_entropy: MAGVIT-v2's
OF_SOUNDS = ("multi_resolution_stft", "multi_scale_mel")  # no terms of images


def network(kind: str) -> TrainableAutoencoder:
    if kind == "codes":
        settings = VQModelConfig(quantizer={"kind": "gumbel"})
        vae = settings.build()
        return TrainableAutoencoder(vae, settings.bottleneck(vae))
    return TrainableAutoencoder(AutoencoderConfig().build())


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with a graph that begins here."""
    return tensor.detach().requires_grad_()


def cut(r: Reconstruction) -> tuple[Reconstruction, list[torch.Tensor]]:
    """The reconstruction without the network's graph, and what gradients stop at."""
    mean, logvar, pixels, z = (leaf(part) for part in (r.moments.mean, r.moments.logvar, r.pixels, r.latents))
    codes, more = r.codes, []
    if codes is not None:
        before, after = leaf(codes.before), leaf(codes.after)
        kl = None if codes.kl is None else leaf(codes.kl)
        logits = leaf(before.new_empty(len(before), BITS, *before.shape[2:]))
        codes, more = Codes(codes.indices, before, after, kl, logits), [before, after, logits]
    moments = latents.Moments(mean, logvar, r.moments.is_point)
    images = r.images
    return Reconstruction(images, pixels, images, moments, z, r.last_calls, codes), [mean, logvar, pixels, z, *more]


def count(kind: str, size: int) -> tuple[float, float]:
    """(GFLOP an image of the term, forward and backward; the same of the autoencoder)."""
    with FakeTensorMode():
        settings = importlib.import_module(f"ldm_vae.losses.{kind}").Config
        term = (settings(teacher="any") if kind in NEEDS_TEACHER else settings()).outline()
        model = network(getattr(term, "needs", "posterior"))
        images = torch.empty(1, 3, size, size)
        if hasattr(term, "attach"):
            term.attach(model)
        with Cost() as whole:
            r = model(images, torch.empty(1, *model.noise_shape(size, size)))
            r.pixels.sum().backward()
        part, _ = cut(r)
        pair = (part.pixels, images)
        with Cost() as own:
            value = term(part) if term.domain == "latents" else term(*(part.seen(one, term.domain) for one in pair))
            if kind != "activation_range":  # its graph is the network's own
                value.backward()
        flops = own.flops + (_encoder(model.vae, images) if kind in NEEDS_TEACHER else 0)
    return flops / 1e9, whole.flops / 1e9


def _encoder(vae: nn.Module, images: torch.Tensor) -> int:
    with Cost() as cost, torch.no_grad():
        encoded: Any = vae
        encoded.encode(images)
    return cost.flops


def main() -> None:
    parser = Parser(program="eval.objective_cost", description=__doc__)
    parser.add_argument("--resolution", type=int, default=256, help="side of the images in pixels (256)")
    options = parser.parse_args()
    if options.resolution < 32 or options.resolution % 8:
        raise UsageError(f"resolution: expected a multiple of 8 from 32 on, got {options.resolution}")
    print("| term | GFLOP an image | of the autoencoder's |\n|---|---|---|")
    for kind in config.options("ldm_vae.losses"):
        if kind in OF_SOUNDS:
            continue
        own, whole = count(kind, options.resolution)
        print(f"| {kind} | {own:.3g} | {own / whole:.2%} |")
    print(f"\nautoencoder, forward and backward: {whole:,.0f} GFLOP an image at {options.resolution} px")


if __name__ == "__main__":
    run_program(main)
