"""Embeds again what was inserted or changed: drains the queue that the triggers fill."""

from __future__ import annotations

from dataclasses import dataclass

from pgvector import HalfVector
from pgvector.psycopg import register_vector

from runbook_lib import db, embed
from runbook_lib.names import names
from runbook_lib.phase import Phase
from runbook_lib.sql import load

SQL = load("refresh")


@dataclass(frozen=True)
class Drained:
    """What a drain did: changes taken from the queue, rows given a vector, rows refused."""

    changes: int
    updated: int
    refused: int


def drain(phase: Phase) -> Drained:
    """Takes changes from the queue, batch by batch, until it is empty; each batch is one transaction.

    A batch that fails goes back into the queue whole. A row that changes between reading and writing is left to
    its newer place in the queue. With a file as the source there is no model to ask: nothing is taken.
    """
    if phase.params.embeddings.source == "file":
        return Drained(0, 0, 0)
    register_vector(phase.connection)
    model = embed.model(phase.params)
    total = Drained(0, 0, 0)
    while True:
        done, _ = db.in_short_tries(
            phase.connection, phase.params, "refresh.update", SQL["update"].lock, lambda: _drain_batch(phase, model)
        )
        if not done.changes:
            return total
        total = Drained(total.changes + done.changes, total.updated + done.updated, total.refused + done.refused)


def _drain_batch(phase: Phase, model: embed.Model) -> Drained:
    p = phase.params
    taken = db.rows(phase.connection, SQL["take"], p, batch_rows=p.embeddings.batch_rows)
    rows = db.rows(phase.connection, SQL["texts"], p, keys=list({r["key"] for r in taken})) if taken else []
    with_text = [r for r in rows if r["has_text"]]
    updated = refused = 0
    with phase.connection.cursor() as cursor:
        if with_text:
            vectors = model([r["text"] for r in with_text])
            fit, _ = embed.check(vectors, [r["key"] for r in with_text], p)
            half = p.vector.type == "halfvec"
            values = [
                {"key": r["key"], "text_hash": r["text_hash"], "embedding": HalfVector(v) if half else v}
                for r, v, ok in zip(with_text, vectors, fit, strict=True)
                if ok
            ]
            refused = len(with_text) - len(values)
            if values:
                cursor.executemany(SQL["update"].compose(names(p)), values)
                updated = cursor.rowcount
        for row in rows:
            if not row["has_text"]:
                cursor.execute(SQL["clear"].compose(names(p)), {"key": row["key"]})
    return Drained(len(taken), updated, refused)
