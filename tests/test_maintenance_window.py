"""The maintenance window: inside, outside, over midnight, and across a change of the clock."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from runbook_lib.core import db, maintenance_window
from runbook_lib.core.gates import BadInput, OutsideWindow
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from tests.conftest import write_params


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("hours", "zone", "moment", "is_open", "opens"),
    [
        ("22:00-05:00", "UTC", "2026-11-22T23:30", True, "2026-11-22T23:30+00:00"),
        ("22:00-05:00", "UTC", "2026-11-22T04:59", True, "2026-11-22T04:59+00:00"),
        ("22:00-05:00", "UTC", "2026-11-22T05:00", False, "2026-11-22T22:00+00:00"),
        ("01:00-03:00", "UTC", "2026-11-22T03:00", False, "2026-11-23T01:00+00:00"),
        ("22:00-05:00", "Europe/Berlin", "2026-07-01T20:00", True, "2026-07-01T22:00+02:00"),
        ("22:00-05:00", "Europe/Berlin", "2026-11-22T20:59", False, "2026-11-22T22:00+01:00"),
        # In the night of 29 March 2026 clocks go from 02:00 to 03:00 there.
        ("02:30-05:00", "Europe/Berlin", "2026-03-29T01:00", True, "2026-03-29T03:00+02:00"),
    ],
)
def test_open_or_when_it_opens(
    make_params: Callable[..., Params], hours: str, zone: str, moment: str, is_open: bool, opens: str
) -> None:
    p = make_params(run={"window": hours, "time_zone": zone})
    assert (maintenance_window.is_open(p, at(moment)), maintenance_window.opens_at(p, at(moment)).isoformat()) == (
        is_open,
        datetime.fromisoformat(opens).isoformat(),
    )


@pytest.mark.attack
@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(("hours", "verdict"), [(0.05, "PASS"), (3, "FAIL"), (-3, "FAIL")])
def test_a_clock_that_differs_from_the_servers_keeps_no_window(
    make_params: Callable[..., Params], hours: float, verdict: str
) -> None:
    p = make_params(run={"window": "22:00-05:00"})
    with db.connect(p, "test") as connection:
        (found,) = maintenance_window.clocks_agree(connection, p, lambda: datetime.now(UTC) + timedelta(hours=hours))
        assert found.verdict == verdict and ("ahead of" if hours > 0 else "behind") in found.found
        assert not list(maintenance_window.clocks_agree(connection, make_params()))


@pytest.mark.attack
def test_a_clock_that_goes_back_while_a_run_waits_only_makes_it_wait(make_params: Callable[..., Params]) -> None:
    p = make_params(run={"window": "22:00-05:00"})
    now, jumps = [at("2026-11-22T21:58:50")], [timedelta(hours=-7)]

    def sleep(seconds: float) -> None:
        now[0] += timedelta(seconds=seconds) + (jumps.pop() if jumps else timedelta(0))

    assert maintenance_window.enter(p, say=lambda _: None, clock=lambda: now[0], sleep=sleep) >= 0
    assert now[0] == at("2026-11-22T22:00")


def test_without_a_window_it_is_always_open(make_params: Callable[..., Params]) -> None:
    assert maintenance_window.is_open(make_params()) and maintenance_window.enter(make_params()) == 0


def test_waiting_ends_when_it_opens(make_params: Callable[..., Params]) -> None:
    p = make_params(run={"window": "22:00-05:00"})
    now, said = [at("2026-11-22T21:58:50")], list[str]()

    def sleep(seconds: float) -> None:
        now[0] += timedelta(seconds=seconds)

    waited = maintenance_window.enter(p, say=said.append, clock=lambda: now[0], sleep=sleep)
    assert (waited, now[0]) == (70.0, at("2026-11-22T22:00"))
    assert said == ["  waiting for the maintenance window 22:00-05:00, which opens at 2026-11-22 22:00 UTC"]


def test_stopping_says_when_to_come_again(make_params: Callable[..., Params]) -> None:
    p = make_params(run={"window": "22:00-05:00", "time_zone": "Europe/Berlin", "outside_window": "stop"})
    with pytest.raises(OutsideWindow) as error:
        maintenance_window.enter(p, clock=lambda: at("2026-11-22T12:00"))
    assert str(error.value) == (
        "\n  found   13:00 in Europe/Berlin"
        "\n  needed  the maintenance window, 22:00-05:00; it opens at 2026-11-22 22:00 CET"
        "\n  danger  the work would meet the load that the window keeps it away from"
        "\n  do      run the same command again then; what was done stays done"
    )


@pytest.mark.parametrize(
    ("run", "needed"),
    [
        ({"window": "22:00-22:00"}, "run.window opens and closes at the same minute; leave it out to be always open"),
        (
            {"time_zone": "Europe/Berlim"},
            "a name of the IANA time zone database, for instance Europe/Berlin",
        ),
        ({"phase_timeout_minutes": {"50_backfil": 1}}, "50_backfil: did you mean 50_backfill?"),
    ],
)
def test_settings_that_would_not_hold_are_refused(tmp_path: Path, run: dict[str, object], needed: str) -> None:
    with pytest.raises(BadInput) as error:
        load_params(write_params(tmp_path, run=run))
    assert error.value.needed == needed


def test_a_time_limit_is_of_one_phase_or_of_every_phase(make_params: Callable[..., Params]) -> None:
    assert make_params().run.timeout_minutes("50_backfill") is None
    assert make_params(run={"phase_timeout_minutes": 5}).run.timeout_minutes("50_backfill") == 5
    some = make_params(run={"phase_timeout_minutes": {"every_phase": 5, "50_backfill": 0.5}}).run
    assert (some.timeout_minutes("50_backfill"), some.timeout_minutes("70_tune")) == (0.5, 5)
