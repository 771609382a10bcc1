"""The cache of kohya's sd-scripts: what its versions find is what was said, array by array."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS, shard_files

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import LatentDataset, write_store
from ldm_vae.latent_store.convert.conversion import convert_from, convert_to
from ldm_vae.latent_store.convert.formats import Options, kohya

KOHYA = Options(model="sdxl")


def test_sd_scripts_finds_what_it_reads(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    write_store(tiny_vae, Pictures(3), tmp_path / "s", **SETTINGS, store="sample", views="flip")
    convert_to(tmp_path / "s", tmp_path / "out", "kohya", KOHYA)
    with np.load(tmp_path / "out" / "folder" / "img_001_0020x0024_sdxl.npz") as file:
        plain = dict(file)
    data = LatentDataset(tmp_path / "s", raw=True)
    np.testing.assert_array_equal(plain["latents_8x8"], data[1]["sample"].numpy())
    assert plain["latents_8x8"].dtype == np.float32 and "latents_flipped_8x8" in plain
    assert plain["original_size_8x8"].tolist() == [20, 24]
    left, top, right, bottom = plain["crop_ltrb_8x8"].tolist()  # 20 x 24 fitted into 16 x 16
    assert (left, top, bottom) == (1, 0, 16) and right == pytest.approx(1 + 16 * 20 / 24)

    tiny_vae.register_to_config(scaling_factor=0.36, shift_factor=0.12)
    write_store(tiny_vae, Pictures(3), tmp_path / "f", **SETTINGS, store="sample", dtype="fp32")
    convert_to(tmp_path / "f", tmp_path / "flux", "kohya", Options(model="flux"))
    with np.load(tmp_path / "flux" / "folder" / "img_001_0020x0024_flux.npz") as file:
        scaled = file["latents_8x8"]
    np.testing.assert_array_equal(scaled, LatentDataset(tmp_path / "f")[1]["latents"].numpy())
    convert_from(tmp_path / "flux", tmp_path / "b", "kohya")
    raw, back = LatentDataset(tmp_path / "f", raw=True), LatentDataset(tmp_path / "b", raw=True)
    torch.testing.assert_close(back[1]["sample"], raw[1]["sample"], rtol=1e-6, atol=1e-6)
    with refused(UsageError, "--model"):
        convert_to(tmp_path / "s", tmp_path / "x", "kohya")


VERSIONS = ((0, 9, 1), (0, 10, 1), (0, 10, 2))


def sd_scripts_reads(
    version: tuple[int, int, int], image: Path, size: tuple[int, int], bucket: tuple[int, int], model: str
) -> np.ndarray | None:
    """Load as that version of sd-scripts does, an image of `size` (W, H) in a `bucket` (W, H); None: it encodes anew.

    Written after library/train_util.py of 0.9.1, library/strategy_{base,sd,flux}.py of 0.10.1 and PR 2276 of 0.10.2.
    """
    modern = image.with_name(f"{image.stem}_{size[0]:04d}x{size[1]:04d}_{model}.npz")
    oldest = image.with_suffix(".npz")
    by_size = f"_{bucket[1] // 2}x{bucket[0] // 2}"  # its stride is 8, this network's 2
    if version < (0, 10, 0):
        file, ends = oldest, [""]
    elif model in ("sd3", "flux"):
        file, ends = modern, [by_size]
    else:
        file = oldest if oldest.exists() else modern
        ends = [by_size, ""] if version >= (0, 10, 2) else [""]
    if not file.exists() or (model in ("sd3", "flux") and version < (0, 10, 0)):
        return None
    with np.load(file) as arrays:
        for end in ends:
            if f"latents{end}" in arrays:
                assert len(arrays[f"original_size{end}"]) == 2 and len(arrays[f"crop_ltrb{end}"]) == 4
                return arrays[f"latents{end}"]
    return None


@pytest.mark.parametrize("model", kohya.MODELS)
@pytest.mark.parametrize("names", kohya.NAMES)
def test_the_versions_that_are_named_find_the_cache_and_no_others(
    names: str, model: str, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    write_store(tiny_vae, Pictures(3), tmp_path / "s", **SETTINGS, store="sample", dtype="fp32")
    options = Options(model=model, names=names)
    if model not in kohya.READERS[names]:
        with refused(UsageError, "--names"):
            convert_to(tmp_path / "s", tmp_path / "out", "kohya", options)
        return
    convert_to(tmp_path / "s", tmp_path / "out", "kohya", options)
    data = LatentDataset(tmp_path / "s", raw=model != "flux")
    expected = data[1]["latents" if model == "flux" else "sample"].numpy()
    since = kohya.READERS[names][model].since
    image = tmp_path / "out" / "folder" / "img_001.png"
    for version in VERSIONS:
        read = sd_scripts_reads(version, image, (20, 24), (16, 16), model)
        assert (read is not None) == (version >= since), (names, model, version)
        if read is not None:
            np.testing.assert_array_equal(read, expected)
    assert ".".join(map(str, since)) in kohya.readers(options)
    back, _ = convert_from(tmp_path / "out", tmp_path / "b", "kohya")
    assert back.samples == 3 and (model == "flux" or shard_files(tmp_path / "b") == shard_files(tmp_path / "s"))


@pytest.mark.parametrize("names", ["plain", "old"])
def test_names_without_a_size_hold_one_resolution_of_an_image(
    names: str, tiny_vae: AutoencoderKL, tmp_path: Path
) -> None:
    write_store(tiny_vae, Pictures(3), tmp_path / "s", **SETTINGS | {"resolution": (8, 16)}, store="sample")
    with refused(WorkError, "--names"):
        convert_to(tmp_path / "s", tmp_path / "out", "kohya", Options(model="sd", names=names))
    assert not (tmp_path / "out").exists()
