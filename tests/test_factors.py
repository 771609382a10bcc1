"""Images of known probability: what is written is what is said, and draws have that distribution."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from sentences import refused
from torchvision.transforms.functional import pil_to_tensor

from ldm_vae.core.errors import UsageError
from ldm_vae.demo import factors


def test_all_images_differ_and_their_probabilities_are_products() -> None:
    images, values, p = factors.images(), factors.values(), factors.probabilities()
    assert images.shape == (1152, 3, 16, 16) and len(images.flatten(1).unique(dim=0)) == len(values) == 1152
    assert images.unique().tolist() == [0, 255]
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    for own in factors.FACTORS.values():
        assert sum(own) == pytest.approx(1, abs=1e-12) and len(set(own)) > 1
    number = 1000
    expected = math.prod(own[at] for own, at in zip(factors.FACTORS.values(), values[number].tolist(), strict=True))
    assert float(p[number]) == pytest.approx(expected, rel=1e-12)
    assert factors.entropy_bits() == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-9)
    # each factor changes the picture alone: its column is what the picture shows
    for number in (0, 611, 1151):
        _, colour, scale, x, y = values[number].tolist()
        lit = images[number].amax(dim=0) > 0
        left, top = (int(lit.any(dim=axis).nonzero()[0]) for axis in (0, 1))
        assert (left, top) == (2 * x + scale, 2 * y + scale)
        assert images[number][:, lit].amax(dim=1).tolist() == list(factors.COLOURS[colour])
        assert int(lit.any(dim=0).sum()) == factors.SIDES[scale]


def test_draws_have_the_distribution_and_do_not_depend_on_their_number() -> None:
    drawn, p = factors.draws("train", 4096), factors.probabilities()
    assert torch.equal(drawn[:10], factors.draws("train", 10))
    assert not torch.equal(drawn[:1024], factors.draws("heldout", 1024))
    seen = torch.bincount(drawn, minlength=len(p)).double()
    for column, own in zip(factors.values().T, factors.FACTORS.values(), strict=True):
        expected = 4096 * torch.tensor(own).double()
        counts = torch.zeros_like(expected).index_add_(0, column, seen)
        chi_squared = float(((counts - expected).square() / expected).sum())
        assert chi_squared < len(own) - 1 + 4 * math.sqrt(2 * (len(own) - 1))


def test_the_folder_holds_the_table_and_the_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "PARTS", {"train": 6, "heldout": 3})
    assert "6 images to train on, 3 held out, of 1,152" in factors.prepare_factors(tmp_path / "out")
    with (tmp_path / "out" / "factors.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["probability"]) for row in table] == factors.probabilities().tolist()
    assert [[int(row[name]) for name in factors.FACTORS] for row in table] == factors.values().tolist()
    for part, count in factors.PARTS.items():
        rows = [json.loads(line) for line in (tmp_path / "out" / part / "metadata.jsonl").read_text().splitlines()]
        assert [row["number"] for row in rows] == factors.draws(part, count).tolist()
        for row in rows:
            written = pil_to_tensor(Image.open(tmp_path / "out" / part / row["file_name"]))
            assert torch.equal(written, factors.images()[row["number"]])
            assert [row[name] for name in factors.FACTORS] == factors.values()[row["number"]].tolist()
    factors.prepare_factors(tmp_path / "out")  # again over its own
    (tmp_path / "mine.txt").write_text("not to be lost")
    with refused(UsageError, "OUT"):
        factors.prepare_factors(tmp_path)
