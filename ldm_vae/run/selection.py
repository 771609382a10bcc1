"""`RUN --checkpoint best|last|N`: one of a run's checkpoints in the place of its finished vae/.

The choice is a path: `load_autoencoder` takes a checkpoint's folder, so every verb goes on with that, and latent stores
and results record it. Nothing heavy is imported at the top: `--help` shows the flag.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_vae.core.request import flag

METAVAR = "best|last|N"
HELP = "of a run: take the averaged weights of its best or last checkpoint, or of that at N images (default: its vae/)"


def checkpoint_flag() -> Any:
    """The flag of a request."""
    return flag(HELP, metavar=METAVAR)


def at_checkpoint(source: str, which: str | None) -> str:
    """The checkpoint of a run that `--checkpoint` names, or `source` itself where the flag is not given. Which one it
    is, is said on stderr.

    Args:
        source: a run folder.
        which: `best` by the held-out metric that the run's `best_metric` names, `last`, or a number of images seen.

    Raises:
        UsageError: it is no run, has no such checkpoint, or that is damaged; those that exist are listed.
    """
    if which is None:
        return source
    from ldm_vae.core.errors import UsageError
    from ldm_vae.core.terminal import print_note
    from ldm_vae.run import checkpoint

    place, folder = f"--checkpoint {which}", Path(source) / "checkpoints"
    if not folder.is_dir():
        raise UsageError(f"{place}: expected a run folder, which has checkpoints/, got {source}")
    found = {str(checkpoint.images_of(one)): one for one in reversed(checkpoint.newest_first(folder))}
    exist = f"there are {', '.join(found)}"
    last = checkpoint.newest(folder, lambda sentence: print_note(f"{source}: {sentence}"))
    if last is None:
        raise UsageError(f"{place}: {source} has no whole checkpoint")
    if which == "best":
        chosen, why = _best(last, f"{place}: {source}", exist)
    elif which == "last":
        chosen, why = last, "its last"
    elif which in found:
        chosen, why = found[which], "as asked for"
    else:
        raise UsageError(f"{place}: expected best, last or the images seen of a checkpoint of {source}; {exist}")
    if chosen != last and (damage := checkpoint.damage_of(chosen)):
        raise UsageError(f"{place}: {chosen} is damaged ({damage}); {exist}")
    print_note(f"{source}: the averaged weights of checkpoint {chosen.name} are taken, {why}")
    return str(chosen)


def _best(last: Path, place: str, exist: str) -> tuple[Path, str]:
    """The best checkpoint as the last one knows it, and the reason in words."""
    from ldm_vae.core.config import validate
    from ldm_vae.core.config_file import read_yaml
    from ldm_vae.core.errors import UsageError
    from ldm_vae.core.files import read_bytes
    from ldm_vae.core.validation import parse_json
    from ldm_vae.run.folder import Info

    best = validate(Info, parse_json(read_bytes(last / "state.json"))["info"], f"{last}/state.json").best
    if best is None:
        raise UsageError(f"{place} was not validated (validate_every_images), so none is known as the best; {exist}")
    chosen = last.parent / best.checkpoint
    if not chosen.is_dir():
        raise UsageError(f"{place}: its best checkpoint, {chosen.name}, is not there any more; {exist}")
    metric = read_yaml(last / "config.yaml").get("best_metric", "its metric")
    return chosen, f"its best by {metric} on held-out images ({best.score:.5g})"
