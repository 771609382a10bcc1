"""Mutate one file that a verb reads, and see that the verb ends in a result or in one sentence.

    python -m tests.fuzz --cases 2000                    # from the root of the repo
    python -m tests.fuzz --cases 50 --only report resume --seed 7

A case is a verb, a file among those that its arguments name, and a mutation of that file: of its structure where it is
JSON, JSON lines, YAML, safetensors or parquet (a value of another type, a huge one, NaN, a path that leads out, a key
that is gone), else of its bytes. Each runs the real entry point in a forked child on a copy of the materials. The exit
status must be 0, 1 or 2, with one `error:` line unless it is 0, no traceback, within SECONDS. A case is named by its
seed and number and can be run alone (`--seed 7 --first 31 --cases 1`). The exit status is 1 if any was found.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # run with -m from the root, without pytest's `pythonpath`

import image_files
import pyarrow as pa
import pyarrow.parquet
import training_runs
import yaml
from fork_server import fork
from PIL import Image
from videos import frame, write_video

from ldm_vae import cli
from ldm_vae.core.request import Parser
from tests.torture import place
from tests.twins import CROP, FIVE, TWINS, UNITS, Twin, config, encode_clips, ended_well, make_materials, once
from train import autoencoder

SECONDS = 120.0
KINDS = ("list", "tar", "zip", "parquet")
NOT_OF_FILES = ("push", "pull", "demo", "digits")  # of the twins: these read none of ours, or need a hub
DECODER_ONLY = {"max_train_images": 4, "losses": {"l1": {}}, "adversary": {}, "trainable": ["decoder.*"]}


def convert(place: Path, out: Path, *flags: str) -> list[str]:
    return ["store", "convert", str(place / "clips"), str(out), *flags]


def on_clips(place: Path, out: Path) -> list[str]:
    """A config that trains the decoder of clips on four of them."""
    out.mkdir(exist_ok=True)
    data = {"kind": "folder", "path": str(place / "films"), "frames": 5, "frame_rate": 12.5, "frame_stride": 1}
    own = {
        **DECODER_ONLY,
        "init_from": str(place / "wan"),
        "data": data,
        "resolution": 16,
        "model": {"kind": "pretrained"},
    }
    # a mutation can take the resolution away, and that of the network is larger
    return [str(training_runs.write_config(out, place / "films", **own)), "--max_train_images", "4"]


def make_clips(folder: Path) -> None:
    """Beside the films of the twins videos of other containers, frames in folders, a store of them, and that as a
    cache."""
    for name, codec in (("a.mp4", "libx264"), ("b.webm", "libvpx-vp9"), ("c.ts", "libx264")):
        write_video(folder / "films" / name, 10, (16, 24), codec=codec)
    pictures = [Image.fromarray(frame(number, (16, 24))) for number in range(6)]
    pictures[0].save(folder / "films" / "d.gif", save_all=True, append_images=pictures[1:], duration=80)
    for number, picture in enumerate(pictures):
        (folder / "folders" / "walk").mkdir(parents=True, exist_ok=True)
        picture.save(folder / "folders" / "walk" / f"{number}.png")
    once(cli.main, VERBS["encode clips"].words(folder, folder / "clips"))
    once(cli.main, VERBS["to musubi"].words(folder, folder / "musubi"))


def old_run(place: Path, out: Path) -> None:
    """OUT/run is a training run that has come to its half."""
    shutil.copytree(place / "trained", out)
    shutil.rmtree(out / "run" / "vae")
    record = out / "run" / "config.yaml"  # a run is taken up by the config that it began with
    settings = yaml.safe_load(record.read_text())
    settings["output_dir"], settings["data"]["path"] = str(out / "run"), str(place / "images")
    record.write_text(yaml.safe_dump(settings))


def reading(verb: str, *flags: str, data: str = "images") -> Twin:
    """A verb that takes VAE and DATA."""
    return Twin(lambda p, out: [*verb.split(), str(p / "vae"), str(p / data), *flags])


VERBS = {
    **{name: twin for name, twin in TWINS.items() if twin.other is None and name not in NOT_OF_FILES},
    "verify": Twin(lambda p, out: ["store", "verify", str(p / "store")]),
    "stats": Twin(lambda p, out: ["store", "stats", str(p / "store")]),
    "resume": Twin(
        lambda p, out: [str(config(p, out, training_runs.write_config, p / "images", max_train_images=16))],
        begin=old_run, main=autoencoder.main,
    ),
    "export of a run": Twin(lambda p, out: ["export", str(p / "trained" / "run"), str(out)]),
    "report of a run": Twin(lambda p, out: ["report", str(p / "trained" / "run")]),
    "from a store": Twin(
        lambda p, out: [str(config(p, out, training_runs.write_config, p / "images", **DECODER_ONLY,
                                   latent_store=str(p / "store"), init_from=str(p / "vae")))],
        main=autoencoder.main,
    ),
    "drift": Twin(lambda p, out: ["drift", str(p / "vae"), str(p / "vae"), str(p / "images"), *CROP]),
    "tiling": reading("tiling", "--tile", "32", data="images/img_0000.png"),
    "fp16 audit": reading("fp16 audit", *CROP),
    "inspect clips": Twin(lambda p, out: ["inspect", str(p / "films"), *FIVE, "--thumbnails", f"{out}.png"]),
    "encode frames": Twin(lambda p, out: encode_clips(p, out, "folders", "--kind", "frames")),
    "decode clips": Twin(lambda p, out: ["decode", str(p / "clips"), str(out), "--vae", str(p / "wan")]),
    "to musubi": Twin(lambda p, out: convert(p, out, "--to", "musubi", "--model", "wan")),
    "from musubi": Twin(lambda p, out: ["store", "convert", str(p / "musubi"), str(out), "--from", "musubi"]),
    "train on clips": Twin(on_clips, main=autoencoder.main),
    **{f"encode {kind}": Twin(lambda p, out, kind=kind: [  # type: ignore[misc]
        "encode", str(p / "vae"), str(p / "sources" / NAMES[kind]), str(out), *UNITS]) for kind in KINDS},
    **{f"inspect {kind}": Twin(lambda p, out, kind=kind: [  # type: ignore[misc]
        "inspect", str(p / "sources" / NAMES[kind]), "--thumbnails", f"{out}.png"]) for kind in KINDS},
}  # fmt: skip
NAMES: dict[str, str] = {}  # kind of source => its file below sources/

# --- mutations --------------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, -1, 0, 0.5, 2**70, -(2**63), 1e308, float("nan"), float("inf"), "", "x", "\x1b[31mred", "a\x00b", "7",
    "\ud800", "../../../etc/passwd", "/etc/passwd", "é" * 5000, [], [[]], [None], {}, {"kind": "os"},
]  # fmt: skip


def mutate(value: Any, draw: random.Random) -> Any:
    """One place of a tree of JSON, with another value, without it, or twice."""
    inner: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    if not inner or draw.random() < 0.15:
        return draw.choice(ODD)
    value, key = value.copy(), draw.choice(inner)
    action = draw.random()
    if action < 0.15:
        del value[key]
    elif action < 0.25 and isinstance(value, list):
        value.append(value[key])
    elif action < 0.25:
        value[draw.choice(["unknown", "", "../x", "\x1b[2J"])] = value[key]
    else:
        value[key] = mutate(value[key], draw)
    return value


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    return json.dumps(mutate(json.loads(content), draw)).encode()


def mutate_yaml(content: bytes, draw: random.Random) -> bytes:
    return yaml.safe_dump(mutate(yaml.safe_load(content), draw), allow_unicode=True).encode(errors="surrogatepass")


def mutate_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    chosen = draw.randrange(len(lines))
    lines[chosen] = json.dumps(mutate(json.loads(lines[chosen]), draw)).encode() + b"\n"
    return b"".join(lines)


def mutate_header(content: bytes, draw: random.Random) -> bytes:
    """The JSON of a safetensors file, tensors left as they are."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(mutate(json.loads(content[8:end]), draw)).encode()
    return len(header).to_bytes(8, "little") + header + content[end:]


