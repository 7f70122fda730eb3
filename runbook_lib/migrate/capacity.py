"""Does the plan fit into the server: memory of the build, shared memory, disk, and the WAL that slots hold back.

The server's machine can be looked at only where the server runs next to this process, or where the
parameters state it. What nobody has looked at is said to be unknown, and never passes a gate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runbook_lib.core import db, table_kind, thresholds
from runbook_lib.core.display import number, size
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import spelled
from runbook_lib.core.thresholds import apart
from runbook_lib.indexes import forecast
from runbook_lib.indexes.forecast import MB, Forecast
from runbook_lib.migrate import node_capacity
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("room")

GB = 1024 * MB
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory; nothing is written there
PROCESSES = Path("/proc")
# Where a slot holds back WAL that max_slot_wal_keep_size does not protect any more.
BAD_WAL_STATUS = ("unreserved", "lost")


@dataclass(frozen=True)
class ServerMachine:
    """Bytes, and how they are known; None where nobody looked, and why not."""

    bytes: int | None
    how: str

    def __str__(self) -> str:
        return f"UNKNOWN: {self.how}" if self.bytes is None else self.said(size(self.bytes))

    def said(self, amount: str) -> str:
        """In words, with the amount as written by :func:`thresholds.apart`."""
        return f"{amount}, {self.how}"


@dataclass(frozen=True)
class Room:
    """What the server has to spare. free_disk: where the table's data lie. shared_memory: of /dev/shm, what is
    free. slot_keeps_bytes: -1 without a bound, None before PostgreSQL 13."""

    free_disk: ServerMachine
    shared_memory: ServerMachine
    shared_memory_type: str
    max_wal_bytes: int
    slot_keeps_bytes: int | None


def look(connection: db.Connection, params: Params) -> Room:
    """Asks the server, and its machine where that is this one."""
    limits = db.one(connection, SQL["limits"], params)
    found = db.rows(connection, SQL["places"], params, table=spelled(params, "table"))
    places: dict[str, Any] = found[0] if found else {}
    here = bool(places) and _is_here(places["pid"], places["database"])
    return Room(
        _free_disk(params, places, here),
        _shared_memory(params, limits["shared_memory_type"], here),
        limits["shared_memory_type"],
        limits["max_wal_bytes"],
        limits["slot_keeps_bytes"],
    )


def _is_here(pid: int, database: str) -> bool:
    """Is the session's process one of this machine, and in the same container? Its title names its database."""
    try:
        title = (PROCESSES / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return title.startswith("postgres") and f" {database} " in title


def _free_disk(params: Params, places: dict[str, Any], here: bool) -> ServerMachine:
    if (stated := params.preflight.free_disk_gb) is not None:
        return ServerMachine(round(stated * GB), "by preflight.free_disk_gb")
    where = places.get("tablespace") or places.get("data_directory")
    if not here:
        return ServerMachine(None, "the server is on another machine; state preflight.free_disk_gb, as df says there")
    if where is None:
        return ServerMachine(None, "this role may not know data_directory; GRANT pg_read_all_settings, or state"
                    " preflight.free_disk_gb")  # fmt: skip
    try:
        found = os.statvfs(where)
    except OSError as error:
        return ServerMachine(None, f"{where}: {error.strerror}; state preflight.free_disk_gb, as df says there")
    return ServerMachine(found.f_bavail * found.f_frsize, f"free at {where}")


def _shared_memory(params: Params, kind: str, here: bool) -> ServerMachine:
    if (stated := params.preflight.shared_memory_mb) is not None:
        return ServerMachine(stated * MB, "by preflight.shared_memory_mb")
    if kind != "posix":
        return ServerMachine(None, f"dynamic_shared_memory_type is {kind}, which /dev/shm does not bound")
    if not here:
        return ServerMachine(
            None, "the server is on another machine; state preflight.shared_memory_mb, as df /dev/shm says"
        )
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return ServerMachine(None, f"{SHARED_MEMORY}: {error.strerror}")
    return ServerMachine(found.f_bavail * found.f_frsize, f"free at {SHARED_MEMORY}")


def gates(connection: db.Connection, params: Params, expects: Forecast) -> Iterator[Gate]:
    """The plan against what there is. A room that nobody could look into yields no gate: its fact says UNKNOWN."""
    room = look(connection, params)
    slots = db.rows(connection, SQL["slots"], params)
    yield _memory_fits_index(params, expects)
    if room.shared_memory.bytes is not None and params.index.method == "hnsw":
        yield _shared_memory_holds_build(params, expects, room)
    if not table_kind.of(params).has_pages_here:
        yield from node_capacity.gates(connection, params, expects)
    elif room.free_disk.bytes is not None:
        yield _disk_holds_it(params, expects, room, slots)
    yield _wal_slots_healthy(slots)
    if slots:
        yield _slots_bear_the_build(params, expects, room, slots)


def _memory_fits_index(params: Params, expects: Forecast) -> Gate:
    ix = params.index
    wanted, allowed = apart(expects.build_memory_bytes, expects.build_budget_bytes, thresholds.size)
    return gate(
        "preflight.memory_fits_index",
        expects.build_memory_bytes <= expects.build_budget_bytes,
        f"{ix.method} on {spelled(params, 'table')}",
        found=f"{number(expects.rows)} rows want {wanted} while the index is built",
        needed=f"at most {allowed}, of index.maintenance_work_mem_mb: {ix.maintenance_work_mem_mb}",
        danger="pgvector writes the unfinished graph to disk and continues ten times as slowly"
        if ix.method == "hnsw"
        else "pgvector refuses to build",
        do=forecast.ways_out(expects.rows, params, wanted_bytes=expects.build_memory_bytes),
        figures={"wanted_bytes": expects.build_memory_bytes, "allowed_bytes": expects.build_budget_bytes},
    )


def _shared_memory_holds_build(params: Params, expects: Forecast, room: Room) -> Gate:
    """A parallel build takes all of its memory as one shared segment before the first row (pgvector, hnswbuild.c)."""
    wanted = params.index.maintenance_work_mem_mb * MB if expects.workers else 0
    free = room.shared_memory.bytes or 0
    there, needed = apart(free, wanted, thresholds.size)
    return gate(
        "preflight.shared_memory_holds_build",
        wanted <= free,
        "parallel build of the index",
        found=room.shared_memory.said(there),
        needed=f"{needed}, for {expects.workers} workers and the leader together"
        if wanted
        else "none: no parallel worker is expected",
        danger="the build ends at once: could not resize shared memory segment: No space left on device",
        do=f"start the server's container with --shm-size={-(-wanted // MB)}m or more, or set"
        " index.parallel_workers: 0, which needs no shared memory",
        figures={"wanted_bytes": wanted, "free_bytes": free},
    )


def _held_wal(expects: Forecast, room: Room, slots: list[db.Row]) -> int:
    """WAL that may be on the disk at once: between two checkpoints, or all that a slot is allowed to hold."""
    held = room.max_wal_bytes
    if slots:
        bound = room.slot_keeps_bytes
        held = max(held, expects.wal_bytes if bound is None or bound < 0 else bound)
    return min(held, expects.wal_bytes)


def _disk_holds_it(params: Params, expects: Forecast, room: Room, slots: list[db.Row]) -> Gate:
    wal, free = _held_wal(expects, room, slots), room.free_disk.bytes or 0
    wanted = expects.disk_bytes + wal
    there, needed = apart(free, wanted, thresholds.size)
    ways = [f"free or add {size(max(wanted - free, 0))}"]
    if params.indexed_type == "vector":
        ways.append("index.storage: halfvec makes the index smaller, vector.type: halfvec all of it")
    if slots and (room.slot_keeps_bytes or -1) < 0:
        ways.append("max_slot_wal_keep_size bounds what a slot may hold")
    return gate(
        "preflight.disk_holds_it",
        wanted <= free,
        spelled(params, "table"),
        found=f"free disk {room.free_disk.said(there)}",
        needed=f"{needed}: index {size(expects.index_bytes)}, table {size(expects.table_growth_bytes)},"
        f" staging {size(expects.staging_bytes)}, WAL at one time {size(wal)}",
        danger="the disk fills half-way; without room for WAL the server stops, with all that it serves",
        do="; or ".join(ways),
        figures={"wanted_bytes": wanted, "free_bytes": free, "wal_bytes": wal},
    )


def slot(s: db.Row) -> str:
    """A replication slot as messages name it."""
    kept = "" if s["kept_bytes"] is None else f", keeps {size(s['kept_bytes'])} of WAL"
    return f"{s['name']} ({'active' if s['active'] else 'inactive'}{kept})"


def _wal_slots_healthy(slots: list[db.Row]) -> Gate:
    bad = [s for s in slots if not s["active"] or s["wal_status"] in BAD_WAL_STATUS]
    return gate(
        "preflight.wal_slots_healthy",
        not bad,
        "replication slots",
        found="; ".join(f"{slot(s)}, {s['wal_status'] or 'no WAL reserved'}" for s in bad)
        or (f"{len(slots)}, all active" if slots else "none"),
        needed="every slot active",
        danger="a slot without a reader keeps all WAL of the backfill, until the disk is full or the slot is lost",
        do="bring its reader back, or drop it: SELECT pg_drop_replication_slot('<name>');",
        figures={"slots": len(slots), "unhealthy": len(bad)},
    )


def _slots_bear_the_build(params: Params, expects: Forecast, room: Room, slots: list[db.Row]) -> Gate:
    """The backfill waits for readers that fall behind; a build does not, and logs its whole index in one go."""
    lag = max(s["kept_bytes"] or 0 for s in slots)
    behind = params.health.replica_lag_mb * MB
    wanted, bound = lag + behind + expects.index_bytes, room.slot_keeps_bytes
    bounded = bound is not None and bound >= 0
    allowed, needed = apart(bound or 0, wanted, thresholds.size)
    return gate(
        "preflight.slots_bear_the_build",
        not bounded or wanted <= (bound or 0),
        "replication slots",
        found=f"{slot(max(slots, key=lambda s: s['kept_bytes'] or 0))}; max_slot_wal_keep_size "
        + (allowed if bounded else "unlimited"),
        needed=f"{needed}: {size(lag)} kept now, {size(behind)} of health.replica_lag_mb, and"
        f" {size(expects.index_bytes)} of the build, which waits for no reader",
        danger="the server gives the slot up, and its replica or subscriber must be set up again",
        do=f"ALTER SYSTEM SET max_slot_wal_keep_size = '{-(-wanted // MB)}MB'; SELECT pg_reload_conf();"
        " or let the reader catch up first",
        figures={"wanted_bytes": wanted, "kept_bytes": lag, "allowed_bytes": bound if bounded else -1},
    )
