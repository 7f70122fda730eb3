"""Does the search still meet the accepted baseline? It only reads, so it can run every hour and before a release."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from typing import Any

from psycopg import sql

from runbook_lib.benchmark import (
    comparison,
    explain,
    filter_classes,
    index_recall,
    loop,
    plan_diagnosis,
    query_set,
    relevance_measures,
    replica,
)
from runbook_lib.benchmark.filter_classes import ClassRecall, FilterClass
from runbook_lib.benchmark.prepared import vector_indexes
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db, row_counts, thresholds
from runbook_lib.core.display import Table, number, size
from runbook_lib.core.gates import Gate, Gates, Verdict, collect, gate
from runbook_lib.core.ledger import SQL as LEDGER_SQL
from runbook_lib.core.ledger import Ledger, only_the_owner_wrote
from runbook_lib.core.names import names, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import STEPS
from runbook_lib.core.session import register_vector
from runbook_lib.core.thresholds import apart, at_least, at_most, change, plain, score
from runbook_lib.indexes import forecast
from runbook_lib.migrate import (
    application_settings,
    build_index,
    pgvector_releases,
    policies,
    privileges,
    row_security_recall,
)
from runbook_lib.operate import ivfflat_drift
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements, word_statistics
from runbook_lib.sql import load

SQL = load("watch")

NAME = "operate/monitor"
DAY_S = 86_400
# Below these, a ratio says more about small numbers than about the table.
FEWEST_ROWS_FOR_DEAD = 1000
SMALLEST_FORECAST_BYTES = 1024 * 1024
# A page holds a dozen rows or more: so many times the rows that are wanted are asked for.
ROWS_A_SAMPLE = 20
# Recall below its bound on so few rows may be bad luck: many more decide. Each is times watch.queries.
FEW_THEN_MANY = (1, 8)
# What these gates of 60_build_index say stays true; the other is about the build.
STANDING_INDEX_GATES = (
    "index.is_valid",
    "index.has_the_right_operator_class",
    "index.serves_every_search",
    "index.finds_known_rows",
)


def look(phase: Phase) -> Gates:
    """Every gate of the check that stays; what it saw goes into the ledger, for the next look to compare with."""
    seen = _seen(phase.connection, phase.params)
    if _standing(phase.ledger, phase.params) is None:
        phase.note("standing", {"settings": seen["settings"], "source": seen["source"]})
    gates = list(_gates(phase, seen))
    # Several gates may have one name: the one that did not pass is what the next look must know.
    by_name = sorted(gates, key=lambda g: g.verdict != Verdict.PASS)
    phase.note("watch", {**seen, "verdicts": {g.name: str(g.verdict) for g in by_name}})
    return collect(gates)


def check(params: Params) -> Gates:
    """The same gates for a program, written down nowhere; none where no index was proved in this database yet."""
    with db.connect(params, "runbook check") as connection:
        ledger = Ledger(connection, params, f"check-{uuid.uuid4().hex[:8]}", NAME)
        if ledger.phase_verdict(STEPS[NAME].needs) != Verdict.PASS:
            return Gates(())
        phase = Phase(NAME, ledger.run_id, False, params, connection, ledger)
        phase.order.fence(connection)
        return look(phase)


def _gates(phase: Phase, seen: dict[str, Any]) -> Iterator[Gate]:
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    yield only_the_owner_wrote(ledger.connection, params)
    yield privileges.check(connection, params)
    yield from policies.check(connection, params)
    yield _route_is_as_set(connection, ledger, params)
    yield from (g for g in build_index.verify(phase) if g.name in STANDING_INDEX_GATES)
    read_whole = False
    if vector_indexes(connection, params):
        planned = explain.gates(connection, ledger, params)
        read_whole = any(g.figures.get("cause") == plan_diagnosis.TOO_SMALL for g in planned)
        yield from planned
        yield _recall_holds(connection, ledger, params)
        yield from _recall_holds_by_filter(connection, ledger, params)
        yield from row_security_recall.gates(connection, params, params.lowest_recall)
        yield from ivfflat_drift.gates(connection, ledger, params)
    yield from _relevance_holds(connection, ledger, params)
    if params.search.has_tsvector and search_function.function_state(connection, params):
        yield word_statistics.are_current(connection, params)
    captured = _changes_are_captured(connection, params)
    yield from _rows_are_fresh(connection, params, captured)
    if captured:
        yield _queue_is_young(connection, params)
    yield _index_is_used(ledger, params, seen, read_whole=read_whole)
    yield _dead_rows_are_few(connection, ledger, params)
    yield _index_is_lean(connection, params, seen)
    yield _settings_hold(ledger, params, seen)
    yield _extension_is_sound(connection, params)
    yield from application_settings.check(connection, params)


def last_look(phase: Phase) -> Table:
    """What the look before this one saw."""
    last = phase.ledger.latest("watch") or {}
    shown = [(key, value) for key, value in last.items() if key in ("at", "scans", "bytes", "route", "calls")]
    verdicts = list(last.get("verdicts", {}).values())
    counts = [(verdict, verdicts.count(verdict)) for verdict in sorted(set(verdicts))]
    return Table(("last look", ""), [*shown, *counts] or [("none yet", "")])


def _seen(connection: db.Connection, params: Params) -> dict[str, Any]:
    """Counters and settings as they are before this look adds to them."""
    oids = [row["oid"] for row in vector_indexes(connection, params)]
    asked = {"oids": oids, "schema": params.target.schema_, "function": params.function_name}
    row = db.one(connection, SQL["scans"], params, **asked)
    if replica.is_given(params):
        # Each server counts its own reads.
        with replica.connect(connection, params, "scans") as reader:
            there = db.one(reader, SQL["scans"], params, **asked)
        known = [r["calls"] for r in (row, there) if r["calls"] is not None]
        row |= {"scans": row["scans"] + there["scans"], "calls": sum(known) if known else None}
    state = search_function.function_state(connection, params)
    return {
        **row,
        "route": search_function.current_route(connection, params)[0] if state else None,
        "settings": sorted(state["settings"] or []) if state else [],
        "source": state["source"] if state else None,
    }


def _table(params: Params) -> str:
    return f"{params.target.schema_}.{params.target.table}"


def _route_is_as_set(connection: db.Connection, ledger: Ledger, params: Params) -> Gate:
    """A route that somebody moved past the runbook shows here."""
    set_to = ledger.latest("route")
    expected = (set_to["route"], set_to["share_percent"]) if set_to else ("legacy", 0)
    found = (
        search_function.current_route(connection, params)
        if search_function.function_state(connection, params)
        else None
    )
    return gate(
        "watch.route_is_as_set",
        found == expected,
        params.target.name,
        found=f"{found[0]} at {found[1]} %" if found else "no search function",
        needed=f"{expected[0]} at {expected[1]} %, as the ledger has it",
        danger="reads go to a route that was never judged",
        do="run 90_cut_over again, or undo/reads; both write down what they do",
    )


def _recall_holds(connection: db.Connection, ledger: Ledger, params: Params) -> Gate:
    """Recall on other queries at every look, and on rows that are in the table now."""
    queries = _some_queries(params, random.Random(ledger.run_id))  # noqa: S311 - a sample, not a secret
    for times in FEW_THEN_MANY:
        rows = query_set.of_rows(_some_rows(connection, params, times), counted=True)
        found = index_recall.as_the_application(connection, params, [*queries, *rows])
        if at_least(found, params.lowest_recall):
            break
    shown, least = apart(found, params.lowest_recall, score)
    return gate(
        "watch.recall_holds",
        at_least(found, params.lowest_recall),
        _table(params),
        found=f"recall@{params.queries.k} {shown} on {len(queries)} queries and {len(rows)} rows",
        needed=f"{least}, the target less watch.largest_recall_loss",
        danger="the index hides answers that exact search finds",
        do="run 70_tune again; if no setting reaches it, run operate/rebuild_index: many rows with nearly the same"
        " vector, written since the build, hide others at any setting",
        figures={"recall": found, "queries": len(queries), "rows": len(rows)},
    )


def _recall_holds_by_filter(connection: db.Connection, ledger: Ledger, params: Params) -> Iterator[Gate]:
    """The same for each class of filters that 70_tune chose a way for, values drawn again, by the function itself."""
    if not params.target.filters or search_function.function_state(connection, params) is None:
        return
    chosen = random.Random(f"{ledger.run_id} filters")  # noqa: S311 - a sample, not a secret
    below, queries = filter_classes.of_strategies(connection, params, chosen), _some_queries(params, chosen)
    found: dict[FilterClass, ClassRecall] = {}
    for times in FEW_THEN_MANY:
        if below:
            asked = [*queries, *query_set.of_rows(_some_rows(connection, params, times))]
            found |= {now.of: now for now in filter_classes.recall_now(connection, params, below, asked)}
            below = [of for of, now in found.items() if not at_least(now.recall, params.lowest_recall)]
    for now in found.values():
        shown, least = apart(now.recall, params.lowest_recall, score)
        yield gate(
            "watch.recall_holds_by_filter",
            at_least(now.recall, params.lowest_recall),
            f"{now.of} ({', '.join(now.of.values)})",
            found=f"recall@{params.queries.k} {shown} on {now.questions} questions, {now.short} short of rows",
            needed=f"{least}, the target less watch.largest_recall_loss",
            danger="searches with this filter hide answers that exact search finds",
            do="run 70_tune again, which measures this filter as the table is now",
            figures={"recall": now.recall, "questions": now.questions, "short": now.short},
        )


def _some_queries(params: Params, chosen: random.Random) -> list[Query]:
    queries = query_set.read_queries(params)
    return query_set.with_vectors(params, chosen.sample(queries, min(params.watch.queries, len(queries))))


def _some_rows(connection: db.Connection, params: Params, times: int) -> list[db.Row]:
    wanted = times * params.watch.queries
    with replica.connect(connection, params, "rows") as reader:
        register_vector(reader)
        return reader.execute(
            SQL["some_vectors"].compose(names(params) | {"looked_at": _sampled(params)}),
            {"n": wanted, "percent": _percent(connection, params, wanted * ROWS_A_SAMPLE)},
        ).fetchall()


def _sampled(params: Params) -> sql.Composed:
    return SQL["sampled"].compose(names(params))


def _percent(connection: db.Connection, params: Params, wanted: int) -> float:
    """The share of the pages that holds about so many rows."""
    return min(100.0, 100.0 * wanted / max(row_counts.of(connection, params).n, 1))


def _relevance_holds(connection: db.Connection, ledger: Ledger, params: Params) -> Iterator[Gate]:
    """Relevance of the route now against what 80_shadow recorded, on the same queries; nothing without judgements."""
    route = params.cut_over.route
    recorded = (ledger.latest("shadow") or {}).get("per_query", {}).get(route, {})
    marks = comparison.judgements(connection, ledger, params)
    asked = query_set.as_asked(query_set.read_queries(params))
    known = [q for q in asked if q.query_id in recorded and q.query_id in marks]
    queries = query_set.sample(known, params.watch.judged)
    if not queries:
        return
    asked = query_set.with_vectors(params, queries)
    statement = comparison.statement_of(connection, params, route)
    with explain.as_the_application(connection, params) as reader, reader.transaction():
        statements.force_route(reader, params, route)
        got = loop.ask(reader, params, statement, asked, comparison.JUDGED_DEPTH)
    now = relevance_measures.relevance(got.keys, {q.query_id: marks[q.query_id] for q in queries}).per_query
    pair = relevance_measures.paired({q.query_id: recorded[q.query_id] for q in queries}, now)
    shown, least = apart(pair.difference, -params.watch.largest_relevance_loss, change)
    yield gate(
        "watch.relevance_holds",
        at_least(pair.difference, -params.watch.largest_relevance_loss),
        route,
        found=f"nDCG@10 {shown} since 80_shadow ({pair.low:+.3f} to {pair.high:+.3f},"
        f" p = {pair.p_value:.2g}) on {pair.queries} judged queries",
        needed=f"at least {least}",
        danger="users find less than on the day of the cut-over",
        do="look for missing and stale rows above; if there are none, judge what was added since, and run 80_shadow",
        figures=vars(pair),
    )


def _changes_are_captured(connection: db.Connection, params: Params) -> bool:
    """False once operate/retire_legacy has removed the capture, for texts that never change any more."""
    return bool(db.one(connection, SQL["captured"], params, queue=spelled(params, "queue"))["there"])


def _rows_are_fresh(connection: db.Connection, params: Params, captured: bool) -> Iterator[Gate]:
    """Counted over the texts as they are now; on a large table over a sample of its pages, and then it says so."""
    there = row_counts.of(connection, params).n
    whole = there <= params.watch.count_up_to_rows
    looked_at = sql.SQL("true") if whole else _sampled(params)
    found = connection.execute(
        SQL["freshness"].compose(
            names(params)
            | {"looked_at": looked_at}
            | ({} if captured else {"queue": SQL["no_queue"].compose(names(params))})
        ),
        {"percent": _percent(connection, params, params.watch.count_up_to_rows)},
    ).fetchone()
    assert found is not None
    sample = "" if whole else f" in a sample of the table's about {number(there)} rows"
    missing = f"of {number(found['with_text'])} rows with text{sample} lack a vector"
    stale = f"of {number(found['with_vector'])} rows with a vector{sample} have that of an older text"
    for kind, what, danger in (
        ("missing", missing, "the new search never finds these rows"),
        ("stale", stale, "the new search ranks these rows by words they no longer hold"),
    ):
        yield gate(
            f"watch.nothing_is_{kind}",
            found[kind] == 0,
            _table(params),
            found=f"{number(found[kind])} {what} and are not queued",
            needed="0",
            danger=danger,
            do="look whether the capture triggers are enabled, then run 40_load_embeddings and 50_backfill",
            figures={kind: found[kind], "looked_at": found["looked_at"], "whole_table": whole},
        )


def _queue_is_young(connection: db.Connection, params: Params) -> Gate:
    found = db.one(connection, SQL["queue"], params)
    limit = params.watch.oldest_queued_s
    oldest, longest = apart(found["oldest_s"], limit, thresholds.duration)
    return gate(
        "watch.queue_is_young",
        found["oldest_s"] <= limit,
        spelled(params, "queue"),
        found=f"{number(found['changes'])} changes wait" + (f", the oldest for {oldest}" if found["changes"] else ""),
        needed=f"none for longer than {longest}",
        danger="changed rows are found by their old words, new ones not at all",
        do="run operate/refresh, and see that it is scheduled",
        figures=found,
    )


def _counted_since(now: int, then: int) -> int:
    """What a counter grew by; all of it where it is smaller, since an index built again counts from 0."""
    return now - then if now >= then else now


def _index_is_used(ledger: Ledger, params: Params, seen: dict[str, Any], *, read_whole: bool = False) -> Gate:
    """Fails where calls were made and no scan was, or where a day has gone by without any.

    read_whole: the table is so small that PostgreSQL reads it whole, and rightly.
    """
    last = ledger.latest("watch")
    scans = _counted_since(seen["scans"], last["scans"] if last else 0)
    known = last and seen["calls"] is not None and last["calls"] is not None
    calls = _counted_since(seen["calls"], last["calls"]) if last and known else None
    idle = last is not None and seen["at_s"] - last["at_s"] > DAY_S
    since = f" since {last['at'][:16]}" if last else " so far; this is the first look"
    return gate(
        "watch.index_is_used",
        scans > 0 or read_whole or seen["route"] in (None, "legacy") or not (idle or calls),
        params.function_name,
        found=f"{number(scans)} index scans{since}"
        + (f", {number(calls)} calls" if calls is not None else "")
        + ("; a table so small is read whole" if read_whole else ""),
        needed="scans wherever there are calls, and some every day",
        danger="the reads do not go where the route says: every write pays for an index that no search uses",
        do="look at explain's gates above, and at whether the application calls the function",
        figures={"scans": scans, "calls": calls},
    )


def _dead_rows_are_few(connection: db.Connection, ledger: Ledger, params: Params) -> Gate:
    found = db.one(connection, SQL["size"], params, table=spelled(params, "vectors"))
    before = (ledger.latest("index") or {}).get("dead_before") or {}
    # Until the next vacuum, rows that died before the index was built are counted, but they are not in it.
    outside = before["dead"] if before.get("vacuums") == found["vacuums"] else 0
    dead = max(0, found["dead"] - outside)
    together = found["live"] + dead
    percent = 100 * dead / together if together else 0.0
    limit = params.watch.dead_rows_percent
    shown, most = apart(percent, limit, plain)
    return gate(
        "watch.dead_rows_are_few",
        at_most(percent, limit) or together < FEWEST_ROWS_FOR_DEAD,
        spelled(params, "vectors"),
        found=f"{number(dead)} dead rows, {shown} % of all"
        + (f", without {number(outside)} that died before the index was built" if outside else ""),
        needed=f"at most {most} %",
        danger="an index scan spends its candidates on dead rows, and returns fewer than were asked for",
        do=f"VACUUM (ANALYZE) {spelled(params, 'vectors')}, and find out why autovacuum did not do it",
        figures={"dead": dead, "live": found["live"]},
    )


def _index_is_lean(connection: db.Connection, params: Params, seen: dict[str, Any]) -> Gate:
    there = row_counts.of(connection, params, "vectors").n
    expected = max(forecast.forecast(there, params).index_bytes, SMALLEST_FORECAST_BYTES)
    limit = params.watch.index_growth
    times, most = apart(seen["bytes"] / expected, limit, plain)
    return gate(
        "watch.index_is_lean",
        at_most(seen["bytes"] / expected, limit),
        spelled(params, "vectors"),
        found=f"{size(seen['bytes'])}, {times} × the forecast of {number(there)} rows",
        needed=f"at most {most} ×",
        danger="searches read pages of rows that are gone, and the index no longer fits where it did",
        do="run operate/rebuild_index, or undo/index and 60_build_index",
        figures={"bytes": seen["bytes"], "forecast_bytes": expected},
    )


def _settings_hold(ledger: Ledger, params: Params, seen: dict[str, Any]) -> Gate:
    """The function is as it was when the reads were moved, or at the first look after it was tuned again."""
    before = _standing(ledger, params)
    was = sorted(before["settings"] or []) if before else seen["settings"]
    changed = [s for s in seen["settings"] if s not in was] + [f"no {s}" for s in was if s not in seen["settings"]]
    same_source = before is None or before["source"] == seen["source"]
    return gate(
        "watch.settings_hold",
        not changed and same_source,
        params.function_name,
        found=("; ".join(changed) if changed else "the settings that were chosen")
        + ("" if same_source else "; its source was changed"),
        needed="; ".join(s for s in was if not s.startswith("search_path")) or "no settings",
        danger="the application searches with another setting than the one that was measured",
        do="run 70_tune again, which measures and sets it; find out who changed it in pg_stat_statements or the log",
        figures={"changed": len(changed)},
    )


def _standing(ledger: Ledger, params: Params) -> dict[str, Any] | None:
    """The function's settings and source as they are meant to be; None where it was tuned after they were noted."""
    if not ledger.exists():
        return None
    standing, tuning = (
        next(iter(db.rows(ledger.connection, LEDGER_SQL["latest"], params, kind=kind, phases=None)), None)
        for kind in ("standing", "tuning")
    )
    if standing is None or (tuning is not None and tuning["seq"] > standing["seq"]):
        return None
    return dict(standing["body"])


def _extension_is_sound(connection: db.Connection, params: Params) -> Gate:
    """Judged by what is in use here: what a later release fixes of the other index method is no fault of this one."""
    rows = db.rows(connection, SQL["extension"], params)
    installed = rows[0]["version"] if rows else None
    refused, told = (
        pgvector_releases.faults_in_use(installed, params.index.method, is_32_bit=rows[0]["is_32_bit"])
        if installed
        else ([], [])
    )
    return gate(
        "watch.extension_has_no_known_fault",
        installed is not None and not refused,
        "vector",
        found=(installed or "not installed")
        + (f"; update it at a quiet time, later releases fix {'; '.join(told)}" if told else ""),
        needed="a release without a security fault that matters here and"
        f" {pgvector_releases.RELEASES[-1].version} fixes",
        danger="; ".join(refused) or "there is nothing to search with",
        do="install the server's package of the newer release, then ALTER EXTENSION vector UPDATE",
        figures={"faults": len(refused), "mended_later": len(told)},
    )
