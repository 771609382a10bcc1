"""`ldm-vae VERB ...`: the toolkit's one console script. Each verb is a file in `commands/`; torch is imported by the
verb that needs it, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from typing import Any

import shtab

from ldm_vae import __version__, commands
from ldm_vae.core.errors import run_program
from ldm_vae.core.request import Parser, add_actions, add_request

ORDER = (
    "assets", "inspect", "config", "train", "export", "encode", "store", "evaluate", "latent_space", "report",
    "diffuse", "prior", "probe", "reconstruct", "decode", "compress", "decompress", "fp16", "drift", "tiling", "doctor",
)  # fmt: skip

EPILOG = """\
from photographs to a latent space:
  ldm-vae train configs/kl_f8_d4.yaml --data.path PHOTOS --output_dir runs/mine
  ldm-vae export runs/mine my-vae
  ldm-vae encode my-vae PHOTOS my-latents --resolution 256
  ldm-vae evaluate my-vae HELD_OUT --output runs/mine/report --resolution 256

several processes: replace `ldm-vae` with `accelerate launch -m ldm_vae`.
exit status: 0 success, 1 failure, 2 usage error, 70 a fault of this program, 130 / 143 stopped after saving.
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="ldm-vae",
        description="Train, export, cache and measure the autoencoder of a latent diffusion model.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"ldm-vae {__version__}")
    top.add_argument(
        "--print_completion", action=_PrintCompletion, choices=shtab.SUPPORTED_SHELLS,
        help="print a script by which a shell completes this",
    )  # fmt: skip
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    exist = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    for name in sorted(exist, key=lambda verb: (ORDER.index(verb) if verb in ORDER else len(ORDER), verb)):
        command = importlib.import_module(f"ldm_vae.commands.{name}")
        verb = verbs.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            add_help=getattr(command, "ADD_HELP", True),
            prefix_chars=getattr(command, "PREFIX_CHARS", "-"),
        )
        if hasattr(command, "ACTIONS"):
            add_actions(verb, command.ACTIONS)
        else:
            add_request(verb, command.Request, command.run)
    return top


class _PrintCompletion(shtab.completion_action()):  # type: ignore[misc]  # a class that shtab makes
    """shtab's, whose menus have a verb's line of help in the place of the first line of its description."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        _forget_descriptions(parser)
        super().__call__(parser, *rest)


def _forget_descriptions(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                verb.description = None
                _forget_descriptions(verb)


def call(*words: str) -> None:
    """Run a command line in this process; what goes wrong is raised, not printed."""
    arguments = parser().parse_args(words)
    arguments.run(arguments)


def main() -> None:
    """Entry point of the console script."""
    run_program(lambda: call(*sys.argv[1:]))
