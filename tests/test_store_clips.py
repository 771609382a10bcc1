"""A latent store of clips: rows [c, t, h, w], each length in shards of its own, and every promise of that of images."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checksums import tree
from PIL import Image
from sentences import refused
from store_sources import Footage, ordered_clips
from tiny_classes import tiny

from ldm_vae import LatentDataset, read_manifest, write_store
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import normalisation_of
from ldm_vae.core.errors import UsageError
from ldm_vae.data.transforms import centre_crop, to_pixels, to_uint8
from ldm_vae.latent_store.format import chunks
from ldm_vae.latent_store.format.chunks import chunk_rows
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.latent_store.maintain.merge_split import merge, pieces, split
from ldm_vae.latent_store.maintain.repair import repair
from ldm_vae.latent_store.maintain.spot_check import reencode
from ldm_vae.latent_store.maintain.summary import describe
from ldm_vae.latent_store.maintain.verify import verify
from ldm_vae.latent_store.read.pictures import contact_sheet, decode_to_png
from ldm_vae.latent_store.write import sample_stream
from ldm_vae.latent_store.write.encoder import Encoder
from ldm_vae.latent_store.write.tiled_encode import check_own_tiles

SETTINGS: dict[str, Any] = {"resolution": 16, "batch_size": 2, "shard_size": 6, "dtype": "fp32"}
WAN = "AutoencoderKLWan"


@pytest.fixture(autouse=True)
def _clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_stream, "ordered_loader", ordered_clips)


def clip_of(source: Footage, index: int) -> torch.Tensor:
    """The clip [1, C, T, H, W] that a store encodes."""
    ((sample,), _), = ordered_clips(source, 16, [index], batch_size=1, view=_centre)  # fmt: skip
    return to_pixels(sample.crop.pixels[None])


def _centre(image: torch.Tensor, size: tuple[int, int]) -> Any:
    return (centre_crop(image, 16, size),)


@pytest.mark.parametrize("name", [WAN, "AutoencoderKLCogVideoX", "AutoencoderKL"])
def test_what_is_stored_is_what_the_encoder_gives(name: str, tmp_path: Path) -> None:
    vae, source = tiny(name), Footage(count=8)
    source.frames = (9, 1) if "Cog" in name else source.frames
    manifest = write_store(vae, source, tmp_path / "store", **SETTINGS)
    assert manifest.samples == 8 and verify(tmp_path / "store") == []
    data, raw = LatentDataset(tmp_path / "store"), LatentDataset(tmp_path / "store", raw=True)
    statistics, law = LatentStatistics(), normalisation_of(vae)
    for index in range(8):
        stored = raw[index]
        clip = clip_of(source, stored["source_index"])
        with torch.no_grad():
            found = latents.encode(vae, clip)
            decoded = latents.decode(vae, found.mean)[0]
        torch.testing.assert_close(stored["mean"], found.mean[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stored["logvar"], found.logvar[0], rtol=1e-4, atol=1e-4)
        statistics.update(found)
        mean = LatentDataset(tmp_path / "store", sample=False)[index]["latents"]
        assert mean.shape == data.shape(index) == data[index]["latents"].shape == found.mean.shape[1:]
        assert torch.equal(mean, law.apply(stored["mean"][None])[0])
        torch.testing.assert_close(data.decode(mean, vae), decoded, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(data.decode(mean[None], vae)[0], decoded, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(data.statistics.mean, statistics.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data.statistics.variance, statistics.variance, rtol=1e-5, atol=1e-5)


def test_lengths_are_shards_of_their_own_and_batches_have_one(tmp_path: Path) -> None:
    manifest = write_store(tiny(WAN), Footage(count=12), tmp_path / "store", **SETTINGS, views="flip", pixels=True)
    known = {(shard.frames, shard.shape[1]) for shard in manifest.shards}
    assert known == {(1, 1), (5, 2), (9, 3)}
    assert {shard.name[9:] for shard in manifest.shards} == {f"16-16x16x{frames}" for frames in (1, 5, 9)}
    assert "16x2x2x2" in describe(tmp_path / "store", manifest)
    data = LatentDataset(tmp_path / "store", view="flip", pixels=True)
    assert len(data) == 12 and sorted(map(len, data.shapes().values())) == [3, 3, 6]
    seen = []
    for batch in data.loader(2):
        seen += batch["index"].tolist()
        frames = 1 + 4 * (batch["latents"].shape[2] - 1)
        assert batch["latents"].shape[1:] == (16, (frames + 3) // 4, 2, 2)
        assert batch["pixels"].shape[1:] == (3, frames, 16, 16)
    assert {*seen} == {*range(12)}
    plain = LatentDataset(tmp_path / "store", pixels=True)
    assert torch.equal(plain[0]["pixels"].flip(-1), data[0]["pixels"])


def test_processes_threads_and_stops_give_the_same_bytes(tmp_path: Path) -> None:
    vae = tiny(WAN)
    write_store(vae, Footage(count=14), tmp_path / "one", **SETTINGS)
    write_store(vae, Footage(count=14), tmp_path / "threads", **SETTINGS, encode_threads=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "threads")

    class Stops(Footage):
        def __getitem__(self, index: int) -> Any:
            if index == 9:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        write_store(vae, Stops(count=14), tmp_path / "stopped", **SETTINGS)
    assert not read_manifest(tmp_path / "stopped").complete
    write_store(vae, Footage(count=14), tmp_path / "stopped", **SETTINGS)
    assert tree(tmp_path / "one") == tree(tmp_path / "stopped")


def test_each_thread_has_caches_of_its_own_and_the_same_weights(tmp_path: Path) -> None:
    vae = tiny("AutoencoderKLMagvit")  # it keeps them in its layers
    identity = write_store(vae, Footage(count=2), tmp_path / "store", **SETTINGS).identity
    encoder = Encoder(vae, identity, batch_size=2)
    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: (both.wait(), encoder._network())[1], range(2))
    layers = [one.encoder.conv_in, other.encoder.conv_in, vae.encoder.conv_in]
    assert len({id(layer) for layer in layers}) == 3 and len({layer.weight.data_ptr() for layer in layers}) == 1


def test_updates_splits_and_merges_keep_every_clip(tmp_path: Path) -> None:
    vae, store = tiny(WAN), tmp_path / "store"
    write_store(vae, Footage(count=6), store, **SETTINGS)
    write_store(vae, Footage(count=9), store, **SETTINGS, update=True)
    parts = split(store, tmp_path / "parts", 2)
    merge([tmp_path / "parts" / part.name for part in parts], tmp_path / "again")
    assert verify(tmp_path / "again") == []
    one, other = (LatentDataset(path, raw=True) for path in (store, tmp_path / "again"))
    rows = [{item["key"]: item["mean"] for item in (data[n] for n in range(9))} for data in (one, other)]
    assert rows[0].keys() == rows[1].keys() and all(torch.equal(rows[0][key], rows[1][key]) for key in rows[0])
    checked = reencode(store, read_manifest(store), vae, Footage(count=9), count=4)
    # in other batches a clip may round otherwise, by 8e-8 on one processor and not at all on another
    assert checked.samples == 4 and checked.worst < 1e-6 and not checked.problems
    files = {path: path.read_bytes() for path in (store / "shards").glob("*.safetensors")}
    lost = sorted(files)[-1]
    lost.unlink()
    repair(store, vae=lambda: vae, source=lambda: Footage(count=9))
    assert {path: path.read_bytes() for path in files} == files and verify(store) == []


def test_a_length_that_would_be_cut_is_refused_and_a_bad_clip_is_put_aside(tmp_path: Path) -> None:
    source = Footage(count=4)
    source.frames = (6,)
    with refused(UsageError, "T"):
        write_store(tiny(WAN), source, tmp_path / "cut", **SETTINGS)
    object.__setattr__(source.decoding, "frames", 6)  # a source that says it is refused before anything is written
    with refused(UsageError, "T"):
        write_store(tiny(WAN), source, tmp_path / "nothing", **SETTINGS)
    assert not (tmp_path / "nothing").exists()
    manifest = write_store(tiny(WAN), Footage(count=5, bad=(2,)), tmp_path / "store", **SETTINGS)
    assert (manifest.samples, manifest.quarantined) == (4, 1)
    with refused(UsageError, "vae"):
        tiled = tiny(WAN)
        tiled.enable_tiling()
        write_store(tiled, Footage(count=4), tmp_path / "tiled", **SETTINGS)


def test_clips_are_decoded_to_animated_pictures(tmp_path: Path) -> None:
    vae, source, store = tiny(WAN), Footage(count=3), tmp_path / "store"
    source.frames = (5,)
    write_store(vae, source, store, **SETTINGS)
    data = LatentDataset(store, sample=False)
    assert decode_to_png(data, vae, tmp_path / "shown", range(3)) == 3
    decoded = to_uint8(data.decode(data[1]["latents"], vae))
    with Image.open(sorted((tmp_path / "shown").glob("*.png"))[1]) as picture:
        assert picture.n_frames == 5
        picture.seek(4)
        assert torch.equal(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1), decoded[:, 4])
    assert contact_sheet(data, vae)[1:4] == b"PNG"


def test_a_few_rows_of_long_clips_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        chunk_rows((4, 128, 128)) == 256 and chunk_rows((16, 21, 60, 104)) == 4 and chunk_rows((16, 9999, 64, 64)) == 1
    )
    monkeypatch.setattr(chunks, "CHUNK_VALUES", 2 * 16 * 3 * 2 * 2)
    manifest = write_store(tiny(WAN), Footage(count=12), tmp_path / "store", **SETTINGS)
    for piece in pieces(tmp_path / "store", manifest):
        most = 2 if piece.shard.frames == 9 else 3 if piece.shard.frames == 5 else 6
        assert all(len(rows) <= most for _, rows in piece.read(np.arange(len(piece.keys))))
    assert verify(tmp_path / "store") == []


def test_frames_are_encoded_in_tiles(tmp_path: Path) -> None:
    vae, settings = tiny(WAN), SETTINGS | {"resolution": 32}
    for name, tile in (("whole", None), ("tiled", (16, 8))):
        write_store(vae, Footage(count=3), tmp_path / name, **settings, tile=tile)
    whole, tiled = (LatentDataset(tmp_path / name, raw=True)[2]["mean"] for name in ("whole", "tiled"))
    assert whole.shape == tiled.shape == (16, 3, 4, 4) and not torch.equal(whole, tiled)
    own = tiny("AutoencoderKLMiniMaxH3")  # which works in tiles that are part of what it is
    own.disable_tiling()
    with refused(UsageError, "vae"):
        write_store(own, Footage(count=3), tmp_path / "own", **settings)
    assert not (tmp_path / "own").exists()
    own.enable_tiling()
    check_own_tiles(own)


@pytest.mark.parametrize(
    ("name", "chunk", "value"),
    [
        ("AutoencoderKLCogVideoX", "num_latent_frames_batch_size", 4),
        ("AutoencoderKLMochi", "num_sample_frames_batch_size", 6),
        ("AutoencoderKLHunyuanVideo", "use_framewise_encoding", False),
        ("AutoencoderKLHunyuanVideo", "tile_sample_min_num_frames", 32),
        ("AutoencoderKLLTXVideo", "use_framewise_encoding", True),
    ],
)
def test_chunks_of_frames_are_those_of_the_class(tmp_path: Path, name: str, chunk: str, value: int) -> None:
    """The identity of a store names the encoder, and with it the chunks of its class: others are refused."""
    vae = tiny(name)
    check_own_tiles(vae)
    assert getattr(vae, chunk) != value
    setattr(vae, chunk, value)
    with refused(UsageError, "vae"):
        write_store(vae, Footage(count=1), tmp_path / "store", **SETTINGS)


@pytest.mark.parametrize("pipelines", [None, "ideogram4", "bria_fibo2"])
def test_patches_of_a_clip_are_those_of_its_frames(pipelines: str | None) -> None:
    law = Normalisation.from_statistics("channel", torch.linspace(-1, 1, 16).double(), torch.ones(16).double(), patch=2)
    law = law.laid_out_for(pipelines)
    z = torch.randn(2, 4, 3, 4, 6)
    given = law.apply(z)
    assert given.shape[1:] == law.shape((4, 3, 4, 6))
    for frame in range(3):
        assert torch.equal(given[:, :, frame], law.apply(z[:, :, frame]))
    torch.testing.assert_close(law.undo(given), z)
