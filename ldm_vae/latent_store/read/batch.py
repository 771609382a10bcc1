"""Items and batches of a dataset: a batch holds whole tensors, and single items are made on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Item = dict[str, Any]


class BatchRows(Sequence[Item]):
    """The samples of one batch: `batch` is the ready dict of whole tensors, indexing makes single items from it."""

    def __init__(self, batch: Item, count: int) -> None:
        self.batch, self._count = batch, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[k] for k in range(*position.indices(self._count))]
        if not -self._count <= position < self._count:
            raise IndexError(position)
        return {name: values[position] for name, values in self.batch.items()}

    def __iter__(self) -> Iterator[Item]:
        return (self[position] for position in range(self._count))
