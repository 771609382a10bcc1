"""Programs that measure, on sounds: evaluate, validation in training, the page with its players and spectrograms."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import soundfile
import torch
from cli_call import call, program
from PIL import Image
from sentences import refused
from sound_files import RATE, encoded, tone, write_sounds
from sound_runs import sound_config
from tiny_classes import tiny
from training_runs import metrics as logged
from training_runs import one_sentence, run

from eval import latent_space, reconstruction
from ldm_vae import evaluate, load_autoencoder, measure, metrics, open_images
from ldm_vae.autoencoder.codebooks import put_beside
from ldm_vae.autoencoder.latents import decode, encode, nearest_codes
from ldm_vae.autoencoder.linear_code import PatchMoments
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.metrics.profile import spectrum_along_time
from ldm_vae.perceptual.spectrogram import COLUMNS, DECIBELS, ROWS, mel, picture
from ldm_vae.quantizers.residual import Config as Residual
from ldm_vae.report import build_report
from ldm_vae.training.config import Training
from ldm_vae.training.monitor import below_linear, overfitting

SCHEMA = json.loads((Path(metrics.__file__).parent / "metrics.schema.json").read_text())
NAMES = ("si_sdr", "snr", "log_spectral_distance", "mel_distance")
LENGTH = 2048  # samples of an excerpt
LENGTHS = (LENGTH, 4000 - LENGTH, LENGTH, 4000 - LENGTH, 600)  # of the sounds' own samples, as excerpts cover them
CHEAP = (
    "--excerpt",
    LENGTH,
    "--sample_rate",
    RATE,
    "--num_workers",
    0,
    "--batch_size",
    2,
    "--metrics",
    ",".join(NAMES),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sounds, the last of them shorter than an excerpt and too loud, one that is damaged; a network without and
    one with codes."""
    folder = tmp_path_factory.mktemp("sounds")
    write_sounds(folder / "music", 2)
    (folder / "music" / "tone2.wav").write_bytes(encoded(4 * tone(600)))
    (folder / "music" / "tone3.wav").write_bytes(encoded(tone(500))[:-100])
    write_vae(tiny("AutoencoderOobleck", audio_channels=1), folder / "plain", None)
    coded = put_beside(tiny("AutoencoderOobleck", audio_channels=1), Residual(codebooks=2, codes=5).beside(4))
    write_vae(coded, folder / "coded", None)
    write_vae(tiny("AutoencoderKL"), folder / "images", None)
    (folder / "stills").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "stills" / "one.png")
    return folder


@pytest.fixture(scope="module")
def compared(root: Path) -> Path:
    program(reconstruction, root / "plain", root / "coded", root / "music", "--output", root / "out", "--pictures", 3,
            *CHEAP)  # fmt: skip
    return root / "out"


def excerpts(root: Path) -> torch.Tensor:
    """[5, 1, LENGTH], silence behind what is shorter."""
    sounds = [soundfile.read(root / "music" / f"tone{one}.wav", dtype="float32")[0] for one in range(3)]
    parts = [one[start : start + LENGTH] for one in sounds for start in range(0, len(one), LENGTH)]
    return torch.stack([torch.from_numpy(np.pad(one, (0, LENGTH - len(one)))) for one in parts])[:, None]


