"""A pause is said once for each reason, not again every few seconds, and stands in the ledger with its length."""

from collections.abc import Callable
from typing import Any

import pytest

from runbook_lib.backfill import throttle
from runbook_lib.backfill.health import Answer, State
from runbook_lib.backfill.throttle import Pause
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
