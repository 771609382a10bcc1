"""The page: self-contained, whole, every section there when it has data and none without, pictures pixel for pixel."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from html_page import Page
from images import write_images
from PIL import Image
from sentences import refused

from eval import reconstruction
from ldm_vae import cli
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core import intervals
from ldm_vae.core.errors import UsageError
from ldm_vae.report import build_report
from ldm_vae.report.charts import Series, bar_chart, compact, line_chart, linear_axis, log_axis
from ldm_vae.report.images import difference, heat_map, read_pixels
from ldm_vae.report.tables import PUBLISHED, published
from ldm_vae.report.training import adversary_change

SECTIONS = [
    "compare",
    "pictures",
    "metrics",
    "training",
    "health",
    "adversary",
    "latents",
    "samples",
    "worst",
    "protocol",
]

CONFIG = """\
output_dir: runs/shown
resolution: 32
adversary: {weight: 0.2, start_images: 600}
"""


def evaluate(output: Path, images: Path, *vaes: Path) -> None:
    argv = [*map(str, vaes), str(images), "--output", str(output), "--resolution", "32", "--batch_size", "6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval", *argv, "--pictures", "3", "--num_workers", "0", "--metrics", "psnr,ssim"])
        reconstruction.main()


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A folder of pictures, one with a hostile name, and two VAEs."""
    root = tmp_path_factory.mktemp("ingredients")
    images = write_images(root / "images", 12)
    (images / "img_0000.png").rename(images / "<b onload='alert(1)'>.png")
    vaes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
        config.build().save_pretrained(root / f"vae{seed}")
        vaes.append(root / f"vae{seed}")
    return images, vaes


