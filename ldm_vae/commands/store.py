"""`ldm-vae store verify|stats STORE`: look after a latent store."""

from __future__ import annotations

import argparse

HELP = "verify a latent store, or print its statistics"
DESCRIPTION = """\
  ldm-vae store verify my-latents    # reads everything again: checksums, rows, finite values
  ldm-vae store stats my-latents     # what is in it, and the measured scaling with its confidence intervals
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser("verify", help="read everything again and compare with the manifest")
    stats = actions.add_parser("stats", help="print what is in it and its statistics")
    for action in (verify, stats):
        action.add_argument("store", metavar="STORE", help="folder of a latent store")
    stats.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(arguments: argparse.Namespace) -> None:
    {"verify": _verify, "stats": _stats}[arguments.action](arguments)


def _verify(arguments: argparse.Namespace) -> None:
    from ldm_vae.errors import WorkError
    from ldm_vae.latent_store import read_manifest, verify

    problems = verify(arguments.store)
    for problem in problems:
        print(f"{problem.file}: {problem.what}")
    if problems:
        raise WorkError(f"store {arguments.store}: {len(problems)} problem(s), the first in {problems[0].file}")
    manifest = read_manifest(arguments.store)
    print(f"{arguments.store}: all {len(manifest.shards):,} shards with {manifest.samples:,} samples are sound")


def _stats(arguments: argparse.Namespace) -> None:
    import json

    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.reporting import describe

    manifest = read_manifest(arguments.store)
    if arguments.json:
        print(json.dumps(manifest.model_dump(mode="json", exclude={"shards"}), indent=2))
    else:
        print(describe(arguments.store, manifest))
