"""DATA at a URL gives the store that the same files on disk give, and what passes is asked again."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from checksums import tree
from diffusers import AutoencoderKL
from image_files import bmp, pictures, write
from loopback_s3 import BUCKET, Bucket
from sentences import refused
from upstream import serving

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data import remote_tables
from ldm_vae.data.source import kind_of, open_source
from ldm_vae.latent_store import read_manifest, write_store
from ldm_vae.latent_store.format.quarantine import read_quarantine


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().eval()


def encode(vae: AutoencoderKL, data: str, out: Path, workers: int = 0) -> dict[str, str]:
    source = open_source(data)
    write_store(vae, source, out, resolution=16, batch_size=2, shard_size=4, num_workers=workers)
    return tree(out)


def sent(place: Path, name: str) -> str:
    """The URL of a copy of a file or folder."""
    fsspec.filesystem("s3").put(str(place), f"{BUCKET}/{name}", recursive=True)
    return f"s3://{BUCKET}/{name}"


@pytest.mark.parametrize("kind", ["folder", "list", "tar", "parquet"])
def test_a_url_gives_the_store_of_the_files(bucket: Bucket, kind: str, vae: AutoencoderKL, tmp_path: Path) -> None:
    data = write(kind, tmp_path / kind, pictures())
    url = sent(data.parent if kind == "list" else data, f"{kind}/{data.name}")
    url = f"{url}/all.lst" if kind == "list" else url
    local = encode(vae, str(data), tmp_path / "local")
    bucket.requests.clear()
    part = {"tar": "/tar", "parquet": "/parquet"}.get(kind, ".bmp")
    bucket.faults = [("GET", part, "500"), ("GET", part, "reset"), ("GET", part, "slow down")]
    assert encode(vae, url, tmp_path / "remote", workers=0 if kind == "list" else 2) == local
    assert bucket.faults == []
    # a second call knows by their versions that they are the same: it reads none of them again
    bucket.requests.clear()
    assert encode(vae, url, tmp_path / "remote") == local
    assert bucket.count("GET", part) == (kind == "parquet"), "of parquet the end, which tells its rows"


def test_each_range_of_a_shard_and_group_of_rows_is_asked_for_once(bucket: Bucket, tmp_path: Path) -> None:
    """Whatever number of processes read them; and of groups the last few are kept."""
    shard = sent(write("tar", tmp_path / "tar", pictures()), "each/all.tar")
    first, second = (open_source(shard).indexed() for _ in range(2))  # type: ignore[attr-defined]
    assert bucket.count("GET", "each/all.tar") == 1
    assert [first[index].image for index in range(6)] == [bmp(index) for index in range(6)]
    assert bucket.count("GET", "each/all.tar") == 7 and len(second) == 6
    table = sent(write("parquet", tmp_path / "parquet", pictures()), "each/table.parquet")
    for source in (open_source(table), open_source(f"s3://{BUCKET}/each/*.parquet")):
        assert [source[index].image for index in range(6)] == [bmp(index) for index in range(6)]
    groups = sum("each/table" in path for method, path in bucket.requests if method == "GET")
    assert groups <= 6 and len([*(tmp_path / "cache").rglob("*.arrow")]) == 1
    for number in range(5):
        (tmp_path / "cache" / "ldm-vae" / "tables" / f"{number}.arrow").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_tables, "KEPT", 2)
        remote_tables._forget(tmp_path / "cache" / "ldm-vae" / "tables")
    assert len([*(tmp_path / "cache").rglob("*.arrow")]) == 2


def test_a_file_on_disk_may_list_urls(bucket: Bucket, vae: AutoencoderKL, tmp_path: Path) -> None:
    write("folder", tmp_path / "files", pictures())
    url = sent(tmp_path / "files", "listed")
    with serving(tmp_path / "files") as upstream:
        upstream.faults = {"img_4.bmp": ["500", "cut"]}
        names = [f"{url}/img_{number}.bmp" for number in range(3)]
        names += [f"{upstream.url}/img_{number}.bmp" for number in (3, 4)]
        (tmp_path / "all.txt").write_text("\n".join([*names, f"{url}/none.bmp"]))
        encode(vae, str(tmp_path / "all.txt"), tmp_path / "store")
    assert read_manifest(tmp_path / "store").samples == 5
    assert [entry.reason for entry in read_quarantine(tmp_path / "store")] == [
        "no such file (it vanished, or never was)"
    ]


def test_a_server_that_is_away_ends_the_work_and_puts_nothing_into_quarantine(
    bucket: Bucket, vae: AutoencoderKL, tmp_path: Path
) -> None:
    for kind in ("folder", "tar", "parquet"):
        data = write(kind, tmp_path / kind, pictures())
        url = sent(data, f"away/{data.name}")
        source = open_source(url)
        if kind == "tar":
            source = source.indexed()  # type: ignore[attr-defined]
        bucket.always = [("GET", "away", "slow down")]
        with refused(WorkError, url):
            write_store(vae, source, tmp_path / f"out {kind}", resolution=16)
        bucket.always = []


def test_what_a_url_means_and_what_is_refused(bucket: Bucket) -> None:
    for url, kind in (
        ("s3://b/photos", "list"),
        ("s3://b/photos/all.txt", "list"),
        ("https://h/{000..009}.tar", "webdataset"),
        ("s3://b/a.tar.gz", "webdataset"),
        ("s3://b/*.parquet", "hub"),
    ):
        assert kind_of(url) == kind
    for url in (f"s3://{BUCKET}/none.txt", f"s3://{BUCKET}/none.parquet", f"s3://{BUCKET}/none/*.parquet"):
        with refused(UsageError, url):
            open_source(url)
    with refused(WorkError, f"s3://{BUCKET}/none"):
        open_source(f"s3://{BUCKET}/none")
    for url in (f"s3://{BUCKET}/none.tar", f"s3://{BUCKET}/none.tar.gz"):
        with refused(UsageError, url):
            open_source(url).indexed()  # type: ignore[attr-defined]
    fsspec.filesystem("s3").pipe_file(f"{BUCKET}/a.lst", b"clip.mp4")
    with refused(UsageError, f"s3://{BUCKET}/a.lst"):
        open_source(f"s3://{BUCKET}/a.lst", frames=5)
