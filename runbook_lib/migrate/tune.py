"""Phase 70: exact answers against the index, per filter class; the cheapest way that reaches the target is kept."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runbook_lib.backfill.progress import SECONDS_BETWEEN_LINES
from runbook_lib.benchmark import (
    cheapest_way,
    exact,
    explain,
    filter_classes,
    filters_together,
    loop,
    plan_diagnosis,
    query_set,
    relevance_measures,
    replica,
)
from runbook_lib.benchmark.cheapest_way import Choice
from runbook_lib.benchmark.filter_classes import FilterClass
from runbook_lib.benchmark.filters_together import Together
from runbook_lib.benchmark.loop import Measured
from runbook_lib.benchmark.prepared import reads_index, use
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db, table_kind
from runbook_lib.core.display import Amount, Table, duration, share
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.names import index_name, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_least, milliseconds, score
from runbook_lib.migrate import hybrid_weights, row_security_recall
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, role_settings, search_function, statements, ways
from runbook_lib.search.ways import Way
from runbook_lib.sql import load

if TYPE_CHECKING:
    import pandas

SQL = load("tune")


@dataclass(frozen=True)
class Tuning:
    """Every filter class with its choice; the first is the unfiltered one. unmeasured: filters without a class.
    together: sets of filters given together.
    """

    k: int
    queries: int
    target_recall: float
    exact_p50_ms: float
    setting: str
    choices: tuple[Choice, ...]
    unmeasured: tuple[str, ...] = ()
    together: tuple[Together, ...] = ()

    @property
    def chosen(self) -> int | None:
        """ef_search or probes for searches without a filter; None where no setting reaches the target."""
        chosen = self.choices[0].chosen
        return chosen.way.candidates if chosen else None

    def as_data(self) -> dict[str, Any]:
        """For the ledger: the unfiltered class as the picture needs it, then every class whole."""
        kept = ("recall", "low", "high", "p50_ms", "p95_ms", "p99_ms", "rows_short", "buffers")
        points = [
            {"setting": self.setting, "value": p["candidates"]} | {name: p[name] for name in kept}
            for p in self.choices[0].as_data()["points"]
        ]
        return {
            "k": self.k,
            "queries": self.queries,
            "target_recall": self.target_recall,
            "exact_p50_ms": round(self.exact_p50_ms, 3),
            "chosen": self.chosen,
            "points": points,
            "classes": [c.as_data() for c in self.choices],
            "unmeasured": list(self.unmeasured),
            "together": [t.as_data() for t in self.together],
        }

    def advice(self) -> list[str]:
        """What would make the slow classes fast."""
        unknown = "no values to measure it with, so it is searched exactly; add some as filters in queries.file"
        return [
            *(f"{c.of}: {c.advice}" for c in self.choices if c.advice),
            *(f"{n}: {unknown}" for n in self.unmeasured),
        ]

    def table(self) -> Table:
        """One row a class: the choice on the held-out questions, next to common practice."""
        titles = (
            "filter",
            "rows let through",
            "chosen way",
            f"recall@{self.k}",
            "rows",
            "p50",
            "p95",
            "p99",
            "pages",
        )
        return Table(
            (*titles, "common practice"),
            [_row(c) for c in self.choices],
            "The chosen way of each filter class, on held-out questions; a way is its candidates, its iterative scan"
            " and how far it scans",
        )

    def to_frame(self) -> pandas.DataFrame:
        """The sweep of every filter class, as :func:`sweep` gives it."""
        return _sweep(self.as_data()).to_frame()

    def __str__(self) -> str:
        return "\n".join([str(self.table()), *self.advice()])

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        # Here, because matplotlib takes longer to import than most phases take to run.
        from runbook_lib.benchmark import charts
        from runbook_lib.core import pictures

        data = self.as_data()
        advice = [f"<p>{html.escape(each)}</p>" for each in self.advice()]
        drawn = [pictures.recall_against_latency(data)] if data["points"] else []
        if len(self.choices) > 1:
            drawn.append(charts.rows_by_selectivity(data))
        return self.table()._repr_html_() + "".join(advice) + pictures.in_a_notebook(drawn)


def _row(choice: Choice) -> tuple[Any, ...]:
    m, practice = choice.chosen, choice.practice
    beside = f"{practice.recall:.3f}, {practice.returned:.0%} of rows, {practice.p50_ms:.2f} ms"
    of = (str(choice.of), share(choice.of.share, 2))
    if m is None:
        return (*of, "none", *[""] * 6, beside)
    times = [milliseconds(v) for v in (m.p50_ms, m.p95_ms, m.p99_ms)]
    recall = Amount(f"{m.recall:.3f} ({m.low:.3f} to {m.high:.3f})", m.recall)
    return (*of, str(m.way), recall, share(m.returned), *times, m.buffers, beside)


def sweep(phase: Phase) -> Table:
    """Every measured way for each filter class, from the ledger: settings, recall with its interval, latency;
    held_out for the chosen way on the other half of the queries.
    """
    return _sweep(phase.ledger.latest("tuning") or {})


# What identifies a measured way, and what was found for it.
SWEEP = (
    *("scan", "candidates", "iterative_scan", "most_scanned", "questions", "recall", "low", "high", "returned"),
    *("rows_short", "p50_ms", "p95_ms", "p99_ms", "buffers", "plan"),
)


def _sweep(tuning: Mapping[str, Any]) -> Table:
    rows = [
        (c["column"] or "", c["bucket"], c["share"], held_out, *(p.get(name) for name in SWEEP))
        for c in tuning.get("classes", ())
        for held_out, points in ((False, c["points"]), (True, [c["chosen"]] if c["chosen"] else []))
        for p in points
    ]
    return Table(("filter", "bucket", "share", "held_out", *SWEEP), rows)


def plan(phase: Phase) -> db.Plan:
    """What is carried into the search function, with the first setting as an example; measuring only reads."""
    first = ways.candidates(phase.params)[0]
    carried = search_function.set_search_setting(phase.connection, phase.params, first)
    return db.Plan((*carried, *hybrid_weights.plan(phase.connection, phase.params)), phase.connection)


@changes
def apply(phase: Phase) -> Tuning | Table:
    """Measures every filter class, and gives the search function the cheapest way that reaches the target in each.

    The plans of both passes are looked at before they count: exact answers never come from the index.
    """
    if not phase.execute:
        return phase.carry_out(plan(phase))
    p = phase.params
    asked, agrees, exact_seconds = filter_classes.questions(
        phase.connection, p, filter_classes.find(phase.connection, p)
    )
    without = asked.pop(filter_classes.UNFILTERED)
    with replica.connect(phase.connection, phase.params, "tune") as connection:
        first = cheapest_way.unfiltered(connection, p, _ways_to_try(connection, p, without[0]), without)
        rows = query_set.exact_of(without)[0].matching
        served = None if table_kind.of(p).settings_stay else [w.way for w in (first.chosen,) if w]
        others = [cheapest_way.filtered(connection, p, c, q, rows, served) for c, q in _in_turn(asked)]
        together = filters_together.proved(connection, p, others, asked)
    tuning = Tuning(
        k=p.queries.k,
        queries=len(without),
        target_recall=p.tune.target_recall,
        exact_p50_ms=relevance_measures.latency(exact_seconds)["p50_ms"],
        setting=ways.SETTING[p.index.method],
        choices=(first, *others),
        unmeasured=tuple(n for n in filter_classes.names_of_conditions(p) if n not in {c.of.filter for c in others}),
        together=tuple(together),
    )
    phase.note("tuning", tuning.as_data() | {"exact": dict(agrees.figures)})
    if tuning.chosen is not None:
        _carry_into_function(phase, tuning)
        hybrid_weights.apply(phase, tuning.chosen)
    return tuning


def _in_turn(asked: Mapping[FilterClass, list[Query]]) -> Iterator[tuple[FilterClass, list[Query]]]:
    """Each filter class with its questions; says now and then how far it has come."""
    started = last_line = time.perf_counter()
    for done, (of, questions) in enumerate(asked.items()):
        now = time.perf_counter()
        if done and now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            left = duration((now - started) / done * (len(asked) - done))
            print(f"  {done} of {len(asked)} filter classes measured, about {left} left; now {of}")
        yield of, questions


def _ways_to_try(connection: db.Connection, params: Params, question: Query) -> list[Way]:
    """Ways to search without a filter; none where PostgreSQL cannot use the index for it.

    On a table so small that reading it whole is cheaper there is one, the most thorough: none can be measured through
    the index, and it is this one that serves when the table has grown.
    """
    p = params
    to_try = [ways.through_the_index(p, n) for n in ways.candidates(p)]
    statement = statements.route_statement(connection, p, "vector")
    if reads_index(connection, p, loop.planned(connection, p, statement, question)):
        return to_try
    return [way for way in to_try[-1:] if _is_too_small(connection, p, way)]


def _is_too_small(connection: db.Connection, params: Params, way: Way) -> bool:
    """Could the index serve these searches, and is a small table read sooner than the index is entered?"""
    with connection.transaction():
        use(connection, way.settings(params.index.method))
        cause = plan_diagnosis.diagnose(connection, params, explain.function_query(connection, params), "custom")
    return cause.name == plan_diagnosis.TOO_SMALL


def _carry_into_function(phase: Phase, tuning: Tuning) -> None:
    """Settings and strategies in one transaction: a call sees all of the old or all of the new."""
    connection, params = phase.connection, phase.params
    with connection.transaction():
        db.use_search_path(connection)
        for statement in [
            *search_function.set_search_setting(connection, params, tuning.chosen or 0),
            *strategies(params, tuning),
        ]:
            phase.do(statement)


def strategies(params: Params, tuning: Tuning) -> list[db.Statement]:
    """Statements that write down how to search by which filter value."""
    learned = [db.statement(search_function.SQL["forget_strategies"], params)]
    for choice in tuning.choices[1:]:
        listed = choice.of.in_strategies()
        learned.append(_learn(params, str(choice.of.filter), list(listed), list(listed.values()), choice.chosen))
    for sets in tuning.together:
        if sets.exact:
            learned.append(_learn(params, sets.name, list(sets.shares), list(sets.shares.values()), None))
    # A value that did not exist when this was measured is rare: its few rows are read, and none is missed.
    measured_rare = {c.of.filter for c in tuning.choices if None in c.of.in_strategies()}
    unlisted = [name for name in _filters(params) if name not in measured_rare]
    return learned + [_learn(params, name, [None], [0.0], None) for name in unlisted]


def _filters(params: Params) -> list[str]:
    """Each filter, and each set of filters given together that is measured, as the strategies name them."""
    columns = [combined_filters.name(columns) for columns in filter_classes.measured_filters(params)]
    return [*columns, *filter_classes.names_of_conditions(params)]


def _learn(
    params: Params, name: str, values: list[str | None], shares: list[float], measured: Measured | None
) -> db.Statement:
    way = measured.way if measured else ways.exact(params)
    return db.statement(
        search_function.SQL["learn_strategy"],
        params,
        filter=name,
        values=values,
        shares=shares,
        **vars(way),
        recall=round(measured.recall, 4) if measured else 1.0,
        p50_ms=round(measured.p50_ms, 3) if measured else 0.0,
    )


def verify(phase: Phase) -> Gates:
    """The target is reached in every filter class, the function searches so, and its query uses the index."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    tuning = ledger.latest("tuning", phase.name)
    measured = [_exact_agrees(params, tuning), _target_is_reached(params, tuning), *_classes_reach(params, tuning)]
    measured += filters_together.gates(params, tuning)
    carried = [
        _function_has_settings(connection, params, tuning),
        *_function_has_strategies(connection, params, tuning),
        *_roles_have_settings(connection, params, tuning),
    ]
    seen = row_security_recall.gates(connection, params, params.tune.target_recall)
    return collect(
        [
            *measured,
            *carried,
            *hybrid_weights.gates(connection, phase.ledger, params),
            *explain.gates(connection, ledger, params),
            *seen,
        ]
    )


