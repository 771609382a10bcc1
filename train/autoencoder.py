"""Train or fine-tune a KL autoencoder with a perceptual and an adversarial loss.

    accelerate launch -m train.autoencoder configs/demo.yaml --output_dir runs/mine --data.path photos
    python -m train.autoencoder configs/smoke.yaml            # one process, CPU or GPU, under a minute
    python -m train.autoencoder configs/demo.yaml --dry_run   # print the resolved config and stop
    python -m train.autoencoder configs/demo.yaml --help      # every knob of that config

The same command again resumes from the last checkpoint. At the end RUN/vae is a diffusers folder (EMA weights, measured
scaling) and RUN/report/index.html a page to look at. Time is counted in images seen by all processes together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import AutoencoderTiny
from tqdm.auto import tqdm

from ldm_vae.autoencoder.latents import Normalisation, posterior_noise
from ldm_vae.autoencoder.model import check_resolution, downsampling_factor, encoder_fingerprint
from ldm_vae.core.errors import Stopped, WorkError, run_program
from ldm_vae.core.launch import StopSignal, build_accelerator
from ldm_vae.data import preprocessing
from ldm_vae.data.dataset import training_loader
from ldm_vae.data.quarantine import Quarantine
from ldm_vae.data.source import Source
from ldm_vae.data.stream import Stream, length
from ldm_vae.data.stream import warning as stream_warning
from ldm_vae.data.transforms import to_pixels
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.export.measurement import measure, normalisation_of
from ldm_vae.export.targets import warnings_for_pipelines
from ldm_vae.metrics.batches import image_batches, share_of, spread
from ldm_vae.metrics.bound import evidence_bound
from ldm_vae.metrics.evaluate import evaluate_reconstruction
from ldm_vae.metrics.linear import MEASURED, LinearFloor, fit_code
from ldm_vae.metrics.select import build_metrics
from ldm_vae.report import build_report
from ldm_vae.run import checkpoint
from ldm_vae.run.ema import Ema
from ldm_vae.run.folder import (
    arrange,
    global_batch,
    prepare_run_folder,
    resume,
    save,
    start_from_command_line,
    what_is_due,
)
from ldm_vae.run.inputs import compare_images, compare_store
from ldm_vae.run.metrics_log import Averages, Logbook, check_finite
from ldm_vae.run.optim import learning, schedule, set_learning_rate
from ldm_vae.run.trackers import check_tracker, log_picture
from ldm_vae.training.adversary import Adversary
from ldm_vae.training.config import (
    MAY_CHANGE,
    Training,
    build_autoencoder,
    build_discriminator,
    build_network,
    build_objective,
    check_teachers,
)
from ldm_vae.training.data import (
    assign_buckets,
    check_sources,
    normalisation_pixels,
    open_sources,
    start_from_data,
)
from ldm_vae.training.decoder_only import (
    drop_encoder,
    open_pairs,
    prepared_as,
    stored_loader,
    whole,
)
from ldm_vae.training.dry_run import describe
from ldm_vae.training.monitor import below_linear, diagnose
from ldm_vae.training.step import TrainingStep
from ldm_vae.training.validation import record_validation


def main() -> None:
    start_from_command_line(Training, "train.autoencoder", __doc__, describe, train)


def train(settings: Training) -> None:
    check_tracker(settings.report_to)
    accelerator = build_accelerator(
        settings.mixed_precision,
        ddp_timeout=settings.ddp_timeout,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=settings.report_to,
        project_dir=str(settings.output_dir),
    )
    run, say = settings.output_dir, accelerator.print

    # --- data: opened first, since a wrong path should cost seconds ---------------------------------------------------
    source, validation_source = open_sources(settings)
    check_sources(source, validation_source, settings)
    if isinstance(source, Stream):
        say(stream_warning(settings.data.path))

    # --- networks -----------------------------------------------------------------------------------------------------
    vae = build_autoencoder(settings)
    check_resolution(settings.resolution, downsampling_factor(vae))
    if settings.init == "linear" and checkpoint.newest(run / "checkpoints", say) is None:
        start_from_data(vae, source, settings, accelerator)
    pairs = None
    if settings.latent_store is not None:
        pairs = open_pairs(settings, vae, source)
        drop_encoder(vae)
    prepared = prepared_as(source, pairs)  # of which a record goes with the weights
    base = settings.normalisation_from
    base_normalisation = base and normalisation_of(base, settings.model.latent_channels)
    shapes = settings.buckets and settings.buckets.choose(settings.resolution, downsampling_factor(vae))
    if settings.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    ema = Ema(vae, settings.ema_halflife_images)
    ema.module.to(accelerator.device)
    network = build_network(settings, vae)
    encoder_before = None if network.encoder_learns or pairs else encoder_fingerprint(vae)
    check_teachers(settings)
    objective = build_objective(settings).to(accelerator.device)
    ema_objective = Ema(objective, settings.ema_halflife_images)  # of its own parameters: a likelihood's variance
    objective.attach(network)
    adversary = Adversary(settings.adversary).to(accelerator.device)
    critic = build_discriminator(settings)
    for module in [network] if critic is None else [network, critic]:
        arrange(module, settings)
    if validation_source is not None:  # what it needs is fetched now and not after the first hours
        build_metrics(settings.validation_metrics, accelerator.device, settings.resolution)
    prepare_run_folder(settings, accelerator, MAY_CHANGE)

    # --- optimisers; Accelerate wraps networks (DDP, autocast) and optimisers, not the data: our stream is sharded ---
    discriminator_rate = settings.discriminator_learning_rate or settings.learning_rate
    optimizer = accelerator.prepare(settings.optimizer.build(learning([network, objective]), settings.learning_rate))
    model = accelerator.prepare(network)
    discriminator, critic_optimizer = None, None
    if critic is not None:
        critic_optimizer = accelerator.prepare(settings.optimizer.build(learning([critic]), discriminator_rate))
        discriminator = accelerator.prepare(critic)
    skip_nan = settings.on_nan == "skip"
    step = TrainingStep(
        accelerator, model, objective, optimizer, adversary, discriminator, critic_optimizer, settings.max_grad_norm,
        skip_nan,
    )  # fmt: skip

    # --- resume: the same command again -------------------------------------------------------------------------------
    averages = Averages(skip_nan)
    stateful: dict[str, Any] = {
        "autoencoder": vae, "objective": objective, "optimizer": optimizer, "ema": ema,
        "ema_objective": ema_objective, "averages": averages,
    }  # fmt: skip
    if network.bottleneck.state_dict():
        stateful["bottleneck"] = network.bottleneck
    if critic is not None:
        stateful |= {"adversary": adversary, "discriminator": critic, "discriminator_optimizer": critic_optimizer}
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler
    batch_images = global_batch(settings, accelerator)
    images_seen, best, newest = 0, None, None
    if (found := resume(settings, accelerator, stateful)) is not None:
        newest, info = found
        images_seen, best = info["images_seen"], info["best"]
    logbook = Logbook(run / "metrics.jsonl", accelerator)
    logbook.cut_back(images_seen if newest else -1)
    resumed = newest is not None
    if pairs is not None:
        compare_store(run, "latent_store", pairs.latents.manifest, accelerator, resumed=resumed)
    if pairs is None or pairs.source is not None:
        compare_images(run, "data", source, accelerator, resumed=resumed)
    compare_images(run, "validation_data", validation_source, accelerator, resumed=resumed)

    # --- the loop -----------------------------------------------------------------------------------------------------
    quarantine = Quarantine(length(source), max_bad=settings.data.max_bad, path=run / "quarantine.jsonl")
    assignment = None
    if shapes:
        assignment, unreadable = assign_buckets(source, shapes, settings, accelerator)
        quarantine.add(unreadable)
        readable = f"{sum(assignment.counts()):,} of {len(source):,} images"
        say(f"aspect buckets (height x width) of {readable}:", *assignment.lines(), sep="\n")
    layout: dict[str, Any] = {
        "seed": settings.seed, "batch_size": settings.train_batch_size, "rank": accelerator.process_index,
        "world_size": accelerator.num_processes, "start_position": images_seen,
        "num_workers": settings.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda",
    }  # fmt: skip
    loader: Iterator[Any] = (
        training_loader(source, settings.transform, settings.resolution, buckets=assignment, **layout)
        if pairs is None
        else stored_loader(pairs, **layout)
    )
    higher_is_better = settings.best_metric in ("psnr", "ssim")
    signals = StopSignal()
    logged_at, warned = images_seen, set[str]()
    bar = tqdm(
        total=settings.max_train_images, initial=images_seen, unit="img", desc="train",
        disable=None if accelerator.is_main_process else True,
    )  # fmt: skip
    for batch in loader:
        if images_seen >= settings.max_train_images:
            break
        factor = schedule(images_seen, settings.lr_warmup_images, settings.max_train_images, settings.lr_schedule)
        set_learning_rate(optimizer, factor * settings.learning_rate)
        if critic_optimizer is not None:
            set_learning_rate(critic_optimizer, factor * discriminator_rate)

        images = to_pixels(batch.pixels.to(accelerator.device, non_blocking=True))
        noise = posterior_noise(settings.seed, batch.positions.tolist(), network.noise_shape(*images.shape[2:]))
        stored = None if pairs is None else batch.moments.to(accelerator.device)
        averages.update(step(images, noise.to(accelerator.device), images_seen, stored))
        quarantine.add(batch.bad, good=len(batch.keys))
        if not accelerator.sync_gradients:
            continue
        images_seen += batch_images
        ema.update(vae, images_seen, batch_images, network.bottleneck.copied)
        ema_objective.update(objective, images_seen, batch_images)
        bar.update(batch_images)

        # --- events: each when a multiple of its interval has been crossed, and all at the end
        due = what_is_due(
            settings, images_seen, batch_images,
            log=settings.log_every_images, checkpoint=settings.checkpoint_every_images,
            validate=settings.validate_every_images if validation_source is not None else None,
        )  # fmt: skip
        stop = signals.agreed(accelerator)
        if any(due.values()) or stop:
            means = averages.means(accelerator)
            kept = f"{newest} is kept" if newest else "there was no checkpoint yet"
            check_finite(means, logged_at, images_seen, kept)
        if any(due.values()):
            averages.reset()
            logged_at = images_seen
            means["learning_rate"] = factor * settings.learning_rate
            warnings = diagnose([*logbook.lines, means], settings.adversary)
            for name in warnings.keys() - warned:
                tqdm.write(f"warning at {images_seen:,} images: {warnings[name]}", file=sys.stderr)
            warned = set(warnings)
            logbook.write(images_seen, means, warnings)
            losses = {name.removeprefix("loss/"): f"{value:.3g}" for name, value in means.items() if "loss/" in name}
            bar.set_postfix(losses)
        improved = False
        if due["validate"]:
            averaged = whole(ema.module, settings)
            scores = validate(averaged, ema_objective.module, validation_source, settings, accelerator, images_seen)
            below = below_linear(scores)
            for sentence in below.values():
                say(f"at {images_seen:,} images: {sentence}")
            logbook.write(images_seen, scores, below)
            score = scores[f"validation/{settings.best_metric}"]
            improved = best is None or (score > best["score"]) == higher_is_better
            if improved:
                best = {"score": score, "checkpoint": checkpoint.name(images_seen)}
            show(run, accelerator)
        if due["checkpoint"] or improved or stop:
            networks = {"autoencoder": vae, "objective": objective}
            networks |= {} if critic is None else {"discriminator": critic}
            newest = save(settings, accelerator, images_seen, stateful, networks, averages, best)
        if stop:
            say(f"stopped by signal {stop}, saved {newest}; the same command resumes")
            raise Stopped(stop)
    bar.close()

    # --- the end: a diffusers folder from the averaged weights, its scaling measured ----------------------------------
    if quarantine.count:
        total = "the" if length(source) is None else f"{length(source):,}"
        say(f"{quarantine.count} of {total} images could not be used: {run / 'quarantine.jsonl'}")
    if encoder_before is not None:
        if encoder_fingerprint(ema.module) != encoder_before:
            raise WorkError("trainable: the frozen encoder changed; nothing was exported")
        say(f"the encoder is unchanged ({encoder_before[:12]}): stores made with it stay valid")
    if accelerator.is_main_process:
        trained = preprocessing.record(whole(ema.module, settings), prepared)
        statistics = (
            measure(trained, normalisation_pixels(settings), accelerator.device)
            if pairs is None
            else pairs.latents.statistics
        )
        # the latents of a distilled network are its teacher's, normalised already
        distilled = Normalisation(1.0) if isinstance(trained, AutoencoderTiny) else None
        normalisation = distilled or base_normalisation or statistics.normalisation(settings.normalisation)
        write_vae(trained, run / "vae", normalisation, sample_size=settings.resolution, statistics=statistics)
        for warning in warnings_for_pipelines({**trained.config, **normalisation.to_config()}):
            say(f"warning: {warning}")
    show(run, accelerator)
    accelerator.end_training()
    say(f"trained on {images_seen:,} images; the autoencoder is in {run / 'vae'}")


# --- its parts --------------------------------------------------------------------------------------------------------


def validate(
    vae: Any, objective: Any, source: Source, settings: Training, accelerator: Accelerator, images_seen: int
) -> dict[str, float]:
    """Reconstruction metrics of the averaged weights on held-out images, shared out over the ranks, and where the
    objective has a likelihood the evidence lower bound."""
    chosen = spread(len(source), settings.validation_images)
    mine = share_of(accelerator.process_index, accelerator.num_processes, chosen, settings.train_batch_size)
    names = settings.validation_metrics
    metrics = build_metrics(names, accelerator.device, settings.resolution)
    shape = {"resolution": settings.resolution, "batch_size": settings.train_batch_size}
    batches = partial(image_batches, source, mine, settings.resolution, batch_size=settings.train_batch_size)
    code = fit_code(vae, source, chosen, accelerator.process_index, accelerator.num_processes, **shape)
    of_code = build_metrics([name for name in names if name in MEASURED], accelerator.device, settings.resolution)
    floor = code and LinearFloor(code, of_code)
    result = evaluate_reconstruction(vae, batches(), metrics, accelerator.device, linear=floor, **shape)
    scores = {name: summary.mean for name, summary in result.metrics.items() if summary.mean is not None}
    scores |= evidence_bound(vae, objective, batches(), accelerator.device)
    if accelerator.is_main_process:
        name = settings.validation_data.path
        sheet = record_validation(
            settings.output_dir,
            vae,
            source,
            name,
            result,
            metrics,
            accelerator.device,
            **shape,
            images_seen=images_seen,
        )
        log_picture(accelerator, "validation", sheet, images_seen)
    floors = {f"linear_code/{name}": summary.mean for name, summary in result.linear.items()}
    return {f"validation/{name}": score for name, score in scores.items()} | floors


def show(run: Path, accelerator: Accelerator) -> None:
    """Rewrite RUN/report/index.html, so that a person without a tracker can watch."""
    if accelerator.is_main_process:
        build_report(run)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_program(main)
