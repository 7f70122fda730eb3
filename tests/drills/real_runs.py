"""Real runs to be killed: ``runbook run`` and ``runbook operate`` in processes of their own, on databases made from
a template in which the real notebooks have come so far."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.core.registry import MIGRATE
from runbook_lib.runner import manifest
from tests import stepping, toy
from tests.conftest import DSN_ENV, write_params
from tests.drills import kit

COMMAND = [sys.executable, "-c", "from runbook_lib.cli.main import main; main()"]
# How each step is run, and how far the migration is when it begins.
RUNS = {
    "load": ["run", "--execute", "--from", "40_load_embeddings", "--to", "40_load_embeddings"],
    "backfill": ["run", "--execute", "--from", "50_backfill", "--to", "50_backfill"],
    "refresh": ["operate", "refresh", "--execute"],
}
NOTEBOOKS = {"load": "40_load_embeddings", "backfill": "50_backfill", "refresh": "operate/refresh"}
PROVED = {"load": 4, "backfill": 5, "refresh": 6}
# What a step takes on an idle machine, from the opening of its notebook's connection to the end of its notebook.
SECONDS = {"load": 2.0, "backfill": 2.5, "refresh": 2.0}
MORE_ROWS = 400
SECTIONS = {
    "embeddings": {"callable": "tests.drills.model:slowly", "batch_rows": 10},
    # The writers delete rows, and a judged row that is gone is bad input.
    "queries": {"judgements": None},
    "backfill": kit.SLOW["backfill"],
    "locks": {"timeout_ms": 200, "tries": 20, "longest_wait_between_tries_s": 0.2},
}


def params_file(folder: Path) -> Path:
    """The parameters of all of these runs."""
    return write_params(folder, **SECTIONS)


def make_template(server: str, folder: Path, step: str) -> str:
    """A database in which everything before the step has passed, through the real notebooks; returns its name."""
    name = f"before_{step}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    os.environ[DSN_ENV] = make_conninfo(server, dbname=name)
    with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as connection:
        toy.create_articles(connection)
        connection.execute(
            "INSERT INTO articles (title, body)"
            " SELECT 'row ' || i, 'the socket blocks ' || i FROM generate_series(1, %s) i",
            [MORE_ROWS],
        )
    stepping.step_all("migrate", MIGRATE[: PROVED[step]], params_file(folder))
    return name


@contextmanager
def database(server: str, template: str) -> Iterator[str]:
    """DSN of a copy of a template, dropped afterwards."""
    name = "drilled"
    drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(drop)
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*map(sql.Identifier, (name, template))))
    yield make_conninfo(server, dbname=name)
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(drop)


@dataclass(frozen=True)
class Run:
    """A run at work: its process, its record, and the session of its notebook."""

    process: subprocess.Popen[str]
    run_id: str
    backend: int

    def kernel(self) -> int:
        """The process of the notebook's kernel."""
        return next(
            c.pid
            for c in psutil.Process(self.process.pid).children(recursive=True)
            if "ipykernel" in str(c.cmdline())
        )

    def is_at_work(self, dsn: str) -> bool:
        """Do runner and session still live?"""
        with psycopg.connect(dsn, autocommit=True) as connection:
            found = connection.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [self.backend]).fetchone()
        return self.process.poll() is None and found is not None


def kill_the_kernel(run: Run) -> None:
    os.kill(run.kernel(), signal.SIGKILL)


def kill_the_runner(run: Run) -> None:
    os.kill(run.process.pid, signal.SIGKILL)


def kill_the_backend(run: Run) -> None:
    """The server then ends every other session too, and recovers as after a crash."""
    os.kill(run.backend, signal.SIGKILL)


KILLS: dict[str, Callable[[Run], None]] = {
    "kernel": kill_the_kernel,
    "runner": kill_the_runner,
    "backend": kill_the_backend,
}


@contextmanager
def begun(step: str, dsn: str, params: Path, known: Collection[str]) -> Iterator[Run]:
    """The step as a run of its own, whose notebook has just opened its phase. known: runs from before, whose kernels
    may not be gone yet."""
    process = subprocess.Popen(
        command(step, params), cwd=kit.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            query = (
                "SELECT split_part(application_name, ' ', 2), pid FROM pg_stat_activity WHERE application_name ~ %s"
            )

            def opened() -> tuple[str, int] | None:
                assert process.poll() is None, process.communicate()[1]
                found = connection.execute(query, [f"^runbook [^ ]+ {NOTEBOOKS[step]}$"]).fetchall()
                return next((row for row in found if row[0] not in known), None)

            run_id, backend = kit.wait_for(opened, f"the session of {NOTEBOOKS[step]}")
        yield Run(process, run_id, backend)
    finally:
        process.kill()
        process.communicate()


def command(step: str, params: Path) -> list[str]:
    """What a scheduler would start."""
    return [*COMMAND, RUNS[step][0], str(params), *RUNS[step][1:]]


def passes(step: str, params: Path) -> None:
    """The step as a run of its own, undisturbed."""
    done = subprocess.run(command(step, params), cwd=kit.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def status(params: Path, run_id: str) -> str:
    """How the run's record says that it ended."""
    return str(manifest.read(params.parent / "runs" / run_id).status)
