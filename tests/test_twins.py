"""Two launches of a writing verb on one place: `python -m tests.twins --rounds 100` is the same, longer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from checksums import tree
from diffusers import AutoencoderKL
from file_systems import without_locks
from sentences import refused
from store_sources import AFTER, Album, Pictures
from stores import SETTINGS

from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import LEASE
from ldm_vae.data.source import Source
from ldm_vae.latent_store import read_manifest, verify, write_store
from ldm_vae.latent_store.format import work_units
from ldm_vae.latent_store.format.layout import SHARDS, UNITS
from ldm_vae.latent_store.format.manifest import write_manifest
from ldm_vae.latent_store.maintain.repair import repair
from ldm_vae.latent_store.write.finalize import finish
from ldm_vae.latent_store.write.processes import Processes
from tests import twins


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_writing_verb_twice_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    figures = twins.main(["--rounds", "1"])
    assert len(figures) == len(twins.TWINS) > 20
    for what, one in figures.items():
        assert one.finished == 1 and one.sound, (what, one)
    assert "nothing lost" in capsys.readouterr().out


class Again:
    """A barrier whose first meeting runs something else: the second launch at its worst moment."""

    def __init__(self, call: Any, at: int = 1) -> None:
        self.call, self.at, self.met = call, at, 0
        self.refused: list[Exception] = []

    def __call__(self) -> None:
        self.met += 1
        if self.met == self.at:
            try:
                self.call()
            except (UsageError, WorkError) as error:
                self.refused.append(error)


@pytest.mark.parametrize(("locks", "at"), [(True, 1), (True, 3), (False, 2)])
@pytest.mark.parametrize("second", ["the same", "another batch size", "an update", "repair"])
def test_a_second_launch_within_the_first(
    tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool, second: str, at: int
) -> None:
    if not locks:
        without_locks(monkeypatch)
    out, source = tmp_path / "s", Pictures(20)
    write_store(tiny_vae, source, tmp_path / "alone", **SETTINGS)

    def again() -> None:
        if second == "repair":
            repair(out, vae=lambda: tiny_vae, source=lambda: source)
        else:
            changed = SETTINGS | ({"batch_size": 3} if second == "another batch size" else {})
            data: Source = Pictures(25) if second == "an update" else source
            write_store(tiny_vae, data, out, **changed, update=second == "an update")

    barrier = Again(again, at)
    write_store(tiny_vae, source, out, **SETTINGS, processes=Processes(0, 1, barrier))
    assert [type(error) for error in barrier.refused] == [UsageError]
    assert tree(out) == tree(tmp_path / "alone") and verify(out) == []
    write_store(tiny_vae, Pictures(25), out, **SETTINGS, update=True)
    assert read_manifest(out).samples == 25 and verify(out) == []


def test_a_launch_that_was_taken_over_publishes_nothing_more(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """As if it had been suspended, and another had found its record untouched."""
    out = tmp_path / "s"
    taken_over = Again(lambda: atomic_io.replace(out / LEASE, atomic_io.data(b"another's")), at=3)
    with refused(WorkError, "OUT"):
        write_store(tiny_vae, Pictures(20), out, **SETTINGS, processes=Processes(0, 1, taken_over))
    assert not list((out / UNITS).iterdir()) and not list((out / SHARDS).iterdir())


def test_finishing_twice_changes_nothing(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    """Without any ownership: a launch that finishes what another has finished finds it done."""
    out, source = tmp_path / "s", Pictures(20)
    manifest = write_store(tiny_vae, source, out, **SETTINGS)
    plan = work_units.fresh_plan(work_units.source_identity(source))
    before = tree(out)
    assert finish(out, read_manifest(out), plan) == manifest
    assert tree(out) == before
    other = work_units.fresh_plan(work_units.source_identity(Pictures(25)))
    with refused(WorkError, str(out)):
        finish(out, read_manifest(out), other)
    assert tree(out) == before


def test_finishing_an_update_twice_changes_nothing(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    out = tmp_path / "s"
    write_store(tiny_vae, Album(bad=(4,)), out, **SETTINGS)
    old, kept = read_manifest(out), list[work_units.Plan]()

    def keep() -> None:
        plan = work_units.read_plan(out, old.units)
        kept.extend([plan] if plan is not None else [])

    write_store(tiny_vae, Album(**AFTER), out, **SETTINGS, update=True, processes=Processes(0, 1, keep))
    after = tree(out)
    finish(out, read_manifest(out), kept[0])
    assert tree(out) == after
    shutil.copytree(out, tmp_path / "copy")
    write_manifest(tmp_path / "copy", old)  # from before it, once more
    finish(tmp_path / "copy", old, kept[0])
    assert tree(tmp_path / "copy") == after
