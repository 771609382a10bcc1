"""Killed at any moment, by any number of processes: the finished store is the one that was never interrupted.

In the suite (slow): 24 kills of forked children at random moments, 4 of children that encode clips, 3 of sounds, one
of the real program's launcher, and one of two ranks at once. As often as one likes, and everything else beside it:
`python -m tests.torture`.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from checksums import tree
from fork_server import fork
from images import write_images
from kills import Launched, Reaper, Victim, launch_program, ranks, wait_until
from sound_files import encoded, tone, write_sounds
from store_sources import Pictures
from stores import SETTINGS
from tiny_classes import tiny
from videos import films_of, write_films

from ldm_vae import cli, open_images
from ldm_vae.core import atomic_io
from ldm_vae.core.ownership import Part
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from ldm_vae.latent_store.format.quarantine import read_quarantine
from ldm_vae.latent_store.write.processes import Processes


def vae(films: str = "") -> Any:
    import torch

    if films:
        return tiny("AutoencoderOobleck", audio_channels=1) if is_sounds(films) else tiny("AutoencoderKLWan")

    from ldm_vae.autoencoder.config import AutoencoderConfig

    torch.manual_seed(0)
    return AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build().eval()


def is_sounds(folder: str) -> bool:
    return Path(folder).name == "sounds"


def source(count: int) -> Pictures:
    return Pictures(count, bad=(5, 31), broken=(17,))


def part(out: str, index: int, count: int) -> None:
    """Encode a part of the 60 pictures."""
    import torch

    torch.set_num_threads(1)
    write_store(vae(), source(60), out, **SETTINGS, processes=Processes(part=Part(index, count)))


def child(out: str, rank: int, count: int, workers: int, update: int, films: str = "") -> None:
    """Encode 60 pictures, or update a store to `update` of them; or the clips of a folder of films, or
    excerpts of one of sounds."""
    import torch

    torch.set_num_threads(1)
    own: dict[str, Any] = {"processes": Processes(rank, count), "num_workers": workers, "update": bool(update)}
    if films:
        network, sounds = vae(films), is_sounds(films)
        data = open_images(films, network, **{"samples": 256} if sounds else {"frames": 5})
        size = {"shard_size": 2} | ({"resolution": 256} if sounds else {})
        write_store(network, data, out, **SETTINGS | size | own)
    else:
        write_store(vae(), source(update or 60), out, **SETTINGS | own)


def torture(out: Path, kills: int, seed: int, films: str = "") -> int:
    """Start children with random numbers of processes and workers, kill each after a random time, until `kills` were
    killed while they worked; then let one finish. Returns how many children it took."""
    reaper = Reaper(random.Random(seed))
    while reaper.kills < kills:
        count = reaper.draw.choice([1, 1, 2, 3])
        calls = [
            partial(child, str(out), rank, count, reaper.draw.choice([0, 0, 1]), 0, films) for rank in range(1, count)
        ] or [partial(child, str(out), 0, 1, 0, 0, films)]
        for done in reaper.strike([fork(call, []) for call in calls]):
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
        if (out / "manifest.json").is_file() and read_manifest(out).complete:
            shutil.rmtree(out)  # a finished store is never touched again: the next round begins anew
        elif len(list((out / "units").glob("*.json"))) > 6 and reaper.draw.random() < 0.5:
            undo(out, reaper.draw)
    child(str(out), 0, 1, 0, 0, films)
    return reaper.started


def undo(out: Path, draw: random.Random) -> None:
    """Take some finished units away again, so that there is work for the next to be killed in."""
    for record in draw.sample(sorted((out / "units").glob("*.json"))[:7], 4):
        stem = out / "shards" / record.stem
        if draw.random() < 0.5:
            stem.with_suffix(".safetensors").unlink(missing_ok=True)
        record.unlink()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_two_dozen_times_at_random_moments(tmp_path: Path) -> None:
    child(str(tmp_path / "whole"), 0, 1, 0, 0)
    torture(tmp_path / "killed", 24, seed=0)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert verify(tmp_path / "killed") == []
    keys = [LatentDataset(tmp_path / "killed", columns=("key",))[index]["key"] for index in range(57)]
    assert keys == [source(60).key(index) for index in range(60) if index not in (5, 17, 31)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_parts_at_once_of_which_some_are_killed(tmp_path: Path) -> None:
    """Three parts without a launcher, each started again until all are done; a round that ends begins anew."""
    child(str(tmp_path / "whole"), 0, 1, 0, 0)
    out, reaper = tmp_path / "parts", Reaper(random.Random(2))
    calls = [partial(part, str(out), index, 3) for index in (1, 2, 3)]
    while reaper.kills < 8:
        for done in reaper.strike([fork(call, []) for call in calls]):
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
        if (out / "manifest.json").is_file() and read_manifest(out).complete:
            assert tree(out) == tree(tmp_path / "whole")
            shutil.rmtree(out)
    for call in calls:
        call()
    assert tree(out) == tree(tmp_path / "whole") and verify(out) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_clips_of_which_some_are_damaged_are_there_once_after_kills(tmp_path: Path) -> None:
    """Two lengths, a container that ends in its middle, one that ends in its header, and a video that is too short."""
    films = write_films(tmp_path / "films", 16, damaged=(5, 10), short=(12,))
    child(str(tmp_path / "whole"), 0, 1, 0, 0, str(films))
    torture(tmp_path / "killed", 4, 0, str(films))
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole") and verify(tmp_path / "killed") == []
    data = LatentDataset(tmp_path / "killed", columns=("key",))
    keys = [data[index]["key"] for index in range(len(data))]
    bad = {f"film_{number:02d}.mkv" for number in (5, 10, 12)}
    assert sorted(keys) == [key for key in films_of(films) if key.partition("#")[0] not in bad]
    assert [entry.key for entry in read_quarantine(tmp_path / "killed")] == sorted(bad)
    assert {shard.frames for shard in read_manifest(tmp_path / "killed").shards} == {1, 5}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_excerpts_of_which_some_are_damaged_are_there_once_after_kills(tmp_path: Path) -> None:
    """Two excerpts of each sound, a WAV that is cut off, and one of noise."""
    sounds = write_sounds(tmp_path / "sounds", 10, samples=500)
    for name, content in (("tone3.wav", encoded(tone(500))[:-100]), ("tone7.wav", bytes(range(200)))):
        (sounds / name).write_bytes(content)
    child(str(tmp_path / "whole"), 0, 1, 0, 0, str(sounds))
    torture(tmp_path / "killed", 3, 0, str(sounds))
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole") and verify(tmp_path / "killed") == []
    data = LatentDataset(tmp_path / "killed", columns=("key",))
    good = [f"tone{number}.wav{part}" for number in range(10) if number not in (3, 7) for part in ("", "#t=0.032")]
    assert sorted(data[index]["key"].removesuffix("#t=0") for index in range(len(data))) == good
    assert [entry.key for entry in read_quarantine(tmp_path / "killed")] == ["tone3.wav", "tone7.wav"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_update_killed_at_random_moments(tmp_path: Path) -> None:
    for name in ("whole", "old"):
        child(str(tmp_path / name), 0, 1, 0, 0)
    child(str(tmp_path / "whole"), 0, 1, 0, 140)
    reaper = Reaper(random.Random(1))
    killed = tmp_path / "killed"
    call = partial(child, str(killed), 0, 1, 0, 140)
    while reaper.kills < 6:  # an update that came to its end is made again, from the old store
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(tmp_path / "old", killed)
        while reaper.strike([fork(call, [])])[0].returncode != 0:
            assert len(LatentDataset(killed)) in (57, 137), "a reader sees the old store or the new one"
        assert tree(killed) == tree(tmp_path / "whole")


# --- the real program -------------------------------------------------------------------------------------------------


def words(folder: Path, out: Path) -> list[str]:
    options = ["--resolution", "32", "--batch_size", "4", "--shard_size", "8", "--num_workers", "1"]
    return ["encode", str(folder / "vae"), str(folder / "images"), str(out), *options]


def start(folder: Path, out: Path) -> Launched:
    return launch_program(["-m", "ldm_vae", *words(folder, out)], 2)


def kill_at(victims: Sequence[Victim], out: Path, units: int, *, whole_tree: bool) -> list[psutil.Process]:
    """Kill as soon as `units` are done; a launcher alone or all; returns whoever is left."""
    wait_until(lambda: len(list((out / "units").glob("*.json"))) >= units, victims[0])
    left = []
    for victim in victims:
        if whole_tree and victim.running():
            victim.kill(signal.SIGKILL)
        elif isinstance(victim, Launched) and victim.running():
            left += victim.kill_alone()
    for victim in victims:
        victim.wait()
    return left


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_program_killed_under_its_launcher_and_finished_with_other_numbers(tmp_path: Path) -> None:
    vae().save_pretrained(tmp_path / "vae")
    write_images(tmp_path / "images", 480)
    whole = fork(cli.main, words(tmp_path, tmp_path / "whole"))
    assert whole.wait().returncode == 0
    out = tmp_path / "killed"
    left = kill_at([start(tmp_path, out)], out, 4, whole_tree=False)
    _, alive = psutil.wait_procs(left, timeout=300)
    assert alive == [], "orphans of a killed launcher stop by themselves"
    before = len(list((out / "units").glob("*.json")))
    kill_at(ranks(cli.main, words(tmp_path, out), 2), out, max(20, before + 4), whole_tree=True)
    done = len(list((out / "units").glob("*.json")))
    assert done < 60, "everything was done before the last kill: nothing was tested"
    one = tmp_path / "one"
    shutil.copytree(out, one)
    for ended in [rank.wait() for rank in ranks(cli.main, words(tmp_path, out), 3)]:
        assert ended.returncode == 0, ended.stderr
    assert fork(cli.main, words(tmp_path, one)).wait().returncode == 0
    for path in out.rglob("*"):
        assert not atomic_io.is_temporary(path) or path.unlink() is None  # an orphan that was killed in its last write
    assert tree(out) == tree(one) == tree(tmp_path / "whole")
