"""A store straight in an object store: equal bytes, whole or not there, whatever the network and other writers do."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checksums import tree
from cli_call import run_cli
from diffusers import AutoencoderKL
from loopback_s3 import BUCKET, Bucket
from sentences import refused
from store_sources import AFTER, Album, Pictures, Stop, Stopping
from stores import SETTINGS, same

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core import ownership
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import Part
from ldm_vae.latent_store import LatentDataset, Manifest, read_manifest, verify, write_store
from ldm_vae.latent_store.storage import claims
from ldm_vae.latent_store.storage.object_store import ObjectStore
from ldm_vae.latent_store.write.processes import Processes


@pytest.fixture
def url(bucket: Bucket, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8]}/latents"


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().eval()


@pytest.fixture(scope="module")
def local(vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of 20 pictures in a folder."""
    out = tmp_path_factory.mktemp("local") / "latents"
    encode(vae, str(out))
    return out


def encode(vae: AutoencoderKL, out: str, source: Any = None, part: Part = ownership.WHOLE, **more: Any) -> Manifest:
    return write_store(vae, source or Pictures(20, bad=(3,)), out, **SETTINGS, processes=Processes(part=part), **more)


def objects(url: str) -> dict[str, str]:
    """Every object of a store and its checksum; claims too, which are gone at the end."""
    files = fsspec.filesystem("s3")
    files.invalidate_cache()
    below = url.removeprefix("s3://")
    found = files.find(below)
    return {
        name.removeprefix(f"{below}/"): hashlib.sha256(content).hexdigest()
        for name, content in (files.cat(found) if found else {}).items()
    }


def of_folder(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(folder).items() if name != ownership.MARK}


def test_a_store_is_the_folders_bytes_and_is_read_verified_and_found_finished(
    bucket: Bucket, url: str, vae: AutoencoderKL, local: Path
) -> None:
    manifest = encode(vae, url)
    assert manifest == read_manifest(local) and objects(url) == of_folder(local)
    same(LatentDataset(url, columns=("caption",)), LatentDataset(local, columns=("caption",)))
    assert verify(url) == []
    puts = bucket.count("PUT", "/shards/")
    assert encode(vae, url) == manifest and bucket.count("PUT", "/shards/") == puts


