"""The queue of rows that were inserted or changed, which the triggers fill: embeds them again, batch by batch.

A change is claimed in one short transaction and finished in another; the model is asked in between, while nothing is
locked. A claim is as alive as its session, so what a killed worker held is taken over at once.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from pgvector import HalfVector, Vector

from runbook_lib.backfill import vector_store
from runbook_lib.backfill.throttle import Pace, first_pace
from runbook_lib.core import db
from runbook_lib.core.cell_order import SECONDS_BETWEEN_QUESTIONS
from runbook_lib.core.display import number
from runbook_lib.core.names import changing, key_of, names
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.session import register_vector
from runbook_lib.embeddings import embedding, masking, splitting
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("refresh")
# Class of the advisory locks by which workers show that they live: "rbrf" in ASCII.
LOCK_CLASS = 0x72627266
# Rows of the first transaction of a drain: with a vector index on the table a row may take milliseconds.
FIRST_ROWS = 20
# A worker that is alive but hangs, in a debugger for instance, loses its claims after this long.
LEASE_S = 900


@dataclass(frozen=True)
class Drained:
    """What a drain did: changes finished, rows given a vector, rows set aside after their last try, and changes left
    in the queue since somebody held their row to the end."""

    changes: int
    updated: int
    refused: int
    put_off: int = 0


@dataclass(frozen=True)
class Waiting:
    """Rows in the queue. since_before: of those that wait, how many did so before a given time."""

    waiting: int
    since_before: int
    set_aside: int
    oldest_s: float
    error: str | None
    why: str

    def __str__(self) -> str:
        parts = [f"{number(self.waiting)} queued, {self.why}"] if self.waiting else []
        parts += [f"{number(self.set_aside)} set aside: {self.error}"] if self.set_aside else []
        return "; ".join(parts) or "none"


@dataclass(frozen=True)
class _Worker:
    phase: Phase
    model: embedding.Model
    rules: tuple[masking.Rule, ...]
    cut: splitting.Splitter
    number: int
    # When the drain began: what is queued later is left to the next one, or a drain might never end.
    until: datetime
    masked: Counter[str] = field(default_factory=Counter)
    # Changes whose row somebody held when it was their turn, with the row's key.
    put_off: dict[int, Any] = field(default_factory=dict)
    # How many rows a transaction takes, kept up to date by what the last one took.
    pace: list[Pace] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        return {"class": LOCK_CLASS, "worker": self.number, "tries": self.phase.params.embeddings.refresh_tries}

    def run(self, block: str, **values: Any) -> Any:
        params = self.phase.params
        return self.phase.connection.execute(db.statement(SQL[block], params).query, self.values | values)


def waiting(connection: db.Connection, params: Params, before: datetime | None = None) -> Waiting:
    """The rows that wait in the queue, and why. before: the time for ``since_before``; now if not given."""
    e = params.embeddings
    values = {"tries": e.refresh_tries, "before": before}
    row = db.one(connection, SQL["state"], params, **values)
    why = (
        "changed since the last drain"
        if e.has_model
        else f"for newer vectors: {embedding.described(params)} has no model"
    )
    why += f"; {number(row['tried'])} of them were tried: {row['tried_error']}" if row["tried"] else ""
    return Waiting(row["waiting"], row["waiting_since_before"], row["set_aside"], row["oldest_s"], row["error"], why)


@changes
def drain(phase: Phase) -> Drained:
    """Takes the changes that are in the queue now, batch by batch, until none of them can be taken.

    A text that the model does not take is tried ``refresh_tries`` times, then set aside in the queue with its error;
    a row that somebody else holds is put off to the end, tried again as often as ``locks`` says, and left in the
    queue with who may hold it; the others go on. Where the model is away, the error rises and the changes wait. A row
    that changes between reading and writing is left to its newer place in the queue. Vectors made elsewhere have no
    model to ask: what has its vector meanwhile leaves the queue, the rest waits.
    """
    params = phase.params
    if not params.embeddings.has_model:
        return Drained(_settle(phase.connection, params), 0, 0)
    connection = phase.connection
    register_vector(connection)
    until = db.one(connection, SQL["clock"], params)["now"]
    rules = masking.rules(params.masking)
    worker = _Worker(phase, embedding.model(params), rules, splitting.splitter(params), secrets.randbits(31), until)
    worker.run("worker")
    done: list[Drained] = []
    try:
        done += _until_none_is_left(worker)
        wait_s = db.FIRST_WAIT_BETWEEN_TRIES_S
        for _ in range(params.locks.tries):
            if not worker.put_off:
                break
            time.sleep(wait_s)
            wait_s = min(wait_s * 2, params.locks.longest_wait_between_tries_s)
            if _take_up_again(worker):
                done += _until_none_is_left(worker)
    finally:
        if not connection.broken:
            worker.run("release")
    if texts := sum(d.updated for d in done):
        masking.note(phase, worker.masked, texts)
    if worker.put_off:
        print(f"  {len(worker.put_off)} changes stay queued, since others hold their rows")
    return Drained(
        sum(d.changes for d in done), sum(d.updated for d in done), sum(d.refused for d in done), len(worker.put_off)
    )


def _until_none_is_left(worker: _Worker) -> list[Drained]:
    done = []
    while claimed := _claim(worker):
        worker.phase.ask(SECONDS_BETWEEN_QUESTIONS)
        done.append(_refresh(worker, claimed))
    return done


def _take_up_again(worker: _Worker) -> bool:
    """Lets those rows be claimed again that nobody holds any more; asks first, since the model may cost something."""
    keys = list(set(worker.put_off.values()))
    with worker.phase.connection.transaction():
        held = _held(worker, keys)
    held &= {row["key"] for row in db.rows(worker.phase.connection, SQL["texts"], worker.phase.params, keys=keys)}
    free = [i for i, key in worker.put_off.items() if key not in held]
    for i in free:
        del worker.put_off[i]
    return bool(free)


def _held(worker: _Worker, keys: Iterable[Any]) -> set[Any]:
    """The rows that somebody else has locked, or that are gone by now; the others are locked by this transaction."""
    lock = vector_store.of(worker.phase.params).lock_rows
    locked = {row["key"] for row in worker.run(lock, keys=list(keys)).fetchall()}
    return set(keys) - locked


def _settle(connection: db.Connection, params: Params) -> int:
    own = names(params) | changing(params)
    return connection.execute(SQL["settle"].compose(own), {}).rowcount


def _claim(worker: _Worker) -> list[db.Row]:
    batch_rows, put_off = worker.phase.params.embeddings.rows_a_batch, list(worker.put_off)
    rows = worker.run("claim", lease_s=LEASE_S, until=worker.until, batch_rows=batch_rows, put_off=put_off)
    key = key_of(worker.phase.params)
    return [{"id": row["id"], "key": key.own_in(row)} for row in rows.fetchall()]


def _refresh(worker: _Worker, claimed: Sequence[db.Row]) -> Drained:
    """One batch: reads the texts, asks the model with nothing locked, and writes in one short transaction."""
    p, connection = worker.phase.params, worker.phase.connection
    ids: dict[Any, list[int]] = {}
    for row in claimed:
        ids.setdefault(row["key"], []).append(row["id"])
    rows = db.rows(connection, SQL["texts"], p, keys=list(ids))
    with_text = [r for r in rows if r["has_text"]]
    made, counts = splitting.embed_rows(p, worker.model, worker.cut, worker.rules, with_text)
    worker.masked.update(counts)
    failed = {with_text[i]["key"]: embedding.said(error) for i, error in made.errors.items()}
    faults = embedding.check(made.vectors, p) if made.rows else {}
    failed |= {with_text[made.rows[i]]["key"]: why for i, why in faults.items()}
    values = [v for v in _values(p, with_text, made) if v["key"] not in failed]
    gone = [{"key": r["key"]} for r in rows if not r["has_text"]]
    rest = {key: ids[key] for key in ids if key not in failed}
    updated, held = _write_in_turn(worker, values, gone, rest)
    _put_off(worker, {i: key for key in held for i in ids[key]})
    refused = sum(_fail(worker, ids[key], error) for key, error in failed.items())
    return Drained(sum(len(ids[key]) for key in rest if key not in held), updated, refused)


def _values(params: Params, rows: Sequence[db.Row], made: splitting.EmbeddedRows) -> list[dict[str, Any]]:
    """A row each: its key, the hash of its text, and its vector, or its chunks with theirs."""
    found: dict[int, dict[str, Any]] = {}
    for i, chunk, vector in zip(made.rows, made.chunks, made.vectors, strict=True):
        own = HalfVector(vector) if params.vector.type == "halfvec" else Vector(vector)
        values = found.setdefault(i, {"key": rows[i]["key"], "text_hash": rows[i]["text_hash"], "embedding": own})
        for name, value in (("starts", chunk.start), ("lengths", chunk.length), ("embeddings", own)):
            values.setdefault(name, []).append(value)
    return list(found.values())


def _write_in_turn(
    worker: _Worker, values: Sequence[dict[str, Any]], gone: Sequence[dict[str, Any]], ids: dict[Any, list[int]]
) -> tuple[int, set[Any]]:
    """Writes a batch in transactions as short as those of the backfill, whatever a row costs here.

    Returns rows given a vector, and the keys of those that somebody holds.
    """
    pace = worker.pace.pop() if worker.pace else first_pace(worker.phase.params, rows=FIRST_ROWS)
    given, empty = {v["key"]: v for v in values}, {v["key"]: v for v in gone}
    keys, updated, held = list(ids), 0, set[Any]()
    while keys:
        now, keys = keys[: pace.rows], keys[pace.rows :]
        began = time.perf_counter()
        (rows, of_others), _ = db.in_short_tries(
            worker.phase.connection,
            worker.phase.params,
            "refresh.update",
            SQL["update"].lock,
            partial(
                _write,
                worker,
                [given[key] for key in now if key in given],
                [empty[key] for key in now if key in empty],
                {key: ids[key] for key in now},
            ),
        )
        pace = pace.after(len(now), time.perf_counter() - began)
        updated, held = updated + rows, held | of_others
    worker.pace.append(pace)
    return updated, held


def _write(
    worker: _Worker, values: Sequence[dict[str, Any]], gone: Sequence[dict[str, Any]], ids: dict[Any, list[int]]
) -> tuple[int, set[Any]]:
    """Writes what nobody else holds, and takes it out of the queue; rows given a vector, and the keys of those held.

    ids: places in the queue by key.
    """
    p, store, updated = worker.phase.params, vector_store.of(worker.phase.params), 0
    held = _held(worker, {v["key"] for v in (*values, *gone)})
    with worker.phase.connection.cursor() as cursor:
        if free := [v for v in values if v["key"] not in held]:
            cursor.executemany(SQL[store.write_row].compose(names(p) | changing(p)), free)
            updated = cursor.rowcount
        if free := [v for v in gone if v["key"] not in held]:
            cursor.executemany(SQL[store.clear_row].compose(names(p) | changing(p)), free)
    done = [key for key in ids if key not in held]
    worker.run("finish", ids=[i for key in done for i in ids[key]], keys=done)
    return updated, held


def _put_off(worker: _Worker, changes: dict[int, Any]) -> None:
    """Gives changes back whose row somebody holds, and remembers them for the end. changes: keys by place."""
    if changes:
        error = f"held by another session; {db.holders(worker.phase.connection, worker.phase.params)}"
        worker.run("put_off", ids=list(changes), error=error)
        worker.put_off.update(changes)


def _fail(worker: _Worker, ids: list[int], error: str) -> bool:
    """Counts a failed try; True where it was the last and the row is set aside."""
    attempts = [r["attempts"] for r in worker.run("fail", ids=ids, error=error).fetchall()]
    return bool(attempts) and min(attempts) >= worker.phase.params.embeddings.refresh_tries
