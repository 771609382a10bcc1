"""Programs that measure, on clips: evaluate, validation, reconstruct, drift, latent_space, export, probe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from sentences import refused
from skimage.metrics import peak_signal_noise_ratio
from tiny_classes import tiny
from training_runs import metrics as logged
from training_runs import one_sentence, run, write_config
from videos import write_moving

from eval import diffusability, filmstrip, latent_space, reconstruction
from ldm_vae import cli, evaluate, load_autoencoder, metrics
from ldm_vae.autoencoder.latents import decode, encode
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.autoencoder.preparation import preparation_of
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.flags import DataFlags
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import to_pixels
from ldm_vae.data.windows import windows
from ldm_vae.export.measurement import Images, measure
from ldm_vae.latent_space.equivariance import equivariance_error
from ldm_vae.latent_space.spectrum import high_frequency_share, radial_power_spectrum
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.linear import fit_code
from ldm_vae.metrics.psnr import psnr
from ldm_vae.report.images import film_of, read_pixels
from ldm_vae.training.config import Training

SCHEMA = json.loads((Path(metrics.__file__).parent / "metrics.schema.json").read_text())
CHEAP = ("--resolution", "16", "--num_workers", "0", "--batch_size", "2")
FLAGS = DataFlags(frames=5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of five frames, an image among them, and a network of each of three classes."""
    folder = tmp_path_factory.mktemp("clips")
    write_moving(folder / "films", 2, 11)
    write_moving(folder / "mixed", 2, 11)
    Image.new("RGB", (40, 30), (200, 90, 20)).save(folder / "mixed" / "still.png")
    for name, kind in (("wan", "AutoencoderKLWan"), ("kl", "AutoencoderKL"), ("ltx", "AutoencoderKLLTXVideo")):
        tiny(kind).save_pretrained(folder / name)
    return folder


