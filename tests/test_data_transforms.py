"""Geometry of crops: sizes, boxes, keyed draws, and the map to [-1, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from images import write_images
from pydantic import ValidationError
from sentences import refused
from torchvision.transforms import v2

from ldm_vae.core import rng
from ldm_vae.core.errors import UsageError
from ldm_vae.data.decoding import Decoding, decode
from ldm_vae.data.source import open_source, with_resize
from ldm_vae.data.transforms import (
    PREPROCESSING_VERSION,
    TransformConfig,
    centre_crop,
    decoding_of,
    preprocessing_identity,
    random_crop,
    to_pixels,
    to_uint8,
)
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.write.crops import Cutting, cutting_of
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.protocol import PINNED, VARIANTS


def smooth(height: int, width: int, channels: int = 3) -> torch.Tensor:
    noise = torch.from_numpy(np.random.default_rng(0).random((1, channels, 6, 6), dtype=np.float32))
    large = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return (large[0] * 255).to(torch.uint8)


@pytest.mark.parametrize("size", [(64, 64), (100, 80), (80, 101), (33, 64), (20, 20), (32, 900)])
def test_centre_crop_is_torchvisions(size: tuple[int, int]) -> None:
    image = smooth(*size)
    crop = centre_crop(image, 32)
    reference = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32)])
    assert torch.equal(crop.pixels, reference(image))
    assert crop.original_size == size
    top, left, height, width = crop.box
    assert top >= 0 and left >= 0 and top + height <= size[0] and left + width <= size[1]
    assert abs(height - min(size)) <= 1 and abs(width - min(size)) <= 1


def test_centre_crop_to_a_bucket() -> None:
    crop = centre_crop(smooth(100, 200), (32, 48))
    assert crop.pixels.shape == (3, 32, 48)
    assert crop.box == (0, 25, 100, 150)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
def test_any_number_of_channels(channels: int) -> None:
    image = smooth(50, 70, channels)
    crop = centre_crop(image, 16)
    assert crop.pixels.shape == (channels, 16, 16)
    for channel in range(channels):  # channels do not see each other
        assert torch.equal(crop.pixels[channel], centre_crop(image[channel : channel + 1], 16).pixels[0])


def test_the_four_byte_layout_of_a_decoded_image_gives_the_same_pixels() -> None:
    image = decode(smooth(90, 70).permute(1, 2, 0).numpy())
    from PIL import Image

    lent = decode(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
    assert lent.stride() == (1, 280, 4)
    config = TransformConfig()
    assert torch.equal(lent, image)
    assert torch.equal(centre_crop(lent, 32).pixels, centre_crop(image, 32).pixels)
    draws = [rng.generator(0, "augmentation", 0, i) for i in (5, 5)]
    crops = [random_crop(i, 32, config, g).pixels for i, g in zip((lent, image), draws, strict=True)]
    assert torch.equal(*crops)


def crops(config: TransformConfig, image: torch.Tensor, resolution: int = 32, count: int = 200):
    return [random_crop(image, resolution, config, rng.generator(0, "augmentation", 0, i)) for i in range(count)]


def test_native_scale_takes_pixels_as_they_are() -> None:
    image = smooth(96, 96)
    for crop in crops(TransformConfig(resize="none"), image):
        top, left, height, width = crop.box
        assert (height, width) == (32, 32)
        cut = image[:, top : top + 32, left : left + 32]
        assert torch.equal(crop.pixels, cut.flip(2) if crop.flipped else cut)
    tops = {crop.box[0] for crop in crops(TransformConfig(resize="none"), image)}
    assert min(tops) <= 2 and max(tops) >= 62 and max(tops) <= 64


def test_native_scale_enlarges_only_what_is_too_small() -> None:
    boxes = {crop.box for crop in crops(TransformConfig(resize="none"), smooth(16, 48))}
    assert {(top, height, width) for top, _, height, width in boxes} == {(0, 16, 16)}
    assert len(boxes) > 20


def test_short_side_takes_the_largest_part() -> None:
    taken = crops(TransformConfig(), smooth(60, 90), count=400)
    assert {crop.box[0::2] for crop in taken} == {(0, 60)}
    assert {crop.box[3] for crop in taken} == {60}
    lefts = [crop.box[1] for crop in taken]
    assert set(lefts) == set(range(31))
    assert 160 < sum(crop.flipped for crop in taken) < 240


def test_scale_zooms_in_log_uniformly() -> None:
    sides = np.array([c.box[2] for c in crops(TransformConfig(scale=(1.0, 4.0)), smooth(200, 200), count=400)])
    assert sides.min() >= 50 and sides.max() <= 200
    assert abs((sides > 100).mean() - 0.5) < 0.08  # half of the draws are below zoom 2


def test_options_do_not_change_each_others_draws() -> None:
    image = smooth(60, 90)
    boxes = [[crop.box for crop in crops(TransformConfig(flip=flip), image)] for flip in (True, False)]
    assert boxes[0] == boxes[1]
    assert not any(crop.flipped for crop in crops(TransformConfig(flip=False), image))
    centred = {crop.box for crop in crops(TransformConfig(crop="centre"), image)}
    assert centred == {(0, 15, 60, 60)}


def test_the_box_is_in_the_originals_pixels() -> None:
    small, original = smooth(50, 75), (400, 600)  # a JPEG drafted at 1/8
    assert centre_crop(small, 32, original).box == (0, 100, 400, 400)
    crop = random_crop(small, 32, TransformConfig(crop="centre"), rng.generator(0, "a", 0), original)
    assert crop.original_size == original
    assert crop.box[2:] == (400, 400)


def test_bad_scales_are_refused() -> None:
    with pytest.raises(ValidationError, match="expected 1 <= min <= max"):
        TransformConfig(scale=(0.5, 1.0))
    with pytest.raises(ValidationError, match="no effect with resize: none"):
        TransformConfig(resize="none", scale=(1.0, 2.0))


def test_all_256_values_survive_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    pixels = to_pixels(values)
    assert pixels.min() == -1.0 and pixels.max() == 1.0
    assert torch.equal(to_uint8(pixels), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_preprocessing_identity_names_what_changes_pixels() -> None:
    assert preprocessing_identity() == PREPROCESSING_VERSION
    assert preprocessing_identity(Decoding(jpeg_draft=True)) == f"{PREPROCESSING_VERSION} jpeg_draft=True"


# --- the resize law ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (16, 16), (9, 14), (17, 60)])
@pytest.mark.parametrize("shape", [16, (8, 24)])
def test_pixels_as_they_are_are_trainings_centre_crop(size: tuple[int, int], shape: Any) -> None:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = TransformConfig(crop="centre", resize="none", flip=False)
    trained = random_crop(image, shape, transform, np.random.default_rng(0))
    cut = centre_crop(image, shape, resize="none")
    assert torch.equal(cut.pixels, trained.pixels) and (cut.box, cut.original_size) == (trained.box, size)
    if min(size) >= 24:
        top, left = cut.box[:2]
        rows, columns = (shape, shape) if isinstance(shape, int) else shape
        assert torch.equal(cut.pixels, image[:, top : top + rows, left : left + columns])


def test_corners_of_pixels_as_they_are() -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = Cutting((16,), ("", "top_left", "bottom_right"), resize="none")(image, (40, 50))
    assert torch.equal(crops[1].pixels, image[:, :16, :16]) and torch.equal(crops[2].pixels, image[:, -16:, -16:])
    small = Cutting((16,), ("top_left",), resize="none")(image[:, :16, :16], (16, 16))[0]
    assert small.pixels.shape == (3, 16, 16) and small.box == (0, 0, 14, 14)


def test_a_draft_and_pixels_as_they_are_exclude_each_other_in_a_store(tiny_vae: AutoencoderKL) -> None:
    whole = {"encoder": "0" * 64, "resolution": (16,), "store": "mean", "dtype": "fp16", "mixed_precision": "no"}
    for draft in (True, False):
        named = preprocessing_identity(Decoding(jpeg_draft=draft, resize="none"))
        identity = Identity.model_validate(whole | {"preprocessing": named, "shard_size": 4})
        if not draft:
            assert cutting_of(identity, tiny_vae).resize == "none"
            continue
        with refused(UsageError, "jpeg_draft"):
            cutting_of(identity, tiny_vae)


def test_an_identity_names_its_decoding() -> None:
    assert preprocessing_identity() == preprocessing_identity(Decoding(resize="short_side")) == "1"
    for one in (
        Decoding(), Decoding(1, (0, 1, 2), (-1000.0, 3.5), True, "none"), Decoding(4, value_range=(0.0, 1e-9)),
    ):  # fmt: skip
        assert decoding_of(preprocessing_identity(one)) == one
    for other in ("unknown", "", "2", "1 channels=__import__('os')", "1 a=1", "1  ", "1 channels=" + "(" * 9_999):
        assert decoding_of(other) is None


def test_a_source_of_ones_own_may_say_it_itself(tmp_path: Path) -> None:
    class Own:
        def __init__(self, decoding: Decoding) -> None:
            self._decoding = decoding

        @property
        def decoding(self) -> Decoding:
            return self._decoding

    own = Own(Decoding(resize="none"))
    assert with_resize(own, "none") is own
    with refused(UsageError, "resize"):
        with_resize(Own(Decoding()), "none")
    source = open_source(write_images(tmp_path / "x", 1))
    assert with_resize(source, "none").decoding.resize == "none" and source.decoding.resize == "short_side"


def test_a_protocol_that_resizes_refuses_pixels_as_they_are(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "x", 2))
    for protocol in (PINNED, *VARIANTS.values()):
        assert len(list(image_batches(source, None, 16, batch_size=2, protocol=protocol))) == 1
        if protocol.resize != PINNED.resize:
            with refused(UsageError, "--resize"):
                next(image_batches(with_resize(source, "none"), None, 16, batch_size=2, protocol=protocol))
    assert len(list(image_batches(with_resize(source, "none"), None, 16, batch_size=2))) == 1
