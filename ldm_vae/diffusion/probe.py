"""Diffusability probe: the same small network learns the latents of each VAE, and its error compares them.

Three things can be held equal between latent spaces of different shapes: images, tokens, and operations. A
latent [c, h, w] is cut into patches so that each space gives equally many tokens; if operations still differ by more
than the tolerance, the width of a head is moved until they do not. Denoising losses do not compare between spaces.

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.core.rng import seeded
from ldm_vae.denoisers.dit import Config as DiT
from ldm_vae.diffusion.config import count_step
from ldm_vae.diffusion.flow import Denoiser, FlowConfig, draw_flow
from ldm_vae.latent_store.read.dataset import LatentDataset
from ldm_vae.run.ema import Ema
from ldm_vae.run.optim import schedule, set_learning_rate
from ldm_vae.run.store_training import StoredSamples

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Recipe:
    """Training recipe of every probe: AdamW, a cosine after the warm-up, averaged weights; shares are of
    train_images."""

    train_images: int = 32_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    ema_share: float = 0.05
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Matched:
    """The network of one latent shape: config, tokens of a latent, parameters, GFLOP of a training step and image."""

    config: DiT
    tokens: int
    parameters: int
    gflop: float


# --- equal work -------------------------------------------------------------------------------------------------------


def match(shapes: Sequence[Shape], base: DiT, *, most_tokens: int = 256, tolerance: float = 0.05) -> list[Matched]:
    """Networks like `base` for latents of these shapes (c, h, w), with equally many tokens and, within the tolerance,
    the operations of the first.

    Raises:
        UsageError: there is no common number of tokens, or the operations cannot be brought together.
    """
    choices = [_patches(shape) for shape in shapes]
    common = sorted(set.intersection(*(set(choice) for choice in choices)))
    if common == [1] and any(min(shape[1:]) > 1 for shape in shapes):  # one token is the whole latent
        listed = ", ".join(
            f"{'x'.join(map(str, shape))} {sorted(choice)}" for shape, choice in zip(shapes, choices, strict=True)
        )
        raise UsageError(f"vae: these latents have no common number of tokens: {listed}")
    tokens = max((count for count in common if count <= most_tokens), default=common[0])
    matched = [_count(base.model_copy(update={"patch_size": choice[tokens]}), shape, tokens)
               for choice, shape in zip(choices, shapes, strict=True)]  # fmt: skip
    return [_moved(one, shape, matched[0].gflop, tolerance) for one, shape in zip(matched, shapes, strict=True)]


def _patches(shape: Shape) -> dict[int, int]:
    """Patch sizes by the number of tokens that they give. Raises UsageError for what DiT does not take."""
    _, height, width = shape
    if height != width:
        raise UsageError(f"resolution: expected square latents, got {height} x {width}")
    return {(height // patch) ** 2: patch for patch in range(1, height + 1) if height % patch == 0}


def _count(config: DiT, shape: Shape, tokens: int) -> Matched:
    counted = count_step(lambda: build(config, shape, 0), shape, 1)
    return Matched(config, tokens, counted.parameters, counted.gflop)


def _moved(one: Matched, shape: Shape, wanted: float, tolerance: float) -> Matched:
    """The same with another width, where its operations are too far from those that are wanted."""

    def off(found: Matched) -> float:
        return abs(math.log(found.gflop / wanted))

    # width moves by 4 channels a head, until the next step would be farther off
    step = 4 if one.gflop < wanted else -4
    while off(one) > math.log1p(tolerance):
        head = one.config.attention_head_dim + step
        if head <= 0:
            break
        other = _count(one.config.model_copy(update={"attention_head_dim": head}), shape, one.tokens)
        if off(other) >= off(one):
            break
        one = other
    else:
        return one
    raise UsageError(
        f"tolerance: for latents {'x'.join(map(str, shape))} {one.gflop:.4g} GFLOP an image is as near as a network "
        f"comes to {wanted:.4g}, expected within {tolerance:.0%}; a wider one has finer steps"
    )


# --- one network ------------------------------------------------------------------------------------------------------


def build(config: DiT, shape: Shape, seed: int) -> Denoiser:
    """Build an unconditional network with random weights by the seed."""
    with seeded(seed):
        return Denoiser(config.build(shape[0], shape[1:], 0), 0)


def fit(
    dataset: LatentDataset, network: Matched, recipe: Recipe, seed: int, device: torch.device, title: str
) -> tuple[Denoiser, float]:
    """Train one network on all latents of a store; (averaged weights in eval mode, mean loss of the last tenth).

    Raises:
        WorkError: the loss became NaN or infinite.
    """
    channels, height, width = next(iter(dataset.shapes()))
    latents = StoredSamples(dataset, (channels, height, width), None, (), None, seed)
    denoiser = build(network.config, (channels, height, width), seed).to(device).train()
    total, batch, flow_config = recipe.train_images, recipe.batch_size, FlowConfig()
    ema = Ema(denoiser, round(recipe.ema_share * total))
    optimizer = torch.optim.AdamW(denoiser.parameters(), recipe.learning_rate, weight_decay=0.0)
    losses = []
    loader = dataset.loader(batch, seed=seed)
    for step, (clean, labels, positions) in enumerate(
        Progress(latents.batches(loader, 0), total=total // batch, desc=title, unit="step", leave=False)
    ):
        # whole batches only: every VAE gets the same number of images
        seen = step * batch
        if seen + batch > total:
            break
        set_learning_rate(
            optimizer, recipe.learning_rate * schedule(seen, round(recipe.warmup_share * total), total, "cosine")
        )
        flow = draw_flow(clean.to(device), labels.to(device), positions, seed, flow_config, 0)
        loss = flow.loss(denoiser(flow.noised, flow.times, flow.labels))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(denoiser, seen + batch, batch)
        losses.append(loss.detach())
    # on the device until here: no step waits for a number
    mean = float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean())
    if not math.isfinite(mean):
        raise WorkError(f"{title}: the loss became NaN or infinite")
    averaged = ema.module
    assert isinstance(averaged, Denoiser)
    return averaged, mean
