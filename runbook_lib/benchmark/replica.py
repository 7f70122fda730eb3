"""A streaming replica to measure on: found to be the target's own, level with it, and nothing is written there.

Where ``search.read_dsn_env`` names one, every session that measures is opened here. What is found by measuring is
written on the primary; a session that is opened afterwards sees it, since it begins no older than the primary was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psycopg

from runbook_lib.core import db
from runbook_lib.core.display import duration, size
from runbook_lib.core.gates import RunbookError
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("replica")
T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 0.05
# A measuring query that the standby cancels, so as to go on replaying, is put so often in all.
TRIES = 5


def is_given(params: Params) -> bool:
    """Is there a replica to measure on?"""
    return params.search.read_dsn_env is not None


def connect(connection: db.Connection, params: Params, purpose: str) -> db.Connection:
    """A connection to measure on: to the replica, once it has replayed all that the primary has written by now.

    connection: to the target. To the target's own server as well where no replica is given. Raises BadInput where the
    replica cannot be reached, RunbookError where it is no standby, or has not caught up within
    ``search.read_wait_s``.
    """
    conninfo = db.read_dsn(params)
    if conninfo is None:
        return db.beside(connection, params, purpose)
    written = str(db.one(connection, SQL["written"], params)["lsn"])
    reader = db.beside(connection, params, purpose, conninfo=conninfo)
    try:
        _catch_up(reader, params, written)
        # Again: the extension may have been what was still to be replayed.
        db.use_search_path(reader)
    except BaseException:
        reader.close()
        raise
    return reader


def _catch_up(connection: db.Connection, params: Params, written: str) -> None:
    until = time.monotonic() + params.search.read_wait_s
    while True:
        found = db.one(connection, SQL["replayed"], params, lsn=written)
        if not found["standby"]:
            raise RunbookError(
                found=f"the server of {params.search.read_dsn_env} is no standby",
                needed="a streaming replica of the target's server",
                danger="it may hold other rows, and stay behind for good; nothing was measured",
                do="point the variable at the replica, or take search.read_dsn_env out of the params file",
            )
        if found["level"]:
            return
        if time.monotonic() >= until:
            behind = f"it has replayed up to {found['lsn']}, {size(found['behind_bytes'])} less"
            raise RunbookError(
                found=f"the primary had written up to {written}, and after {duration(params.search.read_wait_s)}"
                f" {behind}" + ("; its replay is paused" if found["paused"] else ""),
                needed="all of it replayed, so that the figures are those of the table as it is",
                danger="the index, or the rows, that are to be measured are not there yet; nothing was measured",
                do="SELECT pg_wal_replay_resume(); on the replica, then run this again"
                if found["paused"]
                else "wait for the replica, or raise search.read_wait_s, then run this again",
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)


def again(params: Params, measure: Callable[[], T]) -> T:
    """Measures, and measures again where the standby cancelled a query so that it could go on replaying.

    Raises RunbookError where that happens every time.
    """
    for tries in range(1, TRIES + 1):
        try:
            return measure()
        except psycopg.errors.SerializationFailure as error:
            if not is_given(params):
                raise
            reason = str(error).splitlines()[0]
            print(f"  try {tries} of {TRIES} was cancelled by the replica: {reason}")
    raise RunbookError(
        found=f"the replica cancelled a measuring query {TRIES} times: {reason}",
        needed="a scan of the table that is not cancelled",
        danger="nothing has changed; nothing was measured",
        do="set hot_standby_feedback = on or a longer max_standby_streaming_delay on the replica, or measure when the"
        " primary writes less",
    )
