"""Config of a diffusion run: its knobs, the store it reads, its network. The loop is train/diffusion.py.

Legend: B batch, c latent channels, h w latent positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from pydantic import Field
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm_vae.autoencoder.fingerprint import encoder_fingerprint
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import NormalisationKind
from ldm_vae.autoencoder.trainable import count_parameters
from ldm_vae.core import config, rng
from ldm_vae.core.config import choice
from ldm_vae.core.errors import UsageError
from ldm_vae.core.flop_counter import Cost, gpu_autocast
from ldm_vae.denoisers.dit import Config as DiTConfig
from ldm_vae.diffusion.flow import Denoiser, FlowConfig, SamplingConfig
from ldm_vae.latent_store.format.manifest import place_of, read_manifest
from ldm_vae.latent_store.read.dataset import LatentDataset
from ldm_vae.latent_store.read.loader import LatentLoader
from ldm_vae.run.folder import MAY_CHANGE as ANY_RUN_MAY_CHANGE
from ldm_vae.run.folder import RunConfig
from ldm_vae.run.optim import OptimizerConfig

GB = 1e9


class DiffusionTraining(RunConfig):
    """All knobs of a run."""

    latents: str
    """The latent store: a folder, or a URL."""
    vae: str | None = None
    """Decoder of the samples: a folder, a hub id, a single file or a run; default: the VAE that the store names."""
    label_column: str | None = None
    """The store's column that holds the class: any value, each its own class. Default: `label` where there is one."""
    conditional: bool = True
    """False leaves labels out."""
    view: str = ""
    """View of the store: "" the centre crop, flip, ..., or random, another one each epoch."""
    normalisation: NormalisationKind | None = None
    """Of the latents, from the store's statistics; default: the one that the VAE's config.json named."""
    crop: int | None = Field(None, gt=0)
    """Train on random crops of so many latent positions a side instead of whole latents: for stores of few large
    images."""
    flow: FlowConfig = FlowConfig()
    denoiser: choice("ldm_vae.denoisers", default="dit") = DiTConfig()  # type: ignore[valid-type]
    """The network."""
    optimizer: OptimizerConfig = OptimizerConfig(kind="adamw", betas=(0.9, 0.999), eps=1e-8)
    sampling: SamplingConfig = SamplingConfig()
    """Of the pictures and of what is measured; other samplers can be chosen later."""
    sample_every_images: int | None = Field(None, gt=0)
    """A grid of decoded samples in RUN/samples, of the averaged weights; there is one at the end in any case."""
    sample_images: int = Field(32, gt=0, le=2**16)
    """Pictures in a grid; the same noise each time."""
    measure_images: int = Field(256, ge=0)
    """Samples that are compared with as many decoded latents at the end; 0: none."""
    clip: str | None = None
    """A CLIP as transformers has it, a folder or its hub id: that comparison is made by CMMD too."""


MAY_CHANGE = (*ANY_RUN_MAY_CHANGE, "vae", "sampling.method", "sampling.steps", "sampling.guidance",
              "sample_every_images", "sample_images", "measure_images", "clip")  # fmt: skip


