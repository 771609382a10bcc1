"""A quantizer beside a network: trained, resumed, exported, loaded, stored and sampled, of images and of clips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderKL
from images import write_images
from prior_runs import run as run_prior
from prior_runs import write_config as write_prior
from safetensors.torch import load_file
from sentences import refused
from training_runs import assert_same_run, newest, one_sentence, run, write_config, write_videos

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import beside
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.config import load
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.latent_store import LatentDataset, read_manifest, verify
from ldm_vae.latent_store.maintain.summary import describe as describe_store
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.training.config import Training
from ldm_vae.training.dry_run import describe

RESIDUAL = {"kind": "residual", "codebooks": 3, "codes": 16, "restart_images": 8, "dropout": 0.5}
CODES: dict[str, Any] = {
    "quantizer": RESIDUAL,
    "losses": {"l1": {}, "commitment": {}},
    "adversary": {"weight": 0.0},
    "discriminator": None,
    "max_train_images": 16,
    "log_every_images": 4,
    "checkpoint_every_images": 8,
}
PRIOR = {"kind": "transformer", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "order": "delay"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of residual codes of images, its store in indices/, and the images in pictures/."""
    folder = tmp_path_factory.mktemp("home")
    write_images(folder / "pictures", 8, size=(32, 32))
    done = run(write_config(folder, folder / "pictures", **CODES))
    assert done.returncode == 0, done.stderr
    encode(folder, folder / "pictures", "--pixels")
    return folder


def encode(folder: Path, data: Path, *flags: str) -> None:
    status = run_cli("encode", folder / "run" / "vae", data, folder / "indices", "--resolution", "32", *flags)
    assert status == 0


