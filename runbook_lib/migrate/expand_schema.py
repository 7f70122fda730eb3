"""Phase 30: the vector column next to the relational data, the staging table, and the capture of changes."""

from __future__ import annotations

from collections.abc import Sequence

from runbook_lib.backfill import change_capture, pruning, vector_store
from runbook_lib.core import db, session
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import added_columns, spelled, trigger_name
from runbook_lib.core.phase import Phase, changes
from runbook_lib.migrate import partition_checks
from runbook_lib.params import Params
from runbook_lib.search import free_names
from runbook_lib.sql import load

SQL = load("schema")
WINDOWS = load("windows")
# What the capture's triggers fire on, and end their names with.
TRIGGERS = ("insert", "update")


def _table(params: Params) -> str:
    return spelled(params, "table")


def _what_is_there(connection: db.Connection, params: Params) -> db.Row:
    made = ("vectors", "staging", "rejected", "queue", "window", "capture_function")
    relations = {n: spelled(params, n) for n in made}
    return db.one(
        connection,
        SQL["what_is_there"],
        params,
        table=_table(params),
        columns=added_columns(params),
        triggers=[trigger_name(params, event) for event in TRIGGERS],
        **relations,
    )


def plan(phase: Phase) -> db.Plan:
    """The statements that are still to be carried out; what already exists is left alone."""
    connection, params = phase.connection, phase.params
    there, p = _what_is_there(connection, params), params
    wanted = [
        ("create_staging", not there["staging"]),
        ("create_rejected", not there["rejected"]),
        ("create_queue", not there["queue"]),
        ("create_capture_function", not there["capture_function"]),
        ("drop_triggers", there["triggers"] > 0 and there["firing"] < len(TRIGGERS)),
        ("create_triggers", there["firing"] < len(TRIGGERS)),
    ]
    made = there["columns"] == len(added_columns(p))
    todo = [] if made else [vector_store.of(p).create(connection, p)]
    blocks = {**SQL, **vector_store.of(p).blocks}
    todo += [db.statement(blocks[n], p) for n, missing in wanted if missing]
    return db.Plan(tuple(todo), connection)


@changes
def apply(phase: Phase) -> Table:
    """Carries out the plan. Each statement is a transaction of its own; killed between two, a rerun resumes.

    Raises BadInput where another target, or somebody else, has made the columns since preflight.
    """
    if phase.execute:
        free_names.require(phase.connection, phase.params)
        # Before the first statement: killed after it, the runbook must still know that the columns are its own.
        owned = {"table": _table(phase.params), "vectors": spelled(phase.params, "vectors")}
        phase.note("owns", owned | {"columns": added_columns(phase.params)})
    return phase.carry_out(plan(phase))


def verify(phase: Phase) -> Gates:
    """The column is what was asked for, the table is otherwise unchanged, and a change of text arrives."""
    connection, params = phase.connection, phase.params
    gates = [
        _column_has_right_type(connection, params),
        _only_ours_was_added(connection, phase.ledger, params),
        change_capture.gate_of(connection, params),
    ]
    triggers = [trigger_name(params, event) for event in TRIGGERS]
    return collect([*gates, *partition_checks.captures(connection, params, triggers)])


def _column_has_right_type(connection: db.Connection, params: Params) -> Gate:
    vectors = spelled(params, "vectors")
    found = db.rows(connection, SQL["column_type"], params, table=vectors, column=params.vector.column)
    kind = str(found[0]["type"]).rsplit(".", 1)[-1] if found else "no such column"
    needed = f"{params.vector.type}({params.vector.dimension})"
    return gate(
        "schema.column_has_right_type",
        kind == needed,
        f"{params.vector.column} of {vectors}",
        found=kind,
        needed=needed,
        danger="vectors of another dimension are refused row by row, or cannot be indexed",
        do="if the column is yours, name another in vector.column; else run undo/schema and this phase",
    )