def _exact_agrees(params: Params, tuning: dict[str, Any] | None) -> Gate:
    figures = tuning["exact"] if tuning else {"asked": 0, "alike": 0}
    return exact.agreement(params, figures["alike"], figures["asked"])


def _target_is_reached(params: Params, tuning: dict[str, Any] | None) -> Gate:
    first: dict[str, Any] = tuning["classes"][0] if tuning else {"points": [], "chosen": None, "advice": ""}
    shown = first["chosen"] or max(first["points"], key=lambda q: q["recall"], default=None)
    target = params.tune.target_recall
    recall, needed = apart(shown["recall"] if shown else 0.0, target, score)
    return gate(
        "tune.target_recall_is_reached",
        bool(first["chosen"]) and at_least(first["chosen"]["recall"], target) if first["points"] else None,
        index_name(params),
        found=_said(params, shown, recall) if shown else "PostgreSQL does not use the index, at any setting",
        needed=f"recall {needed}, no query short of rows",
        danger="the index would hide answers that exact search finds",
        do=(first["advice"] if first["points"] else "see the gates of explain, which name the cause")
        or "try higher settings in tune, or rebuild with a higher m and ef_construction",
        figures=dict(shown) if shown else {},
    )


def _said(params: Params, m: dict[str, Any], recall: str) -> str:
    setting = "exact" if m["scan"] == "exact" else f"{ways.SETTING[params.index.method]} {m['candidates']}"
    whole = m["scan"] != "exact" and loop.VECTOR_INDEX not in m["plan"]
    return (
        f"recall@{params.queries.k} {recall} ({m['low']:.3f} to {m['high']:.3f}) at {setting},"
        f" p50 {m['p50_ms']:.2f} ms, {m['rows_short']} of {m['questions']} queries short"
        + (f"; {cheapest_way.SO_SMALL}" if whole else "")
    )


