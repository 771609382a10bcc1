"""Pictures of sounds, by which copies among them are found as those of images are (copies.py).

A picture is the spectrogram in 32 parts from the beginning to the end, each at most half a second: of a long file not
all is decoded. It is taken at 8 kHz, mono, in decibels below its loudest, so level, rate, format and what lies above
4 kHz have no say; a part of a sound, or one that is slower, is another sound.

Of 165 sounds of Debian's sonic-pi-samples (13,530 pairs) two hits of one drum were taken for copies. Of 1,320 copies of
them (MP3, Vorbis, MP3 of 16 kHz, a quarter as loud, mono, 16 bits, 22.05 and 16 kHz) 1,280 were found: all where the
samples are kept, 455 of 495 behind a lossy codec.

Legend: F frequencies, P parts.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch

from ldm_vae.data.decoding import Decoding, RawImage
from ldm_vae.data.sounds import as_file, crops_of, facts_of

RATE, PARTS, BANDS = 8000, 32, 32
WINDOW, LONGEST = 1024, 4096  # samples: of a spectrum, and of a part
LOWEST = 62.5  # Hz; six octaves up to half the rate
RANGE = 60.0  # dB from black to white: what is quieter is a codec's to change


def picture(sound: RawImage, decoding: Decoding) -> torch.Tensor:
    """uint8 [1, F, P] of a sound, whole. Raises BadImage."""
    file, whole = as_file(sound), facts_of(sound).samples(RATE)
    length = min(LONGEST, max(WINDOW, whole // PARTS))
    starts = [max(0, whole - length) * part // (PARTS - 1) for part in range(PARTS)]

    def read(start: int, samples: int) -> torch.Tensor:
        (crop,), _ = crops_of(
            replace(file, start=Fraction(start, RATE)), replace(decoding, sample_rate=RATE, samples=samples)
        )
        return crop.pixels.mean(dim=0)

    if whole <= PARTS * LONGEST:  # opened once
        all_of_it = read(0, max(whole, length))
        parts = [all_of_it[start : start + length] for start in starts]
    else:
        parts = [read(start, length) for start in starts]
    frames = torch.stack(parts).unfold(1, WINDOW, WINDOW // 2) * torch.hann_window(WINDOW)
    power = _bands() @ torch.fft.rfft(frames).abs().square().mean(dim=1).T
    level = 10 * torch.log10((power / power.max().clamp_min(1e-20)).clamp_min(10 ** (-RANGE / 10)))
    return (level / RANGE + 1).mul(255).round().to(torch.uint8)[None]


def _bands() -> torch.Tensor:
    """Means of neighbouring frequencies, in bands of equal ratio [F, WINDOW / 2 + 1]."""
    frequencies = torch.fft.rfftfreq(WINDOW, 1 / RATE)
    edges = LOWEST * (RATE / 2 / LOWEST) ** (torch.arange(BANDS + 1) / BANDS)
    inside = (frequencies >= edges[:-1, None]) & (frequencies < edges[1:, None])
    means: torch.Tensor = inside / inside.sum(dim=1, keepdim=True)
    return means
