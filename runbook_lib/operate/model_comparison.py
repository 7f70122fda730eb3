"""Two models on one table, each through its own function, with the vectors that it makes of the same queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from runbook_lib.benchmark import comparison, loop, query_set, relevance_measures
from runbook_lib.benchmark.loop import Variant
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.names import identifier, names
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.operate import model_change
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements
from runbook_lib.search.function_ownership import BOTH

KIND = "model_comparison"
TAKE_BACK = "take the swap back: runbook operate PARAMS change_model --undo --execute"


def _calls(connection: db.Connection, params: Params, queries: Sequence[Query]) -> Variant:
    """Calls of a target's function as the application makes them, by the route that it is to have."""

    @contextmanager
    def connected() -> Iterator[db.Connection]:
        with db.beside(connection, params, "models") as reader, reader.transaction():
            statements.force_route(reader, params, params.cut_over.route)
            yield reader

    call = statements.filtered_call_statement(connection, params, as_application=True)
    return Variant(params, call, query_set.with_vectors(params, queries), connected)


@changes
def measure(phase: Phase) -> Table:
    """Both models answer the query set; relevance, latency and agreement go into the ledger."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [("measure both models",)])
    p, old = phase.params, model_change.replaced(phase)
    (judged, timed), marks = comparison.sampled(phase.connection, phase.ledger, p)
    sides = {"replaced": old, "new": phase}
    calls = {name: _calls(one.connection, one.params, timed) for name, one in sides.items()}
    answers = loop.in_rounds(calls, p.queries.k, comparison.ROUNDS)
    figures: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, float]] = {}
    for name, one in sides.items():
        times = comparison.milliseconds(answers[name])
        figures[name] = {"target": one.params.target.name, "dimension": one.params.vector.dimension, **times}
        if judged:
            deep = _calls(one.connection, one.params, judged).ask(comparison.JUDGED_DEPTH).keys
            found = comparison.relevance_figures(deep, marks)
            figures[name] |= {m: found[m] for m in comparison.MEASURES}
            scores[name] = found["per_query"]
    pair = relevance_measures.paired(scores["replaced"], scores["new"]) if judged else None
    before, after = answers["replaced"].keys, answers["new"].keys
    short = sum(len(after[i]) < len(keys) for i, keys in before.items())
    agreed = relevance_measures.agreement(before, after, p.queries.k)
    body = {"judged": len(judged), "timed": len(timed), "short": short, "models": figures, "agreement": agreed}
    phase.note(KIND, body | {"paired": pair.as_data() if pair else None})
    said = ", ".join(f"{key} {value}" for key, value in agreed.items())
    return Table.of(figures.values(), f"the same {len(timed)} queries, {len(judged)} judged; in common: {said}")


def verify(phase: Phase) -> Gates:
    """The new model is no less relevant than the one that it replaces, by the agreed bound; no slower; not short."""
    found = phase.ledger.latest(KIND, phase.name)
    if found is None:
        missing = gate(
            "models.were_compared",
            None,
            phase.params.target.name,
            found="no comparison",
            needed="one",
            danger="readers would be moved on faith",
            do="run operate/change_model with execute: true",
        )
        return collect([missing])
    return collect([_relevance_is_kept(phase.params, found), _is_fast_enough(found), _is_not_short(found)])


def _relevance_is_kept(params: Params, found: dict[str, Any]) -> Gate:
    c, pair, agreed = params.cut_over, found["paired"], found["agreement"]
    danger, do = "users find less than they do today", "choose another model, or another route in cut_over.route"
    if pair is None:
        return gate(
            "models.relevance_is_kept",
            True if c.accept_unjudged else None,
            params.target.name,
            found=f"no judgements; {agreed['overlap']:.0%} of the answers in common, rbo {agreed['rbo']:.2f}"
            + (", accepted by cut_over.accept_unjudged" if c.accept_unjudged else ""),
            needed="judged queries, or cut_over.accept_unjudged: true",
            danger="it is not known whether the new answers are better or worse",
            do="judge a hundred queries into queries.judgements, or set cut_over.accept_unjudged: true in the open",
            figures=agreed,
        )
    old, new = (found["models"][name]["nDCG@10"] for name in ("replaced", "new"))
    shown, needed = apart(new, old - c.largest_relevance_loss, score)
    return gate(
        "models.relevance_is_kept",
        at_least(new, old - c.largest_relevance_loss),
        params.target.name,
        found=f"nDCG@10 {shown} on {number(found['judged'])} judged queries, replaced {old:.3f} (difference"
        f" {pair['low']:+.3f} to {pair['high']:+.3f}, p = {pair['p_value']:.2g})",
        needed=f"at least {needed}",
        danger=danger,
        do=do,
        figures={"new": new, "replaced": old, "judged": found["judged"], **pair},
    )


def _is_fast_enough(found: dict[str, Any]) -> Gate:
    old, new = (found["models"][name] for name in ("replaced", "new"))
    return comparison.is_fast_enough(
        "models.new_is_not_slower",
        new["target"],
        new,
        old["p95_ms"],
        lambda p95: f"{p95}, replaced {old['p95_ms']:.2f} ms",
        "look at the plan and the setting in 70_tune, and at shared_buffers: both indexes want to be in memory",
    )


def _is_not_short(found: dict[str, Any]) -> Gate:
    return gate(
        "models.no_answer_is_short",
        found["short"] == 0,
        found["models"]["new"]["target"],
        found=f"{found['short']} of {found['timed']} queries have fewer rows than by the replaced model",
        needed="0",
        danger="users see a short or an empty page",
        do="raise tune.ef_search and run 70_tune, or VACUUM the table if many rows were deleted",
        figures={"short": found["short"]},
    )


def verify_swapped(phase: Phase) -> Gates:
    """The application's function answers either model's vectors as that model's own, and refuses all others."""
    old = model_change.replaced_params(phase.params)
    swapped = gate(
        "models.function_answers_for_both",
        model_change.stage(phase.connection, phase.params) == BOTH,
        old.function_name,
        found=f"it answers for {model_change.stage(phase.connection, phase.params) or 'the replaced target alone'}",
        needed=BOTH,
        danger="the vectors of one of the models would be refused",
        do="run operate/change_model again with execute: true",
    )
    if model_change.stage(phase.connection, phase.params) != BOTH:
        return collect([swapped])
    answers = [answers_as(phase.connection, phase.params, which) for which in ("new", "replaced")]
    return collect([swapped, *answers, _others_are_refused(phase.connection, phase.params)])


