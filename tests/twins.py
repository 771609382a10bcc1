"""Start everything twice at once and compare with what one launch makes.

    python -m tests.twins --rounds 20                    # from the root of the repo
    python -m tests.twins --rounds 100 --only encode update repair

Each round starts one writing verb twice, the second a random moment after the first, both as forked children that run
the real entry point. At least one of them must end well, the other well or with one sentence; what they leave must be
what one launch leaves, byte for byte where a verb is deterministic, and no mark of ownership may stay. The exit status
is 1 if anything was lost, doubled, unreadable or different.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # run with -m from the root, without pytest's `pythonpath`

import diffusion_runs
import prior_runs
import training_runs
from checksums import tree
from fork_server import Finished, fork
from images import write_images
from loopback_hub import Hub
from sound_files import excerpts_of, write_sounds
from tiny_classes import tiny
from victims import Figures, online, write_vae
from videos import films_of, write_films

from ldm_vae import cli
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core import ownership
from ldm_vae.core.request import Parser
from ldm_vae.data.source import open_source
from ldm_vae.latent_store import LatentDataset, read_manifest, verify, write_store
from tests.torture import FAULTS, place, table
from train import autoencoder, diffusion, prior

IMAGES, MORE = 12, 18
CROP = ["--resolution", "32"]
FIVE = ["--frames", "5"]
ONE = ["--batch_size", "4", "--shard_size", "4", "--num_workers", "0", "--encode_threads", "1"]
UNITS = [*CROP, *ONE]
CLIPS = ["--resolution", "16", *ONE]
SOUNDS = ["--excerpt", "64", *ONE]

PROBE = [*diffusion_runs.SMALL, "--train_images", "8", "--batch_size", "4", "--seeds", "1"]

Words = Callable[[Path, Path], Sequence[str]]
"""(folder of the materials, OUT) => the arguments of the program."""


def nothing(place: Path, out: Path) -> None:
    """OUT is absent."""


def copy_of(name: str) -> Callable[[Path, Path], None]:
    """OUT is a copy of one of the materials."""
    return lambda place, out: shutil.copytree(place / name, out) and None


def damaged_store(place: Path, out: Path) -> None:
    """OUT has lost tensors of one unit and the rows of another."""
    shutil.copytree(place / "updated", out)
    os.truncate(out / "shards" / "00000001.safetensors", 100)
    (out / "shards" / "00000002.parquet").unlink()


def store_is_sound(place: Path, out: Path, figures: Figures) -> None:
    """The images are there, once: all of them, or the first ones."""
    expected = sorted(path.name for path in (place / "more").iterdir())
    has(place, out, figures, set(expected if len(LatentDataset(out)) > IMAGES else expected[:IMAGES]))


def has(place: Path, out: Path, figures: Figures, expected: set[str]) -> None:
    """Each of these keys once, every file as the manifest says."""
    figures.unreadable += len(verify(out)) + (not read_manifest(out).complete)
    data = LatentDataset(out, columns=("key",))
    keys = [data.row(index, ("key",))["key"] for index in range(len(data))]
    figures.lost += len(expected - set(keys))
    figures.doubled += len(keys) - len(set(keys))


def clips_are_sound(place: Path, out: Path, figures: Figures) -> None:
    """The clips of all films are there, once."""
    has(place, out, figures, set(films_of(place / "films")))


def excerpts_are_sound(place: Path, out: Path, figures: Figures) -> None:
    """The excerpts of all sounds are there, once."""
    has(place, out, figures, set(excerpts_of(place / "sounds", 160, 64)))


def nothing_more(place: Path, out: Path, figures: Figures) -> None:
    """The comparison with one launch's OUT is enough."""


@dataclass(frozen=True)
class Twin:
    """A writing verb that is started twice."""

    words: Words
    other: Words | None = None
    """The second launch's arguments, where they differ: what is left must be sound, and may be either's."""
    begin: Callable[[Path, Path], None] = nothing
    check: Callable[[Path, Path, Figures], None] = nothing_more
    main: Callable[[], object] = cli.main
    equal: tuple[str, ...] = ("",)
    """Beginnings of the names in OUT that no launch may make differently (others hold times or commands)."""


