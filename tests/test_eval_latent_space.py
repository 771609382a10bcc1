"""eval.latent_space as a user runs it: what it writes and refuses, other kinds of networks, one process and two."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from images import write_images
from kills import ranks
from sentences import refused
from tiny_classes import tiny as tiny_network

from eval import latent_space
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import put_beside
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import MARK
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import to_pixels
from ldm_vae.latent_space import summary
from ldm_vae.latent_space.likelihood import BIN
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.codes import code_use
from ldm_vae.models import tiny, vq
from ldm_vae.quantizers.residual import Config as Residual
from ldm_vae.report import build_report
from ldm_vae.report.images import read_pixels

CHEAP = ("--resolution", "16", "--batch_size", "5", "--num_workers", "0", "--repeats", "2", "--pairs", "1")
FEW = ("--likelihood_images", "2", "--components", "2")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.latent_space", *map(str, arguments)])
    latent_space.main()


@pytest.mark.slow
def test_one_vae(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_vae: AutoencoderKL,
    tiny_vae_folder: Path,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    (image_folder / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    run_main(monkeypatch, tiny_vae_folder, image_folder, "--output", out, *CHEAP, *FEW)
    found = json.loads((out / "latent_space.json").read_text())
    assert found["data"]["images"] == found["metrics"]["psnr"]["n"] == 12
    assert found["data"]["quarantined"] == 1
    assert json.loads((out / "latent_space.quarantine.jsonl").read_text())["key"] == "broken.png"
    of_sounds = {"snr", "bits_per_sample"}
    assert {*summary.TITLES} - of_sounds == {*found["metrics"]}  # each has its heading
    assert found["vae"]["latent_values"] == 4 * 8 * 8

    # against the latent contract, all images at once
    (batch,) = image_batches(open_source(image_folder), range(13), 16, batch_size=13)
    with torch.no_grad():
        moments = latents.encode(tiny_vae, to_pixels(batch.pixels))
    rate = moments.kl().sum(dim=(1, 2, 3)).mean().item()
    assert found["metrics"]["rate_nats"]["mean"] == pytest.approx(rate, rel=1e-4)
    assert found["metrics"]["bits_per_pixel"]["mean"] == pytest.approx(rate / math.log(2) / 16**2, rel=1e-4)
    assert sum(found["channels"]["kl_nats_per_image"]) == pytest.approx(rate, rel=1e-4)
    assert found["channels"]["mean"] == pytest.approx(moments.mean.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert found["information"]["images"] == 12 and found["information"]["cap_nats"] == pytest.approx(math.log(12))
    assert found["information"]["rate_nats"] == pytest.approx(rate, rel=1e-4)

    # the variance is fitted on images that have no bound: those with an even index
    with torch.no_grad():
        noise = latents.posterior_noise(0, batch.indices, moments.mean.shape[1:])
        decoded = latents.decode(tiny_vae, moments.sample(noise)).clamp(-1, 1)
    error = (decoded - to_pixels(batch.pixels)).square().flatten(1).mean(dim=1)
    even = error[[index % 2 == 0 for index in batch.indices]].mean().item()
    assert found["likelihood"]["variance"] == pytest.approx(even + BIN**2 / 12, rel=1e-5)
    assert found["likelihood"]["images"] == 2
    assert len(found["spectrum"]["latents"]) == 8 // 2 + 1

    files = {entry["file"] for entry in found["pictures"]}
    assert files == {path.relative_to(out).as_posix() for path in (out / "latent_space").glob("*.png")}
    assert len(files) == 2 + 4 + 3  # one pair both ways, four channels, three priors
    strip = read_pixels(out / "latent_space" / "interpolation-0.linear.png")
    assert strip.shape == (16, 9 * 17 - 1, 3)
    with torch.no_grad():
        first = latents.decode(tiny_vae, moments.mean[:1]).clamp(-1, 1)
    assert abs(strip[:, :16] - (127.5 * (first[0] + 1)).permute(1, 2, 0).numpy()).max() < 1.01
    assert {path.name for path in out.rglob(".*")} == {MARK}

    # the page has every picture and number
    page = build_report(out).read_text(encoding="utf-8")
    assert '<section id="latent-space">' in page and "Latent space report" in page
    assert len(re.findall(r'src="data:image/webp;base64,', page)) == len(files) + 1  # the correlation
    assert all(sentence in html.unescape(page) for sentence in (summary.about_normal(found), "img_0000.png to img_"))
    # words keep their capitals, and the correlation has its scale
    assert "Drawn from N(0, I)" in page and "n(0, i)" not in page.lower().replace("n(0, i)", "", page.count("N(0, I)"))
    assert "<span>−1</span>" in page and "<span>+1</span>" in page
    again = ["ldm-vae", "latent_space", *sys.argv[1:]]  # with every flag of the call
    assert shlex.join(again) in html.unescape(page) and "--likelihood_images" in again
    value = f"{found['metrics']['elbo_bits']['mean']:.4f}"
    assert all(value in text for text in (capsys.readouterr().out, (out / "latent_space.md").read_text(), page))


@pytest.mark.parametrize("kind", ["vq", "tiny"])
def test_an_encoder_without_a_variance_gives_what_applies(
    monkeypatch: pytest.MonkeyPatch, kind: str, image_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if kind == "vq":
        config = vq.Config(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, num_vq_embeddings=16)
    else:
        widths, blocks = (8, 8), (1, 1)
        config = tiny.Config(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths,
            num_encoder_blocks=blocks, num_decoder_blocks=blocks,
        )  # fmt: skip
    config.build().save_pretrained(tmp_path / kind)
    out = tmp_path / "out"
    run_main(monkeypatch, tmp_path / kind, image_folder, "--output", out, *CHEAP, "--components", "0")
    found = json.loads((out / "latent_space.json").read_text())
    assert found["information"] is found["likelihood"] is found["mixture"] is None
    assert "rate_nats" not in found["metrics"] and "high_frequency_share" in found["metrics"]
    assert "no variance" in summary.about_information(found)
    page = build_report(out).read_text(encoding="utf-8")
    assert '<section id="latent-space">' in page
    assert "samples.normal.png" not in str(found["pictures"]) and "samples.field.png" in str(found["pictures"])

    # codes: of all images at once, as a store records them
    assert ("Use of each code" in page) is (kind == "vq")
    if kind == "tiny":
        assert found["codes"] == [] and summary.about_codes(found) is None
        return
    vae = load_autoencoder(tmp_path / "vq")
    (batch,) = image_batches(open_source(image_folder), range(12), 16, batch_size=12)
    with torch.no_grad():
        indices = latents.nearest_codes(vae, latents.encode(vae, to_pixels(batch.pixels)).mean)
    counts = torch.bincount(indices.flatten(), minlength=16)
    shares = counts[counts > 0] / counts.sum()
    (book,) = found["codes"]
    assert book["count"] == 12 * 64 == sum(book["uses"]) and book["codes"] == 16
    assert book["uses"] == counts[counts > 0].sort(descending=True).values.tolist()
    assert (book["used"], book["dead"]) == (int((counts > 0).sum()), int((counts == 0).sum()))
    assert book["perplexity"] == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-5)
    sentence = f"{book['used']} of 16 codes used in 768 positions, {book['dead']} dead"
    assert sentence in page and sentence in (out / "latent_space.md").read_text()


def test_each_codebook_has_its_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices [B, q, *p] of a network with several codebooks, here of clips."""
    indices = torch.tensor([[0, 0], [1, 2], [0, 0], [1, 3]]).view(2, 2, 2, 1, 1).transpose(1, 2).repeat(1, 1, 1, 2, 1)
    network = put_beside(tiny_network("AutoencoderKL"), Residual(codebooks=2, codes=5).beside(4))
    use, none = code_use(network), code_use(tiny_network("AutoencoderKL"))
    vectors = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    use.update(network, vectors)
    found = [torch.bincount(one.flatten(), minlength=5) for one in latents.nearest_codes(network, vectors).unbind(1)]
    assert [one["uses"] for one in use.figures()] == [
        one[one > 0].sort(descending=True).values.tolist() for one in found
    ]

    use = code_use(network)
    monkeypatch.setattr(latents, "nearest_codes", lambda *_: indices)
    use.update(network, torch.zeros(2, 4, 2, 2, 1))  # two clips of two frames
    first, second = use.over_ranks().figures()
    assert first["uses"] == [4, 4] and second["uses"] == [4, 2, 2]
    assert (first["images"], first["count"], first["used"], first["dead"], second["dead"]) == (2, 8, 2, 3, 2)
    assert first["perplexity"] == pytest.approx(2) and second["entropy_bits"] == pytest.approx(1.5)
    said = summary.about_codes({"codes": [first, second]})
    assert said is not None and said.startswith("Codebook 0: 2 of 5 codes used in 8 positions, 3 dead")
    assert "codebook 1: 3 of 5" in said and "5 codes" in said
    none.update(network, torch.zeros(2, 4, 2, 2))
    assert none.over_ranks().figures() == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("--resolution", "17"), "resolution"),
        (("--repeats", "1"), "repeats"),
        (("--bank", "1"), "bank"),
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
    assert not (tmp_path / "out" / "latent_space.json").exists()