def mutate_table(content: bytes, draw: random.Random) -> bytes:
    """A parquet file with a column of another type, without it, or with other values."""
    table = pa.parquet.read_table(pa.BufferReader(content))
    index = draw.randrange(table.num_columns)
    name, rows = table.column_names[index], table.num_rows
    other = draw.choice([
        pa.nulls(rows), pa.array([draw.choice([0, -1, 2**62])] * rows), pa.array([float("nan")] * rows),
        pa.array([draw.choice(["", "x", "../../x", "\x1b[2J"])] * rows), pa.array([[1]] * rows),
        pa.Array.from_buffers(pa.string(), rows, pa.array([b"\xff\xfe"] * rows).buffers()),
        pa.array([{"a": 1}] * rows), pa.array([b"\xff"] * rows), pa.array([0] * rows, pa.timestamp("us", "UTC")), None,
    ])  # fmt: skip
    changed = table.remove_column(index) if other is None else table.set_column(index, name, other)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(changed, sink)
    return bytes(sink.getvalue())


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    cut = draw.randrange(len(content) + 1)
    return draw.choice([
        b"", content[:cut], content[cut:], content[:cut] + b"\x00" * 64, content + content,
        content[:cut] + draw.randbytes(8) + content[cut + 8 :],
        b"\xff\xfe" + content, b"[" * 100_000, b"version https://git-lfs.github.com/spec/v1\n",
    ])  # fmt: skip