def test_parts_stopped_and_started_with_other_numbers_give_the_same_bytes(
    url: str, vae: AutoencoderKL, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not encode(vae, url, part=Part(2, 3)).complete
    with pytest.raises(Stop):
        encode(vae, url, Halting(20, bad=(3,), after=10))
    with refused(UsageError, "store"):
        LatentDataset(url)
    for part in (1, 2):
        encode(vae, url, part=Part(part, 2))
    assert objects(url) == of_folder(local)


class Halting(Pictures):
    """Pictures of which no more can be had after some, for good."""

    def __init__(self, *given: Any, after: int, **more: Any) -> None:
        super().__init__(*given, **more)
        self.after = after

    def __getitem__(self, index: int) -> Any:
        self.after -= 1
        if self.after < 0:
            raise Stop
        return super().__getitem__(index)


def test_a_unit_is_there_before_its_record_and_all_before_the_manifest(
    bucket: Bucket, url: str, vae: AutoencoderKL, tmp_path: Path
) -> None:
    encode(vae, url)
    put = [path.partition("/latents/")[2] for method, path in bucket.requests if method == "PUT"]
    put = [name for name in put if not name.startswith(".owner")]
    assert put[0] == put[-1] == "manifest.json" and put.count("manifest.json") == 2 and put[-2] == "quarantine.jsonl"
    assert len({*put}) == len(put) - 1, "each object was sent once"
    for unit in range(3):
        places = [at for at, name in enumerate(put) if name.startswith(f"shards/{unit:08d}")]
        assert len(places) == 3 and max(places) < put.index(f"units/{unit:08d}.json")
    # the manifest takes the sums at the beginning of each shard: no shard was fetched to finish
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_what_passes_is_sent_again(bucket: Bucket, url: str, vae: AutoencoderKL, local: Path) -> None:
    bucket.faults = [
        ("PUT", "00000000.safetensors", "500"),
        ("PUT", "00000000.safetensors", "slow down"),
        ("PUT", "00000000.safetensors", "reset"),
        ("PUT", "00000000.parquet", "lost upload"),
        ("PUT", "00000001.safetensors", "lost answer"),
        ("PUT", "00000001.arrow", "slow"),
        ("PUT", "00000002.json", "lost upload"),
        ("PUT", "manifest.json", "lost answer"),
        ("HEAD", "00000002.safetensors", "500"),
        ("GET", "00000002.safetensors", "slow down"),
        ("GET", "00000002.json", "reset"),
        ("GET", "/bucket", "500"),
        ("PUT", ".owner.whole", "reset"),
    ]
    encode(vae, url)
    assert bucket.faults == [] and objects(url) == of_folder(local)
    assert bucket.count("PUT", "00000000.safetensors") == 4 and bucket.count("PUT", "00000000.parquet") == 2


def test_what_stays_wrong_ends_in_a_sentence_and_what_was_finished_is_kept(
    bucket: Bucket, url: str, vae: AutoencoderKL, local: Path
) -> None:
    for fault, tries in (("slow down", 6), ("denied", 1)):
        bucket.requests.clear()
        bucket.always = [("PUT", "00000002.arrow", fault)]
        with refused(WorkError, "00000002.arrow"):
            encode(vae, url)
        assert bucket.count("PUT", "00000002.arrow") == tries
    assert bucket.count("PUT", "00000001.arrow") == 0, "done before"
    bucket.always = []
    encode(vae, url)
    assert objects(url) == of_folder(local)


def test_nowhere_to_write(bucket: Bucket, url: str, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(UsageError, "nobucket"):
        encode(vae, "s3://nobucket/latents")
    for place in ("https://example.org/latents", "hf://datasets/me/mine", "sftp://host/latents"):
        with refused(UsageError, place):
            encode(vae, place)
    ObjectStore(url).replace("cat.jpg", b"a cat")
    with refused(UsageError, "OUT"):
        encode(vae, url)
    bucket.always = [("PUT", "", "denied")]
    with refused(WorkError, url):
        encode(vae, url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    fsspec.filesystem("s3").clear_instance_cache()
    with refused(WorkError, url):
        encode(vae, url)
    fsspec.filesystem("s3").clear_instance_cache()


# --- owners -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 4.0)  # half of it is left for a last look, which takes a while
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 3.0)  # moto's clock shows whole seconds
    monkeypatch.setattr(claims, "LONGEST_PAUSE", 0.02)


@pytest.mark.usefixtures("impatient")
def test_one_owner_at_a_time_and_parts_beside_each_other() -> None:
    url = "memory://owners/latents"

    def allowed(part: Part, role: str = "") -> bool:
        try:
            with claims.Claim(url, "OUT", role or claims.role_of(part)).held(patience=0.0):
                return True
        except UsageError:
            return False

    with claims.own_place(url, "OUT", part=Part(1, 3)) as owner:
        owner.check()
        assert allowed(Part(2, 3)) and allowed(Part(3, 3))
        assert not any(allowed(part) for part in (Part(1, 1), Part(1, 3), Part(2, 4), Part(1, 13)))
        with owner.turn():
            assert not allowed(Part(2, 3), claims.TURN_ROLE)
    with claims.own_place(url, "OUT"):
        assert not allowed(Part(2, 3)) and not allowed(Part(1, 1))
        with refused(UsageError, "OUT"), claims.own_place(url, "OUT"):
            raise AssertionError
    assert allowed(Part(1, 1)) and ObjectStore(url).names() == []


def test_of_launches_that_begin_at_once_one_works_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LONGEST_PAUSE", 0.02)
    url = "memory://begun/latents"
    inside, most, ended = [], [], []

    def work() -> None:
        with claims.Claim(url, "OUT", claims.WHOLE_ROLE).held(60.0):
            inside.append(1)
            most.append(len(inside))
            inside.pop()
        ended.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 3 and {*most} == {1}


@pytest.mark.usefixtures("impatient")
def test_a_killed_owner_is_nobody_and_a_suspended_one_learns_it(
    url: str, vae: AutoencoderKL, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspended = claims.Claim(url, f"OUT {url}", claims.WHOLE_ROLE)
    suspended._take(0.0)  # and nothing touches it
    encode(vae, url)
    with refused(WorkError, "OUT"):
        suspended.check()
    assert objects(url) == of_folder(local)


def test_a_second_writer_that_a_listing_has_not_shown_is_detected_and_nothing_is_doubled(
    url: str, vae: AutoencoderKL, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (claims.Claim(url, f"OUT {url}", claims.WHOLE_ROLE, token) for token in ("1" * 16, "2" * 16))
    with monkeypatch.context() as patch:
        patch.setattr(claims.Claim, "seen", lambda self: [])  # what was put before is not listed yet
        first._take(0.0)
        second._take(0.0)
        encode_units = lambda: encode(vae, url)  # noqa: E731 (a third one, that sees nothing either)
        patch.setattr(claims.Claim, "check", lambda self: None)
        encode_units()
    first.check()
    with refused(WorkError, "OUT"):
        second.check()
    stored = {name: digest for name, digest in objects(url).items() if not name.startswith(".owner")}
    assert stored == of_folder(local)


@pytest.mark.parametrize("conditional", [True, False])
def test_of_parts_that_begin_at_once_one_manifest_stands(bucket: Bucket, url: str, conditional: bool) -> None:
    bucket.always = [] if conditional else [("PUT", "manifest.json", "unconditional")]
    storage = ObjectStore(url)
    storage.create("manifest.json", b"one")
    storage.create("manifest.json", b"two")
    assert storage.read("manifest.json") == (b"one" if conditional else b"two")


# --- the verbs --------------------------------------------------------------------------------------------------------


def test_an_update_is_the_folders(url: str, vae: AutoencoderKL, tmp_path: Path) -> None:
    for out in (url, str(tmp_path / "local")):
        encode(vae, out, Album(bad=(4,)))
        with pytest.raises(Stop):
            encode(vae, out, Stopping(**AFTER, after=24), update=True)
        encode(vae, out, Album(**AFTER), update=True)
    assert objects(url) == of_folder(tmp_path / "local")
    with refused(UsageError, "OUT"):
        encode(vae, url, Album(bad=(4,)))


def test_stores_are_merged_and_split_from_and_to_urls(url: str, local: Path, tmp_path: Path) -> None:
    assert run_cli("store", "merge", local, f"{url}/copy") == 0
    assert run_cli("store", "merge", local, tmp_path / "copy") == 0
    whole = {name: digest for name, digest in tree(tmp_path / "copy").items() if name != ownership.MARK}
    assert objects(f"{url}/copy") == whole
    assert run_cli("store", "merge", f"{url}/copy", f"{url}/again") == 0
    assert objects(f"{url}/again") == whole
    assert run_cli("store", "split", f"{url}/copy", tmp_path / "few", "--rows", "0:9") == 0
    assert read_manifest(tmp_path / "few").samples == 9 and verify(tmp_path / "few") == []


def test_verbs_that_need_a_folder_say_what_would_do(
    url: str, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("store", "merge", local, url) == 0
    for words, field in (
        (("store", "merge", local, url), "OUT"),
        (("store", "repair", url), "STORE"),
        (("store", "split", local, f"{url}/parts", "--parts", "2"), "OUT"),
        (("store", "convert", local, f"{url}/converted", "--to", "parquet"), "OUT"),
        (("store", "pull", url, f"{url}/copy"), "OUT"),
        (("store", "push", url, "me/mine"), "STORE"),
    ):
        capsys.readouterr()
        assert run_cli(*words) == 2 and f"error: {field} s3://" in capsys.readouterr().err
    assert run_cli("store", "convert", url, tmp_path / "converted", "--to", "parquet") == 0


def test_the_commands(
    url: str, tiny_vae_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--resolution", "32", "--batch_size", "2", "--shard_size", "5", "--num_workers", "2"]
    assert run_cli("encode", tiny_vae_folder, image_folder, url, *words) == 0
    said = capsys.readouterr().out
    assert f"{url}: 12 samples in 3 shards" in said and "storage as fp16" in said
    assert run_cli("store", "stats", url) == 0 and run_cli("store", "verify", url, "--reencode", "3") == 0
    assert "3 to the same bits" in capsys.readouterr().out
    assert run_cli("decode", url, tmp_path / "pictures", "--count", "2") == 0
    assert len([*(tmp_path / "pictures").glob("*.png")]) == 2
    assert run_cli("decode", url, f"{url}/pictures") == 2 and "a URL takes" in capsys.readouterr().err
