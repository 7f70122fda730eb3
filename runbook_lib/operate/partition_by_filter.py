"""An ordinary table becomes a partitioned one in use: a second one is made, filled, kept level, swapped in.

After the swap the queue runs the other way, so that the ordinary table can be brought level and take its place again
without losing a row. The catalogue says which table serves and how far the other one is; a rerun resumes there.
"""

from __future__ import annotations

from typing import Any

from runbook_lib.backfill import online_copy, partitioned_twin, vector_store
from runbook_lib.backfill.partitioned_twin import PARTS, WHOLE, TwinState, catalogue, spelled_beside, standing
from runbook_lib.benchmark import filter_classes
from runbook_lib.core import db, row_counts
from runbook_lib.core.display import Table, duration, number, some
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.indexes import building
from runbook_lib.migrate import policies
from runbook_lib.operate import partition_proof
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("partitioning")

SHOWN_NAMES = 8


def check(phase: Phase) -> Gates:
    """Before anything is changed: what divides the table, what cannot come along, and what its key becomes."""
    connection, params = phase.connection, phase.params
    found = standing(connection, params)
    gates = [_column_is_named(params), _table_is_ordinary(phase.ledger, params, found)]
    if found.serves == "r" and params.partitioning.column:
        gates += [_nothing_in_the_way(connection, params), *_key_gates(connection, params)]
    return collect(gates)


def _subject(params: Params) -> str:
    return f"{params.target.schema_}.{params.target.table}"


def _column_is_named(params: Params) -> Gate:
    column = params.partitioning.column
    return gate(
        "partitioning.column_is_named",
        bool(column),
        _subject(params),
        found=f"{column}, by {params.partitioning.method}" if column else "no column",
        needed="one of target.filters",
        danger="nothing says how to divide the table",
        do="name partitioning.column",
    )


def _table_is_ordinary(ledger: Ledger, params: Params, found: TwinState) -> Gate:
    divisible = vector_store.of(params).knows_filters
    clash = found.serves == "r" and found.whole
    foreign = found.serves == "p" and not found.begun and not ledger.latest("partition swap")
    return gate(
        "partitioning.table_can_be_divided",
        divisible and not clash and not foreign and found.serves in ("r", "p"),
        _subject(params),
        found="the vectors are in a table of their own"
        if not divisible
        else f"{spelled_beside(params, WHOLE)} already exists"
        if clash
        else "partitioned, not by this operation"
        if foreign
        else str(found),
        needed="an ordinary table that holds its vectors, or one that this operation works on",
        danger="the vectors would stay undivided, or a table of somebody else's would be taken for ours",
        do="bring the vectors into the table, or move the other table out of the way",
    )


def _nothing_in_the_way(connection: db.Connection, params: Params) -> Gate:
    found = [f"{row['what']} {row['name']}" for row in catalogue(connection, params, "in_the_way")]
    return gate(
        "partitioning.nothing_is_in_the_way",
        not found,
        _subject(params),
        found=some(found, SHOWN_NAMES, "; ") if found else "nothing that cannot be carried over",
        needed="nothing that holds the table by its identity, and no uniqueness that partitions cannot keep",
        danger="it would stay with the old table, or the partitioned one cannot have it",
        do="drop what is named and make it again after the swap, where a partitioned table can have it",
        figures={"in_the_way": found},
    )


def _key_gates(connection: db.Connection, params: Params) -> list[Gate]:
    if len(params.target.key_columns) > 1:
        return [_key_is_one_column(params)]
    column = str(params.partitioning.column)
    key = catalogue(connection, params, "key", column=column)[0]
    alone = key["primary_key"] == [params.target.key]
    accepted = params.partitioning.accept_wider_key or column == params.target.key
    return [
        gate(
            "partitioning.key_can_be_widened",
            alone and bool(key["not_null"]),
            _subject(params),
            found=f"primary key {', '.join(key['primary_key'] or ['none'])}; {column}"
            + (" is NOT NULL" if key["not_null"] else " may be NULL"),
            needed=f"primary key {params.target.key}, and {column} NOT NULL",
            danger="the primary key of a partitioned table holds the column that divides it, which is never NULL",
            do=f"make {column} NOT NULL: a CHECK ({column} IS NOT NULL) NOT VALID, then VALIDATE, then SET NOT NULL",
        ),
        gate(
            "partitioning.wider_key_is_accepted",
            accepted,
            _subject(params),
            found=f"partitioning.accept_wider_key: {str(params.partitioning.accept_wider_key).lower()}",
            needed=f"true: the primary key becomes ({params.target.key}, {column})",
            danger=f"two rows of different {column} may then have one {params.target.key}; PostgreSQL refuses"
            f" ON CONFLICT ({params.target.key}) and foreign keys to {params.target.key} alone",
            do="look for both in the application, then set partitioning.accept_wider_key: true",
        ),
    ]


