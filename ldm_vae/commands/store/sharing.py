"""`ldm-vae store push|pull`: a store to a hub, and from a hub or any URL."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = """\
  ldm-vae store push my-latents me/my-latents       # to a dataset repository of the hub, with a card
  ldm-vae store pull me/my-latents copy             # and back; a URL (s3://bucket/latents) does as well
"""


def add_arguments(actions: Any) -> None:
    push = actions.add_parser("push", help="send it to a dataset repository of the hub; again goes on")
    push.add_argument("store", metavar="STORE", help="folder of a latent store")
    push.add_argument("repo", metavar="REPO_ID", help="owner/name; made if it does not exist")
    push.add_argument("--private", action="store_true", help="if it is made now, only its owner may see it")
    push.add_argument("--license", metavar="NAME", help="of the data, for the card (cc0-1.0, ...)")
    push.add_argument(
        "--vae", metavar="VAE", help="decodes the card's picture (default: where the manifest says it was)"
    )
    pull = actions.add_parser("pull", help="copy it from a hub or a URL; again goes on, or fetches what was added")
    pull.add_argument("place", metavar="REPO_ID|URL", help="owner/name of a dataset repository, or the URL of a store")
    pull.add_argument("out", metavar="OUT", help="folder for the store")
    for action in (push, pull):
        action.add_argument("--revision", metavar="NAME", help="branch of the repository (pull: tag or commit as well)")
        action.add_argument("--dry_run", action="store_true", help="only say what would be sent or fetched")


def push(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ldm_vae.export.store_push import plan_push, push

    plan = plan_push(Path(arguments.store), arguments.repo, arguments.revision)
    print(f"{arguments.repo}: {plan}")
    if not arguments.dry_run:
        address = push(plan, private=arguments.private, license=arguments.license, vae=arguments.vae)
        print(f'{arguments.store}: is at {address}; LatentDataset("hf://datasets/{arguments.repo}") reads it there')


def pull(arguments: argparse.Namespace) -> None:
    from pathlib import Path
    from urllib.parse import quote

    from ldm_vae.core.errors import UsageError
    from ldm_vae.latent_store.maintain.summary import describe
    from ldm_vae.latent_store.remote.pull import plan_pull, pull

    place = arguments.place
    if "://" not in place:
        revision = f"@{quote(arguments.revision, safe='')}" if arguments.revision else ""
        place = f"hf://datasets/{place}{revision}"
    elif arguments.revision:
        raise UsageError(f"--revision: goes with owner/name, not with the URL {place}")
    plan = plan_pull(place, Path(arguments.out))
    print(f"{arguments.out}: {plan}")
    if not arguments.dry_run:
        print(describe(arguments.out, pull(plan)))
