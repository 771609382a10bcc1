"""Descript Audio Codec (Kumar et al., NeurIPS 2023) as transformers has it: its encoder and decoder as a trainable
autoencoder of points, its codes as the residual codebooks beside it, and both ways to transformers.DacModel.

Legend: B batch, L samples, H samples of a hop, c latent channels, n latent positions, q codebooks, K codes, d channels
of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDecoderOutput
from diffusers.models.autoencoders.vae import AutoencoderMixin, EncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ldm_vae.autoencoder.codebooks import ResidualCodebooks, beside
from ldm_vae.core.errors import UsageError

SHAPE = ("encoder_hidden_size", "downsampling_ratios", "decoder_hidden_size", "sampling_rate")


class DacAutoencoder(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """DacModel without its quantizer: mono sounds [B, 1, L] to points [B, c, L / H] and back, c = encoder_hidden_size *
    2 ** strides. Its decoder ends in a tanh. Args are DacConfig's."""

    _supports_gradient_checkpointing = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        encoder_hidden_size: int = 64,
        downsampling_ratios: Sequence[int] = (2, 4, 8, 8),
        decoder_hidden_size: int = 1536,
        sampling_rate: int = 44_100,
    ) -> None:
        super().__init__()
        parts, config = _transformers(), {name: self.config[name] for name in SHAPE}
        config = parts.DacConfig(**config | {"downsampling_ratios": list(downsampling_ratios)})
        # alone, they are drawn as torch draws convolutions; DacModel draws all with a deviation of 0.02
        self.encoder, self.decoder = parts.DacEncoder(config), parts.DacDecoder(config)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """sounds [B, 1, L] => latents before the codebooks [B, c, L / H]."""
        z = self.encoder(x)
        return EncoderOutput(latent=z) if return_dict else (z,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """z [B, c, n] => sounds [B, 1, n * H]."""
        decoded = self.decoder(z)
        return OobleckDecoderOutput(sample=decoded) if return_dict else (decoded,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> Any:
        """sounds [B, 1, L] => decoded latents."""
        return self.decode(self.encode(sample).latent, return_dict)


def _transformers() -> Any:
    try:
        from transformers.models.dac import modeling_dac
    except ImportError as error:
        raise UsageError("DacAutoencoder: needs transformers 4.48: pip install 'ldm-vae[transformers]'") from error
    return modeling_dac


# --- to transformers --------------------------------------------------------------------------------------------------


def why_not(vae: Any) -> str | None:
    """Part of a network that transformers.DacModel cannot carry, as the rest of a sentence; None: it carries all."""
    books = beside(vae)
    if not isinstance(vae, DacAutoencoder):
        return (
            f"it cannot carry the network {type(vae).__name__}: its convolutions are padded on both sides, its snakes "
            "have one parameter a channel, its decoder ends in a tanh; `model.kind: dac` trains one that it carries"
        )
    if not isinstance(books, ResidualCodebooks):
        return "it decodes codes alone, and this network has no quantizer residual"
    if (codes := books.shape.codes) & (codes - 1):
        return f"its codebooks have a power of 2 of codes, those of this network {codes:,}"
    return None


def to_dac(vae: DacAutoencoder) -> Any:
    """transformers.DacModel with the same codes and sounds, in eval mode; of a network that `why_not` has nothing
    against."""
    books, parts = beside(vae), _transformers()
    assert isinstance(books, ResidualCodebooks)
    levels = [_carried(books, level) for level in range(books.shape.codebooks)]
    config = {name: vae.config[name] for name in SHAPE}
    config |= {
        "downsampling_ratios": list(vae.config.downsampling_ratios), "n_codebooks": books.shape.codebooks,
        "codebook_size": books.shape.codes, "codebook_dim": levels[0]["codebook.weight"].shape[1],
    }  # fmt: skip
    model = parts.DacModel(parts.DacConfig(**config))
    state = {name: value for name, value in vae.state_dict().items() if name.startswith(("encoder.", "decoder."))}
    for level, own in enumerate(levels):
        state |= {f"quantizer.quantizers.{level}.{name}": value for name, value in own.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def _carried(books: ResidualCodebooks, level: int) -> dict[str, torch.Tensor]:
    """A codebook as DacModel's, which takes the row of the smallest angle.

    By distance: |x - r|^2 is smallest where x r - |r|^2 / 2 is largest. With x as (x, t, 0) and a row as (r, -|r|^2 /
    2t, rest), the rest such that all rows have one length, the row of the smallest angle is the nearest (Bachrach et
    al., RecSys 2014). t, the length of a typical row, keeps all of one size; what is decoded leaves both out.
    """
    rows, width = books.rows[level].detach().double(), books.shape.channels
    eye, none = torch.eye(width).double(), torch.zeros(width).double()
    (w_in, b_in), (w_out, b_out) = (eye, none), (eye, none)
    if books.into:
        w_in, b_in = (one.detach().double() for one in books.into[level].parameters())
        w_out, b_out = (one.detach().double() for one in books.out[level].parameters())
    if books.shape.distance == "euclidean":
        squares = rows.square().sum(dim=1)
        t = squares.mean().sqrt().clamp_min(1e-12)
        half = squares / (2 * t)
        whole = squares + half.square()
        rows = torch.cat([rows, -half[:, None], (whole.max() - whole).sqrt()[:, None]], dim=1)
        w_in = torch.cat([w_in, torch.zeros(2, width).double()])
        b_in = torch.cat([b_in, torch.stack([t, torch.zeros_like(t)])])
        w_out = torch.cat([w_out, torch.zeros(width, 2).double()], dim=1)
    found = {"codebook.weight": rows, "in_proj.weight": w_in[:, :, None], "in_proj.bias": b_in,
             "out_proj.weight": w_out[:, :, None], "out_proj.bias": b_out}  # fmt: skip
    return {name: value.float() for name, value in found.items()}
