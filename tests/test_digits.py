"""The textbook's digits: the package's own values as pictures, and a VAE trained on them whose bound is in the log."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from fork_server import fork
from PIL import Image
from repository import ROOT
from sentences import refused
from sklearn.datasets import load_digits
from training_runs import metrics

from ldm_vae.cli import main
from ldm_vae.core.errors import UsageError
from ldm_vae.demo.digits import digits, held_out, prepare_digits
from train import autoencoder as training_program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "data" / "digits"
    prepare_digits(out)
    return out


def test_the_pictures_are_the_packages_images_under_their_labels(folder: Path) -> None:
    data = load_digits()
    files = sorted(folder.glob("*/*/*.png"), key=lambda path: path.stem)
    assert [int(path.stem) for path in files] == list(range(1797))
    for index in range(0, 1797, 83):
        assert int(files[index].parent.name) == data.target[index]
        assert files[index].parent.parent.name == ("heldout" if index % 5 == 0 else "train")
        # 17 levels over 8 bits: to half a grey value
        np.testing.assert_allclose(np.asarray(Image.open(files[index])), data.images[index] / 16 * 255, atol=0.5)
    assert len(list(folder.glob("heldout/*/*.png"))) == 360
    assert {path.name for path in folder.glob("heldout/*")} == set("0123456789")
    assert "CC BY 4.0" in (folder / "ATTRIBUTION.md").read_text()


def test_tensors_are_split_as_the_folder_is() -> None:
    images, labels = digits()
    training, test = held_out(images)
    assert images.shape == (1797, 1, 8, 8) and (len(training), len(test)) == (1437, 360) and len(labels) == 1797
    assert images.amin() == -1 and images.amax() == 1 and len(images.unique()) == 17


@pytest.mark.slow
def test_the_verb_writes_them_again_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted(folder.rglob("*.png"))[0]
    first.unlink()
    monkeypatch.setattr("sys.argv", ["ldm-vae", "assets", "digits", str(folder)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert first.is_file() and "1437 digits to train on, 360 held out" in capsys.readouterr().out
    (tmp_path / "mine.txt").write_text("not to be lost")
    with refused(UsageError, "OUT"):
        prepare_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_textbooks_vae_tells_its_bound(folder: Path, tmp_path: Path) -> None:
    paths = {"data.path": folder / "train", "validation_data.path": folder / "heldout", "output_dir": tmp_path / "run"}
    images = {"max_train_images": 1280, "validate_every_images": 1280, "log_every_images": 640, "validation_images": 64}
    flags = [word for name, value in (paths | images).items() for word in (f"--{name}", str(value))]
    done = fork(training_program.main, [str(ROOT / "configs" / "textbook_vae.yaml"), *flags]).wait()
    assert done.returncode == 0, done.stderr
    first, last, validation = metrics(tmp_path / "run")
    assert first["elbo/nats_per_image"] < last["elbo/nats_per_image"] < 0
    expected = -(64 * last["loss/gaussian_nll"] + last["kl_nats_per_image"])
    assert last["elbo/nats_per_image"] == pytest.approx(expected, rel=1e-4)
    for line, prefix in ((last, "elbo/"), (validation, "validation/elbo_")):
        nats, bits = line[f"{prefix}nats_per_image"], line[f"{prefix}bits_per_dimension"]
        assert bits == pytest.approx(-nats / 64 / math.log(2), rel=1e-4) and 0 < bits < 8
