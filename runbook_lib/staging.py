"""Phase 40: embeds the texts, or reads embeddings made elsewhere, and copies them into the staging table.

The database is asked for the rows that still want a vector, so a load that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pgvector import HalfVector
from pgvector.psycopg import register_vector
from psycopg import sql

from runbook_lib import db, embed
from runbook_lib.display import Table, number
from runbook_lib.gates import Gates, collect, gate
from runbook_lib.names import names, spelled
from runbook_lib.phase import Phase
from runbook_lib.progress import Progress
from runbook_lib.sql import load

SQL = load("staging")


@dataclass(frozen=True)
class Batch:
    """Rows to stage: keys, the hash of the text each vector was made from, vectors of shape (n, dimension)."""

    keys: Sequence[Any]
    hashes: Sequence[bytes]
    vectors: np.ndarray


def plan(phase: Phase) -> db.Plan:
    """The COPY that fills the staging table; empty where no row wants a vector."""
    missing = phase.execute and _counts(phase)["ready"] == _counts(phase)["with_text"]
    return db.Plan(() if missing else (db.statement(SQL["copy"], phase.params),), phase.connection)


def _counts(phase: Phase) -> db.Row:
    return db.one(phase.connection, SQL["counts"], phase.params)


def apply(phase: Phase) -> Table:
    """Stages every row that has text and no vector of that text; shows rows, rate and time left.

    Raises BadInput where the model cannot be loaded, and lets the model's own errors rise.
    """
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(s.purpose,) for s in plan(phase)])
    register_vector(phase.connection)
    phase.do(db.statement(SQL["forgive"], phase.params))
    counts = _counts(phase)
    started = time.perf_counter()
    with Progress("staged", total=counts["with_text"] - counts["ready"]) as progress:
        for batch in _from_file(phase) if phase.params.embeddings.source == "file" else _from_model(phase):
            progress.add(copy(phase, batch))
    seconds = time.perf_counter() - started
    phase.note_statement(db.Done(db.statement(SQL["copy"], phase.params), progress.done, seconds, 1))
    phase.note("load", {"rows": progress.done, "seconds": round(seconds, 3), "samples": progress.samples})
    return Table(("rows staged", "seconds"), [(progress.done, round(seconds, 2))])


def _from_model(phase: Phase) -> Iterator[Batch]:
    model = embed.model(phase.params)
    after, last = sql.SQL("true"), None
    while True:
        query = SQL["to_stage"].compose(names(phase.params) | {"after": after})
        values = {"last": last, "batch_rows": phase.params.embeddings.batch_rows}
        rows = phase.connection.execute(query, values).fetchall()
        if not rows:
            return
        yield Batch([r["key"] for r in rows], [r["text_hash"] for r in rows], model([r["text"] for r in rows]))
        last = rows[-1]["key"]
        after = sql.SQL("t.{} > %(last)s").format(names(phase.params)["key"])  # type: ignore[assignment]


def _from_file(phase: Phase) -> Iterator[Batch]:
    """Vectors of a file go to the text as it is when they are read; a later change of text is captured."""
    for keys, vectors in embed.read_file(phase.params):
        rows = db.rows(phase.connection, SQL["hashes_of"], phase.params, keys=list(keys))
        hashes = {r["key"]: r["text_hash"] for r in rows}
        known = [i for i, key in enumerate(keys) if key in hashes]
        yield Batch([keys[i] for i in known], [hashes[keys[i]] for i in known], vectors[known])


def copy(phase: Phase, batch: Batch) -> int:
    """Copies one batch in one transaction and sets refused vectors aside; returns the rows staged.

    The keys' older staged rows go in the same transaction, so a rerun never stages a row twice.
    """
    fit, reasons = embed.check(batch.vectors, batch.keys, phase.params)
    keep = np.flatnonzero(fit).tolist()
    table = spelled(phase.params, "table")
    key_type = db.one(phase.connection, SQL["key_type"], phase.params, table=table, key=phase.params.target.key)
    half = phase.params.vector.type == "halfvec"
    with phase.connection.transaction(), phase.connection.cursor() as cursor:
        cursor.execute(SQL["forget"].compose(names(phase.params)), {"keys": [batch.keys[i] for i in keep]})
        with cursor.copy(SQL["copy"].compose(names(phase.params))) as out:
            out.set_types([key_type["type"], "bytea", phase.params.vector.type])
            for i in keep:
                vector = HalfVector(batch.vectors[i]) if half else batch.vectors[i]
                out.write_row((batch.keys[i], batch.hashes[i], vector))
        for i, reason in zip(np.flatnonzero(~fit).tolist(), reasons, strict=True):
            cursor.execute(SQL["reject"].compose(names(phase.params)), {"key": batch.keys[i], "reason": reason})
    return len(keep)


def verify(phase: Phase) -> Gates:
    """Every row that has text is staged once with a sound vector, or waits in the queue with its change."""
    p = phase.params
    counts = _counts(phase)
    vectors = db.one(phase.connection, SQL["staged_vectors"], p, dimension=p.vector.dimension)
    refused = db.rows(phase.connection, SQL["rejected"], p)
    unsound = vectors["wrong_dimension"] + (vectors["zero"] if p.vector.distance == "cosine" else 0)
    return collect(
        [
            gate(
                "staging.every_row_with_text_is_ready",
                counts["lost"] == 0 and counts["with_text"] > 0,
                f"{p.target.schema_}.{p.target.table}",
                found=f"{number(counts['ready'])} of {number(counts['with_text'])} rows with text have its vector,"
                f" {number(counts['queued'])} changed since and are queued, {number(counts['lost'])} have none",
                needed="every row has one or is queued",
                danger="rows without a vector are never found by the new search",
                do="run this phase again; it stages only what is missing",
                figures=dict(counts),
            ),
            gate(
                "staging.vectors_are_sound",
                unsound == 0,
                "the staging table",
                found=f"{number(vectors['staged'])} staged; {vectors['wrong_dimension']} of another dimension,"
                f" {vectors['zero']} without direction",
                needed=f"{p.vector.dimension} dimensions each"
                + (", none all zero (cosine)" if p.vector.distance == "cosine" else ""),
                danger="a zero vector is left out of a cosine index without a word",
                do="look at the model's output for these rows, and run this phase again",
                figures=dict(vectors),
            ),
            gate(
                "staging.no_vector_was_refused",
                not refused,
                "the table of refused vectors",
                found="; ".join(f"{r['rows']} × {r['reason']} (key {r['for_instance']})" for r in refused) or "none",
                needed="none",
                danger="these rows would have no vector",
                do="mend the source of these embeddings and run this phase again; it tries them anew",
                figures={"refused": sum(r["rows"] for r in refused)},
            ),
        ]
    )
