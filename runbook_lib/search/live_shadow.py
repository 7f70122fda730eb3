"""Shadow of live calls: a function beside the search function, which lets the other search answer a share as well.

The application calls it for a while instead of the search function: same arguments, same answers. A sampled call
takes the time of both searches; ``shadow.calls_per_minute`` bounds what that may cost. What the other search does
can neither fail the call nor change its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import sql

from runbook_lib.benchmark import agreement, relevance_measures
from runbook_lib.benchmark.comparison import FAST_ENOUGH_MS
from runbook_lib.core import db, free_names
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.names import identifier, names, shortened, spelled, verbatim
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_most, milliseconds
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, search_function
from runbook_lib.sql import load

SQL = load("live")

# Below this many sampled calls their p95 is the slowest of a handful.
FEWEST_CALLS = 30
# So many are read into memory at most.
MOST_CALLS = 100_000
ROUTES = ("legacy", "vector", "hybrid")


def function_name(params: Params) -> str:
    """The function that the application calls for the time of the shadow."""
    return shortened(params.function_name, "_shadow", unlike=params.function_name)


def log_name(params: Params) -> str:
    """The table of sampled calls, in the ledger's schema."""
    return f"{params.target.name}_shadow_log"


def _log(params: Params) -> sql.Composable:
    return identifier(params.ledger.schema_, log_name(params))


def _function(params: Params) -> sql.Composable:
    return identifier(params.target.schema_, function_name(params))


def _facts(phase: Phase, *, shadow: bool = False) -> db.Row:
    """Of the search function, or of its shadow, from the catalogue."""
    p = phase.params
    name = function_name(p) if shadow else p.function_name
    return db.one(phase.connection, SQL["function_facts"], p, schema=spelled(p, "schema"), function=name)


def _names(phase: Phase) -> dict[str, sql.Composable]:
    """What the blocks need beside the common names; arguments and settings come from the catalogue."""
    p = phase.params
    facts = _facts(phase)
    passed = [identifier(name) for name in facts["passed"]]
    filters = [
        sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(argument, verbatim(sql.Literal(column).as_string()))
        for column, argument in zip(p.target.filters, passed[3:], strict=True)
    ]
    return names(p) | {
        "log": _log(p),
        "log_index": identifier(f"{p.target.name}_shadow_log_at"),
        "shadow_function": _function(p),
        "arguments": verbatim(facts["arguments"]),
        "identity": verbatim(facts["identity"]),
        "result": verbatim(facts["result"]),
        "settings": sql.SQL(" ").join(_setting(s) for s in facts["settings"]),
        "passed": sql.SQL(", ").join(passed),
        "filters_given": sql.SQL(", ").join(filters),
        "new_route": sql.Literal(p.cut_over.route),
        "sample_percent": sql.Literal(p.shadow.sample_percent),
        "most_calls": sql.Literal(p.shadow.calls_per_minute),
    }


def _setting(setting: str) -> sql.Composable:
    """``SET name = value`` from pg_proc.proconfig, which holds a search_path as the list that it is."""
    name, _, value = setting.partition("=")
    spelt = value if name == "search_path" else sql.Literal(value).as_string()
    return verbatim(f"SET {name} = {spelt}")


def plan(phase: Phase) -> db.Plan:
    """The log, the function and its grants; nothing where ``shadow.sample_percent`` is 0."""
    if not phase.params.shadow.sample_percent or search_function.function_state(phase) is None:
        return db.Plan((), phase.connection)
    free_names.require_function(phase.connection, phase.params, function_name(phase.params))
    extra = _names(phase)
    statements = [db.statement(SQL[b], phase.params, extra) for b in ("create_log", "create_function")]
    grants = [
        db.statement(SQL["grant"], phase.params, extra | {"role": identifier(role)})
        for role in phase.params.search.grant_to
    ]
    return db.Plan((*statements, *grants), phase.connection)


@changes
def apply(phase: Phase) -> Table:
    """Makes the function and its log; made again, it takes over what 70_tune has set since, and keeps the log."""
    return phase.carry_out(plan(phase))


def _what_is_there(phase: Phase) -> db.Row:
    p = phase.params
    log = _log(p).as_string(phase.connection).replace("%%", "%")
    return db.one(
        phase.connection, SQL["what_is_there"], p, schema=spelled(p, "schema"), function=function_name(p), log=log
    )


def logged(phase: Phase, since: datetime | None = None) -> list[db.Row]:
    """The newest sampled calls, oldest first; none where there is no log."""
    if not _what_is_there(phase)["log"]:
        return []
    known = {"filters": list(phase.params.target.filters), "routes": list(ROUTES), "most": MOST_CALLS}
    query = SQL["logged"].compose({"log": _log(phase.params)})
    return phase.connection.execute(query, {"since": since, **known}).fetchall()


def summary(phase: Phase) -> Table:
    """What the sampled calls say, a row for each way round and set of filters; it goes into the ledger too."""
    rows = logged(phase)
    kinds = sorted({(row["live_route"], tuple(row["filters"])) for row in rows})
    found = [_figures(rows, live, filters) for live, filters in kinds]
    if found:
        phase.note("live", {"calls": len(rows), "ways": found})
    return Table.of(found, "live calls answered twice") if found else Table(("live calls",), [("none sampled yet",)])


