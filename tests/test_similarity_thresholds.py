"""What a smallest similarity keeps and loses, worked out by hand."""

from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql

from runbook_lib.benchmark.loop import Answers
from runbook_lib.benchmark.query_set import Query
from runbook_lib.migrate import similarity_thresholds
from runbook_lib.params import Params
from runbook_lib.search import statements

MARKS = {"a": {"1": 1, "2": 0}, "b": {"3": 2}}


def answers(rows: list[list[tuple[str, float]]]) -> Answers:
    return Answers([Query("a", "x"), Query("b", "y")], rows, [0.001, 0.001])


def test_a_threshold_keeps_right_answers_and_leaves_out_others() -> None:
    # Similarities .9 (right), .5, .4 of a; .6, .3 (right) of b.
    found = similarity_thresholds.kept_and_lost(
        answers([[("1", 0.1), ("2", 0.5), ("9", 0.6)], [("8", 0.4), ("3", 0.7)]]), MARKS, "cosine"
    )
    by = {row["min_similarity"]: row for row in found}
    assert list(by) == [0.34, 0.4, 0.5, 0.6, 0.78]
    assert by[0.5] == {
        "min_similarity": 0.5, "right_kept": 0.5, "others_left_out": 0.333, "without_rows": 0, "queries": 2,
    }  # fmt: skip
    assert (by[0.78]["right_kept"], by[0.78]["others_left_out"], by[0.78]["without_rows"]) == (0.5, 1.0, 1)


def test_without_rows_or_right_answers_nothing_is_made_up() -> None:
    assert similarity_thresholds.kept_and_lost(answers([[], []]), MARKS, "cosine") == []
    (row,) = similarity_thresholds.kept_and_lost(answers([[("9", 0.5)], []]), MARKS, "cosine")
    assert (row["right_kept"], row["others_left_out"], row["without_rows"]) == (None, 0.0, 1)


@pytest.mark.parametrize(
    ("kind", "distance", "similarity"), [("cosine", 0.25, 0.75), ("l2", 3.0, 0.25), ("inner_product", -2.0, 2.0)]
)
def test_similarity_is_that_of_the_search_function(
    database: str, make_params: Callable[..., Params], kind: str, distance: float, similarity: float
) -> None:
    params = make_params(vector={"distance": kind})
    by_distance = statements.similarity(params, sql.Literal(distance))
    by_score = statements.similarity_of_score(params, sql.Literal(-distance))
    with psycopg.connect(database) as connection:
        row = connection.execute(sql.SQL("SELECT ({})::real, ({})::real").format(by_distance, by_score)).fetchone()
    assert row == (similarity, similarity)
    assert similarity_thresholds.similarity(distance, kind) == similarity