def answers_as(connection: db.Connection, params: Params, which: str) -> Gate:
    """Calls the application's function and the one that stands behind it, and compares key by key."""
    old = model_change.replaced_params(params)
    one, behind = (params, params.function_name) if which == "new" else (old, model_change.before_name(old))
    queries = query_set.sample(query_set.read_queries(params), params.queries.sample)
    queries = query_set.with_vectors(one, queries)
    direct = search_function.SQL["call"].compose(names(one) | {"function": identifier(old.target.schema_, behind)})
    with db.beside(connection, params, "swapped") as reader:
        own = loop.ask(reader, one, direct, queries, params.queries.k).keys
        if which == "new":
            model_change.say_new(reader, params, old)
        called = loop.ask(reader, old, statements.call_statement(old), queries, params.queries.k)
    alike = sum(own[q.query_id] == keys for q, keys in zip(queries, called.keys.values(), strict=True))
    by_route = called.answered_by(one.cut_over.route)
    answered = sum(map(bool, called.rows))
    return gate(
        f"models.vectors_of_the_{which}_are_answered_by_it",
        alike == len(queries) and by_route == answered > 0,
        old.function_name,
        found=f"{alike} of {len(queries)} queries answered as by {behind}, {by_route} by route {one.cut_over.route}",
        needed="all, key by key",
        danger="the application would get answers that belong to other vectors",
        do=f"{TAKE_BACK}; then look at the route table and at both functions",
        figures={"alike": alike, "asked": len(queries), "by_route": by_route},
    )


def _others_are_refused(connection: db.Connection, params: Params) -> Gate:
    old = model_change.replaced_params(params)
    wrong = max(params.vector.dimension, old.vector.dimension) + 1
    said = "an answer"
    with db.beside(connection, params, "wrong dimension") as reader:
        values = {"query": "word", "embedding": [1.0] * wrong, "k": 1}
        try:
            reader.execute(statements.call_statement(old), values)
        except psycopg.errors.DataException as error:
            said = f"{error.diag.message_primary} ({error.diag.message_hint})"
    return gate(
        "models.other_vectors_are_refused",
        said != "an answer",
        old.function_name,
        found=said,
        needed=f"an error for {wrong} dimensions",
        danger="a third model's vectors would be compared with vectors that they have nothing to do with",
        do=TAKE_BACK,
    )