# --- the store --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredLatents:
    """A store as this training reads it: latents of one `shape` (c, h, w), and the values that are its classes, with
    what pictures call them."""

    dataset: LatentDataset
    shape: tuple[int, int, int]
    label_column: str | None
    classes: tuple[Any, ...]
    crop: int | None
    seed: int
    names: tuple[str, ...] = ()

    @property
    def none(self) -> int:
        """The label that stands for none."""
        return len(self.classes)

    def batches(self, loader: LatentLoader, images_seen: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
        """(latents [B, c, h, w], labels [B], the samples' positions in the global stream), for ever, from the loader's
        own place on, which is that of `images_seen`."""
        number_of = {value: number for number, value in enumerate(self.classes)}
        schedule = loader.schedule
        # the positions that this rank's images have in the global batch, by which noise and times are keyed
        start = images_seen + schedule.rank * schedule.batch_size
        while True:
            for batch in loader:
                latents = batch["latents"]
                positions = list(range(start, start + len(latents)))
                # an image without a label trains the unconditional model
                labels = torch.full((len(latents),), self.none)
                if self.label_column is not None:
                    values = batch[self.label_column]
                    values = values.tolist() if isinstance(values, torch.Tensor) else values
                    labels = torch.tensor([number_of.get(value, self.none) for value in values])
                yield self.cropped(latents, positions), labels, positions
                start += schedule.batch_size * schedule.world_size

    def cropped(self, latents: torch.Tensor, keys: Sequence[int]) -> torch.Tensor:
        """latents [B, c, H, W] => [B, c, h, w], each at a place drawn by its key."""
        if self.crop is None:
            return latents
        rows = []
        for latent, key in zip(latents, keys, strict=True):
            # by position in the stream: another place each epoch, the same after a resume
            draw = rng.generator(self.seed, "latent crop", key)
            top, left = (int(draw.integers(side - self.crop + 1)) for side in latent.shape[1:])
            rows.append(latent[:, top : top + self.crop, left : left + self.crop])
        return torch.stack(rows)

    def some(self, count: int) -> Iterator[torch.Tensor]:
        """`count` latents [c, h, w] of the store, evenly spread, cropped as in training; some come twice if need be."""
        for key in range(count):
            index = key * len(self.dataset) // count if count <= len(self.dataset) else key % len(self.dataset)
            yield self.cropped(self.dataset[index]["latents"][None], [key])[0]

    def originals(self, count: int) -> torch.Tensor:
        """`count` latents [count, c, h, w] to show beside as many samples: every class in turn, cropped as in training;
        some come twice if need be."""
        if not self.classes or self.label_column is None:
            return torch.stack(list(self.some(count)))
        rows: dict[Any, list[int]] = {value: [] for value in self.classes}
        for index, value in enumerate(self.dataset.column(self.label_column)):
            if value is not None and len(rows[value]) * len(self.classes) < count:
                rows[value].append(index)
        turns = [(key // len(self.classes), rows[self.classes[key % len(self.classes)]]) for key in range(count)]
        found = [self.dataset.read([own[turn % len(own)]], [0], ())["latents"] for turn, own in turns]
        return torch.cat([self.cropped(latents, [key]) for key, latents in enumerate(found)])


def open_latents(settings: DiffusionTraining) -> StoredLatents:
    """The store of the config.

    Raises:
        UsageError: there is none, it holds indices or several shapes, or has no such column, view or crop.
    """
    manifest = read_manifest(place_of(settings.latents))
    if manifest.identity.codes is not None:
        raise UsageError(
            f"latents {settings.latents}: holds indices of codes; a diffusion model needs vectors, which "
            "`ldm-vae encode --store mean` keeps"
        )
    column = settings.label_column if settings.conditional else None
    if column is None and settings.conditional and "label" in manifest.columns:
        column = "label"
    if column is not None and column not in manifest.columns:
        raise UsageError(f"label_column: the store has no {column}; it has {', '.join(manifest.columns)}")
    dataset = LatentDataset(
        settings.latents, seed=settings.seed, view=settings.view, normalisation=settings.normalisation,
        columns=() if column is None else (column,),
    )  # fmt: skip
    shapes = list(dataset.shapes())
    if len(shapes) != 1:
        listed = ", ".join("x".join(map(str, shape)) for shape in shapes)
        raise UsageError(f"latents {settings.latents}: expected one latent shape, it holds {listed}")
    channels, *sides = shapes[0]
    if settings.crop is not None:
        if settings.crop > min(sides):
            raise UsageError(f"crop: expected at most {min(sides)}, the side of the latents, got {settings.crop}")
        sides = [settings.crop, settings.crop]
    values = [] if column is None else dataset.column(column)
    classes = tuple(sorted({value for value in values if value is not None}))
    names = _names(dataset, column, values, classes)
    return StoredLatents(dataset, (channels, sides[0], sides[1]), column, classes, settings.crop, settings.seed, names)


def _names(
    dataset: LatentDataset, column: str | None, values: Sequence[Any], classes: Sequence[Any]
) -> tuple[str, ...]:
    """Names of the classes in pictures: of a number its folder, of an image's key its file, where no two are
    the same; else the value."""
    if column == "label" and "label_name" in dataset.manifest.columns:
        known = dict(zip(values, dataset.column("label_name"), strict=True))
        return tuple(str(known[value]) for value in classes)
    stems = tuple(PurePosixPath(str(value)).stem for value in classes)
    return stems if column == "key" and len({*stems}) == len(stems) else tuple(map(str, classes))


def load_decoder(settings: DiffusionTraining, latents: StoredLatents) -> Any:
    """The VAE that decodes samples.

    Raises:
        UsageError: it is not there, or its encoder did not make the store.
    """
    manifest = latents.dataset.manifest
    name = settings.vae or manifest.recorded.vae
    if not name:  # of a store that `write_store` was not told a name for
        raise UsageError(f"vae: {settings.latents} does not name the VAE that made it; expected its folder or hub id")
    try:
        vae = load_autoencoder(name)
    except UsageError as error:
        if settings.vae is not None:
            raise
        raise UsageError(f"vae: the store was made with {name}, which is not found from here ({error})") from error
    # a decoder of other latents would draw noise without a word
    if encoder_fingerprint(vae) != manifest.identity.encoder:
        raise UsageError(f"vae {name}: its encoder is not the one that made {settings.latents}")
    return vae


# --- the network ------------------------------------------------------------------------------------------------------


def build_denoiser(settings: DiffusionTraining, latents: StoredLatents) -> Denoiser:
    """Build the network with random weights, drawn by the seed."""
    channels, *size = latents.shape
    with rng.seeded(settings.seed):
        network = settings.denoiser.build(channels, tuple(size), len(latents.classes))
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return Denoiser(network.train(), len(latents.classes))


def count_step(
    build: Callable[[], Denoiser], shape: Sequence[int], batch: int, mixed_precision: str = "no"
) -> tuple[int, float, dict[str, int]]:
    """(parameters, GFLOP of a training step per image, bytes by what holds them) of a network on latents of this shape
    [c, h, w], counted on tensors without content."""
    with FakeTensorMode(), gpu_autocast(mixed_precision):
        denoiser = build()
        latents = torch.empty(batch, *shape)
        labels = torch.zeros(batch, dtype=torch.long)
        with Cost() as cost:
            times = torch.rand(batch)
            (denoiser(latents, times, labels) - latents).square().mean().backward()
    parameters = count_parameters(denoiser.parameters())
    # 4 bytes a number; Adam has two moments
    held = {"weights": 4 * parameters, "averaged weights": 4 * parameters, "Adam's moments": 8 * parameters}
    return parameters, cost.flops / batch / 1e9, held | {"activations and gradients": cost.peak_bytes}


def describe(settings: DiffusionTraining, processes: int = 1) -> str:
    """Text that `--dry_run` prints: the resolved config as YAML, then the cost as comments.

    Raises:
        UsageError: the config does not hold together, or the store is not there.
    """
    latents = open_latents(settings)
    parameters, gflop, held = count_step(
        lambda: build_denoiser(settings, latents),
        latents.shape,
        settings.train_batch_size,
        settings.mixed_precision,
    )
    batch = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    count = len(latents.dataset)
    labels = f"{len(latents.classes)} classes of `{latents.label_column}`" if latents.classes else "unconditional"
    memory = ", ".join(f"{name} {value / GB:.2f}" for name, value in held.items())
    lines: Mapping[str, str] = {
        "latents": f"{count:,} of {' x '.join(map(str, latents.shape))}, {labels}",
        "parameters": f"{parameters / 1e6:.2f} M; {gflop:.4g} GFLOP a training step and image",
        "memory, GB": f"{memory}; peak about {sum(held.values()) / GB:.1f} in a process",
        "run": f"{settings.max_train_images // batch:,} updates of {batch}, "
        f"{settings.max_train_images / count:.3g} epochs, {settings.max_train_images * gflop / 1e3:.4g} TFLOP",
    }
    return config.dump(settings) + "".join(f"# {name + ':':12} {text}\n" for name, text in lines.items())
