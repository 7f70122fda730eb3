"""What one sample costs: loaded, moved and indexed by the runbook's own statements, and measured on the way."""

from __future__ import annotations

import io
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import psycopg
from psycopg import sql

from runbook_lib.core import db, versions
from runbook_lib.core.names import identifier, index_name, key_of, names, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.core.session import register_vector
from runbook_lib.embeddings.sources import Vectors, as_array
from runbook_lib.indexes import building, forecast, partitions
from runbook_lib.migrate import backfill, build_index, expand_schema, load_embeddings
from runbook_lib.migrate.load_embeddings import RowsToStage
from runbook_lib.operate.rehearsal_schema import SEED, Place, timeout
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("rehearse")

NO_LONGER_FITS = re.compile(r"no longer fits into maintenance_work_mem after (\d+) tuples")
# The build that shows what a row takes gets this share of what the formula says, so that it runs out.
SHORT_MEMORY = 0.7
# WAL that others write meanwhile is estimated by a look of this length beforehand.
LOOK_AT_OTHERS_S = 0.5
# Rows whose text is changed to see what a write costs, and how often; the first time warms up.
WRITTEN_ROWS, WRITTEN_TIMES = 200, 4
# An IVFFlat list of fewer rows than this says little about one of the whole table.
LEAST_ROWS_A_LIST = 10


@dataclass(frozen=True)
class Sample:
    """What a sample took. rows: copied; vectors: of them with text, and so with a vector. Bytes and seconds.

    vectors_from: where the vectors came from (column, staging, random) and how many. lists: None for HNSW.
    memory_bytes_a_row: of an HNSW build, where the sample was large enough to make one run out. write_ms: of the
    UPDATE of a row's text, in the server; bare_write_ms: without vector index and capture; None where it is refused.
    """

    rows: int
    vectors: int
    vectors_from: dict[str, int]
    load_seconds: float
    load_wal_bytes: int
    staging_bytes: int
    strategy: str
    hot_share: float
    backfill_seconds: float
    backfill_wal_bytes: int
    table_growth_bytes: int
    build_seconds: float
    build_wal_bytes: int
    index_bytes: int
    lists: int | None
    memory_bytes_a_row: float | None
    notices: tuple[str, ...]
    others_wal_bytes_per_s: float
    write_ms: float | None = None
    bare_write_ms: float | None = None

    def as_data(self) -> dict[str, Any]:
        """Plain data for the ledger."""
        return asdict(self)


