"""Nothing that a run leaves holds a secret, however the run ended: files, ledger and output."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, quote_plus

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from runbook_lib.core.registry import NOTEBOOKS_ENV
from tests import small_notebooks
from tests.conftest import DSN_ENV, write_params
from tests.endpoints import Answer, serving
from tests.small_runs import FIRST, ROOT, SECOND

PASSWORD = "planted p@ss/w0rd+%"
API_KEY = "sk-planted/key+4711="
TOKEN = "planted-hook-token"
UNKNOWN_KEY = Answer(401, {"error": {"message": f"unknown key: {API_KEY}"}})

SECTIONS = {
    "notify": {"webhook_env": "PLANTED_HOOK", "timeout_s": 2, "command": [sys.executable, "-c", "exit(3)"]},
    "approval": {"phases": [SECOND]},
}
MODEL = {"source": "http", "callable": None, "model": "toy", "api_key_env": "OPENAI_API_KEY", "request_tries": 1}
LOST = "phase.connection.execute('SELECT pg_terminate_backend(pg_backend_pid())')"
NO_SERVER = """import os, psycopg.conninfo
dsn = os.environ[phase.params.connection.dsn_env]
os.environ[phase.params.connection.dsn_env] = psycopg.conninfo.make_conninfo(dsn, host='127.0.0.1', port=1)
open_phase('00_preflight', params_file, run_id, False)"""
NO_DSN = """import os
os.environ[phase.params.connection.dsn_env] += " nonsense='"
open_phase('00_preflight', params_file, run_id, False)"""

# A cell with a typing error, fixed; then the server is restarted, and the notebook's first cell is run again.
DISPLAY_LOST = """import psycopg, pytest
from runbook_lib.core import sqlmagic
with pytest.raises(sqlmagic.ReadFailed):
    get_ipython().run_line_magic("sql", "SELECT no_such_column")
%sql SELECT 1 AS one
with pytest.raises(sqlmagic.ReadFailed):
    get_ipython().run_line_magic("sql", "SELECT no_such_column")
ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%%display'"
assert phase.connection.execute(ended, {}).rowcount == 1
sqlmagic.connect(phase.params, phase.run_id, lambda: phase.connection)
%sql SELECT 1 AS one"""

# What a notebook may do with its environment, by accident or not.
EVERYTHING = """import base64, json, os, sys, warnings
everything = dict(os.environ)
print(everything, *everything.values(), json.dumps(everything), sep="\\n")
print(*(base64.b64encode(f"me:{value}".encode()).decode() for value in everything.values()), file=sys.stderr)
warnings.warn(str(everything))
os.system("env; env >&2")
phase.ledger.append("toy", everything)
everything"""
RAISED = """import os
raise RuntimeError("x" * 1980 + os.environ["OPENAI_API_KEY"]) from ValueError(dict(os.environ))"""
GATE = """import os
from runbook_lib.core.gates import gate, collect
figures = dict(os.environ)
said = str(figures)
phase._judge(collect([gate("toy.fact_holds", False, said, found=said, needed=said, do=said, figures=figures)]))"""
# The endpoint says the key that it was sent.
REFUSED = """from runbook_lib.embeddings import endpoint
endpoint.model(phase.params)(["a text"])"""

# What happens in the first phase, and the exit code; the second one always waits for its sign-off.
ENDS = {
    "passed, then waits": (EVERYTHING, 3),
    "failed gate": (GATE, 1),
    "exception": (RAISED, 4),
    "SQL that fails": ("phase.connection.execute('SELECT no_such_column')", 4),
    "%sql that fails": ("%sql SELECT no_such_column", 4),
    "%sql that lost its session": (DISPLAY_LOST, 3),
    "kernel killed": ("import os; os.kill(os.getpid(), 9)", 4),
    "server lost": (LOST, 4),
    "server that cannot be reached": (NO_SERVER, 2),
    "DSN that cannot be read": (NO_DSN, 2),
    "key that the endpoint refuses": (REFUSED, 2),
}

# What the server logs of them.
LOGGED = {
    "SQL that fails": b'column "no_such_column" does not exist',
    "%sql that fails": b'column "no_such_column" does not exist',
    "%sql that lost its session": b"terminating connection due to administrator command",
    "server lost": b"terminating connection due to administrator command",
}


def encodings(secret: str) -> Iterator[bytes]:
    """The secret as it might stand somewhere."""
    yield from (text.encode() for text in {secret, quote(secret), quote(secret, safe=""), quote_plus(secret)})
    yield base64.b64encode(secret.encode())
    yield secret.encode().hex().encode()


@contextmanager
def watched_processes() -> Iterator[dict[str, bytes]]:
    """The command lines that anybody on this machine could see meanwhile."""
    seen: dict[str, bytes] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    line = process.read_bytes()
                    seen[f"command line {line.decode(errors='replace')}"] = line

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def server_log(dsn: str) -> bytes:
    """All that the server has logged, of this run and of those before."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
    assert row is not None
    return Path(row[0], "log").read_bytes()


