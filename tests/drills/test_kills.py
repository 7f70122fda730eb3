"""Sessions ended, and a process killed, at any moment, while others write: nothing lost, nothing stale.

Kernel, runner and backend of real runs are killed in test_real_runs.py.
"""

import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.drills import kit

pytestmark = pytest.mark.drill

CASES = [
    (step, moment)
    for step, longest_s in (("load", 0.5), ("backfill", 1.0), ("refresh", 0.5))
    for moment in kit.moments(1, step, longest_s)
]


@pytest.mark.parametrize(("step", "moment"), CASES)
def test_end_of_the_backends(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, step: str, moment: float
) -> None:
    params_file = kit.prepared(tmp_path, kit.BEFORE[step])
    with kit.writers(database):
        if step == "refresh":
            kit.change_texts(database, 150)
        with kit.in_a_process(step, params_file) as process:
            time.sleep(moment)
            articles.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name ~ '^(runbook )?drill( worker| health)?$'"
            )
            process.wait(kit.LONGEST_STEP_S)
    kit.finish(params_file)
    kit.nothing_is_lost(database, f"pg_terminate_backend of every session in {step}")


@pytest.mark.parametrize("moment", kit.moments(1, "promotion", 0.3))
def test_kill_9_while_the_staging_table_takes_its_place(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, moment: float
) -> None:
    params_file = kit.prepared(tmp_path, "load", vector={"layout": "side_table"})
    with kit.writers(database), kit.in_a_process("backfill", params_file) as process:
        time.sleep(moment)
        process.kill()
    kit.finish(params_file)
    kit.nothing_is_lost(database, "kill -9 while the staging table takes its place", layout="side_table")