def measure(connection: db.Connection, params: Params, place: Place, lists: int | None, *, memory: bool) -> Sample:
    """Carries the migration out on the sample, from the columns to the index, and says what it took.

    source: the target, which is asked for vectors that it has already. lists: those of the whole table, for IVFFlat.
    memory: build once more with too little memory first, to see what a row takes.
    """
    phase = place.phase
    # The phases print a line a statement, which would tell a reader of the rehearsal nothing.
    with redirect_stdout(io.StringIO()):
        expand_schema.apply(phase)
        others = _wal_of_others(phase.connection)
        before = _wal(phase.connection)
        seconds, came_from = _load(connection, params, phase)
        load_wal = _wal(phase.connection) - before
        staged = _bytes(phase.connection, phase.params, "staging")
        backfill.move_staged(phase)
    moved = phase.ledger.latest("backfill") or {}
    pauses = sum(p["seconds"] for p in moved["pauses"])
    moving = max(moved["seconds"] - pauses, 0.0)
    vectors = sum(came_from.values())
    fitting = None if lists is None else max(1, min(lists, vectors // LEAST_ROWS_A_LIST))
    a_row = _memory_a_row(phase.connection, phase.params, vectors) if memory and fitting is None else None
    built = _build(phase.connection, phase.params, fitting)
    write_ms, bare_write_ms = _writes(phase.connection, phase.params)
    return Sample(
        rows=place.rows,
        vectors=vectors,
        vectors_from=dict(came_from),
        load_seconds=seconds,
        load_wal_bytes=_less(load_wal, others, seconds),
        staging_bytes=staged,
        strategy=moved["strategy"],
        hot_share=moved["hot_share"],
        backfill_seconds=moving,
        backfill_wal_bytes=_less(moved["wal_bytes"], others, moved["seconds"]),
        table_growth_bytes=moved["table_growth_bytes"],
        build_seconds=built.seconds,
        build_wal_bytes=_less(built.wal_bytes, others, built.seconds),
        index_bytes=built.bytes,
        lists=fitting,
        memory_bytes_a_row=a_row,
        notices=tuple(built.notices),
        others_wal_bytes_per_s=round(others, 1),
        write_ms=write_ms,
        bare_write_ms=bare_write_ms,
    )


def _writes(connection: db.Connection, params: Params) -> tuple[float | None, float | None]:
    """Milliseconds of the UPDATE of a row's text on the sample as it is now, and without vector index and capture.

    The same rows on the same pages, so that the difference is what these two cost.
    """
    n = names(params)
    keys = [r["key"] for r in connection.execute(SQL["some_keys"].compose(n), {"rows": WRITTEN_ROWS}).fetchall()]
    if not keys:
        return None, None
    try:
        with connection.transaction(force_rollback=True):
            whole = _write_ms(connection, params, keys)
            for block in ("without_index", "without_capture"):
                connection.execute(SQL[block].compose(n))
            return whole, _write_ms(connection, params, keys)
    except (psycopg.DataError, psycopg.IntegrityError, psycopg.ProgrammingError):
        # A text that may not grow, or is none: then nothing is said of writes.
        return None, None


def _write_ms(connection: db.Connection, params: Params, keys: Sequence[Any]) -> float:
    seconds = []
    for _ in range(WRITTEN_TIMES):
        with connection.transaction(force_rollback=True):
            started = time.perf_counter()
            connection.execute(SQL["write"].compose(names(params)), {"keys": list(keys)})
            seconds.append(time.perf_counter() - started)
    return round(1000 * float(np.median(seconds[1:])) / len(keys), 4)


def _wal(connection: db.Connection) -> int:
    row = connection.execute(SQL["wal"].compose({})).fetchone()
    return int(row["bytes"]) if row else 0


def _wal_of_others(connection: db.Connection) -> float:
    """Bytes a second that the rest of the server writes just now."""
    before, started = _wal(connection), time.perf_counter()
    time.sleep(LOOK_AT_OTHERS_S)
    return (_wal(connection) - before) / (time.perf_counter() - started)


def _less(wal_bytes: float, others: float, seconds: float) -> int:
    return max(0, round(wal_bytes - others * seconds))


def _bytes(connection: db.Connection, params: Params, name: str) -> int:
    found = db.one(connection, SQL["relation_bytes"], params, relation=spelled(params, name))
    return int(found["bytes"])


def _load(connection: db.Connection, params: Params, phase: Phase) -> tuple[float, Counter[str]]:
    """Stages a vector for each row with text, as 40_load_embeddings does; seconds of the COPY, and their origins."""
    register_vector(phase.connection)
    kinds, seconds = db.key_types(phase.connection, phase.params), 0.0
    wells, came_from = _wells(connection, params), Counter[str]()
    numbers = np.random.default_rng(SEED)
    for page in _pages(phase.connection, phase.params):
        keys = [r["key"] for r in page]
        vectors = random_vectors(numbers, len(keys), phase.params.vector.dimension)
        left = {key: i for i, key in enumerate(keys)}
        for name, query in wells:
            for row in connection.execute(query, {"keys": list(left)}).fetchall():
                vectors[left.pop(row["key"])] = as_array(row["embedding"])
                came_from[name] += 1
        came_from["random"] += len(left)
        started = time.perf_counter()
        load_embeddings.copy(
            phase.connection, phase.params, RowsToStage(keys, [r["text_hash"] for r in page], vectors), kinds
        )
        seconds += time.perf_counter() - started
    return seconds, +came_from


def _pages(connection: db.Connection, params: Params) -> Iterator[Sequence[db.Row]]:
    """The sample's rows with text, in key order."""
    after: sql.Composable = sql.SQL("true")
    last = None
    while True:
        query = SQL["page"].compose(names(params) | {"after": after})
        values = {"last": last, "batch_rows": params.embeddings.rows_a_batch}
        page = connection.execute(query, values).fetchall()
        if not page:
            return
        yield page
        last = page[-1]["key"]
        after = key_of(params).written("t.key > %last")


def random_vectors(numbers: np.random.Generator, rows: int, dimension: int) -> Vectors:
    """Unit vectors in every direction alike, shape (rows, dimension), float32.

    They lie farther apart than those of texts, so a search while the graph is built goes through more of it.
    """
    made = numbers.standard_normal((rows, dimension), dtype=np.float32)
    return cast(Vectors, made / np.linalg.norm(made, axis=1, keepdims=True))


def _wells(connection: db.Connection, params: Params) -> list[tuple[str, sql.Composed]]:
    """Queries for vectors that the target has already: in their column, or staged."""
    n = names(params)
    offered = (
        ("column", "vectors", params.vector.column, "key", n["embedding"]),
        ("staging", "staging", "embedding", "own_key", identifier("embedding")),
    )
    found, of_key = [], key_of(params)
    for name, relation, column, key, vector in offered:
        at = {"relation": spelled(params, relation), "column": column}
        if db.one(connection, SQL["has_column"], params, **at)["there"]:
            parts = {
                "source": n[relation],
                "source_key": of_key.written(f"one s.{key} AS key"),
                "is_among": of_key.written(f"s.{key} IN %keys"),
                "source_vector": vector,
            }
            found.append((name, SQL["vectors_of"].compose(n | parts)))
    if found:
        register_vector(connection)
    return found


@dataclass(frozen=True)
class _Built:
    seconds: float
    wal_bytes: int
    bytes: int
    notices: list[str]


def _statement(connection: db.Connection, params: Params, lists: int | None) -> sql.SQL:
    """The runbook's own build without CONCURRENTLY: nobody else uses the sample, and it need not wait for anybody."""
    options = {} if lists is None else {"lists": lists}
    build = building.create_statement(connection, params, partitions.relation(params), index_name(params), options)
    text = build.query.as_string(connection)
    return sql.SQL(text.replace("INDEX CONCURRENTLY", "INDEX", 1))


def _settings(connection: db.Connection, params: Params, memory: str, workers: int) -> None:
    values = {"memory": memory, "workers": str(workers), "timeout": timeout(params)}
    connection.execute(SQL["build_settings"].compose({}), values)


def _build(connection: db.Connection, params: Params, lists: int | None) -> _Built:
    i, notices = params.index, list[str]()
    _settings(connection, params, f"{i.maintenance_work_mem_mb}MB", i.parallel_workers)

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        notices.append(diagnostic.message_primary or "")

    connection.add_notice_handler(note)
    before, started = _wal(connection), time.perf_counter()
    try:
        connection.execute(_statement(connection, params, lists), {})
    finally:
        connection.remove_notice_handler(note)
    seconds = time.perf_counter() - started
    return _Built(seconds, _wal(connection) - before, build_index.index(connection, params).bytes, notices)


def _memory_a_row(connection: db.Connection, params: Params, vectors: int) -> float | None:
    """Bytes that a row takes while an HNSW index is built: a build with too little memory says after how many rows
    it ran out, and is cancelled there. None where the sample does not fill one block of memory.
    """
    a_row = forecast.hnsw_build_bytes_per_row(params.index.m, params.vector.dimension, params.indexed_type)
    blocks = int(vectors * a_row * SHORT_MEMORY / forecast.HNSW_BLOCK)
    if not blocks:
        return None
    after: list[int] = []

    def end(diagnostic: psycopg.errors.Diagnostic) -> None:
        if found := NO_LONGER_FITS.search(diagnostic.message_primary or ""):
            after.append(int(found[1]))
            connection.cancel()

    # With whole blocks, all of them are full when it runs out.
    asked = blocks + versions.hnsw_blocks_held_back(connection.info.server_version)
    _settings(connection, params, f"{asked * forecast.HNSW_BLOCK // 1024}kB", 0)
    connection.add_notice_handler(end)
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(_statement(connection, params, None), {})
    except psycopg.errors.QueryCanceled:
        # By ourselves, as soon as it ran out; a timeout leaves `after` empty.
        pass
    finally:
        connection.remove_notice_handler(end)
    return blocks * forecast.HNSW_BLOCK / after[0] if after else None
