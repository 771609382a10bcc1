"""Train a prior over codes on the index store of a VQ autoencoder: autoregressive (its likelihood is exact) or masked.

    accelerate launch -m ldm_vae prior prior/demo --latents runs/vq_demo/latents
    ldm-vae prior prior/demo --dry_run   # print the resolved config and its cost, and stop
    ldm-vae prior prior/demo --help      # every option of that config

Repeat the command to resume from the last checkpoint. At the end, RUN/prior is the network (EMA weights) for
`ldm_vae.prior.generator`, RUN/samples holds decoded samples and those of independent codes, RUN/report/prior.json the
bits of held-out codes, and RUN/report/index.html is the report. Schedules and intervals count images over all
processes.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from ldm_vae.core.errors import run_program
from ldm_vae.metrics.sample_grids import record_originals, record_samples
from ldm_vae.prior.config import MAY_CHANGE, PriorTraining, build_prior, codes_of, describe, open_codes
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.prior.rates import RECORD, in_words, record_rates, validate
from ldm_vae.report import build_report
from ldm_vae.run.folder import start, start_from_command_line
from ldm_vae.run.inputs import compare_store
from ldm_vae.run.single_network import SingleNetwork
from ldm_vae.run.store_training import load_decoder
from ldm_vae.run.trackers import log_picture


def main() -> None:
    start_from_command_line(PriorTraining, "train.prior", __doc__, describe, train)


def train(settings: PriorTraining) -> None:
    accelerator = start(settings)
    run, say, batch_size = settings.output_dir, accelerator.print, settings.train_batch_size

    # --- the stores, and the VAE that decodes samples: opened first, since a wrong path should cost seconds -----------
    codes, held_out = open_codes(settings)
    vae = load_decoder(settings, codes).to(accelerator.device)
    loader = codes.loader(settings, accelerator)

    # --- the network, as the last checkpoint left it: resume is the same command again --------------------------------
    prior = build_prior(settings, codes)
    state = SingleNetwork(settings, accelerator, "prior", prior, loader, MAY_CHANGE)
    generator = CodeGenerator(
        prior.around(state.ema.module), settings.model, vae, codes_of(codes), codes.shape, settings.sampling,
        codes.classes, settings.seed,
    )  # fmt: skip

    if held_out is not codes:
        resumed = state.newest is not None
        compare_store(run, "validation_latents", held_out.dataset.manifest, accelerator, resumed=resumed)

    # --- originals, to be seen beside the samples ---------------------------------------------------------------------
    if accelerator.is_main_process:
        stored = codes.originals(settings.sample_images)
        record_originals(run, generator, stored, batch_size, codes.names)

    # --- the loop -----------------------------------------------------------------------------------------------------
    for indices, labels, positions in codes.batches(loader, state.images_seen):
        if state.ended:
            break
        state.set_learning_rate()
        indices, labels = indices.to(accelerator.device), labels.to(accelerator.device)
        with accelerator.accumulate(state.model):
            state.learn(state.model(indices, labels, settings.seed, positions))
        if not accelerator.sync_gradients:
            continue
        due = state.after_update(sample=settings.sample_every_images, validate=settings.validate_every_images)
        # before the checkpoint, from which a resumed run takes its log
        if due["validate"]:
            bits = validate(generator, held_out, settings.validation_images, batch_size, accelerator)
            state.logbook.write(state.images_seen, bits)
        state.save_if(due)
        if due["sample"] and not state.ended:
            draw(generator, settings, state.images_seen, accelerator, codes.names)
    state.bar.close()

    # --- the end: the network, its bits beside those of independent codes, and its last samples -----------------------
    if accelerator.is_main_process:
        generator.write(run)
        count = settings.validation_images
        say(in_words(record_rates(run, generator, codes, held_out, count, batch_size, settings.sample_images)))
    draw(generator, settings, state.images_seen, accelerator, codes.names)
    accelerator.end_training()
    say(f"trained on {state.images_seen:,} images; samples in {run / 'samples'}, the prior in {run / 'prior'}")


# --- its parts --------------------------------------------------------------------------------------------------------


def draw(
    generator: CodeGenerator, settings: PriorTraining, images_seen: int, accelerator: Accelerator, names: Sequence[str]
) -> None:
    """A grid of decoded samples, of the same draws every time, and the page; the main process draws."""
    if accelerator.is_main_process:
        count, batch_size = settings.sample_images, settings.train_batch_size
        picture = record_samples(settings.output_dir, RECORD, generator, images_seen, count, batch_size, names)
        log_picture(accelerator, "samples", picture, images_seen)
        build_report(settings.output_dir)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_program(main)
