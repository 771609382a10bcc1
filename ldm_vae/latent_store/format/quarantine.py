"""quarantine.jsonl: the images that are not in a store, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ldm_vae.core.config import validate
from ldm_vae.core.errors import WorkError
from ldm_vae.core.text import lines
from ldm_vae.core.validation import parse_json, why_unreadable
from ldm_vae.latent_store.format.layout import QUARANTINE
from ldm_vae.latent_store.format.work_units import BadSample
from ldm_vae.latent_store.storage.places import Place, storage_at


def write_quarantine(store: Place, bad: Sequence[BadSample]) -> None:
    """Replace quarantine.jsonl; one entry a line, in the order given."""
    entries = [json.dumps(entry.model_dump(mode="json"), ensure_ascii=False) + "\n" for entry in bad]
    storage_at(store).replace(QUARANTINE, "".join(entries).encode())


def read_quarantine(store: Place) -> list[BadSample]:
    """The entries of quarantine.jsonl; none where there is no such file.

    Raises:
        WorkError: it is damaged.
    """
    path = f"{store}/{QUARANTINE}"
    try:
        text = storage_at(store).read(QUARANTINE).decode()
        return [validate(BadSample, parse_json(line), f"line {at}") for at, line in enumerate(lines(text), 1)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        reason = why_unreadable(Path(path), error)
        raise WorkError(f"{path}: damaged: {reason}; without this file an update tries again what it names") from error
