"""Phase 40: embeds the texts, or reads embeddings made elsewhere, and copies them into the staging table.

The database is asked for the rows that still want a vector, so a load that was stopped resumes.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pgvector import HalfVector
from psycopg import sql

from runbook_lib.backfill import vector_store
from runbook_lib.backfill.progress import Progress
from runbook_lib.core import db
from runbook_lib.core.cell_order import SECONDS_BETWEEN_QUESTIONS
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.names import HASH_BYTES, key_of, names, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.session import register_vector
from runbook_lib.embeddings import embedding, masking, packing, sources, splitting
from runbook_lib.params import Params
from runbook_lib.params.section import unsound
from runbook_lib.sql import Block, load

SQL = load("staging")
# A key that is none is kept this long.
LONGEST_KEY_TEXT = 200
# Batches that are made and not yet copied; each holds its vectors in memory.
MOST_BATCHES_AHEAD = 2
# What the database says of a key, as the block look_up packs it.
LOOKED_UP = np.dtype(
    [("hash", f"V{HASH_BYTES}"), *((name, "?") for name in ("again", "known", "done", "staged_before"))]
)


@dataclass(frozen=True)
class Refusal:
    """A row that is not staged: its key (None where that is no key of the table), the reason and what exactly."""

    key: Any
    key_text: str
    reason: str
    detail: str


@dataclass(frozen=True)
class RowsToStage:
    """Rows to stage: keys, the hash of the text each vector was made from, vectors of shape (n, dimension).

    replaced: keys that may be staged with an older text. refused: rows that are set aside instead. chunks: where the
    vectors are of chunks, the number, first character and length of each.
    """

    keys: Sequence[Any]
    hashes: Sequence[bytes]
    vectors: np.ndarray
    replaced: Sequence[Any] = ()
    refused: Sequence[Refusal] = ()
    chunks: Sequence[tuple[int, int, int]] = ()


@dataclass
class _Tally:
    """What a load counts besides its rows."""

    masked: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    refused: int = 0


def plan(phase: Phase) -> db.Plan:
    """The COPY that fills the staging table; empty where no row wants a vector."""
    connection, params = phase.connection, phase.params
    missing = phase.execute and _counts(connection, params)["ready"] == _counts(connection, params)["with_text"]
    return db.Plan(() if missing else (db.statement(_copying(params), params),), connection)


def _copying(params: Params) -> Block:
    return vector_store.of(params).blocks["copy"]


def source(phase: Phase) -> Table:
    """Where the vectors come from, how they are tied to the texts, and what is masked on the way."""
    e, m = phase.params.embeddings, phase.params.masking
    rules = [*m.rules, *m.patterns, *(["named_entity"] if m.named_entities else [])]
    if e.has_model:
        tie = "made of the text that the row has, hashed by the database with it"
        leaves = f"with {', '.join(rules)} masked" if rules else "as it is: no masking rule is set"
        leaves += {"http": f", to {e.url}", "callable": ", into the function", "wordllama": ", into this process"}[
            e.source
        ]
    else:
        first = next(embedding.stored(phase.params, phase.connection), None)
        checked = first is not None and first.text_hashes is not None
        tie = (
            "text_hash or text with each vector: one of an older text is refused"
            if checked
            else "none given: each vector is taken for that of the text as it is now"
        )
        leaves = "no text leaves the database"
    return Table(
        ("source", "vectors and texts", "text leaves", "rows a transaction"),
        [(embedding.described(phase.params), tie, leaves, e.rows_a_batch)],
    )


def _counts(connection: db.Connection, params: Params) -> db.Row:
    return db.one(connection, SQL["counts"], params)


@changes
def apply(phase: Phase) -> Table:
    """Stages every row that has text and no vector of that text; shows rows, rate and time left.

    Raises BadInput where the source cannot be read, and lets the errors of a model that is away rise.
    """
    connection, params = phase.connection, phase.params
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(s.purpose,) for s in plan(phase)])
    register_vector(connection)
    phase.do(db.statement(SQL["forgive"], params))
    counts, tally = _counts(connection, params), _Tally()
    started = time.perf_counter()
    with (
        db.beside(connection, params, "reader") as reader,
        Progress("staged", total=counts["with_text"] - counts["ready"]) as progress,
    ):
        register_vector(reader)
        done = copy_all(phase, _batches(reader, params, tally), progress)
    seconds = time.perf_counter() - started
    tally.refused = done.refused
    phase.note_statement(db.Done(db.statement(_copying(params), params), progress.done, seconds, 1))
    phase.note("load", {"rows": progress.done, "seconds": round(seconds, 3), "samples": progress.samples})
    masking.note(phase, tally.masked, tally.texts)
    masked = ", ".join(f"{n} × {rule}" for rule, n in sorted(tally.masked.items())) or "nothing"
    return Table(
        ("rows staged", "rows refused", "masked", "seconds"),
        [(progress.done, tally.refused, masked, round(seconds, 2))],
    )


@dataclass(frozen=True)
class Copied:
    """Rows staged, and rows set aside."""

    staged: int
    refused: int


def copy_all(phase: Phase, batches: Iterable[RowsToStage], progress: Progress) -> Copied:
    """Copies batch after batch, a transaction each, in a thread, while the next one is read and embedded. batches:
    come over another session than the phase's. Stopped, by an error or by hand, it still copies what was embedded.
    """
    kinds, total = db.key_types(phase.connection, phase.params), Copied(0, 0)
    under_way = deque[Future[Copied]]()

    def await_all_but(most: int) -> None:
        nonlocal total
        while len(under_way) > most:
            copied = under_way.popleft().result()
            total = Copied(total.staged + copied.staged, total.refused + copied.refused)
            progress.add(copied.staged)

    # The model stays in this thread: what it prints is dropped for the whole process while it works.
    with ThreadPoolExecutor(1, "copy") as pool:
        for batch in batches:
            phase.ask(SECONDS_BETWEEN_QUESTIONS)
            await_all_but(MOST_BATCHES_AHEAD - 1)
            under_way.append(pool.submit(copy, phase.connection, phase.params, batch, kinds))
        await_all_but(0)
    return total


def _batches(connection: db.Connection, params: Params, tally: _Tally) -> Iterator[RowsToStage]:
    return _from_model(connection, params, tally) if params.embeddings.has_model else _from_store(connection, params)


def _from_model(connection: db.Connection, params: Params, tally: _Tally) -> Iterator[RowsToStage]:
    model, rules, cut = embedding.model(params), masking.rules(params.masking), splitting.splitter(params)
    after: sql.Composable = sql.SQL("true")
    last = None
    while True:
        query = SQL["to_stage"].compose(names(params) | {"after": after})
        rows = connection.execute(query, {"last": last, "batch_rows": params.embeddings.rows_a_batch}).fetchall()
        if not rows:
            return
        made, counts = splitting.embed_rows(params, model, cut, rules, rows)
        tally.masked += counts
        tally.texts += len(rows)
        taken = [rows[i] for i in made.rows]
        yield RowsToStage(
            [r["key"] for r in taken],
            [r["text_hash"] for r in taken],
            made.vectors,
            [rows[i]["key"] for i in dict.fromkeys(made.rows) if rows[i]["staged_before"]],
            [_of_model(rows[i]["key"], error) for i, error in made.errors.items()],
            [(n, c.start, c.length) for n, c in zip(made.numbered(), made.chunks, strict=True)]
            if vector_store.of(params).places
            else (),
        )
        last = rows[-1]["key"]
        after = key_of(params).written("t.key > %last")


def _of_model(key: Any, error: Exception) -> Refusal:
    reason = f"the model failed on its text: {type(error).__name__}"
    return Refusal(key, str(key), reason, embedding.said(error))


def _from_store(connection: db.Connection, params: Params) -> Iterator[RowsToStage]:
    """Vectors made elsewhere: those whose row wants them, and a refusal for each that goes nowhere."""
    kinds = db.key_types(connection, params)
    connection.execute(SQL["session"].compose({}))
    connection.execute(SQL["forget_seen"].compose(names(params) | {"key_type": sql.SQL(kinds[0])}))
    for rows in embedding.stored(params, connection):
        yield _wanted(connection, params, rows, kinds)


def _wanted(connection: db.Connection, params: Params, rows: sources.SourceRows, kinds: Sequence[str]) -> RowsToStage:
    """The rows of one batch that are to be staged; what is staged or in the table already is passed over."""
    keys, at, refused = _read_keys(params, rows, kinds)
    found = _look_up(connection, params, keys, kinds)
    hashes, made_from = found["hash"].tolist(), rows.text_hashes
    is_read = np.isin(at, list(rows.faults), invert=True) if rows.faults else np.ones(len(keys), bool)
    is_current = np.ones(len(keys), bool)
    if made_from:
        pairs = zip((made_from[i] for i in at), hashes, strict=True)
        is_current = np.fromiter((given is None or given == of_row for given, of_row in pairs), bool, len(keys))
    open_ = found["known"] & ~found["again"] & ~found["done"]
    reasons: list[tuple[Any, str, Callable[[int], str]]] = [
        (found["again"], "its key occurs again", lambda _: "an earlier row has this key"),
        (~found["known"] & ~found["again"], "no row of the table has its key", lambda _: ""),
        (open_ & ~is_read, "its vector cannot be read", lambda i: rows.faults[i]),
        (open_ & is_read & ~is_current, "made from a text that the row no longer has", lambda _: ""),
    ]
    for those, reason, detail in reasons:
        refused += [
            _refusal(params, rows, at[n], keys[n], reason, detail(at[n])) for n in np.flatnonzero(those).tolist()
        ]
    taken = np.flatnonzero(open_ & is_read & is_current).tolist()
    before = found["staged_before"]
    return RowsToStage(
        [keys[n] for n in taken],
        [hashes[n] for n in taken],
        rows.vectors if len(taken) == len(rows.keys) else rows.vectors[[at[n] for n in taken]],
        [keys[n] for n in taken if before[n]] if before.any() else [],
        refused,
    )


def _look_up(connection: db.Connection, params: Params, keys: list[Any], kinds: Sequence[str]) -> np.ndarray:
    """One record a key, in their order."""
    query = SQL["look_up"].compose(names(params) | {"key_type": sql.SQL(kinds[0])})
    # Numbers and uuids need no quoting; text of an array is made in a tenth of the time of a list's dump.
    given = f"{{{','.join(map(str, keys))}}}" if packing.can_pack(kinds) else keys
    row = connection.execute(query, {"keys": given}, binary=True).fetchone()
    return np.frombuffer(row["found"] if row else b"", dtype=LOOKED_UP)


def _read_keys(
    params: Params, rows: sources.SourceRows, kinds: Sequence[str]
) -> tuple[list[Any], Sequence[int], list[Refusal]]:
    """Keys of the table's types, each with its place in the batch; what is no key, or comes again, is refused."""
    if (read_at_once := sources.read_at_once(kinds, rows.keys)) is not None:
        return read_at_once, range(len(rows.keys)), []
    read, keys, refused = sources.key_reader(*kinds), dict[Any, int](), list[Refusal]()
    kind = ", ".join(kinds)
    for i, raw in enumerate(rows.keys):
        try:
            key = read(raw)
        except ValueError:
            detail = rows.faults.get(i, f"{params.target.key_shown} is {kind}")
            refused.append(_refusal(params, rows, i, None, f"its key is no {kind}", detail))
            continue
        if key in keys:
            detail = f"row {rows.places[keys[key]]} has this key"
            refused.append(_refusal(params, rows, i, key, "its key occurs again", detail))
        else:
            keys[key] = i
    return list(keys), list(keys.values()), refused