def _key_is_one_column(params: Params) -> Gate:
    return gate(
        "partitioning.key_is_one_column",
        False,
        _subject(params),
        found=f"target.key: {params.target.key_shown}",
        needed="a key of one column",
        danger="the copy of the table is followed by a queue of keys, which holds one column",
        do="leave it out; operate/serve_filters serves filter values without partitions",
    )


def expected(phase: Phase) -> Table:
    """The partitions that will be made, or that there are."""
    return partitioned_twin.expected(phase.connection, phase.params, _shares(phase.connection, phase.params))


def _shares(connection: db.Connection, params: Params) -> dict[str, float]:
    """Of the rows, by value of the column that divides them; none where the table is divided by hash, or already."""
    by_value = params.partitioning.method == "list" and standing(connection, params).serves != "p"
    column = str(params.partitioning.column)
    return filter_classes.shares(connection, params, (column,)) if by_value else {}


def shown(phase: Phase) -> Table:
    """Where the move stands, and how many changes wait."""
    connection, params = phase.connection, phase.params
    found = standing(connection, params)
    rows: list[tuple[str, Any]] = [("now", str(found))]
    if found.begun:
        copying = partitioned_twin.move(connection, params).row(connection, SQL["copying"])
        waiting = online_copy.queued(partitioned_twin.move(connection, params), connection, online_copy.MOST_KEYS)
        rows += [("rows copied", number(copying["rows"])), ("all of them", bool(copying["copied"]))]
        rows += [("changes that wait", f"{number(waiting)}{' or more' if waiting == online_copy.MOST_KEYS else ''}")]
    return Table(("", ""), rows)


def _begin(connection: db.Connection, params: Params) -> list[db.Statement]:
    """What is left to make before the first row is copied."""
    found = standing(connection, params)
    extra = partitioned_twin.move(connection, params).extra
    todo = [] if found.begun else [db.statement(SQL[b], params, extra) for b in ("create_queue", "create_capture")]
    todo += [] if found.parts else [partitioned_twin.create_table(connection, params, _shares(connection, params))]
    triggers = db.rows(connection, SQL["capturing"], params, table=spelled(params, "table"), name=_trigger(params))
    return todo + ([] if triggers else [db.statement(SQL["create_triggers"], params, extra)])


def _trigger(params: Params) -> str:
    return spelled(params, "move_trigger").strip('"')


def building_plan(connection: db.Connection, params: Params) -> db.Plan:
    """What is left to do before the swap: nothing of it keeps anybody waiting."""
    found = standing(connection, params)
    if found.serves == "p":
        return db.Plan((), connection)
    extra = partitioned_twin.move(connection, params).extra
    copied = found.begun and partitioned_twin.move(connection, params).row(connection, SQL["copying"])["copied"]
    copy = [] if copied else [db.statement(SQL["copy_batch"], params, extra, rows=params.backfill.batch_rows)]
    return db.Plan(
        (*_begin(connection, params), *copy, *partitioned_twin.missing_indexes(connection, params), _analyze(params)),
        connection,
    )


def _analyze(params: Params) -> db.Statement:
    return db.statement(SQL["analyze"], params, {"parts": partitioned_twin.beside(params, PARTS)})


def swapping_plan(connection: db.Connection, params: Params) -> db.Plan:
    """The swap; nothing where the partitioned table serves."""
    todo = (
        () if standing(connection, params).serves == "p" else (partitioned_twin.swap_statement(connection, params),)
    )
    return db.Plan(todo, connection)


def plan(phase: Phase) -> db.Plan:
    """All of it: the partitioned table made, filled, indexed, then swapped in."""
    connection, params = phase.connection, phase.params
    return db.Plan((*building_plan(connection, params), *swapping_plan(connection, params)), connection)


