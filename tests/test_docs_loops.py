"""The training loops of docs/using_latents.md, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from store_sources import Pictures
from stores import SETTINGS
from tiny_pipeline import pipeline

from ldm_vae.latent_store import LatentDataset, write_store

PAGE = Path(__file__).parent.parent / "docs" / "using_latents.md"
LOOPS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def store(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    write_store(tiny_vae, Pictures(21), tmp_path / "store", **SETTINGS)
    return tmp_path / "store"


def run(loop: str, **names: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    names |= {"epochs": 12, "batch_size": 4}
    exec(compile(loop, str(PAGE), "exec"), names)
    return names


def test_there_are_two() -> None:
    assert len(LOOPS) == 2


@pytest.mark.slow
def test_unconditional(store: Path, tmp_path: Path) -> None:
    widths = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    seen = run(LOOPS[0], store=store, widths=widths, checkpoint=tmp_path / "state")
    assert len(seen["losses"]) == 12 * 21 // 4  # every sample once an epoch, nothing dropped
    assert sum(seen["losses"][-10:]) < 0.9 * sum(seen["losses"][:10])
    again = LatentDataset(store).loader(4)
    again.load_state_dict(seen["position"])
    assert again.epoch == 12
    assert (tmp_path / "state").is_dir()


@pytest.mark.slow
def test_latents_and_captions(store: Path, tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    pipe = pipeline(tiny_vae, tmp_path / "words")
    before = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    asked: list[str] = []

    class Tokenizer:
        model_max_length = pipe.tokenizer.model_max_length

        def __call__(self, texts: list[str], **options: Any) -> Any:
            asked.extend(texts)
            return pipe.tokenizer(texts, **options)

    seen = run(LOOPS[1], store=store, unet=pipe.unet, text_encoder=pipe.text_encoder, tokenizer=Tokenizer())
    assert sorted(asked[:21]) == sorted(f"picture {number}" for number in range(21))  # the first epoch
    assert sum(seen["losses"][-10:]) < sum(seen["losses"][:10])
    assert all(torch.equal(value, before[name]) for name, value in pipe.text_encoder.state_dict().items())
