"""Call `ldm-vae` in this process, as the console script does, for tests that call it often."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import pytest

from ldm_vae import cli
from ldm_vae.cli import parser


def run_cli(*arguments: object) -> int:
    """The exit status."""
    with mock.patch.object(sys, "argv", ["ldm-vae", *map(str, arguments)]), pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def call(*words: object) -> None:
    arguments = parser().parse_args([str(word) for word in words])
    arguments.run(arguments)


def program(module: Any, *words: object) -> None:
    before, sys.argv = sys.argv, [module.__name__, *map(str, words)]
    try:
        module.main()
    finally:
        sys.argv = before