def test_one_image_gives_what_one_image_can(
    monkeypatch: pytest.MonkeyPatch, tiny_vae_folder: Path, tmp_path: Path
) -> None:
    images = write_images(tmp_path / "one", 1)
    run_main(monkeypatch, tiny_vae_folder, images, "--output", tmp_path / "out", *CHEAP)
    found = json.loads((tmp_path / "out" / "latent_space.json").read_text())
    assert found["information"] is found["likelihood"] is found["mixture"] is None
    assert found["metrics"]["psnr"]["ci95"] is None
    assert "One image" in (tmp_path / "out" / "latent_space.md").read_text()


@pytest.mark.slow
def test_one_process_and_two_agree(tiny_vae_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        out = tmp_path / f"out{number}"
        call = [str(tiny_vae_folder), str(image_folder), "--output", str(out), *CHEAP, *FEW]
        for done in [rank.wait() for rank in ranks(latent_space.main, call, number)]:
            assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads((out / "latent_space.json").read_text()))
    one, two = found
    assert (one["settings"].pop("processes"), two["settings"].pop("processes")) == (1, 2)
    assert two["data"] == one["data"] and two["pictures"] == one["pictures"]
    assert one["settings"].pop("command").replace("out1", "out2") == two["settings"].pop("command")
    assert two["settings"] == one["settings"]
    for name, number in one["metrics"].items():
        assert two["metrics"][name]["n"] == number["n"]
        assert two["metrics"][name]["mean"] == pytest.approx(number["mean"], rel=1e-9)
        assert two["metrics"][name]["ci95"] == pytest.approx(number["ci95"], rel=1e-9)
    for name in ("mean", "std", "excess_kurtosis", "kl_nats_per_image"):
        assert two["channels"][name] == pytest.approx(one["channels"][name], rel=1e-9)
    for name in ("rate_nats", "mutual_information_nats", "prior_gap_nats"):
        assert two["information"][name] == pytest.approx(one["information"][name], rel=1e-9)
    assert two["likelihood"]["spread_bits"] == pytest.approx(one["likelihood"]["spread_bits"], rel=1e-6)
