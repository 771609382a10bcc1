"""Victims of the torture: for each how it is started, what must be readable after a kill, and what its end is
compared with."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
from checksums import tree
from images import write_images
from kills import Launched, Victim, launch_program, ranks
from loopback_hub import Hub
from loopback_s3 import BUCKET
from sound_files import excerpts_of, write_sounds
from tiny_classes import tiny
from training_runs import metrics, newest, write_config
from videos import films_of, write_films

from ldm_vae import cli
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.core import ownership
from ldm_vae.latent_store import LatentDataset, read_manifest, verify
from ldm_vae.latent_store.storage import claims
from ldm_vae.run import checkpoint
from train import autoencoder as training_program

IMAGES = 24


@dataclass
class Figures:
    """Lines that are printed of one victim."""

    kills: int = 0
    programs: int = 0
    finished: int = 0
    lost: int = 0
    doubled: int = 0
    unreadable: int = 0
    different: int = 0

    @property
    def sound(self) -> bool:
        return not (self.lost or self.doubled or self.unreadable or self.different)


@dataclass
class Bench:
    """One kind of victim, with its place to work and the undisturbed result in `whole`.

    `out` is what the program makes; `begun` says whether it is worth killing yet.
    """

    place: Path
    processes: int = 1
    figures: Figures = field(default_factory=Figures)

    name = ""

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True)
        self.out = self.place / "killed" / self.name
        self.out.parent.mkdir()
        whole = self.place / "whole" / self.name
        whole.parent.mkdir()
        for victim in self.start(whole, random.Random(0)):
            done = victim.wait(600)
            assert done.returncode == 0, done.stderr
        self.whole = whole

    def words(self, out: Path, draw: random.Random) -> list[str]:
        """The arguments of the program."""
        raise NotImplementedError

    def start(self, out: Path, draw: random.Random) -> Sequence[Victim]:
        return ranks(cli.main, self.words(out, draw), self.processes)

    def launch(self, draw: random.Random) -> Launched:
        return launch_program(["-m", "ldm_vae", *self.words(self.out, draw)], self.processes)

    def begun(self) -> bool:
        return True

    def look(self) -> None:
        """After a kill: what is there must be readable."""

    def compare(self) -> None:
        """After an end: the same as `whole`."""
        self.figures.different += tree(self.out) != tree(self.whole)

    def clear(self) -> None:
        """Make room for the next round."""
        shutil.rmtree(self.out.parent)
        self.out.parent.mkdir()


class Training(Bench):
    """40 updates with an adversary, a checkpoint every eighth; the log tells which images were seen."""

    name = "train"

    def words(self, out: Path, draw: random.Random) -> list[str]:
        images = self.place / "images"
        if not images.exists():
            write_images(images, 11)
        out.mkdir(exist_ok=True)
        config = write_config(out, images, train_batch_size=2 // self.processes)
        return [str(config), "--dataloader_num_workers", str(draw.choice([0, 0, 1]))]

    def start(self, out: Path, draw: random.Random) -> Sequence[Victim]:
        return ranks(training_program.main, self.words(out, draw), self.processes)

    def launch(self, draw: random.Random) -> Launched:
        return launch_program(["-m", "train.autoencoder", *self.words(self.out, draw)], self.processes)

    def look(self) -> None:
        said: list[str] = []
        checkpoint.newest(self.out / "run" / "checkpoints", said.append)
        self.figures.unreadable += len(said)

    def compare(self) -> None:
        ours, theirs = metrics(self.out / "run"), metrics(self.whole / "run")
        seen = [line["images"] for line in ours]
        self.figures.lost += len({line["images"] for line in theirs} - set(seen))
        self.figures.doubled += len(seen) - len(set(seen))
        files = [newest(folder / "run") / name for folder in (self.out, self.whole)
                 for name in ("tensors.safetensors", "state.json")]  # fmt: skip
        contents = [path.read_bytes() for path in files]
        vaes = [tree(folder / "run" / "vae") for folder in (self.out, self.whole)]
        self.figures.different += contents[:2] != contents[2:] or vaes[0] != vaes[1] or ours != theirs


class Encoding(Bench):
    """24 images, two of them bad, in units of four."""

    name = "encode"

    def words(self, out: Path, draw: random.Random) -> list[str]:
        images, vae = self.place / "images", self.place / "vae"
        if not images.exists():
            write_images(images, IMAGES)
            for number in (5, 17):
                (images / f"img_{number:04d}.png").write_bytes(b"no image")
            write_vae(vae)
        size = ["--resolution", "32", "--batch_size", "4", "--shard_size", "4"]
        return ["encode", str(vae), str(images), str(out), *size, "--num_workers", str(draw.choice([0, 0, 1]))]

    def expected(self) -> set[str]:
        """Keys of the samples that are sound."""
        return {path.name for path in (self.place / "images").iterdir() if path.stem[-4:] not in ("0005", "0017")}

    def look(self) -> None:
        if (self.out / "manifest.json").exists() and read_manifest(self.out).complete:
            self.figures.unreadable += len(verify(self.out))

    def compare(self) -> None:
        super().compare()
        data = LatentDataset(self.out, columns=("key",))
        keys = [data.row(index, ("key",))["key"] for index in range(len(data))]
        self.figures.lost += len(self.expected() - set(keys))
        self.figures.doubled += len(keys) - len(set(keys))


class EncodingClips(Encoding):
    """Eight films and images, one of them damaged: seven clips and two images, in units of two."""

    name = "encode_clips"

    def words(self, out: Path, draw: random.Random) -> list[str]:
        films, vae = self.place / "films", self.place / "vae"
        if not films.exists():
            write_films(films, 8, damaged=(4,))
            tiny("AutoencoderKLWan").save_pretrained(vae)
        size = ["--frames", "5", "--resolution", "16", "--batch_size", "4", "--shard_size", "2"]
        return ["encode", str(vae), str(films), str(out), *size, "--num_workers", str(draw.choice([0, 0, 1]))]

    def expected(self) -> set[str]:
        return {key for key in films_of(self.place / "films") if "_04" not in key}


class EncodingSounds(Encoding):
    """Six sounds, one of them damaged: three excerpts of each, the last one half silence, in units of two."""

    name = "encode_sounds"

    def words(self, out: Path, draw: random.Random) -> list[str]:
        sounds, vae = self.place / "sounds", self.place / "vae"
        if not sounds.exists():
            write_sounds(sounds, 6, samples=160)
            (sounds / "tone4.wav").write_bytes(b"no sound")
            tiny("AutoencoderOobleck", audio_channels=1, sampling_rate=8000).save_pretrained(vae)
        size = ["--excerpt", "64", "--batch_size", "4", "--shard_size", "2"]
        return ["encode", str(vae), str(sounds), str(out), *size, "--num_workers", str(draw.choice([0, 0, 1]))]

    def expected(self) -> set[str]:
        return {key for key in excerpts_of(self.place / "sounds", 160, 64) if "tone4" not in key}


class EncodingToABucket(Encoding):
    """The same straight to an object store (`loopback_s3.py`), compared with the bytes of a folder."""

    name = "encode_to_a_bucket"
    url = f"s3://{BUCKET}/torture"

    def start(self, out: Path, draw: random.Random) -> Sequence[Victim]:
        if out.parent.name == "whole":
            return super().start(out, draw)
        words = self.words(out, draw)
        words[words.index(str(out))] = self.url
        return ranks(impatient, words, self.processes)

    def look(self) -> None:
        """Fetch the objects; a claim that is left at the end is a difference."""
        shutil.rmtree(self.out, ignore_errors=True)
        files = fsspec.filesystem("s3")
        files.invalidate_cache()
        if files.exists(self.url):
            files.get(self.url, str(self.out), recursive=True)
        super().look()

    def compare(self) -> None:
        self.look()
        (self.whole / ownership.MARK).unlink(missing_ok=True)  # a folder's, which an object store has not
        super().compare()

    def clear(self) -> None:
        fsspec.filesystem("s3").rm(self.url, recursive=True)
        super().clear()


def impatient() -> None:
    """`ldm-vae` to whom a claim is nobody's after three seconds, as moto's clock shows whole ones."""
    ownership.LEASE_SECONDS, ownership.WAIT_SECONDS, claims.LONGEST_PAUSE = 3.0, 4.0, 0.02
    cli.main()


class Exporting(Bench):
    """A diffusers folder with its statistics measured, over an older export."""

    name = "export"

    def words(self, out: Path, draw: random.Random) -> list[str]:
        images, vae = self.place / "images", self.place / "vae"
        if not images.exists():
            write_images(images, 8)
            write_vae(vae)
        return ["export", str(vae), str(out), "--stats", str(images), "--resolution", "32"]

    def look(self) -> None:
        if self.out.exists():
            self.figures.unreadable += tree(self.out) != tree(self.whole)

    def compare(self) -> None:
        super().compare()
        self.figures.doubled += len(list(self.out.parent.iterdir())) - 1  # what the killed ones left

    def clear(self) -> None:
        """The older export stays: it is replaced in the next round."""


class Pushing(Exporting):
    """An export with its upload; the hub shows a commit or nothing of it."""

    name = "push"

    def words(self, out: Path, draw: random.Random) -> list[str]:
        Hub.reset()
        Hub.delay = 0.05  # an upload to an answering machine is too short to be killed in
        return [*super().words(out, draw), "--push_to_hub", "me/mine"]

    def start(self, out: Path, draw: random.Random) -> Sequence[Victim]:
        return ranks(online, self.words(out, draw), 1)

    def launch(self, draw: random.Random) -> Launched:
        alone = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return launch_program(["-m", "ldm_vae", *self.words(self.out, draw)], 1, alone)

    def begun(self) -> bool:
        return bool(Hub.paths)

    def look(self) -> None:
        super().look()
        self.figures.unreadable += Hub.received not in ({}, contents(self.whole))

    def compare(self) -> None:
        super().compare()
        self.figures.different += Hub.received != contents(self.out)


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a hub's repository, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def online() -> None:
    """`ldm-vae` in a child of a server that imported huggingface_hub while it was told to stay offline."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    cli.main()


def write_vae(folder: Path) -> None:
    """A tiny one. It is built once, here: with the weights that the seed of this process happens to give."""
    vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build()
    vae.register_to_config(scaling_factor=0.5)  # as if it had been measured
    vae.save_pretrained(folder)


KINDS = {
    "train": Training,
    "encode": Encoding,
    "encode_clips": EncodingClips,
    "encode_sounds": EncodingSounds,
    "encode_to_a_bucket": EncodingToABucket,
    "export": Exporting,
    "push": Pushing,
}
