"""Pictures as files: channels, sheets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from ldm_vae.core.pictures import STRIP, labelled, save, sheet


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 4), (5, 3)])
def test_a_picture_is_read_back_as_it_was(channels: int, shown: int, tmp_path: Path) -> None:
    pixels = torch.randint(256, (channels, 6, 9), dtype=torch.uint8)
    save(pixels.float() + 0.4, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(pil_to_tensor(image), pixels[:shown])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_every_image_in_reading_order(channels: int) -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, channels, 32, 32)
    made = sheet(images, 3, gap=1, value=128)
    assert made.shape == (channels, 67, 100)
    assert made[0, 1:35:33, 1:68:33].tolist() == [[0, 1, 2], [3, 4, 128]]
    assert int(made[0, 1, 33]) == 128


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_label_stands_above_its_image_and_changes_none_of_it(channels: int) -> None:
    images = torch.randint(256, (3, channels, 20, 30)).float()
    made = labelled(images, ["cat", "a-name-that-has-no-room", ""])
    assert made.shape == (3, channels, STRIP + 20, 30)
    assert torch.equal(made[:, :, STRIP:], images)
    dark = (made[:, 0, :STRIP] < 128).sum(dim=(1, 2)).tolist()
    assert dark[0] > 10 and dark[1] > 10 and dark[2] == 0
    assert torch.equal(
        labelled(images[:1], ["a-name-that-has-more"]), labelled(images[:1], ["a-name-that-has-no-room"])
    )
