"""Kill everything at random moments and compare with what was never disturbed.

    python -m tests.torture --minutes 10                 # from the root of the repo; ends at 10 minutes
    python -m tests.torture --minutes 60 --kills 200     # or when each victim was killed so often
    python -m tests.torture --minutes 5 --seed 7 --only encode --programs 1

Victims: training, encoding images (to a bucket as well), clips and sounds, exporting and pushing to a hub (on the
loopback interface), the first two also as two processes of which one is killed, or both; training and encoding with
data workers, too. Most are forked children that run the real entry point (tests/helpers/fork_server.py), a share
(--programs) are new interpreters under Accelerate's launcher, killed with all they started, or the launcher alone.
Whenever a victim gets to its end, what it left is compared, bit for bit, with what it leaves when nothing disturbs it;
after every kill, what is there must be readable. The exit status is 1 if anything was lost, doubled, unreadable or
different.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # run with -m from the root, without pytest's `pythonpath`

import psutil
from kills import Launched, Reaper
from loopback_hub import serve
from loopback_s3 import connected
from victims import KINDS, Bench, Figures

from ldm_vae.core.request import Parser

# --- the rounds -------------------------------------------------------------------------------------------------------


def round_of_children(bench: Bench, reaper: Reaper) -> None:
    """Forked children: all are killed, or one of several."""
    victims = bench.start(bench.out, reaper.draw)
    ended = reaper.strike(victims, one=bench.processes > 1 and reaper.draw.random() < 0.5, begun=bench.begun)
    for done in ended:
        assert "Traceback" not in done.stderr, done.stderr
    if all(done.returncode == 0 for done in ended):
        finish(bench)


def round_of_a_program(bench: Bench, reaper: Reaper) -> None:
    """A new interpreter, or several under their launcher: all are killed, or the launcher alone."""
    bench.figures.programs += 1
    program = bench.launch(reaper.draw)
    if bench.processes == 1 or reaper.draw.random() < 0.5:
        if reaper.strike([program], begun=lambda: has_imported(bench, program))[0].returncode == 0:
            finish(bench)
        return
    while program.running() and not has_imported(bench, program):
        time.sleep(0.01)
    time.sleep(reaper.draw.uniform(0.0, reaper.longest))
    orphans = []
    if program.running():
        reaper.kills += 1
        orphans = program.kill_alone()
    program.wait()
    _, alive = psutil.wait_procs(orphans, timeout=120)
    assert alive == [], "orphans of a killed launcher stop by themselves"


def has_imported(bench: Bench, program: Launched) -> bool:
    """An interpreter imports for seconds; it is worth killing when the last of its processes has torch in memory."""
    members = program.members()
    if not bench.begun() or len(members) < (1 if bench.processes == 1 else 1 + bench.processes):
        return False
    with contextlib.suppress(psutil.Error):
        return any("/torch/_C." in entry.path for entry in members[-1].memory_maps())
    return False


def finish(bench: Bench) -> None:
    bench.figures.finished += 1
    bench.compare()
    bench.clear()


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A folder with a hub and an object store beside it."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder, serve() as address, connected():
        os.environ |= {"HF_ENDPOINT": address, "HF_TOKEN": "hf_of_nobody", "NO_PROXY": "127.0.0.1"}
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ |= before


def torture(
    folder: Path, *, minutes: float, kills: int, seed: int, only: Sequence[str], programs: float
) -> dict[str, Figures]:
    """The figures of each victim; each is killed `kills` times, or as often as the minutes allow."""
    stop = time.monotonic() + 60 * minutes
    draw = random.Random(seed)
    benches = []
    for name in only:
        for processes in (1, 2) if name in ("train", "encode") else (1,):
            benches.append(KINDS[name](folder / f"{name}-{processes}", processes))
    reapers = [(Reaper(draw), Reaper(draw, longest=5.0)) for _ in benches]
    while time.monotonic() < stop and any(bench.figures.kills < kills for bench in benches):
        for bench, (of_children, of_programs) in zip(benches, reapers, strict=True):
            if bench.figures.kills < kills and time.monotonic() < stop:
                if draw.random() < programs:
                    round_of_a_program(bench, of_programs)
                else:
                    round_of_children(bench, of_children)
                bench.figures.kills = of_children.kills + of_programs.kills
                bench.look()
    for bench in benches:  # at last nobody is killed any more
        for victim in bench.start(bench.out, draw):
            done = victim.wait(600)
            assert done.returncode == 0, done.stderr
        bench.look()
        finish(bench)
    return {
        f"{bench.name}, {bench.processes} process{'es'[: 2 * bench.processes - 2]}": bench.figures for bench in benches
    }


FAULTS = {name: name for name in ("lost", "doubled", "unreadable", "different")}
COLUMNS = {"kills": "kills", "programs": "programs", "finished": "finished", **FAULTS}


def table(figures: dict[str, Figures], names: Mapping[str, str] = COLUMNS) -> str:
    """A line for each victim and one for all; names: field of the figures => title of its column."""
    lines = [f"{'':22}" + "".join(f"{title:>12}" for title in names.values())]
    rows = {**figures, "all": Figures(**{name: sum(getattr(one, name) for one in figures.values()) for name in names})}
    lines += [f"{what:22}" + "".join(f"{getattr(one, name):12}" for name in names) for what, one in rows.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Figures]:
    parser = Parser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, required=True, help="stop killing after so long")
    parser.add_argument("--kills", type=int, default=10**6, help="or when each victim was killed so often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=tuple(KINDS))
    parser.add_argument("--programs", type=float, default=0.1, help="share of new interpreters (0.1)")
    chosen = parser.parse_args(arguments)
    begun = time.monotonic()
    with place() as folder:
        figures = torture(
            folder, minutes=chosen.minutes, kills=chosen.kills, seed=chosen.seed, only=chosen.only,
            programs=chosen.programs,
        )  # fmt: skip
    print(table(figures))
    sound = all(one.sound for one in figures.values())
    print(f"{time.monotonic() - begun:.0f} s: {'nothing lost' if sound else 'FAILED'}")
    return figures


if __name__ == "__main__":
    sys.exit(not all(one.sound for one in main().values()))