def test_a_run_logs_the_use_of_every_codebook_and_resumes_to_the_bit(home: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {f"codes/{name}/{level}" for name in ("perplexity", "usage") for level in (1, 2, 3)} <= lines[-1].keys()
    half = run(write_config(tmp_path, home / "pictures", **CODES | {"max_train_images": 8}))
    assert half.returncode == 0, half.stderr
    done = run(write_config(tmp_path, home / "pictures", **CODES))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", home / "run")


def test_the_exported_folder_keeps_it_in_files_of_its_own(home: Path, tmp_path: Path) -> None:
    folder = home / "run" / "vae"
    assert json.loads((folder / "quantizer.json").read_text()) == {
        "kind": "residual", "channels": 4, "codebooks": 3, "codes": 16, "code_dim": None, "distance": "euclidean",
    }  # fmt: skip
    vae = load_autoencoder(home / "run")
    averages = load_file(newest(home / "run") / "tensors.safetensors")
    assert torch.equal(vae.quantizer.rows, averages["ema.quantizer.rows"])
    assert torch.equal(vae.quantizer.rows, averages["autoencoder.quantizer.rows"]), "averages are not averaged again"
    card = (folder / "README.md").read_text()
    assert "no class of diffusers carries" in card and "load_autoencoder(" in card
    # diffusers' own class reads the rest, and knows nothing of codes
    plain = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    assert plain.state_dict().keys() == {name for name in vae.state_dict() if not name.startswith("quantizer.")}
    again = load_autoencoder(write_vae(vae, tmp_path / "again", None))
    assert beside(vae) is not None, "what is written is a copy"
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = [latents.encode(one, x).mean for one in (vae, again)]
    assert torch.equal(latents.nearest_codes(vae, z[0]), latents.nearest_codes(again, z[1]))
    assert torch.equal(latents.decode(vae, z[0]), latents.decode(again, z[1]))
    checkpoint = load_autoencoder(newest(home / "run"))
    assert torch.equal(checkpoint.quantizer.rows, vae.quantizer.rows)


def test_export_says_what_no_class_carries(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("export", home / "run", tmp_path / "out") == 0
    assert "which no class of diffusers carries" in capsys.readouterr().out
    assert torch.equal(load_autoencoder(tmp_path / "out").quantizer.rows, load_autoencoder(home / "run").quantizer.rows)
    for target in ("comfyui", "onnx"):
        assert run_cli("export", home / "run", tmp_path / target, "--target", target) == 2
        assert f"--target {target}: cannot carry the quantizer residual" in capsys.readouterr().err


def test_a_store_holds_the_indices_of_every_codebook(home: Path, tmp_path: Path) -> None:
    manifest, dataset = read_manifest(home / "indices"), LatentDataset(home / "indices", pixels=True)
    identity = manifest.identity
    assert (identity.store, identity.dtype, identity.codes, identity.codebooks) == ("indices", "uint16", 16, 3)
    vae = load_autoencoder(home / "run")
    item = dataset[1]
    x = item["pixels"][None].float() / 127.5 - 1
    expected = latents.nearest_codes(vae, latents.encode(vae, x).mean)[0]
    assert torch.equal(item["indices"], expected) and expected.shape == (3, 16, 16)
    assert torch.equal(dataset.decode(item["indices"], vae), latents.decode_indices(vae, expected[None])[0])
    assert dataset.decode(item["indices"][:1], vae).shape == (3, 32, 32), "one codebook of them is a code too"
    counts = torch.stack([torch.bincount(own.flatten(), minlength=16) for own in
                          torch.stack([one["indices"] for one in dataset]).unbind(1)])  # fmt: skip
    books = manifest.statistics["codebooks"]
    assert [book["used"] for book in books] == (counts > 0).sum(dim=1).tolist()
    assert manifest.statistics["used"] == sum(book["used"] for book in books)
    assert verify(home / "indices") == []
    for form in ("parquet", "webdataset"):  # there and back to the bit
        assert run_cli("store", "convert", home / "indices", tmp_path / form, "--to", form) == 0
        assert run_cli("store", "convert", tmp_path / form, tmp_path / f"from_{form}", "--from", form) == 0
        back = LatentDataset(tmp_path / f"from_{form}")
        assert back.manifest.identity.codebooks == 3 and torch.equal(back[1]["indices"], item["indices"])
    assert run_cli("decode", home / "indices", tmp_path / "decoded", "--vae", home / "run" / "vae") == 0
    assert len([*(tmp_path / "decoded").glob("*.png")]) == 8
    assert (
        "of 3 x 16 used in 2,048 positions" in (said := describe_store(home / "indices", manifest))
        and "codebook 3" in said
    )


def test_a_prior_learns_several_codebooks_and_its_samples_are_decoded(home: Path, tmp_path: Path) -> None:
    config = write_prior(tmp_path, home / "indices", model=PRIOR, max_train_images=8, validation_images=8)
    done = run_prior(config)
    assert done.returncode == 0, done.stderr
    vae = load_autoencoder(home / "run")
    generator = CodeGenerator.load(tmp_path / "run", vae)
    found = generator.indices(range(2))
    assert found.shape == (2, 3, 16, 16) and generator.pixels(range(2)).shape == (2, 3, 32, 32)
    torch.testing.assert_close(generator.decode(found), latents.decode_indices(vae, found))
    rates = json.loads((tmp_path / "run" / "report" / "prior.json").read_text())["rates"]
    assert (rates["indices"], rates["pixels"]) == (3 * 256, 1024) and rates["psnr"] is not None
    means = [book["entropy_bits"] for book in read_manifest(home / "indices").statistics["codebooks"]]
    assert rates["fitted"] == pytest.approx(sum(means) / 3)


@pytest.mark.slow
def test_clips_have_codes_of_every_position_in_time(tmp_path: Path) -> None:
    films = write_videos(tmp_path / "films", 4, 5)
    more = {"model": {"kind": "wan", "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
            "data": {"kind": "folder", "path": str(films), "frames": 5}, "max_train_images": 4}  # fmt: skip
    done = run(write_config(tmp_path, films, **CODES | more))
    assert done.returncode == 0, done.stderr
    encode(tmp_path, films, "--frames", "5")
    assert read_manifest(tmp_path / "indices").shards[0].shape == (3, 2, 4, 4)
    dataset, vae = LatentDataset(tmp_path / "indices"), load_autoencoder(tmp_path / "run")
    assert dataset.decode(dataset[0]["indices"], vae).shape == (3, 5, 32, 32)
    config = tmp_path / "prior"
    config.mkdir()
    done = run_prior(write_prior(config, tmp_path / "indices", model=PRIOR, max_train_images=4))
    assert done.returncode == 0, done.stderr
    generator = CodeGenerator.load(config / "run", vae)
    assert generator.indices([0]).shape == (1, 3, 2, 4, 4) and generator.pixels([0]).shape == (1, 3, 5, 32, 32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"kind": "vq", "num_vq_embeddings": 16}}, "quantizer: model.kind vq has codes of its own"),
        ({"model": {"kind": "vidtok", "regularizer": "fsq"}}, "quantizer: model.kind vidtok has codes of its own"),
        ({"quantizer": {"kind": "gumbel"}}, "quantizer.kind: gumbel is for a VQModel"),
        ({"quantizer": RESIDUAL | {"codebook": "learned"}}, "quantizer.codebook: learned needs the term"),
        ({"latent_store": "s", "init_from": "v"}, "latent_store: a codebook learns together"),
        ({"losses": {"l1": {}, "kl": {}}}, "losses.kl: expected a model that gives a posterior"),
        ({"quantizer": None}, "losses.commitment: expected a model that gives codes"),
        (
            {"quantizer": RESIDUAL, "losses": {"l1": {}, "code_entropy": {}}},
            "losses.code_entropy: expected a quantizer",
        ),
    ],
)
def test_a_config_without_a_place_for_a_quantizer_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    write_images(tmp_path / "pictures", 2, size=(32, 32))
    settings = {"model": {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}} | CODES | changes
    path = write_config(tmp_path, tmp_path / "pictures", **settings)
    with refused(UsageError, sentence.split(":")[0]) as error:
        describe(load(Training, path))
    assert sentence in str(error.value)


