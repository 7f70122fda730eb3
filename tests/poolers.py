"""Connection poolers before the test server: PgBouncer itself, and a stand-in that does what PgBouncer 1.18 did."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests import servers

PORT = 6432
PROTOCOL, TLS, GSS = 196608, 80877103, 80877104


@contextmanager
def pgbouncer(dsn: str, folder: Path, mode: str, pool_size: int) -> Iterator[str]:
    """PgBouncer before a server, for the length of a block; its DSN. Skips the test where it is not installed."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    host = conninfo_to_dict(dsn)["host"]
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "ini").write_text(
        f"[databases]\n* = host={host}\n[pgbouncer]\npool_mode = {mode}\ndefault_pool_size = {pool_size}\n"
        f"auth_type = trust\nauth_file = {folder}/users\nunix_socket_dir = {folder}\nlisten_port = {PORT}\n"
    )
    servers.give(folder)
    process = subprocess.Popen([program, "-q", folder / "ini"], user=servers.owner(), stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 10
        while not _socket(folder).exists() and time.monotonic() < until:
            time.sleep(0.02)
        yield make_conninfo(dsn, host=str(folder), port=PORT)
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def stand_in(dsn: str, folder: Path, mode: str, pool_size: int) -> Iterator[str]:
    """Likewise a pooler of our own. It answers a login by itself, with a number that is no process of the server,
    and lends a client one of its server sessions, the last one used first, for a transaction or for good. It
    knows no COPY.
    """
    with ExitStack() as stack:
        pool = queue.LifoQueue[socket.socket]()
        for _ in range(pool_size):
            behind, greeting = _login(dsn)
            pool.put(stack.enter_context(behind))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(_socket(folder)))
        listener.listen()

        def take_clients() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=_serve, args=(client, greeting, pool, mode), daemon=True).start()

        threading.Thread(target=take_clients, daemon=True).start()
        yield make_conninfo(dsn, host=str(folder), port=PORT)
        listener.shutdown(socket.SHUT_RDWR)


def _socket(folder: Path) -> Path:
    return folder / f".s.PGSQL.{PORT}"


def _login(dsn: str) -> tuple[socket.socket, list[bytes]]:
    """A session of the server, and what the server answered to its login."""
    found = conninfo_to_dict(dsn)
    behind = socket.socket(socket.AF_UNIX)
    behind.connect(f"{found['host']}/.s.PGSQL.{found.get('port', 5432)}")
    names = "".join(f"{part}\0" for part in ("user", found["user"], "database", found["dbname"], ""))
    behind.sendall(struct.pack("!ii", len(names) + 8, PROTOCOL) + names.encode())
    return behind, list(_until(behind, b"Z"))


def _serve(client: socket.socket, greeting: list[bytes], pool: queue.LifoQueue[socket.socket], mode: str) -> None:
    """Passes the messages of one client on, a transaction or a session at a time."""
    lent: socket.socket | None = None
    with client, suppress(OSError):
        while True:
            length, code = struct.unpack("!ii", _read(client, 8))
            _read(client, length - 8)
            if code not in (TLS, GSS):
                break
            client.sendall(b"N")
        own_number = b"K" + struct.pack("!i", 12) + os.urandom(8)
        client.sendall(b"".join(own_number if m.startswith(b"K") else m for m in greeting))
        try:
            while asked := list(_until(client, b"QSX")):
                if asked[-1].startswith(b"X"):
                    return
                lent = lent or pool.get()
                lent.sendall(b"".join(asked))
                answer = list(_until(lent, b"Z"))
                if mode == "transaction" and answer[-1].endswith(b"I"):
                    pool.put(lent)
                    lent = None
                client.sendall(b"".join(answer))
        finally:
            if lent:
                pool.put(lent)


def _until(peer: socket.socket, last: bytes) -> Iterator[bytes]:
    """The messages of a peer up to the first of one of these kinds."""
    kind = b""
    while not kind or kind not in last:
        kind, size = _read(peer, 1), _read(peer, 4)
        yield kind + size + _read(peer, struct.unpack("!i", size)[0] - 4)


def _read(peer: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        if not (more := peer.recv(length - len(data))):
            raise ConnectionError("the peer has gone")
        data += more
    return data
