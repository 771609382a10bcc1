"""The page's sections on diffusion: whole with everything there, and without what was not measured."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Page
from PIL import Image
from sentences import refused

from ldm_vae.core.errors import WorkError
from ldm_vae.report import build_report
from ldm_vae.report.charts import MOST

SAMPLING = {"method": "heun", "steps": 25, "guidance": 2.0}


def picture(path: Path, width: int = 90, height: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def diffusion_run(folder: Path, **found: Any) -> Path:
    for images in (400, 16_000):
        picture(folder / "samples" / f"images-{images:09d}.png")
    grids = sorted(path.name for path in (folder / "samples").iterdir())
    (folder / "report").mkdir()
    (folder / "report" / "diffusion.json").write_text(
        json.dumps({"grids": grids, "classes": ["cats", "dogs"], "columns": 2, "sampling": SAMPLING} | found)
    )
    (folder / "config.yaml").write_text("output_dir: runs/mine\nlatents: a-store\n")
    (folder / "metrics.jsonl").write_text('{"images": 400, "loss/total": 1.0}\n{"images": 16000, "loss/total": 0.5}\n')
    return folder


def test_a_run_shows_its_samples_and_distances_the_nearest_first(tmp_path: Path) -> None:
    distances = {"metric": "fd_efflite0", "n": 144, "samples": 50.25, "field": 90.0, "noise": 70.0}
    cmmd = {"metric": "cmmd", "n": 144, "samples": 1.2345, "field": 2.5, "noise": 3.75}
    page = Page(build_report(diffusion_run(tmp_path / "run", distances=distances, cmmd=cmmd)).read_text())
    assert page.sections[0] == "diffusion" and "training" in page.sections
    assert "Diffusion report" in page.text and "Heun, 25 steps, guidance 2" in page.text
    assert "at 16k images" in page.text and "at 400 images" in page.text
    places = [page.text.index(value) for value in ("50.2", "70.0", "90.0", "CMMD", "1.234", "2.500", "3.750")]
    assert places == sorted(places)
    assert "ldm-vae diffuse runs/mine/config.yaml" in page.text
    assert "train.autoencoder" not in page.text


def labelled_run(folder: Path, labels: int, **changes: Any) -> Path:
    """A run of 2 samples of each label, in two columns."""
    layout = {"columns": 2, "width": 8, "height": 8, "gap": 4, "strip": 16} | changes
    names = [f"N(0, I) {number}" for number in range(labels)]
    run = diffusion_run(folder, labels=names * 2, **layout | {"classes": names})
    for name in ("images-000016000", "originals"):
        picture(run / "samples" / f"{name}.png", 2 * 12 + 4, labels * 28 + 4)
    return run


@pytest.mark.parametrize("labels", [2, 16, 40])
def test_samples_stand_under_their_label_beside_originals(tmp_path: Path, labels: int) -> None:
    run = labelled_run(tmp_path / "run", labels)
    page = Page(build_report(run).read_text())
    images = {image["alt"]: image["src"] for image in page.all("img")}
    shown = min(labels, MOST)
    assert len(page.all("article")) == shown and len(images) == 2 * shown + 1  # and the earlier grid
    assert ("16 of 40 labels" in page.text) == (labels == 40)
    for kind, file in (("samples", "images-000016000"), ("from the store", "originals")):
        with Image.open(run / "samples" / f"{file}.png") as grid:
            # the second label's first sample: right of the first
            part = np.asarray(grid.convert("RGB"))[20:28, 16:24]
        content = base64.b64decode(images[f"N(0, I) 1, {kind}"].partition(",")[2])
        with Image.open(io.BytesIO(content)) as strip:
            assert strip.size == (8 + 2 + 8, 8)
            assert np.array_equal(np.asarray(strip.convert("RGB"))[:, :8], part)


def test_a_record_that_leads_out_of_its_picture_is_refused(tmp_path: Path) -> None:
    with refused(WorkError, "diffusion"):
        build_report(labelled_run(tmp_path / "run", 2, columns=1))


def test_samples_without_labels_have_originals_too(tmp_path: Path) -> None:
    run = diffusion_run(tmp_path / "run", classes=[], labels=[])
    picture(run / "samples" / "originals.png")
    page = Page(build_report(run).read_text())
    assert "images of the store, encoded and decoded" in page.text and "samples at 16k images" in page.text


def test_a_run_without_distances_has_no_table_of_them(tmp_path: Path) -> None:
    page = Page(build_report(diffusion_run(tmp_path / "run")).read_text())
    assert "diffusion" in page.sections and "How far they are" not in page.text


def probe(folder: Path) -> Path:
    vaes = []
    picture(folder / "pictures" / "originals.png", 8 * 34, 2 * 34)
    for name, gap in (("plain", 12.0), ("a-rather-long-name-of-an-autoencoder", 80.0)):
        for kind in ("samples", "reconstructions"):
            picture(folder / "pictures" / f"{name}.{kind}.png", 8 * 34, 2 * 34)
        vaes.append({
            "vae": {"name": name}, "fd_reconstructions": 30.0, "latent_shape": [8, 16, 16],
            "network": {"gflop_per_image": 0.25},
            "pictures": {kind: f"pictures/{name}.{kind}.png" for kind in ("samples", "reconstructions")},
            "metrics": {
                "fd_gap": {"mean": gap, "ci95": [gap - 2, gap + 2], "n": 3},
                "fd_samples": {"mean": gap + 30, "ci95": [gap + 28, gap + 32], "n": 3},
                "high_frequency_share": {"mean": 0.31, "ci95": [0.3, 0.32], "n": 96},
                "equivariance": {"mean": None, "ci95": None, "n": 0},  # one position has no direction
            },
        })  # fmt: skip
    found = {"vaes": vaes, "verdicts": ["A sentence."], "protocol": {"train_images": 32_000, "seeds": 3}}
    (folder / "diffusability.json").write_text(json.dumps(found))
    return folder


def test_the_probe_shows_gaps_with_their_intervals(tmp_path: Path) -> None:
    page = Page(build_report(probe(tmp_path)).read_text())
    assert page.sections == ["diffusability"]
    assert "A sentence." in page.text and "32,000 images" in page.text
    assert "10.0 to 14.0" in page.text and "78.0 to 82.0" in page.text and "8 × 16 × 16" in page.text
    assert len([image for image in page.all("img") if image["src"].startswith("data:image/webp")]) == 5
    assert "Probe report" in page.text and "originals, evenly spread" in page.text
