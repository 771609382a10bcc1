"""The page's sections on diffusion: whole with everything there, and without what was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from html_page import Page
from PIL import Image

from ldm_vae.report import build_report

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
    assert "Diffusion report" in page.text and "Heun, 25 steps, guidance 2" in page.text and "cats, dogs" in page.text
    assert "at 16k images" in page.text and "at 400 images" in page.text
    places = [page.text.index(value) for value in ("50.2", "70.0", "90.0", "CMMD", "1.234", "2.500", "3.750")]
    assert places == sorted(places)
    assert "ldm-vae diffuse runs/mine/config.yaml" in page.text
    assert "train.autoencoder" not in page.text


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
