"""eval.reconstruction as a user runs it: what it writes, what it refuses, and one process against two."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jsonschema
import pytest
import torch
from diffusers import AutoencoderKL
from kills import ranks
from sentences import refused

from eval import reconstruction
from ldm_vae import metrics
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import MARK
from ldm_vae.data.source import open_source
from ldm_vae.metrics.batches import image_batches, share_of, spread
from ldm_vae.metrics.evaluate import Worst, evaluate_reconstruction
from ldm_vae.metrics.select import build_metrics
from ldm_vae.report.images import read_pixels

SCHEMA = json.loads((Path(metrics.__file__).parent / "metrics.schema.json").read_text())
CHEAP = ("--resolution", "32", "--metrics", "psnr,ssim,l1", "--num_workers", "0", "--batch_size", "5")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.reconstruction", *map(str, arguments)])
    reconstruction.main()


@pytest.fixture
def other_vae_folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = AutoencoderConfig(block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1)
    config.build().save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_one_vae(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_vae_folder: Path,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    (image_folder / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    run_main(monkeypatch, tiny_vae_folder, image_folder, "--output", out, "--pictures", "3", *CHEAP)
    result = json.loads((out / "metrics.json").read_text())
    jsonschema.validate(result, SCHEMA)
    assert result["metrics"]["psnr"]["n"] == result["data"]["images"] == 12
    assert result["data"]["quarantined"] == 1
    assert json.loads((out / "quarantine.jsonl").read_text())["key"] == "broken.png"

    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    assert len(rows) == 12
    mean = sum(row["psnr"] for row in rows) / 12
    assert mean == pytest.approx(result["metrics"]["psnr"]["mean"], abs=1e-9)
    worst = sorted(rows, key=lambda row: row["psnr"])[:10]
    assert [row["key"] for row in worst] == [row["key"] for row in result["worst"]]

    pictures = json.loads((out / "pictures" / "pictures.json").read_text())
    assert [picture["kind"] for picture in pictures].count("shown") == 3
    by_key = {row["key"]: row for row in rows}
    for picture in pictures:
        assert picture["vaes"][0]["metrics"]["psnr"] == pytest.approx(by_key[picture["key"]]["psnr"], abs=1e-12)
        for name in (f"{picture['name']}.original.png", picture["vaes"][0]["reconstruction"]):
            assert read_pixels(out / "pictures" / name).shape == (32, 32, 3)
    assert [path.name for path in out.glob(".*")] == [MARK]
    printed = capsys.readouterr().out
    assert f"{result['metrics']['psnr']['mean']:.2f}" in printed
    assert f"{result['metrics']['psnr']['mean']:.2f}" in (out / "metrics.md").read_text()


def test_the_saved_pictures_are_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    from skimage.metrics import peak_signal_noise_ratio

    out = tmp_path / "out"
    run_main(monkeypatch, tiny_vae_folder, image_folder, "--output", out, "--pictures", "2", *CHEAP)
    for picture in json.loads((out / "pictures" / "pictures.json").read_text()):
        files = (f"{picture['name']}.original.png", picture["vaes"][0]["reconstruction"])
        original, other = (read_pixels(out / "pictures" / name) for name in files)
        expected = peak_signal_noise_ratio(original, other, data_range=255)
        assert picture["vaes"][0]["metrics"]["psnr"] == pytest.approx(expected, abs=1e-6)


def test_several_vaes_give_a_list(
    monkeypatch: pytest.MonkeyPatch,
    tiny_vae_folder: Path,
    other_vae_folder: Path,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    arguments = (tiny_vae_folder, other_vae_folder, image_folder, "--output", out, "--pictures", "2", *CHEAP)
    run_main(monkeypatch, *arguments)
    results = json.loads((out / "metrics.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert [result["vae"]["name"] for result in results] == ["tiny_vae", "other"]
    assert results[0]["data"]["checksum"] == results[1]["data"]["checksum"]
    assert results[0]["metrics"]["psnr"]["mean"] != results[1]["metrics"]["psnr"]["mean"]
    pictures = json.loads((out / "pictures" / "pictures.json").read_text())
    assert all(len(picture["vaes"]) == 2 for picture in pictures)
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [row["vae"] for row in rows] == ["tiny_vae"] * 12 + ["other"] * 12


def test_numbers_do_not_depend_on_how_the_images_are_divided(tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    """The parts that two ranks would measure hold, bit for bit, the values of one pass; batches are whole ones."""
    source = open_source(image_folder)
    tiny_vae.requires_grad_(False)

    def values(indices: range) -> list[float]:
        found: list[float] = []
        evaluate_reconstruction(
            tiny_vae,
            image_batches(source, indices, 32, batch_size=5),
            build_metrics(["psnr", "ssim"], torch.device("cpu"), 32),
            torch.device("cpu"),
            resolution=32,
            batch_size=5,
            each=lambda _, values: found.extend(values["psnr"].tolist()),
        )
        return found

    shares = [share_of(rank, 2, range(12), 5) for rank in range(2)]
    assert [list(share) for share in shares] == [list(range(5)), list(range(5, 12))]
    assert values(range(12)) == [value for share in shares for value in values(share)]


def test_every_batch_has_one_shape(
    tiny_vae: AutoencoderKL, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network's last bits depend on the batch size: the tail is padded, so that an image measures alike alone."""
    source, cpu = open_source(image_folder), torch.device("cpu")
    tiny_vae.requires_grad_(False)
    sizes, encode = [], tiny_vae.encode
    monkeypatch.setattr(tiny_vae, "encode", lambda pixels: (sizes.append(len(pixels)), encode(pixels))[1])
    found: dict[int, float] = {}

    def each(indices: Sequence[int], values: Mapping[str, torch.Tensor]) -> None:
        found.update(zip(indices, values["ssim"].tolist(), strict=True))

    values = []
    for indices in (range(7), [6]):
        found.clear()
        batches = image_batches(source, indices, 32, batch_size=5)
        metrics = build_metrics(["ssim"], cpu, 32)
        result = evaluate_reconstruction(tiny_vae, batches, metrics, cpu, resolution=32, batch_size=5, each=each)
        assert result.images == result.metrics["ssim"].n == len(found) == len(indices)
        values.append(found[6])
    assert sizes == [5, 5, 5]
    assert values[0] == values[1]


