"""Parts of one job that do not communicate, as tasks of an array: a store in equal bytes, whichever ends last."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from checksums import tree
from diffusers import AutoencoderKL
from file_systems import without_locks
from sentences import refused
from store_sources import Pictures
from stores import SETTINGS

from ldm_vae.cli import parser
from ldm_vae.core import ownership
from ldm_vae.core.errors import UsageError
from ldm_vae.core.ownership import Part, own
from ldm_vae.latent_store import read_manifest, verify, write_store
from ldm_vae.latent_store.format.layout import UNITS
from ldm_vae.latent_store.write import writer
from ldm_vae.latent_store.write.processes import Processes
from ldm_vae.latent_store.write.writer import begin


def encode(vae: AutoencoderKL, out: Path, part: int, count: int, pictures: int = 40) -> bool:
    """Encode a part; whether the store is finished after it."""
    processes = Processes(part=Part(part, count))
    return write_store(vae, Pictures(pictures), out, **SETTINGS, processes=processes).complete


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 2, 3, 1)])
def test_the_part_that_ends_last_finishes(tiny_vae: AutoencoderKL, tmp_path: Path, order: tuple[int, ...]) -> None:
    write_store(tiny_vae, Pictures(40), tmp_path / "whole", **SETTINGS)
    out = tmp_path / "parts"
    for number, part in enumerate(order):
        assert encode(tiny_vae, out, part, 3) == (number == len(order) - 1)
        # units of this part alone were added: each unit is done by one part
        done = {int(path.stem) % 3 + 1 for path in (out / UNITS).glob("*.json")}
        assert done <= {*order[: number + 1]} or read_manifest(out).complete
    assert tree(out) == tree(tmp_path / "whole") and verify(out) == []
    assert encode(tiny_vae, out, 2, 3)  # started again after the end
    assert tree(out) == tree(tmp_path / "whole")


def test_two_that_begin_at_once_see_one_store(
    tiny_vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another part makes the manifest just before this one lists the folder."""
    out, listed, begun = tmp_path / "s", Path.iterdir, list[Path]()

    def late(folder: Path) -> Iterator[Path]:
        if folder == out and not begun:
            begun.append(folder)
            encode(tiny_vae, out, 1, 2)
        return listed(folder)

    out.mkdir()
    # ownership lists the folder too, to see what is left in it
    monkeypatch.setattr(writer, "begin", lambda *given: (monkeypatch.setattr(Path, "iterdir", late), begin(*given))[1])
    assert encode(tiny_vae, out, 2, 2) and begun == [out]


def test_more_parts_than_units(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    assert not encode(tiny_vae, tmp_path / "s", 4, 4, pictures=9)
    assert not encode(tiny_vae, tmp_path / "s", 1, 4, pictures=9)
    assert encode(tiny_vae, tmp_path / "s", 2, 4, pictures=9)


def test_a_launch_without_a_part_does_the_rest(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    assert not encode(tiny_vae, tmp_path / "s", 2, 3)
    assert write_store(tiny_vae, Pictures(40), tmp_path / "s", **SETTINGS).complete
    write_store(tiny_vae, Pictures(40), tmp_path / "whole", **SETTINGS)
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def test_an_image_that_has_changed_since_is_seen_by_its_part(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    encode(tiny_vae, tmp_path / "s", 1, 2)
    changed = Pictures(40, bad=(0,))
    with refused(UsageError, "OUT"):
        write_store(tiny_vae, changed, tmp_path / "s", **SETTINGS, processes=Processes(part=Part(1, 2)))
    # what another part has done is not this one's to read
    assert write_store(tiny_vae, changed, tmp_path / "s", **SETTINGS, processes=Processes(part=Part(2, 2))).complete


@pytest.mark.parametrize("how", ["update", "retry_quarantined"])
def test_what_differs_is_found_by_one_launch(tiny_vae: AutoencoderKL, tmp_path: Path, how: str) -> None:
    with refused(UsageError, "part 1/2"):
        write_store(
            tiny_vae, Pictures(9), tmp_path / "s", **SETTINGS, **{how: True}, processes=Processes(part=Part(1, 2))
        )


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "-1/4", "1/4/2", ""])
def test_a_part_is_named_from_1_to_n(text: str) -> None:
    with refused(UsageError, "--job_part"):
        Part.parse(text, "--job_part")


def test_the_verb(
    tiny_vae_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["encode", str(tiny_vae_folder), str(image_folder), str(tmp_path / "s"), "--resolution", "32"]
    words += ["--batch_size", "2", "--shard_size", "2", "--num_workers", "0", "--job_part"]
    for part, end in (("2/2", "part 2/2"), ("1/2", "samples in")):
        arguments = parser().parse_args([*words, part])
        arguments.run(arguments)
        assert end in capsys.readouterr().out


# --- ownership --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["locks", pytest.param("no locks", marks=pytest.mark.slow)])
def impatient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 3.0)
    if request.param == "no locks":
        without_locks(monkeypatch)


@contextlib.contextmanager
def held(folder: Path, part: Part, stop: threading.Event, *, turn: bool = False) -> Iterator[None]:
    """Another thread owns a part meanwhile, or until it is told to stop."""
    ready = threading.Event()

    def hold() -> None:
        with own(folder, "OUT", part) as owner, owner.turn() if turn else contextlib.nullcontext():
            ready.set()
            assert stop.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("impatient")
def test_parts_of_one_number_are_owned_beside_each_other_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with held(folder, Part(1, 3), threading.Event()):
        with own(folder, "OUT", Part(2, 3)) as owner:
            owner.check()
            with owner.turn():
                owner.check()
        for other in (Part(1, 1), Part(1, 3), Part(2, 4), Part(1, 13)):
            with refused(UsageError, "OUT"), own(folder, "OUT", other):
                raise AssertionError
    with held(folder, Part(1, 1), threading.Event()), refused(UsageError, "OUT"), own(folder, "OUT", Part(2, 3)):
        raise AssertionError
    with own(folder, "OUT"):
        pass
    assert not folder.exists()


@pytest.mark.usefixtures("impatient")
def test_a_turn_waits_for_that_of_another_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, stop = list[str](), threading.Event()

    def hear(text: str, **_: object) -> None:
        said.append(text)
        stop.set()  # the other's turn ends when this one waits for it

    monkeypatch.setattr(ownership, "print", hear, raising=False)
    folder = tmp_path / "s"
    with (
        held(folder, Part(2, 9), stop, turn=True),
        own(folder, "OUT", Part(1, 9)) as owner,
        owner.turn(),
    ):
        assert stop.is_set() and "one part at a time" in said[0]