def _refusal(params: Params, rows: sources.SourceRows, i: int, key: Any, reason: str, detail: str) -> Refusal:
    e = params.embeddings
    origin = e.file.name if e.file else str(e.table)
    where = f"{origin} row {rows.places[i]}"
    shown = sources.shown_key(rows.keys[i])[:LONGEST_KEY_TEXT]
    # What PostgreSQL cannot store is shown by its escapes.
    return Refusal(
        key, ascii(shown)[1:-1] if unsound(shown) else shown, reason, f"{where}: {detail}" if detail else where
    )


def copy(connection: db.Connection, params: Params, batch: RowsToStage, kinds: Sequence[str]) -> Copied:
    """Copies one batch in one transaction, and sets what it refuses aside.

    kinds: the types of the key's columns. The keys' older staged rows go in the same transaction, so a rerun never
    stages a row twice.
    """
    faults = embedding.check(batch.vectors, params) if len(batch.keys) else {}
    refused = [*batch.refused, *(Refusal(batch.keys[i], str(batch.keys[i]), why, "") for i, why in faults.items())]
    if faults:
        keep = [i for i in range(len(batch.keys)) if i not in faults]
        keys, hashes = [batch.keys[i] for i in keep], [batch.hashes[i] for i in keep]
        kept = set(keys)
        replaced, chunks = [k for k in batch.replaced if k in kept], [batch.chunks[i] for i in keep if batch.chunks]
        batch = RowsToStage(keys, hashes, batch.vectors[keep], replaced, (), chunks)
    with connection.transaction(), connection.cursor() as cursor:
        if batch.replaced:
            cursor.execute(SQL["forget"].compose(names(params)), {"keys": list(batch.replaced)})
        if len(batch.keys):
            _copy_rows(cursor, params, batch, kinds)
        if refused:
            cursor.executemany(SQL["reject"].compose(names(params)), [vars(r) for r in refused])
    return Copied(len(set(batch.keys)) if batch.chunks else len(batch.keys), len(refused))