def mutate_file(path: Path, draw: random.Random) -> str:
    """Mutate a file in its place; what was done, in words."""
    content = path.read_bytes()
    structured: dict[str, Callable[[bytes, random.Random], bytes]] = {
        ".json": mutate_json,
        ".yaml": mutate_yaml,
        ".jsonl": mutate_lines,
        ".safetensors": mutate_header,
        ".parquet": mutate_table,
    }
    change = structured.get(path.suffix, mutate_bytes)
    what = draw.random()
    if what < 0.04:
        path.unlink()
        return "gone"
    if what < 0.08:
        path.unlink()
        path.mkdir()
        return "a folder"
    change = mutate_bytes if what < 0.3 or not content else change
    try:
        path.write_bytes(change(content, draw))
    except (ValueError, pa.ArrowException):  # damaged already: a shard for `repair`
        path.write_bytes(mutate_bytes(content, draw))
    return change.__name__


# --- cases ------------------------------------------------------------------------------------------------------------


def make_all(folder: Path) -> None:
    """Materials of the twins, a run that has come to its half, and the images as other kinds of source."""
    make_materials(folder)
    (folder / "trained").mkdir()
    path = training_runs.write_config(
        folder / "trained", folder / "images", max_train_images=8, checkpoint_every_images=8
    )
    once(autoencoder.main, [str(path)])
    make_clips(folder)
    sources = folder / "sources"
    for kind in KINDS:
        NAMES[kind] = str(image_files.write(kind, sources / kind, image_files.pictures()).relative_to(sources))
    # of the twins that is known: a verb that refuses what is whole would be silent about every mutation
    for name, twin in VERBS.items():
        if name not in TWINS:
            out = folder / "made" / "out"
            out.parent.mkdir()
            twin.begin(folder, out)
            once(twin.main, [str(word) for word in twin.words(folder, out)])
            shutil.rmtree(out.parent)


def files_of(words: Sequence[str], folder: Path) -> list[Path]:
    """Files that the arguments of a program name: themselves, and all in folders."""
    named = [Path(word) for word in words if word.startswith(str(folder))]
    found = [file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [file for file in found if file.is_file()]


@dataclass
class Case:
    """Outcome of one mutated file."""

    verb: str
    file: str
    change: str
    status: int
    found: str = ""


def run_case(name: str, materials: Path, work: Path, draw: random.Random) -> Case:
    twin, folder = VERBS[name], work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(materials, folder, symlinks=True)
    out = folder / "made" / "out"
    out.parent.mkdir()
    twin.begin(folder, out)
    words = [str(word) for word in twin.words(folder, out)]
    if words[0].endswith(".yaml") and words[1:] == []:
        words += ["--max_train_images", "16"]  # a config without the line trains for days, as it says
    if not (files := files_of([*words, str(out)], folder)):
        raise AssertionError(f"{name} reads no file")
    # by the ending first: a folder has twenty images and one manifest
    ending = draw.choice(sorted({file.suffix for file in files}))
    file = draw.choice([file for file in files if file.suffix == ending])
    case = Case(name, str(file.relative_to(folder)), mutate_file(file, draw), -1)
    child = fork(twin.main, words, where=folder)  # what a relative path makes lies there
    try:
        done = child.wait(SECONDS)
    except TimeoutError:
        case.found = f"not ended after {SECONDS:.0f} s"
        return case
    case.status = done.returncode
    if not ended_well(done):
        case.found = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return case


def fuzz(folder: Path, *, cases: int, seed: int, first: int, only: Sequence[str]) -> list[Case]:
    """Each case draws from its own generator: it can be run without those before it."""
    materials = folder / "materials"
    materials.mkdir()
    make_all(materials)
    done = []
    for number in range(first, first + cases):
        draw = random.Random(f"{seed} {number}")
        done.append(run_case(only[number % len(only)], materials, folder, draw))
        if done[-1].found:
            print(f"--seed {seed} --first {number} --cases 1: {done[-1]}", flush=True)
    return done


def main(arguments: Sequence[str] | None = None) -> list[Case]:
    parser = Parser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", nargs="+", choices=tuple(VERBS), default=tuple(VERBS), metavar="VERB")
    chosen = parser.parse_args(arguments)
    begun = time.monotonic()
    with place() as folder:
        done = fuzz(folder, cases=chosen.cases, seed=chosen.seed, first=chosen.first, only=chosen.only)
    for verb in chosen.only:
        of_verb = [case for case in done if case.verb == verb]
        statuses = ", ".join(
            f"{count} of {status}" for status, count in sorted(Counter(c.status for c in of_verb).items())
        )
        print(f"{verb:22} {len(of_verb):5} cases, status {statuses}; {sum(bool(case.found) for case in of_verb)} found")
    print(f"{time.monotonic() - begun:.0f} s, {len(done)} cases, {sum(bool(case.found) for case in done)} found")
    return done


if __name__ == "__main__":
    sys.exit(any(case.found for case in main()))
