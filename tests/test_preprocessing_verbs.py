"""Every verb feeds a network the pixels that its training fed it, without a word on the command line.

What an encoder is given is watched in a training, and in each verb on the same images.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from cli_call import call, program
from diffusers.models.autoencoders.vae import Encoder
from PIL import Image
from tiny_networks import SHAPE

from eval import diffusability, latent_space, reconstruction, scramble
from ldm_vae.core.config import load
from ldm_vae.data.transforms import to_uint8
from ldm_vae.export.drift_report import measure_drift
from ldm_vae.training.config import Training
from train import autoencoder as training_program

SIDE = 16
COUNT = 4

# what a config says of its images: none of it is the default
CASES: dict[str, dict[str, Any]] = {
    "range": {"data": {"channels": 1, "value_range": [0, 4095]}, "model": {"in_channels": 1}},
    "background": {"data": {"background": [10, 200, 30]}},
    "resize": {"transform": {"resize": "none"}},
    "alpha": {"data": {"channels": 4, "alpha": True}, "model": {"in_channels": 4}},
}


@contextmanager
def watched() -> Iterator[set[bytes]]:
    """The images that any encoder of diffusers is given meanwhile, as uint8 [C, H, W] in bytes."""
    seen: set[bytes] = set()
    forward = Encoder.forward

    def spy(self: Any, sample: torch.Tensor) -> torch.Tensor:
        if sample.device.type != "meta":  # where sizes are measured
            seen.update(image.contiguous().numpy().tobytes() for image in to_uint8(sample.detach()))
        return forward(self, sample)

    Encoder.forward = spy
    try:
        yield seen
    finally:
        Encoder.forward = forward


def pictures(folder: Path, case: str) -> Path:
    """Square where they are resized (training cuts before it resizes, encoding after), larger than a crop."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(COUNT):
        if case == "range":
            coarse = Image.fromarray(draw.integers(0, 255, (4, 4), dtype=np.uint8)).resize((24, 24))
            picture = Image.fromarray(np.asarray(coarse).astype(np.uint16) * 16)
        elif case in ("background", "alpha"):
            picture = Image.fromarray(draw.integers(0, 256, (24, 24, 4), dtype=np.uint8), "RGBA")
        else:
            picture = Image.fromarray(draw.integers(0, 256, (24, 31, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.png")
    return folder


class Trained:
    """A run, its images, and the pixels that it was trained on."""

    def __init__(self, folder: Path, case: str) -> None:
        self.data, self.run, self.case = pictures(folder / "images", case), folder / "run", case
        changes = CASES[case]
        data = {"kind": "folder", "path": str(self.data)} | changes.get("data", {})
        settings = {
            "output_dir": str(self.run), "resolution": SIDE, "train_batch_size": COUNT, "max_train_images": 2 * COUNT,
            "log_every_images": COUNT, "dataloader_num_workers": 0, "losses": {"l1": {"weight": 1.0}},
            "model": SHAPE | changes.get("model", {}), "data": data, "validation_data": data,
            "transform": {"crop": "centre", "flip": False} | changes.get("transform", {}),
            "validate_every_images": COUNT, "validation_metrics": ["psnr"], "best_metric": "psnr",
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with watched() as self.pixels:
                training_program.train(load(Training, folder / "config.yaml"))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.vae = self.run / "vae"


@pytest.fixture(scope="module", params=list(CASES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp(request.param), request.param)


def encode(trained: Trained, store: Path, *more: object) -> None:
    call("encode", trained.vae, trained.data, store, "--resolution", SIDE, "--num_workers", 0, *more)


def again(trained: Trained, store: Path, *words: object, damage: bool = False) -> set[bytes]:
    """Encode a store, and what is looked at afterwards by another verb."""
    encode(trained, store)
    if damage:
        (store / "shards" / "00000000.safetensors").unlink()
    with watched() as seen:
        call("store", *words, store)
    return set(seen)


def evaluate(t: Trained, out: Path) -> None:
    program(
        reconstruction, t.vae, t.data, "--output", out, "--resolution", SIDE, "--metrics", "psnr", "--num_workers", 0
    )


def explore(t: Trained, out: Path) -> None:
    program(
        latent_space, t.run, t.data, "--output", out, "--resolution", SIDE, "--num_workers", 0, "--components", 0,
        "--pairs", 0, "--likelihood_images", 0,
    )  # fmt: skip


def probe(t: Trained, out: Path) -> None:
    with mock.patch.object(diffusability, "match", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        program(diffusability, t.vae, t.data, "--output", out, "--resolution", SIDE)  # as far as its stores


def export(t: Trained, out: Path) -> None:
    def psnr_only(*arguments: Any, **options: Any) -> Any:  # LPIPS needs larger images
        return measure_drift(*arguments, **options | {"lpips": False})

    with mock.patch("ldm_vae.export.workflow.measure_drift", psnr_only):
        call("export", t.run, out, "--stats", t.data, "--drift_from", t.vae, "--preview")


def reconstruct(t: Trained, out: Path) -> None:
    call("reconstruct", t.vae, *sorted(t.data.iterdir()), out, "--resolution", SIDE)


VERBS: dict[str, Callable[[Trained, Path], None]] = {
    "encode": encode,
    "evaluate": evaluate,
    "reconstruct": reconstruct,
    "export": export,
    "drift": lambda t, out: call("drift", t.vae, t.run, t.data, "--no_lpips"),
    "fp16": lambda t, out: call("fp16", "audit", t.vae, t.data),
    "latent_space": explore,
    "probe": probe,
    "scramble": lambda t, out: program(scramble, t.vae, t.data, out, "--resolution", SIDE),
}


@pytest.mark.slow
def test_training_validation_and_normalisation_see_the_same_pixels(trained: Trained) -> None:
    assert len(trained.pixels) == COUNT
    record = json.loads((trained.vae / "preprocessing.json").read_text())
    assert record["signal"] == "image" and record["input_range"] == [-1, 1] and record["version"] == 1
    expected = CASES[trained.case]
    for section in ("data", "transform"):
        for name, value in expected.get(section, {}).items():
            assert record[name] == ("straight" if name == "alpha" else value)


@pytest.mark.slow
@pytest.mark.parametrize("verb", list(VERBS))
def test_a_verb_feeds_what_training_fed(trained: Trained, verb: str, tmp_path: Path) -> None:
    with watched() as seen:
        VERBS[verb](trained, tmp_path / "out")
    assert trained.pixels <= seen


@pytest.mark.parametrize(("words", "damage"), [(("verify", "--reencode", COUNT), False), (("repair",), True)])
def test_a_store_is_made_again_from_the_same_pixels(
    trained: Trained, tmp_path: Path, words: tuple[object, ...], damage: bool
) -> None:
    assert trained.pixels <= again(trained, tmp_path / "store", *words, damage=damage)
