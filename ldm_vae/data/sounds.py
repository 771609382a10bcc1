"""Sounds: excerpts of L samples at one rate from files of sound, decoded by libsndfile (soundfile; extra `audio`), and
by FFmpeg (PyAV) where that cannot: AAC, the sound of videos.

A file is opened, an excerpt found by seeking, and left: an hour costs what its excerpt costs. Loudness is left alone,
also above full scale. Channels: mono from several is their mean, stereo from mono has both alike, others are refused.
What is shorter than an excerpt is followed by silence, and the crop's box says how much of it is the sound's.

Resampling is by soxr (HQ): on tones of 4 s, 44.1 kHz to 16 kHz, its error is -133 dB and a tone above the new band
comes through at -143 dB, in 1 ms; torchaudio's default has -68 dB, -20 dB, 7 ms, and for 44,100 to 44,101 a kernel of
GBs, since its filter has a phase for each sample of the shorter rate.

Legend: C channels, L samples, S samples of the file.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError
from ldm_vae.core.validation import HEAD, disguise, first_line
from ldm_vae.data.decoding import Decoded, Decoding, RawImage
from ldm_vae.data.footage import Video
from ldm_vae.data.quarantine import BadImage
from ldm_vae.data.ranges import Values
from ldm_vae.data.sound_containers import PRIMING, Samples, SoundFacts, facts_by_ffmpeg, read_by_ffmpeg
from ldm_vae.data.transforms import Crop

MOST = 2**26  # samples of a sound that is taken whole: 25 minutes at 44.1 kHz, 256 MiB of each channel
# samples of the lower rate on each side of an excerpt that the filter of soxr's HQ sees: a resampled excerpt is that of
# the whole file to 7e-7 from 93 on (44.1 kHz to 16 kHz)
MARGIN = 256
# seconds that the count of samples of FFmpeg, and of MP3, may be above what is decoded: a decoder cuts the last frame
LOOSE_END = 0.1
SLOWEST, FASTEST = 100, 2**20  # samples a second: of a few at 1 Hz resampling would make hours
LAST_PAGE = 2**18  # samples: at most 255 packets, of 1,024 as encoders make them
BLOCK = 2**16  # samples that are read at a time where a file cannot be sought in

NEEDED = "data: sounds need soundfile and soxr: pip install 'ldm-vae[audio]'"


@dataclass(frozen=True)
class Levels(Values):
    """Smallest and largest sample of a sound, and what was done with it."""

    counted: ClassVar[str] = "sounds"
    notes: frozenset[str] = frozenset()

    def __or__(self, other: Values) -> Levels:
        notes = self.notes | (other.notes if isinstance(other, Levels) else frozenset())
        return replace(self, low=min(self.low, other.low), high=max(self.high, other.high), notes=notes)

    def advice(self) -> str:
        """Sentences on what a user would not see: silence, samples above full scale, changes of channels and rate."""
        beyond = max(-self.low, self.high) > 1.0
        said = ["silence alone"] if self.low == self.high == 0.0 else []
        said += ["samples above full scale are kept as they are"] if beyond else []
        return "; ".join([*said, *sorted(self.notes)])


def crops_of(sound: RawImage, decoding: Decoding, draw: float | None = None) -> tuple[tuple[Crop, ...], Decoded]:
    """An excerpt of `decoding.samples` samples, float32 [C, L], or the whole sound; its box is (0, first sample, 1,
    samples of the sound) in a size of (1, L of the whole), at `decoding.sample_rate`.

    Args:
        draw: from 0 to 1, where among the samples that an excerpt can start at it starts; None: where the sound says,
            or at its first.

    Raises:
        BadImage: it cannot be decoded, is empty, or holds samples that are no numbers.
    """
    with _as_bad_sound():
        file, known, rate = as_file(sound), facts_of(sound), _rate(decoding)
        whole = known.samples(rate)
        wanted = decoding.samples or whole
        if wanted > MOST:
            raise BadImage(f"{known.frames / known.rate:.0f} s: too long to take whole; `samples` takes excerpts")
        if draw is not None:  # each start that leaves room behind it is equally likely
            start = min(int(draw * (max(0, whole - wanted) + 1)), max(0, whole - wanted))
        else:
            start = int((file.start or 0) * rate)
        found = _resampled(file, known, rate, start, min(start + wanted, whole))
        if not np.isfinite(found).all():
            raise BadImage("holds samples that are NaN or infinite")
        held, notes = len(found), _notes(known, decoding, len(found) < wanted)
        found = np.pad(_mixed(found, decoding.channels), ((0, wanted - held), (0, 0)))
        pixels = torch.from_numpy(np.ascontiguousarray(found.T))
    values = Levels(float(found.min()), float(found.max()), -1.0, 1.0, notes)
    size = (1, whole)
    return (Crop(pixels, size, (0, start, 1, held)),), Decoded(pixels, size, known.format, known.mode, values)


def facts_of(sound: RawImage) -> SoundFacts:
    """Facts about a sound. Those of a file are remembered while it is not replaced. Raises BadImage."""
    with _as_bad_sound():
        file = replace(as_file(sound), start=None)
        place = file.place
        return _facts(file) if place is None else _remembered(file, place)


def tiles_of(known: SoundFacts, decoding: Decoding) -> tuple[int, Fraction]:
    """Excerpts that cover a sound one after the other, the last followed by silence, and the seconds from one to the
    next."""
    assert decoding.samples is not None
    rate = _rate(decoding)
    return max(1, -(-known.samples(rate) // decoding.samples)), Fraction(decoding.samples, rate)


def write_sound(path: Path, samples: torch.Tensor, rate: int) -> None:
    """Write samples [C, L]: as 32-bit floats into a WAV, and with 24 bits, clipped to full scale, into a FLAC.

    Raises:
        UsageError: soundfile is not installed.
        WorkError: it cannot be written.
    """
    try:
        import soundfile
    except ImportError as error:
        raise UsageError(NEEDED) from error
    form, subtype = ("FLAC", "PCM_24") if path.suffix == ".flac" else ("WAV", "FLOAT")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T.numpy(), rate, format=form, subtype=subtype)
    atomic_io.replace(path, atomic_io.data(buffer.getvalue()))


def _rate(decoding: Decoding) -> int:
    assert decoding.sample_rate is not None
    return decoding.sample_rate


def as_file(sound: RawImage) -> Video:
    """A sound as a file that is opened when it is wanted. Raises BadImage for numbers."""
    if isinstance(sound, Video) and not isinstance(sound.content, tuple):
        return sound
    if isinstance(sound, bytes):
        return Video(sound)
    raise BadImage("is no file of sound: of numbers alone nobody knows the rate")


@contextlib.contextmanager
def _as_bad_sound() -> Iterator[None]:
    """Whatever goes wrong inside is a BadImage, unless the call was wrong."""
    try:
        yield
    except (BadImage, UsageError):
        raise
    except MemoryError as error:
        raise BadImage("needs more memory than there is") from error
    except Exception as error:  # libsndfile's, FFmpeg's, of any kind
        # without libsndfile's prefix, which holds an address in memory: a reason is the same in every process
        said = getattr(error, "error_string", "") or first_line(error)
        raise BadImage(f"is damaged: {said[:160]}") from error


def _mixed(samples: Samples, channels: int) -> Samples:
    """[S, C] => [S, channels]."""
    there = samples.shape[1]
    if there == channels:
        return samples
    if channels == 1:
        mono: Samples = samples.mean(axis=1, keepdims=True, dtype=np.float32)
        return mono
    if there == 1:
        return samples.repeat(channels, axis=1)
    raise BadImage(f"{there} channels, of which {channels} are not made here: expected {channels}, or mono")


def _notes(known: SoundFacts, decoding: Decoding, short: bool) -> frozenset[str]:
    there, wanted = known.channels, decoding.channels
    return frozenset(
        note
        for said, note in (
            (there > wanted == 1, f"{there} channels are mixed to mono, their mean"),
            (there == 1 < wanted, f"mono is given to {wanted} channels alike"),
            (known.rate != decoding.sample_rate, f"{known.rate} Hz are resampled to {decoding.sample_rate}"),
            (short, "what is shorter than an excerpt, or its end, is followed by silence"),
        )
        if said
    )


def _resampled(file: Video, known: SoundFacts, rate: int, start: int, stop: int) -> Samples:
    """Samples [start, stop) at `rate` of a file, [L, C]: those of the whole file resampled, to rounding."""
    if known.rate == rate:
        return _read(file, known, start, stop - start)
    import soxr

    shared = math.gcd(known.rate, rate)
    step, new_step = known.rate // shared, rate // shared
    margin = -(-MARGIN * max(known.rate, rate) // rate)
    # from a sample that both rates have, or the filter would see another phase
    first = max(0, (start * step // new_step - margin) // step * step)
    last = min(known.frames, -(-stop * step // new_step) + margin)
    found = soxr.resample(_read(file, known, first, last - first), known.rate, rate, quality="HQ")
    offset = start - first // step * new_step
    found = found[offset : offset + stop - start]
    # soxr rounds the length of a whole file, which is rounded up here
    return np.pad(found, ((0, stop - start - len(found)), (0, 0)))


# --- libsndfile -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(file: Video) -> Iterator[Any]:
    """libsndfile's view of a file; None where it does not know the format."""
    try:
        import soundfile
    except ImportError as error:
        raise UsageError(NEEDED) from error
    with file.open() as raw:
        _check_head(raw, file)
        try:
            sound = soundfile.SoundFile(raw)
        except soundfile.LibsndfileError as error:
            if "not recognised" not in str(error):
                raise
            yield None
            return
        with sound:
            yield sound


