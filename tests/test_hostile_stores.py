"""Stores and weight files with anything in them: random headers, manifests with absurd numbers and paths, tables that
lie about their rows. They are read, or refused in one sentence; nothing leads out of a folder or of memory."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checksums import tree
from decoder_fuzz import mutate
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from images import write_images
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.format.shards import map_tensors
from ldm_vae.latent_store.format.work_units import read_plan

pytestmark = pytest.mark.usefixtures("bounded_memory")


def examples(count: int) -> settings:
    """So many, the same each time, however long the machine takes for them."""
    unlike = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=unlike)


REFUSED = (UsageError, WorkError)


def one_line(error: Exception) -> None:
    assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, str(error)


def tiny() -> Any:
    torch.manual_seed(0)
    return AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().eval()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store, never changed."""
    path = tmp_path_factory.mktemp("sound") / "store"
    write_store(tiny(), Pictures(bad=(9,)), path, **SETTINGS)
    return path


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(sound, tmp_path / "store"))


def use(path: Path) -> None:
    """What a reader does with a store."""
    data = LatentDataset(path)
    assert len(data) <= 2**40
    for index in (0, len(data) - 1):
        assert data[index]["latents"].ndim >= 1
    assert data.statistics.images >= 0
    verify(path)


# --- safetensors ------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**30, -(2**63)]))
ENTRY = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "U8", "I64", "BOOL", "F99", ""]),
            "shape": st.lists(NUMBERS, max_size=4),
            "data_offsets": st.lists(NUMBERS, min_size=0, max_size=3),
        }
    ),
    st.none(), st.text(max_size=3), st.lists(NUMBERS, max_size=2),
)  # fmt: skip
NAMES = st.sampled_from(
    ["mean", "logvar", "statistics", "encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight",
     "encoder.down.0.block.0.conv1.weight", "encoder.down.x.y", "encoder.down.", "decoder.conv_out.weight",
     "__metadata__"]
)  # fmt: skip


