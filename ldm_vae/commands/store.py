"""`ldm-vae store verify|repair|stats STORE`: look after a latent store."""

from __future__ import annotations

import argparse

HELP = "verify or repair a latent store, or print its statistics"
DESCRIPTION = """\
  ldm-vae store verify my-latents    # reads everything again: checksums, rows, finite values
  ldm-vae store verify my-latents --reencode 100    # and encodes 100 random images again
  ldm-vae store repair my-latents    # makes again what is damaged, and only that
  ldm-vae store stats my-latents     # what is in it, and the measured scaling with its confidence intervals
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser("verify", help="read everything again and compare with the manifest")
    stats = actions.add_parser("stats", help="print what is in it and its statistics")
    repair = actions.add_parser("repair", help="make again what is damaged")
    for action in (verify, repair):
        action.add_argument("--vae", metavar="VAE", help="the store's VAE (default: where the manifest says it was)")
        action.add_argument("--data", metavar="DATA", help="the store's images (default: where they were)")
        action.add_argument("--image_column", help="column of the image, when DATA has several")
        action.add_argument("--split", default="train", help="split of a dataset (default train)")
    verify.add_argument("--reencode", type=int, metavar="N", help="encode N random images again and compare")
    for action in (verify, repair, stats):
        action.add_argument("store", metavar="STORE", help="folder of a latent store")
    stats.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(arguments: argparse.Namespace) -> None:
    {"verify": _verify, "repair": _repair, "stats": _stats}[arguments.action](arguments)


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
    if arguments.reencode is not None:
        _reencode(arguments)


def _reencode(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from ldm_vae.errors import UsageError, WorkError
    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.origins import find_source, find_vae
    from ldm_vae.latent_store.reencoding import reencode, unit_of

    if arguments.reencode < 1:
        raise UsageError(f"--reencode: expected at least 1, got {arguments.reencode}")
    store, manifest = Path(arguments.store), read_manifest(arguments.store)
    vae = find_vae(store, manifest, arguments.vae)
    source = find_source(manifest, vae, arguments.data, image_column=arguments.image_column, split=arguments.split)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = reencode(store, manifest, vae, source, arguments.reencode, device=device)
    for problem in found.problems:
        print(f"{problem.file}: {problem.what}")
    print(
        f"{store}: {found.samples:,} samples encoded again, {found.identical:,} to the same bits, "
        f"the largest difference is {found.worst:.2g} {unit_of(manifest)}"
    )
    if found.problems:
        raise WorkError(f"store {store}: {len(found.problems)} sample(s) are not what their images give")


def _repair(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from ldm_vae.latent_store import read_manifest, verify
    from ldm_vae.latent_store.encoding import default_threads, default_workers
    from ldm_vae.latent_store.origins import find_source, find_vae
    from ldm_vae.latent_store.repairing import repair

    store, manifest = Path(arguments.store), read_manifest(arguments.store)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = []

    def vae() -> object:
        loaded.append(find_vae(store, manifest, arguments.vae))
        return loaded[0]

    done = repair(
        store,
        vae=vae,
        source=lambda: find_source(
            manifest, loaded[0], arguments.data, image_column=arguments.image_column, split=arguments.split
        ),
        num_workers=default_workers(1),
        encode_threads=default_threads(1, device),
        device=device,
    )
    for file in done.copied:
        print(f"{file}: written again from its copy")
    for unit in done.encoded_units:
        print(f"unit {unit}: encoded again")
    for key in done.lost:
        print(f"{key}: has left the store, since its image is gone or has changed; `encode --update` takes it up")
    problems = verify(store)
    sound = "sound" if not problems else f"still damaged: {problems[0].file} {problems[0].what}"
    print(f"{store}: {'nothing to repair, ' if not (done.copied or done.encoded_units) else ''}{sound}")


def _stats(arguments: argparse.Namespace) -> None:
    import json

    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.reporting import describe

    manifest = read_manifest(arguments.store)
    if arguments.json:
        print(json.dumps(manifest.model_dump(mode="json", exclude={"shards"}), indent=2))
    else:
        print(describe(arguments.store, manifest))