def encode(place: Path, out: Path, images: str = "images", *more: str) -> list[str]:
    return ["encode", str(place / "vae"), str(place / images), str(out), *UNITS, *more]


def encode_clips(place: Path, out: Path, films: str = "films", *more: str) -> list[str]:
    return ["encode", str(place / "wan"), str(place / films), str(out), *CLIPS, *FIVE, *more]


def encode_sounds(place: Path, out: Path, sounds: str = "sounds", *more: str) -> list[str]:
    return ["encode", str(place / "oobleck"), str(place / sounds), str(out), *SOUNDS, *more]


def convert(place: Path, out: Path, *flags: str) -> list[str]:
    return ["store", "convert", str(place / "store"), str(out), *flags]


TWINS = {
    "encode": Twin(encode, check=store_is_sound),
    "encode, other batches": Twin(
        encode, lambda place, out: [*encode(place, out), "--batch_size", "3"], check=store_is_sound, equal=()
    ),
    "update": Twin(lambda p, out: encode(p, out, "more", "--update"), begin=copy_of("store"), check=store_is_sound),
    "update and encode": Twin(
        lambda p, out: encode(p, out, "more", "--update"), lambda p, out: encode(p, out, "more"),
        begin=copy_of("store"), check=store_is_sound,
    ),
    "repair": Twin(
        lambda p, out: ["store", "repair", str(out), "--vae", str(p / "vae"), "--data", str(p / "more")],
        begin=damaged_store, check=store_is_sound, equal=("shards", "manifest.json"),
    ),
    "repair and update": Twin(
        lambda p, out: encode(p, out, "more", "--update"),
        lambda p, out: ["store", "repair", str(out), "--vae", str(p / "vae"), "--data", str(p / "images")],
        begin=copy_of("store"), check=store_is_sound,
    ),
    "merge": Twin(lambda p, out: ["store", "merge", str(p / "store"), str(p / "others"), str(out)]),
    "encode clips": Twin(encode_clips, check=clips_are_sound),
    "update clips": Twin(
        lambda p, out: encode_clips(p, out, "films", "--update"), begin=copy_of("few_clips"), check=clips_are_sound
    ),
    "merge clips": Twin(
        lambda p, out: ["store", "merge", str(p / "few_clips"), str(p / "more_clips"), str(out)], check=clips_are_sound
    ),
    "encode sounds": Twin(encode_sounds, check=excerpts_are_sound),
    "update sounds": Twin(
        lambda p, out: encode_sounds(p, out, "sounds", "--update"), begin=copy_of("few_sounds"),
        check=excerpts_are_sound,
    ),
    "merge sounds": Twin(
        lambda p, out: ["store", "merge", str(p / "few_sounds"), str(p / "more_sounds"), str(out)],
        check=excerpts_are_sound,
    ),
    "split": Twin(lambda p, out: ["store", "split", str(p / "store"), str(out), "--parts", "2"]),
    "to parquet": Twin(lambda p, out: convert(p, out, "--to", "parquet")),
    "to webdataset": Twin(lambda p, out: convert(p, out, "--to", "webdataset")),
    "to lightningdit": Twin(lambda p, out: convert(p, out, "--to", "lightningdit")),
    "to kohya": Twin(lambda p, out: convert(p, out, "--to", "kohya", "--model", "sd"), equal=()),
    "from parquet": Twin(
        lambda p, out: ["store", "convert", str(p / "parquet"), str(out), "--from", "parquet"], check=store_is_sound
    ),
    "push": Twin(lambda p, out: ["store", "push", str(p / "store"), "me/twins"], main=online),
    "pull": Twin(lambda p, out: ["store", "pull", "me/latents", str(out)], main=online),
    "export": Twin(
        lambda p, out: ["export", str(p / "vae"), str(out), "--stats", str(p / "images"), *CROP], equal=("diff", "conf")
    ),
    "export to a file": Twin(
        lambda p, out: ["export", str(p / "vae"), f"{out}.safetensors", "--target", "comfyui"]
    ),
    "fp16 fix": Twin(lambda p, out: ["fp16", "fix", str(p / "vae"), str(out), *CROP]),
    "decode": Twin(lambda p, out: ["decode", str(p / "store"), str(out), "--vae", str(p / "vae")]),
    "reconstruct": Twin(
        lambda p, out: ["reconstruct", str(p / "vae"), str(p / "images" / "img_0000.png"), str(out)]
    ),
    "evaluate": Twin(
        lambda p, out: ["evaluate", str(p / "vae"), str(p / "images"), "--output", str(out), *CROP,
                        "--metrics", "psnr,ssim", "--num_workers", "0"],
        equal=("images.jsonl", "pictures", "samples"),
    ),
    "latent_space": Twin(
        lambda p, out: ["latent_space", str(p / "vae"), str(p / "images"), "--output", str(out), *CROP,
                        "--num_workers", "0", "--bank", "8", "--likelihood_images", "2"],
        equal=("latent_space/",),
    ),
    "report": Twin(
        lambda p, out: ["report", str(out)], begin=copy_of("evaluated")
    ),
    "digits": Twin(lambda p, out: ["assets", "digits", str(out)]),
    "demo": Twin(lambda p, out: ["assets", "demo", str(out)]),
    "inspect": Twin(lambda p, out: ["inspect", str(p / "images"), "--thumbnails", f"{out}.png", "--num_workers", "0"]),
    "probe": Twin(
        lambda p, out: ["probe", str(p / "vae"), str(p / "images"), "--output", str(out), *PROBE], equal=("stores",)
    ),
    "train": Twin(
        lambda p, out: [str(config(p, out, training_runs.write_config, p / "images", max_train_images=16))],
        main=autoencoder.main, equal=("run/vae/diffusion", "run/checkpoints/images-000000016/tensors"),
    ),
    "diffuse": Twin(
        lambda p, out: [str(config(p, out, diffusion_runs.write_config, p / "store", max_train_images=16))],
        main=diffusion.main, equal=("run/denoiser/diff",),
    ),
    "prior": Twin(
        lambda p, out: [str(config(p, out, prior_runs.write_config, p / "codes" / "indices", max_train_images=16))],
        main=prior.main, equal=("run/prior/diff",),
    ),
}  # fmt: skip


