"""What an UPDATE of the new columns does to this table besides: tried on real rows, in a transaction rolled back.

The catalogue tells which triggers there are, not what they do to which row. So the backfill's own UPDATE is run on
rows from all over the table; every other column is compared before and after, and the server's counters say what
else was written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.backfill import hooks as hooks_module
from runbook_lib.backfill.hooks import Hook
from runbook_lib.core import db, query_plan, row_counts
from runbook_lib.core.display import number, some
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import changing, identifier, names, spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("trials")
BACKFILL = load("backfill")

# Few rows first: where they show something, no more are needed.
FIRST_ROWS = 5
MOST_ROWS = 300
# Each sample has so many times the rows of the one before it.
GROWTH = 4
# How many of them are the oldest and the newest, half of either.
ROWS_AT_THE_ENDS = 4
# Above so many rows of the table the sample is drawn from some of its pages.
SAMPLE_PAGES_FROM_ROWS = 5000
# How long the rows, or the table where its columns are part of the trial, may be held for the larger sample.
BUDGET_S = 0.06
# Of a trigger that acts on one row in ten, so many rows miss it once in six hundred tries.
LEAST_ROWS = 60
# So many triggers and rules are tried one by one.
MOST_HOOKS = 10
SHOWN = 5
KEEPS = "keeps rows from taking the vector"
# Of each row, by key, the hashes of its columns and whether it has a vector.
Looked = dict[Any, tuple[list[int | None], bool]]
SIDE_TABLE = "set vector.layout: side_table, which updates no row of this table"


@dataclass
class Effects:
    """What one UPDATE did. hot: rows whose new version found room on their page, and so touched no index; columns:
    rows changed, by column; written: what else, in words; opened: sequences and foreign tables; fired: names of
    triggers; error: the server's own words, and the row that they were about."""

    rows: int = 0
    hot: int = 0
    kept: list[Any] = field(default_factory=list)
    columns: Counter[str] = field(default_factory=Counter)
    written: Counter[tuple[str, str]] = field(default_factory=Counter)
    opened: set[str] = field(default_factory=set)
    fired: set[str] = field(default_factory=set)
    error: str = ""

    @property
    def touches(self) -> bool:
        return bool(self.columns or self.written)

    def add(self, other: Effects) -> None:
        """Another sample's effects on top of these."""
        self.rows += other.rows
        self.hot += other.hot
        self.kept += other.kept
        self.columns += other.columns
        self.written += other.written
        self.opened |= other.opened
        self.fired |= other.fired
        self.error = self.error or other.error

    def __str__(self) -> str:
        changed = [f"{column} in {number(n)}" for column, n in sorted(self.columns.items())]
        parts = [f"changed {', '.join(changed)} of {number(self.rows)} rows"] if changed else []
        return "; ".join(
            parts
            + [f"{what[0]} {number(n)} row{'s' * (n != 1)} {what[1]}" for what, n in sorted(self.written.items())]
        )


@dataclass(frozen=True)
class Trial:
    """What was found. alone: effects of each trigger or rule when no other was enabled; one by which nothing was done
    is left out. rest: whether something was done even without those that the parameters agree to."""

    effects: Effects
    hooks: Sequence[Hook]
    alone: Sequence[tuple[Hook, str]]
    rest: Effects


@dataclass(frozen=True)
class Prepared:
    """What is read before anything is locked: keys of the rows to try, triggers and rules, columns to compare."""

    keys: Sequence[Any]
    hooks: Sequence[Hook]
    columns: Sequence[str]


@dataclass(frozen=True)
class Bench:
    """What one comparison works with. columns: those that are compared; counted: the rows written so far, by
    relation."""

    connection: db.Connection
    params: Params
    columns: Sequence[str]
    counted: dict[int, db.Row] = field(default_factory=dict)

    def rows(self, block: str, **values: Any) -> list[db.Row]:
        query = SQL[block].compose(names(self.params))
        return self.connection.execute(query, values, prepare=False).fetchall()

    def written(self) -> list[db.Row]:
        """The server's counts of rows written, by relation."""
        return self.rows("written", ledger=spelled(self.params, "ledger"), table=spelled(self.params, "table"))


def bench(connection: db.Connection, params: Params, added: Sequence[str]) -> Bench:
    """For a comparison of every column but the runbook's own."""
    found = db.rows(connection, SQL["columns"], params, table=spelled(params, "table"))
    return Bench(connection, params, [r["name"] for r in found if r["name"] not in added])


def written_elsewhere(bench: Bench) -> set[str]:
    """Other relations that this transaction has written, the runbook's own left out."""
    return {r["relation"] for r in bench.written() if not r["own"] and r["inserted"] + r["updated"] + r["deleted"]}


