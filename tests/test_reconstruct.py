"""ldm-vae reconstruct: before and after of a few files, and what validation leaves for the page."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sentences import refused

from ldm_vae import cli, metrics
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.source import open_source
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.evaluate import evaluate_reconstruction
from ldm_vae.metrics.pictures import principal_colours
from ldm_vae.metrics.select import build_metrics
from ldm_vae.report import build_report
from ldm_vae.report.images import read_pixels
from ldm_vae.training.validation import record_validation


def call(*arguments: str | Path) -> None:
    cli.call("reconstruct", *map(str, arguments))


def test_before_and_after_stand_side_by_side(
    tiny_vae_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = image_folder / "img_0000.png", image_folder / "img_0001.png"
    call(tiny_vae_folder, first, second, tmp_path / "out")
    both = read_pixels(tmp_path / "out" / "img_0000.before-after.png")
    assert both.shape == (40, 96, 3)
    assert np.array_equal(both[:, :48], read_pixels(first))
    assert np.array_equal(both[:, 48:], read_pixels(tmp_path / "out" / "img_0000.png"))
    assert (tmp_path / "out" / "img_0001.png").exists()
    assert capsys.readouterr().out.count(" dB ") == 2


def test_sizes_that_do_not_divide_are_cropped_and_a_resolution_resizes(tiny_vae_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (51, 33), (200, 10, 10)).save(tmp_path / "odd.png")
    call(tiny_vae_folder, tmp_path / "odd.png", tmp_path / "out")
    assert read_pixels(tmp_path / "out" / "odd.png").shape == (32, 50, 3)
    call(tiny_vae_folder, tmp_path / "odd.png", tmp_path / "out", "--resolution", "16")
    assert read_pixels(tmp_path / "out" / "odd.png").shape == (16, 16, 3)


def test_two_images_of_one_name_are_both_kept(tiny_vae_folder: Path, tmp_path: Path) -> None:
    for folder, colour in (("a", 10), ("b", 200)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), (colour,) * 3).save(tmp_path / folder / "same.png")
    call(tiny_vae_folder, tmp_path / "a" / "same.png", tmp_path / "b" / "same.png", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.before-after.png"))) == 2


def test_folders_and_files_are_mixed_and_what_is_left_out_is_said(
    tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, one, out = tmp_path / "photos", tmp_path / "one.png", tmp_path / "photos" / "out"
    for number, name in enumerate(("a.png", "a.jpg", "deep/er/a.png", "sheet.png", ".hidden.png")):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12 + number), (number * 40, 90, 10)).save(photos / name)
    Image.new("RGB", (1, 1)).save(photos / "small.png")
    Image.new("RGB", (8, 8)).save(one)
    (photos / "broken.png").write_bytes(b"no")
    (photos / "notes.txt").write_text("x")
    for _ in range(2):  # the second call does not take the first one's pictures for images
        call(tiny_vae_folder, one, photos, out)
        said = capsys.readouterr()
        assert said.out.count(" dB ") == 5 and "5 images, mean PSNR" in said.out
    names = {"one", "a", "a-2", "deep/er/a", "sheet-2"}
    written = {f"{name}{ending}" for name in names for ending in (".png", ".before-after.png")} | {"sheet.png"}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == written
    assert read_pixels(out / "sheet.png").shape == (2 * 196 + 4, 4 * (2 * 192 + 4) + 4, 3)
    for sentence in (
        f"IMAGE {photos}: left out: 1 hidden (.hidden.png)",
        f"IMAGE {photos}: left out: 1 folders that ldm-vae or diffusers has written (out/)",
        f"IMAGE {photos}: left out: 1 of other endings (.txt)",
        f"left out: {photos / 'small.png'}: its sides must be at least f = 2 pixels, it is 1 x 1 px",
    ):
        assert f"note: {sentence}\n" in said.err
    assert f"note: left out: {photos / 'broken.png'}: " in said.err


def test_a_folder_without_an_image_is_refused(tiny_vae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"IMAGE {tmp_path / 'empty'}: expected an image .*found none"):
        call(tiny_vae_folder, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "broken.png").write_bytes(b"no")
    with refused(WorkError, "IMAGE"):
        call(tiny_vae_folder, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_image_is_named_and_nothing_is_written(
    tiny_vae_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    good = image_folder / "img_0000.png"
    with refused(UsageError, "broken.png"):
        call(tiny_vae_folder, good, tmp_path / "broken.png", tmp_path / "out")
    with pytest.raises(UsageError, match=r"none\.png"):
        call(tiny_vae_folder, good, tmp_path / "none.png", tmp_path / "out")
    with refused(UsageError, "resolution"):
        call(tiny_vae_folder, good, tmp_path / "out", "--resolution", "15")
    assert not (tmp_path / "out").exists()


def test_a_validation_leaves_pictures_for_the_page(tiny_vae: AutoencoderKL, image_folder: Path, tmp_path: Path) -> None:
    cpu, source, run = torch.device("cpu"), open_source(image_folder), tmp_path / "run"
    tiny_vae.requires_grad_(False)
    measured = build_metrics(["psnr", "ssim"], cpu, 32)
    batches = image_batches(source, range(12), 32, batch_size=4)
    evaluation = evaluate_reconstruction(tiny_vae, batches, measured, cpu, resolution=32, batch_size=4)
    record_validation(
        run, tiny_vae, source, "held-out", evaluation, measured, cpu, resolution=32, batch_size=4, images_seen=8
    )  # fmt: skip
    (run / "metrics.jsonl").write_text('{"images": 5, "validation/psnr": 1.0}\n')
    result = json.loads((run / "report" / "metrics.json").read_text())
    jsonschema.validate(result, json.loads((Path(metrics.__file__).parent / "metrics.schema.json").read_text()))
    assert result["metrics"]["psnr"]["n"] == 12
    page = build_report(run).read_text(encoding="utf-8")
    for section in ("compare", "pictures", "metrics", "training", "latents"):
        assert f'<section id="{section}"' in page


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_latents_become_colours(channels: int) -> None:
    means = torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    colours = principal_colours(means)
    assert colours.shape == (4, 3, 8, 8)
    assert 0 <= colours.min() <= 1
    assert colours.max() == 255
    if channels >= 3:  # the first component varies most, and equal latents have equal colours
        assert torch.equal(
            principal_colours(torch.cat([means, means]))[:4], principal_colours(torch.cat([means] * 2))[4:]
        )
