"""Config of a training run: all its knobs, and the networks they describe. The loop is train/autoencoder.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from diffusers import VQModel
from pydantic import Field, model_validator
from torch import nn

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.fine_tuning import idle_parameters, resize_channels, set_trainable
from ldm_vae.autoencoder.geometry import image_channels
from ldm_vae.autoencoder.last_layer import place_of
from ldm_vae.autoencoder.lengths import check_frames
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import check_same, has_alpha, own_rate, recorded, shown
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.config import choice, choices
from ldm_vae.core.errors import UsageError
from ldm_vae.core.numbers import Positive, Side
from ldm_vae.core.rng import seeded
from ldm_vae.core.terminal import print_note
from ldm_vae.core.text import an
from ldm_vae.data.buckets import BucketConfig
from ldm_vae.data.preprocessing import SETTABLE
from ldm_vae.data.source import SourceConfig
from ldm_vae.data.transforms import TransformConfig
from ldm_vae.metrics.titles import ValidationMetric
from ldm_vae.run.folder import MAY_CHANGE as ANY_RUN_MAY_CHANGE
from ldm_vae.run.folder import RunConfig
from ldm_vae.run.optim import OptimizerConfig
from ldm_vae.training.adversary import AdversaryConfig
from ldm_vae.training.codebooks import add_codebooks, check_codebooks
from ldm_vae.training.measures import check_metrics, usual_metrics
from ldm_vae.training.objective import Objective
from ldm_vae.training.sounds import check_data, check_sounds

# kinds whose numbers of channels stay those of init_from
FIXED_SIZES = {
    **dict.fromkeys(("dc", "hunyuan_image"), "has shortcuts that average other channels with other sizes"),
    **dict.fromkeys(("ltx", "vidtok", "wan"), "is of clips"),
}


class Training(RunConfig):
    """All knobs of a run. Losses are per-pixel means, so the norms that max_grad_norm clips are small."""

    resolution: Side = 256
    """Side of the training crops in pixels; a multiple of f. (Of sounds data.samples decides.)"""
    discriminator_learning_rate: Positive | None = None
    """Of the discriminator; default: the same."""
    init: Literal["noise", "linear"] = "noise"
    """Of a network from scratch. noise: random weights. linear: the first forward is the linear code of the model's own
    size, principal components of patches of the training crops (`autoencoder/linear_init.py`); model.kind kl, vq,
    flux2, wan, oobleck or causal_oobleck."""
    init_images: int = Field(1024, gt=0)
    """Training crops that the linear code is fitted on."""
    init_from: str | None = None
    """Start from these weights: a diffusers folder, a hub id, a single file or a run."""
    ignore_mismatched_sizes: bool = False
    """With init_from: model.latent_channels and model.in_channels may be others than there; what fits is kept."""
    ignore_preprocessing: bool = False
    """Decoding as data and transform have it may differ from what init_from or a teacher records."""
    latent_store: str | None = None
    """Train the decoder alone, from the moments of this store: the encoder, that of init_from, is neither run nor held.
    Its crops are taken as they are (of `transform` only `resize` has a part: it must be the store's); pixels come from
    the store (`ldm-vae encode --pixels`), or from `data` by key, the checksum of each image compared."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the parameters that learn, in diffusers' names; later ones win, a leading ! freezes. The decoder
    alone: ["decoder.*", "post_quant_conv.*"]; the encoder then runs without a graph and stays as it is."""
    on_nan: Literal["stop", "skip"] = "stop"
    """stop: a NaN or infinite loss or gradient ends the run, the last good checkpoint stays. skip: the update is left
    out and counted (skipped/autoencoder, skipped/discriminator); waits for the device at every step."""
    validate_every_images: int | None = Field(None, gt=0)
    """Metrics of the averaged weights on validation_data."""
    validation_images: int = Field(256, gt=0)
    """At most so many images of validation_data are used."""
    validation_metrics: tuple[ValidationMetric, ...] = ("psnr", "ssim", "lpips_alex")
    """Metrics of a validation. (Of sounds by default si_sdr, snr, mel_distance and log_spectral_distance.)"""
    best_metric: ValidationMetric = "lpips_alex"
    """The checkpoint with the best of these is kept beside the newest; one of validation_metrics (mel_distance)."""
    normalisation: Literal["scale", "shift", "channel"] | None = None
    """The one normalisation measured and written into vae/config.json (scale: Stable Diffusion; shift: SD3, FLUX). By
    default that of init_from where its encoder does not learn, else scale, or channel where a class has no other."""
    normalisation_from: str | None = None
    """Write this VAE's normalisation instead: for a fine-tuned VAE whose diffusion model knows the base's latents. What
    is measured still stands beside the weights."""
    normalisation_images: int = Field(1024, gt=0)
    """Training images that it is measured on."""
    model: choice("ldm_vae.models", default="kl") = AutoencoderConfig()  # type: ignore[valid-type]
    """The network."""
    quantizer: choice("ldm_vae.quantizers") | None = None  # type: ignore[valid-type]
    """Codes of its latents, where its class has none of its own: residual, lfq or bsq, kept beside it."""
    perturbations: choices("ldm_vae.perturbations") = Field(default_factory=dict)  # type: ignore[valid-type]
    """Changes of the latents between encoder and decoder, in training alone."""
    losses: choices("ldm_vae.losses")  # type: ignore[valid-type]
    """The terms of the objective."""
    adversary: AdversaryConfig = AdversaryConfig(weight=0.0)
    discriminator: choice("ldm_vae.discriminators") | None = None  # type: ignore[valid-type]
    """The adversary's network."""
    optimizer: OptimizerConfig = OptimizerConfig()
    data: choice("ldm_vae.data.sources")  # type: ignore[valid-type]
    """The training images."""
    transform: TransformConfig = TransformConfig()
    buckets: BucketConfig | None = None
    """Aspect-ratio buckets: crops of several shapes, one shape a batch; `{step: 64}` or `{shapes: [[H, W], ...]}`."""
    validation_data: choice("ldm_vae.data.sources") | None = None  # type: ignore[valid-type]
    """The held-out images."""

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, tree: Any) -> Any:
        return usual_metrics(tree)

    @model_validator(mode="after")
    def _check(self) -> Training:
        check_metrics(self)
        if self.latent_store is not None and self.init_from is None:
            raise ValueError("latent_store: needs init_from, the autoencoder whose encoder made it")
        if self.latent_store is not None and self.buckets is not None:
            raise ValueError("latent_store: its crops are what was encoded; expected no buckets")
        kind = self.model.kind
        if self.is_built_from and self.init_from is None:
            raise ValueError(f"model.kind: {kind} needs init_from, the network that it is or is made of")
        if self.ignore_mismatched_sizes and (self.is_built_from or kind in FIXED_SIZES):
            reason = FIXED_SIZES.get(kind, "takes init_from as it is")
            raise ValueError(f"ignore_mismatched_sizes: model.kind {kind} {reason}; expected false")
        self._check_holdout()
        quantizer = getattr(self.model, "quantizer", None)
        if self.init == "linear":
            if self.init_from is not None:
                raise ValueError("init: linear is for a network from scratch; expected no init_from, or init: noise")
            if kind not in ("kl", "vq", "flux2", "wan", "oobleck", "causal_oobleck"):
                raise ValueError(f"init: linear is for kl, vq, flux2, wan, oobleck or causal_oobleck, got {kind}")
            if kind == "wan" and (self.model.is_residual or self.model.patch_size):
                raise ValueError(
                    "init: linear is for the shape of Wan 2.1; expected model.is_residual: false and no "
                    "model.patch_size, or init: noise"
                )
            if quantizer is not None and (quantizer.kind, getattr(quantizer, "distance", "")) != ("vq", "euclidean"):
                raise ValueError("init: linear needs model.quantizer.kind vq with distance euclidean, or init: noise")
        check_codebooks(self)
        if isinstance(self.data, SourceConfig) and isinstance(self.validation_data, SourceConfig):
            for name in ("value_range", "background", "alpha", "sample_rate"):
                ours, theirs = getattr(self.data, name), getattr(self.validation_data, name)
                files_differ = name == "value_range" and ours is not None and theirs is not None
                if ours != theirs and not files_differ:
                    raise ValueError(f"validation_data.{name}: expected data.{name} {shown(ours)}, got {shown(theirs)}")
        check_sounds(self)
        for name, part in (("data", self.data), ("validation_data", self.validation_data)):
            channels = getattr(part, "channels", self.model.in_channels)
            if channels != self.model.in_channels:
                raise ValueError(
                    f"{name}.channels: expected model.in_channels {self.model.in_channels}, got {channels}"
                )
        return self

    def _check_holdout(self) -> None:
        if isinstance(self.validation_data, SourceConfig) and self.validation_data.holdout is not None:
            raise ValueError("validation_data.holdout: is validated on as a whole; expected data.holdout, or none")
        if self.holdout is not None and self.validation_data is not None:
            raise ValueError(
                "data.holdout: takes the place of validation_data, which is set too; `--validation_data null` leaves "
                "that out"
            )
        if self.holdout is not None and self.latent_store is not None:
            raise ValueError(
                "data.holdout: the images of latent_store are trained on, whatever their keys; expected validation_data"
            )

    @property
    def is_built_from(self) -> bool:
        """True if the network is that of init_from, or made of it."""
        return hasattr(self.model, "build_from")

    @property
    def holdout(self) -> float | None:
        """Share of `data` that is held out, in the place of validation_data."""
        return self.data.holdout if isinstance(self.data, SourceConfig) else None

    @property
    def validated(self) -> str:
        """Name of what is validated on."""
        if self.validation_data is None:
            return f"{self.data.path}, held out"
        path: str = self.validation_data.path
        return path

    @property
    def samples(self) -> int | None:
        """Samples of an excerpt of a sound; None of images and clips."""
        return getattr(self.data, "samples", None)

    @property
    def alpha(self) -> bool:
        """True if the fourth channel of the images is alpha."""
        return bool(getattr(self.data, "alpha", False))

    @property
    def seen_channels(self) -> int:
        """Channels of what terms on pixels and the discriminator see: of images with alpha, composites."""
        return 3 if self.alpha else self.model.in_channels


