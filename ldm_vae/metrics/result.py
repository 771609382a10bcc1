"""Results of an evaluation: metrics.json (its form is metrics.schema.json) and tables to read."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_vae import __version__
from ldm_vae.autoencoder.fingerprint import decoder_fingerprint, encoder_fingerprint
from ldm_vae.autoencoder.geometry import downsampling_factor, image_channels, latent_channels
from ldm_vae.autoencoder.lengths import lengths_of
from ldm_vae.autoencoder.normalisation_law import law_in_words
from ldm_vae.autoencoder.trainable import count_parameters
from ldm_vae.autoencoder.weights.checkpoint import is_checkpoint
from ldm_vae.core import atomic_io
from ldm_vae.core.files import LARGEST, read_bytes
from ldm_vae.core.programs import words_of
from ldm_vae.core.validation import as_written, parse_json
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.transforms import PREPROCESSING_VERSION
from ldm_vae.metrics.evaluate import Evaluation
from ldm_vae.metrics.protocol import Protocol
from ldm_vae.metrics.ranks import world_size
from ldm_vae.metrics.sounds import bits_per_second
from ldm_vae.metrics.titles import heading, measured, number

Json = dict[str, Any]

LINEAR = "a linear code of this size"


def labels(vaes: Sequence[str]) -> list[str]:
    """A short name for each VAE, numbered where two would be called the same."""
    names: list[str] = []
    for vae in vaes:
        path = Path(vae)
        name = (
            path.parent.name if path.name == "vae" and path.parent.name else path.stem if path.is_file() else path.name
        )
        if is_checkpoint(path):
            name = f"{path.resolve().parents[1].name}-{name}"
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def describe_vae(vae: Any, name: str, source: str, frames: int | None = None) -> Json:
    """Identity and size of the VAE that was measured, on clips of so many frames."""
    of_clips = {} if frames is None else {"latent_frames": lengths_of(vae).latent_frames(frames)}
    return of_clips | {
        "name": name,
        "source": source,
        "class": type(vae).__name__,
        "encoder_fingerprint": encoder_fingerprint(vae),
        "decoder_fingerprint": decoder_fingerprint(vae),
        "parameters": count_parameters(vae.parameters()),
        "downsampling_factor": downsampling_factor(vae),
        "image_channels": image_channels(vae),
        "latent_channels": latent_channels(vae),
        "normalisation": law_in_words(vae),
        "scaling_factor": vae.config.get("scaling_factor") or None,  # 0: of a checkpoint, never measured
    }


def result(
    protocol: Protocol, vae: Json, data: Json, computed: Json, evaluation: Evaluation, key_of: Callable[[int], str]
) -> Json:
    """The object of metrics.json.

    Args:
        vae: from `describe_vae`.
        data: where the images came from, and how they were decoded: source, quarantined, preprocessing,
            and `about_signal`.
        computed: from `settings`.
        key_of: the key of an image by its index, for the worst ones.
    """
    return {
        "protocol": protocol.to_json(),
        "vae": vae,
        "data": {
            **data,
            "images": evaluation.images,
            "checksum": evaluation.checksum,
            **({"all_frames": evaluation.frames} if "clips" in data else {}),
        },
        "metrics": {name: summary.to_json() for name, summary in evaluation.metrics.items()},
        **({"by_frame": _by_frame(evaluation)} if evaluation.by_frame else {}),
        **(
            {"linear_code": {name: summary.to_json() for name, summary in evaluation.linear.items()}}
            if evaluation.linear
            else {}
        ),
        **({"codes": _codes(vae, data, evaluation.codes)} if evaluation.codes else {}),
        "worst": [
            {"key": key_of(index), "index": index, evaluation.worst_by: value} for index, value in evaluation.worst
        ],
        "latents": evaluation.latents,
        "settings": computed,
        "versions": versions(),
    }


def _by_frame(evaluation: Evaluation) -> Json:
    return {name: [one.to_json() for one in found] for name, found in evaluation.by_frame.items()}


def about_signal(decoding: Decoding, resolution: int) -> Json:
    """Size of what was measured, for `data`: the resolution, of clips also frames, their rate (None: the video's own)
    and stride; of sounds rate, channels and samples of an excerpt."""
    if decoding.signal == "audio":
        return {"sounds": {name: getattr(decoding, name) for name in ("sample_rate", "channels", "samples")}}
    clips = {"frames": decoding.frames, "rate": decoding.frame_rate, "stride": decoding.frame_stride}
    return {"resolution": resolution, **({} if decoding.frames is None else {"clips": clips})}


def _codes(vae: Json, data: Json, use: Sequence[Json]) -> Json:
    """The use of codes: of each codebook codes, used and dead ones, entropy and perplexity; of sounds bits per second,
    as they are counted and as their entropy, code by code, would have them."""
    books = [
        {name: book[name] for name in ("codes", "count", "used", "dead", "entropy_bits", "perplexity")} for book in use
    ]
    if "sounds" not in data:
        return {"codebooks": books}
    rate, hop = data["sounds"]["sample_rate"], vae["downsampling_factor"]
    entropy = rate / hop * sum(book["entropy_bits"] for book in books)
    spent = bits_per_second(rate, hop, [book["codes"] for book in books])
    return {"codebooks": books, "bits_per_second": spent, "entropy_bits_per_second": entropy}


def command(program: str) -> Json:
    """The call that this process is, for `settings`; `program`: the module that was run."""
    return {"command": shlex.join([*words_of(program), *sys.argv[1:]])}


def settings(device: torch.device, batch_size: int) -> Json:
    """Settings of the computation: equal settings give equal bits, others equality to rounding."""
    return {
        "device": device.type,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
    }


def versions() -> dict[str, str]:
    """Versions of all packages that a number may depend on."""
    packages = ("torch", "torchvision", "diffusers", "lpips", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    for name in ("soundfile", "soxr", "torchaudio", "torchmetrics", "pystoi", "pesq"):  # of sounds, where they are
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"ldm-vae": __version__, "python": platform.python_version()} | found


def write(path: Path, content: Any) -> None:
    """JSON (or a text as it is), whole or not at all. Raises ValueError for NaN and infinity, which are not JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_io.replace(path, atomic_io.data(text.encode()))


def update(path: Path, content: Json) -> None:
    """Write an object's fields beside those that the file has. Raises WorkError where that cannot be read."""
    with as_written(path):
        before = parse_json(read_bytes(path)) if path.is_file() else {}
        write(path, before | content)


def read(path: Path) -> list[Json]:
    """The results of a metrics.json: one or several."""
    with as_written(path):
        found = parse_json(read_bytes(path, LARGEST))
    return found if isinstance(found, list) else [found]


def table(results: Sequence[Json]) -> list[list[str]]:
    """Rows of cells, headings first: one row a metric, one column a VAE, each with its interval."""
    titles = measured(results)
    rows = [["metric", *(found["vae"]["name"] for found in results)]]
    for name, shown in titles.items():
        cells = [_cell(name, found["metrics"].get(name)) for found in results]
        rows.append([f"{heading(name)} {'↑' if shown.better == 'higher' else '↓'}", *cells])
    for name in titles:
        floors = [found.get("linear_code", {}).get(name) for found in results]
        if any(floors):
            rows.append([f"{heading(name)} of {LINEAR}", *(_cell(name, floor) for floor in floors)])
    for name, words in (("used", "codes used, of all"), ("bits_per_second", "bits per second of the codes")):
        cells = [_of_codes(found.get("codes"), name) for found in results]
        rows += [[words, *cells]] if any(cell != "-" for cell in cells) else []
    rows.append([noun(results[0]["data"]), *(f"{found['data']['images']:,}" for found in results)])
    return rows


def _of_codes(codes: Json | None, name: str) -> str:
    if codes is None or name not in ("used", *codes):
        return "-"
    if name != "used":
        return f"{codes[name]:,.0f}"
    used, there = (sum(book[of] for book in codes["codebooks"]) for of in ("used", "codes"))
    return f"{used:,} of {there:,}"


def _cell(name: str, summary: Json | None) -> str:
    if summary is None:
        return "-"
    if summary["mean"] is None:
        return str(summary.get("note", "-"))
    interval = summary["ci95"]
    half = f" ± {number(name, (interval[1] - interval[0]) / 2)}" if interval else ""
    return number(name, summary["mean"]) + half


def markdown(results: Sequence[Json]) -> str:
    """The table for a README or an issue, with what it takes to compare it."""
    heads, *rows = table(results)
    lines = [f"| {' | '.join(heads)} |", f"|---{'|---:' * (len(heads) - 1)}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    first = results[0]
    protocol, data = first["protocol"], first["data"]
    compared = (
        "samples as they are decoded"
        if "sounds" in data
        else f"{data['resolution']} px centre crops, 8-bit images ({protocol['rounding']})"
    )
    lines.append(
        f"\nMean ± half of the 95 % interval over {noun(data)}{in_words(data)}. Protocol {protocol['name']} "
        f"{protocol['version']}: {protocol['posterior']} of the posterior, {compared}. Data {data['source']}, checksum "
        f"{data['checksum'][:12]}."
        f"{how_decoded(data)}"
    )
    return "\n".join(lines) + "\n"


def noun(data: Json) -> str:
    """Noun of what was measured: clips, sounds, or images."""
    return "clips" if "clips" in data else "sounds" if "sounds" in data else "images"


def in_words(data: Json) -> str:
    """Description of the clips or sounds, behind a blank; empty of images."""
    if (sounds := data.get("sounds")) is not None:
        channels = {1: "mono", 2: "stereo"}.get(sounds["channels"], f"{sounds['channels']} channels")
        return f" of at most {sounds['samples']:,} samples at {sounds['sample_rate']:,} Hz, {channels}"
    if (clips := data.get("clips")) is None:
        return ""
    rate = "the video's own rate" if clips["rate"] is None else f"{clips['rate']:g} a second"
    every = f", every {clips['stride']}th of them" if clips["stride"] > 1 else ""
    return f" of {clips['frames']} frames at {rate}{every}"


def how_decoded(data: Json) -> str:
    """A sentence behind a space on images that were not decoded by the defaults, and on flags that overrode a record;
    empty for others."""
    prepared = data.get("preprocessing", PREPROCESSING_VERSION)  # absent from what other versions measured
    if "sounds" in data:  # described already, but for the notes
        return "".join(f" Note: {note}." for note in data.get("notes", ()))
    notes = "".join(f"; {note}" for note in data.get("notes", ()))
    if not notes and prepared == PREPROCESSING_VERSION:
        return ""
    return f" Images decoded as `{prepared}`{notes}."


def plain(results: Sequence[Json]) -> str:
    """The table for a terminal."""
    rows = table(results)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