def _figures(rows: list[db.Row], live: str, filters: tuple[str, ...]) -> dict[str, Any]:
    mine = [row for row in rows if (row["live_route"], tuple(row["filters"])) == (live, filters)]
    whole = [row for row in mine if row["problem"] is None]
    pairs = [(row["live_keys"], row["other_keys"]) for row in whole]
    depth = max((len(a) for a, _ in pairs), default=0)
    agreed = agreement.agreement(
        {str(i): a for i, (a, _) in enumerate(pairs)}, {str(i): b for i, (_, b) in enumerate(pairs)}, depth
    )
    return {
        "live": live,
        "other": mine[0]["other_route"],
        "filters": combined_filters.name(filters) or "none",
        "calls": len(mine),
        "problems": len(mine) - len(whole),
        "other_is_empty": sum(not b and bool(a) for a, b in pairs),
        "live_p95_ms": _p95(row["live_ms"] for row in whole),
        "other_p95_ms": _p95(row["other_ms"] for row in whole),
        **agreed,
    }


@dataclass(frozen=True)
class Seen:
    """Sampled live calls that a route answered: how many, empty where the other search was not, and p95 of both.

    problems: sampled calls in which the search that was not live failed.
    """

    calls: int = 0
    problems: int = 0
    empty: int = 0
    p95_ms: float | None = None
    other_p95_ms: float | None = None


def seen_since(phase: Phase, route: str, since: datetime) -> Seen | None:
    """What the live calls say of a route since a moment; None where no live call is sampled."""
    if not phase.params.shadow.sample_percent or not _what_is_there(phase)["log"]:
        return None
    rows = logged(phase, since)
    whole = [row for row in rows if row["problem"] is None]
    mine = [row for row in whole if row["live_route"] == route]
    return Seen(
        calls=len(mine),
        problems=len(rows) - len(whole),
        empty=sum(not row["live_keys"] and bool(row["other_keys"]) for row in mine),
        p95_ms=_p95(row["live_ms"] for row in mine),
        other_p95_ms=_p95(row["other_ms"] for row in mine),
    )


def _p95(milliseconds: Any) -> float | None:
    values = [ms / 1000 for ms in milliseconds]
    return round(relevance_measures.latency(values)["p95_ms"], 3) if values else None


def verify(phase: Phase) -> Gates:
    """No sampled call failed in the other search; and, from :data:`FEWEST_CALLS` calls on, the new route is as fast
    on live calls as legacy. Both searches answered the same calls, whichever of them was live.
    """
    rows = logged(phase)
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["problem"] is None:
            times.setdefault(row["live_route"], []).append(row["live_ms"])
            times.setdefault(row["other_route"], []).append(row["other_ms"])
    route = phase.params.cut_over.route
    new, old = times.get(route, []), times.get("legacy", [])
    slowdown = phase.params.cut_over.largest_slowdown
    fast = [_is_fast_enough(route, new, old, slowdown)] if min(len(new), len(old)) >= FEWEST_CALLS else []
    return collect([_nothing_failed(phase, rows, timed=bool(fast)), *fast])


def _nothing_failed(phase: Phase, rows: list[db.Row], *, timed: bool) -> Gate:
    problems = [row["problem"] for row in rows if row["problem"]]
    found = f"{len(problems)} of {number(len(rows))} sampled calls" if rows else "no live call sampled"
    found += f"; {problems[0]}" if problems else ""
    if rows and not timed:
        found += f"; too few to judge their times, which takes {FEWEST_CALLS} without a problem"
    return gate(
        "live.no_shadow_failed",
        not problems,
        function_name(phase.params),
        found=found,
        needed="0",
        danger="these calls would fail for users as soon as the reads move",
        do="mend what the error names, then DELETE the rows with a problem from the log and run 80_shadow again",
        figures={"calls": len(rows), "problems": len(problems)},
    )


def _is_fast_enough(route: str, new: list[float], old: list[float], slowdown: float) -> Gate:
    """new, old: milliseconds of each call. slowdown: the multiple of legacy's p95 that was accepted."""
    new_p95, old_p95 = (relevance_measures.latency([ms / 1000 for ms in times])["p95_ms"] for times in (new, old))
    limit = max(old_p95 * slowdown, FAST_ENOUGH_MS)
    shown, most = apart(new_p95, limit, milliseconds)
    return gate(
        "live.new_route_is_fast_enough",
        at_most(new_p95, limit),
        f"{route} on live calls",
        found=f"p95 {shown}, legacy {old_p95:.2f} ms, {len(new)} calls",
        needed=f"at most {most}",
        danger="users wait longer than today",
        do="look at the load of the server and at the setting chosen by 70_tune",
        figures={"p95_ms": round(new_p95, 3), "legacy_p95_ms": round(old_p95, 3)},
    )


def undo_plan(phase: Phase) -> db.Plan:
    """DROP of the function and of its log, each where it is there, whether the search function still is or not."""
    there = _what_is_there(phase)
    statements = []
    if there["function"]:
        own = {
            "shadow_function": _function(phase.params),
            "identity": verbatim(_facts(phase, shadow=True)["identity"]),
        }
        statements.append(db.statement(SQL["drop_function"], phase.params, own))
    if there["log"]:
        statements.append(db.statement(SQL["drop_log"], phase.params, {"log": _log(phase.params)}))
    return db.Plan(tuple(statements), phase.connection)


@changes
def undo(phase: Phase) -> Table:
    """Removes both. The application must have gone back to the search function first."""
    return phase.carry_out(undo_plan(phase))


def verify_undone(phase: Phase) -> Gates:
    """Neither of them is left."""
    there = _what_is_there(phase)
    left = [name for name, is_there in there.items() if is_there]
    gone = gate(
        "live.nothing_is_left",
        not left,
        function_name(phase.params),
        found=", ".join(left) or "neither function nor log",
        needed="neither function nor log",
        danger="the database is not as it was",
        do="run undo/search_function again",
    )
    return collect([gone])
