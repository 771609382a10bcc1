"""Survey of sounds: lengths, rates, channels, levels, each decoded whole at its own rate (damage shows only so)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from functools import reduce
from operator import or_

import numpy as np

from ldm_vae.data.decoding import Decoding, RawImage
from ldm_vae.data.ranges import Values
from ldm_vae.data.sound_containers import SoundFacts
from ldm_vae.data.sounds import Levels, as_file, crops_of, facts_of

PART = 2**22  # samples that are decoded at a time: a minute and a half at 44.1 kHz


def look(sound: RawImage) -> tuple[SoundFacts, Values]:
    """Facts about a sound and its smallest and largest sample.

    Raises:
        BadImage: it cannot be decoded, is empty, or holds samples that are no numbers.
    """
    known, file = facts_of(sound), as_file(sound)
    own = Decoding(channels=known.channels, sample_rate=known.rate, samples=max(1, min(known.frames, PART)))
    starts = range(0, max(1, known.frames), PART)
    parts = [crops_of(replace(file, start=Fraction(start, known.rate)), own)[1].values for start in starts]
    found = reduce(or_, [values for values in parts if values is not None])
    return known, Levels(found.low, found.high, found.black, found.white)


def lines(facts: Sequence[SoundFacts], sizes: Sequence[int]) -> list[str]:
    """Lengths and sizes of sounds as a person reads them: a table of quantiles, and the time of all together.

    Args:
        sizes: bytes of each file.
    """
    seconds = np.array([known.frames / known.rate for known in facts])
    out = [f"{'':12}{'min':>10}{'5 %':>10}{'median':>10}{'95 %':>10}{'max':>10}"]
    for name, values in (("seconds", seconds), ("kilobytes", np.array(sizes) / 1e3)):
        quantiles = np.quantile(values, (0.0, 0.05, 0.5, 0.95, 1.0))
        out.append(f"{name:12}" + "".join(f"{value:10.2f}" for value in quantiles))
    return [*out, f"{'together':12}{timedelta(seconds=round(seconds.sum()))}"]


def channels_in_words(known: SoundFacts) -> str:
    """Channels of a sound: `mono`, `stereo` or `6 channels`."""
    return {1: "mono", 2: "stereo"}.get(known.channels, f"{known.channels} channels")