def config(place: Path, out: Path, write: Callable[..., Path], data: Path, **changes: object) -> Path:
    """The run folder is OUT/run."""
    out.mkdir(exist_ok=True)
    return write(out, data, **changes)


def make_materials(place: Path) -> None:
    """Images, a VAE, stores of it, and what other verbs take."""
    write_images(place / "more", MORE)
    shutil.copytree(place / "more", place / "images")
    for path in sorted((place / "images").iterdir())[IMAGES:]:
        path.unlink()
    (place / "rest").mkdir()
    for path in sorted((place / "more").iterdir())[IMAGES:]:
        shutil.copy(path, place / "rest")
    write_vae(place / "vae")
    vae = load_autoencoder(str(place / "vae"))
    size = {"resolution": 32, "batch_size": 4, "shard_size": 4, "vae_name": str(place / "vae")}
    for name, data in (("store", "images"), ("others", "rest"), ("updated", "images")):
        source = open_source(place / data)
        write_store(vae, source, place / name, source_name=str(place / data), **size)
    source = open_source(place / "more")
    write_store(vae, source, place / "updated", source_name=str(place / "more"), **size, update=True)
    write_films(place / "films", 6)
    tiny("AutoencoderKLWan").save_pretrained(place / "wan")
    write_sounds(place / "sounds", 5, samples=160)
    tiny("AutoencoderOobleck", audio_channels=1, sampling_rate=8000).save_pretrained(place / "oobleck")
    for files, made, words in (("films", "clips", encode_clips), ("sounds", "sounds", encode_sounds)):
        for number, path in enumerate(sorted((place / files).iterdir())):
            half = place / f"{'few' if number < 3 else 'more'}_{files}_data"
            half.mkdir(exist_ok=True)
            shutil.copy(path, half)
        for half in ("few", "more"):
            once(cli.main, words(place, place / f"{half}_{made}", f"{half}_{files}_data"))
    (place / "codes").mkdir()
    prior_runs.write_materials(place / "codes")
    once(cli.main, convert(place, place / "parquet", "--to", "parquet"))
    once(cli.main, TWINS["evaluate"].words(place, place / "evaluated"))
    once(online, ["store", "push", str(place / "store"), "me/latents"])


