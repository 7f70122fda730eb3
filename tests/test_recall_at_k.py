"""Recall: hand-worked values, an independent count, and rows at one distance."""

import math
from itertools import combinations

import numpy as np
import pytest

from runbook_lib.benchmark import recall_at_k
from runbook_lib.benchmark.recall_at_k import Nearest

A_TIE = Nearest(("a", "b", "c"), (0.1, 0.2, 0.3), 9)


@pytest.mark.parametrize(
    ("got", "share"),
    [
        ([("a", 0.1), ("b", 0.2), ("c", 0.3)], 1),
        ([("c", 0.3), ("a", 0.1), ("b", 0.2)], 1),
        ([("a", 0.1), ("b", 0.2), ("other", 0.3)], 1),
        ([("a", 0.1), ("b", 0.2), ("other", 0.31)], 2 / 3),
        ([("a", 0.1), ("c", 0.3), ("other", 0.3)], 2 / 3),  # b was nearer than the tie, and was missed
        ([("a", 0.1), ("newer", 0.05), ("b", 0.2)], 1),  # a row that came after the exact pass
        ([("a", 0.1), ("a", 0.1), ("a", 0.1)], 1 / 3),
        ([("a", 0.1)], 1 / 3),
        ([("a", None), ("b", None), ("other", None)], 2 / 3),
        ([("a", 0.4), ("b", 0.2), ("other", math.nan)], 2 / 3),  # a key counts whatever its distance was rounded to
        ([("a", 0.1), ("b", 0.2), ("other", 0.3 + 9e-6)], 1),
        ([], 0),
    ],
)
def test_of_three_exact_answers_by_hand(got: recall_at_k.Rows, share: float) -> None:
    assert recall_at_k.share(A_TIE, got) == pytest.approx(share)


@pytest.mark.parametrize(
    ("exact", "got", "share"),
    [
        # Among the exact answers: it is taken from both sides.
        (Nearest(("own", "a", "b"), (0.0, 0.1, 0.2), 9), [("own", 0.0), ("a", 0.1), ("x", 0.2)], 1),
        (Nearest(("own", "a", "b"), (0.0, 0.1, 0.2), 9), [("own", 0.0), ("a", 0.1), ("x", 0.3)], 0.5),
        (Nearest(("a", "own"), (0.1, 0.2), 9), [("own", 0.2), ("x", 0.2)], 0),
        (Nearest(("own",), (0.0,), 1), [("own", 0.0)], math.nan),
        # One of many copies, so that it is not among them: it took the place of one.
        (Nearest(("a", "b"), (0.0, 0.0), 9), [("own", 0.0), ("x", 0.0)], 1),
        (Nearest(("a", "b"), (0.0, 0.0), 9), [("own", 0.0), ("x", 0.1)], 0),
        # Farther than the exact answers, as by inner product it may be: it took a place from one of them.
        (Nearest(("a", "b"), (-9.0, -8.0), 9), [("a", -9.0), ("own", -1.0)], 0.5),
    ],
)
def test_the_row_that_a_question_was_made_from_counts_on_neither_side(
    exact: Nearest, got: recall_at_k.Rows, share: float
) -> None:
    assert recall_at_k.share(exact, got, "own") == pytest.approx(share, nan_ok=True)


def test_what_has_nothing_to_be_found_is_left_out_and_recall_is_never_perfect_by_emptiness() -> None:
    nothing = Nearest((), (), 0)
    assert math.isnan(recall_at_k.share(nothing, [("a", 0.1)]))
    assert recall_at_k.of([A_TIE, nothing], [[("a", 0.1)], [("b", 0.1)]]).of_the_target == pytest.approx(1 / 3)
    assert recall_at_k.of([nothing, nothing], [[], []]).of_the_target == 0.0
    assert recall_at_k.mean([math.nan, math.nan]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        recall_at_k.of([A_TIE], [])
    assert recall_at_k.of([A_TIE, nothing], [[("a", 0.1), ("a", 0.1), ("b", 0.2)], []]).short == 1


def test_rows_without_a_distance_are_in_no_exact_answer() -> None:
    exact = recall_at_k.of_rows([("a", 0.5), ("zero", math.nan), ("far", math.inf), ("none", None)], "cosine")
    assert (exact.keys, exact.distances, exact.same) == (("a",), (0.5,), recall_at_k.SAME_DISTANCE)


@pytest.mark.parametrize(("distance", "same"), [("cosine", 1e-5), ("l2", 2e-11), ("inner_product", 2e-11)])
def test_vectors_of_any_length_are_told_apart(distance: str, same: float) -> None:
    exact = recall_at_k.of_rows([("a", 1e-6), ("b", 2e-6)], distance)
    assert exact.same == pytest.approx(same)
    as_near = recall_at_k.share(exact, [("a", 1e-6), ("other", 3e-6)])
    assert as_near == (1 if distance == "cosine" else 0.5)


def _independent(distances: np.ndarray, got: tuple[int, ...], k: int) -> float:
    """The largest overlap with any k rows than which no other row is strictly nearer: by trying all of them."""
    nearest = np.sort(distances)[:k].sum()
    sets = [s for s in combinations(range(len(distances)), k) if np.isclose(distances[list(s)].sum(), nearest)]
    return max(len(set(s) & set(got)) for s in sets) / k


def test_it_is_the_largest_overlap_with_any_right_answer() -> None:
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(300):
        rows, k = int(rng.integers(4, 9)), int(rng.integers(1, 5))
        # Few different distances, so that most answers have ties.
        distances = rng.integers(0, 4, rows) / 8
        order = np.lexsort((rng.permutation(rows), distances))
        exact = Nearest(tuple(map(str, order[:k])), tuple(map(float, distances[order[:k]])), rows)
        got = tuple(map(int, rng.permutation(rows)[: min(k, rows)]))
        mine = recall_at_k.share(exact, [(str(i), float(distances[i])) for i in got])
        assert mine == pytest.approx(_independent(distances, got, min(k, rows)))
        seen.add(mine)
    assert len(seen) > 5