# what a resumed run may change besides
MAY_CHANGE = (
    *ANY_RUN_MAY_CHANGE,
    "validate_every_images",
    "validation_images",
    "validation_metrics",
    "normalisation",
    "normalisation_from",
    "normalisation_images",
    "on_nan",
    "ignore_preprocessing",
)


def build_autoencoder(settings: Training) -> Any:
    """Build the network of `init_from`, else one with random weights drawn by the seed; `trainable` is applied.

    Raises:
        UsageError: the shape of `init_from` is not `model`, it records another preprocessing, or `trainable` names
            nothing.
    """
    frames = getattr(settings.data, "frames", None)
    if settings.is_built_from:
        return learning(_built_from(settings), settings.trainable, frames)
    # drawn whatever init_from brings: what does not fit keeps these weights, the same on every rank
    with seeded(settings.seed):
        vae = settings.model.build()
    if settings.init_from is not None:
        base = load_autoencoder(settings.init_from)
        may_differ = ("latent_channels", "in_channels") if settings.ignore_mismatched_sizes else ()
        # before the shapes, which another class has under other names
        if type(base) is not type(vae):
            ours, theirs = (family_of(one).signal == "video" for one in (vae, base))
            hint = "; model.kind inflated makes a class of clips of it" if ours and not theirs else ""
            raise UsageError(
                f"init_from {settings.init_from}: expected the class of model.kind {settings.model.kind}, "
                f"{type(vae).__name__}, got {type(base).__name__}{hint}"
            )
        for name, value in settings.model.shape().items():
            value, came = (json.loads(json.dumps(one)) for one in (value, base.config[name]))  # tuples as lists
            if came != value and name not in may_differ:
                hint = "; ignore_mismatched_sizes keeps what fits" if name in ("latent_channels", "in_channels") else ""
                field = "attention_levels" if name in ("down_block_types", "up_block_types") else name
                raise UsageError(f"model.{field}: the config says {value}, {settings.init_from} has {came}{hint}")
        check_preprocessing(settings, base, f"init_from {settings.init_from}")
        vae = resize_channels(base, add_codebooks(settings, vae, base))
    else:
        add_codebooks(settings, vae)
    check_data(settings, vae, f"model.kind {settings.model.kind}")
    return learning(vae, settings.trainable, frames)


