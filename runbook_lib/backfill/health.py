"""What the server can bear just now: each indicator answers normal, stop, unknown or not available, with a reason.

After GitLab's health status of batched migrations (lib/gitlab/database/background_migration/health_status/).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import psycopg
from psycopg import sql

from runbook_lib.core import db, table_kind, versions
from runbook_lib.core.display import Table, duration, number, size
from runbook_lib.core.names import spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("health")
WINDOWS = load("windows")
CITUS = load("citus")

MB = 1024 * 1024
# Two looks nearer than this say nothing about a rate.
SHORTEST_INTERVAL_S = 0.2


class State(StrEnum):
    """stop: the backfill waits. unknown: could not be told now. not available: this server or role never tells."""

    NORMAL = "normal"
    STOP = "stop"
    UNKNOWN = "unknown"
    NOT_AVAILABLE = "not available"


# What is said of several servers is what the gravest of their answers says.
GRAVITY = (State.NORMAL, State.NOT_AVAILABLE, State.UNKNOWN, State.STOP)
# How Citus begins what it says of a node that it cannot reach.
NO_CONNECTION = "failed to connect"


@dataclass(frozen=True)
class Answer:
    """One indicator's answer."""

    indicator: str
    state: State
    reason: str

    def __str__(self) -> str:
        return f"{self.indicator}: {self.reason}"


@dataclass
class LastLook:
    """What two looks have to share: by server, where the WAL stood at the last one, and checkpoints counted at the
    first. pids: the sessions at work."""

    wal: dict[str, tuple[float, float]] = field(default_factory=dict)
    requested: dict[str, int] = field(default_factory=dict)
    pids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Server:
    """One that rows of the target lie on. name: empty where it is the only one. rows: what one of :data:`SQL` finds
    there, by its name; raises psycopg.Error. version: the server's."""

    name: str
    rows: Callable[[str], list[db.Row]]
    version: int


def _stop_if(indicator: str, stop: bool, reason: str) -> Answer:
    return Answer(indicator, State.STOP if stop else State.NORMAL, reason)


def look(connection: db.Connection, params: Params, watch: LastLook) -> list[Answer]:
    """Asks every indicator, of each server that has rows of the target. One that the role may not ask, or the server
    does not know, is not available."""
    asked = [_ask(name, partial(ask, connection, params)) for name, ask in OF_THE_TARGET]
    servers, lost = _servers(connection, params, watch)
    for name, ask in OF_A_SERVER if servers else ():
        asked.append(_worst([_on(s, _ask(name, partial(ask, s, params, watch))) for s in servers]))
    return [*lost, *asked]


