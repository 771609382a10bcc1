"""Windows: the clips that cover the videos of a source one after the other, as a source of its own; the excerpts that
cover its sounds.

For encoding and evaluation, where every frame counts: clip k of a video begins where clip k - 1 ends, its key is
`NAME#t=SECONDS` (`#frame=N` of a folder of frames). Frames at the end that fill no clip are left out, and said. Images
are themselves. The last excerpt of a sound is followed by silence: nothing is left out. Training draws its clips and
excerpts from the files instead (dataset.py).

Legend: N videos and images of the source.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from ldm_vae.core.progress import Progress
from ldm_vae.data import sounds
from ldm_vae.data.clips import facts_of, reach, tiles_of
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.footage import Video, VideoFacts, tell
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.sound_containers import SoundFacts
from ldm_vae.data.source import Named, Record, Source
from ldm_vae.data.stamps import THREADS, Facts, Stamped
from ldm_vae.data.stream import Stream

logger = logging.getLogger(__name__)
CLIP = re.compile(r"(.+)#((?:t|frame)=[0-9.]+)")


def windows(source: Any) -> Any:
    """The clips of a source of videos, the excerpts of one of sounds; a source of images, or of whole sounds, as it is.
    Every file is opened once."""
    if source.decoding.frames is None and source.decoding.samples is None:
        return source
    if isinstance(source, Stream):
        what = "sound the first excerpt" if source.decoding.signal == "audio" else "video the first clip"
        logger.warning("data %s: read in order, so of each %s alone is taken", _name(source), what)
        return source
    return Windows(source)


class Windows(Named):
    """Clips of the videos of `source`, or excerpts of its sounds."""

    def __init__(self, source: Source) -> None:
        self.source, self.columns, self.name = source, source.columns, _name(source)
        self.decoding: Decoding = source.decoding
        self.counted = "excerpts" if self.decoding.signal == "audio" else "clips"
        counts = np.ones(len(source), np.int64)
        # seconds from clip to clip as fractions: of 10^4 clips at 30000/1001 a second floats would lose a frame
        self._length = np.zeros((len(source), 2), np.int64)
        notes: Counter[str] = Counter()
        left = whole = 0
        with ThreadPoolExecutor(THREADS, "facts") as threads:
            looked = threads.map(self._look, range(len(source)))
            for index, known in enumerate(Progress(looked, "videos", len(source), leave=False)):
                # what cannot be read, or is too short, has one clip that says so
                if known is None or known.frames == 1:
                    continue
                notes.update(known.notes)
                if isinstance(known, SoundFacts):
                    count, length = sounds.tiles_of(known, self.decoding)
                else:
                    count, length = tiles_of(known, self.decoding)
                counts[index] = count
                self._length[index] = length.as_integer_ratio() if count > 1 else (0, 1)
                if isinstance(known, SoundFacts):
                    continue
                there = reach(known, self.decoding)
                covered = count * (self.decoding.frames or 1)
                if there >= covered:
                    whole, left = whole + there, left + there - covered
        self._ends = np.cumsum(counts)
        tell(self.name, notes)
        if left:
            logger.warning(
                "data %s: %d of %d frames are left out: the last of a video, which fill no clip of %d",
                self.name, left, whole, self.decoding.frames,
            )  # fmt: skip

    def _look(self, index: int) -> VideoFacts | SoundFacts | None:
        try:
            image = self.source[index].image
            return sounds.facts_of(image) if self.decoding.signal == "audio" else facts_of(image, self.decoding)
        except BadImage:
            return None

    def _place(self, index: int) -> tuple[int, Fraction | None]:
        """(index in the source, start of the clip; None where there is but one)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, side="right"))
        above, below = map(int, self._length[at])
        number = index - (int(self._ends[at - 1]) if at else 0)
        return at, Fraction(above, below) * number if above else None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def key(self, index: int) -> str:
        at, start = self._place(index)
        return self.source.key(at) + self._suffix(at, start)

    def _suffix(self, at: int, start: Fraction | None) -> str:
        if start is None:
            return ""
        # of frame folders, whose seconds are frames
        unit = "frame" if getattr(self.source, "by_frame", False) else "t"
        return f"#{unit}={f'{float(start):.6f}'.rstrip('0').rstrip('.')}"

    def __getitem__(self, index: int) -> Record:
        at, start = self._place(index)
        record = self.source[at]
        if start is None:
            return record
        image = record.image
        assert isinstance(image, bytes | Video)
        video = replace(image, start=start) if isinstance(image, Video) else Video(image, start=start)
        return replace(record, key=record.key + self._suffix(at, start), image=video)

    def facts(self, index: int) -> Facts | None:
        at, start = self._place(index)
        found = self.source.facts(at) if isinstance(self.source, Stamped) else None
        return found and found._replace(identity=(*found.identity, hash(start or 0)))


def video_of(key: str) -> tuple[str, str]:
    """The key of the video that a clip is of, and what says where in it; nothing of a video's only clip."""
    found = CLIP.fullmatch(key)
    return (key, "") if found is None else (found[1], found[2])


def _name(source: Any) -> str:
    return getattr(source, "name", type(source).__name__)