def prepare(connection: db.Connection, params: Params, added: Sequence[str]) -> Prepared:
    """Reads what :func:`attempt` needs.

    added: names of the runbook's columns; where they are there already, only rows that want a vector are taken.
    """
    table = spelled(params, "table")
    every = [r["name"] for r in db.rows(connection, SQL["columns"], params, table=table)]
    keys = _sample(connection, params, columns_are_there=set(added) <= set(every))
    return Prepared(keys, hooks_module.look(connection, params), [c for c in every if c not in added])


def _sample(connection: db.Connection, params: Params, *, columns_are_there: bool) -> list[Any]:
    """Keys to try, the oldest and the newest first."""
    believed = row_counts.estimated(connection, params, spelled(params, "table"))
    percent = min(100.0, 100.0 * 20 * MOST_ROWS / max(believed, 1))
    pages = believed > SAMPLE_PAGES_FROM_ROWS
    wanting = sql.SQL("{has_text}" + (" AND t.{embedding_hash} IS NULL" if columns_are_there else ""))
    extra = {
        "wanting": wanting.format(**names(params)),
        "tablesample": sql.SQL("TABLESAMPLE SYSTEM ({})").format(sql.Literal(percent)) if pages else sql.SQL(""),
    }
    query = SQL["sample"].compose(names(params) | extra)
    # Sorted by the key, the last rows without a vector could be a whole table away.
    ends = 0 if columns_are_there else ROWS_AT_THE_ENDS // 2
    values = {"ends": ends, "many": 20 * MOST_ROWS, "rows": MOST_ROWS - ROWS_AT_THE_ENDS}
    return [r["key"] for r in connection.execute(query, values, prepare=False).fetchall()]


def attempt(connection: db.Connection, params: Params, prepared: Prepared) -> Trial:
    """Runs the UPDATE on these rows, in a transaction that is rolled back; the columns are there.

    Raises psycopg's errors for what is no fault of the UPDATE, such as a lock.
    """
    hooks, keys = prepared.hooks, prepared.keys
    on = Bench(connection, params, prepared.columns)
    with db.rolled_back(connection):
        hooks_module.make_harmless(connection, params, hooks)
        # For a second the server's counts hold what this session has rolled back before, too.
        on.counted.update({row["oid"]: row for row in on.written()})
        there = {r["key"] for r in on.rows("lock_rows", keys=list(keys))}
        held = [k for k in keys if k in there]
        if keys and not held:
            raise psycopg.errors.LockNotAvailable("every row of the sample is held by another session, or gone")
        effects, tried = _more_and_more(on, held, hooks)
        alone = _one_by_one(on, tried, hooks, effects)
        agreed = [h for h, _ in alone if h.accepted(params)]
        rest = _without(on, tried, agreed) if effects.touches and len(agreed) == len(alone) else None
    return Trial(effects, hooks, alone, rest or Effects())


def _more_and_more(bench: Bench, keys: Sequence[Any], hooks: Sequence[Hook]) -> tuple[Effects, Sequence[Any]]:
    """Effects on a few rows, then on more, as many as the time allows; and rows that showed them."""
    effects, telling, size, place = Effects(), keys[:FIRST_ROWS], FIRST_ROWS, 0
    may_tell = bool(hooks) or _tells_on_its_own(bench)
    until = time.perf_counter() + BUDGET_S
    while size and (place < len(keys) or not place):
        size_before = size
        started, touched = time.perf_counter(), effects.touches
        part = measure(bench, keys[place : place + size])
        if not hooks:
            # Nothing but a trigger or a rule can update a row again; the server's counts may hold older trials.
            part.written.pop(("updated", "once more"), None)
        effects.add(part)
        place += size
        if part.error or part.kept:
            return effects, part.kept[:FIRST_ROWS]
        if part.touches and not touched:
            telling = keys[place - size : place]
        if place >= LEAST_ROWS and not may_tell:
            break
        now = time.perf_counter()
        size = min(size * GROWTH, int((until - now) / max((now - started) / size, 1e-6)))
        # A trigger may act on one row in ten: so many are tried however slow a busy server is.
        size = max(size, min(LEAST_ROWS - place, size_before * GROWTH) if may_tell else 0, 0)
    return effects, telling


def _tells_on_its_own(bench: Bench) -> bool:
    return bool(bench.rows("tells_on_its_own", table=spelled(bench.params, "table"))[0]["it_may"])


def measure(bench: Bench, keys: Sequence[Any]) -> Effects:
    """What the UPDATE of these rows does, in a savepoint that is rolled back; an error is traced to one row."""
    effects = _run(bench, keys)
    if not effects.error or len(keys) <= 1:
        return effects
    suspects = list(keys)
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        suspects = half if _run(bench, half).error else suspects[len(half) :]
    if (alone := _run(bench, suspects)).error:
        effects.error = f"{alone.error} (for instance {bench.params.target.key_shown} {suspects[0]})"
    return effects


