"""Figures of the page say what they show and do not grow with what they show: axes, scales, channels, capitals."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.core.pictures import save
from ldm_vae.latent_space import summary
from ldm_vae.metrics.batches import ImageBatch
from ldm_vae.metrics.metric import ImageMetric
from ldm_vae.metrics.pictures import Pictures
from ldm_vae.report import build_report, images
from ldm_vae.report.charts import MOST, Series, bar_chart, extremes, line_chart, small_charts
from ldm_vae.report.gallery import gallery, samples
from ldm_vae.report.images import NEGATIVE, POSITIVE, read_map, signed_map
from ldm_vae.report.training import curves


def decoded(uri: str, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert(mode)).astype(int)


# --- channels ---------------------------------------------------------------------------------------------------------


def log(channels: int) -> list[dict[str, Any]]:
    return [
        {"images": images, "loss/total": 1.0}
        | {f"kl_nats_per_channel/{channel}": channel + images / 100 for channel in range(channels)}
        for images in (100, 200, 300)
    ]


@pytest.mark.parametrize("channels", [8, 128, 768])
def test_a_page_has_as_many_charts_for_many_channels_as_for_few(channels: int) -> None:
    charts = curves(log(channels), {})
    assert [chart.title for chart in charts] == ["Loss", "KL per channel, over training", "KL per channel, at the end"]
    small, last = (str(chart.drawing) for chart in charts[1:])
    assert small.count("<polyline") == min(channels, MOST)
    assert last.count("<rect") + last.count("<polyline") <= MOST
    assert "nats per image" in small and "nats per image" in last
    if channels > MOST:
        # the ends of the order are among those shown, and are named
        assert ">0</text>" in small and f">{channels - 1}</text>" in small
        assert f"Largest: channels {channels - 1} (" in charts[2].hint and "smallest: 2 (" in charts[2].hint


def test_small_charts_share_one_scale() -> None:
    drawing = str(small_charts({0: [(0, 0.0), (1, 10.0)], 1: [(0, 0.0), (1, 5.0)]}, label="", x="images", y="nats"))
    high, low = (float(points.split(",")[-1]) for points in re.findall(r'points="([^"]+)"', drawing))
    base = float(re.findall(r'points="[^,]+,([^ ]+) ', drawing)[0])
    assert base - high == pytest.approx(2 * (base - low), abs=0.2)
    assert "nats, each chart from 0 to 10" in drawing and "images, 0 to 1<" in drawing


def test_many_bars_are_a_sorted_line_and_the_extremes_have_names() -> None:
    values = [float(value) for value in np.random.default_rng(0).permutation(128)]
    drawing = str(bar_chart(values, label="", y="nats"))
    heights = [float(point.split(",")[1]) for point in re.findall(r'points="([^"]+)"', drawing)[0].split()]
    assert len(heights) == 128 and heights == sorted(heights)
    assert "rank among 128 channels, the largest first" in drawing
    assert extremes(values, "nats").startswith(f"Largest: channels {values.index(127)} (127)")
    assert extremes(values[:8], "nats") == ""


def test_lines_beyond_the_colours_are_told_apart() -> None:
    lines = [Series(str(number), [(0, 1.0), (1, float(number))]) for number in range(7)]
    drawn = re.findall(r'<polyline class="line ([^"]+)"', str(line_chart(lines, label="", x="", y="")))
    assert len({*drawn}) == 7


def test_the_correlation_is_one_picture_from_minus_one_to_one() -> None:
    picture = decoded(signed_map(np.array([[1.0, -0.5], [0.0, -1.0]])), "RGBA")
    assert picture[0, 0].tolist() == [*POSITIVE, 255] and picture[1, 1].tolist() == [*NEGATIVE, 255]
    assert picture[0, 1, 3] == 128 and picture[1, 0, 3] == 0


# --- scales of maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [12, 90])
def test_a_difference_fills_its_scale_and_the_page_says_which(tmp_path: Path, error: int) -> None:
    draw = torch.Generator().manual_seed(0)
    original = torch.randint(100, 156, (3, 32, 32), generator=draw).float()
    other = original + torch.randint(-error, error + 1, (3, 32, 32), generator=draw)
    (tmp_path / "pictures").mkdir()
    for kind, pixels in (("original", original), ("reconstruction", other), ("latent", original)):
        save(pixels, tmp_path / "pictures" / f"000.{kind}.png")
    vae = {"reconstruction": "000.reconstruction.png", "latent": "000.latent.png", "metrics": {}}
    found = gallery(
        tmp_path, [{"name": "000", "key": "k", "index": 0, "kind": "shown", "vaes": [vae]}], [{"vae": {"name": "v"}}]
    )
    assert found is not None and found["scales"]["shown"]["reach"] == error
    values = decoded(found["shown"][0]["vaes"][0]["difference"])
    assert ((values == 0) | (values == 255)).mean() < 0.05, "saturated"
    assert values.max() - values.min() > 200, "hardly to be seen"


def test_the_map_of_a_small_lpips_has_more_than_a_few_levels(tmp_path: Path, tiny_vae: Any) -> None:
    where = torch.linspace(0, 0.01, 16 * 16).view(1, 1, 16, 16)
    metric = ImageMetric("lpips_alex", "lower", lambda pair: torch.zeros(1), lambda pair: where)
    pictures = Pictures(tmp_path)
    batch = ImageBatch([0], ["key"], torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    pictures.add(tiny_vae, [batch], [metric], torch.device("cpu"), kinds={0: "shown"}, batch_size=1)
    found = read_map(tmp_path / "000.lpips.png")
    assert len(np.unique(found)) > 200
    assert found == pytest.approx(where[0, 0].numpy(), abs=1e-5)
    Image.fromarray(np.full((2, 2), 51, dtype=np.uint8)).save(tmp_path / "old.png")  # 8 bits, as it was before
    assert read_map(tmp_path / "old.png") == pytest.approx(np.full((2, 2), 0.2))


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_title_keeps_its_capitals(tmp_path: Path) -> None:
    path = tmp_path / "Draws of N(0, I)-0.png"
    Image.new("RGB", (8, 8)).save(path)
    assert samples([path])[0]["title"] == "Draws of N(0, I)"


def test_a_prior_near_in_its_moments_only_is_not_called_near() -> None:
    """A posterior far narrower than N(0, I) was trained without a KL that counts, whatever the channels' moments."""
    found = {
        "channels": {"std": [0.9], "posterior_std": [0.002]},
        "information": {"prior_gap_nats": [10.0, 500.0]},
        "vae": {"latent_values": 256},
    }
    assert "noise of it" in summary.about_normal(found)
    found["channels"]["posterior_std"] = [0.4]
    assert "makes images of both" in summary.about_normal(found)


