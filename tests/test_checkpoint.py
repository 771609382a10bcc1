"""Checkpoints: exact round trip without pickle, atomic, checked; the ranks' comparison is in test_launch.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm_vae.core.errors import WorkError
from ldm_vae.run import checkpoint


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(steps):
        network(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer


def save(folder: Path, images: int, steps: int = 3) -> Path:
    network, optimizer = trained(steps)
    return checkpoint.save(
        folder, images, {"network": network, "optimizer": optimizer}, "a: 1\n", {"images_seen": images}
    )


def test_state_survives_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path.name == "images-000000012"
    assert sorted(file.name for file in path.iterdir()) == [
        "checksums.json", "config.yaml", "state.json", "tensors.safetensors",
    ]  # fmt: skip
    network, optimizer = trained(0)
    info = checkpoint.load(path, {"network": network, "optimizer": optimizer})
    assert info == {"images_seen": 12}
    expected, expected_optimizer = trained()
    for name, value in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    ours, theirs = optimizer.state_dict(), expected_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():  # integer keys survive JSON
        for key, value in state.items():
            assert torch.equal(ours["state"][index][key], value), (index, key)


def test_a_tree_of_everything_round_trips() -> None:
    tree = {"a": [1, 2.5, None, True, "x"], 3: (torch.arange(3), {"t": torch.zeros(())}), "empty": {}}
    tensors: dict[str, torch.Tensor] = {}
    back = checkpoint.unpack(json.loads(json.dumps(checkpoint.pack(tree, tensors))), tensors)
    assert back["a"] == tree["a"] and back["empty"] == {}
    assert isinstance(back[3], tuple) and torch.equal(back[3][0], torch.arange(3))


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state \.a: object cannot be saved without pickle"):
        checkpoint.pack({"a": object()}, {})


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no checksums"])
def test_a_damaged_newest_is_passed_over_aloud(tmp_path: Path, damage: str) -> None:
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    tensors = bad / "tensors.safetensors"
    content = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(content[:-7])
    elif damage == "flip":
        tensors.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "delete":
        tensors.unlink()
    else:
        (bad / "checksums.json").unlink()
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == good
    assert len(said) == 1 and bad.name in said[0] and "damaged" in said[0]


def test_what_describes_the_network_is_checked_too(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 10, {}, "", {"images_seen": 10}, {"config.json": b"{}"})
    assert checkpoint.damage_of(path) is None
    (path / "config.json").write_bytes(b"{ }")
    assert "config.json" in str(checkpoint.damage_of(path))
    (path / "checksums.json").write_text("[[]]")
    assert checkpoint.damage_of(path) is not None


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    for images in (10, 20, 30, 40):
        save(tmp_path, images)
    (tmp_path / ".images-000000050.123.tmp").mkdir()  # what a killed process left
    checkpoint.prune(tmp_path, 2, best="images-000000010")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "images-000000010", "images-000000030", "images-000000040",
    ]  # fmt: skip


def test_a_copy_put_aside_is_no_checkpoint(tmp_path: Path) -> None:
    good = save(tmp_path, 10)
    for name in ("images-000000010-before", "images-x"):
        shutil.copytree(good, tmp_path / name)
    assert checkpoint.newest(tmp_path) == good
    checkpoint.prune(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images-000000010-before", "images-x"]


def test_a_failed_save_keeps_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = save(tmp_path, 10)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(WorkError, match="images-000000020") as error:  # and the system's words, so not golden
        save(tmp_path, 20)
    assert good.name in str(error.value)
    assert checkpoint.newest(tmp_path) == good
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
