"""Mutated files of every format: an image, a clip, an excerpt or a BadImage, in bounded time and memory, never a crash.

The decoding runs in a child process, so that a crash of a C library is a failed test rather than the end of them all.
`python tests/helpers/decoder_fuzz.py images 20000` fuzzes longer.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import decoder_fuzz
import numpy as np
import pytest
from fork_server import fork

FILES = {"images": 700, "clips": 200, "sounds": 200}
MEMORY = 1 << 30  # growth of the peak over the whole run; the largest image that is let through takes 0.7 GB


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FILES])
def test_mutated_files(kind: str) -> None:
    done = fork(decoder_fuzz.main, [kind, str(FILES[kind])]).wait()
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["count"] == FILES[kind]
    assert (
        0.02 < result["good"] / result["count"] < 0.9
    )  # the wounds are neither harmless nor always at the magic bytes
    assert result["memory"] < MEMORY


def test_mutated_archives(tmp_path: Path) -> None:
    from ldm_vae.core.errors import UsageError, WorkError
    from ldm_vae.data.ordered import ordered_loader
    from ldm_vae.data.source import open_source

    png = decoder_fuzz.seeds()["png"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", png)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(png)
            tar.addfile(info, io.BytesIO(png))
    outcomes, sentences = set(), set()
    for kind in ("zip", "tar"):
        whole = (tmp_path / f"a.{kind}").read_bytes()
        for number in range(80):
            path = tmp_path / f"b.{kind}"
            path.write_bytes(decoder_fuzz.mutate(whole, whole, np.random.default_rng([7, number])))
            try:
                batches = list(ordered_loader(open_source(path), 8, batch_size=4))
                outcomes.add("bad" if any(bad for _, bad in batches) else "good")
            except (UsageError, WorkError) as error:
                sentences.add(str(error))
                outcomes.add("refused")
    assert not any("\n" in sentence for sentence in sentences)
    assert outcomes == {"bad", "good", "refused"}