def _classes_reach(params: Params, tuning: dict[str, Any] | None) -> list[Gate]:
    """A gate a filter class: its choice holds on questions that did not choose it."""
    return [_class_reaches(params, c) for c in (tuning["classes"][1:] if tuning else [])]


def _class_reaches(params: Params, c: dict[str, Any]) -> Gate:
    m, target = c["chosen"], params.tune.target_recall
    recall, needed = apart(m["recall"], target, score)
    return gate(
        "tune.filter_class_reaches_the_target",
        at_least(m["recall"], target) and not m["rows_short"],
        f"{c['column']}, {c['bucket']} ({', '.join(c['values'][:3])}{', …' if len(c['values']) > 3 else ''})",
        found=_said(params, m, recall),
        needed=f"recall {needed}, no query short of rows",
        danger="searches with this filter would hide answers that exact search finds",
        do=c["advice"] or "run 70_tune again; raise tune.queries if it comes back",
        figures=m,
    )


def _function_has_settings(connection: db.Connection, params: Params, tuning: dict[str, Any] | None) -> Gate:
    """All of them: a strategy's settings end with the call only where the function has a SET for each."""
    found = search_function.function_state(connection, params)
    settings = [s for s in (found["settings"] or [] if found else []) if not s.startswith("search_path")]
    chosen = tuning["chosen"] if tuning else None
    carried = ways.through_the_index(params, chosen or 0).settings(params.index.method)
    wanted = [f"{name}={value}" for name, value in carried.items()]
    return gate(
        "tune.function_carries_the_setting",
        sorted(settings) == sorted(wanted) if chosen else None,
        params.function_name,
        found=", ".join(settings) or "no index setting",
        needed=", ".join(wanted) if chosen else "the setting that was chosen; none was",
        danger="the application would search with another setting than the one that was measured",
        do="run 70_tune again",
    )


