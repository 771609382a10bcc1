"""Publication of a shard: spooled rows and their columns become its three files and its record.

Encoding, merging, splitting and every conversion publish by this one function, so equal rows give equal bytes whatever
made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ldm_vae.core.errors import WorkError
from ldm_vae.core.validation import first_line
from ldm_vae.latent_store.format import rows, shards
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import TENSORS, shard_file
from ldm_vae.latent_store.format.manifest import ShardRecord
from ldm_vae.latent_store.storage.objects import Storage

Group = tuple[int, ...]  # resolution, height, width, and of clips their frames: what rows of one shard share


def publish_shard(
    storage: Storage,
    identity: Identity,
    unit: int,
    group: Group,
    spool: shards.Spool,
    samples: Sequence[Mapping[str, Any]],
) -> tuple[ShardRecord, dict[str, str]]:
    """Publish the rows of one group of a unit; the shard's record, and the Arrow type of each column.

    Args:
        spool: the tensors of the rows, at least one.
        samples: the columns of each row, among them `key`.
    """
    resolution, height, width, *frames = group
    # the usual store has one shard a unit, whose name is its number alone
    one_group = len(identity.resolution) == 1 and identity.bucket_step is None and not frames
    name = f"{unit:08d}" if one_group else f"{unit:08d}-{resolution}-{'x'.join(map(str, group[1:]))}"
    table = shards.to_table(samples)
    try:
        shards.check_table(table, whole=True)  # what would not be read again is not written
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise WorkError(f"{shard_file(name)}: {first_line(error)}") from error
    sums = rows.statistics(identity, spool.read, [sample["key"] for sample in samples])
    metadata = {"encoder": identity.encoder, "unit": str(unit)}
    files = {TENSORS: shards.write_tensors(storage, shard_file(name), spool, sums, metadata)}
    files |= shards.write_rows(storage, shard_file(name), table)
    record = ShardRecord(
        name=name,
        unit=unit,
        rows=spool.rows,
        shape=spool.specs[0].shape,
        resolution=resolution,
        size=(height, width),
        frames=frames[0] if frames else None,
        files=files,
    )
    return record, {field.name: str(field.type) for field in table.schema}