# --- contrast and size ------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_words_are_readable_in_both_schemes() -> None:
    style = (Path(build_report.__code__.co_filename).parent / "page" / "style.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media")[:2])
    for scheme in (light, dark):
        for words in ("ink", "soft", "accent"):
            pair = sorted(luminance(scheme[name]) for name in (words, "paper"))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (words, scheme[words])


def test_a_film_has_its_frames_below_each_other(tmp_path: Path) -> None:
    clip = torch.randint(0, 256, (3, 5, 12, 10), generator=torch.Generator().manual_seed(0)).float()
    save(clip, tmp_path / "clip.png")
    film = images.film_of(tmp_path / "clip.png", 5 * 12 * 10)
    assert film == images.Film(5, 1, lossless=True)
    tall = clip.transpose(0, 1).permute(0, 2, 3, 1).reshape(60, 10, 3).numpy()
    assert np.array_equal(images.read_pixels(tmp_path / "clip.png"), tall)
    assert np.array_equal(decoded(images.embed(tmp_path / "clip.png", film)), tall)
    # made smaller, each frame is by itself: none has colours of its neighbours
    small = decoded(images.embed(tmp_path / "clip.png", images.Film(5, 5)))
    assert small.shape == (5 * 3, 2, 3)
    for number in range(5):
        frame = Image.fromarray(tall[12 * number : 12 * number + 12].astype(np.uint8)).reduce(5)
        assert np.array_equal(small[3 * number : 3 * number + 3], np.asarray(frame))


@pytest.mark.parametrize(
    ("frames", "height", "pixels", "expected"),
    [
        (1, 20_000, 2**30, images.Film()),  # images are kept as they are
        (9, 64, images.LOSSLESS_PIXELS, images.Film(9)),
        (9, 64, images.LOSSLESS_PIXELS + 1, images.Film(9, lossless=False)),
        (17, 256, images.MOST_PIXELS + 1, images.Film(17, 2, lossless=False)),
        (81, 256, 0, images.Film(81, 2)),  # more rows than a WebP has
    ],
)
def test_films_of_many_pixels_are_made_smaller(frames: int, height: int, pixels: int, expected: images.Film) -> None:
    assert images.fitted(frames, height, pixels) == expected


def test_an_interval_is_a_band_around_its_line() -> None:
    band = [(1.0, 2.0, 6.0), (2.0, 3.0, 9.0)]
    svg = str(line_chart([Series("mean", [(1.0, 4.0), (2.0, 5.0)], band=band)], label="x", x="frame", y="dB"))
    points = re.search(r'<polygon class="band s0" points="([^"]+)"', svg)
    assert points is not None
    places = [tuple(map(float, point.split(","))) for point in points[1].split()]
    # along the low ends and back along the high ones; a larger value is higher up
    assert [x for x, _ in places] == [places[0][0], places[1][0], places[1][0], places[0][0]]
    low_first, low_second, high_second, high_first = (y for _, y in places)
    assert high_second < high_first < low_second < low_first
