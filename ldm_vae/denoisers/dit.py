"""diffusers.DiTTransformer2DModel: patches of the latent as tokens, time and class by adaptive layer norms (Peebles &
Xie, "Scalable diffusion models with transformers", ICCV 2023)."""

from __future__ import annotations

from typing import Literal

from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from pydantic import Field
from torch import nn

from ldm_vae.core.config import Part
from ldm_vae.core.errors import UsageError


class Config(Part):
    """Shape of a diffusion transformer, in diffusers' names."""

    kind: Literal["dit"] = "dit"
    patch_size: int = Field(2, gt=0)
    """Side in latent positions of what becomes one token."""
    num_layers: int = Field(12, gt=0)
    """Blocks: 12 in DiT-S and -B, 24 in -L, 28 in -XL."""
    num_attention_heads: int = Field(12, gt=0)
    """6 in DiT-S, 12 in -B, 16 in -L and -XL."""
    attention_head_dim: int = Field(64, gt=0)
    """Width of a head; width of the network = heads times this."""

    def build(self, channels: int, size: tuple[int, int], classes: int) -> DiTTransformer2DModel:
        """A network for latents [channels, *size], which DiT in diffusers needs to be square.

        Raises:
            UsageError: the size is not square, or patch_size does not divide it.
        """
        if size[0] != size[1] or size[0] % self.patch_size:
            raise UsageError(
                f"denoiser.patch_size: expected square latents with a side that is a multiple of {self.patch_size}, "
                f"got {size[0]} x {size[1]}; kind unet takes others"
            )
        network = DiTTransformer2DModel(
            num_attention_heads=self.num_attention_heads,
            attention_head_dim=self.attention_head_dim,
            in_channels=channels,
            num_layers=self.num_layers,
            sample_size=size[0],
            patch_size=self.patch_size,
            num_embeds_ada_norm=classes,
        )
        _initialise(network)
        return network


def _initialise(network: DiTTransformer2DModel) -> None:
    """Initialise as published (section 3.2): every block begins as the identity and the network as zero. And labels are
    dropped by key (ldm_vae/diffusion/flow.py), not by each block for itself, as diffusers' embedding does in
    training."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
            module.dropout_prob = 0.0
    nn.init.xavier_uniform_(network.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(network.pos_embed.proj.bias)
    for block in network.transformer_blocks:
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (network.proj_out_1, network.proj_out_2):
        nn.init.zeros_(layer.weight)
