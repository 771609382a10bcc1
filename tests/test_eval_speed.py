"""eval.speed: the timing is fair, the ratios say what they mean, speed.json has the shape others read."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fork_server import SERVER
from images import write_images
from PIL import Image
from sentences import refused

from eval.speed import __main__ as speed
from eval.speed import (
    checkpointing,
    codec,
    data,
    encode,
    gpu,
    grow,
    networks,
    plot,
    quality,
    read_remote,
    start,
    store,
    timing,
    variants,
    video,
)
from eval.speed.networks import NETWORKS
from eval.speed.recipes import Workload
from eval.speed.synthetic_store import write_empty, write_sparse, write_synthetic
from ldm_vae import LatentDataset
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.decoding import Decoding

OTHER_READERS = ("webdataset", "streaming")
SMALL_WORK = Workload(widths=(8, 16), resolution=32, net="alex", critic_width=8, groups=4)


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    times = timing.interleave(
        {name: lambda name=name: order.append(name) for name in "AB"}, rounds=2, clock=lambda: float(next(ticks))
    )
    assert order == ["A", "B", "A", "B", "A", "B"]
    assert times == {"A": [1.0, 1.0], "B": [1.0, 1.0]}


def test_a_ratio_above_one_means_faster() -> None:
    times = {"fast": [1.0, 2.0, 1.0], "slow": [2.0, 5.0, 3.0]}
    assert timing.row("fast", times, "fast", "slow", images_per_s=4.0) == {
        "name": "fast",
        "median_s": 1.0,
        "ratio": {"to": "slow", "median": 2.5, "min": 2.0, "max": 3.0},
        "images_per_s": 4.0,
    }
    assert "ratio" not in timing.row("slow", times, "slow", None)


def test_speed_data_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "SIZES", {"": (96, 64)})
    monkeypatch.setattr(data, "BATCH", 2)
    monkeypatch.setattr(data, "RESOLUTION", 16)
    monkeypatch.setattr(sys, "argv", ["eval.speed", "data", "--output", str(tmp_path / "out"), "--rounds", "2"])
    speed.main()
    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert found["machine"]["cores"] >= 1 and found["machine"]["torch"]
    rows = {result["name"]: result for result in found["results"]}
    assert rows.keys() == {"plain_pipeline", "data", "data_jpeg_draft", "bare_decode"}
    assert rows["data"]["ratio"]["to"] == "plain_pipeline"
    assert rows["data"]["ratio"]["min"] <= rows["data"]["ratio"]["median"] <= rows["data"]["ratio"]["max"]
    assert rows["data"]["images_per_s"] > 0
    assert "x plain_pipeline" in capsys.readouterr().out
    assert picture_size(tmp_path / "out" / "speed.png")[0] == 900


def test_speed_video_decodes_the_same_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"VIDEOS": 2, "LENGTH": 20, "FRAMES": 5, "SIZE": (96, 64), "RESOLUTION": 16, "DECODING": Decoding(frames=5)}
    for name, value in small.items():
        monkeypatch.setattr(video, name, value)
    monkeypatch.setattr(sys, "argv", ["eval.speed", "video", "--output", str(tmp_path / "out"), "--rounds", "1"])
    speed.main()
    found = json.loads((tmp_path / "out" / "speed.json").read_text())["results"]
    rows = {result["name"]: result.get("ratio", {}).get("to") for result in found}
    assert rows == {"plain_video_loop": None, "video": "plain_video_loop", "bare_av": None, "clip_decode": "bare_av"}
    assert all(result["frames_per_s"] > 0 for result in found) and "frames/s" in capsys.readouterr().out


def test_speed_codec_compares_with_the_time_that_a_sound_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["eval.speed", "codec", "--output", str(tmp_path / "out"), "--rounds", "1"])
    threads = torch.get_num_threads()
    speed.main()
    assert torch.get_num_threads() == threads
    found = {row["name"]: row for row in json.loads((tmp_path / "out" / "speed.json").read_text())["results"]}
    assert [*found] == ["codec_whole", "codec_4_hops", "codec_hop"]
    for row in found.values():
        assert row["ratio"]["to"] == "real_time" and row["ratio"]["median"] == pytest.approx(1 / row["median_s"])
        assert (
            row["parameters"] == 1_648_129 and row["codebooks"] == 8 and row["latency_s"] == pytest.approx(320 / 24_000)
        )


def test_rounds_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.speed", "data", "--output", str(tmp_path), "--rounds", "0"])
    with refused(UsageError, "rounds") as error:
        speed.main()
    assert "at least 1, got 0" in str(error.value)


# --- encode -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_speed_encode_writes_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "RESOLUTION", 32)
    monkeypatch.setattr(encode, "WAITING_IMAGES", 64)
    for name, value in {"BATCH": 4, "PHOTOGRAPHS": 8, "SCRIPT_IMAGES": 8, "SIZE": (96, 64)}.items():
        monkeypatch.setattr(encode, name, value)
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, perf_counter=time.perf_counter)
    monkeypatch.setattr(encode, "time", clock)
    monkeypatch.setattr(sys, "argv", ["eval.speed", "encode", "--output", str(tmp_path / "out"), "--rounds", "1"])
    speed.main()
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["results"]
    named = [(row["name"], row.get("ratio", {}).get("to")) for row in rows]
    assert named == [
        ("bare_encoder", None),
        ("encode", "bare_encoder"),
        ("bare_encoder_dc", None),
        ("encode_dc", "bare_encoder_dc"),
        ("bare_encoder_flux2", None),
        ("encode_flux2", "bare_encoder_flux2"),
        ("bare_encoder_wan", None),
        ("encode_wan", "bare_encoder_wan"),
        ("waiting_encoder", None),
        ("usual_script", None),
        ("sd_scripts", None),
        ("simpletuner", None),
        ("encode_waiting", "waiting_encoder"),
        ("encode_waiting", "usual_script"),
        ("encode_waiting", "sd_scripts"),
        ("encode_waiting", "simpletuner"),
    ]
    assert all(row["images_per_s"] > 0 for row in rows)
    # two rounds of 64 images and four times 8: a script waits as long for the encoder as one that only waits, and the
    # usual one image by image
    each = min(filter(None, waits))
    assert sum(waits) == pytest.approx(2 * (64 + 4 * 8) * each) and waits.count(each) == 2 * 8


# --- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The networks with fewer blocks: what is counted takes its time by the operation."""
    fewer = {"encoder_layers_per_block": (2, 2, 2, 1, 1, 1), "decoder_layers_per_block": (2, 2, 2, 1, 1, 1)}
    changes = {"dc": fewer, "flux2": {}, "wan": {"num_res_blocks": 1}, "qwenimage": {"num_res_blocks": 1}}
    found = {name: (kind, shape | changes[name]) for name, (kind, shape) in NETWORKS.items()}
    monkeypatch.setattr(networks, "NETWORKS", found)
    return found


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("name", "frames"), [*((name, None) for name in NETWORKS), ("wan", 5)])
def test_checkpointing_holds_at_most_six_tenths_of_the_plain_memory(name: str, frames: int | None) -> None:
    # of clips 0.42 to 0.48: a checkpoint's frames are in cycles, which live until Python collects them
    assert checkpointing.count(name, True, frames) <= 0.6 * checkpointing.count(name, False, frames)


