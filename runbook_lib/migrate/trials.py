"""Each kind of statement that later phases will run, tried in one short transaction that is rolled back.

What a catalogue cannot tell, such as an event trigger's mind, the server says itself. The statements that lock the
target come last and are few; the transaction ends with them, so the table is held for milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import psycopg
from psycopg import sql

from runbook_lib.backfill import batch_ranges, pruning, update_effects, vector_store
from runbook_lib.core import db, table_kind
from runbook_lib.core.display import duration, number
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import added_columns, identifier, names, spelled, verbatim
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import dependents, expand_schema, extension
from runbook_lib.params import Params
from runbook_lib.search import search_function, word_statistics
from runbook_lib.sql import load

SQL = load("trials")
LEDGER = load("ledger")
WINDOWS = load("windows")

TRIES = 3
# A lock is waited for no longer than this, whatever locks.timeout_ms allows a phase.
LONGEST_LOCK_WAIT_MS = 100
STATEMENT_TIMEOUT_MS = 5000
WAIT_BETWEEN_TRIES_S = 0.2
# Of a partitioned table, so many partitions' storage parameters are tried.
MOST_PARTS = 5


@dataclass
class _Stage:
    """The trial of one kind of statement. lock: the strongest on the target; empty where it takes none."""

    name: str
    phase: str
    make: Callable[[], Sequence[db.Statement]]
    lock: str = ""
    done: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""
    unknown: bool = False


def gates(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Tries what is left to be made, and the backfill's UPDATE. A lock that others hold makes a gate UNKNOWN.

    Where everything is made already, or this kind of table takes no trials, nothing is tried and there is no gate.
    """
    if not table_kind.of(params).takes_trials:
        return
    before = connection.prepare_threshold
    connection.prepare_threshold = None
    try:
        yield from _unchecked_constraints(connection, params)
        yield from _Run(connection, params).gates()
    finally:
        connection.prepare_threshold = before


def of_update(connection: db.Connection, params: Params) -> tuple[list[Gate], update_effects.Effects | None]:
    """The trial of the UPDATE alone, for a phase that is about to begin it; None where it was not made, since there
    is nothing to try it on or its locks were not to be had."""
    try:
        with db.rolled_back(connection):
            _bound(connection, params)
            prepared = _prepared(connection, params) if table_kind.of(params).takes_trials else None
            if prepared is None:
                return [], None
            trial = update_effects.attempt(connection, params, prepared)
    except db.NOT_NOW as error:
        print(f"  the UPDATE was not tried on a sample first: {update_effects.said(error)}")
        return [], None
    return list(update_effects.gates(params, trial)), trial.effects


def summary(found: Iterable[Gate]) -> str:
    """What was tried, and how long the target was locked for it, in a line; empty where nothing was tried."""
    tried = [g for g in found if g.name.startswith("trial.") and g.figures]
    locks = [str(g.figures["lock"]) for g in tried if g.figures.get("lock")]
    held = max((float(g.figures.get("held_s", 0.0)) for g in tried), default=0.0)
    locked = f"; the table was locked for {duration(held)} ({', '.join(locks)})" if locks else ""
    return f"tried and rolled back: {len(tried)} kinds of statement{locked}" if tried else ""


class _Held(Exception):
    """A lock of the target was not obtained."""


@dataclass
class _Run:
    """One transaction of trials, repeated where a lock was not obtained."""

    connection: db.Connection
    params: Params

    def gates(self) -> list[Gate]:
        for n in range(TRIES):
            if n:
                time.sleep(WAIT_BETWEEN_TRIES_S * n)
            try:
                return self._transaction()
            except _Held as held:
                name, problem = held.args
        return [_not_now(self.params, name, f"{problem}; {db.holders(self.connection, self.params)}")]

    def _transaction(self) -> list[Gate]:
        found: list[Gate] = []
        p, held_since = self.params, 0.0
        with db.rolled_back(self.connection):
            _bound(self.connection, p)
            prepared = _prepared(self.connection, p)
            for stage in _stages(self.connection, p):
                held_since = held_since or (time.perf_counter() if stage.lock else 0.0)
                self._try(stage)
                if stage.done or stage.problem:
                    found.append(_gate(p, stage))
                if stage.problem:
                    return found
            found += self._update(prepared) if prepared is not None else []
        held_s = time.perf_counter() - held_since
        return [_with_time(g, held_s) if g.figures.get("lock") else g for g in found]

    def _try(self, stage: _Stage) -> None:
        started = time.perf_counter()
        name = ""
        try:
            with self.connection.transaction():
                for statement in stage.make():
                    name = statement.name
                    self.connection.execute(statement.query, statement.values, prepare=False)
                    if name == "extension.create":
                        db.use_search_path(self.connection)
                    stage.done.append(name)
        except db.NOT_NOW as error:
            raise _Held(
                stage.name, f"{name} waited {LONGEST_LOCK_WAIT_MS} ms: {update_effects.said(error)}"
            ) from error
        except psycopg.Error as error:
            db.raise_if_lost(self.connection, error)
            stage.problem = f"PostgreSQL says to {name or 'it'}: {update_effects.said(error)}"
            stage.unknown = isinstance(error, psycopg.errors.QueryCanceled)
        stage.seconds = time.perf_counter() - started

    def _update(self, prepared: update_effects.Prepared) -> list[Gate]:
        p = self.params
        try:
            trial = update_effects.attempt(self.connection, p, prepared)
        except db.NOT_NOW as error:
            raise _Held("update_takes_every_row", update_effects.said(error)) from error
        except psycopg.Error as error:
            db.raise_if_lost(self.connection, error)
            return [_not_now(p, "update_takes_every_row", f"PostgreSQL says: {update_effects.said(error)}")]
        return list(update_effects.gates(p, trial))


