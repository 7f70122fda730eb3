"""A network between the runbook and its server that a test may cut: it takes what is sent, and passes nothing on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from psycopg.conninfo import conninfo_to_dict, make_conninfo


@dataclass
class Network:
    """dsn: of the server, through the network. Once cut it takes no new connection, and keeps the old ones open."""

    dsn: str = ""
    is_cut: threading.Event = field(default_factory=threading.Event)
    ends: list[socket.socket] = field(default_factory=list)

    def cut(self) -> None:
        """From here on nothing arrives, and nobody is told."""
        self.is_cut.set()
        _end(self.ends[0])


@contextmanager
def network(dsn: str) -> Iterator[Network]:
    """A way to the server over TCP for the length of a block. dsn: by socket."""
    found = conninfo_to_dict(dsn)
    at = f"{found['host']}/.s.PGSQL.{found.get('port') or 5432}"
    listening = socket.create_server(("127.0.0.1", 0))
    host, port = listening.getsockname()
    net = Network(make_conninfo(dsn, host=host, port=port, sslmode="disable"), ends=[listening])

    def forward(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while content := one.recv(65536):
                if not net.is_cut.is_set():
                    other.sendall(content)
        if not net.is_cut.is_set():
            with suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(at)
                net.ends.extend((client, server))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=forward, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield net
    finally:
        for end in net.ends:
            _end(end)


def _end(end: socket.socket) -> None:
    # A thread that waits for it is told by shutdown() alone.
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
