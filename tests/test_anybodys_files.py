"""Files whose bytes are whole and whose types or values are not what they were written with, each under a checksum that
says it is sound: stores, tables, run folders, checkpoints, pages. They are read, or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_call import run_cli
from images import write_images
from PIL import Image
from safetensors.torch import save_file
from store_sources import Pictures
from stores import SETTINGS

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.source import Record, open_source
from ldm_vae.export.store_push import plan_push
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.convert.conversion import convert_from, convert_to
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.maintain.merge_split import merge, split
from ldm_vae.report import build_report
from ldm_vae.run import checkpoint
from ldm_vae.run.log_file import read_log

Table = Callable[[pa.Table], pa.Table]


def tiny(**shape: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **shape).build().eval()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "store"
    write_store(tiny(), Pictures(), path, **SETTINGS)
    return path


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "store"))


def seal(store: Path) -> None:
    """Checksums of the files as they are now."""
    tree = json.loads((store / "manifest.json").read_text())
    for shard in tree["shards"]:
        for extension, record in shard["files"].items():
            data = (store / "shards" / f"{shard['name']}.{extension}").read_bytes()
            record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (store / "manifest.json").write_text(json.dumps(tree))


def change_tables(store: Path, change: Table) -> None:
    for path in (store / "shards").glob("*.parquet"):
        table = change(pq.read_table(path))
        pq.write_table(table, path)
        with pa.ipc.new_file(str(path.with_suffix(".arrow")), table.schema) as file:
            file.write_table(table.combine_chunks())
    seal(store)


def refuses(store: Path, tmp_path: Path) -> None:
    """Reading, verifying and whatever copies rows: one sentence each."""
    assert len(verify(store)) == len(read_manifest(store).shards)
    for use in (
        lambda: LatentDataset(store)[0],
        lambda: merge([store], tmp_path / "merged"),
        lambda: split(store, tmp_path / "parts", 2),
        lambda: convert_to(store, tmp_path / "converted", "parquet"),
        lambda: plan_push(store, "somebody/latents"),
    ):
        with pytest.raises(WorkError, match="cannot be read") as error:
            use()
        assert "\n" not in str(error.value)
    assert run_cli("store", "repair", store) == 1  # nothing that it could do, and not sound


# --- stores -----------------------------------------------------------------------------------------------------------


def test_bits_of_another_type_are_not_read(store: Path, tmp_path: Path) -> None:
    """bfloat16 under a manifest of float16: the same 16 bits, numbers up to 15,100."""
    for path in (store / "shards").glob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].replace(b'"F16"', b'"BF16"')[:length]
        path.write_bytes(raw[:8] + header + raw[8 + length :])
    seal(store)
    refuses(store, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["statistics"].update(mean=[float("nan")] * 4),
        lambda tree: tree["statistics"].update(variance=[1.0] * 3),
        lambda tree: tree["statistics"].update(latents_std=["1", 1, 1, 1]),
        lambda tree: tree["statistics"].update(images=7),
        lambda tree: tree.update(statistics=None),
        lambda tree: tree.update(samples=20),
        lambda tree: tree["shards"].append(tree["shards"][0]),
        lambda tree: tree["identity"].update(views=["flip"]),
        lambda tree: tree["identity"].update(codes=8),
        lambda tree: tree["recorded"].update(normalisation={"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}),
    ],
)  # fmt: skip
def test_a_manifest_whose_parts_do_not_agree(store: Path, change: Callable[[Any], object]) -> None:
    tree = json.loads((store / "manifest.json").read_text())
    change(tree)
    (store / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(WorkError, match=r"manifest\.json"):
        read_manifest(store)


def bad_text(rows: int) -> pa.Array:
    offsets = np.arange(rows + 1, dtype=np.int32)
    return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"\xff" * rows))


TIMES = {
    "no date": lambda rows: pa.array([2**62] * rows).view(pa.timestamp("us")),
    "no zone": lambda rows: pa.array([1] * rows).view(pa.timestamp("us", "No/Where")),
}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("key", lambda rows: pa.array(range(rows))),
        ("key", lambda rows: pa.array([None] * rows, pa.string())),
        ("key", bad_text),
        ("caption", bad_text),
        ("image_sha256", lambda rows: pa.array(["../x"] * rows)),
        ("resolution", lambda rows: pa.array(["16"] * rows)),
        ("original_size", lambda rows: pa.array(["24x20"] * rows)),
        ("when", TIMES["no date"]),
        ("when", TIMES["no zone"]),
        ("id", lambda rows: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * rows, pa.binary(16)))),
    ],
)  # fmt: skip
def test_a_column_that_a_store_does_not_write(
    name: str, values: Callable[[int], pa.Array], store: Path, tmp_path: Path
) -> None:
    def change(table: pa.Table) -> pa.Table:
        others = [other for other in table.column_names if other != name]
        return table.select(others).append_column(name, values(len(table)))

    change_tables(store, change)
    refuses(store, tmp_path)


@dataclass
class Scored(Pictures):
    """Pictures with a score that is NaN of some, and lists that hold it."""

    columns: tuple[str, ...] = ("score", "scores")

    def __getitem__(self, index: int) -> Record:
        score = float("nan") if index % 3 else float(index)
        return Record(self.key(index), self.pixels(index), {"score": score, "scores": [score, float("inf")]})


def test_nan_is_a_value_of_its_column(tmp_path: Path) -> None:
    write_store(tiny(), Scored(), tmp_path / "store", **SETTINGS)
    assert verify(tmp_path / "store") == []
    write_store(tiny(), Scored(), tmp_path / "store", **SETTINGS)  # not another column than it was
    merge([tmp_path / "store", tmp_path / "store"], tmp_path / "merged")
    assert np.isnan(LatentDataset(tmp_path / "merged").column("score")).sum() == 14


@pytest.mark.parametrize("content", [b"[]\n", b'{"index": "x"}\n', b"\xff\n", b"\n\n", b"[" * 10_000])
def test_a_quarantine_that_is_none(content: bytes, store: Path) -> None:
    (store / "quarantine.jsonl").write_bytes(content)
    with pytest.raises(WorkError, match=r"quarantine\.jsonl"):
        read_quarantine(store)


def test_latents_that_do_not_vary_make_a_store(tmp_path: Path) -> None:
    """An image of one colour, or an encoder that has collapsed: the store is finished, and says that nothing scales
    it."""
    vae = tiny()
    with torch.no_grad():
        for parameter in [*vae.encoder.parameters(), *vae.quant_conv.parameters()]:
            parameter.zero_()
        vae.quant_conv.bias[4:] = -40.0
    vae.save_pretrained(tmp_path / "vae")
    manifest = write_store(vae, Pictures(), tmp_path / "store", **SETTINGS)
    assert manifest.complete and (manifest.statistics or {})["scaling_factor"] is None
    assert run_cli("store", "stats", tmp_path / "store") == run_cli("store", "verify", tmp_path / "store") == 0
    assert torch.isfinite(LatentDataset(tmp_path / "store")[0]["latents"]).all()
    with pytest.raises(WorkError, match="normalisation channel"):
        LatentDataset(tmp_path / "store", normalisation="channel")
    assert run_cli("export", tmp_path / "vae", tmp_path / "out", "--stats", tmp_path / "store") == 1


@pytest.mark.parametrize("shape", [(2, 4, 0, 8), (2, 4, 8), (2, 4, 1, 2, 8, 8)])
def test_foreign_arrays_that_are_no_latents(shape: tuple[int, ...], tmp_path: Path) -> None:
    if len(shape) == 4:
        save_file({"latents": torch.zeros(shape)}, tmp_path / "a.safetensors")
    else:
        pq.write_table(pa.table({"latents": pa.array(np.zeros(shape, np.float32).tolist())}), tmp_path / "a.parquet")
    name = "lightningdit" if len(shape) == 4 else "parquet"
    with pytest.raises(WorkError, match="shape"):
        convert_from(tmp_path, tmp_path / "out", name, vae=tiny())
    assert not (tmp_path / "out").exists()


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [bad_text, *TIMES.values()])
def test_a_source_table_that_python_cannot_take(values: Callable[[int], pa.Array], tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    names = pa.array([f"img_{number:04d}.png" for number in range(3)])
    pq.write_table(pa.table({"file_name": names, "x": values(3)}), tmp_path / "metadata.parquet")
    with pytest.raises(UsageError, match=r"metadata\.parquet"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.timestamp("ns", "UTC"), pa.duration("ns")])
def test_nanoseconds_do_not_make_a_store_stale(
    kind: pa.DataType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "images", 3)
    names = pa.array([f"img_{number:04d}.png" for number in range(3)])
    times = pa.array([1_000_000_001] * 3).view(kind)
    pq.write_table(pa.table({"file_name": names, "when": times}), images / "metadata.parquet")
    for _ in range(2):
        write_store(tiny(), open_source(str(images)), tmp_path / "store", **SETTINGS)
    assert "when is cut to microseconds" in caplog.text


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_log_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {"images": 8, "loss/total": 0.5, "warnings": {"name": "a\u2028b\x85c"}}
    lines = [json.dumps(good, ensure_ascii=False), '{"images": -1}', '{"images": "8"}', "[1]", "[" * 10_000, "{}"]
    lines += ['{"images": 9, "seconds": "x", "loss/total": NaN, "warnings": [1]}', '{"images": 10, "los']
    path.write_bytes("\n".join(lines).encode() + b"\xff\n")
    assert read_log(path) == [good, {"images": 9}]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a layer and its optimiser, and objects to restore it into."""
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    objects = {"layer": layer, "optimizer": optimizer}
    return checkpoint.save(tmp_path, 16, objects, "seed: 0\n", {"images_seen": 16}), objects