def _built_from(settings: Training) -> Any:
    """The network of init_from, of whatever class, or what the model makes of it."""
    assert settings.init_from is not None
    vae = load_autoencoder(settings.init_from)
    if isinstance(vae, VQModel):
        raise UsageError(f"init_from {settings.init_from}: is a VQModel, which model.kind vq trains, by its quantizer")
    place_of(vae)  # raises where its decoder has no gradient
    if vae.config.get("noise_tau"):
        print_note(
            f"init_from {settings.init_from}: its noise_tau {vae.config.noise_tau:g} is left out, since no key decides "
            f"what it draws; perturbations.latent_noise with sigma {vae.config.noise_tau:g} is the same noise, keyed"
        )
    if (channels := image_channels(vae)) != settings.model.in_channels:
        raise UsageError(f"model.in_channels: expected {channels} of init_from, got {settings.model.in_channels}")
    check_data(settings, vae, f"init_from {settings.init_from}")
    check_preprocessing(settings, vae, f"init_from {settings.init_from}")
    with seeded(settings.seed):
        return add_codebooks(settings, settings.model.build_from(vae, f"init_from {settings.init_from}"), vae)


def learning(vae: Any, trainable: Sequence[str], frames: int | None = None) -> Any:
    """A network of any class in training: what `trainable` names learns, but for what has no part in the reconstruction
    of an image, or of a clip of so many frames."""
    set_trainable(vae, trainable)
    if frames is not None:
        check_frames(vae, frames, "data.frames")
    for name in (idle := idle_parameters(vae, frames)):
        vae.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in vae.parameters()):
        raise UsageError(
            f"trainable: {', '.join(trainable)} names no parameter that {an(type(vae).__name__)} lets learn; it "
            f"holds still, e.g., {idle[0]}"
        )
    return vae.train()


