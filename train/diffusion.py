"""Train a small diffusion model on a latent store: flow matching, class-conditional if the store has labels.

    accelerate launch -m ldm_vae diffuse diffusion/demo --latents runs/demo/latents
    ldm-vae diffuse diffusion/demo --dry_run   # print the resolved config and its cost, and stop
    ldm-vae diffuse diffusion/demo --help      # every option of that config

Repeat the command to resume from the last checkpoint. At the end, RUN/denoiser is a diffusers network (EMA weights) for
`ldm_vae.diffusion.generator`, RUN/samples holds decoded samples, and RUN/report/index.html is the report. Schedules and
intervals count images over all processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from ldm_vae.core.errors import run_program
from ldm_vae.diffusion.config import (
    MAY_CHANGE,
    DiffusionTraining,
    build_denoiser,
    describe,
    open_latents,
)
from ldm_vae.diffusion.flow import Denoiser, draw_flow
from ldm_vae.diffusion.generator import Generator
from ldm_vae.diffusion.sample_metrics import RECORD, clip_looks, in_words, record_distances
from ldm_vae.metrics.sample_grids import record_originals, record_samples
from ldm_vae.report import build_report
from ldm_vae.run.folder import start, start_from_command_line
from ldm_vae.run.single_network import SingleNetwork
from ldm_vae.run.store_training import load_decoder
from ldm_vae.run.trackers import log_picture


def main() -> None:
    start_from_command_line(DiffusionTraining, "train.diffusion", __doc__, describe, train)


def train(settings: DiffusionTraining) -> None:
    accelerator = start(settings)
    run, say = settings.output_dir, accelerator.print

    # --- the store, and the VAE that decodes samples: opened first, since a wrong path should cost seconds ------------
    latents = open_latents(settings)
    vae = load_decoder(settings, latents).to(accelerator.device)
    clip = clip_looks(settings.clip) if settings.measure_images and accelerator.is_main_process else None

    # --- the loader: the exact order by key, this rank's part of each global batch, resumable; not for `prepare` ------
    loader = latents.loader(settings, accelerator)

    # --- the network, as the last checkpoint left it: resume is the same command again --------------------------------
    state = SingleNetwork(settings, accelerator, "denoiser", build_denoiser(settings, latents), loader, MAY_CHANGE)
    generator = Generator(
        Denoiser(state.ema.module, latents.none), vae, latents.shape, latents.dataset.normalisation, settings.sampling,
        latents.classes, settings.flow.shift, settings.seed,
    )  # fmt: skip

    # --- originals, to be seen beside the samples ---------------------------------------------------------------------
    if accelerator.is_main_process:
        stored = latents.originals(settings.sample_images)
        record_originals(run, generator, stored, settings.train_batch_size, latents.names)

    # --- the loop -----------------------------------------------------------------------------------------------------
    for clean, labels, positions in latents.batches(loader, state.images_seen):
        if state.ended:
            break
        state.set_learning_rate()
        clean, labels = clean.to(accelerator.device), labels.to(accelerator.device)
        flow = draw_flow(clean, labels, positions, settings.seed, settings.flow, latents.none)
        with accelerator.accumulate(state.model):
            state.learn(flow.loss(state.model(flow.noised, flow.times, flow.labels)))
        if not accelerator.sync_gradients:
            continue
        due = state.after_update(sample=settings.sample_every_images)
        state.save_if(due)
        if due["sample"] and not state.ended:
            draw(generator, settings, state.images_seen, accelerator, latents.names)
    state.bar.close()

    # --- the end: the network for diffusers, its last samples, and how far they are from the store's images -----------
    if accelerator.is_main_process:
        generator.write(run)
        if settings.measure_images:
            count = settings.measure_images
            distances = record_distances(run, generator, latents.some(count), count, settings.train_batch_size, clip)
            say(in_words(distances))
    draw(generator, settings, state.images_seen, accelerator, latents.names)
    accelerator.end_training()
    say(f"trained on {state.images_seen:,} images; samples in {run / 'samples'}, the denoiser in {run / 'denoiser'}")


# --- its parts --------------------------------------------------------------------------------------------------------


def draw(
    generator: Generator, settings: DiffusionTraining, images_seen: int, accelerator: Accelerator, names: Sequence[str]
) -> None:
    """A grid of decoded samples, of the same noise every time, and the page; the main process draws."""
    if accelerator.is_main_process:
        count, batch_size = settings.sample_images, settings.train_batch_size
        picture = record_samples(settings.output_dir, RECORD, generator, images_seen, count, batch_size, names)
        log_picture(accelerator, "samples", picture, images_seen)
        build_report(settings.output_dir)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_program(main)
