"""Phases 10 and 80: the searches side by side, the classes of queries, and marks given by people."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.benchmark import comparison, loop, query_set, relevance_measures
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import (
    backfill,
    baseline,
    build_index,
    expand_schema,
    extension,
    load_embeddings,
    shadow,
    slices,
    tune,
)
from runbook_lib.search import search_function, statements

Open = Callable[..., Phase]


@pytest.fixture
def tuned(open_phase: Open) -> Callable[..., Phase]:
    """Opens phase 80 on a table whose index is built and tuned."""

    def make(**sections: dict[str, Any]) -> Phase:
        phase = open_phase("80_shadow", **sections)
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index, tune):
            module.apply(phase)
        baseline.apply(phase)
        return phase

    return make


def test_every_search_is_measured_and_those_of_the_record_are_there(tuned: Callable[..., Phase]) -> None:
    phase = tuned()
    shown = str(shadow.apply(phase))
    recorded = phase.ledger.latest("shadow")
    assert recorded is not None
    assert set(recorded["systems"]) == {"legacy", "fulltext", "exact", "vector", "hybrid"}
    assert all(set(comparison.MEASURES) <= set(figures) for figures in recorded["systems"].values())
    assert set(recorded["pairs"]) == {"fulltext", "exact", "vector", "hybrid"}
    assert recorded["pairs"]["vector"] == recorded["paired"]
    assert "answers in common with legacy" in shown and "by class of query" in shown
    assert set(recorded["answers"]) == set(recorded["per_query"]) == {"vector"}
    assert sum(recorded["moved"][n] for n in ("better", "worse", "alike")) == recorded["judged"]
    single = comparison.per_query(phase).to_frame()
    assert dict(zip(single["query_id"], single["vector"], strict=True)) == recorded["per_query"]["vector"]
    assert (single["difference"] == single["vector"] - single["legacy"]).all()
    assert (single["difference"] > 0).sum() == recorded["moved"]["better"]


def test_the_queries_that_gained_and_lost_most_by_hand() -> None:
    marks = {"a": {"7": 1, "8": 2}, "b": {"9": 1}, "c": {"7": 1}, "d": {"7": 1}}
    legacy = comparison.relevance_figures({"a": [], "b": ["9"], "c": ["1", "7"], "d": ["7"]}, marks)
    new = comparison.relevance_figures({"a": ["1", "8"], "b": ["1", "2", "9"], "c": ["1", "7"], "d": ["7"]}, marks)
    assert new["first_right"] == {"a": (2, "8"), "b": (3, "9"), "c": (2, "7"), "d": (1, "7")}
    # nDCG@10 of a: 2 / log2(3) over 2 + 1 / log2(3); of b: 1 / log2(4) after 1.
    assert comparison.moved(legacy, new) == {
        "better": 1, "worse": 1, "alike": 2,
        "gains": [{"query_id": "a", "difference": 0.4796, "before": None, "after": (2, "8")}],
        "losses": [{"query_id": "b", "difference": -0.5, "before": (1, "9"), "after": (3, "9")}],
    }  # fmt: skip
    assert comparison.moved({"per_query": {"a": 0.0}}, new) == {}, "an earlier release kept no places"


def test_without_a_full_text_column_there_is_neither_fulltext_nor_hybrid(open_phase: Open) -> None:
    phase = open_phase("80_shadow", search={"fulltext_column": None})
    assert comparison.systems(phase) == ["legacy", "exact", "vector"]
    expression = {"fulltext_column": None, "fulltext_expression": "to_tsvector('english', body)"}
    assert "hybrid" in comparison.systems(open_phase("80_shadow", search=expression))


def test_losing_classes_are_named_in_the_gate(tuned: Callable[..., Phase]) -> None:
    phase = tuned()
    shadow.apply(phase)
    recorded = phase.ledger.latest("shadow")
    assert recorded is not None
    lost = {"slice": "codes and names", "queries": 7, "difference": -0.12, "p_value": 0.04, "blame": "model"}
    phase.note("shadow", recorded | {"slices": [lost]})
    gate = next(g for g in shadow.verify(phase) if g.name == "compare.relevance_is_kept")
    assert gate.found.endswith("; legacy wins on: codes and names (7 queries, -0.120, p = 0.04, by the model)")


SLOWER = {"systems": {"vector": {"p50_ms": 28.0}, "exact": {"p50_ms": 26.66}}}


def recorded_without_the_index(phase: Phase) -> dict[str, Any]:
    """What 80_shadow records of vectors that are not searched by the index."""
    shadow.apply(phase)
    recorded = phase.ledger.latest("shadow")
    assert recorded is not None and recorded["vector_reads_the_index"] is False
    return recorded


def test_searches_that_both_read_a_small_table_whole_are_not_told_apart_by_chance(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    articles.execute(
        sql.SQL("ALTER DATABASE {} SET random_page_cost = 4").format(sql.Identifier(articles.info.dbname))
    )
    recorded = recorded_without_the_index(tuned())
    assert str(shadow._index_pays(recorded | SLOWER)) == (
        "PASS    compare.vector_is_not_slower_than_exact   vector\n"
        "  found   p50 28.00 ms, exact 26.66 ms; neither reads the index: so few rows are cheaper to read as a"
        " whole\n"
        "  needed  at most 26.66 ms"
    )
    assert shadow._index_pays(SLOWER).verdict == "FAIL"


def test_a_table_read_whole_for_another_cause_is_no_excuse(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = tuned()
    articles.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'articles_embedding_hnsw'::regclass")
    recorded = recorded_without_the_index(phase)
    assert str(shadow._index_pays(recorded | SLOWER)) == (
        "FAIL    compare.vector_is_not_slower_than_exact   vector\n"
        "  found   p50 28.00 ms, exact 26.66 ms; vector does not read the index: articles_embedding_hnsw is invalid:"
        " a build did not finish\n"
        "  needed  at most 26.66 ms\n"
        "  danger  the index costs writes and gains nothing\n"
        "  do      DROP INDEX CONCURRENTLY articles_embedding_hnsw; then run 60_build_index with execute: true"
    )


def test_what_a_smallest_similarity_would_keep_and_lose_is_shown(tuned: Callable[..., Phase]) -> None:
    phase = tuned()
    shown = str(shadow.apply(phase))
    found = (phase.ledger.latest("shadow") or {})["thresholds"]
    assert "what search.smallest_similarity would keep and lose" in shown and found
    kept, left_out = ([row[name] for row in found] for name in ("right_kept", "others_left_out"))
    assert kept == sorted(kept, reverse=True) and left_out == sorted(left_out)


def test_without_judgements_agreement_and_a_sheet_stand_in_their_place(
    tuned: Callable[..., Phase], tmp_path: Path
) -> None:
    phase = tuned(queries={"judgements": None})
    shown = str(shadow.apply(phase))
    recorded = phase.ledger.latest("shadow")
    assert recorded is not None and recorded["judged"] == 0 and recorded["slices"] == []
    assert recorded["thresholds"] == []
    assert set(recorded["agreement_with_legacy"]["vector"]) == {"overlap", "rbo", "tau"}
    assert "the most different answers" in shown


def test_marks_given_in_the_notebook_are_kept_and_used_like_judgements(tuned: Callable[..., Phase]) -> None:
    phase = tuned(queries={"judgements": None})
    comparison.judge(phase, "q00", "1", 1)
    comparison.judge(phase, "q00", "2", 2)
    comparison.judge(phase, "q00", "1", 0)
    assert comparison.judgements(phase.connection, phase.ledger, phase.params) == {"q00": {"1": 0, "2": 2}}
    shadow.apply(phase)
    recorded = phase.ledger.latest("shadow")
    assert recorded is not None and recorded["judged"] == 1


@pytest.mark.parametrize(("query_id", "relevance"), [("unknown", 1), ("q00", -1)])
def test_a_mark_that_fits_nothing_is_refused(open_phase: Open, query_id: str, relevance: int) -> None:
    with pytest.raises(ValueError, match="needed a query of the file and a mark from 0"):
        comparison.judge(open_phase("80_shadow"), query_id, "1", relevance)


def test_classes_of_queries(open_phase: Open, articles: psycopg.Connection[Any]) -> None:
    articles.execute("INSERT INTO articles (title) VALUES ('a heisenbug')")
    articles.execute("ANALYZE articles")
    texts = {
        "a": "cookie leaks",
        "b": "the cookie leaks on logout",
        "c": "cookie heisenbug",
        "d": "ERR_42 (strcpy)",
        "e": "getUserName leaks",
    }
    phase = open_phase("80_shadow")
    found = slices.classes(phase.connection, phase.params, [Query(i, t) for i, t in texts.items()], {"d"})
    assert found == {
        "short": ["a", "c", "d", "e"],
        "long": ["b"],
        "rare words": ["c", "d", "e"],
        "codes and names": ["d", "e"],
        "no hit in legacy": ["d"],
    }


def test_a_word_is_rare_by_its_rows_and_by_its_share(open_phase: Open, articles: psycopg.Connection[Any]) -> None:
    phase = open_phase("80_shadow")
    articles.execute("INSERT INTO articles (body) SELECT 'usual ' || n FROM generate_series(1, 1800) n")
    for word, rows in (("six", 6), ("five", 5), ("one", 1)):
        articles.execute("UPDATE articles SET body = body || ' ' || %s WHERE id <= %s", [word, rows])
    articles.execute("ANALYZE articles")
    asked = {"usual", "six", "five", "one", "nowhere"}
    # Six of two thousand rows are well below the share, and yet no rare word.
    assert slices.rare_words(phase.connection, phase.params, asked) == {"five", "one", "nowhere"}
    articles.execute("DELETE FROM articles WHERE id > 100")
    articles.execute("VACUUM ANALYZE articles")
    assert slices.rare_words(phase.connection, phase.params, asked) == {"nowhere", "usual"}, (
        "one of a hundred rows is above the share"
    )


@pytest.mark.parametrize(
    ("exact", "vector", "route", "blame"),
    [(0.2, 0.2, "vector", "model"), (0.9, 0.3, "vector", "index"), (0.9, 0.9, "hybrid", "fusion")],
)
def test_a_loss_is_blamed_on_what_loses(exact: float, vector: float, route: str, blame: str) -> None:
    ids = [f"q{i}" for i in range(6)]
    scores = {
        "legacy": dict.fromkeys(ids, 0.5),
        "exact": dict.fromkeys(ids, exact),
        "vector": dict.fromkeys(ids, vector),
        "hybrid": dict.fromkeys(ids, 0.4),
    }
    (row,) = slices.compare({"short": ids, "long": ids[:2]}, scores, route)
    assert (row["slice"], row["blame"], row[f"lost_by_{blame}"]) == ("short", blame, 6)
    assert row["difference"] == pytest.approx(scores[route]["q0"] - 0.5)


def test_a_win_is_blamed_on_nobody() -> None:
    ids = [f"q{i}" for i in range(5)]
    scores = {name: dict.fromkeys(ids, 0.5) for name in ("legacy", "exact", "vector")}
    (row,) = slices.compare({"short": ids}, scores, "vector")
    assert (row["blame"], row["lost_by_model"] + row["lost_by_index"] + row["lost_by_fusion"]) == ("", 0)


def test_rank_biased_overlap_by_hand() -> None:
    a, b = ["1", "2", "3"], ["1", "3", "9"]
    by_hand = (1 * 1 + 0.9 * 1 / 2 + 0.81 * 2 / 3) / (1 + 0.9 + 0.81)
    assert relevance_measures.rank_biased_overlap(a, b, 10) == pytest.approx(by_hand)
    assert relevance_measures.rank_biased_overlap(a, a, 10) == 1.0
    assert relevance_measures.rank_biased_overlap(a, ["7", "8"], 10) == 0.0
    assert relevance_measures.rank_biased_overlap([], [], 10) == 1.0


def test_rank_correlation_by_hand() -> None:
    assert relevance_measures.rank_correlation(["1", "2", "3"], ["1", "2", "3"], 3) == 1.0
    assert relevance_measures.rank_correlation(["1", "2", "3"], ["3", "2", "1"], 3) == -1.0
    assert relevance_measures.rank_correlation(["1", "2", "3"], ["2", "1", "3"], 3) == pytest.approx(1 / 3)
    assert relevance_measures.rank_correlation(["1", "2"], ["2", "9"], 3) is None, "one row in common has no order"


def test_the_sheet_lists_the_most_different_first() -> None:
    old = {"same": ["1", "2"], "half": ["1", "2"], "other": ["1", "2"]}
    new = {"same": ["1", "2"], "half": ["1", "9"], "other": ["8", "9"]}
    assert relevance_measures.most_different(old, new, 10, 2) == ["other", "half"]
    assert relevance_measures.agreement(old, new, 10)["overlap"] == pytest.approx((1 + 0.5 + 0) / 3, abs=1e-4)


def test_the_function_must_answer_as_legacy(open_phase: Open, articles: psycopg.Connection[Any]) -> None:
    phase = open_phase("10_baseline")
    search_function.apply(phase)
    baseline.apply(phase)
    assert baseline.verify(phase).passed
    articles.execute(
        "CREATE OR REPLACE FUNCTION runbook.articles_by_legacy(query_text text, query_embedding real[], k integer,"
        " min_similarity float8) RETURNS TABLE (key bigint, similarity float8, score float8) LANGUAGE sql"
        " AS 'SELECT 1::bigint, NULL::float8, NULL::float8'"
    )
    (failed,) = baseline.verify(phase).failed
    assert (failed.name, failed.found.split(";")[0]) == (
        "compare.function_answers_as_legacy",
        "0 of 20 queries answered alike",
    )


def test_the_function_is_compared_in_one_snapshot_while_rows_are_deleted(
    open_phase: Open, articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = open_phase("10_baseline")
    search_function.apply(phase)
    baseline.apply(phase)
    articles.execute("UPDATE articles SET title = 'gone', body = 'gone' WHERE id % 7 = 0")
    real, deleted = loop.ask, list[str]()

    def ask_and_delete(*args: Any) -> loop.Answers:
        answers = real(*args)
        for key in [keys[0] for keys in answers.keys.values() if keys and len(answers.keys) == 1]:
            articles.execute("DELETE FROM articles WHERE id = %s", [key])
            deleted.append(key)
        return answers

    monkeypatch.setattr(loop, "ask", ask_and_delete)
    assert baseline.verify(phase).passed
    assert deleted, "between the two calls that are compared"


def test_where_legacy_is_slow_the_function_is_called_three_times(
    open_phase: Open, articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = open_phase("10_baseline")
    search_function.apply(phase)
    baseline.apply(phase)
    monkeypatch.setattr(baseline, "FUNCTION_S", 0.0)
    proved = baseline.verify(phase)
    assert proved.passed
    said = next(g.found for g in proved if g.name == "compare.function_answers_as_legacy")
    assert said == "3 of 3 queries answered alike; 17 more were not called: each call takes long"


@pytest.mark.parametrize(
    ("condition", "verdict", "said"),
    [
        ("title ILIKE '%' || :query || '%'", "PASS", "it works, and misses what users ask"),
        ("title ILIKE ':' || :query || ':'", "FAIL", "0 of 20 queries have an answer"),
    ],
)
def test_legacy_that_finds_nothing_is_a_reason_to_migrate_unless_it_is_broken(
    open_phase: Open, articles: psycopg.Connection[Any], condition: str, verdict: str, said: str
) -> None:
    articles.execute("UPDATE articles SET title = 'zebra ' || id, body = 'a horse with stripes' WHERE title <> ''")
    phase = open_phase("10_baseline", legacy={"query": f"SELECT id FROM articles WHERE {condition} LIMIT :k"})
    search_function.apply(phase)
    baseline.apply(phase)
    recorded, answers = baseline.verify(phase)
    assert (recorded.verdict, answers.verdict) == (verdict, "PASS")
    assert said in recorded.found


def test_relevance_is_that_of_the_judgements(tuned: Callable[..., Phase]) -> None:
    phase = tuned()
    queries = query_set.sample(query_set.read_queries(phase.params), 1000)
    result = comparison.measure(phase.connection, phase.ledger, phase.params, ["legacy"])
    judged = [json.loads(line) for line in phase.params.queries.judgements.read_text().splitlines()]  # type: ignore[union-attr]
    assert set(result["legacy"]["per_query"]) == {j["query_id"] for j in judged} == {q.query_id for q in queries}
    assert result["legacy"]["nDCG@10"] == 1.0, "every judged row holds the words of its query"


def test_legacy_is_asked_once_a_query_and_what_the_baseline_knows_is_not_asked_again(
    open_phase: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = open_phase("80_shadow")
    legacy, asked = statements.legacy_statement(phase.connection, phase.params).as_string(), list[str]()
    real = loop.ask

    def ask(connection: Any, params: Any, statement: Any, queries: Any, *others: Any) -> loop.Answers:
        if not callable(statement) and statement.as_string() == legacy:
            asked.extend(q.query_id for q in queries)
        return real(connection, params, statement, queries, *others)

    monkeypatch.setattr(loop, "ask", ask)
    monkeypatch.setattr(comparison, "CHEAP_S", 0.0)  # dear, as on a large table
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index, tune):
        module.apply(phase)
    baseline.apply(phase)
    assert baseline.verify(phase).passed
    assert len(asked) == len(set(asked)) == 40, "for answers, times and relevance together"
    asked.clear()
    shadow.apply(phase)
    assert len(asked) == len(set(asked)) == phase.params.queries.sample == 20, "the timed ones, beside the others"
    comparison.judge(phase, "q00", "7", 1)
    asked.clear()
    shadow.apply(phase)
    assert len(asked) == len(set(asked)) == 40, "judged otherwise, its relevance is another"


def test_a_slow_legacy_search_is_given_its_time_and_not_more(
    open_phase: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "SELECT id FROM articles, pg_sleep(0.1) WHERE body ILIKE '%' || :query || '%' ORDER BY id LIMIT :k"
    phase = open_phase("10_baseline", legacy={"query": query}, queries={"baseline_minutes": 0.02})
    search_function.apply(phase)
    baseline.apply(phase)
    said = capsys.readouterr().out
    recorded = phase.ledger.latest("baseline") or {}
    assert "  40 legacy calls, about " in said and "were not asked: the time was up" in said
    assert 3 <= len(recorded["per_query"]) < 13 and len(recorded["left"]) + len(recorded["per_query"]) == 40
    measured = next(iter(baseline.verify(phase)))
    assert f"{len(recorded['left'])} queries did not fit into queries.baseline_minutes" in measured.found


def test_the_slowdown_that_is_accepted_is_a_parameter_and_the_gate_names_the_route_that_would_pass(
    make_params: Callable[..., Any],
) -> None:
    recorded = {
        "systems": {
            "legacy": {"p95_ms": 26.0, "nDCG@10": 0.042},
            "vector": {"p95_ms": 20.0, "nDCG@10": 0.31},
            "hybrid": {"p95_ms": 227.0, "nDCG@10": 0.369},
        }
    }
    assert str(shadow._is_fast_enough(recorded, "hybrid", 1.0)) == (
        "FAIL    compare.hybrid_is_not_slower_than_legacy   hybrid\n"
        "  found   p95 227.00 ms, at least 227.00 ms with 99 % confidence, nDCG@10 0.369, legacy 26.00 ms,"
        " nDCG@10 0.042\n"
        "  needed  at most 31.00 ms, 1 × legacy (cut_over.largest_slowdown), with 5 ms for noise\n"
        "  danger  users wait longer than today\n"
        "  do      cut_over.route: vector would pass (p95 20.00 ms, nDCG@10 0.310); or accept it by"
        " cut_over.largest_slowdown: 8.8, if its answers are worth the wait; or look at the plan in 70_tune"
    )
    assert shadow._is_fast_enough(recorded, "hybrid", 8.8).verdict == "PASS"
    stray = recorded["systems"] | {"hybrid": {"p95_ms": 227.0, "p95_at_least_ms": 25.0, "nDCG@10": 0.369}}
    assert shadow._is_fast_enough({"systems": stray}, "hybrid", 1.0).verdict == "PASS", "a stray call or two"
    one_slow_call = relevance_measures.latency([0.026] * 29 + [10.0])
    assert (
        shadow._is_fast_enough(
            {"systems": recorded["systems"] | {"legacy": one_slow_call | {"nDCG@10": 0.042}}}, "hybrid", 1.0
        ).verdict
        == "FAIL"
    ), "one slow call of the legacy search allows the new one nothing"


def test_a_cheap_legacy_search_is_timed_in_turn_with_the_others_and_a_dear_one_once(
    monkeypatch: pytest.MonkeyPatch, tuned: Callable[..., Phase]
) -> None:
    phase = tuned()
    rounds: list[list[str]] = []
    asked = loop.in_rounds
    monkeypatch.setattr(loop, "in_rounds", lambda variants, *a: rounds.append(list(variants)) or asked(variants, *a))
    of = phase.connection, phase.ledger, phase.params, ["legacy", "vector"]
    cheap = comparison.measure(*of)
    monkeypatch.setattr(comparison, "CHEAP_S", 0.0)
    dear = comparison.measure(*of)
    assert rounds == [["legacy", "vector"], ["vector"]]
    assert cheap["legacy"]["answers"] == dear["legacy"]["answers"], "the same answers, however often they are asked"
