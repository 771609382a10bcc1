"""An exported network of clips in its real pipeline, assembled with a tiny transformer: what the pipeline shows of its
latents is what a store's normalisation and decoder give of them, to the bit."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_classes import tiny

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import held_by, normalisation_of
from ldm_vae.export.diffusers_folder import write_vae

# transformer_mochi.py asks the CPU for an autocast to fp32, which it has not
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported")
Latents = Callable[[Any, torch.Tensor], torch.Tensor]


def plain(vae: Any, seen: torch.Tensor) -> torch.Tensor:
    """Latents [B, c, t, h, w] as they are."""
    return seen


@dataclass(frozen=True)
class Whole:
    """A pipeline of text to video: its tiny transformer and scheduler, what it is called with, and how its latents
    [B, c, t, h, w] are had from those that it returns."""

    name: str
    pipeline: Any
    transformer: Callable[[], Any]
    scheduler: Callable[[], Any]
    embeds: dict[str, tuple[int, ...]]
    frames: int
    more: dict[str, Any] = field(default_factory=dict)
    side: int = 32
    latents: Latents = plain
    parts: dict[str, Any] = field(default_factory=dict)
    """Its other components."""

    def __str__(self) -> str:
        return self.pipeline.__name__  # type: ignore[no-any-return]


def ltx_latents(vae: Any, seen: torch.Tensor) -> torch.Tensor:
    frames, side = 2, 32 // geometry_of(vae).factor
    return diffusers.LTXPipeline._unpack_latents(seen, frames, side, side)


FLOW = diffusers.FlowMatchEulerDiscreteScheduler
PIPELINES = [
    Whole(
        "AutoencoderKLWan", diffusers.WanPipeline,
        lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1,
            rope_max_seq_len=32,
        ),
        FLOW, {"prompt_embeds": (1, 4, 8), "negative_prompt_embeds": (1, 4, 8)}, 5,
    ),
    Whole(
        "AutoencoderKLLTXVideo", diffusers.LTXPipeline,
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
            num_layers=1, caption_channels=8,
        ),
        FLOW, {"prompt_embeds": (1, 4, 8), "negative_prompt_embeds": (1, 4, 8)}, 9, latents=ltx_latents,
        more={"prompt_attention_mask": torch.ones(1, 4), "negative_prompt_attention_mask": torch.ones(1, 4)},
    ),
    Whole(
        "AutoencoderKLMochi", diffusers.MochiPipeline,
        lambda: diffusers.MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, text_embed_dim=8,
            time_embed_dim=4, max_sequence_length=4,
        ),
        FLOW, {"prompt_embeds": (1, 4, 8), "negative_prompt_embeds": (1, 4, 8)}, 7,
        more={"prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool),
              "negative_prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool)},
    ),
    Whole(
        "AutoencoderKLHunyuanVideo", diffusers.HunyuanVideoPipeline,
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=1, guidance_embeds=True, text_embed_dim=8,
            pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        ),
        FLOW, {"prompt_embeds": (1, 4, 8), "pooled_prompt_embeds": (1, 8)}, 5,
        more={"prompt_attention_mask": torch.ones(1, 4)},
    ),
    Whole(
        "AutoencoderKLCogVideoX", diffusers.CogVideoXPipeline,
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=8, num_layers=1, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=4,
        ),
        diffusers.CogVideoXDDIMScheduler, {"prompt_embeds": (1, 4, 8), "negative_prompt_embeds": (1, 4, 8)}, 9,
        latents=lambda vae, seen: seen.transpose(1, 2),
    ),
    Whole(
        "AutoencoderKLAllegro", diffusers.AllegroPipeline,
        lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
            cross_attention_dim=24, sample_width=4, sample_height=4, sample_frames=6, caption_channels=8,
        ),
        diffusers.DDIMScheduler, {"prompt_embeds": (1, 4, 8), "negative_prompt_embeds": (1, 4, 8)}, 24,
        more={"prompt_attention_mask": torch.ones(1, 4), "negative_prompt_attention_mask": torch.ones(1, 4),
              "negative_prompt": None},
    ),
    Whole(
        "AutoencoderKLHunyuanVideo15", diffusers.HunyuanVideo15Pipeline,
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_refiner_layers=1, text_embed_dim=8, text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(2, 4, 4),
        ),
        FLOW, {f"{name}_embeds{number}": (1, 4, 8) for name in ("prompt", "negative_prompt") for number in ("", "_2")},
        5, parts={"guider": diffusers.ClassifierFreeGuidance(guidance_scale=2.0)},
        more={f"{name}_embeds_mask{number}": torch.ones(1, 4)
              for name in ("prompt", "negative_prompt") for number in ("", "_2")},
    ),
]  # fmt: skip


def assembled(pipeline: Any, folder: Path, name: str, **parts: Any) -> Any:
    """The pipeline of a folder whose `vae` is an export; its other parts are given, or none."""
    slots = [one for one in inspect.signature(pipeline.__init__).parameters if one not in ("self", "force_zeros")]
    parts = {slot: parts.get(slot) for slot in slots if slot != "vae"}
    index = {"_class_name": pipeline.__name__, "_diffusers_version": diffusers.__version__}
    index |= {slot: [None, None] for slot in parts} | {"vae": ["diffusers", name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    found = pipeline.from_pretrained(folder, **parts)
    found.set_progress_bar_config(disable=True)
    return found


@torch.no_grad()
@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_a_pipeline_shows_what_its_latents_decode_to(case: Whole, tmp_path: Path) -> None:
    vae = tiny(case.name)
    write_vae(vae, tmp_path / "vae", held_by(vae, Normalisation(0.5)))  # as if it had been measured
    torch.manual_seed(0)
    pipeline = assembled(
        case.pipeline,
        tmp_path,
        case.name,
        transformer=case.transformer().eval(),
        scheduler=case.scheduler(),
        **case.parts,
    )
    assert type(pipeline.vae) is type(vae)
    embeds = {name: torch.randn(shape) for name, shape in case.embeds.items()}

    def call(kind: str) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        size: dict[str, int] = {"height": case.side, "width": case.side, "num_frames": case.frames}
        found = pipeline(**embeds, **case.more, **size, num_inference_steps=2, generator=draw, output_type=kind)
        frames: torch.Tensor = found.frames
        return frames

    law = normalisation_of(pipeline.vae)
    seen = case.latents(pipeline.vae, call("latent"))
    ours = latents.decode(pipeline.vae, law.undo(seen))
    assert ours.shape == (1, 3, case.frames, case.side, case.side) and bool(ours.isfinite().all())
    video = pipeline.video_processor.postprocess_video(ours, output_type="pt")
    assert torch.equal(call("pt"), video)
    assert not torch.equal(pipeline.video_processor.postprocess_video(latents.decode(vae, seen), "pt"), video)
