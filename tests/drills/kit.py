"""What the drills share: writers beside the phase, a step in a process of its own, and the count of what was lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from runbook_lib.backfill import change_queue
from runbook_lib.core import db
from runbook_lib.core.gates import LockNotObtained
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings
from tests import evidence, toy
from tests.conftest import write_params
from tests.opened import gates_passed

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("RUNBOOK_DRILLS") == "full"
# Another one each day, unless it is given to have the same moments again.
SEED = os.environ.get("RUNBOOK_DRILL_SEED") or f"{datetime.now(UTC):%Y-%m-%d}"
# Small batches with a rest after each, so that there are many moments to be hit.
SLOW: dict[str, dict[str, Any]] = {
    "backfill": {"batch_rows": 10, "most_batch_rows": 10, "pause_between_batches_ms": 10, "lease_s": 1},
    "embeddings": {"batch_rows": 10},
}
STEPS: dict[str, Callable[[Phase], Any]] = {
    "load": load_embeddings.apply,
    "backfill": backfill.apply,
    "refresh": change_queue.drain,
}
# How far a target has to be for a step to begin.
BEFORE = {"load": "schema", "backfill": "load", "refresh": "backfill"}
# What was broken in this session: how often, and rows lost by it.
BROKEN: dict[str, tuple[int, int]] = {}
# On a machine that does much else, a run takes minutes to begin.
LONGEST_STEP_S = 180.0
WRITES_A_SECOND = 150


def moments(few: int, seed: str, longest_s: float) -> list[float]:
    """Seeded moments within a step: 20 in the full drill, a few otherwise."""
    draw = random.Random(f"{SEED} {seed}")
    return [round(draw.uniform(0, longest_s), 3) for _ in range(20 if FULL else few)]


@contextmanager
def opened(params_file: Path, name: str = "50_backfill") -> Iterator[Phase]:
    """A phase of a run of its own, with a ledger."""
    p = load_params(params_file)
    with db.connect(p, "drill ledger") as ledger_connection, db.connect(p, "drill") as connection:
        ledger = Ledger(ledger_connection, p, "drill", name)
        ledger.create()
        yield gates_passed(Phase(name, "drill", True, p, connection, ledger))


def prepared(folder: Path, up_to: str, **sections: dict[str, Any]) -> Path:
    """A params file whose target has come so far: "schema", "load" or "backfill"."""
    params_file = write_params(folder, **{k: SLOW.get(k, {}) | sections.get(k, {}) for k in {*SLOW, *sections}})
    with opened(params_file) as phase:
        extension.apply(phase)
        expand_schema.apply(phase)
        for step in ("load", "backfill")[: ("schema", "load", "backfill").index(up_to)]:
            STEPS[step](phase)
    return params_file


def go_on(params_file: Path) -> None:
    """Load, backfill and refresh, again until no row is held by somebody."""
    until = time.monotonic() + LONGEST_STEP_S
    with opened(params_file) as phase:
        while True:
            try:
                for step in STEPS.values():
                    step(phase)
                return
            except LockNotObtained:
                if time.monotonic() > until:
                    raise


def finish(params_file: Path) -> None:
    """Goes on to the end, with nobody writing, and asks the gates."""
    go_on(params_file)
    with opened(params_file) as phase:
        gates = load_embeddings.verify(phase) + backfill.verify(phase)
        assert gates.passed, str(gates)


def lost(dsn: str, layout: str = "column") -> int:
    """Rows whose vector is missing, or is not that of the text that they have now."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return evidence.gather(connection, layout).lost


def nothing_is_lost(dsn: str, *broken: str, layout: str = "column") -> None:
    """Holds every row against an embedding made again, and counts it for the table of what was broken."""
    found = lost(dsn, layout)
    for what in broken:
        times, rows = BROKEN.get(what, (0, 0))
        BROKEN[what] = (times + 1, rows + found)
    assert found == 0


def table() -> list[str]:
    """What was broken, how often, and the rows lost, stale or doubled by it; as Markdown."""
    lines = [f"| {broken} | {times} | {rows} |" for broken, (times, rows) in BROKEN.items()]
    return ["| what was broken | how often | rows lost, stale or doubled |", "|---|---|---|", *lines]


def change_texts(dsn: str, rows: int) -> None:
    """A refresh has something to do only where texts have changed."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE articles SET body = body || ' again' WHERE id <= %s", [rows])


def write(connection: psycopg.Connection[Any], draw: random.Random) -> None:
    """One write, as an application makes it: an insert, a new text, an unrelated change, a delete, an empty text."""
    text = f"{draw.choice(toy.SUBJECTS)} {draw.choice(toy.VERBS)} {draw.choice(toy.PLACES)} {draw.random():.6f}"
    row = connection.execute("SELECT id FROM articles ORDER BY random() LIMIT 1").fetchone()
    key = row[0] if row else 0
    statement, values = draw.choices(
        [
            ("INSERT INTO articles (title, body) VALUES ('new', %s)", [text]),
            ("UPDATE articles SET body = %s WHERE id = %s", [text, key]),
            ("UPDATE articles SET views = views + 1 WHERE id = %s", [key]),
            ("DELETE FROM articles WHERE id = %s", [key]),
            ("UPDATE articles SET title = NULL, body = ' ' WHERE id = %s", [key]),
        ],
        weights=[20, 40, 30, 7, 3],
    )[0]
    connection.execute(statement, values)


@contextmanager
def writers(dsn: str, how_many: int = 2) -> Iterator[list[int]]:
    """Writers beside the block, which come back when the server does; yields how much each has written."""
    stop = threading.Event()
    written = [0] * how_many

    def go(n: int) -> None:
        draw = random.Random(n)
        while not stop.is_set():
            try:
                with psycopg.connect(dsn, autocommit=True, application_name="drill writer") as connection:
                    while not stop.wait(how_many / WRITES_A_SECOND):
                        write(connection, draw)
                        written[n] += 1
            except psycopg.OperationalError:
                stop.wait(0.1)

    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT setval(pg_get_serial_sequence('articles', 'id'), 100000)")
    threads = [threading.Thread(target=go, args=(n,), daemon=True) for n in range(how_many)]
    for thread in threads:
        thread.start()
    try:
        yield written
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def in_a_process(step: str, params_file: Path) -> Iterator[subprocess.Popen[str]]:
    """The step in a process of its own, which has just begun it; killed at the end of the block if it still runs."""
    command = [sys.executable, "-m", "tests.drills.step", step, str(params_file)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "begins\n", line + process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(question: Callable[[], Any], what: str) -> Any:
    """Asks until the answer is true; fails after LONGEST_STEP_S."""
    until = time.monotonic() + LONGEST_STEP_S
    while time.monotonic() < until:
        if answer := question():
            return answer
        time.sleep(0.02)
    raise AssertionError(f"never came: {what}")