def _check_head(raw: Any, file: Video) -> None:
    """Raises BadImage for what is something else, or a WAV, AIFF, W64 or AU of which a part is missing, which
    libsndfile reads as a shorter one."""
    head = raw.read(HEAD)
    raw.seek(0)
    if what := disguise(head):
        raise BadImage(f"it {what}")
    lengths = {
        b"RIFF": int.from_bytes(head[4:8], "little") + 8,
        b"RF64": int.from_bytes(head[20:28], "little") + 8,
        b"riff": int.from_bytes(head[16:24], "little"),
        b"FORM": int.from_bytes(head[4:8], "big") + 8,
        b".snd": int.from_bytes(head[4:8], "big") + int.from_bytes(head[8:12], "big"),
    }
    said = lengths.get(head[:4], 0)
    # a program that writes into a pipe does not know the size: 0 or all bits
    if file.bytes + 1 < said < 2**32 - 1 or (head[:4] in (b"RF64", b"riff") and file.bytes + 1 < said < 2**62):
        raise BadImage(f"is cut off: its header says {said:,} bytes, it has {file.bytes:,}")


def _facts(file: Video) -> SoundFacts:
    with _opened(file) as sound:
        if sound is not None:
            known = SoundFacts(sound.frames, sound.samplerate, sound.channels, sound.format, sound.subtype)
        else:
            known = facts_by_ffmpeg(file)
    if known.frames < 1:
        raise BadImage("holds no sample")
    if not SLOWEST <= known.rate <= FASTEST:
        raise BadImage(f"is damaged: its header says {known.rate:,} Hz, expected {SLOWEST} to {FASTEST:,}")
    return known