def test_a_run_goes_on_from_a_networks_codes_and_no_others(home: Path, tmp_path: Path) -> None:
    start = {"init_from": str(home / "run" / "vae"), "max_train_images": 4}
    done = run(write_config(tmp_path, home / "pictures", **CODES | start), "--dry_run")
    assert done.returncode == 0 and "codes:           12 bits a position\n" in done.stdout, done.stderr
    for quantizer in (None, RESIDUAL | {"codes": 8}):
        more = start | {"quantizer": quantizer, "losses": {"l1": {}}}
        done = run(write_config(tmp_path, home / "pictures", **CODES | more))
        assert "quantizer: expected that of init_from" in one_sentence(done, 2)
        assert "codebooks 3, codes 16" in one_sentence(done, 2)
    frozen = start | {"trainable": ["decoder.*", "post_quant_conv.*"]}
    done = run(write_config(tmp_path, home / "pictures", **CODES | frozen))
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_autoencoder(place) for place in (tmp_path / "run", home / "run"))
    assert torch.equal(ours.quantizer.rows, theirs.quantizer.rows), "its codes stay with its encoder"
    assert not torch.equal(ours.decoder.conv_out.weight, theirs.decoder.conv_out.weight)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "quantizer.json"),
        ('{"kind": "residual", "channels": 4, "codes": 99}', "quantizer.safetensors"),
        ('{"kind": "residual", "channels": 65536, "codebooks": 1024, "codes": 1000000}', "quantizer.json"),
        ('{"kind": "lfq", "channels": 4, "codes": 8}', "quantizer.json"),
    ],
)
def test_a_damaged_quantizer_is_one_sentence(home: Path, tmp_path: Path, text: str, field: str) -> None:
    shutil.copytree(home / "run" / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "quantizer.json").write_text(text)
    with refused(UsageError, field):
        load_autoencoder(tmp_path / "vae")