def once(main: Callable[[], object], words: Sequence[str]) -> None:
    done = fork(main, words).wait(600)
    assert done.returncode == 0, done.stderr


@dataclass
class Pair:
    """One verb with its place to work and what one launch makes of it."""

    name: str
    place: Path

    def __post_init__(self) -> None:
        self.twin, self.figures, self.longest = TWINS[self.name], Figures(), 1.0
        self.work = self.place / f"pair-{self.name.replace(' ', '-')}"
        self.whole = self.work / "whole" / "out"
        self.whole.parent.mkdir(parents=True)
        self.twin.begin(self.place, self.whole)
        once(self.twin.main, self.twin.words(self.place, self.whole))

    def round(self, draw: random.Random) -> None:
        """Two launches; whoever was refused runs again, as its user would."""
        twin, out = self.twin, self.work / "twice" / "out"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        twin.begin(self.place, out)
        both = [twin.words(self.place, out), (twin.other or twin.words)(self.place, out)]
        draw.shuffle(both)
        begun = time.monotonic()
        first = fork(twin.main, both[0])
        time.sleep(draw.uniform(0.0, self.longest) * draw.choice([0.0, 1.0]))
        done = [child.wait(600) for child in (fork(twin.main, both[1]), first)]
        self.longest = max(0.1, 0.5 * self.longest + 0.25 * (time.monotonic() - begun))
        self.figures.programs += 2
        self.figures.unreadable += sum(not ended_well(one) for one in done)
        self.figures.unreadable += all(one.returncode != 0 for one in done)
        if twin.other is not None:  # either may have come first: both once more, one after the other
            for words in both[::-1] if twin.words(self.place, out) == both[0] else both:
                self.figures.unreadable += fork(twin.main, words).wait(600).returncode != 0
        self.figures.finished += 1
        twin.check(self.place, out, self.figures)
        self.figures.different += self.chosen(out.parent) != self.chosen(self.whole.parent)
        left = [path for path in out.parent.rglob(".*") if ownership.is_mark(path) and path.name != ownership.MARK]
        self.figures.unreadable += len(left)

    def chosen(self, parent: Path) -> dict[str, str]:
        """Checksums of the files that must be equal, of everything in OUT or named after it; not of the sightings
        beside a store, which hold when a file was seen."""
        files = {name: checksum for name, checksum in tree(parent).items() if ".seen/" not in name}
        everything = {name.removeprefix("out/"): checksum for name, checksum in files.items()}
        return {name: checksum for name, checksum in everything.items() if name.startswith(self.twin.equal)}


def ended_well(done: Finished) -> bool:
    """0, or one sentence that says why not."""
    if done.returncode == 0:
        return True
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    sound = len(sentences) == 1 and done.returncode in (1, 2) and "Traceback" not in done.stderr
    if not sound:
        print(done.stderr, file=sys.stderr)
    return sound


COLUMNS = {"finished": "rounds", "programs": "launches", **FAULTS}


def main(arguments: Sequence[str] | None = None) -> dict[str, Figures]:
    parser = Parser(prog="python -m tests.twins", description=__doc__)
    parser.add_argument("--rounds", type=int, required=True, help="times that each verb is started twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(TWINS), default=tuple(TWINS), metavar="VERB")
    chosen = parser.parse_args(arguments)
    begun, draw = time.monotonic(), random.Random(chosen.seed)
    figures: dict[str, Figures] = {}
    with place() as folder:
        Hub.reset()
        make_materials(folder)
        for name in chosen.only:
            pair = Pair(name, folder)
            for _ in range(chosen.rounds):
                pair.round(draw)
            figures[name] = pair.figures
            print(f"{name}: {pair.figures}", flush=True)
    print(table(figures, COLUMNS))
    sound = all(one.sound for one in figures.values())
    print(f"{time.monotonic() - begun:.0f} s: {'nothing lost' if sound else 'FAILED'}")
    return figures


if __name__ == "__main__":
    sys.exit(not all(one.sound for one in main().values()))