def _run(bench: Bench, keys: Sequence[Any]) -> Effects:
    effects = Effects(rows=len(keys))
    try:
        with bench.connection.transaction(force_rollback=True):
            before, opened = look_at(bench, keys), _opened(bench)
            bench.connection.execute("SET CONSTRAINTS ALL IMMEDIATE", prepare=False)
            _update(bench, keys, effects)
            now = look_at(bench, keys)
            effects.kept = [key for key in before if key in now and not now[key][1]]
            count_written(bench, effects, expected=len(before) - len(effects.kept))
            effects.opened = _opened(bench) - opened
    except db.NOT_NOW:
        raise
    except psycopg.Error as error:
        db.raise_if_lost(bench.connection, error)
        effects.error = said(error)
        return effects
    effects.columns = changed_columns(bench, before, now)
    return effects


def changed_columns(bench: Bench, before: Looked, now: Looked) -> Counter[str]:
    """How many rows differ in each column between two looks; a row that is gone differs in its key."""
    changed: Counter[str] = Counter()
    for key, (hashes, _) in before.items():
        if key not in now:
            changed[bench.params.target.key_shown] += 1
            continue
        for column, a, b in zip(bench.columns, hashes, now[key][0], strict=True):
            changed[column] += a != b
    return +changed


def said(error: psycopg.Error) -> str:
    """The server's own words, without what it adds about the row, which may be somebody's text."""
    return " ".join((error.diag.message_primary or str(error)).split())


def _update(bench: Bench, keys: Sequence[Any], effects: Effects) -> None:
    """The backfill's own statement. EXPLAIN runs it, and tells which triggers it called."""
    n = names(bench.params) | changing(bench.params)
    staged = SQL["staged"].compose(n | {"dimension": sql.Literal(bench.params.vector.dimension)})
    update = BACKFILL["update"].compose(n | {"part": n["table"], "staging": staged})
    plan = query_plan.explain(bench.connection, update, {"keys": list(keys)}, query_plan.CARRIED_OUT)
    effects.fired |= plan.triggers


def look_at(bench: Bench, keys: Sequence[Any]) -> Looked:
    """Of each row the hashes of its columns, and whether it has a vector."""
    each = sql.SQL(", ").join(SQL["column_hash"].compose({"column": identifier(c)}) for c in bench.columns)
    hashes = sql.SQL("ARRAY[{}]::bigint[]").format(each)
    query = SQL["look"].compose(names(bench.params) | {"hashes": hashes})
    found = bench.connection.execute(query, {"keys": list(keys)}, prepare=False).fetchall()
    return {r["key"]: (r["hashes"], r["taken"]) for r in found}


def _opened(bench: Bench) -> set[str]:
    kinds = {"S": "sequence", "f": "foreign table"}
    found = bench.rows("opened", ledger=spelled(bench.params, "ledger"))
    return {f"{kinds[r['kind']]} {r['relation']}" for r in found}


def count_written(bench: Bench, effects: Effects, expected: int) -> None:
    """Rows written, those left out that the UPDATE was asked for. The server's counts outlive a savepoint."""
    again = 0
    for row in bench.written():
        before = bench.counted.get(row["oid"], {})
        bench.counted[row["oid"]] = row
        change = {verb: row[verb] - before.get(verb, 0) for verb in ("inserted", "updated", "deleted", "hot")}
        hot = change.pop("hot")
        if row["own"]:
            again += change.pop("updated")
            effects.hot += hot
        for verb, n in change.items():
            if n:
                effects.written[verb, f"in {row['relation']}"] += n
    if again > expected:
        effects.written["updated", "once more"] += again - expected


def _without(bench: Bench, keys: Sequence[Any], hooks: Sequence[Hook]) -> Effects | None:
    """The same with these triggers and rules left out; None where the server does not let them be left out."""
    try:
        with bench.connection.transaction(force_rollback=True):
            for hook in hooks:
                hooks_module.leave_out(bench.connection, bench.params, hook)
            return _run(bench, keys)
    except db.NOT_NOW:
        raise
    except psycopg.Error as error:
        db.raise_if_lost(bench.connection, error)
        return None


