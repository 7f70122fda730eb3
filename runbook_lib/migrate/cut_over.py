"""Phase 90: moves the reads, a share first, then all; and back in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any

import psycopg

from runbook_lib.benchmark import comparison, filter_classes, loop, query_set, relevance_measures
from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gate, GateFailed, Gates, Verdict, collect, gate
from runbook_lib.core.ledger import SQL as LEDGER_SQL
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_least, at_most, milliseconds, percent
from runbook_lib.migrate import live_calls
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements
from runbook_lib.sql import load

SQL = load("cutover")

# A canary's p95 may be this many times that of legacy or of the shadow before it counts as slower.
LATENCY_TOLERANCE = 2.0
# A function that fails fails every call alike.
MOST_ERRORS_SHOWN = 3


@dataclass(frozen=True)
class CanaryStep:
    """One share of the calls, held for a number of calls and a time: what the function answered, and how fast.

    drawn: calls that the share should send to the new route, by the hash of their text; the figures below, but for
    errors, are theirs alone, since legacy's empty answers are no fault of the new route. without_rows: answers
    without a row, which name no route. empty: of these, where 80_shadow had an answer, or was not asked. short: fewer
    rows than 80_shadow had for the query. errors, errors_drawn: of all calls, and of those drawn. overlap: mean share
    of an answer that 80_shadow had too;
    None where no call was answered by the new route, or nothing was recorded for it. p95_ms, legacy_p95_ms: of the
    calls that the new route and legacy answered, side by side; None where there was none. p95_at_least_ms: what the
    new route's p95 exceeds with 99 % confidence; None where too few calls say so. filtered: a call by the new route
    with each class of filters. live: what users' calls say, where a share of them is answered twice.
    """

    share_percent: int
    calls: int
    drawn: int
    by_new_route: int
    empty: int
    short: int
    overlap: float | None
    errors: int
    p95_ms: float | None
    legacy_p95_ms: float | None
    p95_at_least_ms: float | None = None
    filtered: filter_classes.Called = filter_classes.NO_CALLS
    live: live_calls.LiveCalls | None = None
    without_rows: int = 0
    errors_drawn: int = 0

    @property
    def names_the_route(self) -> int:
        """Calls whose answer must say that the new route gave it."""
        return self.drawn - self.without_rows - self.errors_drawn

    def as_data(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self)


def plan(phase: Phase) -> db.Plan:
    """One UPDATE of the route's row for each share that is not reached and proved yet."""
    connection, params = phase.connection, phase.params
    route = params.cut_over.route
    return db.Plan(
        tuple(
            db.statement(search_function.SQL["move_route"], params, route=route, share_percent=share)
            for share in steps_left(connection, phase.ledger, params)
        ),
        connection,
    )


def steps_left(connection: db.Connection, ledger: Ledger, params: Params) -> list[int]:
    """The shares that are still to be held: all of them, or, after an interruption, from the share that it finds.

    The share that an interrupted run had set is held again, unless its own canary was judged and passed.
    """
    steps = params.cut_over.share_steps_percent
    if search_function.function_state(connection, params) is None:
        return list(steps)
    route, share = search_function.current_route(connection, params)
    if route != params.cut_over.route:
        return list(steps)
    proved = share if _was_proved(ledger, params, share) else share - 1
    return [step for step in steps if step > proved]


def _was_proved(ledger: Ledger, params: Params, share: int) -> bool:
    """Did the canary of this share pass after the reads were moved there?"""
    moved, judged = (
        next(iter(db.rows(ledger.connection, LEDGER_SQL["latest"], params, kind=kind, phases=None)), None)
        if ledger.exists()
        else None
        for kind in ("route", "canary")
    )
    if moved is None or judged is None or judged["seq"] < moved["seq"]:
        return False
    body = judged["body"]
    return body["share_percent"] == share and set(body["verdicts"].values()) == {str(Verdict.PASS)}


