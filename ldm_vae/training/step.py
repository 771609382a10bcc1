"""Training step: one forward of the autoencoder, shared by generator and discriminator.

The graph is cut at the reconstruction. Pixel terms and the adversary each give a cotangent there (their own graphs are
freed before the autoencoder's backward), the two are balanced at the last layer, and one backward carries their sum
through decoder and encoder. An f8 network (widths 64 to 256, two images of 128 px) costs 419 GFLOP a step so;
latent-diffusion's two forwards and two retained backwards cost 596.

Legend: B batch, C image channels, T frames of a clip, H W pixels, c latent channels, h w latent positions.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_vae.autoencoder.latents import Moments
from ldm_vae.autoencoder.trainable import Reconstruction, TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.discriminators import heads_of
from ldm_vae.run.optim import trainable_parameters
from ldm_vae.training.adaptive_weight import adaptive_ratio
from ldm_vae.training.adversary import Adversary
from ldm_vae.training.monitor import logit_statistics
from ldm_vae.training.objective import Logs, Objective


@dataclass
class TrainingStep:
    """One update, or one micro-batch of it. model and discriminator are what `accelerator.prepare` returned, and so are
    the optimisers."""

    accelerator: Accelerator
    model: nn.Module
    objective: Objective
    optimizer: Any
    adversary: Adversary
    discriminator: nn.Module | None = None
    discriminator_optimizer: Any = None
    max_grad_norm: float | None = None
    skip_nan: bool = False

    def __post_init__(self) -> None:
        wants, critic = self.adversary.config.feature_matching, self.discriminator
        if wants and critic is not None and not getattr(self._critic, "gives_features", False):
            raise UsageError(
                f"adversary.feature_matching: expected a discriminator that gives its features (kind waveform), or 0; "
                f"{type(self._critic).__name__} gives logits alone"
            )

    def __call__(
        self, images: torch.Tensor, noise: torch.Tensor, images_seen: int = 0, stored: Moments | None = None
    ) -> Logs:
        """Train on images [B, C, H, W] in [-1, 1] and keyed noise [B, n, h, w] of this process, or on clips [B, C, T,
        H, W] and [B, n, t, h, w]; detached scalars by name.

        stored: the images' moments, where the decoder alone is trained.

        With gradient accumulation each call is one micro-batch, all of an update with the same `images_seen`; weights,
        and whatever else moves, move at the last of them.
        """
        # both in one context: DDP synchronises neither of them before the update's last micro-batch
        networks = [self.model] if self.discriminator is None else [self.model, self.discriminator]
        with self.accelerator.accumulate(*networks):
            reconstruction = self.model(images, noise, images_seen, stored)
            logs = self._autoencoder(reconstruction, images_seen)
            if self.adversary.discriminator_plays(images_seen):
                logs |= self._discriminator(reconstruction, images_seen)
        return logs

    # --- the step -----------------------------------------------------------------------------------------------------

    def _autoencoder(self, reconstruction: Reconstruction, images_seen: int) -> Logs:
        # a leaf: the terms' own graphs end here, so they are freed before the autoencoder's backward begins
        pixels = reconstruction.pixels.detach().requires_grad_()
        pixel_total, logs = self.objective.pixel_terms(pixels, reconstruction, images_seen)
        # parameters of the terms themselves (a learned variance, a projection) get their gradients in the same pass
        own = trainable_parameters([self.objective])
        cotangent, *own_gradients = torch.autograd.grad(pixel_total, [pixels, *own], materialize_grads=True)
        logs["loss/pixels"] = pixel_total.detach()

        if self.adversary.generator_plays(images_seen):
            weighted, adversary_logs = self._adversary_cotangent(pixels, cotangent, reconstruction)
            cotangent = cotangent + weighted
            logs |= adversary_logs

        # terms on latents keep their graph, which reaches the encoder
        latent_total, latent_logs = self.objective.latent_terms(reconstruction, images_seen)
        logs |= latent_logs
        logs |= self.objective.bound(logs, reconstruction.images)
        logs["loss/total"] = logs["loss/pixels"] + latent_total.detach()
        # a surrogate with the gradients found above: DDP, accumulation and the fp16 scaler see an ordinary loss
        surrogate = (reconstruction.pixels * cotangent).sum() + latent_total
        surrogate = surrogate + sum((p * gradient).sum() for p, gradient in zip(own, own_gradients, strict=True))
        self.accelerator.backward(surrogate)
        if self.accelerator.sync_gradients:  # the objective is no DDP module: its terms run on a cut graph
            for parameter in own:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        if not self.accelerator.sync_gradients:
            return logs
        taken, update_logs = self._update(
            self.optimizer, "autoencoder", trainable_parameters([self.model, self.objective])
        )
        bottleneck = self._network.bottleneck
        if taken:
            self.objective.after_update()
            update_logs |= bottleneck.after_update(self._network.vae)
        else:
            self.objective.leave_out()
            bottleneck.leave_out()
        return logs | update_logs

    def _adversary_cotangent(
        self, pixels: torch.Tensor, pixel_cotangent: torch.Tensor, reconstruction: Reconstruction
    ) -> tuple[torch.Tensor, Logs]:
        # with respect to the pixels only: no gradient reaches the discriminator's weights, and unwrapped, so that DDP
        # does not wait for any
        loss, matching = self._generator_losses(reconstruction, pixels)
        (cotangent,) = torch.autograd.grad(loss + sum(matching.values()), pixels)
        weight = loss.new_full((), self.adversary.config.weight)  # no copy from the host
        if self.adversary.config.adaptive:
            layer = self._network.last_layer
            weight = weight * adaptive_ratio(self.accelerator, layer, reconstruction, pixel_cotangent, cotangent)
        logs = {name: value.detach() for name, value in matching.items()} | {
            "adversary/generator": loss.detach(),
            "adversary/weight": weight,
            "adversary/weight_on_sums": weight * pixels[0].numel(),  # compares with the logs of latent-diffusion
        }
        return weight * cotangent, logs

    def _generator_losses(self, reconstruction: Reconstruction, pixels: torch.Tensor) -> tuple[torch.Tensor, Logs]:
        fake = reconstruction.seen(pixels, self._judged)
        if not self.adversary.config.feature_matching:
            return self.adversary.generator_loss(self._critic(fake)), {}
        logits, features = self._critic(fake, features=True)
        with torch.no_grad():  # of the original only the values
            _, wanted = self._critic(reconstruction.seen(reconstruction.target, self._judged), features=True)
        matching = self.adversary.feature_matching(wanted, features)
        return self.adversary.generator_loss(logits), {"adversary/feature_matching": matching}

    def _discriminator(self, reconstruction: Reconstruction, images_seen: int) -> Logs:
        assert self.discriminator is not None
        # only the values of the reconstruction
        both = (reconstruction.target, reconstruction.pixels.detach())
        real, fake = (reconstruction.seen(one, self._judged) for one in both)
        count = len(reconstruction.images)  # clips, as images_seen counts them, and not their frames
        micro_batches = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
        # decided by the images of the whole update, so all its micro-batches and ranks agree
        r1_due = self.adversary.r1_due(images_seen, count * micro_batches)
        real = real.detach().requires_grad_(r1_due)
        # fused attention has no second derivative, which R1 takes
        attention = sdpa_kernel(SDPBackend.MATH) if r1_due else contextlib.nullcontext()
        # one forward over both halves: DDP allows one per backward, and the default group norm does not mix images
        with attention:
            heads = heads_of(self.discriminator(torch.cat([real, fake])))
        real_logits, fake_logits = zip(*(head.chunk(2) for head in heads), strict=True)
        loss = self.adversary.discriminator_loss(real_logits, fake_logits)
        logs = {"adversary/discriminator": loss.detach()}
        logs |= logit_statistics(real_logits, fake_logits, self.adversary.boundary)
        if r1_due:
            penalty = self.adversary.r1(real, real_logits)
            loss, logs = loss + penalty, logs | {"adversary/r1": penalty.detach()}
        if self.adversary.config.lecam_weight > 0:
            penalty = self.adversary.lecam(real_logits, fake_logits, count)
            loss, logs = loss + penalty, logs | {"adversary/lecam": penalty.detach()}
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return logs
        parameters = trainable_parameters([self.discriminator])
        # LeCAM's averages and spectral norms move only with the weights
        taken, update_logs = self._update(self.discriminator_optimizer, "discriminator", parameters)
        if taken:
            self.adversary.after_update()
            if hasattr(self._critic, "after_update"):
                self._critic.after_update()
        else:
            self.adversary.leave_out()
        return logs | update_logs

    # ------------------------------------------------------------------------------------------------------------------

    def _update(self, optimizer: Any, name: str, parameters: list[nn.Parameter]) -> tuple[bool, Logs]:
        """End an update: True if the weights moved, False if it was left out; and its logs."""
        # of this optimiser alone: accelerator.clip_grad_norm_ unscales all of them, and the discriminator's earlier
        # micro-batches would be divided twice
        self.accelerator.unscale_gradients(optimizer)
        # without a limit the norm is still measured, for the log and for skip_nan
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit).detach()
        logs: Logs = {}
        taken = True
        if self.skip_nan:  # gradients are averaged over the ranks, so all of them skip or none does
            taken = bool(torch.isfinite(norm))
            if not taken:
                optimizer.zero_grad()
            logs[f"skipped/{name}"] = norm.new_tensor(float(not taken))
        self._optimizer_step(optimizer)
        if getattr(optimizer, "step_was_skipped", False):  # the fp16 scaler looks for its scale: no norm to speak of
            return False, logs
        return taken, logs | {f"gradient_norm/{name}": norm}

    def _optimizer_step(self, optimizer: Any) -> None:
        scaler = self.accelerator.scaler
        # the scale that the gradients at hand were multiplied by
        before = None if scaler is None else scaler.get_scale()
        optimizer.step()
        optimizer.zero_grad()
        if scaler is not None and (ratio := scaler.get_scale() / before) != 1 and self.discriminator is not None:
            # its earlier micro-batches hold gradients times the scale that was
            for parameter in trainable_parameters([self.discriminator]):
                if parameter.grad is not None:
                    parameter.grad *= ratio

    # once for a step's life: to unwrap a network asks the disk for packages, 1 ms each, eight times an update
    @functools.cached_property
    def _critic(self) -> Any:
        return self.accelerator.unwrap_model(self.discriminator)

    @functools.cached_property
    def _network(self) -> TrainableAutoencoder:
        network = self.accelerator.unwrap_model(self.model)
        assert isinstance(network, TrainableAutoencoder)
        return network

    @property
    def _judged(self) -> str:
        """The domain that the discriminator judges."""
        return getattr(self._critic, "domain", "pixels")
