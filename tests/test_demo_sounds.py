"""The demo's sounds: whole or not there, from packages whose every file is known."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sentences import refused
from sound_files import encoded, tone

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.demo import sounds

SHIPPED = {  # seconds
    "sonic-pi-samples/usr/share/sonic-pi/samples/loop_garzul.flac": 0.5,
    "sonic-pi-samples/usr/share/sonic-pi/samples/loop_amen.flac": 2.5,
    "sonic-pi-samples/usr/share/sonic-pi/samples/ambi_sauna.flac": 2.5,
    "sonic-pi-samples/usr/share/sonic-pi/samples/bd_808.flac": 0.2,
    "pocketsphinx-testdata/usr/share/pocketsphinx/test/data/librivox/sense_and_sensibility_01_austen_64kb-0870.wav": 2,
    "pocketsphinx-testdata/usr/share/pocketsphinx/test/data/librivox/sense_and_sensibility_01_austen_64kb-0880.wav": 2,
}


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins of apt-get and dpkg-deb, which give the packages' files of SHIPPED; the folder of the tools."""
    shelf, tools = tmp_path / "shelf", tmp_path / "tools"
    for name, seconds in SHIPPED.items():
        path = shelf / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(tone(int(8000 * seconds)), path.suffix[1:].upper()))
    for package in ("sonic-pi-samples", "pocketsphinx-testdata"):
        copyright = shelf / package / "usr/share/doc" / package / "copyright"
        copyright.parent.mkdir(parents=True)
        copyright.write_text("CC0")
    tools.mkdir()
    scripts = {
        "apt-get": f'test -d {shelf}/"$2" || {{ echo "E: no $2" >&2; exit 100; }}\n: > "$2.deb"',
        "dpkg-deb": f'cp -r {shelf}/"${{2%.deb}}"/* "$3"',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/bin:/usr/bin")
    for name in ("LDM_VAE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    kept = [shelf / name for name in SHIPPED if not name.endswith(("loop_amen.flac", "bd_808.flac"))]
    listed = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(kept, key=lambda file: file.name)
    )
    monkeypatch.setattr(sounds, "SHA256", hashlib.sha256(listed.encode()).hexdigest())
    return tools


def test_long_sounds_are_trained_on_and_others_held_out(debian: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sounds.prepare_sounds(out).endswith("12 sounds to train on, 2 held out")
    speech = "sense_and_sensibility_01_austen_64kb-08{}0.wav"
    shipped = {path.name for path in (out / "train").iterdir() if not path.stem.endswith("x")}
    assert shipped == {"ambi_sauna.flac", speech.format(8)}
    played, rate = soundfile.read(out / "train" / "ambi_sauna-1.2x.flac")
    assert rate == 8000 and len(played) == pytest.approx(8000 * 2.5 / 1.2, abs=2)
    assert np.abs(np.fft.rfft(played)).argmax() * rate / len(played) == pytest.approx(1.2 * 440, abs=1)  # of the tone
    assert sorted(path.name for path in (out / "heldout").iterdir()) == ["loop_garzul.flac", speech.format(7)]
    assert (out / "sonic-pi-samples.copyright").read_text() == "CC0" and "LibriVox" in (
        out / "ATTRIBUTION.md"
    ).read_text()
    (debian / "apt-get").unlink()
    assert sounds.prepare_sounds(out).endswith("2 held out")  # it is whole, so nothing is fetched


def test_other_sounds_a_failure_and_no_apt_are_sentences(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as other, refused(WorkError, "sonic-pi-samples"):
        other.setattr(sounds, "SHA256", "0" * 64)
        sounds.prepare_sounds(out)
    with monkeypatch.context() as other, refused(WorkError, "sonic-pi-samples-none"):
        other.setattr(sounds, "SAMPLES", "sonic-pi-samples-none")
        sounds.prepare_sounds(out)
    with monkeypatch.context() as other, refused(WorkError, "HF_HUB_OFFLINE"):
        other.setenv("HF_HUB_OFFLINE", "1")
        sounds.prepare_sounds(out)
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused(WorkError, "apt-get"):
        sounds.prepare_sounds(out)
    assert not out.exists()
    out.mkdir()
    (out / "mine.wav").touch()
    with refused(UsageError, "OUT"):
        sounds.prepare_sounds(out)