def left_by(folder: Path, dsn: str, output: bytes) -> Iterator[tuple[str, bytes]]:
    """All that a run leaves, each with its name."""
    yield "stdout and stderr", output
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
    with psycopg.connect(dsn) as connection:
        if connection.execute("SELECT to_regclass('runbook.entry')").fetchone() != (None,):
            for row in connection.execute("SELECT to_jsonb(e)::text FROM runbook.entry e").fetchall():
                yield "ledger", row[0].encode()


@pytest.mark.attack
@pytest.mark.usefixtures("articles")
@pytest.mark.parametrize("end", ENDS)
def test_no_secret_is_left_behind(end: str, tmp_path: Path, database: str) -> None:
    body, exit_code = ENDS[end]
    small_notebooks.write(tmp_path / "nb", **{f"p{FIRST}": body})
    environment = os.environ | {
        NOTEBOOKS_ENV: str(tmp_path / "nb"),
        DSN_ENV: make_conninfo(database, password=PASSWORD),
        "OPENAI_API_KEY": API_KEY + "\n",
        "PLANTED_HOOK": f"http://127.0.0.1:1/{TOKEN}",
    }
    # Under it a kernel does not catch what its children print.
    environment.pop("PYTEST_CURRENT_TEST")
    command = [
        sys.executable,
        "-c",
        "from runbook_lib.cli.main import main; main()",
        "run",
        "--execute",
        "--verbose",
    ]
    before = len(server_log(database))
    with serving() as served:
        served.judge = lambda texts: UNKNOWN_KEY if texts == ["a text"] else None
        path = write_params(tmp_path, **SECTIONS, embeddings=MODEL | {"url": served.url})
        with watched_processes() as command_lines:
            done = subprocess.run([*command, str(path)], cwd=ROOT, env=environment, capture_output=True, check=False)
        assert set(served.keys) == {f"Bearer {API_KEY}"}, "the line end behind the key is not sent"
    output = done.stdout + done.stderr
    assert done.returncode == exit_code, output.decode()
    assert b"Traceback" not in output, output.decode()
    logged = server_log(database)[before:]
    assert end not in LOGGED or LOGGED[end] in logged
    left = [*left_by(tmp_path / "runs", database, output), *command_lines.items(), ("server log", logged)]
    assert any("ipykernel" in name for name in command_lines)
    assert {"index.html"} < {Path(name).name for name, _ in left} and len(left) > 5
    for secret in (PASSWORD, API_KEY, TOKEN):
        for encoded in encodings(secret):
            assert [name for name, content in left if encoded in content] == []


@pytest.mark.usefixtures("articles")
@pytest.mark.parametrize("written", sorted(encodings(PASSWORD)), ids=lambda b: b.decode()[:8])
def test_the_search_would_find_one(tmp_path: Path, database: str, written: bytes) -> None:
    (tmp_path / "page.html").write_bytes(b"<p>" + written + b"</p>")
    found = [name for name, content in left_by(tmp_path, database, b"") for e in encodings(PASSWORD) if e in content]
    assert found == ["page.html"]
