"""Call `ldm-vae` in this process, as the console script does, for tests that call it often."""

from __future__ import annotations

import sys
from unittest import mock

import pytest

from ldm_vae import cli


def run_cli(*arguments: object) -> int:
    """The exit status."""
    with mock.patch.object(sys, "argv", ["ldm-vae", *map(str, arguments)]), pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)