def program(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def compared(root: Path) -> Path:
    """A class of clips beside one of images, frame by frame."""
    with pytest.MonkeyPatch.context() as patch:
        names = "psnr,ssim,flicker,temporal_l1"
        program(patch, reconstruction, root / "wan", root / "kl", root / "mixed", "--output", root / "out",
                "--frames", "5", "--frame_stride", "2", "--metrics", names, *CHEAP)  # fmt: skip
    return root / "out"


def test_a_class_of_clips_beside_one_of_images(compared: Path) -> None:
    found = json.loads((compared / "metrics.json").read_text())
    jsonschema.validate(found, SCHEMA)
    clips, images = found
    assert clips["data"] == images["data"]
    assert clips["data"]["clips"] == {"frames": 5, "rate": None, "stride": 2}
    assert (clips["data"]["images"], clips["data"]["all_frames"]) == (3, 11)
    assert "frames=5 frame_stride=2" in clips["data"]["preprocessing"]
    assert (clips["vae"]["latent_frames"], images["vae"]["latent_frames"]) == (2, 5)
    assert clips["metrics"]["psnr"]["n"] == 3 and clips["metrics"]["flicker"]["n"] == 2
    assert [one["n"] for one in clips["by_frame"]["psnr"]] == [2] * 5 and "flicker" not in clips["by_frame"]
    # of four frames beside the class whose latent frames stand for four, of one beside the other
    assert clips["linear_code"]["psnr"]["n"] == images["linear_code"]["psnr"]["n"] == 3
    assert clips["linear_code"]["psnr"]["mean"] != images["linear_code"]["psnr"]["mean"]
    table = (compared / "metrics.md").read_text()
    assert "clips of 5 frames at the video's own rate, every 2th of them" in table and "| clips | 3 | 3 |" in table


def test_a_filmstrip_has_a_row_for_the_originals_and_one_for_each_vae(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, half = tmp_path / "strip.png", tmp_path / "half"
    program(monkeypatch, filmstrip, compared, compared, out)
    shown = json.loads((compared / "pictures" / "pictures.json").read_text())[0]
    files = [f"{shown['name']}.original.png", *(vae["reconstruction"] for vae in shown["vaes"])]
    films = [read_pixels(compared / "pictures" / file).reshape(5, 16, 16, 3) for file in files]
    came = read_pixels(out)
    assert came.shape == (3 * 20 - 4, 2 * (3 * 20 - 4) + 16, 3)
    for row, film in enumerate(films):
        for place, frame in enumerate((0, 2, 4)):
            for left in (20 * place, 72 + 20 * place):
                assert np.array_equal(came[20 * row : 20 * row + 16, left : left + 16], film[frame])
    with refused(UsageError, "at most those of a clip, got 6 of the 5"):
        program(monkeypatch, filmstrip, compared, out, "--frames", "6")
    with refused(UsageError, "frames"):
        program(monkeypatch, filmstrip, compared, out, "--frames", "0")
    # a result of one VAE, and of half the size
    (half / "pictures").mkdir(parents=True)
    (half / "metrics.json").write_text("[]")
    with refused(UsageError, "expected pictures"):
        program(monkeypatch, filmstrip, half, out)
    (half / "pictures" / "pictures.json").write_text(json.dumps([{"name": "0", "vaes": shown["vaes"][:1]}]))
    for name in ("0.original.png", shown["vaes"][0]["reconstruction"]):
        frames = [Image.fromarray(frame) for frame in films[0][:, ::2, ::2].astype(np.uint8)]
        frames[0].save(half / "pictures" / name, save_all=True, append_images=frames[1:])
    program(monkeypatch, filmstrip, half, out, "--frames", "1")
    assert read_pixels(out).shape == (8 + 4 + 8, 8, 3)
    with refused(UsageError, "equally many VAEs, got 2, 1"):
        program(monkeypatch, filmstrip, compared, half, out)
    (half / "pictures" / "pictures.json").write_text(json.dumps([{"name": "0", "vaes": shown["vaes"][:1] * 2}]))
    program(monkeypatch, filmstrip, compared, half, out)
    assert np.array_equal(read_pixels(out)[:16:2, 72:88:2], films[0][0, ::2, ::2])
    (half / "pictures" / "pictures.json").write_text(json.dumps([{"name": "0", "vaes": shown["vaes"]}]))
    with refused(WorkError, "pictures.json"):
        program(monkeypatch, filmstrip, half, out)


def test_the_linear_code_is_of_as_many_frames_as_a_latent_frame(root: Path) -> None:
    source = windows(open_source(root / "films", frames=5))
    for kind, frames in (("AutoencoderKLWan", 4), ("AutoencoderKL", 1)):
        code = fit_code(tiny(kind), source, range(len(source)), 0, 1, resolution=16, batch_size=2)
        assert code is not None and code.frames == frames


def test_rows_and_pictures_are_of_clips(compared: Path) -> None:
    rows = [json.loads(line) for line in (compared / "images.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows[:3]] == ["film-0.mkv", "film-1.mkv", "still.png"]
    assert "flicker" in rows[0] and "flicker" not in rows[2]
    by_key = {(row["vae"], row["key"]): row for row in rows}
    for picture in json.loads((compared / "pictures" / "pictures.json").read_text()):
        for name, vae in zip(("wan", "kl"), picture["vaes"], strict=True):
            before, after = (
                read_pixels(compared / "pictures" / file)
                for file in (f"{picture['name']}.original.png", vae["reconstruction"])
            )
            count = len(before) // 16
            assert count == (1 if picture["key"] == "still.png" else 5)
            frames = [
                peak_signal_noise_ratio(*(one[16 * t : 16 * t + 16] for one in (before, after)), data_range=255)
                for t in range(count)
            ]
            assert by_key[name, picture["key"]]["psnr"] == pytest.approx(np.mean(frames), abs=1e-6)
            assert vae["metrics"]["psnr"] == pytest.approx(np.mean(frames), abs=1e-6)
            assert vae.get("by_frame", {"psnr": frames})["psnr"] == pytest.approx(frames, abs=1e-6)
            latent_frames = {("wan", 5): 2, ("kl", 5): 5}.get((name, count), 1)
            assert film_of(compared / "pictures" / vae["latent"]).frames == latent_frames
    assert {film_of(path).frames for path in (compared / "samples").iterdir()} == {5}


def test_the_call_measures_what_the_program_does(root: Path, compared: Path) -> None:
    (expected, _) = json.loads((compared / "metrics.json").read_text())
    vae = load_autoencoder(str(root / "wan"))
    source = preparation_of({"": vae}, DataFlags(frames=5, frame_stride=2)).open(root / "mixed")
    found = evaluate(vae, source, resolution=16, metrics=["psnr", "flicker"], batch_size=2)
    assert (found.images, found.frames, found.checksum) == (3, 11, expected["data"]["checksum"])
    for name in ("psnr", "flicker"):
        assert found.metrics[name].mean == pytest.approx(expected["metrics"][name]["mean"], rel=1e-9)


def test_lengths_and_protocols_that_do_not_go_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*flags: str) -> None:
        program(monkeypatch, reconstruction, root / "wan", root / "mixed", "--output", root / "no", *flags, *CHEAP)

    with refused(UsageError, "frames: expected 1 + 4 k"):
        call("--frames", "6")
    with refused(UsageError, "protocol"):
        call("--frames", "5", "--protocol", "lavinal712", "--metrics", "psnr")
    with refused(UsageError, "metrics: flicker"):
        call("--metrics", "psnr,flicker")
    with refused(UsageError, "frames"):
        source = windows(open_source(root / "films", frames=6))
        evaluate(load_autoencoder(str(root / "wan")), source, resolution=16, metrics=["psnr"])
    with refused(UsageError, "frames: the probe"):
        program(monkeypatch, diffusability, root / "wan", root / "films", "--output", root / "no", "--frames", "5",
                "--resolution", "16")  # fmt: skip


def test_training_validates_on_clips(root: Path, tmp_path: Path) -> None:
    films = {"kind": "folder", "path": str(root / "films"), "frames": 5}
    changes: dict[str, Any] = {
        "resolution": 16, "train_batch_size": 1, "max_train_images": 4, "log_every_images": 2,
        "checkpoint_every_images": 4, "validate_every_images": 2, "model": {"kind": "pretrained"},
        "init_from": str(root / "wan"), "adversary": {"weight": 0.0}, "normalisation_images": 2,
        "validation_metrics": ["psnr", "flicker"], "best_metric": "flicker", "data": films, "validation_data": films,
    }  # fmt: skip
    done = run(write_config(tmp_path, root / "films", **changes))
    assert done.returncode == 0, done.stderr
    validations = [line for line in logged(tmp_path / "run") if "validation/flicker" in line]
    assert [line["images"] for line in validations] == [2, 4]
    report = tmp_path / "run" / "report"
    found = json.loads((report / "metrics.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["data"]["clips"]["frames"] == 5 and found["vae"]["latent_frames"] == 2
    assert found["metrics"]["flicker"]["mean"] == validations[-1]["validation/flicker"]
    assert "img.film" in (report / "index.html").read_text()
    assert (report / "validation" / "images-000000004.png").is_file()

    odd = changes | {"data": films | {"frames": 6}}
    assert "data.frames: expected 1 + 4 k frames" in one_sentence(run(write_config(tmp_path, root, **odd)), 2)
    stills = changes | {"validation_data": {"kind": "folder", "path": str(root / "films")}}
    with refused(UsageError, "validation_metrics: flicker"):
        config.load(Training, write_config(tmp_path, root, **stills))


def test_reconstruct_shows_a_clip(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cli.call("reconstruct", str(root / "wan"), str(root / "films" / "film-0.mkv"), str(root / "mixed" / "still.png"),
             str(out), "--resolution", "16", "--frames", "9")  # fmt: skip
    both, after = (read_pixels(out / f"film-0.{ending}") for ending in ("before-after.png", "png"))
    assert both.shape == (9 * 16, 32, 3) and film_of(out / "still.before-after.png").frames == 1
    assert np.array_equal(both[:, 16:], after)
    printed = capsys.readouterr().out
    frames = [
        peak_signal_noise_ratio(*(both[16 * t : 16 * t + 16, left : left + 16] for left in (0, 16)), data_range=255)
        for t in range(9)
    ]
    assert f"PSNR {np.mean(frames):.2f} dB" in printed
    cli.call("reconstruct", str(root / "wan"), str(root / "films"), str(out), "--resolution", "16", "--frames", "5")
    assert film_of(out / "film-1.png").frames == 5
    with refused(UsageError, "image"):
        cli.call("reconstruct", str(root / "wan"), str(root / "films" / "film-0.mkv"), str(out), "--resolution", "16")


def test_drift_of_clips(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tiny("AutoencoderKLWan")
    tuned.quant_conv.weight.mul_(1.1)
    tuned.quant_conv.bias.mul_(1.1)
    tuned.save_pretrained(tmp_path / "tuned")
    call = ("--resolution", "16", "--no_lpips", "--json")
    capsys.readouterr()
    cli.call("drift", str(root / "wan"), str(tmp_path / "tuned"), str(root / "mixed"), "--frames", "5", *call)
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 5 and found["metrics"]["base -> base"]["psnr"]["n"] == 5
    assert found["scale"] == pytest.approx([1.1] * 16, rel=1e-4)
    with refused(UsageError, "BASE"):
        cli.call("drift", str(root / "wan"), str(root / "kl"), str(root / "films"), "--frames", "5", *call)


def pixels_of(folder: Path, vae: Any) -> torch.Tensor:
    source = preparation_of({"": vae}, FLAGS).open(folder)
    return torch.cat([to_pixels(batch.pixels) for batch in image_batches(source, None, 16, batch_size=2)])


@pytest.mark.parametrize(("name", "side"), [("wan", 16), ("ltx", 32)])
def test_export_writes_the_law_measured_on_clips(root: Path, tmp_path: Path, name: str, side: int) -> None:
    out = tmp_path / "out"
    cli.call("export", str(root / name), str(out), "--stats", str(root / "mixed"), "--resolution", str(side),
             "--frames", "9", "--normalisation", "channel")  # fmt: skip
    vae = load_autoencoder(str(out))
    source = preparation_of({"": vae}, DataFlags(frames=9)).open(root / "mixed")
    rows, variances = [], []
    for batch in image_batches(source, None, side, batch_size=1):
        with torch.no_grad():
            moments = encode(vae, to_pixels(batch.pixels))
        rows.append(moments.mean[0].double().flatten(1))
        variances.append(moments.logvar[0].double().exp().flatten(1))
    mean, variance = torch.cat(rows, 1), torch.cat(variances, 1)
    std = (mean.var(1, correction=0) + variance.mean(1)).sqrt()
    law = own_normalisation(vae)
    assert law is not None and law.kind == "channel"
    assert law.latents_mean == pytest.approx(mean.mean(1).tolist(), rel=1e-4, abs=1e-5)
    assert law.latents_std == pytest.approx(std.tolist(), rel=1e-4)
    if name == "wan":
        assert json.loads((out / "config.json").read_text())["latents_std"] == pytest.approx(std.tolist(), rel=1e-4)
    else:
        assert vae.latents_std.tolist() == pytest.approx(std.tolist(), rel=1e-4)
    # what a diffusion model of that class's pipeline sees has a variance of 1 in every channel
    seen = torch.cat([law.apply(one[None, :, None].float())[0, :, 0] for one in (mean[..., None],)], dim=1)
    within = (variance.mean(1) / std.square()).tolist()
    assert (seen.var(1, correction=0).flatten() + torch.tensor(within)).tolist() == pytest.approx(
        [1.0] * len(std), rel=1e-3
    )
    with refused(UsageError, "--preview"):
        cli.call("export", str(root / name), str(tmp_path / "no"), "--stats", str(root / "films"), "--resolution",
                 str(side), "--frames", "9", "--preview")  # fmt: skip


def test_statistics_of_patches_are_those_of_the_frames() -> None:
    vae = tiny("AutoencoderKLFlux2")
    clips = torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    of_clips = measure(vae, [clips], "cpu")
    of_frames = measure(vae, [clips.transpose(1, 2).flatten(0, 1)], "cpu")
    torch.testing.assert_close(of_clips.mean, of_frames.mean)
    torch.testing.assert_close(of_clips.variance, of_frames.variance)
    assert (of_clips.images, of_frames.images) == (2, 8)


def test_statistics_are_of_all_positions_of_all_clips(root: Path) -> None:
    vae = load_autoencoder(str(root / "wan"))
    images = Images(str(root / "films"), 16, 2, None, preparation_of({"": vae}, FLAGS))
    found = measure(vae, images.batches(vae), "cpu")
    with torch.no_grad():
        moments = encode(vae, pixels_of(root / "films", vae))
    mean = moments.mean.double()
    assert (found.images, found.count) == (4, 4 * 2 * 2 * 2)
    torch.testing.assert_close(found.mean, mean.mean((0, 2, 3, 4)), rtol=1e-5, atol=1e-6)


def test_a_latent_space_of_clips(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, vae = tmp_path / "out", load_autoencoder(str(root / "wan"))
    small = ("--bank", "4", "--likelihood_images", "1", "--repeats", "2", "--components", "0", "--pairs", "1")
    program(monkeypatch, latent_space, root / "wan", root / "films", "--output", out, "--frames", "5", *small, *CHEAP)
    found = json.loads((out / "latent_space.json").read_text())
    clips = pixels_of(root / "films", vae)
    with torch.no_grad():
        moments = encode(vae, clips)
        shown = decode(vae, moments.mean)
    assert found["data"]["clips"]["frames"] == 5 and found["data"]["images"] == len(clips) == 4
    assert found["vae"]["latent_values"] == 16 * 2 * 2 * 2
    rate = moments.kl().double().flatten(1).sum(1)
    assert found["metrics"]["rate_nats"]["mean"] == pytest.approx(rate.mean().item(), rel=1e-4)
    bits = rate.mean().item() / np.log(2) / 16**2 / 5
    assert found["metrics"]["bits_per_pixel"]["mean"] == pytest.approx(bits, rel=1e-4)
    levels = [(one.transpose(1, 2).flatten(0, 1) * 127.5 + 127.5).round().clamp(0, 255) for one in (clips, shown)]
    assert found["metrics"]["psnr"]["mean"] == pytest.approx(psnr(*levels).mean().item(), abs=0.01)
    assert found["metrics"]["elbo_bits"]["mean"] > 0
    assert "4 clips of 5 frames" in (out / "latent_space.md").read_text()
    program(monkeypatch, latent_space, root / "kl", root / "films", "--output", out, "--frames", "5", *small, *CHEAP)
    with refused(UsageError, "data: expected clips of 5 frames alone"):
        program(monkeypatch, latent_space, root / "wan", root / "mixed", "--output", out, "--frames", "5", *small,
                *CHEAP)  # fmt: skip


def test_figures_of_latent_frames_are_those_of_images() -> None:
    vae, draw = tiny("AutoencoderKL"), torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 8, 8, generator=draw)
    frames = latents.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(radial_power_spectrum(latents), radial_power_spectrum(frames))
    shares = high_frequency_share(frames).view(2, 3).mean(1)
    torch.testing.assert_close(high_frequency_share(latents), shares)
    # of a class of images each frame is transformed by itself
    clips = torch.rand(2, 3, 3, 16, 16, generator=draw) * 2 - 1
    images = clips.transpose(1, 2).flatten(0, 1)
    centre = torch.zeros(4)
    ours, theirs = equivariance_error(vae, clips, centre), equivariance_error(vae, images, centre)
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for name, one in ours.items():
        assert one.latent.shape == (2,)
        torch.testing.assert_close(one.psnr, theirs[name].psnr.view(2, 3).mean(1), rtol=1e-4, atol=1e-4)
