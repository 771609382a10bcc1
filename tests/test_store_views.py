"""Views from one decode, several resolutions, aspect buckets, stored pixels, tiles."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from checksums import tree
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from sentences import refused
from store_sources import Mixed, Pictures
from stores import SETTINGS
from tiny_classes import tiny

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.latents import encode
from ldm_vae.core.errors import UsageError
from ldm_vae.data.decoding import decode
from ldm_vae.data.transforms import centre_crop, to_pixels
from ldm_vae.latent_store import read_manifest, verify, write_store
from ldm_vae.latent_store.write.tiled_encode import (
    check_tile,
    encode_tiled,
    seam_error,
    tile_of,
)


@dataclass
class Counting(Pictures):
    """Counts how often each picture is read."""

    reads: Counter[int] = field(default_factory=Counter)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return super().__getitem__(index)


def moments(vae: AutoencoderKL, pictures: list[torch.Tensor], batch: int = 4) -> torch.Tensor:
    padded = torch.zeros((batch, *pictures[0].shape), dtype=torch.uint8)
    padded[: len(pictures)] = torch.stack(pictures)
    with torch.no_grad():
        return encode(vae, to_pixels(padded)).mean[: len(pictures)]


def test_ten_views_of_one_decode_are_what_they_are_called(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    source = Counting(3, size=(40, 24))
    write_store(tiny_vae, source, tmp_path / "s", **SETTINGS, dtype="fp32", views="ten_crop")
    assert source.reads == {0: 1, 1: 1, 2: 1}
    tensors = load_file(tmp_path / "s" / "shards" / "00000000.safetensors")
    views = read_manifest(tmp_path / "s").identity.views
    assert len(views) == 10 and set(tensors) == {"statistics"} | {
        f"{name}.{view}".rstrip(".") for name in ("mean", "logvar") for view in views
    }
    rows = pq.read_table(tmp_path / "s" / "shards" / "00000000.parquet").to_pylist()
    images = [decode(source[index].image) for index in range(3)]
    centre = [centre_crop(image, 16).pixels for image in images]
    assert torch.equal(tensors["mean"], moments(tiny_vae, centre))
    assert torch.equal(tensors["mean.flip"], moments(tiny_vae, [crop.flip(2) for crop in centre]))
    for corner in ("top_left", "top_right", "bottom_left", "bottom_right"):
        crops = []
        for image, row in zip(images, rows, strict=True):
            top, left, height, width = row[f"crop_box.{corner}"]
            assert (height, width) == (21, 21)  # 7/8 of the short side
            assert top == (0 if corner.startswith("top") else 19) and left == (0 if corner.endswith("left") else 3)
            crops.append(centre_crop(image[:, top : top + height, left : left + width], 16).pixels)
        assert torch.equal(tensors[f"mean.{corner}"], moments(tiny_vae, crops))
        assert torch.equal(tensors[f"mean.{corner}.flip"], moments(tiny_vae, [crop.flip(2) for crop in crops]))
    assert verify(tmp_path / "s") == []
    assert (read_manifest(tmp_path / "s").statistics or {})["images"] == 30


def test_several_resolutions_from_one_decode(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    source = Counting(10, bad=(4,))
    settings = {**SETTINGS, "resolution": (16, 8)}
    write_store(tiny_vae, source, tmp_path / "s", **settings)
    assert max(source.reads.values()) == 2 and source.reads[0] == 1  # the bad one is read again for its checksum
    manifest = read_manifest(tmp_path / "s")
    assert [(shard.name, shard.rows, shard.shape, shard.resolution) for shard in manifest.shards] == [
        ("00000000-8-8x8", 7, (4, 4, 4), 8),
        ("00000000-16-16x16", 7, (4, 8, 8), 16),
        ("00000001-8-8x8", 2, (4, 4, 4), 8),
        ("00000001-16-16x16", 2, (4, 8, 8), 16),
    ]
    assert (manifest.samples, manifest.quarantined) == (18, 1)
    assert verify(tmp_path / "s") == []


@pytest.mark.parametrize("workers", [0, 2])
def test_aspect_buckets_put_each_picture_in_its_shape(tiny_vae: AutoencoderKL, tmp_path: Path, workers: int) -> None:
    settings = {**SETTINGS, "resolution": 24, "bucket_step": 4, "num_workers": workers}
    write_store(tiny_vae, Mixed(11), tmp_path / "s", **settings)
    manifest = read_manifest(tmp_path / "s")
    found = {(shard.unit, shard.size): shard.rows for shard in manifest.shards}
    assert found == {
        (0, (28, 20)): 3, (0, (24, 24)): 3, (0, (20, 28)): 2,
        (1, (28, 20)): 1, (1, (24, 24)): 1, (1, (20, 28)): 1,
    }  # fmt: skip
    for shard in manifest.shards:
        assert shard.shape == (4, shard.size[0] // 2, shard.size[1] // 2)
        rows = pq.read_table(tmp_path / "s" / "shards" / f"{shard.name}.parquet").to_pylist()
        assert all(row["bucket"] == f"{shard.size[0]}x{shard.size[1]}" for row in rows)
        assert [row["source_index"] for row in rows] == sorted(row["source_index"] for row in rows)
    assert verify(tmp_path / "s") == []
    with refused(UsageError, "buckets") as error:
        write_store(tiny_vae, Mixed(11), tmp_path / "t", **{**settings, "bucket_step": 3})
    assert "f = 2, got 3" in str(error.value)


def test_stored_pixels_are_the_crops(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(5), tmp_path / "s", **SETTINGS, pixels=True, views="flip")
    tensors = load_file(tmp_path / "s" / "shards" / "00000000.safetensors")
    assert set(tensors) == {"mean", "logvar", "mean.flip", "logvar.flip", "pixels", "statistics"}
    crops = [centre_crop(decode(Pictures(5)[index].image), 16).pixels for index in range(5)]
    assert torch.equal(tensors["pixels"], torch.stack(crops))


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(64, 64), (40, 72), (32, 200), (16, 16)])
def test_tiles_of_a_local_encoder_give_the_whole(sides: tuple[int, int]) -> None:
    """Without norms and attention an encoder only looks as far as its kernels: tiles with enough overlap are exact."""
    torch.manual_seed(0)
    local = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)

    def moments_of(pixels: torch.Tensor) -> Any:
        from ldm_vae.autoencoder.latents import Moments

        return Moments.from_parameters(local(pixels))

    pixels = torch.randn(2, 3, *sides)
    with torch.no_grad():
        whole, tiled = moments_of(pixels).mean, encode_tiled(moments_of, pixels, 32, 8, 2).mean
    assert tiled.shape == whole.shape
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    # a tile's border sees padding where the image goes on, with a small weight: off the seams it is exact
    assert float((tiled - whole)[inside].abs().median()) < 1e-6
    assert float((tiled - whole).abs().max()) < 0.35 * float(whole.std())


def test_more_overlap_means_smaller_seams(tiny_vae: AutoencoderKL) -> None:
    pixels = to_pixels(centre_crop(decode(Pictures(1, size=(96, 96))[0].image), 96).pixels)[None]
    few, many = seam_error(tiny_vae, pixels, 32, 0, 2), seam_error(tiny_vae, pixels, 32, 16, 2)
    assert many[0] < few[0] and many[1] < few[1]
    assert max(seam_error(tiny_vae, pixels, 96, 16, 2)) < 1e-6


def test_a_store_in_tiles_does_not_depend_on_processes(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    for name, threads in (("one", 1), ("two", 2)):
        write_store(tiny_vae, Pictures(9), tmp_path / name, **SETTINGS, tile=(8, 2), encode_threads=threads)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert read_manifest(tmp_path / "one").identity.tile == (8, 2)
    with refused(UsageError, "tile") as error:
        write_store(tiny_vae, Pictures(9), tmp_path / "one", **SETTINGS)
    assert "[8, 2], not None" in str(error.value)


def test_tile_settings_are_checked() -> None:
    of_f8 = tiny("AutoencoderKLWan")
    assert tile_of(None, None, 8) is None
    assert tile_of(512, None, 8) == (512, 128) and tile_of(24, None, 8) == (24, 0)
    with refused(UsageError, "tile_overlap"):
        tile_of(None, 8, 8)
    with refused(UsageError, "tile") as error:
        check_tile(100, 0, of_f8)
    assert "f = 8, got 100" in str(error.value)
    with refused(UsageError, "tile_overlap") as error:
        check_tile(64, 40, of_f8)
    assert "f = 8 up to 32, got 40" in str(error.value)


# --- precision and memory ---------------------------------------------------------------------------------------------


class Moody(torch.nn.Module):
    """A VAE that gives NaN for bright pictures under autocast, for red ones always, and has memory for 2 at a time."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__()
        self.vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().eval()
        self.config, self.most, self.sizes = self.vae.config, most, []
        self.encoder = self.vae.encoder

    def encode(self, pixels: torch.Tensor) -> Any:
        if pixels.device.type == "meta":  # where sizes are measured
            return self.vae.encode(pixels)
        self.sizes.append(len(pixels))
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        found = self.vae.encode(pixels.float())
        red = (pixels[:, 0].mean((1, 2)) > 0.9) & (pixels[:, 1].mean((1, 2)) < -0.9)
        white = (pixels.mean((1, 2, 3)) > 0.9) & torch.is_autocast_enabled("cpu")
        found.latent_dist.parameters[red | white] = float("nan")
        return found