@changes
def apply(phase: Phase) -> Table:
    """Raises the share step by step, each judged by its calls; a failed one sends every read back to legacy.

    Interrupted, the reads stay where they are, and the next run resumes from there.
    """
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    if not phase.execute:
        return phase.carry_out(plan(phase))
    route = params.cut_over.route
    steps = []
    for share in steps_left(connection, ledger, params):
        if search_function.current_route(connection, params) != (route, share):
            search_function.move_route(phase, route, share, f"cut-over step {share} %")
        step = _call(phase, share, params.cut_over.hold_s)
        gates = _judge(ledger, params, step)
        if gates.failed:
            # First of all, before anything is written down: users are waiting.
            search_function.move_route(phase, "legacy", 0, f"step {share} % did not pass: {gates.failed[0].name}")
        phase.note("canary", {**step.as_data(), "verdicts": {g.name: str(g.verdict) for g in gates}})
        if gates.failed:
            raise GateFailed(gates)
        steps.append(step)
    if not steps:
        return Table(("",), [("the reads have moved already",)])
    state = search_function.function_state(connection, params)
    phase.note("standing", {"settings": state["settings"], "source": state["source"]} if state else {})
    return Table.of([_shown(s) for s in steps], "steps")


def _shown(step: CanaryStep) -> dict[str, Any]:
    """One row of the table of steps."""
    figures = {name: value for name, value in vars(step).items() if name not in ("filtered", "live")}
    return figures | {"with_filters": step.filtered.calls, "live_calls": step.live.calls if step.live else None}


def _call(phase: Phase, share: int, hold_s: float = 0) -> CanaryStep:
    """Calls the function as the application does, on a connection that an ordinary caller has, over a time."""
    p = phase.params
    queries = query_set.sample(query_set.as_asked(query_set.read_queries(p)), p.queries.sample)
    queries = query_set.with_vectors(p, queries)
    texts = [q.text for q in queries]
    drawn = {
        r["text"]
        for r in db.rows(phase.connection, search_function.SQL["drawn"], p, texts=texts, share_percent=share)
    }
    known = (phase.ledger.latest("shadow") or {}).get("answers", {}).get(p.cut_over.route, {})
    calls = list(islice(cycle(range(len(queries))), p.cut_over.calls_per_step))
    seconds: dict[str, list[float]] = {"legacy": [], p.cut_over.route: []}
    overlaps: list[float] = []
    by_new = without_rows = empty = short = errors = errors_drawn = 0
    since = db.one(phase.connection, SQL["now"], p)["now"]
    began = time.perf_counter()
    with db.beside(phase.connection, phase.params, "canary") as connection:
        call = statements.filtered_call_statement(connection, p, as_application=True)
        for n, i in enumerate(calls, 1):
            try:
                answers = loop.ask(connection, p, call, [queries[i]], p.queries.k)
            except psycopg.Error as error:
                errors += 1
                errors_drawn += queries[i].text in drawn
                if errors <= MOST_ERRORS_SHOWN:
                    print(f"  call failed: {error.sqlstate} {error}")
                continue
            keys, expected = answers.keys[queries[i].query_id], known.get(queries[i].query_id)
            for route in answers.routes:
                seconds[route] += answers.seconds
            by_new += answers.answered_by(p.cut_over.route)
            if not keys and queries[i].text in drawn:
                without_rows += 1
                empty += expected is None or bool(expected)
            if expected is not None and answers.answered_by(p.cut_over.route):
                overlaps.append(relevance_measures.overlap(expected, keys, p.queries.k))
                short += len(keys) < len(expected)
            time.sleep(max(0.0, hold_s * n / len(calls) - (time.perf_counter() - began)))
        filtered = filter_classes.call_each(phase, connection, p.cut_over.route, queries)
    if filtered.problem:
        print(f"  call failed: {filtered.problem}")
    return CanaryStep(
        share_percent=share,
        calls=len(calls),
        drawn=sum(texts[i] in drawn for i in calls),
        by_new_route=by_new,
        without_rows=without_rows,
        empty=empty,
        short=short,
        overlap=round(sum(overlaps) / len(overlaps), 4) if overlaps else None,
        errors=errors,
        errors_drawn=errors_drawn,
        p95_ms=_p95_ms(seconds[p.cut_over.route]),
        legacy_p95_ms=_p95_ms(seconds["legacy"]),
        p95_at_least_ms=relevance_measures.p95_at_least(seconds[p.cut_over.route]),
        filtered=filtered,
        live=live_calls.seen_since(phase.connection, p, p.cut_over.route, since),
    )