def test_a_checkpoint_of_other_settings_or_shapes_is_refused(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, objects = saved
    assert checkpoint.load(folder, objects)["images_seen"] == 16
    state, whole = json.loads((folder / "state.json").read_text()), (folder / "state.json").read_text()
    for images in (-16, 16.5, "16", None, 8):
        state["info"]["images_seen"] = images
        (folder / "state.json").write_text(json.dumps(state))
        with pytest.raises(WorkError, match="images_seen"):
            checkpoint.load(folder, objects)
    for old, new in (("0.9, 0.999", "0.5, 0.999"), ("optimizer.state.0.exp_avg", "layer.bias"), ('"exp_avg"', '"x"')):
        assert old in whole
        (folder / "state.json").write_text(whole.replace(old, new, 1))
        with pytest.raises(WorkError, match="optimiser"):
            checkpoint.load(folder, objects)


def page_of(folder: Path, name: str) -> None:
    """An evaluation's output whose one picture has its files under this name."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    entry = {"name": "p", "kind": "shown", "key": "k", "index": 0}
    vae = {"reconstruction": name, "latent": "p.original.png", "metrics": {"psnr": 20.0}}
    Image.new("RGB", (8, 8)).save(pictures / "p.original.png")
    (pictures / "pictures.json").write_text(json.dumps([entry | {"vaes": [vae]}]))
    summary = {"mean": 20.0, "ci95": None, "n": 1}
    about = {"name": "v", "parameters": 1, "downsampling_factor": 2, "latent_channels": 4, "source": "v",
             "encoder_fingerprint": "e", "decoder_fingerprint": "d", "scaling_factor": 1.0}  # fmt: skip
    data = {"source": "d", "resolution": 8, "quarantined": 0, "images": 1, "checksum": "c"}
    protocol = {"name": "ldm-vae", "version": 1, "posterior": "mode", "rounding": "round"}
    found = {"vae": about, "data": data, "protocol": protocol, "metrics": {"psnr": summary}, "versions": {}}
    (folder / "metrics.json").write_text(json.dumps(found))


def test_a_page_shows_what_lies_in_its_folder_alone(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    folder = tmp_path / "evaluation"
    page_of(folder, "p.original.png")
    build_report(folder)
    (folder / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../../secret.png", str(tmp_path / "secret.png"), "link.png"):
        page_of(folder, name)
        with pytest.raises(WorkError, match=r"pictures\.json.*leads out"):
            build_report(folder)


@pytest.mark.parametrize("change", [{"metrics": 5}, {"vae": {}}, {"data": None}, {"versions": []}, {"linear_code": 1}])
def test_a_page_of_results_that_are_none(change: dict[str, Any], tmp_path: Path) -> None:
    page_of(tmp_path, "p.original.png")
    found = json.loads((tmp_path / "metrics.json").read_text()) | change
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    assert run_cli("report", tmp_path) == (0 if change == {"versions": []} else 1)


@pytest.mark.parametrize("verb", ["reconstruct", "tiling"])
def test_a_pipe_in_the_place_of_a_picture_is_not_waited_for(
    verb: str, tiny_vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "a.png")
    out = [tmp_path / "out"] if verb == "reconstruct" else []
    assert run_cli(verb, tiny_vae_folder, tmp_path / "a.png", *out) == 2
    assert str(tmp_path / "a.png") in capsys.readouterr().err
