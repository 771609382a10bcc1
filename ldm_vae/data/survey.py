"""Survey of a source before training: sizes, shapes, formats, damage, captions, thumbnails.

`survey` looks at every image asked for (decoding it: damage shows only so), `Survey.lines` tells it to a person.

Legend: N images looked at.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm_vae.core import rng
from ldm_vae.core.pictures import save, sheet
from ldm_vae.core.progress import Progress
from ldm_vae.data import buckets, copies, survey_sounds
from ldm_vae.data.alpha import visible
from ldm_vae.data.clips import facts_of, first_frame, frames_of
from ldm_vae.data.decoding import read_image
from ldm_vae.data.footage import Video, VideoFacts
from ldm_vae.data.ordered import IndexedRecord, batches_of, items, key_of, take
from ldm_vae.data.quarantine import Bad, BadImage
from ldm_vae.data.ranges import Values, by_range
from ldm_vae.data.sound_containers import SoundFacts
from ldm_vae.data.source import Record, Source, image_bytes
from ldm_vae.data.stream import Stream, length
from ldm_vae.data.transforms import centre_crop
from ldm_vae.data.workers import load

THUMBNAILS = 10
THUMBNAIL_SIDE = 128
MOST_COMPARED = 20_000  # images, each with all others: four seconds of a core
ASPECTS = (0.4, 0.5, 0.62, 0.72, 0.85, 1.18, 1.4, 1.6, 2.0, 2.5)  # borders of the histogram of width / height


@dataclass(frozen=True)
class Finding:
    """One image or video: index, key, (H, W), format and mode of its file, bytes, its caption, its values and what its
    copies are found by (`copies.frequencies`); with `data.frames`, what is known of it as a video; of a sound what is
    known of it, and neither (H, W) nor frequencies; reason if bad."""

    index: int
    key: str
    size: tuple[int, int] = (0, 0)
    format: str = ""
    mode: str = ""
    bytes: int = 0
    caption: str | None = None
    values: Values | None = None
    frequencies: np.ndarray[Any, Any] | None = None
    video: VideoFacts | None = None
    sound: SoundFacts | None = None
    reason: str = ""


@dataclass
class Survey:
    """Result of a survey: images or sounds in the source (None: a stream), its columns, which of both, the findings."""

    total: int | None
    columns: tuple[str, ...]
    of_sounds: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def good(self) -> list[Finding]:
        return [found for found in self.findings if not found.reason]

    @property
    def bad(self) -> list[Bad]:
        return [Bad(found.key, found.reason) for found in self.findings if found.reason]

    def sizes(self) -> np.ndarray[Any, Any]:
        """(H, W) of the usable images, int [N, 2]."""
        return np.array([found.size for found in self.good], dtype=np.int64).reshape(-1, 2)


class _Look(Dataset[list[Finding]]):
    def __init__(self, source: Source | Stream) -> None:
        self.decoding = source.decoding
        self.source = None if isinstance(source, Stream) else source

    def __getitems__(self, work: Sequence[IndexedRecord]) -> list[Finding]:
        return [self._look(item) for item in work]

    def _look(self, item: IndexedRecord) -> Finding:
        try:
            record = take(self.source, item)
            if self.decoding.sample_rate is not None:
                return self._listen(item, record)
            if self.decoding.frames is None:
                image, video = read_image(record.image, self.decoding), None
            else:  # a clip of each: all frames of long videos would take their time
                clip = frames_of(record.image, self.decoding)
                image = next(clip)
                deque(clip, maxlen=0)
                video = facts_of(record.image, self.decoding)
        except BadImage as error:
            return Finding(item[0], key_of(self.source, item), reason=error.reason)
        return Finding(
            item[0], record.key, image.original_size, image.format, image.mode, _bytes(record), _caption(record),
            image.values, copies.frequencies(image.pixels).numpy(), video,
        )  # fmt: skip

    def _listen(self, item: IndexedRecord, record: Record) -> Finding:
        known, values = survey_sounds.look(record.image)
        return Finding(
            item[0], record.key, format=known.format, mode=known.mode, bytes=_bytes(record), caption=_caption(record),
            values=values, sound=known,
        )  # fmt: skip


def _bytes(record: Record) -> int:
    return image_bytes(record.image) if isinstance(record.image, bytes | Video) else 0


def _caption(record: Record) -> str | None:
    caption = record.columns.get("caption")
    return None if caption is None else str(caption)


def survey(source: Source | Stream, max_images: int | None = None, num_workers: int = 0) -> Survey:
    """Look at all images, or at `max_images` of them drawn at random (of a stream, the first)."""
    total = length(source)
    indices: Sequence[int] | None = None
    if total is not None and max_images is not None and max_images < total:
        # a keyed draw, read in order: the same images each time, and no jumping back in an archive
        indices = np.sort(rng.generator(0, "survey").choice(total, max_images, replace=False)).tolist()
    chosen = islice(items(source, indices), None if total is not None else max_images)
    found = Survey(total, source.columns, source.decoding.sample_rate is not None)
    count = total if indices is None else len(indices)
    unit = "sounds" if found.of_sounds else "images"
    with Progress(total=count, desc="looking", unit=unit, leave=False) as bar:
        for batch in load(_Look(source), batches_of(chosen, 16), num_workers):
            found.findings += batch
            bar.update(len(batch))
            bar.set_postfix({"bad": len(found.bad)}, refresh=False)
    return found


def lines(found: Survey, resolution: int, shapes: Sequence[buckets.Shape]) -> list[str]:
    """The survey as a person reads it."""
    good, bad = found.good, found.bad
    looked = "" if found.total == len(found.findings) else f", {len(found.findings):,} of them looked at"
    sounds = [f.sound for f in good if f.sound is not None]
    what = "sounds" if found.of_sounds else "images" if all(f.video is None for f in good) else "images and videos"
    total = f"a stream of {what}" if found.total is None else f"{found.total:,} {what}"
    out = [f"{total}{looked}: {len(good):,} usable, {len(bad):,} not"]
    videos = [f.video for f in good if f.video is not None]
    if sounds:
        out += ["", *survey_sounds.lines(sounds, [f.bytes for f in good]), ""]
        out += _counts("rates", [f"{known.rate} Hz" for known in sounds])
        out += _counts("channels", [survey_sounds.channels_in_words(known) for known in sounds])
        out += [*_counts("formats", [f.format for f in good]), *_counts("modes", [f.mode for f in good])]
        out += _values(good)
    elif good:
        out += [
            "",
            *_sizes(found, resolution),
            *_videos(videos),
            "",
            *_aspects(found),
            "",
            *_counts("formats", [f.format for f in good]),
        ]
        out += _counts("modes", [f.mode for f in good])
        out += [*_values(good), _copies(good)]
    out += ["", *_columns(found)]
    if good and not sounds:
        out += ["", *_buckets(found, shapes)]
    if bad:
        out += ["", "not usable", *(f"  {count:>8,}  {reason}" for reason, count in _reasons(bad))]
        out += [f"            {entry.key}" for entry in bad[:10]]
        out += [f"            ... and {len(bad) - 10:,} more"] if len(bad) > 10 else []
    return out


def _sizes(found: Survey, resolution: int) -> list[str]:
    sizes = found.sizes()
    megapixels = sizes.prod(axis=1) / 1e6
    kilobytes = np.array([f.bytes for f in found.good]) / 1e3
    table = [("width", sizes[:, 1]), ("height", sizes[:, 0]), ("megapixels", megapixels), ("kilobytes", kilobytes)]
    out = [f"{'':12}{'min':>10}{'5 %':>10}{'median':>10}{'95 %':>10}{'max':>10}"]
    for name, values in table:
        told = [f"{value:10.2f}" if name == "megapixels" else f"{value:10.0f}" for value in _quantiles(values)]
        out.append(f"{name:12}" + "".join(told))
    small = int((sizes.min(axis=1) < resolution).sum())
    share = 100 * small / len(sizes)
    out.append(f"{small:,} ({share:.1f} %) have a short side below {resolution} px and would be enlarged")
    return out


def _videos(facts: Sequence[VideoFacts]) -> list[str]:
    """Frames, rates and seconds of videos, and what is not read of them; nothing of images."""
    moving = [each for each in facts if each.frames > 1]
    out = []
    if len(facts) > len(moving):
        out += [f"{'images':12}{len(facts) - len(moving):,} of them, clips of one frame"]
    if not moving:
        return out
    for name, values in (("frames", [f.frames for f in moving]), ("seconds", [f.seconds for f in moving])):
        told = [f"{value:10.0f}" if name == "frames" else f"{value:10.2f}" for value in _quantiles(np.array(values))]
        out.append(f"{name:12}" + "".join(told))
    out += _counts("frames/s", [f"{float(f.rate):.6g}" for f in moving])
    notes = Counter(note for f in moving for note in f.notes)
    return out + [
        f"{'' if number else 'notes':12}{count:,}: {note}" for number, (note, count) in enumerate(notes.items())
    ]


def _quantiles(values: np.ndarray[Any, Any]) -> list[float]:
    return [float(np.quantile(values, share)) for share in (0.0, 0.05, 0.5, 0.95, 1.0)]


def _aspects(found: Survey) -> list[str]:
    sizes = found.sizes()
    aspects = sizes[:, 1] / sizes[:, 0]
    counts = np.bincount(np.searchsorted(ASPECTS, aspects), minlength=len(ASPECTS) + 1)
    borders = ["", *(f"{border:g}" for border in ASPECTS), ""]
    out = ["width / height"]
    for number, count in enumerate(counts.tolist()):
        low, high = borders[number], borders[number + 1]
        name = f"{low} to {high}" if low and high else f"below {high}" if high else f"above {low}"
        out.append(f"  {name:14}{count:>8,}  {'#' * math.ceil(40 * count / max(counts))}")
    return out


def _counts(name: str, values: Sequence[str]) -> list[str]:
    return [f"{name:12}" + ", ".join(f"{value} {count:,}" for value, count in Counter(values).most_common())]


def _values(good: Sequence[Finding]) -> list[str]:
    """The values of each range, and whether they use it."""
    found = by_range(finding.values for finding in good if finding.values is not None)
    told = [f"{values}: {advice}" if (advice := values.advice()) else str(values) for values in found]
    return [f"{'' if number else 'values':12}{line}" for number, line in enumerate(told)]


def _copies(good: Sequence[Finding]) -> str:
    if len(good) > MOST_COMPARED:
        return f"copies      not looked for among more than {MOST_COMPARED:,} images"
    looks = torch.from_numpy(np.stack([finding.frequencies for finding in good if finding.frequencies is not None]))
    count, first = 0, ""
    for row, same in copies.matches(looks, looks):
        earlier = same.tril(row - 1)  # of images in front of it
        found = earlier.any(1).nonzero().flatten().tolist()
        if found and not count:
            first = f": {good[row + found[0]].key} like {good[int(earlier[found[0]].int().argmax())].key}"
        count += len(found)
    return f"copies      {count:,} images look like an earlier one{first}"


def _columns(found: Survey) -> list[str]:
    out = [f"{'columns':12}{', '.join(found.columns) or 'none'}"]
    if "caption" in found.columns:
        texts = [f.caption for f in found.good if f.caption and f.caption.strip()]
        out.append(f"{'captions':12}{len(texts):,} of {len(found.good):,}")
        out += [f"            {text.splitlines()[0][:90]!r}" for text in texts[:3]]
    else:
        out.append(f"{'captions':12}none (--caption_column names the column that holds them)")
    return out


def _buckets(found: Survey, shapes: Sequence[buckets.Shape]) -> list[str]:
    return ["aspect buckets (height x width)", *buckets.assign(shapes, found.sizes()).lines()]


def _reasons(bad: Sequence[Bad]) -> list[tuple[str, int]]:
    return Counter(entry.reason for entry in bad).most_common(8)


def thumbnails(source: Source, found: Survey, path: Path) -> int:
    """Write up to ten usable images, spread over the source, side by side as one PNG; returns how many there are."""
    good = found.good
    chosen = [good[at] for at in sorted({round(i * (len(good) - 1) / (THUMBNAILS - 1)) for i in range(THUMBNAILS)})]
    side, columns = THUMBNAIL_SIDE, (len(chosen) + 1) // 2 if len(chosen) > 5 else len(chosen)
    read = [first_frame(source[finding.index].image, source.decoding).pixels for finding in chosen]
    shown = [visible(pixels, source.decoding.alpha) for pixels in read]
    coloured = [pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1) for pixels in shown]
    crops = [centre_crop(pixels, side).pixels for pixels in coloured]
    save(sheet(crops, columns, gap=0), path)
    return len(chosen)
