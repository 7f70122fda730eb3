"""Phase 90: moves the reads, a share first, then all; and back in one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import psycopg

from runbook_lib import compare, db, embed, evaluate, search
from runbook_lib.display import Table
from runbook_lib.gates import Gate, GateFailed, Gates, collect, gate
from runbook_lib.phase import Phase

# A canary's p95 may wander this far from the shadow's figure before it counts as slower.
LATENCY_TOLERANCE = 2.0


@dataclass(frozen=True)
class Step:
    """One share of the calls, held for a number of calls: what the function answered, and how fast.

    drawn: calls that the share should send to the new route, by the hash of their text.
    """

    share_percent: int
    calls: int
    drawn: int
    by_new_route: int
    empty: int
    errors: int
    p95_ms: float


def plan(phase: Phase) -> db.Plan:
    """One UPDATE of the route's row for each share that is not reached yet."""
    route = phase.params.cut_over.route
    return db.Plan(
        tuple(
            db.statement(search.SQL["move_route"], phase.params, route=route, share_percent=share)
            for share in phase.params.cut_over.share_steps_percent
        ),
        phase.connection,
    )


def apply(phase: Phase) -> Table:
    """Raises the share step by step, each judged by its calls; a failed one sends every read back to legacy."""
    if not phase.execute:
        return phase.carry_out(plan(phase))
    route = phase.params.cut_over.route
    steps = []
    for share in phase.params.cut_over.share_steps_percent:
        if search.current_route(phase) == (route, 100):
            break
        search.move_route(phase, route, share, f"cut-over step {share} %")
        step = _call(phase, share)
        gates = _judge(phase, step)
        phase.note("canary", {**vars(step), "verdicts": {g.name: str(g.verdict) for g in gates}})
        if gates.failed:
            search.move_route(phase, "legacy", 0, f"step {share} % did not pass: {gates.failed[0].name}")
            raise GateFailed(gates)
        steps.append(step)
    return Table.of([vars(s) for s in steps], "steps") if steps else Table(("",), [("the reads have moved already",)])


def _call(phase: Phase, share: int) -> Step:
    """Calls the function as the application does, on a connection that an ordinary caller has."""
    p = phase.params
    queries = evaluate.sample(evaluate.read_queries(p), p.queries.sample)
    vectors = embed.query_vectors(p, queries)
    texts = [q.text for q in queries]
    drawn = {r["text"] for r in db.rows(phase.connection, search.SQL["drawn"], p, texts=texts, share_percent=share)}
    calls = list(islice(cycle(range(len(queries))), p.cut_over.calls_per_step))
    seconds: list[float] = []
    by_new = empty = errors = 0
    with db.connect(p, f"runbook {phase.run_id} canary") as connection:
        for i in calls:
            one, vector = [queries[i]], vectors[i : i + 1]
            try:
                answers = search.ask(connection, p, search.call_statement(p), one, vector, p.queries.k)
            except psycopg.Error as error:
                errors += 1
                print(f"  call failed: {error.sqlstate} {error}")
                continue
            seconds += answers.seconds
            by_new += answers.answered_by(p.cut_over.route)
            empty += not answers.keys[queries[i].query_id]
    return Step(
        share_percent=share,
        calls=len(calls),
        drawn=sum(texts[i] in drawn for i in calls),
        by_new_route=by_new,
        empty=empty,
        errors=errors,
        p95_ms=round(evaluate.latency(seconds)["p95_ms"], 3) if seconds else float("inf"),
    )


def _judge(phase: Phase, step: Step) -> Gates:
    """The canary's gates: no error, no empty answer, the share that was set, and a p95 near what 80_shadow found."""
    route = phase.params.cut_over.route
    shadow = phase.ledger.latest("shadow") or {"systems": {}}
    p95s = [f["p95_ms"] for name, f in shadow["systems"].items() if name in ("legacy", route)]
    limit_ms = max([compare.FAST_ENOUGH_MS, *p95s]) * LATENCY_TOLERANCE

    def canary(fact: str, holds: bool, found: str, needed: str, do: str) -> Gate:
        danger = "users would get this answer; every read was sent back to legacy"
        subject = f"{route} at {step.share_percent} %"
        return gate(f"cutover.{fact}", holds, subject, found=found, needed=needed, danger=danger, do=do)

    again = "then run 90_cut_over again"
    answered = step.drawn - step.empty - step.errors
    return collect(
        [
            canary("no_call_fails", step.errors == 0, f"{step.errors} of {step.calls} calls failed", "0",
                   f"mend what the errors above name, {again}"),
            canary("no_answer_is_empty", step.empty == 0, f"{step.empty} of {step.calls} calls", "0",
                   f"look at these queries in 80_shadow, {again}"),
            canary("calls_go_where_the_route_says", step.by_new_route == answered,
                   f"{step.by_new_route} of {step.calls} calls answered by {route}",
                   f"{answered}, those whose text falls into the share",
                   f"look at the route table, which somebody else may have changed, {again}"),
            canary("calls_are_fast_enough", step.p95_ms <= limit_ms, f"p95 {step.p95_ms:.2f} ms",
                   f"at most {limit_ms:.2f} ms, {LATENCY_TOLERANCE:g} × that of the slower in 80_shadow",
                   f"look at the load of the server, {again}"),
        ]
    )  # fmt: skip


def verify(phase: Phase) -> Gates:
    """The route's row and the function's own answers agree: every read goes to the new route."""
    return collect([_route_is(phase, phase.params.cut_over.route, 100), _function_answers_by_route(phase)])


def _route_is(phase: Phase, route: str, share: int) -> Gate:
    found, found_share = search.current_route(phase)
    return gate(
        "cutover.route_is_set",
        (found, found_share) == (route, share),
        phase.params.target.name,
        found=f"{found} at {found_share} %",
        needed=f"{route} at {share} %",
        danger="some reads go where they should not",
        do="run 90_cut_over again, or undo/10_reads_to_legacy to send them all back",
    )


def _function_answers_by_route(phase: Phase) -> Gate:
    step = _call(phase, 100)
    return gate(
        "cutover.function_answers_by_the_new_route",
        step.by_new_route == step.calls,
        phase.params.function_name,
        found=f"{step.by_new_route} of {step.calls} calls, {step.errors} errors, {step.empty} empty",
        needed="every call",
        danger="the application still reads the old search",
        do="look at the route table and at the function's source",
        figures=vars(step),
    )


def undo_plan(phase: Phase) -> db.Plan:
    """One UPDATE of one row, if reads go anywhere but to legacy."""
    if search.function_state(phase) is None or search.current_route(phase) == ("legacy", 0):
        return db.Plan((), phase.connection)
    back: dict[str, Any] = {"route": "legacy", "share_percent": 0}
    return db.Plan((db.statement(search.SQL["move_route"], phase.params, **back),), phase.connection)


def undo(phase: Phase) -> Table:
    """Sends every read back to the legacy query."""
    return phase.carry_out(undo_plan(phase))


def verify_undone(phase: Phase) -> Gates:
    """Every read goes to legacy, or there is no function any more."""
    if search.function_state(phase) is None:
        gone = gate(
            "cutover.route_is_set", True, phase.params.target.name, found="no function, so no route", needed="none"
        )
        return collect([gone])
    return collect([_route_is(phase, "legacy", 0)])