def _only_ours_was_added(connection: db.Connection, ledger: Ledger, params: Params) -> Gate:
    before = ledger.latest("catalogue")
    gone, new = difference(before["lines"], catalogue(connection, params)) if before else ([], [])
    ours = [*added_columns(params), "runbook_", "extension vector", f".{params.function_name}("]
    foreign = [line for line in new if not any(part in line for part in ours)]
    return gate(
        "schema.only_the_runbooks_objects_were_added",
        None if before is None else not gone and not foreign,
        _table(params),
        found="no catalogue from the start to compare with"
        if before is None
        else f"{len(new)} objects added, {len(gone)} gone" + "".join(f"; {x}" for x in [*gone, *foreign][:5]),
        needed="the catalogue of the start and the runbook's own objects",
        danger="another session is changing this table; undo would not lead back to where the migration began",
        do="settle with whoever made the change, then run 00_preflight again so that it is part of the start",
        figures={"added": len(new), "gone": len(gone)},
    )


def undo_plan(phase: Phase) -> db.Plan:
    """The statements that remove what this phase added; columns that were there at the start are kept."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    store = vector_store.of(params)
    start = (ledger.latest("catalogue") or {"lines": []})["lines"]
    theirs = params.vector.column in store.columns(params) and any(
        x.startswith(f"column {params.vector.column} ") for x in start
    )
    drop = [store.drop(connection, params)] if _what_is_there(connection, params)["columns"] and not theirs else []
    return db.Plan(
        (*undo_capture_plan(connection, params), *drop, *pruning.restore_plan(connection, ledger, params)), connection
    )


def undo_capture_plan(connection: db.Connection, params: Params) -> list[db.Statement]:
    """The statements that remove the capture of changes, the staging table, and what the backfill kept."""
    there = _what_is_there(connection, params)
    wanted = [
        ("drop_capture", bool(there["triggers"]) or there["capture_function"]),
        ("drop_staging", there["staging"] or there["rejected"]),
        ("drop_queue", there["queue"]),
    ]
    windows = [db.statement(WINDOWS[n], params) for n in ("drop", "drop_control") if there["window"]]
    drops = [db.statement(SQL[n], params) for n, present in wanted if present]
    return [*drops, *windows]


@changes
def undo(phase: Phase) -> Table:
    """Removes what this phase added; does nothing where nothing is left."""
    return phase.carry_out(undo_plan(phase))


def verify_undone(phase: Phase) -> Gates:
    """Nothing of this phase is left."""
    left = [
        name
        for name, present in _what_is_there(phase.connection, phase.params).items()
        if present and name != "firing"
    ]
    return collect(
        [
            gate(
                "schema.nothing_is_left",
                not left,
                _table(phase.params),
                found=", ".join(left) or "none of the runbook's columns, triggers and tables",
                needed="none",
                danger="writers still pay for what is left",
                do="run undo/schema again",
            )
        ]
    )


def catalogue(connection: db.Connection, params: Params) -> list[str]:
    """The table's columns, indexes, constraints, triggers, options, grants and comments, a line each."""
    values = {"table": _table(params), "schema": spelled(params, "schema"), "function": params.function_name}
    with session.fixed_path(connection):
        return [row["line"] for row in db.rows(connection, SQL["catalogue"], params, **values)]


def difference(before: Sequence[str], now: Sequence[str]) -> tuple[list[str], list[str]]:
    """Lines that are gone and lines that are new."""
    return [x for x in before if x not in now], [x for x in now if x not in before]


@changes
def record_start(phase: Phase) -> None:
    """Writes down the catalogue that undo must lead back to, once: not again while a migration is under way."""
    begun = phase.ledger.latest("catalogue") is not None
    if not begun or phase.ledger.phase_verdict("00_preflight") == "UNDONE":
        phase.note("catalogue", {"lines": catalogue(phase.connection, phase.params)})


def verify_as_at_start(phase: Phase) -> Gates:
    """The catalogue equals the one that was written down before the first change."""
    start = phase.ledger.latest("catalogue")
    gone, new = difference(start["lines"], catalogue(phase.connection, phase.params)) if start else ([], [])
    return collect(
        [
            gate(
                "schema.table_is_as_at_the_start",
                None if start is None else not gone and not new,
                _table(phase.params),
                found="no catalogue from the start"
                if start is None
                else f"{len(gone)} gone, {len(new)} new" + "".join(f"; {x}" for x in [*gone, *new][:5]),
                needed="the same lines in both catalogues",
                danger="something that the runbook made is still there, or something of yours is missing",
                do="run the undo notebooks in order; compare what is named here with your own changes since",
                figures={"lines": len(start["lines"]) if start else 0, "gone": len(gone), "new": len(new)},
            )
        ]
    )
