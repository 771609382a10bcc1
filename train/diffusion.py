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
from typing import Any

from accelerate import Accelerator

from ldm_vae.core.errors import run_program
from ldm_vae.core.launch import StopSignal
from ldm_vae.diffusion.config import (
    MAY_CHANGE,
    DiffusionTraining,
    build_denoiser,
    describe,
    open_latents,
)
from ldm_vae.diffusion.flow import Denoiser, draw_flow
from ldm_vae.diffusion.generator import Generator
from ldm_vae.diffusion.sample_metrics import (
    clip_looks,
    in_words,
    record_distances,
    record_originals,
    record_samples,
)
from ldm_vae.report import build_report
from ldm_vae.run.ema import Ema
from ldm_vae.run.folder import (
    global_batch,
    prepare_network,
    prepare_run_folder,
    progress_bar,
    resume,
    save,
    start,
    start_from_command_line,
    stopped,
    what_is_due,
)
from ldm_vae.run.inputs import compare_store
from ldm_vae.run.metrics_log import Averages, Logbook, check_finite
from ldm_vae.run.optim import schedule, set_learning_rate, trainable_parameters
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

    # --- the network: fp32 weights, autocast by Accelerate; DDP's hooks fire in `model(...)` --------------------------
    denoiser = build_denoiser(settings, latents)
    network = denoiser.network
    ema = Ema(network, settings.ema_halflife_images)
    ema.module.to(accelerator.device)
    prepare_network(network, settings)
    prepare_run_folder(settings, accelerator, MAY_CHANGE)
    optimizer = accelerator.prepare(settings.optimizer.build(trainable_parameters([denoiser]), settings.learning_rate))
    model = accelerator.prepare(denoiser)
    generator = Generator(
        Denoiser(ema.module, latents.none), vae, latents.shape, latents.dataset.normalisation, settings.sampling,
        latents.classes, settings.flow.shift, settings.seed,
    )  # fmt: skip

    # --- the loader: the exact order by key, this rank's part of each global batch, resumable; not for `prepare` ------
    loader = latents.dataset.loader(
        settings.train_batch_size, seed=settings.seed, num_workers=settings.dataloader_num_workers,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip

    # --- resume: the same command again -------------------------------------------------------------------------------
    averages = Averages()
    stateful: dict[str, Any] = {
        "denoiser": network, "optimizer": optimizer, "ema": ema, "averages": averages, "loader": loader,
    }  # fmt: skip
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler
    batch_images = global_batch(settings, accelerator)
    images_seen, newest = 0, None
    if (found := resume(settings, accelerator, stateful)) is not None:
        newest, images_seen = found[0], found[1]["images_seen"]
    logbook = Logbook(run / "metrics.jsonl", accelerator)
    logbook.cut_back(images_seen if newest else -1)
    compare_store(run, "latents", latents.dataset.manifest, accelerator, resumed=newest is not None)

    # --- originals, to be seen beside the samples ---------------------------------------------------------------------
    if accelerator.is_main_process:
        stored = latents.originals(settings.sample_images)
        record_originals(run, generator, stored, settings.train_batch_size, latents.names)

    # --- the loop -----------------------------------------------------------------------------------------------------
    signals = StopSignal()
    logged_at = images_seen
    bar = progress_bar(settings, images_seen)
    for clean, labels, positions in latents.batches(loader, images_seen):
        if images_seen >= settings.max_train_images:
            break
        factor = schedule(images_seen, settings.lr_warmup_images, settings.max_train_images, settings.lr_schedule)
        set_learning_rate(optimizer, factor * settings.learning_rate)

        clean, labels = clean.to(accelerator.device), labels.to(accelerator.device)
        flow = draw_flow(clean, labels, positions, settings.seed, settings.flow, latents.none)
        with accelerator.accumulate(model):
            loss = flow.loss(model(flow.noised, flow.times, flow.labels))
            accelerator.backward(loss)
            logs = {"loss/total": loss.detach()}
            if accelerator.sync_gradients:
                limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
                norm = accelerator.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:  # the fp16 scaler's searching
                logs["gradient_norm/denoiser"] = norm.detach()
            optimizer.zero_grad()
        averages.update(logs)
        if not accelerator.sync_gradients:
            continue
        images_seen += batch_images
        ema.update(network, images_seen, batch_images)
        bar.update(batch_images)

        # --- events: each when a multiple of its interval has been crossed, and all at the end
        due = what_is_due(
            settings, images_seen, batch_images, log=settings.log_every_images,
            checkpoint=settings.checkpoint_every_images, sample=settings.sample_every_images,
        )  # fmt: skip
        stop = signals.agreed(accelerator)
        if any(due.values()) or stop:
            means = averages.means(accelerator)
            kept = f"{newest} is kept" if newest else "there was no checkpoint yet"
            check_finite(means, logged_at, images_seen, kept)
        if due["log"]:
            averages.reset()
            logged_at = images_seen
            logbook.write(images_seen, means | {"learning_rate": factor * settings.learning_rate})
            bar.report({"loss": f"{means['loss/total']:.3g}"})
        if due["checkpoint"] or stop:
            newest = save(settings, accelerator, images_seen, stateful, {"denoiser": network}, averages)
        if stop:
            raise stopped(accelerator, stop, newest)
        if due["sample"] and images_seen < settings.max_train_images:
            draw(generator, settings, images_seen, accelerator, latents.names)
    bar.close()

    # --- the end: the network for diffusers, its last samples, and how far they are from the store's images -----------
    if accelerator.is_main_process:
        generator.write(run)
        if settings.measure_images:
            count = settings.measure_images
            distances = record_distances(run, generator, latents.some(count), count, settings.train_batch_size, clip)
            say(in_words(distances))
    draw(generator, settings, images_seen, accelerator, latents.names)
    accelerator.end_training()
    say(f"trained on {images_seen:,} images; samples in {run / 'samples'}, the denoiser in {run / 'denoiser'}")


# --- its parts --------------------------------------------------------------------------------------------------------


def draw(
    generator: Generator, settings: DiffusionTraining, images_seen: int, accelerator: Accelerator, names: Sequence[str]
) -> None:
    """A grid of decoded samples, of the same noise every time, and the page; the main process draws."""
    if accelerator.is_main_process:
        count, batch_size = settings.sample_images, settings.train_batch_size
        picture = record_samples(settings.output_dir, generator, images_seen, count, batch_size, names)
        log_picture(accelerator, "samples", picture, images_seen)
        build_report(settings.output_dir)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_program(main)