@pytest.mark.slow
def test_speed_checkpointing_measures_processes(shallow: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "NETWORKS", {"dc": shallow["dc"]})
    monkeypatch.setattr(checkpointing, "multiprocessing", SERVER)
    rows = checkpointing.run(argparse.Namespace())
    assert [row["name"] for row in rows] == ["checkpointing_dc", "checkpointing_counted_dc"]
    assert all(0.2 < row["ratio"]["median"] < 0.8 and 50 < row["of"] < 5000 for row in rows)
    assert rows[0]["of"] > rows[1]["of"] * 0.9  # a process holds more than its tensors


# --- read -------------------------------------------------------------------------------------------------------------


def test_reading_from_a_server_gives_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SAMPLES": 44, "SHARD": 8, "BATCH": 4, "WINDOW": 2, "SHAPE": (2, 2, 2)}.items():
        monkeypatch.setattr(read_remote, name, value)
    monkeypatch.setattr(read_remote, "WORKERS", (0,))
    has = read_remote._has
    monkeypatch.setattr(read_remote, "_has", lambda name: has("no_reader" if name in OTHER_READERS else name))
    monkeypatch.setattr(sys, "argv", ["eval.speed", "read", "--remote", "--output", str(tmp_path), "--rounds", "1"])
    speed.main()
    rows = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert [row["name"] for row in rows] == ["read_remote", "read_remote_warm"]
    assert capsys.readouterr().err.count("without no_reader (No module named 'no_reader'); all: pip install moto") == 2
    with pytest.raises(AssertionError, match="expected 44 latents, got 43"):
        read_remote._once(lambda: 43, 44)()
    monkeypatch.setattr(read_remote, "_has", lambda name: name != "s3fs")
    for what in ("read", "data"):  # what is missing, and another benchmark
        monkeypatch.setattr(sys, "argv", ["eval.speed", what, "--remote", "--output", str(tmp_path)])
        with refused(UsageError, "--remote"):
            speed.main()


