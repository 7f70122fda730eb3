"""How many updates of a page by page backfill stay on their page: worked out on blocks of the table itself.

The bytes of every value are read, not the values; nothing is written. PostgreSQL's own rules say how long a row is
today, how long it will be with its vector, and what of it moves to TOAST (src/backend/access/heap/heaptoast.c,
heap_toast_insert_or_update). Values that TOAST would squeeze first are taken as they are: that moved no forecast of
the measured tables by more than a few points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import identifier, verbatim
from runbook_lib.core.phase import Phase
from runbook_lib.indexes.forecast import LINE_POINTER, PAGE, PAGE_HEADER, TOAST_THRESHOLD, vector_bytes
from runbook_lib.migrate.expand_schema import added_columns
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("staying")

# Blocks that are looked at: some thousands of rows, read within a fraction of a second.
BLOCKS = 200
# A TOAST pointer; a value no longer than this, aligned, is not worth one.
TOAST_POINTER = 18
TOO_SHORT_FOR_TOAST = 24
# HeapTupleHeaderData without its bitmap of nulls.
ROW_HEADER = 23
MAXALIGN = 8
# A value with a header of one byte is not aligned; the timestamp; the hash with such a header.
LONGEST_SHORT_VALUE = 127
TIME, HASH = 8, 17
ALIGNMENT = {"c": 1, "s": 2, "i": 4, "d": 8}
# x: may go to TOAST, squeezed; e: may go there as it is.
LEAVES_THE_ROW = ("x", "e")


@dataclass(frozen=True)
class Value:
    """A value in its row. storage: as in pg_attribute."""

    bytes: int
    varies: bool
    align: int
    storage: str


@dataclass(frozen=True)
class Row:
    """A row on its page. waits: it still wants a vector; ``after``: its bytes once it has one."""

    before: int
    after: int
    waits: bool


@dataclass(frozen=True)
class Sampled:
    """What the blocks told. hot_share: forecast share of updates that stay on their page, 0 to 1."""

    rows: int
    row_bytes: float
    hot_share: float


def look(phase: Phase, part: str, blocks: int) -> Sampled:
    """Reads some blocks of a relation, as PostgreSQL spells it, and goes through the backfill on them."""
    pages = list(_pages(phase, part, blocks))
    rows = [row for page in pages for row in page if row.waits]
    # A second worker's transaction is open while a pass commits, so what that pass leaves is tidied one pass later.
    late = phase.params.backfill.workers > 1
    stayed = sum(staying(page, late=late) for page in pages)
    mean = sum(r.before for r in rows) / len(rows) if rows else 0.0
    return Sampled(len(rows), mean, stayed / len(rows) if rows else 0.0)


def staying(page: Iterable[Row], *, late: bool = False) -> int:
    """How many rows of a page find room for their new version on it, when the largest is updated first.

    A row's old version leaves its room to the next, or with ``late`` to the one after the next.
    """
    rows = sorted(page, key=lambda r: -r.before)
    free, stayed = PAGE - PAGE_HEADER - sum(r.before + LINE_POINTER for r in rows), 0
    left: list[int] = []
    for row in (r for r in rows if r.waits):
        while len(left) > late:
            free += left.pop(0)
        if free >= row.after + LINE_POINTER:
            stayed += 1
            free -= row.after + LINE_POINTER
        left.append(row.before)
    return stayed


def row_bytes(values: Sequence[Value | None]) -> tuple[int, list[Value | None]]:
    """Bytes of a row of these values on its page, and the values as TOAST leaves them: the longest goes first."""
    kept = list(values)
    while (n := _laid_out(kept)) > TOAST_THRESHOLD:
        movable = [
            i for i, v in enumerate(kept) if v and v.storage in LEAVES_THE_ROW and v.bytes > TOO_SHORT_FOR_TOAST
        ]
        if not movable:
            break
        longest = max(movable, key=lambda i: kept[i].bytes)  # type: ignore[union-attr]
        kept[longest] = replace(kept[longest], bytes=TOAST_POINTER)  # type: ignore[type-var]
    return _aligned(n, MAXALIGN), kept


def _laid_out(values: Sequence[Value | None]) -> int:
    """heap_compute_data_size, and the header before it."""
    bitmap = (len(values) + 7) // 8 if None in values else 0
    at = _aligned(ROW_HEADER + bitmap, MAXALIGN)
    for value in values:
        if value is not None:
            short = value.varies and value.bytes <= LONGEST_SHORT_VALUE
            at = (at if short else _aligned(at, value.align)) + value.bytes
    return at


def _aligned(at: int, to: int) -> int:
    return -(-at // to) * to


def with_vector(params: Params, values: Sequence[Value | None]) -> list[Value | None]:
    """The values of a row, as they stand today, and those that the backfill adds."""
    vector = Value(vector_bytes(params.vector.dimension, params.vector.type), True, 4, "e")
    return [*values, vector, Value(TIME, False, 8, "p"), Value(HASH, True, 4, "x")]


def _pages(phase: Phase, part: str, blocks: int) -> Iterable[list[Row]]:
    p = phase.params
    columns = db.rows(phase.connection, SQL["columns"], p, part=part, added=added_columns(p))
    sizes = sql.SQL(", ").join(sql.SQL("pg_column_size({})").format(identifier("t", c["name"])) for c in columns)
    hash_column = f"{p.vector.column}_hash"
    has_hash = any(c["name"] == hash_column for c in columns)
    waits = sql.SQL("{} IS NULL").format(identifier("t", hash_column)) if has_hash else sql.SQL("true")
    spelled = verbatim(part)
    query = SQL["sample"].compose({"part": spelled, "waits": waits, "sizes": sizes})
    percent = min(100.0, 100 * BLOCKS / max(blocks, 1))
    found = phase.connection.execute(query, {"percent": percent}).fetchall()
    for _, on_page in groupby(found, key=itemgetter("block")):
        yield [_row(p, columns, r) for r in on_page]


def _row(params: Params, columns: Sequence[db.Row], found: db.Row) -> Row:
    values = [
        None if size is None else Value(size, c["length"] == -1, ALIGNMENT[c["align"]], c["storage"])
        for c, size in zip(columns, found["sizes"], strict=True)
    ]
    if not found["waits"]:
        return Row(row_bytes(values)[0], 0, waits=False)
    before, own = row_bytes([v for v, c in zip(values, columns, strict=True) if not c["added"]])
    return Row(before, row_bytes(with_vector(params, own))[0], waits=True)
