"""Batch size follows measured time towards its target, in bounded steps."""

import time

from runbook_lib.backfill.batch_size import FEWEST_ROWS, LARGEST_CUT, LARGEST_GROWTH, Pace, in_turn

PACE = Pace(rows=100, target_s=0.1, most_rows=1000)


def test_a_fast_batch_lets_it_grow_by_one_step() -> None:
    assert PACE.after(100, 0.001).rows == 100 * LARGEST_GROWTH


def test_a_slow_batch_cuts_it_by_one_step() -> None:
    assert PACE.after(100, 10.0).rows == 100 * LARGEST_CUT


def test_in_between_it_meets_the_target() -> None:
    assert PACE.after(100, 0.125).rows == 80


def test_one_fast_batch_among_slow_ones_does_not_raise_it() -> None:
    slow = PACE.after(100, 0.1)
    assert slow.after(100, 0.01).rows < 150


def test_it_stays_within_its_bounds() -> None:
    pace = PACE
    for _ in range(20):
        pace = pace.after(pace.rows, 1e-6)
    assert pace.rows == 1000
    for _ in range(20):
        pace = pace.after(pace.rows, 100.0)
    assert pace.rows == FEWEST_ROWS


def test_an_empty_batch_says_nothing() -> None:
    assert PACE.after(0, 5.0) == PACE


def test_keys_come_in_turns_as_long_as_the_work_between_them_says() -> None:
    turns = []
    for keys in in_turn(list(range(200)), Pace(rows=100, target_s=0.01, most_rows=1000)):
        turns.append(keys)
        time.sleep(0.02 if len(turns) == 1 else 0)
    assert [key for keys in turns for key in keys] == list(range(200))
    assert len(turns[0]) == 100 and len(turns[1]) <= 50, "100 rows took twice the time"
    assert list(in_turn([], PACE)) == []
