"""docs/latent_store_format.md is enough: a reader written from it alone, without a line of this project, reads what
`LatentDataset` reads."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from diffusers import AutoencoderKL
from store_sources import AFTER, Album
from stores import encode
from tiny_networks import vq_model

from ldm_vae.latent_store import LatentDataset, read_manifest

# --- the reader: from the page alone ----------------------------------------------------------------------------------


def stored_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """8 bytes with the header's length, the header as JSON, the tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    kinds = {"F16": "<f2", "F32": "<f4", "BF16": "<u2", "F64": "<f8", "U8": "u1", "U16": "<u2", "I32": "<i4"}
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            first, stop = (8 + length + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[first:stop], kinds[entry["dtype"]]).reshape(entry["shape"])
            found[name] = (values.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else values
    return found


def samples(store: Path) -> Iterator[dict[str, Any]]:
    """Every sample of a store, in order: its tensors and its columns."""
    manifest = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["format"], manifest["version"], manifest["complete"]) == ("ldm-vae latent store", 1, True)
    for shard in manifest["shards"]:
        for extension, file in shard["files"].items():
            data = (store / "shards" / f"{shard['name']}.{extension}").read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
        tensors = stored_tensors(store / "shards" / f"{shard['name']}.safetensors")
        rows = pq.read_table(store / "shards" / f"{shard['name']}.parquet").to_pylist()
        for number, row in enumerate(rows):
            if number not in shard["removed"]:
                yield row | {name: values[number] for name, values in tensors.items() if name != "statistics"}


def scaled(z: npt.NDArray[Any], normalisation: dict[str, Any]) -> npt.NDArray[Any]:
    """What a diffusion model sees."""
    z = z.astype("f4")
    if normalisation["latents_mean"] is not None:
        mean, std = (np.asarray(normalisation[name])[:, None, None] for name in ("latents_mean", "latents_std"))
        return (z - mean) * normalisation["scaling_factor"] / std
    return (z - (normalisation["shift_factor"] or 0.0)) * normalisation["scaling_factor"]


# --- it agrees --------------------------------------------------------------------------------------------------------

CHANNEL = {
    "scaling_factor": 1.0,
    "shift_factor": None,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1, 2, 3, 4],
}


@pytest.mark.parametrize(
    ("dtype", "normalisation"),
    [
        ("fp16", {"scaling_factor": 0.3, "shift_factor": None, "latents_mean": None, "latents_std": None}),
        ("bf16", {"scaling_factor": 0.3, "shift_factor": 0.2, "latents_mean": None, "latents_std": None}),
        ("fp32", CHANNEL),
    ],
)
def test_moments(tiny_vae: AutoencoderKL, tmp_path: Path, dtype: str, normalisation: dict[str, Any]) -> None:
    store = tmp_path / "s"
    tiny_vae.register_to_config(**normalisation)
    encode(tiny_vae, Album(bad=(4,)), store, dtype=dtype, views="flip")
    encode(tiny_vae, Album(**AFTER), store, dtype=dtype, views="flip", update=True)
    ours, theirs = LatentDataset(store, sample=False), list(samples(store))
    mirrored = LatentDataset(store, sample=False, view="flip")
    assert [row["key"] for row in theirs] == [item["key"] for item in ours]
    named = json.loads((store / "manifest.json").read_text())["recorded"]["normalisation"]
    assert named == normalisation
    for index, row in enumerate(theirs):
        assert row["caption"] == ours[index]["caption"]
        for view, data in (("mean", ours), ("mean.flip", mirrored)):
            found = data[index]["latents"].numpy()
            np.testing.assert_allclose(scaled(row[view], named), found, rtol=2e-6, atol=1e-6)
        assert row["logvar"].min() >= -30 and row["logvar"].max() <= 20


def test_statistics_follow_from_what_is_stored(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    encode(tiny_vae, Album(), tmp_path / "s", dtype="fp32")
    mean, logvar = (
        np.stack([row[name] for row in samples(tmp_path / "s")]).astype("f8") for name in ("mean", "logvar")
    )
    m = mean.mean((0, 2, 3))
    v = np.exp(logvar).mean((0, 2, 3)) + np.square(mean - m[:, None, None]).mean((0, 2, 3))
    found = read_manifest(tmp_path / "s").statistics or {}
    np.testing.assert_allclose(found["mean"], m, rtol=1e-10)
    np.testing.assert_allclose(found["variance"], v, rtol=1e-10)
    assert found["scaling_factor"] == pytest.approx(1 / math.sqrt(v.mean() + m.var()), rel=1e-10)
    sums = stored_tensors(tmp_path / "s" / "shards" / "00000000.safetensors")["statistics"]
    assert sums.shape == (201, 2 + 3 * 4) and sums[0, 0] == 8


def test_indices(tmp_path: Path) -> None:
    encode(vq_model(), Album(), tmp_path / "s")  # type: ignore[arg-type]
    ours = LatentDataset(tmp_path / "s")
    for index, row in enumerate(samples(tmp_path / "s")):
        np.testing.assert_array_equal(row["indices"], ours[index]["indices"].numpy())
    uses = stored_tensors(tmp_path / "s" / "shards" / "00000000.safetensors")["statistics"]
    assert uses.shape == (1, 1 + 32) and uses[0, 1:].sum() == 8 * ours[0]["indices"].numel()


def test_a_row_that_was_removed_is_not_read(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """The reader above would be worth little if it agreed because nothing was removed."""
    encode(tiny_vae, Album(), tmp_path / "s")
    encode(tiny_vae, Album(**AFTER), tmp_path / "s", update=True)
    keys = [row["key"] for row in samples(tmp_path / "s")]
    assert "img_002" not in keys and "img_100" in keys and len(keys) == len(set(keys)) == 18
