"""Queries, judgements and measures, against values worked out by hand and a naive implementation."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.benchmark import query_set, relevance_measures
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput
from runbook_lib.params import Params

MakeParams = Callable[..., Params]

LOG2_3 = math.log2(3)


def write(path: Path, *lines: object) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_queries_keep_the_order_of_the_file_and_their_ids_become_text(make_params: MakeParams) -> None:
    p = make_params()
    write(
        p.queries.file, {"query_id": "b", "text": "two words"}, "", {"query_id": 1, "text": "a\u2028b", "note": "x"}
    )
    assert query_set.read_queries(p) == [Query("b", "two words"), Query("1", "a\u2028b")]


def test_every_malformed_query_is_named_with_its_line(make_params: MakeParams) -> None:
    p = make_params()
    path = p.queries.file
    write(
        path,
        {"query_id": "a", "text": "fine"},
        {"query_id": "b", "text": " "},
        '{"query_id": "c", "text": ',
        '["d", "text"]',
        {"id": "e", "text": "x"},
        {"query_id": "a", "text": "again"},
        {"query_id": True, "text": "x"},
        '{"query_id": "f", "text": "smile \\ud83d cut"}',
        '{"query_id": "g", "text": "a\\u0000b"}',
        '{"query_id": "h\\udc00", "text": "x"}',
    )
    with pytest.raises(BadInput) as error:
        query_set.read_queries(p)
    found = [(g.subject.removeprefix(str(path)), g.found, g.needed) for g in error.value.problems]
    line = '{"query_id": …, "text": …}'
    assert found == [
        (":2", 'text: " "', "a text that is not empty"),
        (":3", "not JSON: Expecting value at column 27", line),
        (":4", "a JSON list", line),
        (":5", "no query_id, but id, text", "a query_id: text or a whole number"),
        (":6", "query_id a again, as in line 1", "each query_id once"),
        (":7", "query_id: true", "a query_id: text or a whole number"),
        (
            ":8",
            "text: half of a surrogate pair, \\ud83d, at position 7: no character",
            "a text that can be stored in UTF-8",
        ),
        (
            ":9",
            "text: a NUL character at position 2, which PostgreSQL stores in no text",
            "a text that can be stored in UTF-8",
        ),
        (
            ":10",
            "query_id: half of a surrogate pair, \\udc00, at position 2: no character",
            "a query_id: text or a whole number",
        ),
    ]


def test_a_judgement_of_an_unknown_query_is_refused_in_the_words_of_a_gate(make_params: MakeParams) -> None:
    p = make_params()
    path = p.queries.judgements
    assert path is not None
    write(path, {"query_id": "q00", "key": 1, "relevance": 1}, {"query_id": "q99", "key": "1", "relevance": 1})
    with pytest.raises(BadInput) as error:
        query_set.read_judgements(p)
    assert str(error.value) == (
        f"\nFAIL    evaluate.judgements_are_readable   {path}:2\n"
        "  found   query_id q99\n"
        "  needed  a query_id of queries.jsonl\n"
        "  danger  relevance would be measured on other queries or answers than those meant; nothing was started\n"
        "  do      fix the file and rerun the same command"
    )


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"query_id": "q00", "relevance": 1}, "no key, but query_id, relevance"),
        ({"query_id": "q00", "key": 1.5, "relevance": 1}, "key: 1.5"),
        ({"query_id": "q00", "key": "1"}, "no relevance, but query_id, key"),
        ({"query_id": "q00", "key": "1", "relevance": -1}, "relevance: -1"),
        ({"query_id": "q00", "key": "1", "relevance": True}, "relevance: true"),
        ({"query_id": "q00", "key": 7, "relevance": 0}, "query q00 and key 7 again"),
    ],
)
def test_a_malformed_judgement_is_refused(make_params: MakeParams, record: dict[str, Any], found: str) -> None:
    p = make_params()
    assert p.queries.judgements is not None
    write(p.queries.judgements, {"query_id": "q00", "key": "7", "relevance": 1}, record)
    with pytest.raises(BadInput) as error:
        query_set.read_judgements(p)
    assert [(g.subject, g.found) for g in error.value.problems] == [(f"{p.queries.judgements}:2", found)]


def test_a_missing_file_and_an_empty_one_are_refused(make_params: MakeParams) -> None:
    p = make_params()
    p.queries.file.write_text("\n")
    with pytest.raises(BadInput) as error:
        query_set.read_queries(p)
    assert (error.value.problems.gates[0].subject, error.value.found) == (str(p.queries.file), "no queries")
    p.queries.file.unlink()
    with pytest.raises(BadInput) as error:
        query_set.read_queries(p)
    assert error.value.found == "No such file or directory"


def test_without_a_judgement_file_nothing_is_judged(make_params: MakeParams) -> None:
    assert query_set.read_judgements(make_params(queries={"judgements": None})) == {}


@pytest.mark.parametrize(
    ("key_type", "there", "judged", "unknown"),
    [
        (
            "bigint",
            ["7", "-3"],
            ["7", "8", "007", "seven", "-3", "9" * 30, "٧"],
            ["8", "007", "seven", "9" * 30, "٧"],
        ),
        (
            "uuid",
            ["6ecd8c99-4036-403d-bf84-cf8400f67836"],
            ["6ecd8c99-4036-403d-bf84-cf8400f67836", "6ECD8C99-4036-403D-BF84-CF8400F67836", "6ecd"],
            ["6ECD8C99-4036-403D-BF84-CF8400F67836", "6ecd"],
        ),
        ("text", ["a'b", "100%"], ["a'b", "100%", "A'B", "x\0"], ["A'B", "x\0"]),
        ("varchar(3)", ["abc"], ["abc", "abcd"], ["abcd"]),
        ("char(3)", ["abc"], ["abc", "abcd"], ["abcd"]),
    ],
)
def test_judged_keys_that_the_table_does_not_hold_are_found(
    database: str, make_params: MakeParams, key_type: str, there: list[str], judged: list[str], unknown: list[str]
) -> None:
    p = make_params(target={"schema": 'Odd "%" Schema', "table": "Some Table", "key": 'the "Key" %s'})
    table = sql.Identifier(p.target.schema_, p.target.table)
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(p.target.schema_)))
        create = sql.SQL("CREATE TABLE {} ({} {} PRIMARY KEY)")
        admin.execute(create.format(table, sql.Identifier(p.target.key), sql.SQL(key_type)))
        for key in there:
            admin.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(table, sql.Literal(key)))
    with db.connect(p, "test") as connection:
        assert query_set.unknown_keys(connection, p, {"q": dict.fromkeys(judged, 1)}) == unknown


def test_unknown_keys_come_from_the_file_where_no_judgements_are_given(
    articles: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    articles.execute("DELETE FROM articles WHERE id IN (3, 4)")
    p = make_params()
    with db.connect(p, "test") as connection:
        assert query_set.unknown_keys(connection, p) == ["3", "4"]
        assert query_set.unknown_keys(connection, p, {}) == []


def test_a_sample_is_the_same_whatever_the_order_and_lies_within_a_larger_one() -> None:
    queries = [Query(f"q{i}", "text") for i in range(100)]
    shuffled = random.Random(1).sample(queries, k=100)
    assert query_set.sample(shuffled, 10) == query_set.sample(queries, 10) == query_set.sample(queries, 20)[:10]
    assert len(query_set.sample(queries, 1000)) == 100


def test_measures_agree_with_values_worked_out_by_hand() -> None:
    judgements = {"first": {"1": 1}, "second": {"1": 1, "2": 1}}
    run = {"first": ["1"], "second": ["9", "2"]}
    r = relevance_measures.relevance(run, judgements)
    second = (1 / LOG2_3) / (1 + 1 / LOG2_3)
    assert r.per_query == pytest.approx({"first": 1.0, "second": second})
    assert r.measures == pytest.approx(
        {"nDCG@10": (1 + second) / 2, "RR": 0.75, "R@10": 0.75, "R@100": 0.75, "P@10": 0.1}
    )
    assert r.queries == 2


def test_a_query_without_an_answer_scores_zero_and_is_never_dropped() -> None:
    judgements = {"answered": {"1": 1}, "empty": {"1": 1}, "missing": {"1": 1}, "nothing relevant": {"1": 0}}
    r = relevance_measures.relevance({"answered": ["1"], "empty": [], "nothing relevant": ["1"]}, judgements)
    assert r.per_query == {"answered": 1.0, "empty": 0.0, "missing": 0.0, "nothing relevant": 0.0}
    assert r.measures["RR"] == 0.25
    assert relevance_measures.relevance({}, judgements).measures == dict.fromkeys(relevance_measures.MEASURES, 0.0)


def test_a_query_without_judgements_is_not_looked_at() -> None:
    assert relevance_measures.relevance({"a": ["1"], "other": ["2"]}, {"a": {"1": 1}}).per_query == {"a": 1.0}


def test_a_key_answered_twice_fills_a_place_and_counts_once() -> None:
    r = relevance_measures.relevance({"a": ["1", "1", "2"]}, {"a": {"1": 1, "2": 1}}, ["P@2", "R@2"])
    assert r.measures == {"P@2": 0.5, "R@2": 0.5}
    assert r.per_query["a"] == pytest.approx((1 + 1 / 2) / (1 + 1 / LOG2_3))


def test_relevance_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one judged query"):
        relevance_measures.relevance({}, {})


def naive_ndcg(keys: list[str], judged: dict[str, int], k: int) -> float:
    gain = sum(judged.get(key, 0) / math.log2(i + 2) for i, key in enumerate(keys[:k]))
    ideal = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(judged.values(), reverse=True)[:k]))
    return gain / ideal if ideal else 0.0


def test_measures_agree_with_a_naive_implementation_on_graded_judgements() -> None:
    rng = random.Random(7)
    keys = [str(i) for i in range(300)]
    judgements = {f"q{i}": {k: rng.randint(0, 3) for k in rng.sample(keys, rng.randint(1, 40))} for i in range(60)}
    run = {q: rng.sample(keys, rng.choice([0, 1, 5, 10, 150])) for q in judgements}
    r = relevance_measures.relevance(run, judgements)
    assert r.per_query == pytest.approx({q: naive_ndcg(run[q], judged, 10) for q, judged in judgements.items()})
    right = {q: {k for k, g in judged.items() if g > 0} for q, judged in judgements.items()}

    def mean(values: list[float]) -> float:
        return sum(values) / len(judgements)

    assert r.measures["P@10"] == pytest.approx(mean([len(right[q] & set(run[q][:10])) / 10 for q in run]))
    for k in (10, 100):
        shares = [len(right[q] & set(run[q][:k])) / len(right[q]) if right[q] else 0.0 for q in run]
        assert r.measures[f"R@{k}"] == pytest.approx(mean(shares))
    firsts = [next((1 / (i + 1) for i, key in enumerate(run[q]) if key in right[q]), 0.0) for q in run]
    assert r.measures["RR"] == pytest.approx(mean(firsts))


def test_a_paired_comparison_agrees_with_an_independent_implementation() -> None:
    rng = random.Random(3)
    old = {f"q{i}": rng.random() for i in range(80)}
    new = {q: min(1.0, v + rng.gauss(0.04, 0.15)) for q, v in old.items()}
    found = relevance_measures.paired(old, new)
    differences = [new[q] - old[q] for q in old]
    assert found.difference == pytest.approx(sum(differences) / 80)
    # By scipy 1.17.1 on the same differences: permutation_test with 2,000,000 samples, and ttest_1samp's interval.
    assert found.p_value == pytest.approx(0.4177, abs=0.025)
    assert (found.low, found.high) == pytest.approx((-0.01787, 0.04282), abs=0.005)
    assert relevance_measures.paired(old, new) == found
    back = relevance_measures.paired(new, old)
    assert (back.difference, back.p_value) == (-found.difference, found.p_value)


def test_equal_searches_differ_by_nothing_and_certain_ones_surely() -> None:
    old = {f"q{i}": 0.5 for i in range(50)}
    same = relevance_measures.paired(old, old)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    better = relevance_measures.paired(old, dict.fromkeys(old, 0.75))
    assert (better.difference, better.low, better.high, better.queries) == (0.25, 0.25, 0.25, 50)
    assert better.p_value < 0.001


def test_searches_on_different_queries_are_not_compared() -> None:
    with pytest.raises(ValueError, match="the same queries"):
        relevance_measures.paired({"a": 1.0}, {"b": 1.0})


def test_overlap_is_of_the_first_k_and_of_the_longer_list() -> None:
    assert relevance_measures.overlap(["1", "2", "3"], ["3", "2", "9"], 2) == 0.5
    assert relevance_measures.overlap(["1"], ["1", "2", "3", "4"], 10) == 0.25
    assert relevance_measures.overlap([], [], 10) == 1.0


def test_latency_is_in_milliseconds_by_linear_interpolation() -> None:
    found = relevance_measures.latency([i / 1000 for i in range(101)])
    assert found == pytest.approx({"p50_ms": 50, "p95_ms": 95, "p99_ms": 99, "p95_at_least_ms": 89, "n": 101})
    assert relevance_measures.latency([0.002])["p99_ms"] == pytest.approx(2)
    with pytest.raises(ValueError, match="no query was timed"):
        relevance_measures.latency([])


def test_few_times_prove_no_p95_and_many_do() -> None:
    """Binomial tables, n = 20, p = .05: five or more above with a probability of .0026, four or more with .0159."""
    slow = [0.5]
    assert relevance_measures.p95_at_least([]) is relevance_measures.p95_at_least(slow) is None, (
        "a single call may be any"
    )
    assert relevance_measures.p95_at_least(slow * 2) == pytest.approx(500), "both of two above by chance: 1 in 400"
    assert relevance_measures.p95_at_least([0.001] * 16 + slow * 4) == pytest.approx(1)
    assert relevance_measures.p95_at_least([0.001] * 15 + slow * 5) == pytest.approx(500)
    many = [i / 1e5 for i in range(100_000)]
    assert 940 < (relevance_measures.p95_at_least(many) or 0) < relevance_measures.latency(many)["p95_ms"]


def test_seven_times_prove_the_least_of_them_as_a_median_and_more_prove_more() -> None:
    """Binomial tables, p = .5: all of 7 above with a probability of .0078, of 6 with .0156; 13 of 16 with .0106."""
    times = [i / 1000 for i in range(1, 17)]
    assert relevance_measures.p50_at_least(times[:6]) is None
    assert relevance_measures.p50_at_least(times[:7]) == pytest.approx(1)
    assert relevance_measures.p50_at_least(times) == pytest.approx(3), "14 of 16: .0021"
