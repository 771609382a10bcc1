"""Arrow tables from files of anybody: types and values that Python can take."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa


def check_values(table: pa.Table) -> None:
    """Raises ValueError, OverflowError or pa.ArrowException unless columns have names of their own, text is UTF-8 and
    times are those that Python has."""
    if len({*table.column_names}) < len(table.column_names):
        raise ValueError("two columns have one name")
    table.validate(full=True)  # offsets are believed later on: those of a tampered file lead out of its memory
    for field in table.schema:
        if any(map(pa.types.is_temporal, kinds_within(field.type))):
            try:
                table.column(field.name).to_pylist()
            except Exception as error:  # by the type and its unit: of Python, of pandas, of the time zones' data
                raise ValueError(f"column {field.name}: {field.type} has values that are no times") from error


def kinds_within(kind: pa.DataType) -> Iterator[pa.DataType]:
    """A type, and those of its elements and fields."""
    yield kind
    for place in range(kind.num_fields):
        yield from kinds_within(kind.field(place).type)