def _one_by_one(bench: Bench, keys: Sequence[Any], hooks: Sequence[Hook], effects: Effects) -> list[tuple[Hook, str]]:
    """Who did it: each trigger that fired, and each rule, tried with the others left out."""
    suspects = [h for h in hooks if h.kind == "rule" or h.name in effects.fired]
    found: dict[Hook, str] = {}
    for hook in suspects[:MOST_HOOKS] if effects.touches or effects.kept else ():
        own = _without(bench, keys, [other for other in hooks if other != hook])
        # What cannot be told apart is laid at everybody's door.
        words = _in_words(effects if own is None else own)
        if words:
            found[hook] = words
    for hook in suspects:
        how = hook.outside or ("sends NOTIFY, by its source" if hook.notifies else "")
        if how:
            found.setdefault(hook, how)
    return list(found.items())


def _in_words(effects: Effects) -> str:
    words = [str(effects)] if effects.touches else []
    return "; ".join(words + ([KEEPS] if effects.kept else []))


def gates(params: Params, trial: Trial) -> Iterator[Gate]:
    """The gates of a trial."""
    yield _takes_every_row(params, trial)
    if not trial.effects.error and (trial.effects.touches or not trial.effects.kept):
        yield _touches_nothing_else(params, trial)


def _takes_every_row(params: Params, trial: Trial) -> Gate:
    effects = trial.effects
    return gate(
        "trial.update_takes_every_row",
        not effects.error and not effects.kept,
        spelled(params, "table"),
        found=_taken(params, trial),
        needed="the UPDATE of the backfill gives each row its vector",
        danger="the backfill would stop at such a row, or never give it its vector",
        do=_instead(params, effects.error),
        figures={"rows": effects.rows, "kept": len(effects.kept), "hot": effects.hot},
    )


def found_room(effects: Effects) -> str:
    """How many of the rows tried stayed on their page. That is how the pages are before the backfill: going page by
    page, each row that leaves makes room for the next, which a transaction that is rolled back cannot show."""
    return f"{number(effects.hot)} of them without leaving their page (HOT), as the pages are now"


def _taken(params: Params, trial: Trial) -> str:
    effects = trial.effects
    if effects.error:
        return f"PostgreSQL says: {effects.error}"
    if not effects.rows:
        return "no row to try it on"
    if not effects.kept:
        return f"{number(effects.rows)} rows tried, each took it, {found_room(effects)}; rolled back"
    by = " and ".join(str(h) for h, what in trial.alone if KEEPS in what)
    kept = some(effects.kept, SHOWN)
    found = (
        f"{len(effects.kept)} of {effects.rows} rows tried did not take the vector: {params.target.key_shown} {kept}"
    )
    return found + (f"; {by} keeps them" if by else "")


def _instead(params: Params, error: str) -> str:
    if "replica identity" in error:
        table, key = spelled(params, "table"), params.target.key_shown
        return f"ALTER TABLE {table} REPLICA IDENTITY USING INDEX <the unique index on {key}>; or {SIDE_TABLE}"
    return f"{SIDE_TABLE}; or settle with the owner of the trigger, rule or constraint that it takes such an UPDATE"


def _touches_nothing_else(params: Params, trial: Trial) -> Gate:
    effects, subject = trial.effects, spelled(params, "table")
    doing = [(h, what) for h, what in trial.alone if what != KEEPS]
    refused = [h for h, _ in doing if not h.accepted(params)]
    agreed = [h for h, _ in doing if h.accepted(params)]
    unexplained = trial.rest if trial.rest.touches else effects if effects.touches and not doing else None
    whom = [f"{h} {what}" + (" (agreed to)" if h in agreed else "") for h, what in doing]
    whom += [f"the UPDATE itself {unexplained}"] if unexplained else []
    if effects.opened and (refused or agreed or unexplained):
        whom.append(f"{', '.join(sorted(effects.opened))}: opened for writing")
    quiet = sorted({h.name for h in trial.hooks} & effects.fired - {h.name for h, _ in doing})
    found = f"{number(effects.rows)} rows tried, rolled back: " + (
        "; ".join(whom) or "no other column changed, nothing else was written"
    )
    found += f"; fired without such an effect: {', '.join(quiet)}" if quiet else ""
    return gate(
        "trial.update_touches_nothing_else",
        not refused and not unexplained,
        subject,
        found=found,
        needed="no other column changed and nothing else written, or agreed to by name",
        danger="the backfill would do this for every row that has text",
        do=f"{SIDE_TABLE}; or agree to it: {_consent(refused)}" if refused else f"{SIDE_TABLE}",
        figures={
            "rows": effects.rows,
            "columns": dict(effects.columns),
            "written": {" ".join(what): n for what, n in effects.written.items()},
            "agreed_to": [str(h) for h in agreed],
        },
    )


def _consent(refused: Sequence[Hook]) -> str:
    lists = {kind: [h.name for h in refused if h.kind == kind] for kind in ("trigger", "rule")}
    return "; ".join(f"accept.{kind}s: [{', '.join(which)}]" for kind, which in lists.items() if which)
