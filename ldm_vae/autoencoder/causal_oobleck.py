"""Causal streaming codec: the shape of Stable Audio's AutoencoderOobleck with convolutions that see the past alone.

Every convolution is padded on the left (as SoundStream, Zeghidour et al. 2021, section III-A), every transposed one
gives a hop without waiting for the next, and no layer normalises over time: a latent follows as soon as its hop of
samples is complete, and its samples as soon as it is there. What a layer remembers of the past is the end of its input,
which `encode_part` and `decode_part` take and give as an explicit state. Convolutions are plain: a weight norm would be
computed anew for every hop (Mimi, Défossez et al. 2024, has none either).

Legend: B batch, C channels of a sound, L samples, c latent channels, n latent positions, H samples of a hop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_oobleck import (
    AutoencoderOobleckOutput,
    OobleckDecoderOutput,
    OobleckDiagonalGaussianDistribution,
)
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ldm_vae.core.errors import UsageError

State = tuple[torch.Tensor, ...]
"""Memory of a stream: what has come and is not yet a whole chunk, then the end of each layer's input."""

SHORT = 1024  # positions: the product of more of them would hold x as often as a kernel has taps


class Past:
    """The ends of what the layers were given before, in the order of their calls; silence where there is none."""

    def __init__(self, ends: Sequence[torch.Tensor] = (), keep: bool = False) -> None:
        """keep: collect the ends of what they are given now in `ends`."""
        self._before, self.keep = iter(ends), keep
        self.ends: list[torch.Tensor] = []

    def before(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """x [B, C, L] with the `count` positions that came before it in front."""
        end = next(self._before, None)
        x = torch.cat([x.new_zeros(*x.shape[:2], count) if end is None else end, x], dim=2)
        if self.keep:
            self.ends.append(x[:, :, x.shape[2] - count :].clone())  # not a view, which would keep all of it
        return x


class Snake(nn.Module):
    """x + sin(a x)^2 / b, a and b of each channel (Ziyin et al. 2020), learned as their logarithms: Oobleck's Snake1d
    in the fewest operations, whose number decides the time of a hop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(torch.zeros(1, width, 1)) for _ in range(2))

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        wave = (x * self.alpha.exp()).sin()
        return torch.addcdiv(x, wave * wave, self.beta.exp())  # square() is a power, slower on a short x


class Convolution(nn.Conv1d):
    """x [B, C, L] => [B, C', L / stride]; position i sees nothing behind (i + 1) * stride - 1."""

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:  # type: ignore[override]
        (stride,), (dilation,) = self.stride, self.dilation
        span = (self.kernel_size[0] - 1) * dilation + 1
        x = past.before(x, span - stride) if span > stride else x
        if not past.keep or x.shape[2] > SHORT:
            return super().forward(x)
        # a hop's few positions as one product: of them a dilated convolution is mostly overhead (eval.speed codec)
        seen = x.movedim(1, 2)
        if span > 1:
            seen = x.unfold(2, span, stride)[..., ::dilation].movedim(1, 2).flatten(2)
        return F.linear(seen, self.weight.flatten(1), self.bias).movedim(1, 2)


class Transposed(nn.ConvTranspose1d):
    """x [B, C, L] => [B, C', L * stride], of kernels of 2 * stride: position i sees what it lies in and the one
    before."""

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:  # type: ignore[override]
        stride = self.stride[0]
        x = past.before(x, 1)
        # of the past one only its second half is heard, and of the last one its second half is still to come
        if not past.keep or x.shape[2] > SHORT:
            return super().forward(x)[:, :, stride:-stride]
        halves = (x.movedim(1, 2) @ self.weight.flatten(1)).view(len(x), x.shape[2], self.out_channels, 2, stride)
        heard = halves[:, 1:, :, 0] + halves[:, :-1, :, 1]
        assert self.bias is not None
        return heard.movedim(1, 2).flatten(2) + self.bias[:, None]


class Chain(nn.Sequential):
    """Layers one after the other, each with the past."""

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, past)
        return x


class Residual(Chain):
    """x [B, C, L] + a dilated and a pointwise convolution of it."""

    def __init__(self, width: int, dilation: int) -> None:
        dilated = Convolution(width, width, 7, dilation=dilation)
        super().__init__(Snake(width), dilated, Snake(width), Convolution(width, width, 1))

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:  # type: ignore[override]
        return x + super().forward(x, past)


def _residuals(width: int) -> list[nn.Module]:
    return [Residual(width, dilation) for dilation in (1, 3, 9)]


class CausalOobleck(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """Autoencoder of sounds [B, C, L] with a Gaussian posterior, in whole or part by part.

    Args, by the names of AutoencoderOobleck:
        encoder_hidden_size: width of the encoder at full rate.
        downsampling_ratios: of the encoder's blocks; their product is the hop H.
        channel_multiples: widths behind each block, in encoder_hidden_size and in decoder_channels.
        decoder_channels: width of the decoder at full rate.
        decoder_input_channels: channels c of the latent.
        audio_channels: channels C of a sound.
        sampling_rate: of the sounds, in hertz.
    """

    _supports_gradient_checkpointing = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        encoder_hidden_size: int = 32,
        downsampling_ratios: Sequence[int] = (4, 4, 4, 5),
        channel_multiples: Sequence[int] = (1, 2, 4, 8),
        decoder_channels: int = 32,
        decoder_input_channels: int = 32,
        audio_channels: int = 1,
        sampling_rate: int = 24_000,
    ) -> None:
        super().__init__()
        self.hop_length = math.prod(downsampling_ratios)
        multiples = (1, *channel_multiples)
        layers: list[nn.Module] = [Convolution(audio_channels, encoder_hidden_size, 7)]
        for (before, after), stride in zip(pairwise(multiples), downsampling_ratios, strict=True):
            width = encoder_hidden_size * before
            layers += [*_residuals(width), Snake(width)]
            layers += [Convolution(width, encoder_hidden_size * after, 2 * stride, stride)]
        width = encoder_hidden_size * multiples[-1]
        self.encoder = Chain(*layers, Snake(width), Convolution(width, 2 * decoder_input_channels, 3))

        layers = [Convolution(decoder_input_channels, decoder_channels * multiples[-1], 7)]
        steps = zip(pairwise(reversed(multiples)), reversed(downsampling_ratios), strict=True)
        for (before, after), stride in steps:
            width = decoder_channels * after
            layers += [
                Snake(decoder_channels * before),
                Transposed(decoder_channels * before, width, 2 * stride, stride),
            ]
            layers += _residuals(width)
        self.decoder = Chain(*layers, Snake(decoder_channels), Convolution(decoder_channels, audio_channels, 7))

    @property
    def latency(self) -> float:
        """Algorithmic latency in seconds, that of computing apart: a sample waits until its hop is complete, and no
        layer looks further ahead."""
        return float(self.hop_length / self.config.sampling_rate)

    # --- in whole -----------------------------------------------------------------------------------------------------

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """sounds [B, C, L] => the posterior of latents [B, c, L / H]; what is over at the end, less than a hop, is left
        out, as by AutoencoderOobleck.

        Raises:
            UsageError: less than a hop.
        """
        if x.shape[-1] < self.hop_length:
            raise UsageError(f"encode: expected sounds of {self.hop_length} samples or more, got {x.shape[-1]}")
        whole = x.shape[-1] // self.hop_length * self.hop_length
        posterior = OobleckDiagonalGaussianDistribution(self.encoder(x[..., :whole], Past()))
        return AutoencoderOobleckOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """z [B, c, n] => sounds [B, C, n * H]."""
        decoded = self.decoder(z, Past())
        return OobleckDecoderOutput(sample=decoded) if return_dict else (decoded,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> Any:
        """sounds [B, C, L] => what their posterior's mode decodes to."""
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict)

    # --- part by part -------------------------------------------------------------------------------------------------

    def encode_part(
        self, x: torch.Tensor, state: State | None = None, hops: int = 1
    ) -> tuple[OobleckDiagonalGaussianDistribution, State]:
        """Samples [B, C, l] that follow those before, any number => the posterior of the latents that are complete [B,
        c, n], and the state for the next part; n may be 0.

        Args:
            state: what the part before gave; None at the beginning.
            hops: computed at once. One gives the least latency, more cost less; at one number the result does not
                depend, to the bit, on the parts in which samples come. What is over stays in the state: zeros of less
                than a chunk behind the last sample bring it out.
        """
        channels = 2 * self.config.decoder_input_channels
        found, state = _by_chunks(self.encoder, x, state, hops * self.hop_length, channels)
        return OobleckDiagonalGaussianDistribution(found), state

    def decode_part(self, z: torch.Tensor, state: State | None = None, hops: int = 1) -> tuple[torch.Tensor, State]:
        """Latents [B, c, n] that follow those before => their samples [B, C, n * H], and the state for the next part;
        `hops` as in encode_part."""
        return _by_chunks(self.decoder, z, state, hops, self.config.audio_channels)


def _by_chunks(
    network: Callable[[torch.Tensor, Past], torch.Tensor],
    x: torch.Tensor,
    state: State | None,
    size: int,
    channels: int,
) -> tuple[torch.Tensor, State]:
    """x [B, C, l] behind what the state holds, in chunks of `size` through the network => [B, channels, ...]."""
    over, *ends = (x[:, :, :0],) if state is None else state
    x = torch.cat([over, x], dim=2)
    whole = x.shape[2] // size * size
    found = [x.new_zeros(len(x), channels, 0)]
    for start in range(0, whole, size):
        past = Past(ends, keep=True)
        found.append(network(x[:, :, start : start + size], past))
        ends = past.ends
    return torch.cat(found, dim=2), (x[:, :, whole:].clone(), *ends)
