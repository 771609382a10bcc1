"""A run that trains one network by one loss on a latent store: weights, averaged weights, optimiser, log, checkpoints.

    state = SingleNetwork(settings, accelerator, "denoiser", denoiser, loader, MAY_CHANGE)
    for batch in batches:
        if state.ended:
            break
        state.set_learning_rate()
        with accelerator.accumulate(state.model):
            state.learn(loss_of(state.model(...)))
        if not accelerator.sync_gradients:
            continue                                # the update needs more micro-batches
        due = state.after_update(sample=settings.sample_every_images)
        ...                                         # what is measured goes into the log before the checkpoint
        state.save_if(due)

The loops are train/diffusion.py and train/prior.py.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm_vae.core.launch import StopSignal
from ldm_vae.latent_store.read.loader import LatentLoader
from ldm_vae.run.ema import Ema
from ldm_vae.run.folder import (
    global_batch,
    prepare_network,
    prepare_run_folder,
    progress_bar,
    resume,
    save,
    stopped,
    what_is_due,
)
from ldm_vae.run.inputs import compare_store
from ldm_vae.run.metrics_log import Averages, Logbook, check_finite
from ldm_vae.run.optim import schedule, set_learning_rate, trainable_parameters
from ldm_vae.run.store_training import StoreTraining


class SingleNetwork:
    """State of such a run, as its newest checkpoint left it: resume is the same command again.

    module: its forward is that of training and goes through `accelerator.prepare`, so that DDP's hooks fire;
    `module.network` is what is averaged and saved, under `name`. Weights are fp32, autocast is Accelerate's.
    """

    def __init__(
        self,
        settings: StoreTraining,
        accelerator: Accelerator,
        name: str,
        module: Any,
        loader: LatentLoader,
        may_change: Collection[str],
    ) -> None:
        self.settings, self.accelerator, self.name = settings, accelerator, name
        self.network = module.network
        self.ema = Ema(self.network, settings.ema_halflife_images)
        self.ema.module.to(accelerator.device)
        prepare_network(self.network, settings)
        prepare_run_folder(settings, accelerator, may_change)
        optimizer = settings.optimizer.build(trainable_parameters([module]), settings.learning_rate)
        self.optimizer = accelerator.prepare(optimizer)
        self.model = accelerator.prepare(module)
        self.averages = Averages()
        self.stateful: dict[str, Any] = {
            name: self.network, "optimizer": self.optimizer, "ema": self.ema, "averages": self.averages,
            "loader": loader,
        }  # fmt: skip
        if accelerator.scaler is not None:
            self.stateful["scaler"] = accelerator.scaler
        self.batch_images = global_batch(settings, accelerator)
        self.images_seen = 0
        self.newest: Path | None = None
        if (found := resume(settings, accelerator, self.stateful)) is not None:
            self.newest, self.images_seen = found[0], found[1]["images_seen"]
        run = settings.output_dir
        self.logbook = Logbook(run / "metrics.jsonl", accelerator)
        self.logbook.cut_back(self.images_seen if self.newest else -1)
        compare_store(run, "latents", loader.dataset.manifest, accelerator, resumed=self.newest is not None)
        self.bar = progress_bar(settings, self.images_seen)
        self._logged_at = self.images_seen
        self._rate = 0.0
        self._signals, self._stop = StopSignal(), 0

    @property
    def ended(self) -> bool:
        """All images were seen."""
        return self.images_seen >= self.settings.max_train_images

    def set_learning_rate(self) -> None:
        """The rate of the update at hand."""
        settings = self.settings
        factor = schedule(self.images_seen, settings.lr_warmup_images, settings.max_train_images, settings.lr_schedule)
        self._rate = factor * settings.learning_rate
        set_learning_rate(self.optimizer, self._rate)

    def learn(self, loss: torch.Tensor) -> None:
        """A backward pass, and behind an update's last micro-batch the step; called under `accelerator.accumulate`."""
        accelerator, settings = self.accelerator, self.settings
        accelerator.backward(loss)
        logs = {"loss/total": loss.detach()}
        if accelerator.sync_gradients:
            limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
            norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:  # the fp16 scaler's searching
            logs[f"gradient_norm/{self.name}"] = norm.detach()
        self.optimizer.zero_grad()
        self.averages.update(logs)

    def after_update(self, **every: int | None) -> dict[str, bool]:
        """Count an update, average the weights, write the log where it is due; which events are: `log`, `checkpoint`
        and those of `every` (intervals in images).

        Raises:
            WorkError: the loss became NaN or infinite.
        """
        settings, accelerator = self.settings, self.accelerator
        self.images_seen += self.batch_images
        self.ema.update(self.network, self.images_seen, self.batch_images)
        self.bar.update(self.batch_images)
        # each when a multiple of its interval has been crossed, and all at the end
        due = what_is_due(
            settings, self.images_seen, self.batch_images,
            log=settings.log_every_images, checkpoint=settings.checkpoint_every_images, **every,
        )  # fmt: skip
        self._stop = self._signals.agreed(accelerator)
        if any(due.values()) or self._stop:
            means = self.averages.means(accelerator)
            kept = f"{self.newest} is kept" if self.newest else "there was no checkpoint yet"
            check_finite(means, self._logged_at, self.images_seen, kept)
        if due["log"]:
            self.averages.reset()
            self._logged_at = self.images_seen
            self.logbook.write(self.images_seen, means | {"learning_rate": self._rate})
            self.bar.report({"loss": f"{means['loss/total']:.3g}"})
        return due

    def save_if(self, due: dict[str, bool]) -> None:
        """A checkpoint where one is due or a signal came. Raises Stopped for the signal."""
        if due["checkpoint"] or self._stop:
            self.newest = save(
                self.settings, self.accelerator, self.images_seen, self.stateful, {self.name: self.network},
                self.averages,
            )  # fmt: skip
        if self._stop:
            raise stopped(self.accelerator, self._stop, self.newest)
