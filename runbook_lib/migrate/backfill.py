"""Phase 50: staging to table in short transactions, resumable, never giving a row the vector of an older text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from runbook_lib.backfill import (
    batch_ranges,
    batch_strategy,
    change_queue,
    pruning,
    refused_rows,
    untouched,
    vector_store,
    workers,
)
from runbook_lib.backfill.batch_strategy import StrategyChoice
from runbook_lib.backfill.throttle import first_pace, in_turn
from runbook_lib.backfill.update_effects import Effects
from runbook_lib.backfill.workers import BackfillOutcome
from runbook_lib.core import db
from runbook_lib.core.display import Table, number, some
from runbook_lib.core.gates import BadInput, Gate, GateFailed, Gates, LockNotObtained, Verdict, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import names, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.target import load_params
from runbook_lib.migrate import trials
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("backfill")
SHOWN_KEYS = 5


def plan(phase: Phase) -> db.Plan:
    """What moves all vectors at once, where the store has such a way; else the tables that steer the work, and the
    statement of one batch, as often as there are batches."""
    connection, params, store = phase.connection, phase.params, vector_store.of(phase.params)
    if promotion := store.promotion(phase):
        return db.Plan(tuple(promotion), connection)
    own = batch_ranges.plan(connection, params)
    # A plan may be made before 30_expand_schema; then nothing can be asked of its columns.
    if not db.relation_exists(connection, spelled(params, "staging")) or not _to_do(connection, params):
        return db.Plan((*own, store.write(params, None, None)), connection)
    if batch_strategy.choose(connection, params).strategy == "page_interleaved":
        own += pruning.plan(connection, params, [r.part for r in batch_strategy.relations(connection, params)])
    return db.Plan((*own, store.write(params, None, None)), connection)


def _to_do(connection: db.Connection, params: Params) -> int:
    return int(db.one(connection, SQL["to_do"], params)["rows"])


@changes
def apply(phase: Phase) -> Table:
    """Moves every staged vector into the table, then drains the queue of rows that changed meanwhile.

    Ranges that are done, and rows that have their vector, are passed over: a run that was stopped resumes.
    """
    connection, params = phase.connection, phase.params
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(s.purpose,) for s in plan(phase)])
    choice, outcome = move_staged(phase)
    for statement in vector_store.of(params).clear_textless(connection, params):
        phase.do(statement)
    phase.do(db.statement(SQL["analyze"], params))
    # Last, so that what is judged is what was written before it; writers never stop.
    phase.note("drain", db.one(connection, SQL["drain_begins"], params))
    drained = change_queue.drain(phase)
    return _shown(choice, outcome, drained)


def _shown(choice: StrategyChoice, outcome: BackfillOutcome, drained: change_queue.Drained) -> Table:
    p50, p95 = _percentiles(outcome)
    return Table(
        ("", ""),
        [
            ("strategy", str(choice)),
            ("rows", outcome.rows),
            ("of them without touching an index", f"{outcome.hot_share:.0%}"),
            ("batches", len(outcome.seconds)),
            ("batch p50 and p95", f"{p50} ms and {p95} ms"),
            ("pauses", "; ".join(f"{s:.1f} s: {why}" for why, s in outcome.pauses) or "none"),
            ("put off to the end, since another session held a row of the batch", outcome.put_off),
            ("changed meanwhile and embedded again", drained.updated),
        ],
    )


def _percentiles(outcome: BackfillOutcome) -> tuple[float, float]:
    p50, p95 = np.round(np.percentile(outcome.seconds or [0.0], [50, 95]) * 1000, 2).tolist()
    return p50, p95


def move_staged(phase: Phase) -> tuple[StrategyChoice, BackfillOutcome]:
    """The backfill itself, without the rows that changed meanwhile: staged vectors to where searches find them. All
    at once where the store can, then what is left in ranges, and last the rows that the ranges did not reach.

    Raises GateFailed, before a row is changed, where the UPDATE does more to the table than was agreed to.
    """
    connection, params = phase.connection, phase.params
    tried = _nothing_new_fires(phase)
    batch_ranges.create(phase)
    before = _server_counts(connection, params)
    promoted, seconds = _promote(phase)
    connection.execute(SQL["analyze_staging"].compose(names(params)))
    choice = batch_strategy.choose(connection, params, tried)
    print(f"  {choice}")
    outcome = _through_ranges(phase, choice)
    if promoted:
        outcome.rows += promoted
        outcome.seconds.append(seconds)
        outcome.samples = [[0.0, 0], [round(seconds, 3), promoted]]
    try:
        _close(connection, params, outcome)
    finally:
        # What was done is in the record, even where somebody holds the last rows.
        statement = vector_store.of(params).write(params, None, None)
        phase.note_statement(db.Done(statement, outcome.rows - promoted, _elapsed(outcome), 1))
        _note(phase, choice, outcome, before)
    return choice, outcome


def _promote(phase: Phase) -> tuple[int, float]:
    """Carries out what moves all vectors at once; returns the rows that it moved, and the seconds."""
    connection, params = phase.connection, phase.params
    started = time.perf_counter()
    statements = vector_store.of(params).promotion(phase)
    if not statements:
        return 0, 0.0
    staged = _staged(connection, params)
    for statement in statements:
        phase.do(statement)
    return staged - _staged(connection, params), time.perf_counter() - started


def _staged(connection: db.Connection, params: Params) -> int:
    return int(db.one(connection, SQL["staged_rows"], params)["rows"])


def _through_ranges(phase: Phase, choice: StrategyChoice) -> BackfillOutcome:
    """Cuts ranges where none are open, and works them off."""
    connection, params, to_do = phase.connection, phase.params, _to_do(phase.connection, phase.params)
    if to_do and not batch_ranges.state(connection, params).left:
        batch_ranges.cut(connection, params, choice)
    if to_do and choice.strategy == "page_interleaved":
        pruning.apply(phase, [r.part for r in batch_strategy.relations(connection, params)])
    outcome = workers.run(phase, choice, to_do)
    pruning.restore(phase)
    return outcome


def _nothing_new_fires(phase: Phase) -> Effects | None:
    """The trial of preflight once more: a trigger may have been made since. The rows alone are locked for it."""
    gates, effects = trials.of_update(phase.connection, phase.params)
    if Gates(tuple(gates)).failed:
        raise GateFailed(Gates(tuple(gates)))
    if effects is not None:
        untouched.note_agreed(phase, effects)
    return effects


def _elapsed(outcome: BackfillOutcome) -> float:
    return float(outcome.samples[-1][0]) if outcome.samples else 0.0


def _server_counts(connection: db.Connection, params: Params) -> db.Row:
    return db.one(connection, SQL["server_counts"], params, table=spelled(params, "vectors"))


def _note(phase: Phase, choice: StrategyChoice, outcome: BackfillOutcome, before: db.Row) -> None:
    p50, p95 = _percentiles(outcome)
    after, state = _server_counts(phase.connection, phase.params), batch_ranges.state(phase.connection, phase.params)
    if not outcome.counts_hot:
        outcome.hot = min(after["hot"] - before["hot"], outcome.rows)
    phase.note(
        "backfill",
        {
            "strategy": choice.strategy,
            "reason": choice.reason,
            "remark": outcome.remark,
            "rows": outcome.rows,
            "seconds": round(_elapsed(outcome), 3),
            "batches": len(outcome.seconds),
            "batch_p50_ms": p50,
            "batch_p95_ms": p95,
            "hot_share": round(outcome.hot_share, 3),
            "put_off": outcome.put_off,
            "pauses": [{"reason": why, "seconds": seconds} for why, seconds in outcome.pauses],
            "windows": state.windows,
            "windows_taken_over": state.taken_over,
            "workers": state.workers,
            "wal_bytes": int(after["wal"] - before["wal"]),
            "table_growth_bytes": int(after["bytes"] - before["bytes"]),
            "samples": outcome.samples,
            "refused": len(outcome.refused),
        },
    )
    untouched.note(phase, outcome.seen)


def _close(connection: db.Connection, params: Params, outcome: BackfillOutcome) -> None:
    """The rows that no range reached: put off, or moved by somebody else while their range was read. First those
    that nobody holds, then the others, in short tries.

    Raises LockNotObtained, naming rows and holder, where one is held for longer; only such rows are left then.
    """
    found = db.rows(connection, SQL["left_over"], params)
    left = [row["key"] for row in found if row["key"] not in outcome.refused]
    held = list[Any]()
    for keys in in_turn(left, first_pace(params)):
        free = _write(connection, params, outcome, keys, skip_held=True)
        held += [key for key in keys if key not in free]
    done = 0
    for keys in in_turn(held, first_pace(params)):
        try:
            _write(connection, params, outcome, keys)
        except LockNotObtained as error:
            raise _are_held(connection, params, held[done:]) from error
        done += len(keys)


def _write(
    connection: db.Connection,
    params: Params,
    outcome: BackfillOutcome,
    keys: Sequence[Any],
    *,
    skip_held: bool = False,
) -> set[Any]:
    """Gives these rows their vectors; returns the keys of those that were not skipped. Rows that the server refuses
    are set apart, each with its words."""

    def write(part: Sequence[Any]) -> set[Any]:
        return _transaction(connection, params, outcome, part, skip_held=skip_held)

    done = refused_rows.in_halves(params, keys, write, outcome.refused)
    return set().union(*done) | (outcome.refused.keys() & set(keys))


def _transaction(
    connection: db.Connection, params: Params, outcome: BackfillOutcome, keys: Sequence[Any], *, skip_held: bool
) -> set[Any]:
    store = vector_store.of(params)
    lock = db.reading(change_queue.SQL[store.lock_rows], params)

    def work() -> tuple[set[Any], int]:
        free = list(keys)
        if skip_held:
            free = [row["key"] for row in connection.execute(lock, {"keys": free}).fetchall()]
        s = store.write(params, free, None)
        return set(free), connection.execute(s.query, s.values).rowcount

    shown = store.write(params, None, None)
    (free, rows), _ = db.in_short_tries(connection, params, shown.name, shown.lock, work)
    outcome.rows += rows
    return free


def _are_held(connection: db.Connection, params: Params, keys: Sequence[Any]) -> LockNotObtained:
    return LockNotObtained(
        found=f"{params.target.key_shown} {some(keys, SHOWN_KEYS)} held by another session;"
        f" {db.holders(connection, params)}",
        needed=f"these rows free within {params.locks.tries} tries of {params.locks.timeout_ms} ms; the others"
        " are done",
        danger="the new search would never find them",
        do="end that session, or wait for it, then run 50_backfill again: only these rows are left",
    )


def help_out(params_file: str) -> Table:
    """Takes part, from another session or machine, in a backfill that a run has begun; ends when no range is left.

    It claims ranges only; the run that began the backfill closes it and proves it. Raises BadInput where nothing
    is under way.
    """
    params = load_params(params_file)
    run_id = f"helper-{uuid.uuid4().hex[:8]}"
    with (
        db.connect(params, f"runbook {run_id}") as connection,
        db.connect(params, f"runbook {run_id} ledger") as ledger_connection,
    ):
        phase = Phase(
            "50_backfill", run_id, True, params, connection, Ledger(ledger_connection, params, run_id, "50_backfill")
        )
        phase.order.fence(connection)
        if batch_ranges.plan(connection, params) or not batch_ranges.state(connection, params).left:
            raise BadInput([_nothing_to_help_with(params.target.name)])
        phase.join()
        with phase.opened():
            outcome = workers.run(
                phase, batch_strategy.choose(connection, params), _to_do(phase.connection, phase.params)
            )
        p50, p95 = _percentiles(outcome)
        untouched.note(phase, outcome.seen)
        phase.note("help", {"rows": outcome.rows, "batches": len(outcome.seconds), "batch_p95_ms": p95})
    return Table(("rows", "batches", "p50 ms", "p95 ms"), [(outcome.rows, len(outcome.seconds), p50, p95)])


def _nothing_to_help_with(target: str) -> Gate:
    return Gate(
        "backfill.is_under_way",
        Verdict.FAIL,
        target,
        "no open range",
        "a run at work on 50_backfill",
        "there is nothing to share",
        "start 50_backfill first, then let others help",
    )


def verify(phase: Phase) -> Gates:
    """missing = 0 and stale = 0, counted by the database over the texts as they are now.

    What was written since the last drain began waits in the queue, and is not counted: where writers never stop there
    is always some of it.
    """
    connection, ledger = phase.connection, phase.ledger
    p = phase.params
    drain = ledger.latest("drain", phase.name) or {"began": None, "oldest": None}
    left = db.one(connection, SQL["left"], p, **drain)
    queued = db.one(connection, SQL["queued"], p)
    table = f"{p.target.schema_}.{p.target.table}"
    waiting = f"; {change_queue.waiting(connection, p)}" if queued["rows"] else ""
    if left["newer"]:
        waiting = f"; {number(left['newer'])} were written since the last drain began{waiting}"
    return collect(
        [
            gate(
                "backfill.nothing_is_missing",
                left["missing"] == 0,
                table,
                found=f"{number(left['missing'])} of {number(left['with_text'])} rows with text lack a vector"
                + waiting,
                needed="0",
                danger="the new search never finds these rows",
                do="run 40_load_embeddings and this phase again; both resume where they stopped",
                figures={key: left[key] for key in ("missing", "with_text", "newer")} | {"queued": queued["rows"]},
            ),
            gate(
                "backfill.nothing_is_stale",
                left["stale"] == 0,
                table,
                found=f"{number(left['stale'])} rows have the vector of an older text{waiting}",
                needed="0",
                danger="the new search ranks these rows by words that they no longer hold",
                do="run this phase again; it drains the queue of changed rows",
                figures={"stale": left["stale"], "queued": queued["rows"]},
            ),
            *pruning.verify(connection, ledger, p),
            *_took_and_touched(connection, ledger, p),
        ]
    )


def _took_and_touched(connection: db.Connection, ledger: Ledger, params: Params) -> list[Gate]:
    """Named only where rows refused their vector; and what else was touched, where rows were compared."""
    left = refused_rows.gate_of_left(connection, params)
    return [*([left] if left.verdict is Verdict.FAIL else []), *untouched.verify(connection, ledger, params)]
