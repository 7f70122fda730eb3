"""Phase 10: the legacy search is measured, and the search function, once made, answers as it does."""

from __future__ import annotations

from psycopg import sql

from runbook_lib.benchmark import comparison, loop, query_set
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase, changes
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements

# Calls that show that the function answers as legacy does; each costs as much as a legacy search, so that where they
# have taken this many seconds the least number is enough.
FUNCTION_CALLS, LEAST_CALLS, FUNCTION_S = 20, 3, 10.0
# Rows by whose own words a legacy search is tried that has found nothing for any query.
ROWS_TO_BE_FOUND = 3


@changes
def apply(phase: Phase) -> Table:
    """Measures the legacy search and keeps its figures and its answers to the timed queries."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [("measure the legacy search",)])
    result = comparison.measure(phase.connection, phase.ledger, phase.params, ["legacy"])
    legacy = result["legacy"]
    single = {key: legacy.get(key, {}) for key in comparison.SINGLE}
    own = {} if any(legacy["answers"].values()) else {"own_words": _finds_own_words(phase.connection, phase.params)}
    phase.note("baseline", {"systems": comparison.totals(result), **single, **own})
    return comparison.show(result)


def _finds_own_words(connection: db.Connection, params: Params) -> bool:
    """Does legacy find anything by the first line or the longest word of some rows? Then it is not broken, and that
    it finds nothing for the queries is a reason to migrate.
    """
    texts = [row["text"] for row in db.rows(connection, comparison.SQL["some_texts"], params, rows=ROWS_TO_BE_FOUND)]
    own = [
        words for text in texts for words in (text.strip().split("\n")[0], max(text.split(), key=len, default=text))
    ]
    queries = [Query(f"row {i}", words) for i, words in enumerate(own)]
    answers, _ = comparison.ask_legacy(connection, params, queries, dict.fromkeys((q.query_id for q in queries), 1))
    return any(answers.rows)


def verify(phase: Phase) -> Gates:
    """The legacy search was measured, and the new function answers what it answers."""
    return collect(
        [
            _baseline_is_recorded(phase.ledger),
            _function_answers_as_legacy(phase.connection, phase.ledger, phase.params),
        ]
    )


def _baseline_is_recorded(ledger: Ledger) -> Gate:
    recorded = ledger.latest("baseline")
    answered = sum(bool(keys) for keys in recorded["answers"].values()) if recorded else 0
    figures = recorded["systems"]["legacy"] if recorded else {}
    left = len(recorded.get("left", ())) if recorded else 0
    works = bool(recorded and recorded.get("own_words"))
    return gate(
        "compare.baseline_is_recorded",
        answered > 0 or works,
        "the legacy query",
        found=f"{answered} of {figures['timed']} queries have an answer, p50 {figures['p50_ms']} ms,"
        f" p95 {figures['p95_ms']} ms"
        + (f", nDCG@10 {figures['nDCG@10']}" if figures["judged"] else ", not judged")
        + (
            f"; {left} queries did not fit into queries.baseline_minutes and are left out from here on"
            if left
            else ""
        )
        + ("; rows are found by their own words: it works, and misses what users ask" if works else "")
        if recorded
        else "nothing",
        needed="figures, and an answer to at least one query, or to the own words of a row",
        danger="without a baseline there is nothing to judge the new search by",
        do="look at legacy.query: it finds no row even by the row's own words"
        if recorded
        else "run 10_baseline with execute: true",
        figures=figures,
    )


def _function_answers_as_legacy(connection: db.Connection, ledger: Ledger, params: Params) -> Gate:
    """Calls the function for some of the queries, and compares with what legacy answered, key by key.

    Where an answer differs, both are asked once more, in one snapshot: the table may have changed since. Where calls
    are slow, fewer are made.
    """
    known = (ledger.latest("baseline") or {}).get("answers", {})
    queries = query_set.sample(query_set.as_asked(query_set.read_queries(params)), params.queries.sample)
    queries = [q for q in queries if q.query_id in known][:FUNCTION_CALLS]
    route, share = search_function.current_route(connection, params)

    def ask(statement: sql.Composed, asked: list[Query]) -> dict[str, list[str]]:
        return loop.ask(connection, params, statement, asked, params.queries.k, _are_enough).keys

    call = statements.filtered_call_statement(connection, params)
    legacy = statements.legacy_statement(connection, params)
    called = ask(call, queries)
    differ = [q for q in queries if q.query_id in called and called[q.query_id] != known[q.query_id]]
    different = []
    for query in differ:
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            if ask(legacy, [query]) != ask(call, [query]):
                different.append(query.query_id)
    unasked = len(queries) - len(called)
    return gate(
        "compare.function_answers_as_legacy",
        bool(called) and not different,
        params.function_name,
        found=f"{len(called) - len(different)} of {len(called)} queries answered alike"
        + (f"; {unasked} more were not called: each call takes long" if unasked else "")
        + (f"; not {', '.join(different[:3])}" if different else "")
        + (f"; route {route} at {share} %" if route != "legacy" else ""),
        needed="all, key by key",
        danger="the application would see other answers as soon as it calls the function",
        do="give legacy.query an ORDER BY without ties (add the key), and names that its search_path resolves",
        figures={"alike": len(called) - len(different), "asked": len(called)},
    )


def _are_enough(answers: loop.Answers) -> bool:
    return len(answers.rows) >= LEAST_CALLS and sum(answers.seconds) > FUNCTION_S