def _roles_have_settings(connection: db.Connection, params: Params, tuning: dict[str, Any] | None) -> Iterator[Gate]:
    """Where a function's own settings do not reach the rows."""
    if tuning and tuning["chosen"] and not table_kind.of(params).settings_stay:
        carried = ways.through_the_index(params, tuning["chosen"]).settings(params.index.method)
        yield from role_settings.gates(connection, params, [f"{name}={value}" for name, value in carried.items()])


def _function_has_strategies(connection: db.Connection, params: Params, tuning: dict[str, Any] | None) -> list[Gate]:
    """The strategy table says what was chosen, value by value."""
    filters = _filters(params)
    if not filters or not (tuning and tuning["chosen"]):
        # Strategies are carried together with the setting, whose gate says that none was chosen.
        return []
    found = db.rows(connection, search_function.SQL["strategies"], params)
    has = {(r["filter"], r["value"]): _way(r) for r in found}
    classes_of_filters = tuning["classes"][1:]
    wanted = {
        (c["column"], v): _way(c["chosen"])
        for c in classes_of_filters
        for v in (list(c["shares"]) or [c.get("listed") or None])
    }
    exactly = _way(vars(ways.exact(params)))
    wanted |= {(t["name"], v): exactly for t in tuning.get("together", ()) if t["exact"] for v in t["shares"]}
    wrong = [f"{c} = {v}: not as chosen" for (c, v), way in wanted.items() if has.get((c, v)) != way]
    wrong += [f"{c}: nothing for values that are not listed" for c in filters if (c, None) not in has]
    return [
        gate(
            "tune.function_searches_by_filter_as_chosen",
            not wrong,
            spelled(params, "strategy"),
            found="; ".join([f"{len(has)} rows", *wrong[:3]]),
            needed="the chosen way for every value, and one for values that are not listed",
            danger="a search with a filter would miss answers, or read more rows than it needs",
            do="run 70_tune again",
        )
    ]


def _way(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("scan", "candidates", "iterative_scan", "most_scanned"))


def undo_plan(phase: Phase) -> db.Plan:
    """RESET of the function's index settings, and no strategies any more, where it has them."""
    connection, params = phase.connection, phase.params
    found = search_function.function_state(connection, params)
    if found is None:
        return db.Plan((), connection)
    carried = [s.split("=")[0] for s in found["settings"] or [] if not s.startswith("search_path")]
    statements = [s for name in carried for s in search_function.reset_search_setting(connection, params, name)]
    if db.rows(connection, search_function.SQL["strategies"], params):
        # First: a strategy's settings would outlive a call of the function once that has no SET for them.
        statements.insert(0, db.statement(search_function.SQL["forget_strategies"], params))
    return db.Plan((*statements, *hybrid_weights.undo_plan(connection, params)), connection)


@changes
def undo(phase: Phase) -> Table:
    """Takes the strategies and the index settings from the function."""
    return phase.carry_out(undo_plan(phase))