@lru_cache(maxsize=8192)
def _remembered(file: Video, _place: tuple[int, ...]) -> SoundFacts:
    return _facts(file)


def _before(first: int, known: SoundFacts) -> int:
    """The sample to seek, from which on all that is read is right at `first`."""
    if known.format == "MP3":  # its frames need bits of frames before them
        return max(0, first - PRIMING * known.rate)
    # libsndfile is off by as many samples as the last page of a Vorbis file leaves out, where it seeks within it
    return min(first, max(0, known.frames - LAST_PAGE)) if known.format == "OGG" else first


def _go_to(sound: Any, place: int) -> None:
    if sound.seekable():
        sound.seek(place)
        return
    # GSM 6.10 and other codecs of telephones: each sample needs all before it
    for begin in range(0, place, BLOCK):
        sound.read(min(BLOCK, place - begin), dtype="float32")


def _read(file: Video, known: SoundFacts, first: int, count: int) -> Samples:
    """`count` samples from `first` on, [S, C]. Raises BadImage where the file has fewer than its header says."""
    with _opened(file) as sound:
        if sound is None:
            found = read_by_ffmpeg(file, known, first, count)
        else:
            begin = _before(first, known)
            _go_to(sound, begin)
            found = sound.read(first - begin + count, dtype="float32", always_2d=True)[first - begin :]
    loose = int(LOOSE_END * known.rate) if sound is None or known.format == "MP3" else 0
    if len(found) < count - loose:
        raise BadImage(
            f"ends at {(first + len(found)) / known.rate:.2f} s of the {known.frames / known.rate:.2f} s that its "
            "header says"
        )
    return np.pad(found, ((0, count - len(found)), (0, 0)))