def test_a_synthetic_store_is_a_store(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "store", 70, shape=(4, 8, 8), unit=32)
    data = LatentDataset(tmp_path / "store", raw="mean", columns=("key",))
    batch = data.__getitems__([69, -1, 0, 33])
    assert batch[0]["mean"].dtype == torch.float16 and torch.equal(batch[0]["mean"], batch[1]["mean"])
    assert [item["key"] for item in batch] == ["0000000069", "0000000069", "0000000000", "0000000033"]
    assert torch.equal(LatentDataset(tmp_path / "store", raw=True)[33]["mean"], batch[3]["mean"].float())
    assert "logvar" not in batch[0]
    with pytest.raises(IndexError, match="index 70 of a store of 70"):
        data.__getitems__([0, 70])
    with refused(UsageError, "raw") as error:
        LatentDataset(tmp_path / "store", raw="sample")
    assert "no 'sample'" in str(error.value)


def test_a_sparse_store_is_a_store_of_zeros(tmp_path: Path) -> None:
    write_sparse(tmp_path / "store", 70, shape=(4, 8, 8), unit=32)
    batch = LatentDataset(tmp_path / "store", raw="mean", columns=()).__getitems__(range(70))
    assert len(batch) == 70 and not any(item["mean"].any() for item in batch)
    files = sorted((tmp_path / "store" / "shards").glob("*.safetensors"))
    assert [file.stat().st_size - files[2].stat().st_size for file in files] == [2 * 26 * 512, 2 * 26 * 512, 0]
    assert files[1].stat().st_blocks * 512 < files[1].stat().st_size  # the second is a copy of the first's head


# --- quality ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_equal_minutes_from_equal_weights_on_equal_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: dict[str, list[Any]] = {}  # by start: the first batch and the weights before it
    latents = quality.latents

    def photographs(demo: Path) -> None:
        write_images(demo / "train" / "one", 6, (40, 40))
        write_images(demo / "photographs" / "heldout", 2, (56, 48))

    monkeypatch.setattr(quality, "prepare_demo", photographs)

    class Spy(quality.Contender):
        def __init__(self, name: str, *given: Any) -> None:
            super().__init__(name, *given)
            start = name.removeprefix("train_step").rpartition("_")[2]
            step, weights = self.step, [p.detach().clone() for p in self.vae.parameters()]

            def watched(images: torch.Tensor) -> object:
                if not self.images:
                    first.setdefault(start if start in ("zero", "linear") else "noise", []).append((images, weights))
                return step(images)

            self.step = watched

    monkeypatch.setattr(quality, "Contender", Spy)
    # a photograph is measured as it is, its crops are what is trained on
    sizes = []

    def encode(vae: Any, images: torch.Tensor, real: Any = latents.encode) -> Any:
        if images.device.type != "meta":
            sizes.append(images.shape[2:])
        return real(vae, images)

    monkeypatch.setattr(latents, "encode", encode)
    tiny = Workload(
        widths=(16, 16),
        groups=1,
        latent_channels=4,
        resolution=32,
        batch=2,
        net="alex",
        critic_width=4,
        critic_layers=1,
    )
    for name, value in {"WORKS": {"f2": tiny}, "TURNS": 2, "LAST": 1, "FITTED": 4}.items():
        monkeypatch.setattr(quality, name, value)
    # the linear starts take their fit out of these 0.72 s: of 0.36 on a slow machine one had nothing left
    options = argparse.Namespace(minutes=12e-3, seeds=1, output=tmp_path)
    rows = quality.run(options)
    assert {start: len(seen) for start, seen in first.items()} == {"noise": 5, "zero": 1, "linear": 6}
    for seen in first.values():
        for images, weights in seen:
            assert torch.equal(images, first["noise"][0][0]) and all(map(torch.equal, weights, seen[0][1]))
    assert set(sizes) == {(32, 32), (56, 48)}
    named = {row["name"]: row for row in rows if "curve" in row}
    assert named.keys() == {f"quality_f2_{name}" for name in quality.CONTENDERS}
    for row in named.values():
        start, halfway, end = row["curve"]
        assert start["images"] == 0 and halfway["minutes"] >= 1e-3 and end["images"] >= halfway["images"]
        assert row["value"] == end["lpips_alex"] > 0 and row["psnr"] == end["psnr"] > 0 and end["delta_e"] > 0
        reached = [point["minutes"] for point in row["curve"] if point["lpips_alex"] <= quality.REACHED]
        assert row["minutes"] == (reached[0] if reached else None)
    starts = {name: row["curve"][0]["psnr"] for name, row in named.items()}
    assert starts["quality_f2_train_step_linear"] > starts["quality_f2_train_step"] + 5
    ratios = {row["ratio"]["to"]: row["ratio"]["median"] for row in rows if row["name"] == "quality_f2_images"}
    images = {name: row["images"] for name, row in named.items()}
    assert ratios["latent_diffusion"] == images["quality_f2_train_step"] / images["quality_f2_latent_diffusion"]
    plot.draw(rows, tmp_path / "speed.png")
    assert picture_size(tmp_path / "speed.png")[0] == 900
    monkeypatch.delattr(quality, "Contender")  # a second launch finds the curves and trains nothing
    assert quality.run(options) == rows


