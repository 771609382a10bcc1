"""Measure a VAE's latent space: channels, information, likelihood and geometry, with images, clips or sounds.

    ldm-vae latent_space runs/demo/vae HELD_OUT --output runs/demo/report --resolution 64
    ldm-vae latent_space runs/textbook_vae/vae data/digits/heldout --output measured --resolution 8
    accelerate launch -m ldm_vae latent_space my-vae PHOTOS --output measured --resolution 256

Protocol: images are resized by their short side (antialiased bicubic) and centre-cropped to --resolution. One pass over
all gives channels, codes, rate, distortion and spectrum; each counts once on any number of processes, sums are in fp64.
--bank images, evenly spaced, give mutual information, equivariance and the mixture. The likelihood is a Gaussian per
pixel value with one variance, fitted on every other image; bounds are given for --likelihood_images of the rest. Every
random draw is keyed by its image. Sounds are excerpts (--excerpt): channels, codes, rate, distortion, spectrum along
time and mutual information; likelihood, equivariance, mixture and pictures are of images and clips.
docs/latent_space.md explains each quantity.

DIR then holds latent_space.json, latent_space.md, latent_space/ (images) and latent_space.quarantine.jsonl. `ldm-vae
report DIR` writes the HTML report; with RUN/report as DIR it is a section of the run's report.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm_vae.autoencoder import finite, latents
from ldm_vae.autoencoder.geometry import geometry_of, is_of_sounds, latent_size, resolution_of
from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import preparation_of
from ldm_vae.core.errors import UsageError, WorkError, run_program
from ldm_vae.core.launch import build_accelerator
from ldm_vae.core.ownership import own_together
from ldm_vae.core.progress import Progress
from ldm_vae.core.request import Parser
from ldm_vae.data.flags import DataFlags, add_data_arguments
from ldm_vae.data.quarantine import Quarantine, read_quarantine
from ldm_vae.data.source import Source
from ldm_vae.data.transforms import to_values
from ldm_vae.latent_space import summary
from ldm_vae.latent_space.channels import ChannelStatistics
from ldm_vae.latent_space.equivariance import applicable, equivariance_error
from ldm_vae.latent_space.information import information
from ldm_vae.latent_space.likelihood import SAMPLES, LikelihoodBounds, fitted_variance, squared_error
from ldm_vae.latent_space.mixture import check_installed
from ldm_vae.latent_space.pictures import keep_pictures
from ldm_vae.latent_space.spectrum import high_frequency_share, radial_power_spectrum, white_share
from ldm_vae.metrics import result
from ldm_vae.metrics.batches import ImageBatch, image_batches, share_of, size_of, spread
from ldm_vae.metrics.codes import CodeUse, code_use
from ldm_vae.metrics.evaluate import Checksum
from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.protocol import PINNED
from ldm_vae.metrics.ranks import gather, gather_rows
from ldm_vae.metrics.running import Running, Summary
from ldm_vae.metrics.select import build_metrics, kind_of
from ldm_vae.run import selection


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.latent_space", description=__doc__)
    add = parser.add_argument
    add("vae", metavar="VAE", help="a diffusers folder, a run folder, a hub id or a single file")
    add("data", metavar="DATA", help="a folder of images or sounds, a dataset's hub id, parquet or tar files")
    add("--output", required=True, type=Path, metavar="DIR", help="where the results go")
    add("--resolution", type=int, help="side of the crops in pixels (default: the VAE's sample_size)")
    add("--batch_size", type=int, default=8, help="images per process and step (8)")
    add("--num_workers", type=int, default=2, help="processes that decode images, per process (2)")
    add("--max_images", type=int, help="measure the first N images of DATA only")
    add("--bank", type=int, default=1024, metavar="N", help="images whose posteriors are kept in memory (1024)")
    add("--likelihood_images", type=int, default=64, metavar="N", help="images of the likelihood bounds; 0: none (64)")
    add("--repeats", type=int, default=3, metavar="N", help="how often the bounds are estimated, with other draws (3)")
    add("--components", type=int, default=10, metavar="N", help="of the Gaussian mixture; 0: none (10)")
    add("--pairs", type=int, default=3, metavar="N", help="pairs of images between which is interpolated (3)")
    add("--seed", type=int, default=0, help="of every draw (0)")
    add("--checkpoint", metavar=selection.METAVAR, help=selection.HELP)
    add("--config", metavar="FOLDER", help="config.json of a single-file VAE of a shape of its own")
    add("--max_bad", type=float, default=1.0, help="share of unreadable images above which the work stops (1: never)")
    add_data_arguments(parser)
    found = parser.parse_args()
    for name, least in {"batch_size": 1, "bank": 2, "repeats": 2, "likelihood_images": 0,
                        "components": 0, "pairs": 0}.items():  # fmt: skip
        if getattr(found, name) < least:
            raise UsageError(f"{name}: expected at least {least}, got {getattr(found, name)}")
    if found.components:
        check_installed()
    found.vae = selection.at_checkpoint(found.vae, found.checkpoint)
    return found


@dataclass(frozen=True)
class Task:
    """State that every measurement needs: the network on its device, the images, and this process's place."""

    vae: Any
    source: Source
    accelerator: Accelerator
    options: argparse.Namespace

    @property
    def alpha(self) -> bool:
        """True if the images have alpha: errors are then means over composites, and no likelihood is bounded."""
        return self.source.decoding.alpha

    def batches(
        self, what: str, indices: Sequence[int], quarantine: Quarantine | None = None
    ) -> Iterator[tuple[ImageBatch, torch.Tensor]]:
        """This process's share of the images, as stored and as pixels [B, C, R, R] or samples [B, C, L], on it."""
        options, accelerator = self.options, self.accelerator
        mine = share_of(accelerator.process_index, accelerator.num_processes, indices, options.batch_size)
        bar = Progress(total=len(mine), desc=what, unit="img")
        for batch in image_batches(
            self.source, mine, options.resolution,
            batch_size=options.batch_size, num_workers=options.num_workers, quarantine=quarantine,
        ):  # fmt: skip
            yield batch, to_values(batch.pixels.to(accelerator.device))
            bar.update(len(batch.indices))
        bar.close()