def _p95_ms(seconds: list[float]) -> float | None:
    return round(relevance_measures.latency(seconds)["p95_ms"], 3) if seconds else None


def _judge(ledger: Ledger, params: Params, step: CanaryStep) -> Gates:
    """The canary's gates: no error, no short answer, the share that was set, speed and answers as 80_shadow found."""
    c = params.cut_over
    shadow = ledger.latest("shadow") or {"systems": {}}
    p95s = [f["p95_ms"] for name, f in shadow["systems"].items() if name in ("legacy", c.route)]
    # Legacy's calls of the same minute know how busy the server is now; those of 80_shadow do not.
    limit_ms = max(comparison.FAST_ENOUGH_MS, step.legacy_p95_ms or 0, *p95s) * LATENCY_TOLERANCE

    def canary(fact: str, holds: bool, found: str, needed: str, do: str) -> Gate:
        danger = "users would get this answer; every read was sent back to legacy"
        subject = f"{c.route} at {step.share_percent} %"
        return gate(f"cutover.{fact}", holds, subject, found=found, needed=needed, danger=danger, do=do)

    again = "then run 90_cut_over again"
    sure, limit = apart(step.p95_at_least_ms or 0.0, limit_ms, milliseconds)
    f = step.filtered
    alike, alike_enough = apart(step.overlap or 0.0, c.smallest_overlap, percent)
    overlap = "no answer to compare with those" if step.overlap is None else f"{alike} of the rows"
    nothing_drawn = "no text of these calls falls into this share, so there is no time to judge"
    return collect(
        [
            _no_call_fails(step, canary, again),
            canary("no_answer_is_empty", step.empty == 0, f"{step.empty} of {step.drawn} calls of this share", "0",
                   f"look at these queries in 80_shadow, {again}"),
            canary("no_answer_is_short", step.short == 0, f"{step.short} of {step.by_new_route} calls", "0",
                   f"VACUUM the table if many rows were deleted, run 70_tune again, {again}"),
            canary("answers_are_those_of_shadow", step.overlap is None or at_least(step.overlap, c.smallest_overlap),
                   f"{overlap} that 80_shadow found", f"at least {alike_enough}",
                   f"the table or the function has changed since: run 80_shadow again, {again}"),
            canary("calls_go_where_the_route_says", step.by_new_route == step.names_the_route,
                   f"{step.by_new_route} of {step.calls} calls answered by {c.route}",
                   f"{step.names_the_route}, those with an answer whose text falls into the share",
                   f"look at the route table, which another session may have changed, {again}"),
            canary("calls_are_fast_enough", step.drawn == 0 or _is_fast_enough(step, limit_ms),
                   nothing_drawn if step.drawn == 0 else _speed(step, c.route, sure),
                   f"at most {limit}, {LATENCY_TOLERANCE:g} × the slowest of legacy now and 80_shadow",
                   f"look at the load of the server, {again}"),
            *([canary("no_filtered_call_fails", f.errors == 0, f"{f.errors} of {f.calls} calls with filters failed",
                      "0", f"fix what the error above names, or run 70_tune again, {again}"),
               canary("no_filtered_answer_is_short", f.short == 0, f"{f.short} of {f.calls} calls with filters",
                      "0", f"run 70_tune again, {again}")] if f.calls else []),
            *(_live_gates(step.live, canary, again, c.largest_slowdown) if step.live else []),
        ]
    )  # fmt: skip


