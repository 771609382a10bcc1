"""--target dac: transformers' DacModel has the codes and the sounds of `model.kind: dac`, whatever its codebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_call import call
from sentences import refused
from sound_files import RATE
from sound_runs import sound_config
from tiny_classes import tiny
from training_runs import run
from transformers import DacFeatureExtractor, DacModel

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import Shape, put_beside, rows_of
from ldm_vae.autoencoder.dac import to_dac
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.models.dac import Config

SMALL: dict[str, Any] = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "downsampling_ratios": [2, 4]}


def network(**shape: Any) -> Any:
    """A DAC whose codebooks hold vectors of its sounds, moved a little: those of each level what is left."""
    torch.manual_seed(0)
    vae = Config(sampling_rate=RATE, **SMALL).build().eval().requires_grad_(False)
    books = Shape(kind="residual", channels=16, codebooks=3, codes=32, **shape).build().requires_grad_(False)
    residual = rows_of(latents.encode(vae, sounds()).mean)
    for level, rows in enumerate(books.rows):
        seen = books.look_up(level, residual)[0]
        rows.copy_(seen[torch.randperm(len(seen))[:32]] + 0.3 * seen.std(dim=0) * torch.randn(rows.shape))
        residual = residual - books.share(level, rows[books.look_up(level, residual)[1]])
    return put_beside(vae, books)


def sounds() -> torch.Tensor:
    return torch.randn(2, 1, 1024, generator=torch.Generator().manual_seed(0)) * 0.3


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("code_dim", [None, 6])
def test_codes_and_sounds_are_those_of_the_network(distance: str, code_dim: int | None, tmp_path: Path) -> None:
    vae = network(distance=distance, code_dim=code_dim)
    call("export", write_vae(vae, tmp_path / "vae", None), tmp_path / "out", "--target", "dac")
    theirs, x = DacModel.from_pretrained(tmp_path / "out", local_files_only=True).eval(), sounds()
    codes = latents.nearest_codes(vae, latents.encode(vae, x).mean)
    assert all(len(own.unique()) > 3 for own in codes.unbind(1)), "there is something to compare"
    with torch.no_grad():
        assert torch.equal(theirs.encode(x).audio_codes, codes)
        for count in (1, 2, 3):
            found = theirs.decode(audio_codes=codes[:, :count]).audio_values
            expected = latents.decode_indices(vae, codes[:, :count])[:, 0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # and back: what transformers has is loaded, coded and decoded as any network
    again = load_autoencoder(tmp_path / "out")
    assert type(again).__name__ == "DacAutoencoder" and geometry_of(again).factor == 8
    z = latents.encode(again, x).mean
    assert torch.equal(latents.nearest_codes(again, z), codes)
    torch.testing.assert_close(latents.decode(again, z), latents.decode_indices(vae, codes), rtol=0, atol=1e-5)
    assert DacFeatureExtractor.from_pretrained(tmp_path / "out").sampling_rate == RATE


def test_a_dac_trains_and_is_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantizer = {"kind": "residual", "codebooks": 2, "codes": 16, "code_dim": 4, "distance": "cosine",
                 "codebook": "learned", "dropout": 0.5}  # fmt: skip
    config = sound_config(tmp_path, model={"kind": "dac", "sampling_rate": RATE, **SMALL}, quantizer=quantizer,
                          losses={"l1": {}, "codebook": {}, "commitment": {}}, max_train_images=4)  # fmt: skip
    done = run(config)
    assert done.returncode == 0, done.stderr
    call("export", tmp_path / "run", tmp_path / "out", "--target", "dac")
    said, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "codes all equal, decoded samples differ by" in said and "8 bits a position, 8,000 bits per second" in said
    assert "library_name: transformers" in card and "no class of diffusers carries" not in card
    call("encode", tmp_path / "out", tmp_path / "sounds", tmp_path / "store", "--num_workers", "0")
    call("export", tmp_path / "out", tmp_path / "again", "--target", "dac")  # of the record too
    assert (tmp_path / "again" / "preprocessing.json").read_bytes() == (
        tmp_path / "out" / "preprocessing.json"
    ).read_bytes()


def test_what_it_cannot_carry_is_said(tmp_path: Path) -> None:
    no_codes, odd = network(), network()
    put_beside(no_codes, None)
    put_beside(odd, Shape(kind="residual", channels=16, codebooks=3, codes=24).build())
    causal = tiny("AutoencoderOobleck", audio_channels=1)
    for number, vae in enumerate((causal, no_codes, odd)):
        place = write_vae(vae, tmp_path / f"{number}", None)
        with refused(UsageError, "--target dac"):
            call("export", place, tmp_path / "out", "--target", "dac")
    for field, value in (("--variant", "fp16"), ("--target dac", "--normalisation=channel")):
        words = (value,) if "=" in value else (field, value)
        with refused(UsageError, field):
            call("export", tmp_path / "1", tmp_path / "out", "--target", "dac", *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_transformers_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    model = to_dac(network(distance="cosine"))
    model.save_pretrained(tmp_path / "dac")
    config = (tmp_path / "dac" / "config.json").read_text()
    for field, text in {
        "stride": config.replace('"downsampling_ratios": [\n    2', '"downsampling_ratios": [\n    3'),
        "config.json": config.replace('"codebook_size": 32', '"codebook_size": "many"'),
        "VAE": config.replace('"n_codebooks": 3', '"n_codebooks": 4'),
    }.items():
        (tmp_path / "dac" / "config.json").write_text(text)
        with refused(UsageError, field):
            load_autoencoder(tmp_path / "dac")
