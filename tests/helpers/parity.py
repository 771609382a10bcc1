"""Run by test_parity.py as one process and as two: the real training step in fp64 on the same global batches.

Writes OUT/SCENARIO.safetensors with the weights after a few Adam steps and what the first step logged. The scenarios
`no_reduce` (the adaptive weight is each rank's own) and `bypass` (DDP's forward is gone round, as the popular script
does) are broken on purpose.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_classes import tiny
from two_heads import TwoHeads

from ldm_vae.autoencoder.codebooks import put_beside
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.geometry import latent_channels
from ldm_vae.autoencoder.latents import posterior_noise
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core import rng
from ldm_vae.core.launch import build_accelerator
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.discriminators.waveform import Config as Waveform
from ldm_vae.losses.alpha import Config as Alpha
from ldm_vae.losses.commitment import Config as Commitment
from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.kl_free_bits import Config as FreeBits
from ldm_vae.losses.kl_target import Config as KLTarget
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.l2 import Config as L2
from ldm_vae.losses.temporal_difference import Config as TemporalDifference
from ldm_vae.models.vq import Config as VQConfig
from ldm_vae.quantizers.residual import Config as Residual
from ldm_vae.run.optim import trainable_parameters
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

GLOBAL_BATCH = 8
# what test_parity.py reads of one process and not of two, and the other way round
UNREAD = {
    1: {"heads_1", "bypass"},
    2: {f"{name}_1" for name in ("game", "codes", "residual", "alpha", "heads", "clips", "sounds")},
}


def train(
    accelerator: Any,
    accumulation: int,
    broken: str = "",
    codebook: Any = None,
    terms: Any = None,
    alpha: bool = False,
    clips: bool = False,
    sounds: bool = False,
    beside: Any = None,
    **adversary: Any,
) -> dict[str, torch.Tensor]:
    codebook = codebook or {}
    accelerator.gradient_accumulation_steps = accumulation
    accelerator.step = 0
    torch.manual_seed(0)
    kind = VQConfig if codebook else AutoencoderConfig
    config = kind(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, in_channels=3 + alpha, **codebook)
    vae = config.build().double()
    if clips:
        vae = tiny("AutoencoderKLWan").double().requires_grad_(True).train()
    if sounds:
        vae = tiny("AutoencoderOobleck", audio_channels=1).double().requires_grad_(True).train()
    size = (5, 16, 16) if clips else (128,) if sounds else (16, 16)
    channels = 1 if sounds else 3 + alpha
    if beside is not None:
        put_beside(vae, beside.beside(latent_channels(vae)).double())
    bottleneck = (beside.build if beside else config.bottleneck)(vae)
    network = TrainableAutoencoder(vae, bottleneck, alpha=alpha)
    continuous = {"l2": L2(), "kl": KL(weight=1e-3), "free": FreeBits(bits=9)}
    objective = Objective(
        {"l1": L1(), **(terms or ({"commitment": Commitment()} if codebook else continuous))}
    ).double()
    critic = PatchGAN(width=8, layers=1, dimensions=3 if clips else 2).build().double()
    if sounds:
        critic = Waveform(periods=[2, 3], windows=[64], period_width=4, stft_width=4).build(1).double()
    elif adversary.get("feature_matching"):
        critic = TwoHeads().double()
    optimizers = [
        torch.optim.Adam(trainable_parameters(modules), lr=1e-3, betas=(0.5, 0.9), eps=1e-12)
        for modules in ((network, objective), (critic,))
    ]
    model, discriminator = accelerator.prepare(network), accelerator.prepare(critic)
    step = TrainingStep(
        accelerator,
        network if broken == "bypass" else model,
        objective,
        accelerator.prepare(optimizers[0]),
        # with hinge and no logit beyond 1 the critic's last bias has a gradient of rounding alone, which Adam magnifies
        Adversary(AdversaryConfig(**{"weight": 0.5, "loss": "non_saturating"} | adversary)).double(),
        discriminator,
        accelerator.prepare(optimizers[1]),
    )
    reduce = accelerator.reduce
    if broken == "no_reduce":
        accelerator.reduce = lambda tensor, *_args, **_kwargs: tensor
    whole = GLOBAL_BATCH // accumulation  # of a micro-batch, over all processes
    share = whole // accelerator.num_processes
    first: dict[str, torch.Tensor] = {}
    steps = 4 if codebook or beside else 3  # R1 twice; codes learn on after those that died are restarted
    for number in range(steps * accumulation):
        start = number * whole + accelerator.process_index * share
        positions = range(start, start + share)
        images = rng.normal(1, "images", positions, (channels, *size)).double().tanh()
        # images of unequal brightness: with equal ones an unreduced adaptive weight would hardly show
        brightness = torch.tensor([0.2 + (position % GLOBAL_BATCH) / 8 for position in positions])
        images *= brightness.view(-1, 1, *[1] * len(size))
        noise = posterior_noise(2, positions, network.noise_shape(*size)).double()
        logs = step(images, noise, number // accumulation * GLOBAL_BATCH)
        if not first:
            first = {f"first.{name}": reduce(value, "mean") for name, value in logs.items() if "health" not in name}
    accelerator.reduce = reduce
    weights = {name: value for name, value in network.state_dict().items() if isinstance(value, torch.Tensor)}
    weights |= {f"critic.{name}": value for name, value in critic.state_dict().items()}
    weights |= {f"objective.{name}": value.double() for name, value in objective.state_dict().items()
                if isinstance(value, torch.Tensor)}  # fmt: skip
    weights |= {f"adversary.{name}": value for name, value in step.adversary.state_dict().items()}
    return first | {name: value.detach().clone().contiguous() for name, value in weights.items()}


def main() -> None:
    accelerator = build_accelerator()
    out = Path(sys.argv[1])
    regularisers = {"r1_weight": 10.0, "r1_every": 2, "lecam_weight": 0.1, "lecam_halflife_images": 50}
    # 4 x 16 x 16 vectors in a batch, 64 codes: some die, and are restarted every second step
    followed = {"num_vq_embeddings": 64, "quantizer": {"kind": "vq", "restart_images": 16, "decay": 0.9}}
    residual = Residual(codebooks=2, codes=32, dropout=0.5, restart_images=16, decay=0.9)
    # a variance that learns, and a controller that sees the rate of the whole batch
    controlled = {"likelihood": GaussianNLL(), "target": KLTarget(nats_per_pixel=0.1, integral_images=100)}
    of_clips = {"time": TemporalDifference(), "some": L2(frames=2), "kl": KL(weight=1e-3)}
    heard = {"loss": "least_squares", "feature_matching": 3.0}
    for name, accumulation, broken, adversary in (
        ("plain", 1, "", {}),
        ("codebook", 1, "", {"codebook": followed}),
        ("controlled", 1, "", {"terms": controlled}),
        ("regularised", 1, "", regularisers),
        ("accumulated", 2, "", {}),
        *(
            (f"{name}_{parts}", parts, "", {"adaptive": False} | more)
            for parts in (1, 2)
            for name, more in (
                ("game", regularisers | {"terms": controlled}),
                ("codes", {"codebook": followed}),
                ("residual", {"beside": residual, "terms": {"commitment": Commitment()}}),
                ("alpha", {"alpha": True, "terms": {"alpha": Alpha()}}),
                # several heads, whose features pull
                ("heads", regularisers | heard),
                # 3-D discriminator, a term of clips and one that chooses frames
                ("clips", regularisers | {"clips": True, "terms": of_clips}),
                # multi-period and multi-scale STFT heads; the log of a loss of spectra, steep near silence, magnifies
                # rounding a thousand times an update
                ("sounds", regularisers | heard | {"sounds": True, "terms": {"kl": KL(weight=1e-3)}}),
            )
        ),
        ("no_reduce", 1, "no_reduce", {}),
        ("bypass", 1, "bypass", {}),
    ):
        if name in UNREAD[accelerator.num_processes]:
            continue
        result = train(accelerator, accumulation, broken, **adversary)
        save_file(result, out / f"{name}.{accelerator.num_processes}.{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    accelerator.end_training()
