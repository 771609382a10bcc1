"""The torture in short: `python -m tests.torture --minutes 10` is the same, longer and with new interpreters."""

from __future__ import annotations

import pytest
from victims import Figures

from tests import torture
from tests.soak import Sample, verdict


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    figures = torture.main(["--minutes", "8", "--kills", "1", "--programs", "0"])
    assert len(figures) == 9
    for what, one in figures.items():
        assert one.kills >= 1 and one.finished >= 1 and one.sound, what
    assert "nothing lost" in capsys.readouterr().out


def test_the_figures_condemn() -> None:
    assert Figures(kills=9, finished=2).sound
    for name in ("lost", "doubled", "unreadable", "different"):
        assert not Figures(**{name: 1}).sound
    assert "lost" in torture.table({"x": Figures(lost=3)})


def test_a_leak_is_not_level() -> None:
    rounds = range(40)
    assert verdict([Sample(60.0 * n, 900.0 + (-1) ** n * 9, 20, 5) for n in rounds])[0]
    assert not verdict([Sample(60.0 * n, 900.0 + 2 * n, 20, 5) for n in rounds])[0]
    assert not verdict([Sample(60.0 * n, 900.0, 20 + n // 10, 5) for n in rounds])[0]
    assert not verdict([Sample(60.0 * n, 900.0, 20, 5 + n // 20) for n in rounds])[0]