def test_worst_holds_ten_however_many_images_there_are() -> None:
    metrics = build_metrics(["psnr"], torch.device("cpu"), 32)
    worst = Worst(metrics)
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for start in range(0, 1000, 7):
        part = values[start : start + 7]
        worst.update(range(start, start + len(part)), {"psnr": part})
        assert len(worst.heap) <= 10
    expected = sorted(range(1000), key=lambda index: values[index].item())[:10]
    assert worst.compute() == [(index, values[index].item()) for index in expected]


def test_spread_covers_the_whole() -> None:
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 8) == [0, 1]
    assert spread(0, 8) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("--resolution", "33"), "resolution"),
        (("--resolution", "8"), "resolution"),
        (("--metrics", "psnr,fid"), "metrics"),
        (("--batch_size", "0"), "batch_size"),
    ],
)
def test_wrong_calls_name_the_argument(
    monkeypatch: pytest.MonkeyPatch,
    tiny_vae_folder: Path,
    image_folder: Path,
    tmp_path: Path,
    change: tuple[str, ...],
    field: str,
) -> None:
    with refused(UsageError, field):
        run_main(monkeypatch, tiny_vae_folder, image_folder, "--output", tmp_path / "out", *CHEAP, *change)
    assert not (tmp_path / "out").exists()


def test_no_usable_image_is_a_failure_and_leaves_no_result(
    monkeypatch: pytest.MonkeyPatch, tiny_vae_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"nothing")
    with refused(WorkError, "a.png"):
        run_main(monkeypatch, tiny_vae_folder, folder, "--output", tmp_path / "out", *CHEAP)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_cmmd_is_measured_with_the_clip_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_vae_folder: Path, image_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    call = (tiny_vae_folder, image_folder, "--output", tmp_path / "out", *CHEAP, "--metrics", "cmmd")
    for flags, measured in (((), False), (("--clip", clip_folder), True)):
        run_main(monkeypatch, *call, *flags)
        summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["cmmd"]
        assert (summary["mean"] is not None, summary["n"] > 0) == (measured, measured)
    with pytest.raises(UsageError, match=r"^clip: "):
        run_main(monkeypatch, *call, "--clip", tmp_path)


@pytest.mark.slow
def test_one_process_and_two_agree(
    tiny_vae_folder: Path, image_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    found = []
    for number in (1, 2):
        out = tmp_path / f"out{number}"
        call = [str(tiny_vae_folder), str(image_folder), "--output", str(out), *CHEAP]
        call += ["--metrics", "psnr,ssim,l1,fd_efflite0,cmmd", "--clip", str(clip_folder)]
        for done in [rank.wait() for rank in ranks(reconstruction.main, call, number)]:
            assert done.returncode == 0, done.stderr[-2000:]
        found.append((json.loads((out / "metrics.json").read_text()), (out / "images.jsonl").read_text()))
    (one, one_rows), (two, two_rows) = found
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert two_rows == one_rows  # every image once, the same bits
    assert two["data"] == one["data"]
    assert two["worst"] == one["worst"]
    for name, summary in one["metrics"].items():
        assert two["metrics"][name]["n"] == summary["n"]
        assert two["metrics"][name]["mean"] == pytest.approx(summary["mean"], rel=1e-9)
        if summary["ci95"]:
            assert two["metrics"][name]["ci95"] == pytest.approx(summary["ci95"], rel=1e-9)
    for name in ("kl_nats_per_image", "mean", "std"):
        assert two["latents"][name] == pytest.approx(one["latents"][name], rel=1e-9)