def _copy_rows(cursor: Any, params: Params, batch: RowsToStage, kinds: Sequence[str]) -> None:
    vector_type, columns = params.vector.type, sources.key_columns(*kinds)
    with cursor.copy(_copying(params).compose(names(params))) as out:
        if packing.can_pack(kinds) and not batch.chunks:
            rows = packing.pack(batch.keys, batch.hashes, batch.vectors, kinds[0], vector_type)
            out.write(packing.HEADER)
            out.write(rows.view(np.uint8).data)
            out.write(packing.TRAILER)
            return
        places: Sequence[tuple[int, ...]] = batch.chunks or [()] * len(batch.keys)
        out.set_types([*kinds, "bytea", vector_type, *(["integer"] * 3 if batch.chunks else [])])
        for key, text_hash, vector, place in zip(batch.keys, batch.hashes, batch.vectors, places, strict=True):
            as_sent = HalfVector(vector) if vector_type == "halfvec" else vector
            out.write_row((*columns(key), text_hash, as_sent, *place))


def verify(phase: Phase) -> Gates:
    """Every row that has text is staged once with a sound vector, or waits in the queue with its change."""
    connection, params = phase.connection, phase.params
    counts = _counts(connection, params)
    return collect(
        [
            _every_row_is_ready(params, counts),
            _vectors_are_sound(connection, params),
            _nothing_was_refused(connection, params, counts),
        ]
    )