def _no_call_fails(step: CanaryStep, canary: Callable[..., Gate], again: str) -> Gate:
    """Calls that legacy answers fail as they did before; they judge the function only where no call was drawn."""
    failed, calls = (step.errors_drawn, step.drawn) if step.drawn else (step.errors, step.calls)
    found = f"{failed} of {calls} calls failed"
    if step.errors > failed:
        found += f"; and {step.errors - failed} that legacy answers, as before"
    return canary("no_call_fails", failed == 0, found, "0", f"fix what the errors above name, {again}")


def _is_fast_enough(step: CanaryStep, limit_ms: float) -> bool:
    """Is there no proof that p95 is above the limit? The p95 of a few calls is that of one stray call."""
    return step.p95_ms is not None and at_most(step.p95_at_least_ms or 0.0, limit_ms)


def _speed(step: CanaryStep, route: str, sure: str) -> str:
    if step.p95_ms is None:
        return f"{route} answered no call"
    if step.p95_at_least_ms is None:
        return "too few calls to judge their time"
    return f"p95 {step.p95_ms:.2f} ms in {step.by_new_route} calls; above {sure} with 99 % confidence"


def _live_gates(seen: live_calls.LiveCalls, canary: Callable[..., Gate], again: str, slowdown: float) -> list[Gate]:
    """What users' own calls say: each was answered by the other search as well, in the same moment.

    Their times are judged from live.FEWEST_CALLS on.
    """
    limit_ms = max(comparison.FAST_ENOUGH_MS, (seen.other_p95_ms or 0) * slowdown) * LATENCY_TOLERANCE
    enough = seen.calls >= live_calls.FEWEST_CALLS
    p95_ms = seen.p95_ms or 0.0
    p95, limit = apart(p95_ms, limit_ms, milliseconds)
    return [
        canary("no_live_shadow_fails", seen.problems == 0, f"{seen.problems} sampled live calls", "0",
               f"look at the log's column problem, {again}"),
        canary("no_live_answer_is_empty", seen.empty == 0,
               f"{seen.empty} of {seen.calls} live calls, where legacy had an answer", "0",
               f"look for the filters of these calls in the log, run 70_tune again, {again}"),
        *([canary("live_calls_are_fast_enough", at_most(p95_ms, limit_ms),
                  f"p95 {p95} in {seen.calls} live calls",
                  f"at most {limit}, {LATENCY_TOLERANCE:g} × legacy on the same calls, from"
                  f" {live_calls.FEWEST_CALLS} calls on",
                  f"look at the load of the server, {again}")] if enough else []),
    ]  # fmt: skip


def verify(phase: Phase) -> Gates:
    """The route's row and the function's own answers agree: every read goes to the new route."""
    return collect(
        [
            route_is(phase.connection, phase.params, phase.params.cut_over.route, 100),
            _function_answers_by_route(phase),
        ]
    )


def route_is(connection: db.Connection, params: Params, route: str, share: int) -> Gate:
    """Do reads go this route, at this share in per cent?"""
    found, found_share = search_function.current_route(connection, params)
    return gate(
        "cutover.route_is_set",
        (found, found_share) == (route, share),
        params.target.name,
        found=f"{found} at {found_share} %",
        needed=f"{route} at {share} %",
        danger="some reads go where they should not",
        do="run 90_cut_over again, or undo/reads to send them all back",
    )


def _function_answers_by_route(phase: Phase) -> Gate:
    step = _call(phase, 100)
    return gate(
        "cutover.function_answers_by_the_new_route",
        step.errors == step.empty == 0 and step.by_new_route == step.names_the_route,
        phase.params.function_name,
        found=f"{step.by_new_route} of {step.calls} calls, {step.errors} errors, {step.empty} empty",
        needed="every call that has an answer",
        danger="the application still reads the old search",
        do="look at the route table and at the function's source",
        figures=step.as_data(),
    )