def _bound(connection: db.Connection, params: Params) -> None:
    values = {
        "lock_ms": f"{min(params.locks.timeout_ms, LONGEST_LOCK_WAIT_MS)}ms",
        "statement_ms": f"{STATEMENT_TIMEOUT_MS}ms",
    }
    connection.execute(SQL["settings"].compose({}), values)


def _with_time(g: Gate, held_s: float) -> Gate:
    """With how long the table was held, from the first lock of the transaction to its end."""
    return replace(
        g,
        found=f"{g.found}; all its locks held for {duration(held_s)}",
        figures=dict(g.figures) | {"held_s": round(held_s, 4)},
    )


def _prepared(connection: db.Connection, params: Params) -> update_effects.Prepared | None:
    """For the trial of the UPDATE, read before anything is locked; None where it is not to be tried: vectors
    in a side table, or a vector index that would keep what was rolled back, or no row left to fill."""
    if not _updates_rows(connection, params):
        return None
    added = added_columns(params)
    prepared = update_effects.prepare(connection, params, added)
    columns = {c["name"] for c in db.rows(connection, SQL["columns"], params, table=spelled(params, "table"))}
    return None if set(added) <= columns and not prepared.keys else prepared


def _updates_rows(connection: db.Connection, params: Params) -> bool:
    """Will the backfill still update rows of the table itself?"""
    return bool(vector_store.of(params).columns(params)) and not _index_is_there(connection, params)


def _index_is_there(connection: db.Connection, params: Params) -> bool:
    return db.relation_exists(connection, spelled(params, "qualified_index"))


def _stages(connection: db.Connection, params: Params) -> list[_Stage]:
    """In the order of the phases, but for what locks the target, which comes last."""
    # What a phase asks of its surroundings when it plans: parameters and this connection.
    phase = Phase("00_preflight", "trial", False, params, connection, Ledger(connection, params, "trial", "trial"))
    exclusive = ("schema.drop_triggers", "schema.create_triggers", "schema.add_columns")

    def of_schema(*wanted: str) -> list[db.Statement]:
        return [s for s in expand_schema.plan(phase) if s.name in wanted]

    def tables() -> list[db.Statement]:
        made = [s for s in expand_schema.plan(phase) if s.name not in exclusive and s.name != "sidetable.create"]
        return made + batch_ranges.plan(phase.connection, phase.params)

    def broken() -> list[db.Statement]:
        return dependents.validations(connection, params)

    # Where the columns are there already, a function that broke by them is no news.
    adds = bool(of_schema("schema.add_columns"))
    on_target = "ACCESS EXCLUSIVE"
    share = "SHARE ROW EXCLUSIVE"
    return [
        _Stage("ledger_can_be_made", "00_preflight", lambda: _ledger(phase.ledger, phase.params)),
        _Stage("search_function_can_be_made", "10_baseline", lambda: _function(phase)),
        _Stage("extension_can_be_made", "20_extension", lambda: list(extension.plan(phase))),
        _Stage("tables_can_be_made", "30_expand_schema", tables),
        _Stage("index_can_be_made", "60_build_index", lambda: _index(phase.connection, phase.params)),
        _Stage("side_table_can_be_made", "30_expand_schema", lambda: of_schema("sidetable.create"), share),
        _Stage("capture_can_be_made", "30_expand_schema", lambda: of_schema(*exclusive[:2]), share),
        _Stage("columns_can_be_added", "30_expand_schema", lambda: of_schema("schema.add_columns"), on_target),
        _Stage("functions_still_return_rows", "30_expand_schema", lambda: broken() if adds else [], on_target),
        _Stage(
            "fillfactor_can_be_set",
            "50_backfill",
            lambda: _fillfactor(phase.connection, phase.params),
            "SHARE UPDATE EXCLUSIVE",
        ),
    ]


