"""quarantine.jsonl: the images that are not in a store, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ldm_vae.core.errors import WorkError
from ldm_vae.core.text import decode, lines
from ldm_vae.core.validation import why_unreadable
from ldm_vae.latent_store.format.layout import QUARANTINE
from ldm_vae.latent_store.format.work_units import BadSample
from ldm_vae.latent_store.storage.objects import LocalFolder


def write_quarantine(store: Path, bad: Sequence[BadSample]) -> None:
    """Replace quarantine.jsonl; one entry a line, in the order given."""
    entries = [json.dumps(entry.model_dump(mode="json"), ensure_ascii=False) + "\n" for entry in bad]
    LocalFolder(store).replace(QUARANTINE, "".join(entries).encode())


def read_quarantine(store: Path) -> list[BadSample]:
    """The entries of quarantine.jsonl; none where there is no such file. Raises WorkError for one that is damaged."""
    try:
        text = decode(LocalFolder(store).read(QUARANTINE))
        return [BadSample.model_validate_json(line) for line in lines(text)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise WorkError(f"{store / QUARANTINE}: cannot be read: {why_unreadable(store / QUARANTINE, error)}") from error
