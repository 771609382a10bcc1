"""Compare ways to store moments: bytes, decibels, and the loss of a diffusion model that trains on them.

    ldm-vae encode my-vae photographs exact --resolution 64 --dtype fp32 --pixels
    python -m eval.storage my-vae exact --output measured         # minutes on a CPU

The moments of a store in fp32 are rounded as each form would round them. The same small network then trains by flow
matching on each, with the same order, times and noise; its loss is taken on exact latents of images that it did not
see. Twice the fp32 form with other seeds says how much of a difference means nothing. DIR/storage.json holds the table.

Forms are the store's own and two candidates with logvar in 8 bits, at equal distances in its range [-30, 20]: a fixed
grid, since one of each shard's own would change values whenever rows are dealt into other shards.

Legend: N images, c latent channels, h w latent positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae import LatentDataset, load_autoencoder
from ldm_vae.autoencoder import finite
from ldm_vae.autoencoder.latents import LOGVAR_RANGE, Moments
from ldm_vae.core import atomic_io, rng
from ldm_vae.core.errors import UsageError, run_program
from ldm_vae.core.progress import Progress
from ldm_vae.core.request import Parser
from ldm_vae.denoisers.dit import Config as DiT
from ldm_vae.diffusion.flow import Denoiser, FlowConfig, draw_flow

from .speed.timing import interleave, machine, row

LEVELS = 255  # steps of an 8-bit logvar
HELD_OUT = 4  # every fourth image
BATCH = 32
MOST_DECODED = 64


@dataclass(frozen=True)
class Form:
    """Bytes per value of the latent, and moments [N, c, h, w] as they come back from storage."""

    bytes: int
    rounded: Callable[[Moments], Moments]


def through(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: values.to(dtype).float()


def codes(logvar: torch.Tensor) -> torch.Tensor:
    """logvar => uint8."""
    low, high = LOGVAR_RANGE
    return ((logvar - low) / (high - low) * LEVELS).round().to(torch.uint8)


def in_8_bits(logvar: torch.Tensor) -> torch.Tensor:
    """logvar as it comes back from 8 bits."""
    low, high = LOGVAR_RANGE
    return low + codes(logvar).float() * ((high - low) / LEVELS)


def both(mean: Callable[..., torch.Tensor], logvar: Callable[..., torch.Tensor]) -> Callable[[Moments], Moments]:
    return lambda moments: Moments(mean(moments.mean), logvar(moments.logvar))


half, brain = through(torch.float16), through(torch.bfloat16)
FORMS: Mapping[str, Form] = {
    "fp32 moments": Form(8, lambda moments: moments),
    "fp16 moments": Form(4, both(half, half)),
    "bf16 moments": Form(4, both(brain, brain)),
    "bf16 mean, 8-bit logvar": Form(3, both(brain, in_8_bits)),
    "fp16 mean, 8-bit logvar": Form(3, both(half, in_8_bits)),
    "fp16 mean": Form(2, lambda moments: Moments.point(half(moments.mean))),
}


# --- decibels ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoded_psnr(vae: Any, mean: torch.Tensor, pixels: torch.Tensor) -> float:
    """Mean PSNR in dB of decoded means [N, c, h, w] against images uint8 [N, C, H, W]; grey levels are not rounded."""
    found = []
    for z, image in zip(mean.split(BATCH), pixels.split(BATCH), strict=True):
        error = (finite.decode(vae, z).clamp(-1, 1) - (image.float() / 127.5 - 1)).double().square().mean(dim=(1, 2, 3))
        found.append(10 * torch.log10(4 / error))
    return float(torch.cat(found).mean())


# --- the diffusion model's loss ---------------------------------------------------------------------------------------


def flow_loss(given: Moments, exact: Moments, scale: float, images: int, seed: int) -> float:
    """Train on sampled latents of `given` [N, c, h, w]; the loss on those of `exact`, of other images."""
    size = (int(exact.mean.shape[2]), int(exact.mean.shape[3]))
    with rng.seeded(seed):
        network = DiT(num_layers=2, num_attention_heads=4, attention_head_dim=16).build(exact.mean.shape[1], size, 0)
    model, flow = Denoiser(network.train(), 0), FlowConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    learned = [index for index in range(len(exact.mean)) if index % HELD_OUT]
    for start in range(0, images, BATCH):
        positions = list(range(start, start + BATCH))
        chosen = [learned[int(rng.generator(seed, "storage", place).integers(len(learned)))] for place in positions]
        point = _point(given, chosen, positions, scale, seed, flow)
        optimizer.zero_grad()
        point.loss(model(point.noised, point.times, point.labels)).backward()
        optimizer.step()
    others = range(0, len(exact.mean), HELD_OUT)
    losses = []
    with torch.no_grad():
        for repeat in range(4):
            places = [repeat * len(others) + place for place in range(len(others))]
            point = _point(exact, list(others), places, scale, 1_000, flow)
            losses.append(float(point.loss(model.eval()(point.noised, point.times, point.labels))))
    return float(np.mean(losses))


def _point(moments: Moments, rows: list[int], positions: list[int], scale: float, seed: int, flow: FlowConfig) -> Any:
    """Points on the paths of sampled latents."""
    chosen = Moments(moments.mean[rows], moments.logvar[rows])
    z = scale * chosen.sample(rng.normal(seed, "storage noise", positions, chosen.mean.shape[1:]))
    return draw_flow(z, torch.zeros(len(rows), dtype=torch.long), positions, seed, flow, 0)


# --- the program ------------------------------------------------------------------------------------------------------


def reading(moments: Moments, rounds: int) -> dict[str, Any]:
    """Seconds to make sampled latents of stored rows, logvar in fp16 and in 8 bits by a table of 256 sigmas."""
    noise = torch.randn_like(moments.mean)
    mean, logvar, small = moments.mean.half(), moments.logvar.half(), codes(moments.logvar).int()
    low, high = LOGVAR_RANGE
    table = torch.exp(0.5 * (low + torch.arange(LEVELS + 1) * ((high - low) / LEVELS)))
    ways = {
        "sampled_fp16": lambda: Moments(mean.float(), logvar.float()).sample(noise),
        "sampled_8_bit": lambda: mean.float() + table[small] * noise,
    }
    return row("sampled_8_bit", interleave(ways, rounds, "read"), "sampled_8_bit", "sampled_fp16")


def main() -> None:
    parser = Parser(program="eval.storage", description=__doc__)
    parser.add_argument("vae", metavar="VAE", help="the store's VAE")
    parser.add_argument("store", metavar="STORE", help="moments in fp32, with pixels, of one square latent shape")
    parser.add_argument("--output", required=True, metavar="DIR", help="where storage.json goes")
    parser.add_argument("--images", type=int, default=20_000, help="images that the network trains on (default 20,000)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of timing (default 20)")
    options = parser.parse_args()
    data = LatentDataset(options.store, raw=True, pixels=True, columns=())
    identity = data.manifest.identity
    if (identity.store, identity.dtype) != ("moments", "fp32"):
        raise UsageError(f"STORE {options.store}: expected moments in fp32, got {identity.store} in {identity.dtype}")
    items = [data[index] for index in range(len(data))]
    exact = Moments(*(torch.stack([item[name] for item in items]) for name in ("mean", "logvar")))
    pixels = torch.stack([item["pixels"] for item in items])
    vae = load_autoencoder(options.vae)
    scale, sigma = data.statistics.normalisation("scale").scaling_factor, float(exact.logvar.exp().mean().sqrt())
    results = []
    for number, (name, form) in enumerate(
        Progress([("fp32 moments, another seed", FORMS["fp32 moments"]), *FORMS.items()])
    ):
        given = form.rounded(exact)
        error = float((given.mean - exact.mean).square().mean().sqrt())
        results.append({
            "form": name,
            "bytes_per_value": form.bytes,
            "mean_error_in_std": scale * error,
            "mean_error_in_sigma": error / sigma,
            "psnr_db": decoded_psnr(vae, given.mean[:MOST_DECODED], pixels[:MOST_DECODED]),
            "flow_loss": flow_loss(given, exact, scale, options.images, seed=int(number == 0)),
        })  # fmt: skip
        print("{form:28} {bytes_per_value} B  {mean_error_in_std:.1e} std  {mean_error_in_sigma:.1e} sigma  "
              "{psnr_db:.4f} dB  flow loss {flow_loss:.5f}".format(**results[-1]))  # fmt: skip
    table = {
        "machine": machine(),
        "sigma_in_std": scale * sigma,
        "results": results,
        "read": reading(exact, options.rounds),
    }
    Path(options.output).mkdir(parents=True, exist_ok=True)
    atomic_io.replace(Path(options.output) / "storage.json", atomic_io.data(json.dumps(table, indent=2).encode()))


if __name__ == "__main__":
    run_program(main)