def _ask(name: str, ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except psycopg.errors.InsufficientPrivilege as error:
        way_out = "GRANT pg_monitor to the runbook's role to have it"
        return Answer(name, State.NOT_AVAILABLE, f"{error.diag.message_primary}; {way_out}")
    except (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable, psycopg.errors.FeatureNotSupported) as e:
        return Answer(name, State.NOT_AVAILABLE, str(e.diag.message_primary))
    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
        return Answer(name, State.UNKNOWN, str(error.diag.message_primary))


def _worst(answers: Sequence[Answer]) -> Answer:
    return max(answers, key=lambda a: GRAVITY.index(a.state))


def _on(server: Server, answer: Answer) -> Answer:
    return replace(answer, reason=f"on {server.name} {answer.reason}") if server.name else answer


def _servers(connection: db.Connection, params: Params, watch: LastLook) -> tuple[list[Server], list[Answer]]:
    """The target's servers; and an answer for those that cannot be asked."""
    version = connection.info.server_version
    values = {"table": spelled(params, "table"), "pids": watch.pids}
    if table_kind.of(params).has_pages_here:
        return [Server("", lambda name: db.rows(connection, SQL[name], params, **values), version)], []
    asked = [name for name in SQL if not name.startswith("requested") or name == _requested(version)]
    parts = [
        sql.SQL("{}, (SELECT coalesce(json_agg(b), '[]') FROM ({}) b)").format(
            sql.Literal(name), db.reading(SQL[name], params)
        )
        for name in asked
    ]
    command = sql.SQL("SELECT json_build_object({})").format(sql.SQL(", ").join(parts))
    text = psycopg.ClientCursor(connection).mogrify(command, values)
    servers, silent = list[Server](), list[Answer]()
    for row in db.rows(connection, CITUS["on_all_nodes"], params, command=text):
        if row["success"]:
            found = json.loads(row["result"])
            servers.append(Server(row["node"], found.__getitem__, version))
        else:
            lost = row["result"].startswith(NO_CONNECTION)
            silent.append(Answer("nodes", State.STOP if lost else State.UNKNOWN, f"{row['node']}: {row['result']}"))
    return servers, silent


def stops(answers: list[Answer]) -> list[Answer]:
    """The answers that say stop."""
    return [a for a in answers if a.state is State.STOP]


def show(answers: list[Answer]) -> Table:
    """One row an indicator."""
    return Table(("indicator", "state", "reason"), [(a.indicator, str(a.state), a.reason) for a in answers])


def _control(connection: db.Connection, params: Params) -> Answer:
    found = db.rows(connection, WINDOWS["control"], params)
    if not found or not found[0]["pause"]:
        return Answer("control row", State.NORMAL, "pause is false")
    return Answer("control row", State.STOP, f"pause is true; {found[0]['reason'] or 'no reason given'}")


def _stop_file(connection: db.Connection, params: Params) -> Answer:
    path = params.health.stop_file
    if path is None:
        return Answer("stop file", State.NORMAL, "none is named in health.stop_file")
    there = Path(path).exists()
    return _stop_if("stop file", there, f"{path.name} is {'there' if there else 'not there'}")


def _replicas(server: Server, params: Params, watch: LastLook) -> Answer:
    name, limits = "replica lag", params.health
    found = server.rows("replicas")
    if not found:
        return Answer(name, State.NORMAL, "no standby is connected")
    r = found[0]
    if r["lag_bytes"] is None:
        why = "this role may not see it; GRANT pg_monitor" if r["hidden"] else f"{r['name']} is {r['state']}"
        return Answer(name, State.UNKNOWN, why)
    behind = r["lag_bytes"] > limits.replica_lag_mb * MB or (r["lag_s"] or 0) > limits.replica_lag_s
    seconds = f" and {duration(r['lag_s'])}" if r["lag_s"] else ""
    allowed = f"{size(limits.replica_lag_mb * MB)} or {limits.replica_lag_s} s"
    return _stop_if(name, behind, f"{r['name']} is {size(r['lag_bytes'])}{seconds} behind, {allowed} are allowed")


def _wal(server: Server, params: Params, watch: LastLook) -> Answer:
    """A checkpoint starts by itself at max_wal_size / (1 + checkpoint_completion_target), and is spread by the WAL
    written meanwhile or by the clock, whichever is ahead, to end at max_wal_size (CalculateCheckpointSegments in
    xlog.c, IsCheckpointOnSchedule in checkpointer.c). Once 100 % are written it goes at full speed to its end, and a
    pause lasts as long as the disk needs; who pauses earlier waits for the clock, up to checkpoint_timeout.
    """
    limits = params.health
    (w,) = server.rows("wal")
    before, watch.wal[server.name] = watch.wal.get(server.name), (w["at_s"], w["position"])
    elapsed = w["at_s"] - before[0] if before else 0.0
    rate = (w["position"] - before[1]) / elapsed / MB if before and elapsed >= SHORTEST_INTERVAL_S else 0.0
    filled = 100 * w["since_checkpoint"] / w["max_wal_size"]
    too_fast = limits.wal_mb_per_s is not None and rate > limits.wal_mb_per_s
    reason = f"{rate:.1f} MB/s, {filled:.0f} % of max_wal_size since the last checkpoint"
    full = filled > limits.wal_since_checkpoint_percent
    allowed = f"; {limits.wal_since_checkpoint_percent} % are allowed" if full else ""
    allowed += f"; {limits.wal_mb_per_s} MB/s are allowed" if too_fast else ""
    return _stop_if("WAL", full or too_fast, f"{reason}, {_checkpoints(server, watch)}{allowed}")


def _checkpoints(server: Server, watch: LastLook) -> str:
    (row,) = server.rows(_requested(server.version))
    first = watch.requested.setdefault(server.name, int(row["requested"]))
    return f"{int(row['requested']) - first} checkpoints came early"


def _requested(version: int) -> str:
    return "requested_checkpoints" if versions.has_checkpointer_view(version) else "requested_checkpoints_before_17"


def _archiver(server: Server, params: Params, watch: LastLook) -> Answer:
    name, most = "archiver", params.health.archiver_backlog_files
    (a,) = server.rows("archiver")
    if a["mode"] == "off":
        return Answer(name, State.NORMAL, "archive_mode is off")
    if a["failing"]:
        return Answer(name, State.STOP, f"archiving {a['last_failed_wal']} failed")
    files = server.rows("archiver_backlog")[0]["files"]
    return _stop_if(name, files > most, f"{number(files)} files wait, {number(most)} are allowed")


def _autovacuum(server: Server, params: Params, watch: LastLook) -> Answer:
    found = server.rows("autovacuum")
    if not found:
        return Answer("autovacuum", State.NORMAL, "not at work on the table")
    reason = f"at work on {found[0]['relation']}, {found[0]['phase']}"
    return _stop_if("autovacuum", params.health.pause_for_autovacuum, reason)


def _blocked(server: Server, params: Params, watch: LastLook) -> Answer:
    most = params.health.blocked_session_ms
    found = server.rows("blocked")
    if not found:
        return Answer("blocked sessions", State.NORMAL, "no session waits for the backfill")
    b = found[0]
    who = f"pid {b['pid']} ({b['role']}, {b['application'] or 'no name'}) waits for us since {number(b['ms'])} ms"
    return _stop_if("blocked sessions", b["ms"] > most, f"{who}, {number(most)} ms are allowed")


def _snapshot(server: Server, params: Params, watch: LastLook) -> Answer:
    most = params.health.oldest_snapshot_s
    found = server.rows("snapshot")
    if not found or found[0]["age_s"] is None:
        return Answer("oldest snapshot", State.NORMAL, "no other transaction holds one")
    s = found[0]
    reason = f"{s['who']} is open since {duration(s['age_s'])}, {duration(most)} are allowed"
    return _stop_if("oldest snapshot", s["age_s"] > most, reason)


OF_THE_TARGET: tuple[tuple[str, Callable[[db.Connection, Params], Answer]], ...] = (
    ("control row", _control),
    ("stop file", _stop_file),
)
OF_A_SERVER: tuple[tuple[str, Callable[[Server, Params, LastLook], Answer]], ...] = (
    ("replica lag", _replicas),
    ("WAL", _wal),
    ("archiver", _archiver),
    ("autovacuum", _autovacuum),
    ("blocked sessions", _blocked),
    ("oldest snapshot", _snapshot),
)


def reasons(answers: list[Answer]) -> Iterator[str]:
    """What says stop, a line each."""
    return (str(a) for a in stops(answers))