def _every_row_is_ready(params: Params, counts: db.Row) -> Gate:
    return gate(
        "staging.every_row_with_text_is_ready",
        counts["lost"] == 0 and counts["with_text"] > 0,
        f"{params.target.schema_}.{params.target.table}",
        found=f"{number(counts['ready'])} of {number(counts['with_text'])} rows with text have its vector,"
        f" {number(counts['queued'])} changed since and are queued, {number(counts['lost'])} have none",
        needed="every row has one or is queued",
        danger="rows without a vector are never found by the new search",
        do="run this phase again; it stages only what is missing"
        if params.embeddings.has_model
        else "add these rows to the source and run this phase again; it stages only what is missing",
        figures=dict(counts),
    )


def _vectors_are_sound(connection: db.Connection, params: Params) -> Gate:
    vectors = db.one(connection, SQL["staged_vectors"], params, dimension=params.vector.dimension)
    unsound = vectors["wrong_dimension"] + (vectors["zero"] if params.vector.distance == "cosine" else 0)
    return gate(
        "staging.vectors_are_sound",
        unsound == 0,
        "the staging table",
        found=f"{number(vectors['staged'])} staged; {vectors['wrong_dimension']} of another dimension,"
        f" {vectors['zero']} without direction",
        needed=f"{params.vector.dimension} dimensions each"
        + (", no zero vectors (cosine)" if params.vector.distance == "cosine" else ""),
        danger="a zero vector is left out of a cosine index without a word",
        do="look at the model's output for these rows, and run this phase again",
        figures=dict(vectors),
    )


def _nothing_was_refused(connection: db.Connection, params: Params, counts: db.Row) -> Gate:
    """Refused rows stop the phase, unless as many were accepted beforehand and no row lacks its vector."""
    refused = db.rows(connection, SQL["rejected"], params)
    total, accepted = sum(r["rows"] for r in refused), params.embeddings.accept_refused_rows
    return gate(
        "staging.no_vector_was_refused",
        total <= (accepted if counts["lost"] == 0 else 0),
        spelled(params, "rejected"),
        found="; ".join(f"{number(r['rows'])} × {r['reason']} ({_instance(params, r)})" for r in refused) or "none",
        needed=f"at most {number(accepted)}, as embeddings.accept_refused_rows says" if accepted else "none",
        danger="these rows would have no vector, or that of another row's text",
        do="fix the source of these embeddings and run this phase again; it tries them again",
        figures={"refused": total, "accepted": accepted},
    )


def _instance(params: Params, refused: db.Row) -> str:
    """One row of these. What a model said of it stays in the table, since it may quote the text."""
    shown = refused["detail"] and not params.embeddings.has_model
    return f"for instance key {refused['key_text']}" + (f", {refused['detail']}" if shown else "")
