"""The demo's sounds: music and speech that two Debian packages ship, fetched by apt-get and never installed.

    OUT/train/*.flac, *.wav      47 samples of Sonic Pi of two seconds and more (CC0), four sentences of LibriVox, and
                                 each of them at SPEEDS, as a tape would play it
    OUT/heldout/*.flac, *.wav    two loops, a guitar, a piano and another sentence of the same reader
    OUT/ATTRIBUTION.md, *.copyright

Held-out files are copied as they are shipped: 44.1 kHz stereo and 16 kHz mono.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from ldm_vae.core import atomic_io, packages
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.paths import offline
from ldm_vae.core.progress import Progress

SAMPLES, SPEECH = "sonic-pi-samples", "pocketsphinx-testdata"
HELD_OUT = ("ambi_piano", "guit_em9", "loop_amen_full", "loop_garzul", "sense_and_sensibility_01_austen_64kb-0870")
LEFT_OUT = ("loop_amen",)  # a bar of loop_amen_full
SHORTEST = 2.0  # seconds of a sound to train on: shorter ones are single strokes, then silence
SPEEDS = (0.6, 0.75, 0.9, 1.2, 1.5)
SHA256 = "8174e089aa44f9688f691908e71eeef3105604c1432af891909d8e4fdf15ec5c"  # of the names and checksums of all files
MARK = "ATTRIBUTION.md"
CREDIT = """\
- *.flac: samples of Sonic Pi, each CC0 (https://creativecommons.org/publicdomain/zero/1.0/) by the author that
  sonic-pi-samples.copyright names.
- *.wav: Jane Austen, Sense and Sensibility, read for LibriVox (librivox.org), public domain, as shipped by
  pocketsphinx-testdata (BSD-2-Clause).
"""


def prepare_sounds(out: Path) -> str:
    """Write the demo's sounds to `out`; returns a sentence. An `out` that is whole is left as it is.

    Raises:
        UsageError: `out` is or holds something else, or soundfile is not installed.
        WorkError: the packages cannot be had, or are others; or `out` cannot be written.
    """
    if not (out / MARK).is_file():
        with atomic_io.whole_folder(out.absolute(), _free) as folder, tempfile.TemporaryDirectory() as scratch:
            files = _fetched(Path(scratch))
            for file in Progress(files, "sounds", unit="sounds"):
                part = folder / ("heldout" if file.stem in HELD_OUT else "train")
                part.mkdir(exist_ok=True)
                shutil.copyfile(file, part / file.name)
                if part.name == "train":
                    _write_speeds(file, part)
            for package in (SAMPLES, SPEECH):
                text = Path(scratch) / package / "usr/share/doc" / package / "copyright"
                shutil.copyfile(text, folder / f"{package}.copyright")
            (folder / MARK).write_text(CREDIT, encoding="utf-8")
    counts = [len(list((out / part).iterdir())) for part in ("train", "heldout")]
    return f"{out}: {counts[0]} sounds to train on, {counts[1]} held out"


def _fetched(scratch: Path) -> list[Path]:
    """The files that are wanted, in the order of their names."""
    try:
        if offline():
            raise ValueError("LDM_VAE_OFFLINE or HF_HUB_OFFLINE forbids to fetch them")
        for package in (SAMPLES, SPEECH):
            packages.unpack_debian(package, scratch / package)
        shipped = [
            *scratch.glob(f"{SAMPLES}/usr/share/**/samples/*.flac"),
            *scratch.glob(f"{SPEECH}/usr/share/**/librivox/*.wav"),
        ]
        wanted = sorted((file for file in shipped if _is_wanted(file)), key=lambda file: file.name)
        listed = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in wanted)
        if hashlib.sha256(listed.encode()).hexdigest() != SHA256:
            raise ValueError(f"they hold other sounds ({len(wanted)} files)")
    except (OSError, subprocess.CalledProcessError, ValueError) as failure:
        raise WorkError(
            f"the demo's sounds come from the Debian packages {SAMPLES} and {SPEECH}: {packages.reason(failure)}; any "
            "folder of sounds would do for training (data.path)"
        ) from failure
    return wanted


def _is_wanted(file: Path) -> bool:
    try:
        import soundfile
        import soxr  # noqa: F401
    except ImportError as error:
        raise UsageError("sounds are read by soundfile and soxr: pip install 'ldm-vae[audio]'") from error
    long = soundfile.info(str(file)).duration >= SHORTEST
    return file.stem in HELD_OUT or (long and file.stem not in LEFT_OUT)


def _write_speeds(file: Path, folder: Path) -> None:
    import soundfile
    import soxr

    samples, rate = soundfile.read(str(file), dtype="float32", always_2d=True)
    for speed in SPEEDS:
        played = soxr.resample(samples, speed * rate, rate).clip(-1, 1)  # a resampler overshoots, FLAC has full scale
        soundfile.write(str(folder / f"{file.stem}-{speed:g}x.flac"), played, rate)


def _free(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file()):
        raise UsageError(f"OUT {out}: expected a new folder or the demo's sounds, it is something else")