@changes
def apply(phase: Phase) -> Table:
    """Makes, fills and indexes the partitioned table, and brings it level; the table in use stays as it is."""
    connection, params = phase.connection, phase.params
    todo = building_plan(connection, params)
    if not phase.execute:
        return phase.carry_out(todo)
    if standing(connection, params).serves == "p":
        return shown(phase)
    if not any("before" in m for m in partition_proof.remembered(phase.ledger, params).values()):
        partition_proof.measure(phase, "before")
    rows: list[tuple[str, Any]] = []
    for statement in _begin(connection, params):
        rows.append((statement.purpose, round(phase.do(statement).seconds, 3)))
    move = partitioned_twin.move(connection, params)
    total = row_counts.of(connection, params).n
    rows.append(("Rows copied", number(online_copy.copy(phase, move, total))))
    for statement in [*partitioned_twin.missing_indexes(connection, params), _analyze(params)]:
        # Not concurrently: nobody reads it. Its session has the memory and the workers of a build all the same.
        rows.append(
            (f"{statement.purpose} ({statement.name})", round(building.concurrently(phase, statement).seconds, 2))
        )
    rows.append(("Changes applied since", number(online_copy.catch_up(phase, move))))
    return Table(("what", "seconds, or rows"), rows)


def verify_copy(phase: Phase) -> Gates:
    """Before the swap: every row is there as it is, but for those that wait in the queue, and every index is."""
    connection, params = phase.connection, phase.params
    if standing(connection, params).serves == "p":
        return collect(
            [rows_are_equal(connection, params)]
            if standing(connection, params).whole
            else [_is_divided(connection, params)]
        )
    missing = [s.text(connection).split(" ON ")[0] for s in partitioned_twin.missing_indexes(connection, params)]
    return collect(
        [
            rows_are_equal(connection, params),
            gate(
                "partitioning.indexes_are_there",
                not missing,
                spelled_beside(params, PARTS),
                found="; ".join(missing) or "each index of the table",
                needed="each index of the table",
                danger="searches would read whole partitions from the swap on",
                do="run operate/partition_by_filter again with execute: true",
            ),
        ]
    )


def rows_are_equal(connection: db.Connection, params: Params) -> Gate:
    """Every row of both tables, byte by byte, in one snapshot; what waits in the queue is on its way."""
    move = partitioned_twin.move(connection, params)
    with online_copy.session(connection, params) as reader:
        d = move.row(reader, SQL["differences"])
    wrong = d["lacking"] + d["extra"] + d["different"]
    return gate(
        "partitioning.every_row_is_in_both",
        d["rows"] > 0 and not wrong,
        f"{_subject(params)} and {move.extra['beside'].as_string()}".replace("%%", "%"),
        found=f"{number(d['rows'])} rows compared, {d['lacking']} lacking, {d['extra']} too many,"
        f" {d['different']} different",
        needed="every row in both, byte by byte, but for changes that wait in the queue",
        danger="rows would be lost, or come back, with the change of names",
        do="take the partitioned table away (partition_by_filter --undo), start again, report what differs",
        figures=dict(d),
    )


@changes
def swap(phase: Phase) -> Table:
    """Puts the partitioned table into the place of the ordinary one; everybody waits for the last changes."""
    todo = swapping_plan(phase.connection, phase.params)
    if not phase.execute or not todo.statements:
        return phase.carry_out(todo)
    return _swap(phase)


def _swap(phase: Phase) -> Table:
    statement = partitioned_twin.swap_statement(phase.connection, phase.params)
    done = online_copy.swap(phase, partitioned_twin.move(phase.connection, phase.params), statement)
    figures = {
        "name": statement.name,
        "seconds": round(done.seconds, 4),
        "drained": done.drained,
        "tries": done.tries,
    }
    phase.note("partition swap", figures)
    return Table(
        ("what", "under the lock", "changes in it", "tries"),
        [(statement.purpose, duration(done.seconds), done.drained, done.tries)],
    )


def verify(phase: Phase) -> Gates:
    """The partitioned table serves with every row and index; a search reads one partition and finds as much."""
    connection, params = phase.connection, phase.params
    found = standing(connection, params)
    gates = [_is_divided(connection, params)]
    if found.serves != "p":
        return collect(gates)
    others = [spelled_beside(params, WHOLE)] if found.whole else []
    if found.whole:
        gates.append(rows_are_equal(connection, params))
    if params.partitioning.method == "list":
        gates.append(partition_proof.function_reads_one_partition(connection, params, others))
    partition_proof.measure(phase, "after")
    return collect([*gates, *partition_proof.finds_as_much(phase.ledger, params)])