def _ledger(ledger: Ledger, params: Params) -> list[db.Statement]:
    return [db.statement(LEDGER[name], params) for name in ledger.missing()]


def _function(phase: Phase) -> list[db.Statement]:
    """Where it already exists, making it again would lock its catalogue rows under calls that are under way."""
    if search_function.function_state(phase.connection, phase.params):
        return []
    # Counting words takes seconds on a large table, and needs only the privilege to read it.
    return [s for s in search_function.plan(phase) if s.name != word_statistics.COUNT]


def _index(connection: db.Connection, params: Params) -> list[db.Statement]:
    if _index_is_there(connection, params):
        return []
    probe = {
        "probe": identifier(params.ledger.schema_, f"{params.target.name}_trial"),
        "m": sql.Literal(params.index.m),
        "ef_construction": sql.Literal(params.index.ef_construction),
    }
    return [db.statement(SQL[name], params, probe) for name in ("create_probe", f"create_{params.index.method}")]


def _fillfactor(connection: db.Connection, params: Params) -> list[db.Statement]:
    """Set to what the backfill would set it to, where it may go page by page."""
    if params.backfill.strategy == "key_ranges" or not _updates_rows(connection, params):
        return []
    parts = db.rows(connection, WINDOWS["relations"], params, table=spelled(params, "table"))
    heaps = [r for r in parts if r["access_method"] == "heap"]
    largest = sorted(heaps, key=lambda r: -int(r["blocks"]))[:MOST_PARTS]
    return pruning.plan(connection, params, [r["part"] for r in largest])


def _gate(params: Params, stage: _Stage) -> Gate:
    made = ", ".join(name.split(".")[-1] for name in stage.done)
    locked = f"; {stage.lock} on the table" if stage.lock else ""
    return gate(
        f"trial.{stage.name}",
        None if stage.unknown else not stage.problem,
        spelled(params, "table"),
        found=stage.problem or f"{made}: tried and rolled back in {duration(stage.seconds)}{locked}",
        needed=f"the server takes what {stage.phase} will run",
        danger=f"{stage.phase} would be refused, after the phases before it have done their work",
        do="settle it with whoever set this rule for the database, then run the same command again",
        figures={"seconds": round(stage.seconds, 4), "lock": stage.lock},
    )


def _not_now(params: Params, name: str, found: str) -> Gate:
    return gate(
        f"trial.{name}",
        None,
        spelled(params, "table"),
        found=found,
        needed=f"its lock within {LONGEST_LOCK_WAIT_MS} ms, in one of {TRIES} tries",
        danger="what this phase would do to the table was not tried, so nothing is claimed of it",
        do="end that session, or run the same command again at a quieter time; nothing was changed",
    )


def _unchecked_constraints(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """An UPDATE checks a NOT VALID constraint on the row that it writes, however old the row is."""
    if not _updates_rows(connection, params):
        return
    for k in db.rows(connection, SQL["unchecked"], params, table=spelled(params, "table")):
        extra = {"relation": verbatim(k["relation"]), "condition": verbatim(k["condition"])}
        problem, rows = "", 0
        try:
            with connection.transaction(force_rollback=True):
                _bound(connection, params)
                row = connection.execute(SQL["violated"].compose(names(params) | extra), {}, prepare=False).fetchone()
                rows = int(row["rows"]) if row else 0
        except psycopg.Error as error:
            db.raise_if_lost(connection, error)
            problem = f"could not be counted: {update_effects.said(error)}"
        constraint = identifier(k["name"]).as_string().replace("%%", "%")
        yield gate(
            "trial.rows_meet_unchecked_constraints",
            None if problem else rows == 0,
            f"{k['name']} of {k['relation']}",
            found=problem or f"NOT VALID; {number(rows)} rows do not meet it",
            needed="every row meets it",
            danger="an UPDATE of such a row fails, so the backfill would stop there",
            do=f"correct these rows, then ALTER TABLE {k['relation']} VALIDATE CONSTRAINT {constraint}, which blocks"
            f" no write; or {update_effects.SIDE_TABLE}",
            figures={"rows": rows},
        )