def main() -> None:
    options = arguments()
    accelerator = build_accelerator()
    with own_together(options.output, "output", accelerator.process_index, accelerator.wait_for_everyone):
        examine(options, accelerator)


def examine(options: argparse.Namespace, accelerator: Accelerator) -> None:

    # --- everything that can be wrong is opened before the first image is measured ------------------------------------
    vae = load_autoencoder(options.vae, options.config)
    preparation = preparation_of({options.vae: vae}, DataFlags.of(options))
    if not (sounds := is_of_sounds(vae)):
        options.resolution = resolution_of(options.resolution, vae, options.vae)
    options.resolution = size_of(preparation.decoding, options.resolution)
    source = preparation.open(options.data)
    indices = range(min(len(source), options.max_images or len(source)))
    quarantine_path = prepare(options.output, accelerator)
    quarantine = Quarantine(len(indices), max_bad=options.max_bad, path=quarantine_path)
    task = Task(vae.to(accelerator.device), source, accelerator, options)

    # --- measure, each process its share of the images ----------------------------------------------------------------
    survey = look_at_all(task, indices, quarantine)
    equivariance = look_from_the_side(task, survey)
    likelihood = bound_likelihood(task, indices, survey)

    # --- what is made of the bank, the same on every process, and the pictures ----------------------------------------
    if accelerator.is_main_process:
        noise = latents.posterior_noise(options.seed, survey.bank, survey.moments.mean.shape[1:])
        informed = None
        if len(survey.bank) > 1 and not survey.moments.is_point:
            bounds = information(survey.moments.to(accelerator.device), noise.to(accelerator.device))
            informed = bounds.figures(survey.channels.prior_gap)
        pictures, mixture = ([], None) if sounds else keep_pictures(
            options.output, task.vae, survey.moments, survey.channels, survey.spectrum,
            [source.key(index) for index in survey.bank], noise,
            pairs=options.pairs, components=options.components, seed=options.seed, alpha=task.alpha,
        )  # fmt: skip

        # --- results: numbers, tables, sentences ----------------------------------------------------------------------
        (name,) = result.labels([options.vae])
        positions = (1, survey.moments.mean.shape[-1]) if sounds else survey.moments.mean.shape[-2:]
        metrics = survey.metrics | (likelihood.metrics() if likelihood else {}) | equivariance
        found = {
            "protocol": protocol(options),
            "vae": result.describe_vae(vae, name, options.vae) | {"latent_values": survey.moments.mean[0].numel()},
            "data": {
                **result.about_signal(preparation.decoding, options.resolution),
                "source": options.data,
                "quarantined": len(read_quarantine(quarantine_path)),
                "images": survey.images,
                "checksum": survey.checksum,
                "preprocessing": preparation.identity,
                "notes": list(preparation.notes),
            },
            "metrics": {metric: number.to_json() for metric, number in metrics.items()},
            "channels": survey.channels.figures(),
            "codes": survey.codes.figures(),
            "spectrum": {"latents": survey.spectrum, "white_share": white_share(*positions)},
            "information": informed,
            "likelihood": likelihood.figures() if likelihood else None,
            "mixture": mixture,
            "pictures": pictures,
            "settings": result.settings(accelerator.device, options.batch_size) | result.command("eval.latent_space"),
            "versions": result.versions(),
        }
        result.write(options.output / "latent_space.md", summary.markdown(found))
        result.write(options.output / "latent_space.json", found)
        print("\n".join([summary.plain(found), *preparation.notes]))
        print(f"\nwritten to {options.output}; to look at it: ldm-vae report {options.output}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


# --- one pass over all images -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """Over all processes: metrics of all images; codes, without a book where there are none; variance of the likelihood
    (None without images to fit it on); bank, indices of the images whose moments [M, c, (t,) h, w] were kept."""

    images: int
    checksum: str
    metrics: dict[str, Summary]
    channels: ChannelStatistics
    codes: CodeUse
    spectrum: list[float]
    variance: float | None
    bank: list[int]
    moments: Moments


@torch.inference_mode()
def look_at_all(task: Task, indices: Sequence[int], quarantine: Quarantine) -> Survey:
    """Channels, codes, rate, distortion, spectrum; the variance of the likelihood from images with an even index."""
    vae, options, device = task.vae, task.options, task.accelerator.device
    frames, sounds, side = task.source.decoding.frames, is_of_sounds(vae), options.resolution
    size = (side,) if sounds else (side, side)
    shape = latent_size(vae, *(() if frames is None else (frames,)), *size)
    channels, codes, checksum = ChannelStatistics(shape[0]), code_use(vae), Checksum()
    spectrum = radial_power_spectrum(torch.zeros(1, *shape))
    kind, bits = ("snr", "bits_per_sample") if sounds else ("psnr", "bits_per_pixel")
    (ratio,) = build_metrics([kind], device, side, **kind_of(task.source.decoding))
    values = {name: Running() for name in (ratio.name, "mse", "rate_nats", bits, "high_frequency_share")}
    fit = Running()
    wanted = {indices[place] for place in spread(len(indices), options.bank)}
    bank, means, logvars, images = [], [torch.empty(0, *shape)], [torch.empty(0, *shape)], 0
    for batch, pixels in task.batches("survey", indices, quarantine):
        moments = finite.encode(vae, pixels)
        if moments.mean.shape[1:] != shape:
            raise UsageError(
                f"data: expected clips of {task.source.decoding.frames} frames alone, got image {batch.keys[0]}"
            )
        noise = latents.posterior_noise(options.seed, batch.indices, shape).to(device)
        sampled = finite.decode(vae, moments.sample(noise))
        sampled = sampled if sounds else sampled.clamp(-1, 1)
        error = ImageMetric("mse", "lower", squared_error).values(PINNED.pair(pixels, sampled, alpha=task.alpha))
        pair = PINNED.pair(pixels, finite.decode(vae, moments.mean), alpha=task.alpha, lengths=batch.lengths)
        rate = moments.kl().double().flatten(1).sum(dim=1)
        values[ratio.name].update(ratio.values(pair))
        values["mse"].update(error)
        values["rate_nats"].update(rate)
        values[bits].update(rate / math.log(2) / math.prod(size) / pair.frames)
        values["high_frequency_share"].update(high_frequency_share(moments.mean))
        fit.update(error[[index % 2 == 0 for index in batch.indices]])
        channels.update(moments, batch.indices)
        codes.update(vae, moments.mean)
        spectrum += radial_power_spectrum(moments.mean).cpu() * len(pixels)
        checksum.update(batch.pixels)
        images += len(batch.indices)
        kept = [index in wanted for index in batch.indices]
        bank += [index for index in batch.indices if index in wanted]
        means.append(moments.mean[kept].float().cpu())
        logvars.append(moments.logvar[kept].float().cpu())

    # --- over all processes ---
    images = int(gather(torch.tensor(images)).sum())
    if images == 0:
        quarantine.finish()  # raises with the reason, where there was an image and none could be used
        raise WorkError("latent_space: there was no image to measure")
    merged = channels.over_ranks()
    summaries = {name: running.over_ranks().summary() for name, running in values.items()}
    if merged.is_point:
        summaries = {name: found for name, found in summaries.items() if name not in ("rate_nats", bits)}
    if min(shape[1:] if sounds else shape[-2:]) == 1:
        del summaries["high_frequency_share"]  # one position has no frequencies
    fitted = fit.over_ranks()
    return Survey(
        images=images,
        checksum=checksum.compute(),
        metrics=summaries,
        channels=merged,
        codes=codes.over_ranks(),
        spectrum=(gather(spectrum).sum(dim=0) / images).tolist(),
        variance=fitted_variance(fitted.mean) if fitted.count else None,
        bank=gather_rows(torch.tensor(bank, dtype=torch.long)).tolist(),
        moments=Moments(gather_rows(torch.cat(means)), gather_rows(torch.cat(logvars)), merged.is_point),
    )


# --- of some of them --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def look_from_the_side(task: Task, survey: Survey) -> dict[str, Summary]:
    """Errors of equivariance of the bank's images, by the name of the transformation."""
    values: dict[str, Running] = {}
    any_size = geometry_of(task.vae).side is None
    # of a rank without images too; strides commute with shifts by whole hops, and there is no other move of a sound
    for name in () if is_of_sounds(task.vae) else applicable(*survey.moments.mean.shape[-2:], any_size):
        values |= {f"equivariance_{name}": Running(), f"equivariance_psnr_{name}": Running()}
    for _, pixels in task.batches("equivariance", survey.bank if values else []):
        for name, found in equivariance_error(task.vae, pixels, survey.channels.mean, alpha=task.alpha).items():
            values[f"equivariance_{name}"].update(found.latent)
            values[f"equivariance_psnr_{name}"].update(found.psnr)
    return {name: running.over_ranks().summary() for name, running in values.items()}


@torch.inference_mode()
def bound_likelihood(task: Task, indices: Sequence[int], survey: Survey) -> LikelihoodBounds | None:
    """Bounds of the likelihood of images with an odd index; None where one half of the images is empty, and of images
    with alpha, since it would weigh invisible colour, or sounds, whose samples have no steps to spread."""
    others = indices[1::2]
    chosen = [others[place] for place in spread(len(others), task.options.likelihood_images)]
    if task.alpha or is_of_sounds(task.vae) or survey.variance is None or not chosen or survey.moments.is_point:
        return None
    bounds = LikelihoodBounds(survey.variance, task.options.repeats, task.options.seed)
    for batch, pixels in task.batches("likelihood", chosen):
        bounds.update(task.vae, batch.pixels, finite.encode(task.vae, pixels), batch.indices)
    merged = bounds.over_ranks()
    return merged if merged.effective.count else None


# --- files ------------------------------------------------------------------------------------------------------------


def prepare(output: Path, accelerator: Accelerator) -> Path:
    """An output folder without the quarantine of an earlier call; where that of this one goes, shared by all ranks."""
    path = output / "latent_space.quarantine.jsonl"
    if accelerator.is_main_process:
        path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if not output.is_dir():
        raise WorkError(f"output: {output} is not the same folder for all processes; it must be on shared storage")
    return path


def protocol(options: argparse.Namespace) -> dict[str, Any]:
    """Settings that a reader needs to compare the numbers."""
    return {
        "name": "latent_space",
        "version": 1,
        "likelihood": "Gaussian per pixel value around the clamped output, one variance fitted on every other image; "
        "images uniformly dequantised",
        "importance_samples": list(SAMPLES),
        "bank": options.bank,
        "seed": options.seed,
        "source": "docs/latent_space.md",
    }


if __name__ == "__main__":
    run_program(main)
