"""What live calls say that both searches answered: how fast, how alike, and whether the other search failed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from runbook_lib.benchmark import comparison, relevance_measures
from runbook_lib.core import db
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, live_shadow

# Below this many sampled calls their p95 is the slowest of a handful.
FEWEST_CALLS = 30


def summary(phase: Phase) -> Table:
    """What the sampled calls say, a row for each way round and set of filters; it goes into the ledger too."""
    rows = live_shadow.logged(phase.connection, phase.params)
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
    agreed = relevance_measures.agreement(
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
class LiveCalls:
    """Sampled live calls that a route answered: how many, empty where the other search was not, and p95 of both.

    problems: sampled calls in which the search that was not live failed.
    """

    calls: int = 0
    problems: int = 0
    empty: int = 0
    p95_ms: float | None = None
    other_p95_ms: float | None = None


def seen_since(connection: db.Connection, params: Params, route: str, since: datetime) -> LiveCalls | None:
    """What the live calls say of a route since a moment; None where no live call is sampled."""
    if not params.shadow.sample_percent or not live_shadow.has_log(connection, params):
        return None
    rows = live_shadow.logged(connection, params, since)
    whole = [row for row in rows if row["problem"] is None]
    mine = [row for row in whole if row["live_route"] == route]
    return LiveCalls(
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
    """No sampled call failed in the other search; and, once there are enough, the new route is as fast on live calls
    as legacy.

    Enough are FEWEST_CALLS. Both searches answered the same calls, whichever of them was live.
    """
    rows = live_shadow.logged(phase.connection, phase.params)
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["problem"] is None:
            times.setdefault(row["live_route"], []).append(row["live_ms"])
            times.setdefault(row["other_route"], []).append(row["other_ms"])
    route = phase.params.cut_over.route
    new, old = times.get(route, []), times.get("legacy", [])
    slowdown = phase.params.cut_over.largest_slowdown
    fast = [_is_fast_enough(route, new, old, slowdown)] if min(len(new), len(old)) >= FEWEST_CALLS else []
    return collect([_nothing_failed(phase.params, rows, timed=bool(fast)), *fast])


def _nothing_failed(params: Params, rows: list[db.Row], *, timed: bool) -> Gate:
    problems = [row["problem"] for row in rows if row["problem"]]
    found = f"{len(problems)} of {number(len(rows))} sampled calls" if rows else "no live call sampled"
    found += f"; {problems[0]}" if problems else ""
    if rows and not timed:
        found += f"; too few to judge their times, which takes {FEWEST_CALLS} without a problem"
    return gate(
        "live.no_shadow_failed",
        not problems,
        live_shadow.function_name(params),
        found=found,
        needed="0",
        danger="these calls would fail for users as soon as the reads move",
        do="fix what the error names, then DELETE the rows with a problem from the log and run 80_shadow again",
        figures={"calls": len(rows), "problems": len(problems)},
    )


def _is_fast_enough(route: str, new: list[float], old: list[float], slowdown: float) -> Gate:
    """new, old: milliseconds of each call. slowdown: the multiple of legacy's p95 that was accepted."""
    mine, legacy = (relevance_measures.latency([ms / 1000 for ms in times]) for times in (new, old))
    return comparison.is_fast_enough(
        "live.new_route_is_fast_enough",
        f"{route} on live calls",
        mine,
        legacy["p95_ms"],
        lambda p95: f"{p95}, legacy {legacy['p95_ms']:.2f} ms, {len(new)} calls",
        "look at the load of the server and at the setting chosen by 70_tune",
        slowdown,
    )
