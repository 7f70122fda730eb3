"""Batches follow the measured time in bounded steps; a pause is said once for each reason, and is in the ledger."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from runbook_lib.backfill import throttle
from runbook_lib.backfill.health import Answer, State
from runbook_lib.backfill.throttle import FEWEST_ROWS, LARGEST_CUT, LARGEST_GROWTH, Pace, Pause, in_turn
from runbook_lib.core.gates import PausedTooLong
from runbook_lib.core.phase import Phase

Open = Callable[..., Phase]
ROW = Answer("control row", State.STOP, "pause is true; month end")


def lag(size: int) -> Answer:
    return Answer("replica lag", State.STOP, f"standby is {size} MB behind")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that a pause reads."""

    def at(seconds: float) -> None:
        monkeypatch.setattr(throttle.time, "monotonic", lambda: 100.0 + seconds)

    at(0.0)
    return at


def test_it_is_said_once_a_reason_and_once_at_its_end(
    open_phase: Open, clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    phase = open_phase("50_backfill")
    one = Pause(phase)
    capsys.readouterr()
    for second, stops in enumerate([[lag(9)], [lag(8)], [lag(7), ROW], [lag(6), ROW], [ROW], [ROW], [ROW], [ROW]]):
        clock(second)
        one.go_by(stops)
    clock(9.0)
    one.go_by([])
    one.go_by([])
    assert capsys.readouterr().out.splitlines() == [
        "  paused: replica lag: standby is 9 MB behind",
        "  paused for 2.0 s: replica lag: standby is 7 MB behind; control row: pause is true; month end",
        "  the pause is over after 9.0 s",
    ]
    assert one.past == [("replica lag: standby is 9 MB behind", 9.0)]
    clock(20.0)
    one.go_by([lag(5)])
    assert capsys.readouterr().out == "  paused: replica lag: standby is 5 MB behind\n", "another pause says it anew"
    clock(21.0)
    one.end()
    noted = [e["body"] for e in phase.ledger.entries() if e["kind"] == "pause"]
    assert noted == [
        {"reason": "replica lag: standby is 9 MB behind", "seconds": 9.0},
        {"reason": "replica lag: standby is 5 MB behind", "seconds": 1.0},
    ]


def test_one_that_is_too_long_stops_the_run_and_is_written_down(
    open_phase: Open, clock: Callable[[float], None]
) -> None:
    phase = open_phase("50_backfill", health={"longest_pause_minutes": 1})
    one = Pause(phase)
    one.go_by([ROW])
    clock(61.0)
    with pytest.raises(PausedTooLong, match="pause is true; month end"):
        one.go_by([ROW])
    one.end()
    latest: Any = phase.ledger.latest("pause")
    assert latest == {"reason": str(ROW), "seconds": 61.0}


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