def _is_divided(connection: db.Connection, params: Params) -> Gate:
    row = catalogue(connection, params, "partitioned_by", relation=spelled(params, "table"))[0]
    wanted = f"{params.partitioning.method.upper()} ("
    how = row["how"] or "not at all"
    by_it = how.startswith(wanted) and str(params.partitioning.column) in how
    return gate(
        "partitioning.table_is_divided",
        by_it and row["partitions"] > 1,
        _subject(params),
        found=f"{how}, {row['partitions']} partitions, {row['indexes']} valid indexes",
        needed=f"{params.partitioning.method.upper()} ({params.partitioning.column})",
        danger="searches read the rows of every value",
        do="run operate/partition_by_filter again with execute: true",
        figures={"partitions": row["partitions"], "indexes": row["indexes"]},
    )


def keep_level(phase: Phase) -> Table:
    """Brings the ordinary table level after the swap, so that the rollback stays short."""
    if not phase.execute or not standing(phase.connection, phase.params).swapped:
        return shown(phase)
    applied = online_copy.catch_up(phase, partitioned_twin.move(phase.connection, phase.params))
    return Table(("what", "rows"), [("Changes applied to the ordinary table", number(applied))])


def _taking_away(connection: db.Connection, params: Params) -> list[db.Statement]:
    extra = partitioned_twin.move(connection, params).extra | {"parts": partitioned_twin.beside(params, PARTS)}
    return [db.statement(SQL[b], params, extra) for b in ("drop_triggers", "drop_table", "drop_queue")]


def check_undo(phase: Phase) -> Gates:
    """Before the rollback: the ordinary table is still there."""
    connection, params = phase.connection, phase.params
    found = standing(connection, params)
    return collect(
        [
            gate(
                "partitioning.ordinary_table_is_kept",
                not found.retired,
                _subject(params),
                found=str(found),
                needed="the ordinary table, serving or kept",
                danger="nothing is left to go back to: nothing was changed",
                do="leave it partitioned; nothing but a copy by hand makes one table of it again",
            ),
            *policies.kept_table_is_as_open(connection, params),
        ]
    )


def undo_plan(phase: Phase) -> db.Plan:
    """The ordinary table back in its place where it is still there, and the partitioned one dropped."""
    connection, params = phase.connection, phase.params
    found = standing(connection, params)
    if found.retired or not (found.begun or found.parts or found.swapped):
        return db.Plan((), connection)
    back = [partitioned_twin.swap_statement(connection, params)] if found.swapped else []
    return db.Plan((*back, *_taking_away(connection, params)), connection)


@changes
def undo(phase: Phase) -> Table:
    """Rolls back: changes since the swap are applied first, and every row is compared before the drop.

    Raises GateFailed where a row differs; both tables are then left as they are.
    """
    todo = undo_plan(phase)
    if not phase.execute or not todo.statements:
        return phase.carry_out(todo)
    rows: list[tuple[Any, ...]] = []
    if standing(phase.connection, phase.params).swapped:
        rows += [(row[0], row[1]) for row in _swap(phase).rows]
        phase.prove(lambda p: collect([rows_are_equal(p.connection, p.params)]))
    rows += [(s.purpose, duration(phase.do(s).seconds)) for s in _taking_away(phase.connection, phase.params)]
    return Table(("what", "took"), rows)


def verify_undone(phase: Phase) -> Gates:
    """The ordinary table is in use, and nothing of this operation is left."""
    found = standing(phase.connection, phase.params)
    return collect(
        [
            gate(
                "partitioning.is_taken_back",
                found == TwinState("r", False, False, False),
                _subject(phase.params),
                found=str(found),
                needed="the ordinary table, and nothing else",
                danger="every write would be queued for a table that is not read",
                do="run `runbook operate PARAMS partition_by_filter --undo --execute` again",
            )
        ]
    )


def retire_plan(connection: db.Connection, params: Params) -> db.Plan:
    """Capture, ordinary table and queue dropped; from here on there is no rollback."""
    if not standing(connection, params).swapped:
        return db.Plan((), connection)
    extra = partitioned_twin.move(connection, params).extra | {"whole": partitioned_twin.beside(params, WHOLE)}
    blocks = ("drop_triggers", "drop_whole", "drop_queue")
    return db.Plan(tuple(db.statement(SQL[b], params, extra) for b in blocks), connection)


@changes
def retire(phase: Phase) -> Table:
    """Drops the ordinary table, once nobody wants it back."""
    return phase.carry_out(retire_plan(phase.connection, phase.params))
