"""The state of a training run: networks, averages and optimisers, built once, advanced by the loop, saved whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ldm_vae.autoencoder.checkpointing import enable_checkpointing
from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.autoencoder.weights.checkpoint import AVERAGE, describe
from ldm_vae.core.errors import WorkError
from ldm_vae.run.ema import Ema
from ldm_vae.run.folder import global_batch, prepare_network, resume, save
from ldm_vae.run.metrics_log import Averages
from ldm_vae.run.optim import schedule, set_learning_rate, trainable_parameters
from ldm_vae.training.adversary import Adversary
from ldm_vae.training.config import Training, build_discriminator, build_network, build_objective
from ldm_vae.training.objective import Objective
from ldm_vae.training.smallest_crop import check_smallest
from ldm_vae.training.step import TrainingStep
from ldm_vae.training.teachers import check_teachers


@dataclass
class TrainingState:
    """Networks, averages and optimisers of a run, and how far it is.

    `network` and `critic` are the bare modules, whose names are in checkpoints; the step holds what Accelerate made of
    them. `images_seen` counts the images of all processes.
    """

    settings: Training
    accelerator: Accelerator
    network: TrainableAutoencoder
    objective: Objective
    adversary: Adversary
    critic: nn.Module | None
    ema: Ema
    ema_objective: Ema
    optimizer: Any
    critic_optimizer: Any
    step: TrainingStep
    averages: Averages
    frozen_encoder: str | None
    """Fingerprint of an encoder that is held and does not learn."""
    images_seen: int = 0
    best: dict[str, Any] | None = None
    newest: Path | None = None
    """The last checkpoint."""

    @property
    def batch_images(self) -> int:
        """Images of one update."""
        return global_batch(self.settings, self.accelerator)

    @property
    def stateful(self) -> dict[str, Any]:
        """Contents of a checkpoint, by name."""
        found = {
            "autoencoder": self.network.vae, "objective": self.objective, "optimizer": self.optimizer,
            AVERAGE: self.ema, "ema_objective": self.ema_objective, "averages": self.averages,
        }  # fmt: skip
        if self.network.bottleneck.state_dict():
            found["bottleneck"] = self.network.bottleneck
        if self.critic is not None:
            found |= {"adversary": self.adversary, "discriminator": self.critic,
                      "discriminator_optimizer": self.critic_optimizer}  # fmt: skip
        if self.accelerator.scaler is not None:
            found["scaler"] = self.accelerator.scaler
        return found

    def resume(self) -> bool:
        """Go on from the newest checkpoint; whether there was one."""
        if (found := resume(self.settings, self.accelerator, self.stateful)) is None:
            return False
        self.newest, info = found
        self.images_seen, self.best = info["images_seen"], info["best"]
        return True

    def save(self) -> None:
        """Write a checkpoint, after the ranks were found equal."""
        networks = {"autoencoder": self.network.vae, "objective": self.objective}
        networks |= {} if self.critic is None else {"discriminator": self.critic}
        self.newest = save(
            self.settings, self.accelerator, self.images_seen, self.stateful, networks, self.averages, self.best,
            describe(self.ema.module, self.settings.resolution),
        )  # fmt: skip

    def set_learning_rate(self) -> float:
        """Set the rates that the schedule has for the images seen so far; that of the autoencoder."""
        settings = self.settings
        factor = schedule(self.images_seen, settings.lr_warmup_images, settings.max_train_images, settings.lr_schedule)
        set_learning_rate(self.optimizer, factor * settings.learning_rate)
        if self.critic_optimizer is not None:
            rate = settings.discriminator_learning_rate or settings.learning_rate
            set_learning_rate(self.critic_optimizer, factor * rate)
        return factor * settings.learning_rate

    def count_update(self) -> None:
        """Count the images of an update that was made, and move the averages towards it."""
        self.images_seen += self.batch_images
        self.ema.update(self.network.vae, self.images_seen, self.batch_images, self.network.bottleneck.copied)
        self.ema_objective.update(self.objective, self.images_seen, self.batch_images)

    def check_encoder(self) -> None:
        """Raises WorkError if an encoder that does not learn has changed: stores made with it would be stale."""
        if self.frozen_encoder is None:
            return
        if encoder_fingerprint(self.ema.module) != self.frozen_encoder:
            raise WorkError("trainable: the frozen encoder changed; nothing was exported")
        self.accelerator.print(f"the encoder is unchanged ({self.frozen_encoder[:12]}): stores made with it stay valid")


def build_state(settings: Training, accelerator: Accelerator, vae: Any) -> TrainingState:
    """Networks, averages and optimisers around `vae`, as they are before the first update.

    Accelerate wraps networks (DDP, autocast) and optimisers, not the data: the stream is sharded by its keys.

    Raises:
        UsageError: a loss or the discriminator has no room in the smallest crop; a teacher prepares images otherwise.
    """
    check_smallest(settings, vae)
    ema = Ema(vae, settings.ema_halflife_images)
    if settings.gradient_checkpointing:
        enable_checkpointing(vae)
    ema.module.to(accelerator.device)
    network = build_network(settings, vae)
    held = settings.latent_store is None
    frozen_encoder = encoder_fingerprint(vae) if held and not network.encoder_learns else None
    check_teachers(settings, vae)
    objective = build_objective(settings).to(accelerator.device)
    ema_objective = Ema(objective, settings.ema_halflife_images)  # of its own parameters: a likelihood's variance
    objective.attach(network)
    adversary = Adversary(settings.adversary).to(accelerator.device)
    critic = build_discriminator(settings)
    for module in [network] if critic is None else [network, critic]:
        prepare_network(module, settings)
    optimizer = accelerator.prepare(
        settings.optimizer.build(trainable_parameters([network, objective]), settings.learning_rate)
    )
    model = accelerator.prepare(network)
    discriminator, critic_optimizer = None, None
    if critic is not None:
        rate = settings.discriminator_learning_rate or settings.learning_rate
        critic_optimizer = accelerator.prepare(settings.optimizer.build(trainable_parameters([critic]), rate))
        discriminator = accelerator.prepare(critic)
    skip_nan = settings.on_nan == "skip"
    step = TrainingStep(
        accelerator, model, objective, optimizer, adversary, discriminator, critic_optimizer, settings.max_grad_norm,
        skip_nan,
    )  # fmt: skip
    return TrainingState(
        settings, accelerator, network, objective, adversary, critic, ema, ema_objective, optimizer, critic_optimizer,
        step, Averages(skip_nan), frozen_encoder,
    )  # fmt: skip