@torch.no_grad()
def test_sounds_are_measured_as_they_are_decoded_and_as_far_as_they_go(root: Path, compared: Path) -> None:
    found = json.loads((compared / "metrics.json").read_text())
    jsonschema.validate(found, SCHEMA)
    x = excerpts(root)
    for one, name in zip(found, ("plain", "coded"), strict=True):
        assert one["data"]["images"] == 5 and one["data"]["quarantined"] == 1
        assert one["data"]["sounds"] == {"sample_rate": RATE, "channels": 1, "samples": LENGTH}
        vae = load_autoencoder(root / name)
        y = decode(vae, encode(vae, x).mean)
        for metric in NAMES:
            values = [
                measure(before[None, :, :length], after[None, :, :length], metrics=[metric], sample_rate=RATE)[metric]
                for before, after, length in zip(x, y, LENGTHS, strict=True)
                if length > 1024 or "distance" not in metric
            ]
            assert one["metrics"][metric]["n"] == len(values) == (4 if "distance" in metric else 5)
            assert one["metrics"][metric]["mean"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-4, abs=1e-4)
            assert one["metrics"][metric]["ci95"] is not None
        assert len(one["latents"]["spectrum"]["original"]) == 513
        mean = encode(vae, x).mean
        assert one["latents"]["mean"] == pytest.approx(mean.mean(dim=(0, 2)).tolist(), abs=1e-5)
    rows = [json.loads(line) for line in (compared / "images.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows[:5]] == [
        "tone0.wav#t=0", "tone0.wav#t=0.256", "tone1.wav#t=0", "tone1.wav#t=0.256", "tone2.wav"
    ]  # fmt: skip
    assert "mel_distance" in rows[3] and "mel_distance" not in rows[4]  # NaN is no JSON


def test_a_linear_code_of_hops_stands_beside_a_network(root: Path, compared: Path) -> None:
    plain, coded = json.loads((compared / "metrics.json").read_text())
    x = excerpts(root)
    moments = PatchMoments(8, 1, axes=1)
    moments.update(x)
    code = moments.code(4)
    y = code.decode(code.encode(x))
    each = [measure(before[None, :, :length], after[None, :, :length].float(), metrics=["snr"], sample_rate=RATE)["snr"]
            for before, after, length in zip(x, y, LENGTHS, strict=True)]  # fmt: skip
    assert plain["linear_code"]["snr"]["mean"] == pytest.approx(torch.cat(each).mean().item(), rel=1e-4)
    assert plain["linear_code"]["mel_distance"]["n"] == 4 and "linear_code" not in coded
    assert coded["data"]["notes"] == [
        "linear code: none beside an AutoencoderOobleck, whose codebook is no continuous code"
    ]


@torch.no_grad()
def test_codes_have_a_rate_and_a_use(root: Path, compared: Path) -> None:
    plain, coded = json.loads((compared / "metrics.json").read_text())
    assert "codes" not in plain
    vae = load_autoencoder(root / "coded")
    indices = nearest_codes(vae, encode(vae, excerpts(root)).mean)
    used = [len(own.unique()) for own in indices.unbind(1)]
    assert [book["used"] for book in coded["codes"]["codebooks"]] == used
    assert [book["dead"] for book in coded["codes"]["codebooks"]] == [5 - one for one in used]
    assert coded["codes"]["bits_per_second"] == pytest.approx(RATE / 8 * 2 * math.log2(5))
    shares = [own.flatten().bincount() / own.numel() for own in indices.unbind(1)]
    entropy = -sum(float((one[one > 0] * one[one > 0].log2()).sum()) for one in shares)
    assert coded["codes"]["entropy_bits_per_second"] == pytest.approx(RATE / 8 * entropy, rel=1e-4)
    table = (compared / "metrics.md").read_text()
    assert (
        f"| codes used, of all | - | {sum(used)} of 10 |" in table
        and "| bits per second of the codes | - | 4," in table
    )
    assert f"sounds of at most {LENGTH:,} samples at {RATE:,} Hz, mono. Protocol" in table


@torch.no_grad()
def test_the_page_plays_the_worst_the_median_and_the_best(root: Path, compared: Path) -> None:
    pictures = json.loads((compared / "pictures" / "pictures.json").read_text())
    rows = [json.loads(line) for line in (compared / "images.jsonl").read_text().splitlines()][:5]
    order = sorted(rows, key=lambda row: row["si_sdr"])
    assert [(one["kind"], one["index"]) for one in pictures] == [
        ("worst", order[0]["index"]), ("median", order[2]["index"]), ("best", order[4]["index"])
    ]  # fmt: skip
    vae, x = load_autoencoder(root / "plain"), excerpts(root)
    for one in pictures:
        length = LENGTHS[one["index"]]
        for name, sound in (("original", x), ("reconstruction", decode(vae, encode(vae, x).mean))):
            heard, rate = soundfile.read(compared / "pictures" / f"{one['name']}.{name}.wav", dtype="float32")
            assert rate == RATE
            np.testing.assert_allclose(heard, sound[one["index"], 0, :length].numpy(), atol=1e-5)
    html = build_report(compared).read_text()
    players = re.findall(r'<audio [^>]*src="data:audio/flac;base64,([^"]+)"', html)
    assert len(players) == 9 and html.count("<svg") > 9 and "http" not in html.replace("http://www.w3.org", "")
    loud = next(place for place, one in enumerate(pictures) if one["index"] == 4)
    heard, _ = soundfile.read(io.BytesIO(base64.b64decode(players[3 * loud])), dtype="float32")
    original = x[4, 0, :600].numpy()
    np.testing.assert_allclose(heard, original.clip(-1, 1), atol=2**-15)
    assert f"original: {int((np.abs(original) > 1).sum()):,} samples above full scale are clipped" in html
    assert "worst" in html and "0 dB, a sine of full scale" in html and "kbit per second" in html
    assert "Codebook 0: " in html and "perplexity" in html and "What others have published" not in html


def test_the_call_measures_what_the_program_does(root: Path, compared: Path) -> None:
    expected, _ = json.loads((compared / "metrics.json").read_text())
    vae = load_autoencoder(root / "plain")
    found = evaluate(vae, open_images(root / "music", vae, samples=LENGTH, sample_rate=RATE), batch_size=2)
    assert (found.images, found.checksum) == (5, expected["data"]["checksum"])
    assert {name: one.mean for name, one in found.metrics.items()} == pytest.approx(
        {name: expected["metrics"][name]["mean"] for name in NAMES}, rel=1e-6
    )


def test_what_is_of_another_signal_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    def measured(*flags: object, vae: str = "plain") -> None:
        program(reconstruction, root / vae, root / "music", "--output", tmp_path / "no", *flags)

    rate, length = ("--sample_rate", RATE), ("--excerpt", LENGTH)
    for field, flags in {
        "metrics: psnr": (*rate, *length, "--metrics", "si_sdr,psnr"),
        "resolution": (*rate, *length, "--resolution", "64"),
        "samples: expected": rate,
        "samples (--excerpt): expected a positive multiple of 8": (*rate, "--excerpt", "2047"),
        "protocol": (*rate, *length, "--protocol", "eq-vae"),
    }.items():
        with refused(UsageError, field):
            measured(*flags)
    with refused(UsageError, "metrics: si_sdr"):
        measured("--resolution", "32", "--metrics", "si_sdr", vae="images")
    with refused(UsageError, "vae"):
        program(reconstruction, root / "plain", root / "images", root / "music", "--output", tmp_path / "no", *rate)
    assert not (tmp_path / "no" / "metrics.json").exists()
    vae = load_autoencoder(root / "plain")
    with refused(UsageError, "samples"):
        evaluate(vae, open_images(root / "music", vae, sample_rate=RATE))
    with refused(UsageError, "resolution"):
        evaluate(load_autoencoder(root / "images"), open_images(root / "stills", load_autoencoder(root / "images")))


def test_drift_of_sounds(root: Path, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = load_autoencoder(root / "plain")
    with torch.no_grad():
        tuned.decoder.conv2.weight_g.mul_(1.5)
    write_vae(tuned, root / "tuned", None)
    flags = ("--excerpt", LENGTH, "--sample_rate", RATE)
    capsys.readouterr()
    call("drift", root / "plain", root / "tuned", root / "music", *flags, "--json")
    found = json.loads(capsys.readouterr().out)
    expected, _ = json.loads((compared / "metrics.json").read_text())
    assert found["images"] == 5 and found["rms"] == 0 and found["same_encoder"]
    for name in ("snr", "mel_distance"):  # as far as each sound goes
        own = found["metrics"]["base -> base"][name]["mean"]
        assert own == pytest.approx(expected["metrics"][name]["mean"], rel=1e-4)
    assert found["metrics"]["base -> tuned"]["snr"] == found["metrics"]["tuned -> tuned"]["snr"]
    assert found["metrics"]["base -> tuned"]["snr"]["mean"] < found["metrics"]["base -> base"]["snr"]["mean"]
    call("drift", root / "plain", root / "plain", root / "music", *flags, "--no_lpips")
    said = capsys.readouterr().out
    assert "5 sounds" in said and "verdict: compatible" in said and "mel_distance" not in said


@torch.no_grad()
def test_a_latent_space_of_sounds(root: Path) -> None:
    out = root / "space"
    program(latent_space, root / "coded", root / "music", "--output", out, "--components", 0, *CHEAP[:-2])
    found = json.loads((out / "latent_space.json").read_text())
    vae, x = load_autoencoder(root / "coded"), excerpts(root)
    mean = encode(vae, x).mean
    assert found["data"]["sounds"]["samples"] == LENGTH and found["data"]["images"] == 5
    assert found["vae"]["latent_values"] == mean[0].numel() and found["pictures"] == []
    assert found["channels"]["mean"] == pytest.approx(mean.mean(dim=(0, 2)).tolist(), abs=1e-4)
    torch.testing.assert_close(
        torch.tensor(found["spectrum"]["latents"]), (spectrum_along_time(mean) / 5).float(), rtol=1e-3, atol=1e-5
    )
    assert found["spectrum"]["white_share"] == pytest.approx(0.5, abs=0.01)  # of one dimension
    assert found["metrics"]["high_frequency_share"]["mean"] > 0 and len(found["codes"]) == 2
    assert "5 sounds of at most" in (out / "latent_space.md").read_text()
    page = build_report(out).read_text()
    assert 'id="latent-space"' in page and "sounds of at most" in page
    program(latent_space, root / "plain", root / "music", "--output", out, "--components", 0, *CHEAP[:-2])
    found = json.loads((out / "latent_space.json").read_text())
    rate = encode(load_autoencoder(root / "plain"), x).kl().flatten(1).sum(dim=1).mean().item()
    assert found["metrics"]["bits_per_sample"]["mean"] == pytest.approx(rate / math.log(2) / LENGTH, rel=1e-4)
    assert "nats/sound" in (out / "latent_space.md").read_text() and found["information"] is not None
    assert found["likelihood"] is None and not [name for name in found["metrics"] if "equivariance" in name]


@torch.no_grad()
def test_an_export_measures_sounds_and_its_card_says_so(root: Path, tmp_path: Path) -> None:
    flags = ("--excerpt", LENGTH, "--sample_rate", RATE, "--stats", root / "music")
    call("export", root / "plain", tmp_path / "out", *flags, "--drift_from", root / "plain")
    card = (tmp_path / "out" / "README.md").read_text()
    expected_words = (
        "pipeline_tag: audio-to-audio", "hop 8 (a sound of L samples has L/8 latents)", "# sounds [B, C, L] in",
        "Measured in fp64 over 5 sounds", f"1 channel(s), {RATE:,} samples a second", "spectrograms of 90 dB",
        "encoder: identical; 5 sounds",
    )  # fmt: skip
    for words in expected_words:
        assert words in card
    means = [float(one) for one in re.findall(r"\| mean of channel \d+ \| (\S+) \|", card)]
    expected = encode(load_autoencoder(root / "plain"), excerpts(root)).mean.mean(dim=(0, 2)).tolist()
    assert means == pytest.approx(expected, rel=1e-3, abs=1e-4)
    with Image.open(tmp_path / "out" / "pictures" / "reconstruction.png") as sheet:
        assert sheet.size == (4 * COLUMNS, 2 * ROWS)
    with refused(UsageError, "--preview"):
        call("export", root / "plain", tmp_path / "no", *flags, "--preview")


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_validates_on_sounds(root: Path, tmp_path: Path) -> None:
    held = {"kind": "folder", "path": str(root / "music"), "channels": 1, "sample_rate": RATE, "samples": LENGTH}
    changes: dict[str, Any] = {"validate_every_images": 4, "max_train_images": 8, "validation_data": held}
    done = run(sound_config(tmp_path, **changes))
    assert done.returncode == 0, done.stderr
    lines = [line for line in logged(tmp_path / "run") if "validation/mel_distance" in line]
    assert [line["images"] for line in lines] == [4, 8] and all(f"validation/{name}" in lines[0] for name in NAMES)
    report = tmp_path / "run" / "report"
    found = json.loads((report / "metrics.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["metrics"]["si_sdr"]["mean"] == lines[-1]["validation/si_sdr"]
    assert (report / "validation" / "images-000000008.png").is_file()
    before, rate = soundfile.read(report / "pictures" / "000.original.wav", dtype="float32")
    after, _ = soundfile.read(report / "pictures" / "000.reconstruction.wav", dtype="float32")
    assert rate == RATE and np.array_equal(before, excerpts(root)[0, 0].numpy()) and after.shape == before.shape
    page = (report / "index.html").read_text()
    assert page.count("<audio ") == 2 * 5 and "Validation Mel distance" in page and "sounds seen" in page

    odd = changes | {"validation_data": held | {"samples": 2047}}
    assert "validation_data.samples: expected a positive multiple" in one_sentence(
        run(sound_config(tmp_path, **odd)), 2
    )
    short = changes | {"validation_data": held | {"samples": 256}}
    assert "best_metric: mel_distance: needs excerpts" in one_sentence(run(sound_config(tmp_path, **short)), 2)


def test_configs_name_metrics_of_their_signal(tmp_path: Path) -> None:
    held = {"kind": "folder", "path": "music", "channels": 1, "sample_rate": RATE}
    with refused(UsageError, "validation_metrics: psnr"):
        config.load(Training, sound_config(tmp_path, validation_metrics=["snr", "psnr"], best_metric="snr"))
    with refused(UsageError, "validation_data.samples"):
        config.load(Training, sound_config(tmp_path, validation_data=held))
    with refused(UsageError, "validation_metrics: snr"):
        path = sound_config(tmp_path, model={"kind": "kl"}, data={"sample_rate": None}, losses={"l1": {}})
        config.load(Training, path, ["--validation_metrics", "snr", "--best_metric", "snr"])


def test_the_monitor_reads_ratios_as_errors(tmp_path: Path) -> None:
    for metric, best, worse in (("si_sdr", 10.0, 9.0), ("snr", 5.0, 4.0), ("stoi", 0.9, 0.8), ("pesq", 3.0, 2.5)):
        values = [best, worse, worse, worse]
        log = [{"images": place, "loss/total": 9.0 - place, f"validation/{metric}": value}
               for place, value in enumerate(values)]  # fmt: skip
        assert "overfitting" in overfitting(log, metric, tmp_path)
        assert overfitting([line | {f"validation/{metric}": best} for line in log], metric, tmp_path) == {}


def test_the_monitor_says_that_least_squares_is_better() -> None:
    scores = {
        "validation/snr": 5.0,
        "linear_code/snr": 6.0,
        "validation/mel_distance": 3.0,
        "linear_code/mel_distance": 2.0,
    }
    assert "SNR 5.00 against 6.00 dB, mel distance 3.000 against 2.000" in below_linear(scores, "noise")["below_linear"]
    assert below_linear(scores | {"validation/snr": 7.0}, "noise") == {}


# --- spectra ----------------------------------------------------------------------------------------------------------


def test_a_picture_has_a_tone_in_its_row_at_its_level() -> None:
    time = torch.arange(RATE) / RATE
    for hertz, decibels in ((500.0, 0.0), (3000.0, -30.0)):
        levels = picture(10 ** (decibels / 20) * torch.sin(2 * math.pi * hertz * time)[None], RATE)
        assert levels.shape == (ROWS, COLUMNS)
        row = int(levels[:, COLUMNS // 2].argmax())
        assert abs(ROWS - 1 - row - ROWS * mel(hertz) / mel(RATE / 2)) < 1.5
        assert levels[row, COLUMNS // 2].item() == pytest.approx(1 + decibels / DECIBELS, abs=0.01)
        assert levels[ROWS - 1 - row, COLUMNS // 2] < 0.2
    half = torch.cat([torch.sin(2 * math.pi * 500 * time), torch.zeros(RATE)])[None]
    assert (
        picture(half, RATE)[:, : COLUMNS // 2 - 9].max() > 0.9 and picture(half, RATE)[:, COLUMNS // 2 + 9 :].max() == 0
    )
    assert picture(torch.zeros(2, 9), RATE).shape == (ROWS, COLUMNS)


def test_the_spectrum_of_white_noise_is_its_variance() -> None:
    noise = 2 * torch.randn(3, 2, 2**14, generator=torch.Generator().manual_seed(0))
    found = spectrum_along_time(noise) / 3
    assert len(found) == 513 and found[3:-1].mean() == pytest.approx(4, rel=0.02)
    tone_of = torch.sin(2 * math.pi * 0.25 * torch.arange(4096))[None, None]
    assert spectrum_along_time(tone_of).argmax() == 256
    assert len(spectrum_along_time(noise[:, :, :10])) == 6
