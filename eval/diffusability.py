"""Compare VAEs by how well a diffusion model learns their latents: the same small network on the latents of each.

    ldm-vae probe vae-a vae-b PHOTOS --output compared --resolution 64
    ldm-vae probe vae-a vae-b PHOTOS --output compared --train_images 1_000_000 --layers 12 --heads 6

DATA is encoded with each VAE into DIR/stores. On each store a small transformer is trained unconditionally by flow
matching, with the same number of images, tokens and operations for each VAE (within --tolerance), --seeds times. The
main result is the Frechet distance (EfficientNet-Lite0) of decoded samples to the originals, minus that of the VAE's
own reconstructions of the same originals. The latents' spectrum and equivariance are reported too. If intervals over
seeds overlap, the output says that no difference was shown.

DIR then holds diffusability.json, diffusability.md, images of samples and reconstructions, and an HTML report. Repeat
the command to resume: finished parts (a store, a seed of a VAE) are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ldm_vae.autoencoder.geometry import check_resolution, latent_channels, resolution_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import preparation_of
from ldm_vae.core.errors import UsageError, WorkError, resumable, run_program
from ldm_vae.core.launch import build_accelerator
from ldm_vae.core.ownership import own
from ldm_vae.core.pictures import save, sheet
from ldm_vae.core.request import Parser
from ldm_vae.data.alpha import visible
from ldm_vae.data.flags import DataFlags, add_data_arguments
from ldm_vae.data.source import Source
from ldm_vae.data.transforms import to_pixels
from ldm_vae.denoisers.dit import Config as DiT
from ldm_vae.diffusion.flow import SamplingConfig
from ldm_vae.diffusion.generator import Generator
from ldm_vae.diffusion.probe import (
    Matched,
    Recipe,
    fit,
    match,
)
from ldm_vae.diffusion.probe_result import markdown, summarised, verdicts
from ldm_vae.diffusion.sample_metrics import NOT_INSTALLED, Looks, looks
from ldm_vae.latent_space.equivariance import equivariance_error
from ldm_vae.latent_space.spectrum import high_frequency_share
from ldm_vae.latent_store import LatentDataset, write_store
from ldm_vae.metrics import result
from ldm_vae.metrics.batches import check_images, image_batches, spread
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.running import Running
from ldm_vae.report import build_report
from ldm_vae.run import selection
from ldm_vae.training.scaling import measure_checkpoint

Json = dict[str, Any]
SHOWN = 16  # pictures of each kind


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.diffusability", description=__doc__)
    add = parser.add_argument
    add("vae", nargs="+", metavar="VAE", help="a diffusers folder, a run folder, a hub id or a single file")
    add("data", metavar="DATA", help="a folder of images, a dataset's hub id, parquet or tar files")
    add("--output", required=True, type=Path, metavar="DIR", help="where stores and results go")
    add("--resolution", type=int, help="side of the crops in pixels (default: the first VAE's sample_size)")
    add("--checkpoint", metavar=selection.METAVAR, help=selection.HELP)
    add("--seeds", type=int, default=3, help="trainings per VAE; of weights, order and noise (3)")
    add("--train_images", type=int, default=Recipe.train_images, help=f"images of each ({Recipe.train_images:,})")
    add("--batch_size", type=int, default=Recipe.batch_size, help=f"images of a step ({Recipe.batch_size})")
    add("--learning_rate", type=float, default=Recipe.learning_rate, help=f"at its highest ({Recipe.learning_rate})")
    add("--layers", type=int, default=6, help="blocks of the transformer (6)")
    add("--heads", type=int, default=4, help="its heads (4)")
    add("--head_dim", type=int, default=32, help="width of a head (32)")
    add("--most_tokens", type=int, default=256, help="tokens of a latent, at most (256)")
    add("--tolerance", type=float, default=0.05, help="by how much operations may differ (0.05)")
    add("--samples", type=int, default=2_048, help="samples and originals, at most as many as DATA has (2,048)")
    add("--method", choices=("euler", "heun"), default="heun", help="of sampling (heun)")
    add("--steps", type=int, default=25, help="of sampling (25)")
    add(
        "--normalisation", choices=("own", "scale", "shift", "channel"), default="shift",
        help="of the latents: measured on the store (shift: one mean, one deviation), or own: as the VAE's config says",
    )  # fmt: skip
    add_data_arguments(parser)
    found = parser.parse_intermixed_args()
    for name in ("seeds", "train_images", "batch_size", "layers", "heads", "steps", "samples"):
        if getattr(found, name) < 1:
            raise UsageError(f"{name}: expected at least 1, got {getattr(found, name)}")
    if found.train_images < found.batch_size:
        raise UsageError(f"train_images: expected at least a batch of {found.batch_size}, got {found.train_images}")
    found.vae = [selection.at_checkpoint(vae, found.checkpoint) for vae in found.vae]
    return found


@dataclass(frozen=True)
class Candidate:
    """A VAE, its store, and the network that learns it."""

    name: str
    source: str
    vae: Any
    dataset: LatentDataset
    network: Matched


def main() -> None:
    options = arguments()
    accelerator = build_accelerator()
    if accelerator.num_processes > 1:
        raise UsageError(f"launch: expected one process, got {accelerator.num_processes}; the networks are small")
    left = f"finished stores and seeds are kept in {options.output}; the same command goes on"
    with own(options.output, "output"), resumable(left):
        compare(options, accelerator.device)


def compare(options: argparse.Namespace, device: torch.device) -> None:

    # --- everything that can be wrong is opened before the first image is encoded -------------------------------------
    vaes = [load_autoencoder(vae) for vae in options.vae]
    options.resolution = resolution_of(options.resolution, vaes[0], options.vae[0])
    for vae in vaes[1:]:
        check_resolution(options.resolution, vae)
    preparation = preparation_of(dict(zip(options.vae, vaes, strict=True)), DataFlags.of(options))
    alpha = preparation.decoding.alpha
    if (channels := preparation.decoding.channels) not in (1, 3) and not alpha:
        raise UsageError(
            f"VAE {options.vae[0]}: expected images of 1 or 3 channels or with alpha (--alpha straight), to compare "
            f"features, got {channels}"
        )
    judge = looks(device, alpha)
    if judge is None:
        raise WorkError(NOT_INSTALLED)
    for name, vae in zip(options.vae, vaes, strict=True):
        measure_checkpoint(vae.to(device), name)
    check_images(
        source := preparation.open(options.data),
        "the probe trains a denoiser of latents [c, h, w] and judges its samples as images; for clips a diffusion "
        "model of videos, trained on a store of each VAE, would do",
    )
    recipe = Recipe(options.train_images, options.batch_size, options.learning_rate)
    base = DiT(
        num_layers=options.layers, num_attention_heads=options.heads, attention_head_dim=options.head_dim
    )  # fmt: skip

    # --- a store for each, and networks that do equal work ------------------------------------------------------------
    names = result.labels(options.vae)
    datasets = [encode(vae, name, path, source, options, device)
                for vae, name, path in zip(vaes, names, options.vae, strict=True)]  # fmt: skip
    shapes = [next(iter(dataset.shapes())) for dataset in datasets]
    networks = match(
        [(c, h, w) for c, h, w in shapes], base, most_tokens=options.most_tokens, tolerance=options.tolerance
    )
    candidates = [Candidate(*each) for each in zip(names, options.vae, vaes, datasets, networks, strict=True)]

    # --- measure: the originals once, then each VAE's reconstructions, and its samples seed by seed -------------------
    chosen = spread(len(datasets[0]), options.samples)
    originals = judge.of(original_images(source, datasets[0], chosen, options))
    seen = torch.cat(list(original_images(source, datasets[0], chosen[:SHOWN], options)))
    show(options.output / "pictures" / "originals.png", seen, judge.alpha)
    found = []
    for candidate in candidates:
        candidate.vae.to(device)
        entry = describe(candidate, chosen, source, options, judge, originals, device)
        entry["runs"] = [one_seed(candidate, seed, len(chosen), recipe, options, judge, originals, device)
                         for seed in range(options.seeds)]  # fmt: skip
        found.append(summarised(entry))
        candidate.vae.cpu()

    # --- results ------------------------------------------------------------------------------------------------------
    protocol = {
        "name": "ldm-vae diffusability", "version": 1, "metric": "fd_efflite0", "resolution": options.resolution,
        "images": len(datasets[0]), "samples": len(chosen), "seeds": options.seeds, **asdict(recipe),
        "sampling": sampling(options).model_dump(), "normalisation": options.normalisation,
        "tolerance": options.tolerance, "denoiser": base.model_dump(exclude={"patch_size"}),
    }  # fmt: skip
    data = {"source": options.data, "keys": datasets[0].manifest.source.keys,
            "preprocessing": preparation.identity, "notes": list(preparation.notes)}  # fmt: skip
    results = {"protocol": protocol, "data": data, "vaes": found, "verdicts": verdicts(found),
               "settings": result.settings(device, options.batch_size), "versions": result.versions()}  # fmt: skip
    result.write(options.output / "diffusability.json", results)
    result.write(options.output / "diffusability.md", markdown(results))
    build_report(options.output)
    print("\n".join([markdown(results), *preparation.notes]))
    print(f"written to {options.output}; to look at it: {options.output / 'index.html'}")


# --- its parts --------------------------------------------------------------------------------------------------------


def encode(
    vae: Any, name: str, path: str, source: Source, options: argparse.Namespace, device: torch.device
) -> LatentDataset:
    """DIR/stores/NAME, or what is missing of it; read with the normalisation that was asked for."""
    out = options.output / "stores" / name
    write_store(
        vae.to(device),
        source,
        out,
        resolution=options.resolution,
        device=device,
        source_name=options.data,
        vae_name=path,
        store=None if isinstance(vae, AutoencoderKL) else "mean",  # of a codebook: the vectors before it
    )
    vae.cpu()
    normalisation = None if options.normalisation == "own" else options.normalisation
    return LatentDataset(out, normalisation=normalisation, columns=("source_index",))


def original_images(
    source: Source, dataset: LatentDataset, chosen: Sequence[int], options: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """Pixels [B, C, R, R] of the images behind the chosen rows of a store."""
    rows = dataset.column("source_index")
    indices = [rows[index] for index in chosen]
    for batch in image_batches(source, indices, options.resolution, batch_size=options.batch_size):
        yield to_pixels(batch.pixels)


def reconstructions(candidate: Candidate, chosen: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
    """The modes in the store, decoded."""
    like = candidate.dataset
    stored = LatentDataset(like.path, sample=False, columns=(), normalisation=like.manifest.for_decoding)
    for start in range(0, len(chosen), batch_size):
        rows = [stored[index]["latents"] for index in chosen[start : start + batch_size]]
        yield stored.decode(torch.stack(rows), candidate.vae)


def describe(
    candidate: Candidate,
    chosen: Sequence[int],
    source: Source,
    options: argparse.Namespace,
    judge: Looks,
    originals: Any,
    device: torch.device,
) -> Json:
    """All about a VAE that needs no diffusion model: shape, spectrum, equivariance, distance of reconstructions."""
    shape, dataset = next(iter(candidate.dataset.shapes())), candidate.dataset
    share, error = Running(), Running()
    # of z, where it was measured of the channels of patches
    mean = dataset.statistics.mean.view(latent_channels(candidate.vae), -1).mean(dim=1)
    for start in range(0, len(chosen), options.batch_size):
        part = chosen[start : start + options.batch_size]
        share.update(high_frequency_share(torch.stack([dataset[index]["latents"] for index in part])))
    for pixels in original_images(source, dataset, chosen[: 4 * options.batch_size], options):
        found = equivariance_error(candidate.vae, pixels.to(device), mean, alpha=judge.alpha)
        if found:
            error.update(torch.stack([one.latent for one in found.values()]).mean(dim=0))
    decoded = list(reconstructions(candidate, chosen, options.batch_size))
    picture = f"pictures/{candidate.name}.reconstructions.png"
    show(options.output / picture, torch.cat(decoded), judge.alpha)
    return {
        "vae": result.describe_vae(candidate.vae, candidate.name, candidate.source),
        "latent_shape": list(shape),
        "network": {
            "patch_size": candidate.network.config.patch_size,
            "attention_head_dim": candidate.network.config.attention_head_dim,
            "tokens": candidate.network.tokens,
            "parameters": candidate.network.parameters,
            "gflop_per_image": candidate.network.gflop,
        },
        "fd_reconstructions": judge.distance(originals, judge.of(decoded)),
        "pictures": {"reconstructions": picture, "samples": f"pictures/{candidate.name}.samples.png"},
        "metrics": {"high_frequency_share": share.summary().to_json(), "equivariance": error.summary().to_json()},
    }


def one_seed(
    candidate: Candidate,
    seed: int,
    count: int,
    recipe: Recipe,
    options: argparse.Namespace,
    judge: Looks,
    originals: Any,
    device: torch.device,
) -> Json:
    """Train, sample, measure; or what an earlier call of the same found: DIR/runs/NAME-seed0.json."""
    about = {
        "store": candidate.dataset.manifest.identity.digest,
        "keys": candidate.dataset.manifest.source.keys,
        "decoder": candidate.dataset.manifest.recorded.decoder,
        "normalisation": candidate.dataset.normalisation.to_config(),
        "recipe": asdict(recipe), "network": candidate.network.config.model_dump(),
        "sampling": sampling(options).model_dump(), "samples": count, "seed": seed,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    path = options.output / "runs" / f"{candidate.name}-seed{seed}.json"
    if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8")))["digest"] == digest:
        return dict(before)
    title = f"{candidate.name}, seed {seed}"
    denoiser, loss = fit(candidate.dataset, candidate.network, recipe, seed, device, title)
    channels, height, width = next(iter(candidate.dataset.shapes()))
    generator = Generator(
        denoiser,
        candidate.vae,
        (channels, height, width),
        candidate.dataset.normalisation,
        sampling(options),
        seed=seed,
    )
    images = list(generator.batches(count, options.batch_size))
    if seed == 0:
        show(options.output / "pictures" / f"{candidate.name}.samples.png", torch.cat(images), judge.alpha)
    found = {"seed": seed, "digest": digest, "loss": loss, "fd_samples": judge.distance(originals, judge.of(images))}
    result.write(path, found)
    return found


def sampling(options: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(method=options.method, steps=options.steps)


def show(path: Path, pixels: torch.Tensor, alpha: bool) -> None:
    """The first SHOWN of pixels [N, C, H, W] as a grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(sheet(visible(PINNED.quantise(pixels[:SHOWN]), alpha), SHOWN // 2, gap=2), path)


if __name__ == "__main__":
    run_program(main)
