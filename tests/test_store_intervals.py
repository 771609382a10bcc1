"""Intervals of the measured scaling cover as often as they say, at a handful of images too; below that there are none.

Simulated: images with an offset of their own, a contrast of their own, or both; in one channel, in four that vary
together and in sixteen that do not. The sums are those of a store, the replicates those of its Poisson bootstrap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL

from ldm_vae.core import intervals
from ldm_vae.data.source import open_source
from ldm_vae.export.card import statistics_table
from ldm_vae.export.measurement import statistics_of_store
from ldm_vae.latent_store.format.layout import MANIFEST, SHARDS
from ldm_vae.latent_store.format.manifest import read_manifest
from ldm_vae.latent_store.format.statistics import REPLICATES, LatentStatistics
from ldm_vae.latent_store.maintain.summary import describe
from ldm_vae.latent_store.write.finalize import with_intervals
from ldm_vae.latent_store.write.writer import write_store

POSITIONS, TRIALS = 16, 400


def data_sets(images: int, channels: int, offset: float, contrast: float, common: bool) -> Iterator[LatentStatistics]:
    """Statistics of latents whose mean is 0 and whose variance is offset^2 + exp(2 contrast^2)."""
    random = np.random.default_rng(0)
    for _ in range(TRIALS):
        shared = random.standard_normal((images, 1, 1))
        own = random.standard_normal((images, channels, 1))
        place = np.sqrt(0.5) * (shared + own) if common else own
        spread = np.exp(contrast * random.standard_normal((images, 1, 1)))
        z = offset * place + spread * random.standard_normal((images, channels, POSITIONS))
        rows = np.zeros((images, 2 + 3 * channels))
        rows[:, 0], rows[:, 1] = 1, POSITIONS
        rows[:, 2 : 2 + channels], rows[:, 2 + channels : 2 + 2 * channels] = z.sum(axis=2), np.square(z).sum(axis=2)
        weights = np.vstack([np.ones(images), random.poisson(1.0, (REPLICATES, images))])
        yield LatentStatistics(weights @ rows)


@pytest.mark.slow
@pytest.mark.parametrize("images", [5, 9, 30])
@pytest.mark.parametrize(
    ("channels", "offset", "contrast", "common"),
    [(1, 3.0, 0.0, False), (4, 1.0, 0.5, True), (4, 0.3, 0.5, False), (16, 1.0, 0.3, False)],
)
def test_intervals_cover_nine_times_in_ten(
    images: int, channels: int, offset: float, contrast: float, common: bool
) -> None:
    variance = offset**2 + np.exp(2 * contrast**2)
    truth = {"scaling_factor": variance**-0.5, "shift_factor": 0.0}
    truth |= {"latents_std": variance**0.5, "latents_mean": 0.0}
    inside = dict.fromkeys(truth, 0.0)
    for found in data_sets(images, channels, offset, contrast, common):
        assert found.intervals is not None
        for name, value in truth.items():
            low, high = (np.asarray(end) for end in found.intervals[name])
            inside[name] += float(np.mean((low <= value) & (value <= high))) / TRIALS
    assert all(share >= 0.90 for share in inside.values()), inside


def measured(images: int, channels: int = 2) -> LatentStatistics:
    found = LatentStatistics()
    found.update_values(np.random.default_rng(1).standard_normal((images, channels, 4, 4)), None)
    return found


def test_a_table_does_not_grow_with_channels() -> None:
    assert len(statistics_table(measured(9, 16))) == 4 + 2 * 16
    found = measured(9, 768)
    table = statistics_table(found)
    assert len(table) == 4 + 2 * 2
    smallest = found.to_json()["latents_std"].index(min(found.to_json()["latents_std"]))
    assert sum(f"std of channel {smallest}, the smallest |" in line for line in table) == 1


def test_of_few_images_there_is_none_and_that_is_said() -> None:
    for images in range(1, intervals.FEWEST):
        found = measured(images)
        assert found.intervals is None and found.to_json()["ci95"] is None
        assert str(intervals.FEWEST) in intervals.why_none(images)
        assert all(line.endswith("| none |") for line in statistics_table(found)[2:])
    found = measured(intervals.FEWEST)
    assert found.intervals is not None
    for name, (low, high) in found.intervals.items():
        value = np.asarray(found.to_json()[name])
        assert np.all((np.asarray(low) < value) & (value < np.asarray(high)))


def test_a_channel_that_never_varies_has_an_interval_of_nothing() -> None:
    found = LatentStatistics()
    values = np.random.default_rng(1).standard_normal((9, 2, 4, 4))
    values[:, 1] = 1.0
    found.update_values(values, None)
    assert found.intervals is not None
    assert json.loads(json.dumps(found.intervals, allow_nan=False))["latents_std"][1][1] == 0.0


def test_views_of_one_image_are_not_two_images() -> None:
    values = np.random.default_rng(1).standard_normal((9, 2, 4, 4))
    once, twice = LatentStatistics(), LatentStatistics()
    once.update_values(values, None, keys=range(9))
    for view in (values, values[..., ::-1]):
        twice.update_values(view, None, keys=range(9))
    assert once.intervals is not None and twice.intervals is not None
    np.testing.assert_allclose(twice.intervals["scaling_factor"], once.intervals["scaling_factor"])
    few = LatentStatistics()
    for view in (values[:3], values[:3, ..., ::-1]):
        few.update_values(view, None, keys=range(3))
    assert few.images == 6 and few.intervals is None


def test_an_older_versions_percentiles_are_shown_of_many_images_only() -> None:
    for images in (9, intervals.ENOUGH):
        tree = measured(images).to_json()
        del tree["ci95_method"]
        assert (LatentStatistics.from_json(tree).intervals is None) == (images == 9)


def test_a_store_of_an_older_version_gets_its_intervals_from_its_own_sums(
    tiny_vae: AutoencoderKL, image_folder: Path, tmp_path: Path
) -> None:
    """Its manifest holds percentiles; the sums in its shards are those of today."""
    vae, folder = tiny_vae, tmp_path / "store"
    write_store(vae, open_source(str(image_folder)), folder, resolution=32, batch_size=4, source_name="x", vae_name="x")
    path = folder / MANIFEST
    new = json.loads(path.read_text())
    assert new["statistics"]["images"] >= intervals.FEWEST
    old = dict(new["statistics"]) | {
        "ci95": {name: (0.0 * np.array(ends)).tolist() for name, ends in new["statistics"]["ci95"].items()}
    }
    del old["ci95_method"]
    path.write_text(json.dumps(new | {"statistics": old}))
    assert with_intervals(folder, read_manifest(folder)).statistics == new["statistics"]
    assert statistics_of_store(vae, str(folder)).intervals == new["statistics"]["ci95"]
    low, high = new["statistics"]["ci95"]["scaling_factor"]
    assert f"[{low:.4f}, {high:.4f}]" in describe(folder, read_manifest(folder))
    for shard in (folder / SHARDS).glob("*.safetensors"):
        shard.write_bytes(b"")
    assert with_intervals(folder, read_manifest(folder)).statistics == old
    assert intervals.why_none(old["images"]) in describe(folder, read_manifest(folder))
