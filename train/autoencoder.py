"""Train or fine-tune a KL autoencoder with a perceptual and an adversarial loss.

    accelerate launch -m ldm_vae train demo --output_dir runs/mine --data.path photos
    ldm-vae train smoke            # one process, CPU or GPU, under a minute
    ldm-vae train demo --dry_run   # print the resolved config and stop
    ldm-vae train demo --help      # every option of that config

Repeat the command to resume from the last checkpoint. At the end, RUN/vae is a diffusers folder (EMA weights, measured
scaling) and RUN/report/index.html is the report. Schedules and intervals count images over all processes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm_vae.autoencoder.geometry import check_resolution
from ldm_vae.autoencoder.latents import posterior_noise
from ldm_vae.autoencoder.lengths import check_frames, check_samples
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import is_fixed
from ldm_vae.autoencoder.preparation import record
from ldm_vae.core.errors import UsageError, WorkError, run_program
from ldm_vae.core.launch import StopSignal
from ldm_vae.data.quarantine import Quarantine
from ldm_vae.data.source import Source
from ldm_vae.data.stream import Stream, length
from ldm_vae.data.stream import warning as stream_warning
from ldm_vae.data.transforms import to_values
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.export.targets import warnings_for_pipelines
from ldm_vae.metrics.batches import image_batches, share_of, spread
from ldm_vae.metrics.bound import evidence_bound
from ldm_vae.metrics.evaluate import evaluate_reconstruction
from ldm_vae.metrics.linear import MEASURED, LinearFloor, fit_code
from ldm_vae.metrics.metric import Metric, Unmeasured
from ldm_vae.metrics.select import build_metrics, kind_of
from ldm_vae.metrics.titles import TITLES
from ldm_vae.report import build_report
from ldm_vae.run import checkpoint
from ldm_vae.run.folder import prepare_run_folder, progress_bar, start, start_from_command_line, stopped, what_is_due
from ldm_vae.run.inputs import compare_images
from ldm_vae.run.metrics_log import Logbook, check_finite
from ldm_vae.run.trackers import log_picture
from ldm_vae.training.config import MAY_CHANGE, Training, build_autoencoder
from ldm_vae.training.data import ImageFeed, check_signal, open_sources, start_from_data
from ldm_vae.training.decoder_only import StoredFeed
from ldm_vae.training.dry_run import describe
from ldm_vae.training.monitor import below_linear, diagnose, overfitting
from ldm_vae.training.scaling import given_normalisation, normalise
from ldm_vae.training.smallest_crop import crop_size
from ldm_vae.training.state import TrainingState, build_state
from ldm_vae.training.validation import record_validation


def main() -> None:
    start_from_command_line(Training, "train.autoencoder", __doc__, describe, train)


def train(settings: Training) -> None:
    accelerator = start(settings)
    run, say = settings.output_dir, accelerator.print

    # --- data: opened first, since a wrong path should cost seconds ---------------------------------------------------
    source, held_out = open_sources(settings, accelerator)
    if isinstance(source, Stream):
        say(stream_warning(settings.data.path))

    # --- networks: from the config, another's weights or the linear code; a store's feed takes the encoder away -------
    vae = build_autoencoder(settings)
    check_resolution(crop_size(settings)[-1], vae)
    for name, one in (("data", source), ("validation_data", held_out)):
        if one is not None and one.decoding.frames is not None:
            check_frames(vae, one.decoding.frames, f"{name}.frames")
        if one is not None and one.decoding.samples is not None:
            check_samples(vae, one.decoding.samples, f"{name}.samples")
    if settings.init == "linear" and checkpoint.newest(run / "checkpoints", say) is None:
        start_from_data(vae, source, settings, accelerator)
    feed = (ImageFeed if settings.latent_store is None else StoredFeed)(settings, vae, source)
    check_signal(settings, feed.prepared)
    record(vae, feed.prepared)  # goes into checkpoints and the export
    given = given_normalisation(settings, vae)
    state = build_state(settings, accelerator, vae)
    # what its metrics need is fetched now and not after the first hours
    if held_out is not None and settings.validate_every_images is not None:
        metrics_of(settings, accelerator, held_out)

    # --- the run folder, and where its last checkpoint left it: resume is the same command again ----------------------
    prepare_run_folder(settings, accelerator, MAY_CHANGE)
    resumed = state.resume()
    logbook = Logbook(run / "metrics.jsonl", accelerator)
    logbook.cut_back(state.images_seen if resumed else -1)
    feed.compare(accelerator, resumed=resumed)
    compare_images(run, "validation_data", held_out, accelerator, resumed=resumed)

    # --- the loop: a micro-batch a turn, time in images of all processes ----------------------------------------------
    quarantine = Quarantine(length(source), max_bad=settings.data.max_bad, path=run / "quarantine.jsonl")
    batches = feed.batches(accelerator, state.images_seen, quarantine)
    events = Events(state, feed, held_out, logbook)
    signals = StopSignal()
    for batch in batches:
        if state.images_seen >= settings.max_train_images:
            break
        rate = state.set_learning_rate()
        images = to_values(batch.pixels.to(accelerator.device, non_blocking=True))
        noise = posterior_noise(settings.seed, batch.positions.tolist(), state.network.noise_shape(*images.shape[2:]))
        stored = batch.moments_on(accelerator.device)
        state.averages.update(state.step(images, noise.to(accelerator.device), state.images_seen, stored))
        quarantine.add(batch.bad, good=len(batch.keys))
        if not accelerator.sync_gradients:
            continue  # the update needs more of them
        state.count_update()
        if stop := events.after_update(rate, signals.agreed(accelerator)):
            raise stopped(accelerator, stop, state.newest)
    events.bar.close()

    # --- the end: a diffusers folder from the averaged weights, its scaling measured ----------------------------------
    if quarantine.count:
        total = "the" if length(source) is None else f"{length(source):,}"
        say(f"{quarantine.count} of {total} images could not be used: {run / 'quarantine.jsonl'}")
    state.check_encoder()
    if accelerator.is_main_process:
        export(state, feed, given)
    show(run, accelerator)
    accelerator.end_training()
    say(f"trained on {state.images_seen:,} images; the autoencoder is in {run / 'vae'}")


# --- events -----------------------------------------------------------------------------------------------------------


class Events:
    """Events beside the updates: the log, validation, checkpoints; each when a multiple of its interval has been
    crossed, and all at the end."""

    def __init__(
        self, state: TrainingState, feed: ImageFeed | StoredFeed, held_out: Source | None, logbook: Logbook
    ) -> None:
        self.state, self.feed, self.held_out, self.logbook = state, feed, held_out, logbook
        self.bar = progress_bar(state.settings, state.images_seen)
        self._logged_at, self._warned = state.images_seen, set[str]()

    def after_update(self, rate: float, stop: int) -> int:
        """Deal with what is due after an update; a signal that came (`stop`) is given back, the run saved."""
        state, settings = self.state, self.state.settings
        self.bar.update(state.batch_images)
        due = what_is_due(
            settings, state.images_seen, state.batch_images,
            log=settings.log_every_images, checkpoint=settings.checkpoint_every_images,
            validate=settings.validate_every_images if self.held_out is not None else None,
        )  # fmt: skip
        if any(due.values()) or stop:
            means = state.averages.means(state.accelerator)
            kept = f"{state.newest} is kept" if state.newest else "there was no checkpoint yet"
            check_finite(means, self._logged_at, state.images_seen, kept)
        if any(due.values()):
            self._log(means, rate)
        improved = due["validate"] and self._validate()
        if due["checkpoint"] or improved or stop:
            state.save()
        return stop

    def _log(self, means: dict[str, float], rate: float) -> None:
        state = self.state
        state.averages.reset()
        self._logged_at = state.images_seen
        means["learning_rate"] = rate
        warnings = diagnose([*self.logbook.lines, means], state.settings.adversary)
        for name in warnings.keys() - self._warned:
            self.bar.say(f"warning at {state.images_seen:,} images: {warnings[name]}")
        self._warned = set(warnings)
        self.logbook.write(state.images_seen, means, warnings)
        losses = {name.removeprefix("loss/"): f"{value:.3g}" for name, value in means.items() if "loss/" in name}
        self.bar.report(losses)

    def _validate(self) -> bool:
        """Measure and log the averaged weights; whether they are the best so far."""
        state, settings = self.state, self.state.settings
        averaged = self.feed.complete(state.ema.module)
        assert self.held_out is not None
        scores = validate(averaged, state.ema_objective.module, self.held_out, state)
        log = [*self.logbook.lines, {"images": state.images_seen, **scores}]
        warnings = below_linear(scores, settings.init) | overfitting(log, settings.best_metric, settings.output_dir)
        for sentence in warnings.values():
            state.accelerator.print(f"at {state.images_seen:,} images: {sentence}")
        self.logbook.write(state.images_seen, scores, warnings)
        score = scores[f"validation/{settings.best_metric}"]
        higher_is_better = TITLES[settings.best_metric].better == "higher"
        improved = state.best is None or (score > state.best["score"]) == higher_is_better
        if improved:
            state.best = {"score": score, "checkpoint": checkpoint.name(state.images_seen)}
        show(settings.output_dir, state.accelerator)
        return improved


def metrics_of(settings: Training, accelerator: Accelerator, source: Source) -> list[Metric]:
    """The metrics of a validation on these images, clips or sounds, ready to update. Raises UsageError where the best
    one cannot be measured here."""
    size = source.decoding.samples or settings.resolution
    metrics = build_metrics(settings.validation_metrics, accelerator.device, size, **kind_of(source.decoding))
    for metric in metrics:
        if isinstance(metric, Unmeasured) and metric.name == settings.best_metric:
            raise UsageError(f"best_metric: {metric.name}: {metric.note}")
    return metrics


def validate(vae: Any, objective: Any, source: Source, state: TrainingState) -> dict[str, float]:
    """Reconstruction metrics of the averaged weights on held-out images, shared out over the ranks, and where the
    objective has a likelihood the evidence lower bound."""
    settings, accelerator = state.settings, state.accelerator
    chosen = spread(len(source), settings.validation_images)
    mine = share_of(accelerator.process_index, accelerator.num_processes, chosen, settings.train_batch_size)
    metrics = metrics_of(settings, accelerator, source)
    shape = {"resolution": source.decoding.samples or settings.resolution, "batch_size": settings.train_batch_size}
    batches = partial(image_batches, source, mine, **shape)
    code = fit_code(vae, source, chosen, accelerator.process_index, accelerator.num_processes, **shape)
    compared = [name for name in settings.validation_metrics if name in MEASURED]
    of_code = build_metrics(compared, accelerator.device, shape["resolution"], **kind_of(source.decoding))
    floor = code and LinearFloor(code, of_code)
    result = evaluate_reconstruction(vae, batches(), metrics, accelerator.device, linear=floor, **shape)
    scores = {name: summary.mean for name, summary in result.metrics.items() if summary.mean is not None}
    if settings.best_metric not in scores:
        raise WorkError(f"best_metric: {settings.best_metric} has no value for any of validation_data")
    scores |= evidence_bound(vae, objective, batches(), accelerator.device)
    if accelerator.is_main_process:
        sheet = record_validation(
            settings.output_dir, vae, source, settings.validated, result, metrics, accelerator.device,
            **shape, images_seen=state.images_seen,
        )  # fmt: skip
        log_picture(accelerator, "validation", sheet, state.images_seen)
    floors = {f"linear_code/{name}": summary.mean for name, summary in result.linear.items()}
    return {f"validation/{name}": score for name, score in scores.items()} | floors


# --- the end ----------------------------------------------------------------------------------------------------------


def export(state: TrainingState, feed: ImageFeed | StoredFeed, given: Normalisation | None) -> None:
    """Write RUN/vae: the averaged weights, how their images were decoded, and the normalisation: a `given` one, or what
    is measured."""
    settings = state.settings
    trained = feed.complete(state.ema.module)
    normalisation, statistics = normalise(settings, trained, given)
    if settings.init_from is not None and given is None and normalisation is not None and not is_fixed(trained):
        base = settings.init_from
        state.accelerator.print(
            f"normalisation `{normalisation.kind}`: measured; diffusion models of {base} need its own, which "
            f"`ldm-vae export {settings.output_dir} OUT --normalisation_from {base}` writes"
        )
    out = settings.output_dir / "vae"
    write_vae(trained, out, normalisation, sample_size=settings.resolution, statistics=statistics)
    for warning in warnings_for_pipelines({**trained.config, **(normalisation.to_config() if normalisation else {})}):
        state.accelerator.print(f"warning: {warning}")


def show(run: Path, accelerator: Accelerator) -> None:
    """Rewrite RUN/report/index.html, so that a person without a tracker can watch."""
    if accelerator.is_main_process:
        build_report(run)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_program(main)
