"""A CONCURRENTLY statement on a connection of its own, with its timeouts off, watched while it runs."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field

from runbook_lib.core import db
from runbook_lib.core.display import duration, number
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.phase import Phase, changes
from runbook_lib.sql import load

SQL = load("index")

# What REINDEX CONCURRENTLY calls the index that it builds, and the one that it replaces; a number follows the second.
OF_REINDEX = re.compile(r"_cc(new|old)\d*$")
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Built:
    """What a statement took: seconds, the server's notices, and samples of seconds, blocks done and blocks in all."""

    seconds: float = 0.0
    notices: list[str] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)


@changes
def concurrently(phase: Phase, statement: db.Statement) -> Built:
    """Runs a CONCURRENTLY statement on a connection of its own, with lock and statement timeouts off.

    A timeout would let a build run to its end and then fail it, leaving an invalid index that every write pays for.
    """
    i = phase.params.index
    built = Built()
    with phase.another(f"{phase.name} build") as connection:
        connection.execute(
            SQL["settings"].compose({}),
            {"memory": f"{i.maintenance_work_mem_mb}MB", "workers": str(i.parallel_workers)},
        )
        connection.add_notice_handler(lambda notice: built.notices.append(notice.message_primary or ""))
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(phase, db.server_pid(connection), built, stop), daemon=True)
        started = time.perf_counter()
        watcher.start()
        try:
            connection.execute(statement.query, statement.values)
        finally:
            stop.set()
            watcher.join()
    built.seconds = time.perf_counter() - started
    print(f"  {statement.name}: done in {duration(built.seconds)}")
    for notice in built.notices:
        print(f"  NOTICE: {notice}")
    phase.note_statement(db.Done(statement, -1, built.seconds, 1))
    return built


def none_under_way(name: str, subject: str, builds: int) -> Gate:
    """Gate before a build: no other is at work on the table. name: of the gate; builds: those that were found."""
    return gate(
        name,
        not builds,
        subject,
        found=f"{builds} builds at work on this table" if builds else "none",
        needed="none",
        danger="the two would wait for each other, and what looks left over may be at work",
        do="wait for it: SELECT * FROM pg_stat_progress_create_index;",
    )


def _watch(phase: Phase, pid: int, built: Built, stop: threading.Event) -> None:
    """Samples the build's progress from a session of its own until told to stop."""
    started = last_line = time.perf_counter()
    with phase.another(f"{phase.name} watch") as connection:
        while not stop.wait(SECONDS_BETWEEN_LOOKS):
            row = connection.execute(SQL["progress"].compose({}), {"pid": pid}).fetchone()
            if row is None:
                continue
            now = time.perf_counter()
            built.samples.append([round(now - started, 2), row["blocks_done"], row["blocks_total"]])
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                done, total = row["blocks_done"], row["blocks_total"]
                left = f", about {duration((now - started) * (total - done) / done)} left" if done else ""
                print(f"  {row['phase']}: {number(done)} of {number(total)} blocks{left}")
