"""`ldm-vae store push|pull`: a store to a hub, and from a hub or any URL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm_vae.core.request import Action, argument, flag

DESCRIPTION = """\
  ldm-vae store push my-latents me/my-latents       # upload to a dataset repository of the hub, with a card
  ldm-vae store pull me/my-latents copy             # download; also from a URL (s3://bucket/latents)
"""


@dataclass(frozen=True, kw_only=True)
class Push:
    """A store to upload."""

    store: str = argument("STORE", "folder of a latent store")
    repo: str = argument("REPO_ID", "owner/name; created if it does not exist")
    private: bool = flag("create the repository as private", False)
    license: str | None = flag("licence of the data, for the card (cc0-1.0, ...)", metavar="NAME")
    vae: str | None = flag("VAE that decodes the card's samples (default: the one in the manifest)", metavar="VAE")
    revision: str | None = flag("branch of the repository", metavar="NAME")
    dry_run: bool = flag("only list the files to send", False)


@dataclass(frozen=True, kw_only=True)
class Pull:
    """A store to download."""

    place: str = argument("REPO_ID|URL", "owner/name of a dataset repository, or the URL of a store")
    out: str = argument("OUT", "folder for the store")
    revision: str | None = flag("branch, tag or commit of the repository", metavar="NAME")
    dry_run: bool = flag("only list the files to download", False)


def folder(text: str, field: str) -> Path:
    """A place that has to be a folder. Raises UsageError for a URL, with what would do."""
    from ldm_vae.core.errors import UsageError
    from ldm_vae.latent_store.format.manifest import place_of

    place = place_of(text)
    if isinstance(place, str):
        raise UsageError(
            f"{field} {text}: expected a folder, got a URL; `ldm-vae store pull URL FOLDER` brings a store into one, "
            "`ldm-vae store merge FOLDER URL` writes one to a URL"
        )
    return place


def _push(request: Push) -> None:
    from ldm_vae.export.store_push import plan_push, push

    plan = plan_push(folder(request.store, "STORE"), request.repo, request.revision)
    print(f"{request.repo}: {plan}")
    if not request.dry_run:
        address = push(plan, private=request.private, license=request.license, vae=request.vae)
        print(f'{request.store}: is at {address}; LatentDataset("hf://datasets/{request.repo}") reads it there')


def _pull(request: Pull) -> None:
    from urllib.parse import quote

    from ldm_vae.core.errors import UsageError
    from ldm_vae.latent_store.maintain.summary import describe
    from ldm_vae.latent_store.remote.pull import plan_pull, pull

    place = request.place
    if "://" not in place:
        revision = f"@{quote(request.revision, safe='')}" if request.revision else ""
        place = f"hf://datasets/{place}{revision}"
    elif request.revision:
        raise UsageError(f"--revision: goes with owner/name, not with the URL {place}")
    plan = plan_pull(place, folder(request.out, "OUT"))
    print(f"{request.out}: {plan}")
    if not request.dry_run:
        print(describe(request.out, pull(plan)))


ACTIONS = {
    "push": Action("upload to a dataset repository of the hub; repeat to resume", Push, _push),
    "pull": Action("download from a hub or a URL; repeat to resume or update", Pull, _pull),
}