def check_preprocessing(settings: Training, network: Any, name: str) -> None:
    """Raises UsageError where images are prepared in another way than a network that is fed them records.

    name: of the network in the config, with its place.
    """
    if settings.ignore_preprocessing or not isinstance(settings.data, SourceConfig):
        return
    ours = replace(settings.data.decoding(), resize=settings.transform.resize)
    found = recorded(network)
    # without a record there is what its class says
    said = {"alpha": ours.alpha or has_alpha(network), "sample_rate": own_rate(network) or ours.sample_rate}
    known = replace(ours, **said) if found is None else found.decoding  # type: ignore[arg-type]
    names = {one: f"data.{one}" for one in SETTABLE} | {"resize": "transform.resize"}
    check_same("the config says", ours, name, known, names, "set that, or ignore_preprocessing: true")


def build_network(settings: Training, vae: Any, outline: bool = False) -> TrainableAutoencoder:
    """Wrap `vae` in the one forward of training: the model's bottleneck, and the perturbations in the order of the
    config.

    outline: without the weights that a perturbation would load, to count its cost.
    """
    with seeded(settings.seed):
        beside = settings.quantizer
        bottleneck = settings.model.bottleneck(vae) if beside is None else beside.build(vae)
    parts = settings.perturbations.values()
    perturbations = [part.outline(settings.seed) if outline else part.build(settings.seed) for part in parts]
    return TrainableAutoencoder(vae, bottleneck, perturbations, settings.alpha)


def build_objective(settings: Training, outline: bool = False) -> Objective:
    """Build the terms; what they own (a projection) is drawn by the seed, alike on every rank.

    outline: without the weights that a term would load, to count its cost.
    """
    # a seed of its own, so that terms and discriminator do not move each other's weights
    with seeded(settings.seed + 2):
        return Objective(settings.losses, outline)


def build_discriminator(settings: Training, outline: bool = False) -> nn.Module | None:
    """Build the discriminator where there is an adversary; outline: without weights that it would load, to count its
    cost."""
    if not settings.adversary.enabled:
        return None
    if settings.discriminator is None:
        raise UsageError(
            "discriminator: is missing although adversary.weight > 0; e.g. `discriminator: {kind: patchgan}`"
        )
    with seeded(settings.seed + 1):
        part = settings.discriminator
        network: nn.Module = (part.outline if outline else part.build)(settings.seen_channels)
        return network.train()