@st.composite
def weight_files(draw: st.DrawFn) -> bytes:
    """A header of random entries, its length right, huge or wrong, and some bytes behind it."""
    header = json.dumps(draw(st.dictionaries(NAMES, ENTRY, max_size=6))).encode()
    header = draw(st.sampled_from([header, header[:-1], b"", b"[" * 5000, b"\xff" + header, b"{}" + header]))
    length = draw(st.sampled_from([len(header)] * 5 + [0, 1, len(header) + 1, 2**27, 2**40, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + bytes(draw(st.integers(0, 300)))


@examples(60)
@given(content=weight_files())
def test_any_safetensors_file_is_read_or_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    try:
        for value in map_tensors(path).values():
            assert value.nbytes <= len(content)
            value.sum()
    except WorkError as error:
        one_line(error)
    with pytest.raises(UsageError) as error:  # no file of these holds an autoencoder
        load_autoencoder(path)
    one_line(error.value)


@examples(60)
@given(seed=st.integers(0, 10**6))
def test_wounded_weights_are_read_or_refused(seed: int, tmp_path: Path) -> None:
    path, folder = tmp_path / "file.safetensors", tmp_path / "vae"
    if not folder.exists():
        tiny().save_pretrained(folder)
    whole = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    path.write_bytes(mutate(whole, b"\xff" * 64, np.random.default_rng(seed)))
    try:
        assert isinstance(load_autoencoder(path, folder), torch.nn.Module)
    except UsageError as error:
        one_line(error)


# --- manifests --------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.sampled_from(
        [-1, 0, 1, 2**31, 2**63, 10**30, -(2**70), 0.5, float("nan"), float("inf"), None, True, "", "x", "../../../etc",
         "/etc/passwd", "\x00", [], {}, [0], [-1], [10**12, 10**12], [[1]], {"a": 1}, "9" * 5000]
    ),
    st.integers(), st.text(max_size=5),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be put in a JSON tree."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def put(tree: Any, path: tuple[Any, ...], leaf: Any) -> None:
    for step in path[:-1]:
        tree = tree[step]
    tree[path[-1]] = copy.deepcopy(leaf)  # the next one may be put into it


@pytest.mark.slow
@examples(150)
@given(data=st.data())
def test_any_manifest_is_read_or_refused(data: st.DataObject, sound: Path, tmp_path: Path) -> None:
    """One to three values of a manifest are something else."""
    path = tmp_path / "store"
    if not path.exists():
        shutil.copytree(sound, path)
    manifest = json.loads((sound / "manifest.json").read_text())
    spots = list(places(manifest))
    for _ in range(data.draw(st.integers(1, 3))):
        spot = data.draw(st.sampled_from(spots))
        try:
            put(manifest, spot, data.draw(LEAVES))
        except (TypeError, KeyError, IndexError):
            assume(False)  # an earlier change took the place away
    (path / "manifest.json").write_text(json.dumps(manifest))
    before = tree(path)
    try:
        use(path)
    except REFUSED as error:
        one_line(error)
    assert tree(path) == before


def test_half_a_character_is_refused(store: Path) -> None:
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recorded"]["tool"] = "\ud800"
    path.write_text(json.dumps(manifest))
    with refused(WorkError, "manifest.json"):
        read_manifest(store)
    manifest["recorded"]["tool"] = "\U0001f600"  # two halves
    path.write_text(json.dumps(manifest))
    assert read_manifest(store).recorded.tool == "\U0001f600"


@pytest.mark.parametrize("value", [[[1]] * 4, [None] * 4, [10**400] * 4, {"a": 1}, 1, True])
@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor", "latents_mean", "latents_std"])
def test_a_normalisation_of_something_else_than_numbers(name: str, value: Any, store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["recorded"]["normalisation"] = {"scaling_factor": 1.0, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    manifest["recorded"]["normalisation"][name] = value
    (store / "manifest.json").write_text(json.dumps(manifest))
    if name in ("scaling_factor",) and value in (1, True):
        assert read_manifest(store).recorded.normalisation["scaling_factor"] == 1
    else:
        with pytest.raises(WorkError, match="`recorded`"):  # and pydantic's words, so not golden
            read_manifest(store)


@pytest.mark.parametrize(
    "change",
    [
        lambda shard: shard.update(name="../../../etc/passwd"), lambda shard: shard.update(name="00000000/../x"),
        lambda shard: shard["files"].update({"x/../../../y": shard["files"]["arrow"]}),
        lambda shard: shard["files"].pop("parquet"), lambda shard: shard.update(rows=10**12),
        lambda shard: shard.update(rows=-1), lambda shard: shard.update(removed=[10**9]),
        lambda shard: shard.update(removed=[2, 1]), lambda shard: shard.update(removed=[-1]),
        lambda shard: shard.update(shape=[4, 2**40, 2**40]), lambda shard: shard.update(shape=[]),
    ],
)  # fmt: skip
def test_a_shard_that_cannot_be(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest["shards"][0])
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WorkError, match=r"`shards\.0") as error:  # and pydantic's words, so not golden
        read_manifest(store)
    one_line(error.value)


def test_a_plan_of_absurd_length_is_none(store: Path) -> None:
    manifest = read_manifest(store)
    plan = {"source": {"samples": 21, "keys": "x"}, "first_unit": 9, "ranges": [[0, 5], [7, 21]]}
    (store / "plan.json").write_text(json.dumps(plan))
    assert read_plan(store, manifest.units) is not None
    for ranges in ([[0, 10**15], [0, 10**15]], [[5, 0]], [[-5, 3]], [[0, 22]], [[3, 5], [4, 6]]):
        (store / "plan.json").write_text(json.dumps(plan | {"ranges": ranges}))
        assert read_plan(store, manifest.units) is None


# --- tables -----------------------------------------------------------------------------------------------------------


def rewrite(store: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another table in both files of the first shard."""
    table = change(pq.read_table(store / "shards" / "00000000.parquet"))
    pq.write_table(table, store / "shards" / "00000000.parquet")
    with pa.ipc.new_file(str(store / "shards" / "00000000.arrow"), table.schema) as file:
        file.write_table(table.combine_chunks())


@pytest.mark.parametrize("missing", ["arrow", "none"])
@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.slice(0, 3), lambda table: table.slice(0, 0), lambda table: pa.concat_tables([table] * 3),
    ],
    ids=["shorter", "empty", "longer"],
)  # fmt: skip
def test_a_table_that_lies_about_its_rows(store: Path, change: Callable[[pa.Table], pa.Table], missing: str) -> None:
    rewrite(store, change)
    if missing == "arrow":
        (store / "shards" / "00000000.arrow").unlink()
    data = LatentDataset(store)
    with refused(WorkError, "00000000.parquet" if missing == "arrow" else "00000000.arrow") as error:
        data[7]
    one_line(error.value)
    with refused(WorkError, "00000000.parquet"):
        write_store(tiny(), Pictures(22, bad=(9,)), store, **SETTINGS, update=True)


def test_a_parquet_of_a_few_bytes_for_very_many_rows_is_not_unpacked(store: Path) -> None:
    many = pa.table({"key": pa.DictionaryArray.from_arrays(np.zeros(5_000_000, np.int8), pa.array(["k" * 1000]))})
    pq.write_table(many, store / "shards" / "00000000.parquet")
    (store / "shards" / "00000000.arrow").unlink()
    with refused(WorkError, "00000000.parquet"):
        LatentDataset(store)[0]


@examples(60)
@given(seed=st.integers(0, 10**6), extension=st.sampled_from(["arrow", "parquet", "safetensors"]))
def test_wounded_shards_are_read_or_refused(seed: int, extension: str, sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound, path)
    file = path / "shards" / f"00000001.{extension}"
    wounded = mutate(file.read_bytes(), b"\x7f" * 64, np.random.default_rng(seed))
    file.unlink()  # of the copy: another process may have the old one mapped
    file.write_bytes(wounded)
    if extension == "parquet":
        file.with_suffix(".arrow").unlink()
    try:
        data = LatentDataset(path)
        for index in (8, 15):
            data[index]
    except WorkError as error:
        one_line(error)
    problems = verify(path)
    assert problems or wounded == (sound / "shards" / file.name).read_bytes()


# --- units ------------------------------------------------------------------------------------------------------------


@examples(12)
@given(data=st.data())
def test_any_record_of_a_unit_is_done_again_or_refused(data: st.DataObject, sound: Path, tmp_path: Path) -> None:
    """A store that was not finished, and whose records say something else: the end is the same, or a sentence."""
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(sound, path)
    for name in ("manifest.json", "quarantine.jsonl"):
        (path / name).unlink()
    record = json.loads((path / "units" / "00000001.json").read_text())
    changed = copy.deepcopy(record)
    put(changed, data.draw(st.sampled_from([spot for spot in places(record) if spot[0] != "bad"])), data.draw(LEAVES))
    (path / "units" / "00000001.json").write_text(json.dumps(changed))
    try:
        write_store(tiny(), Pictures(bad=(9,)), path, **SETTINGS)
    except REFUSED as error:
        one_line(error)
    else:
        assert verify(path) == []
        assert tree(path / "shards") == tree(sound / "shards")


def test_the_images_of_a_hostile_store_stay_where_they_are(store: Path, tmp_path: Path) -> None:
    """The places that a manifest names are only read; another folder than the store's is never written."""
    images = write_images(tmp_path / "images", 2)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["recorded"] |= {"vae": str(images), "data": "/etc"}
    (store / "manifest.json").write_text(json.dumps(manifest))
    before = tree(tmp_path)
    use(store)
    assert tree(tmp_path) == before
