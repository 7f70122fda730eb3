"""The maintenance window: phases that change something start, and long loops go on, only inside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from datetime import time as clock_time
from zoneinfo import ZoneInfo

from runbook_lib.core import db
from runbook_lib.core.gates import Gates, OutsideWindow, gate
from runbook_lib.core.thresholds import apart, at_most, duration
from runbook_lib.params import Params
from runbook_lib.sql import load

CLOCK = load("refresh")["clock"]
MOST_APART_S = 300.0

# So that a wait follows a clock that is set, and a machine that slept.
LONGEST_SLEEP_S = 30.0


def is_open(params: Params, now: datetime | None = None) -> bool:
    """Is this moment inside ``run.window``? Always, where none is given. now: with a time zone."""
    if params.run.window is None:
        return True
    opens, closes = _edges(params.run.window)
    here = _local(params, now).time()
    # A window such as 22:00-05:00 reaches over midnight.
    return opens <= here < closes if opens < closes else here >= opens or here < closes


def opens_at(params: Params, now: datetime | None = None) -> datetime:
    """When the window opens next, in its own time zone; this moment, where it is open."""
    local = _local(params, now)
    if params.run.window is None or is_open(params, now):
        return local
    opens, _ = _edges(params.run.window)
    today = local.replace(hour=opens.hour, minute=opens.minute, second=0, microsecond=0)
    return today if today > local else today + timedelta(days=1)


def clocks_agree(
    connection: db.Connection, params: Params, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Gates:
    """The gate that this machine's clock tells the server's time; none where no window is kept."""
    if params.run.window is None:
        return Gates(())
    apart_s = (clock() - db.one(connection, CLOCK, params)["now"]).total_seconds()
    shown, most = apart(abs(apart_s), MOST_APART_S, duration)
    ahead = "ahead of" if apart_s > 0 else "behind"
    return Gates(
        (
            gate(
                "window.clocks_agree",
                at_most(abs(apart_s), MOST_APART_S),
                f"run.window {params.run.window}",
                found=f"this machine's clock is {shown} {ahead} the server's",
                needed=f"{most} at most",
                danger="the window would be kept at another hour than it says",
                do="set both clocks, by NTP, and run the same command again",
                figures={"apart_s": round(apart_s, 3)},
            ),
        )
    )


def enter(
    params: Params,
    *,
    say: Callable[[str], None] = print,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Returns once the window is open, with the seconds waited. For phases before they begin, and for long loops
    between two transactions: hold no lock and no open transaction.

    Raises OutsideWindow instead of waiting, where ``run.outside_window`` is ``stop``.
    """
    if is_open(params, clock()):
        return 0.0
    opening = opens_at(params, clock())
    if params.run.outside_window == "stop":
        raise OutsideWindow(
            found=f"{_local(params, clock()):%H:%M} in {params.run.time_zone}",
            needed=f"the maintenance window, {params.run.window}; it opens at {opening:%Y-%m-%d %H:%M %Z}",
            danger="the work would meet the load that the window keeps it away from",
            do="run the same command again then; what was done stays done",
        )
    say(f"  waiting for the maintenance window {params.run.window}, which opens at {opening:%Y-%m-%d %H:%M %Z}")
    began = clock()
    while not is_open(params, clock()):
        left_s = (opening.astimezone(UTC) - clock()).total_seconds()
        sleep(min(max(left_s, 0.05), LONGEST_SLEEP_S))
    return max((clock() - began).total_seconds(), 0.0)


def _edges(window: str) -> tuple[clock_time, clock_time]:
    opens, _, closes = window.partition("-")
    return clock_time.fromisoformat(opens), clock_time.fromisoformat(closes)


def _local(params: Params, now: datetime | None) -> datetime:
    return (now or datetime.now(UTC)).astimezone(ZoneInfo(params.run.time_zone))
