"""`eval.speed codec`: the causal streaming codec on one core, beside the time that its sounds last.

- `codec_whole`: ten seconds encoded, quantised and decoded at once;
- `codec_hop`: the same hop by hop, at the least latency; `codec_4_hops`: four hops at a time.

`ratio` is to `real_time`: above 1 means faster than the sound plays. In this process with one thread, in CPU seconds,
the network and the codebooks of configs/demo_audio.yaml with random weights: their time does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ldm_vae.autoencoder.causal_oobleck import CausalOobleck
from ldm_vae.autoencoder.codebooks import Codebooks
from ldm_vae.core.config import load
from ldm_vae.core.programs import find_config
from ldm_vae.training.config import Training

from .timing import interleave, row

SECONDS = 10


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(options)
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    settings = load(Training, find_config("demo_audio"))
    codec = settings.model.build().eval()
    books = settings.quantizer.beside(codec.config.decoder_input_channels)
    rate = int(codec.config.sampling_rate)
    sound = 0.1 * torch.randn(1, 1, SECONDS * rate, generator=torch.Generator().manual_seed(0))
    contenders: dict[str, Callable[[], Any]] = {
        "codec_whole": lambda: codec.decode(books(codec.encode(sound).latent_dist.mode())),
        "codec_4_hops": partial(_stream, codec, books, sound, 4),
        "codec_hop": partial(_stream, codec, books, sound, 1),
    }
    times = interleave(contenders, options.rounds, "codec", clock=time.process_time)
    times["real_time"] = [float(SECONDS)] * options.rounds
    parameters = sum(one.numel() for one in codec.parameters())
    shape = {
        "parameters": parameters,
        "codebooks": books.shape.codebooks,
        "sampling_rate": rate,
        "latency_s": codec.latency,
    }
    return [row(name, times, name, "real_time", **shape) for name in contenders]


def _stream(codec: CausalOobleck, books: Codebooks, sound: torch.Tensor, hops: int) -> None:
    """Encode and decode as a microphone and a loudspeaker would have it: each part as it comes."""
    before, after = None, None
    for part in sound.split(hops * codec.hop_length, dim=2):
        posterior, before = codec.encode_part(part, before, hops)
        _, after = codec.decode_part(books(posterior.mode()), after, hops)
