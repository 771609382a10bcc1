"""Break each property of tests/mutations.md in a copy of the tree and see its test go red.

python tests/mutations.py [WORD]      # WORD: only the files whose name holds it
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CELL = re.compile(r"`((?:[^`])+)`")
FAILED = 1  # pytest's status when tests ran and failed: a mutation that cannot be imported is no evidence


def rows() -> list[tuple[str, str, str, str]]:
    """(file, old text, new text, test) of each line of the table."""
    lines = (ROOT / "tests" / "mutations.md").read_text(encoding="utf-8").splitlines()
    found = [tuple(CELL.findall(line)) for line in lines if line.startswith("| `")]
    assert all(len(row) == 4 for row in found), "each row holds four pieces of code"
    return found  # type: ignore[return-value]


def copy_tree(to: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [row for row in rows() if word in row[0]]
    green = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for file, old, new, test in chosen:
            path = tree / file
            before = path.read_text(encoding="utf-8")
            if old not in before:
                green.append(f"{file}: does not hold `{old}`")
                continue
            path.write_text(before.replace(old, new, 1), encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"]
            environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
            path.write_text(before, encoding="utf-8")
            print(f"{'red  ' if done.returncode == FAILED else 'GREEN'} {file}: {old} => {new} ({test})", flush=True)
            if done.returncode != FAILED:
                green.append(f"{file}: {old}")
    print(f"{len(chosen)} mutations, {len(green)} not seen" + "".join(f"\n  {line}" for line in green))
    sys.exit(bool(green))


if __name__ == "__main__":
    main()