class Coloured(Pictures):
    """Picture 2 is white, picture 5 is red."""

    def pixels(self, index: int) -> Any:
        picture = super().pixels(index).copy()
        if index in (2, 5):
            picture[:] = 255
            picture[:, :, 1:] = 255 if index == 2 else 0
        return picture


def test_nan_is_tried_again_in_fp32_and_then_quarantined_with_its_key(tmp_path: Path) -> None:
    vae = Moody()
    write_store(vae, Coloured(8), tmp_path / "s", **SETTINGS, mixed_precision="bf16")
    manifest = read_manifest(tmp_path / "s")
    assert (manifest.samples, manifest.quarantined) == (7, 1)
    line = (tmp_path / "s" / "quarantine.jsonl").read_text()
    assert '"key": "folder/img_005.png"' in line and "NaN or infinity for it in fp32" in line
    keys = [row["key"] for row in pq.read_table(tmp_path / "s" / "shards" / "00000000.parquet").to_pylist()]
    assert "folder/img_002.png" in keys and len(keys) == 7
    assert verify(tmp_path / "s") == []


def test_values_that_the_storage_dtype_cannot_hold_are_not_stored(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_vae.quant_conv.bias[0] = 70000.0
    with pytest.raises(Exception, match="values that fp16 cannot hold"):
        write_store(tiny_vae, Pictures(3), tmp_path / "s", **SETTINGS)
    write_store(tiny_vae, Pictures(3), tmp_path / "t", **SETTINGS, dtype="fp32")
    assert read_manifest(tmp_path / "t").samples == 3


def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae = Moody(most=1)
    write_store(vae, Pictures(10), tmp_path / "s", **SETTINGS)
    assert "out of memory at batch_size 4: going on with 2" in caplog.text
    assert vae.sizes[:3] == [4, 2, 1] and set(vae.sizes[3:]) == {1}
    assert [settings.batch_size for settings in read_manifest(tmp_path / "s").settings] == [1]
    assert read_manifest(tmp_path / "s").samples == 10
    with pytest.raises(Exception, match="too little memory to encode one image of 16 x 16; --tile"):
        write_store(Moody(most=0), Pictures(10), tmp_path / "t", **SETTINGS)