# --- what grows, and what one waits for -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grow, "multiprocessing", SERVER)
    tiny = Workload(widths=(8, 8), resolution=32, batch=1, net="alex", critic_width=8, groups=4)
    (row,) = grow._steps("processes", {2: (tiny, 2)}, 1)
    assert (row["name"], row["against"], row["at"]) == ("grow_processes", "processes", 2)
    assert row["images_per_s"] == pytest.approx(2 / row["median_s"]) and row["memory_mb"] > 10


def test_a_store_grows_and_its_books_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"STEPS": 2, "LARGEST_RESIDENT": 50, "MANIFESTS": (), "IMAGES": (4,), "FILES": 3, "STORES": (50, 90)}
    for name, value in {**values, "UNIT": 20}.items():
        monkeypatch.setattr(store, name, value)
    rows = store.run(argparse.Namespace(rounds=1))
    assert [(row["name"], row["at"], row.get("ratio", {}).get("to")) for row in rows] == [
        ("index_select", 50, None),
        ("read", 50, "index_select 50"),
        ("read", 90, None),
        ("write", 4, None),
        ("stat", 3, None),
        ("check", 3, "stat"),
        *((name, at, None) for at in (50, 90) for name in ("keys", "again", "finish")),
    ]
    assert all(row["median_s"] > 0 for row in rows)
    plot.draw(rows, tmp_path / "speed.png")
    assert picture_size(tmp_path / "speed.png") == (900, 2 * 340 + 112)  # against samples, against images; one bar


def test_nothing_is_held_per_sample(tmp_path: Path) -> None:
    write_empty(tmp_path / "large", 10_000_000)
    found = store.open_store(tmp_path / "large")
    assert found["open"][1] < 300e6 and found["manifest_write"][0] > 0
    data = LatentDataset(tmp_path / "large")
    assert sum(value.nbytes for value in (data._stops, data._starts)) == 2 * 8 * len(data.shards)
    assert data.shape(9_999_999) == (4, 32, 32) and not len(data._maps)


@pytest.mark.slow
def test_a_process_that_dies_is_said_to_have_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grow, "multiprocessing", SERVER)
    with grow.Group(Workload(net="none"), 1) as group, refused(WorkError, "grow"):
        group.step()


@pytest.mark.slow
def test_the_first_step_is_waited_for_and_a_run_that_takes_none_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "demo" / "train", 4)
    with monkeypatch.context() as patch:
        # such a run ends before it imports torch, and says which configs there are
        patch.setattr(start, "find_config", lambda name: tmp_path / "none.yaml")
        with pytest.raises(WorkError, match=r"smoke run took no step: .* prior/demo"):
            start.first_step(tmp_path / "demo", tmp_path)
    write_images(tmp_path / "demo" / "heldout", 4)
    start.first_step(tmp_path / "demo", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]  # the run is gone with its folder


# --- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_variant_trains_and_costs_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "WORK", replace(SMALL_WORK, layers=1, attention=False, resolution=64))
    rows = {row["name"]: row for row in variants.run(argparse.Namespace(rounds=1))}
    assert rows["adam_fused"]["ratio"]["to"] == "step" and "ratio" not in rows["step"]
    gflop = {name: row["gflop"] for name, row in rows.items()}
    changed = {"lpips_half", "lpips_crop"}
    assert all((gflop[name] < gflop["step"]) == (name in changed) for name in gflop)
    assert all(gflop[name] == gflop["step"] for name in gflop.keys() - changed)


def test_without_a_gpu_its_benchmarks_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for run in (gpu.training, gpu.compiled, gpu.encoding):
        with refused(UsageError, "gpu"):
            run(argparse.Namespace(rounds=1))
