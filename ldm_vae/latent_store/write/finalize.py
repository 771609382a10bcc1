"""Finishing: the unit records become the manifest and quarantine.jsonl. Doing it again gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ldm_vae.core import intervals
from ldm_vae.core.ahead import ahead
from ldm_vae.core.errors import WorkError
from ldm_vae.core.progress import Progress
from ldm_vae.latent_store.format import rows, work_units
from ldm_vae.latent_store.format.codes import CodeStatistics
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import PLAN, QUARANTINE, SHARDS, UNITS
from ldm_vae.latent_store.format.manifest import Manifest, ShardRecord, write_manifest
from ldm_vae.latent_store.format.quarantine import write_quarantine
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.latent_store.format.work_units import BadSample, Plan, UnitRecord
from ldm_vae.latent_store.remote.at_hand import mapped_tensors, rows_of, sums_of
from ldm_vae.latent_store.storage.places import Place, storage_at


def finish(store: Place, manifest: Manifest, plan: Plan, *, max_bad: float = 1.0, partly: bool = False) -> Manifest:
    """Merge the records of a plan's units into the manifest, and remove what killed processes left. A plan that is
    merged already changes nothing. The store is the caller's (`ownership`).

    Args:
        partly: units without a record are left out: what they would have held is not in the store.

    Raises:
        WorkError: a unit has no record yet, nothing is usable, or more than `max_bad` of the images is bad; another
            plan was merged in this one's place.
    """
    if manifest.units > plan.first_unit:  # units are counted on: these numbers are in the manifest
        if manifest.source != plan.source:
            raise WorkError(f"store {store}: was changed by another launch meanwhile; run the same command again")
        return manifest
    planned, work = plan.units(manifest.identity.shard_size), plan.digest(manifest.identity)
    found = zip(planned, work_units.read_records(store, planned, work), strict=True)
    records = [
        record
        for unit, read in Progress(found, "merge", len(planned), unit="units", leave=False)
        if (record := _checked(store, unit.number, read, partly)) is not None
    ]
    bad = sorted([*plan.bad, *(entry for record in records for entry in record.bad)], key=lambda entry: entry.index)
    before = [shard.without(plan.removed.get(shard.name, ())) for shard in manifest.shards]
    entries = [*before, *(shard for record in records for shard in record.shards)]
    # before the check, whose sentence names the file
    write_quarantine(store, bad)
    live = sum(shard.live for shard in entries)
    _check_usable(store, plan, live, bad, max_bad)
    columns = dict(manifest.columns)
    for record in records:
        # Arrow's type of a column without any value is null: the first unit that has values decides
        columns |= {name: kind for name, kind in record.columns.items() if columns.get(name, "null") == "null"}
    complete = manifest.model_copy(
        update={
            "complete": True,
            "source": plan.source,
            "settings": tuple(dict.fromkeys([*manifest.settings, *(record.settings for record in records)])),
            "units": plan.first_unit + len(planned),
            "samples": live,
            "quarantined": len(bad),
            "columns": columns,
            "statistics": merged_statistics(store, manifest, entries).to_json(),
            "shards": tuple(entries),
        }
    )
    # The manifest is the commit: a kill before it leaves the records to merge again; a plan that a kill leaves behind
    # it is known as merged by its unit numbers (`read_plan`).
    write_manifest(store, complete)
    storage_at(store).remove(PLAN)
    storage_at(store).tidy(SHARDS, UNITS)
    return complete


def _checked(store: Place, unit: int, record: UnitRecord | None, partly: bool) -> UnitRecord | None:
    if record is None and not partly:
        raise WorkError(f"store {store}: unit {unit} is not done; run the same `ldm-vae encode` command again")
    return record


def _check_usable(store: Place, plan: Plan, live: int, bad: Sequence[BadSample], max_bad: float) -> None:
    total = plan.source.samples
    if live == 0:
        first = f", the first is {bad[0].key}: {bad[0].reason}" if bad else ""
        raise WorkError(f"no usable image among {total:,}; see {store}/{QUARANTINE}{first}")
    if len(bad) > max_bad * total:
        raise WorkError(
            f"{len(bad):,} of {total:,} images are unusable, more than max_bad {max_bad:g} allows; "
            f"see {store}/{QUARANTINE}"
        )


def merged_statistics(
    store: Place, manifest: Manifest, entries: Sequence[ShardRecord]
) -> LatentStatistics | CodeStatistics:
    """The sums of all shards, in their order; of a shard that has lost rows, taken anew from the others."""
    total = rows.accumulator(manifest.identity)
    live = [shard for shard in entries if shard.live]
    for table in ahead(lambda shard: _sums(store, manifest.identity, shard), live, storage_at(store).connections):
        total.add(table)
    return total


def _sums(store: Place, identity: Identity, shard: ShardRecord) -> npt.NDArray[np.float64]:
    table = None if shard.removed else sums_of(store, identity, shard)
    if table is not None and rows.are_sums(table, identity, shard):
        return np.array(table)
    keys = rows_of(store, shard, ["key"], shard.rows).column("key").take(shard.live_rows).to_pylist()
    return rows.live_statistics(identity, shard, mapped_tensors(store, identity, shard), keys)


def with_intervals(store: Place, manifest: Manifest) -> Manifest:
    """The manifest of a store; of one that an older version made, with the intervals taken anew from the sums in
    its shards, where those can be read."""
    measured = manifest.statistics
    if measured is None or manifest.identity.codes is not None or measured.get("ci95_method") == intervals.METHOD:
        return manifest
    try:
        anew = merged_statistics(store, manifest, manifest.shards).to_json()
    except WorkError:  # damaged: `verify` says what
        return manifest
    return manifest.model_copy(update={"statistics": measured | {key: anew[key] for key in ("ci95", "ci95_method")}})
