"""Killed at any moment, in load, backfill and refresh, while others write: nothing lost, nothing stale."""

import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.drills import kit

pytestmark = pytest.mark.drill

BEFORE = {"load": "schema", "backfill": "load", "refresh": "backfill"}
CASES = [
    (step, moment)
    for step, longest_s in (("load", 0.5), ("backfill", 1.0), ("refresh", 0.5))
    for moment in kit.moments(1, step, longest_s)
]


def make_work(articles: psycopg.Connection[Any], step: str) -> None:
    """A refresh has something to do only where texts have changed."""
    if step == "refresh":
        articles.execute("UPDATE articles SET body = body || ' again' WHERE id <= 150")


@pytest.mark.parametrize(("step", "moment"), CASES)
def test_kill_9_of_the_process(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, step: str, moment: float
) -> None:
    params_file = kit.prepared(tmp_path, BEFORE[step])
    with kit.writers(database) as written:
        make_work(articles, step)
        with kit.in_a_process(step, params_file) as process:
            time.sleep(moment)
            process.kill()
        with kit.opened(params_file) as phase:
            kit.STEPS[step](phase)
    assert min(written) > 0
    kit.finish(params_file)
    assert kit.lost(database) == 0


@pytest.mark.parametrize(("step", "moment"), CASES)
def test_end_of_the_backends(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, step: str, moment: float
) -> None:
    params_file = kit.prepared(tmp_path, BEFORE[step])
    with kit.writers(database):
        make_work(articles, step)
        with kit.in_a_process(step, params_file) as process:
            time.sleep(moment)
            articles.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name ~ '^(runbook )?drill( worker| health)?$'"
            )
            process.wait(kit.LONGEST_STEP_S)
    kit.finish(params_file)
    assert kit.lost(database) == 0


@pytest.mark.parametrize("moment", kit.moments(1, "promotion", 0.3))
def test_kill_9_while_the_staging_table_takes_its_place(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, moment: float
) -> None:
    params_file = kit.prepared(tmp_path, "load", vector={"layout": "side_table"})
    with kit.writers(database), kit.in_a_process("backfill", params_file) as process:
        time.sleep(moment)
        process.kill()
    kit.finish(params_file)
    assert kit.lost(database, "side_table") == 0