@pytest.fixture(scope="module")
def run(ingredients: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that has everything the page can show."""
    images, vaes = ingredients
    folder = tmp_path_factory.mktemp("runs") / "shown"
    (folder / "latents").mkdir(parents=True)
    evaluate(folder / "report", images, vaes[0])
    (folder / "config.yaml").write_text(CONFIG)
    lines = [{"images": 100, "num_processes": 1, "loss/total": 0.5, "loss/l1": 0.3, "kl_nats_per_image": 10.0}]
    lines += [{"images": 200, "loss/total": 0.4, "loss/l1": 0.2, "my/own": 1.0, "odd": float("nan")}]
    lines += [{"images": 600, "validation/psnr": 20.0, "validation/lpips_alex": 0.5}]
    lines += [{"images": 900, "validation/psnr": 19.5, "validation/lpips_alex": 0.4, "adversary/weight": 0.3}]
    # a training that is just writing
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"images": 1000, "lo')
    statistics = {"images": 12, "scaling_factor": 0.9, "shift_factor": 0.1, "ci95": {"scaling_factor": [0.8, 1.0]}}
    statistics["ci95_method"] = intervals.METHOD
    (folder / "latents" / "manifest.json").write_text(json.dumps({"statistics": statistics}))
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    path = build_report(run)
    assert path == run / "report" / "index.html"
    return Page(path.read_text(encoding="utf-8"))


def test_every_section_is_there(page: Page) -> None:
    assert page.sections == SECTIONS


def test_nothing_comes_from_outside(run: Path, page: Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
    text = (run / "report" / "index.html").read_text(encoding="utf-8")
    without_images = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|WebSocket", without_images)


def test_pictures_are_embedded_pixel_for_pixel(run: Path, page: Page) -> None:
    pictures = json.loads((run / "report" / "pictures" / "pictures.json").read_text())
    by_id = {attributes["id"]: attributes for attributes in page.all("img") if "id" in attributes}
    for picture in pictures:
        files = {f"p{picture['name']}-original": f"{picture['name']}.original.png"}
        files[f"p{picture['name']}-0"] = picture["vaes"][0]["reconstruction"]
        for identity, file in files.items():
            content = base64.b64decode(by_id[identity]["src"].partition(",")[2])
            with Image.open(io.BytesIO(content)) as embedded:
                pixels = np.asarray(embedded.convert("RGB"))
            assert np.array_equal(pixels, read_pixels(run / "report" / "pictures" / file))
    words = [image["alt"] for image in page.all("img") if "src" in image]
    assert all(words) and len({*words}) == len(words)  # each picture has words of its own
    for attributes in page.all("img"):
        assert attributes.get("src", "data:image/").startswith("data:image/")


def test_numbers_are_those_of_metrics_json(run: Path, page: Page) -> None:
    metrics = json.loads((run / "report" / "metrics.json").read_text())["metrics"]
    low, high = metrics["psnr"]["ci95"]
    for value in (f"{metrics['psnr']['mean']:.2f}", f"{low:.2f} to {high:.2f}", f"{metrics['ssim']['mean']:.4f}"):
        assert value in page.text
    assert "0.90000" in page.text  # the store's scaling_factor
    assert "0.80000 to 1.00000" in page.text


def test_the_calls_that_give_the_page_again(ingredients: tuple[Path, list[Path]], run: Path, page: Page) -> None:
    images, vaes = ingredients
    measured = f"ldm-vae evaluate {vaes[0]} {images} --output {run / 'report'} --resolution 32 "
    assert f"{measured}--batch_size 6 --pictures 3 --num_workers 0 --metrics psnr,ssim" in page.text
    assert "ldm-vae train runs/shown/config.yaml" in page.text


def test_names_of_files_are_text(page: Page) -> None:
    assert "<b onload='alert(1)'>.png" in page.text
    assert not page.all("b") or all("onload" not in attributes for attributes in page.all("b"))


def test_unknown_numbers_of_the_log_get_a_chart_of_their_own(page: Page) -> None:
    assert "my/own" in page.text
    assert "odd" not in page.text.split()
    labels = [attributes["aria-label"] for attributes in page.all("svg")]
    assert "Loss over images seen" in labels


def test_what_the_adversary_changed(run: Path) -> None:
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    config = {"adversary": {"weight": 0.2, "start_images": 600}}
    change = adversary_change(log, config)
    assert change is not None
    by_heading = {row["heading"]: row for row in change["rows"]}
    assert by_heading["PSNR (dB)"]["change"] == "−0.50"
    assert by_heading["PSNR (dB)"]["better"] is False
    assert by_heading["LPIPS alex"]["better"] is True
    assert adversary_change(log, {}) is None
    assert adversary_change(log, {"adversary": {"weight": 0.2, "start_images": 500}}) is None  # nothing before it
    assert adversary_change(log, {"adversary": {"weight": 0.2, "start_images": 900}}) is None  # nothing after it


def test_the_worst_that_are_shown_above_are_named(run: Path, page: Page) -> None:
    result = json.loads((run / "report" / "metrics.json").read_text())
    pictures = json.loads((run / "report" / "pictures" / "pictures.json").read_text())
    shown = {picture["key"] for picture in pictures if picture["kind"] == "shown"}
    worst = [entry["key"] for entry in result["worst"]]
    assert {picture["key"] for picture in pictures if picture["kind"] == "worst"} == set(worst) - shown
    above = [picture["key"] for picture in pictures if picture["key"] in shown & set(worst)]
    assert above
    assert f"{', '.join(above)} belong" in page.text


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("output_dir: runs/new\n")
    assert Page(build_report(tmp_path).read_text(encoding="utf-8")).sections == ["protocol"]
    (tmp_path / "metrics.jsonl").write_text('{"images": 5, "loss/total": 1.0}\n')
    assert Page(build_report(tmp_path).read_text(encoding="utf-8")).sections == ["training", "protocol"]


def test_several_vaes_side_by_side(ingredients: tuple[Path, list[Path]], tmp_path: Path) -> None:
    images, vaes = ingredients
    evaluate(tmp_path / "compared", images, *vaes)
    path = build_report(tmp_path / "compared")
    assert path == tmp_path / "compared" / "index.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.sections == ["compare", "pictures", "metrics", "latents", "samples", "worst", "protocol"]
    assert page.text.count("absolute error of vae1") == page.text.count("absolute error of vae0") > 0
    results = json.loads((tmp_path / "compared" / "metrics.json").read_text())
    for result in results:
        assert f"{result['metrics']['psnr']['mean']:.2f}" in page.text
    assert sum("best" in attributes.get("class", "").split() for attributes in page.all("td")) == 2  # psnr and ssim


def test_the_report_of_a_run_is_found_from_its_report_folder(run: Path) -> None:
    assert build_report(run / "report") == run / "report" / "index.html"
    assert Page((run / "report" / "index.html").read_text(encoding="utf-8")).sections == SECTIONS


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with refused(UsageError, "report"):
        build_report(tmp_path)
    with refused(UsageError, "report"):
        build_report(tmp_path / "nothing")


def test_the_command_rebuilds_each(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"images": 5, "loss/total": 1.0}\n')
    cli.call("report", str(run), str(tmp_path))
    assert capsys.readouterr().out.split() == [str(folder / "report" / "index.html") for folder in (run, tmp_path)]


# --- charts and pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (17.3, 21.9), (-0.4, 1.1), (5.0, 5.0), (0.0, 0.0), (1e-9, 2e-9)])
def test_a_linear_axis_covers_its_values_with_few_ticks(low: float, high: float) -> None:
    axis = linear_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert 2 <= len(axis.ticks) <= 7
    assert axis.share(axis.low) == pytest.approx(0)
    assert axis.share(axis.high) == pytest.approx(1)


def test_a_logarithmic_axis_is_proportional() -> None:
    axis = log_axis(0.01, 100)
    assert axis.share(1.0) == pytest.approx((axis.share(0.1) + axis.share(10)) / 2)
    assert [compact(tick) for tick in axis.ticks] == ["0.01", "0.1", "1", "10", "100"]


def test_charts_draw_every_point_and_leave_out_what_is_no_number() -> None:
    drawing = str(
        line_chart(
            [Series("a & b", [(0, 1.0), (1, float("inf")), (2, 3.0)])], label="x < y", x="images seen", y="dB < 3"
        )
    )
    (points,) = re.findall(r'points="([^"]+)"', drawing)
    assert len(points.split()) == 2
    assert all(words in drawing for words in ("x &lt; y", ">images seen</text>", ">dB &lt; 3</text>"))
    assert "a &amp; b" in drawing
    assert line_chart([Series("none", [])], label="", x="", y="") == ""
    logarithmic = str(line_chart([Series("a", [(0, 0.0), (1, 1.0), (2, 100.0)])], label="", x="", y="dB", log=True))
    assert len(re.findall(r'points="([^"]+)"', logarithmic)[0].split()) == 2
    assert ">dB, logarithmic</text>" in logarithmic


def test_bars_are_as_high_as_their_values() -> None:
    heights = re.findall(r'<rect[^>]* height="([^"]+)"', str(bar_chart([1.0, 2.0, 0.0], label="", y="")))
    assert float(heights[1]) == pytest.approx(2 * float(heights[0]), abs=0.2)
    assert float(heights[2]) == 0


def test_compact_numbers() -> None:
    assert [compact(value) for value in (0, 950, 16_000, 1.25e6, 2.5e-5, 1.25e-4)] == [
        "0",
        "950",
        "16k",
        "1.25M",
        "2.5e-5",
        "1.25e-4",
    ]


def decoded(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_difference_is_around_grey_and_error_maps_share_a_scale() -> None:
    original = np.full((8, 8, 3), 100.0)
    other = original.copy()
    other[:4] += 10
    picture = decoded(difference(original, other, 20))
    assert picture[0, 0].tolist() == [192] * 3
    assert picture[7, 7].tolist() == [128] * 3
    dark, light = decoded(heat_map(np.array([[0.0, 50.0]]), 50.0))[0]
    assert light.sum() > dark.sum()


# --- what others have published ---------------------------------------------------------------------------------------


def test_every_published_figure_has_its_source_and_a_gfid_its_generator() -> None:
    rows = json.loads(PUBLISHED.read_text())
    reconstruction_figures = {"rfid", "psnr", "ssim", "lpips"}
    assert sum("gfid" in row for row in rows) >= 10
    for row in rows:
        assert (reconstruction_figures & set(row) != set()) == bool(row.get("source")), row
        assert ("gfid" in row) == bool(row.get("generator")) == bool(row.get("gfid_source")), row
        assert row["model"] and row["factor"] and row["data"]


def test_the_page_and_the_docs_show_every_published_figure() -> None:
    rows = json.loads(PUBLISHED.read_text())
    names = ("rfid", "psnr", "ssim", "lpips", "gfid")
    shown = published()
    table = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text().split("## Published results")[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"][
        2:
    ]
    assert len(lines) == len(shown) == len(rows)
    for row, one, line in zip(rows, shown, lines, strict=True):
        figures = [f"{row[name]:g}" if name in row else "" for name in names]
        assert one["numbers"] == figures and line[4:9] == figures
        assert one["generator"] == line[9] == row.get("generator", "")
        assert one["source"] == line[10] and all(row[key] in line[10] for key in row if key.endswith("source"))
        assert line[0] == row["model"]
