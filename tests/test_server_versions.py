"""The whole way there and back on servers of another age; what they lack is switched in runbook_lib.core.versions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

import runbook_lib
from runbook_lib.benchmark import comparison
from runbook_lib.core import versions
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.sql import load
from tests import servers, toy
from tests.conftest import DSN_ENV, write_params
from tests.servers import dump
from tests.stepping import step_all

# The toy model is worse than LIKE on these queries, and 80_shadow would say so.
SECTIONS: dict[str, dict[str, Any]] = {
    "record": {"runs_dir": "runs"},
    "cut_over": {
        "route": "vector",
        "calls_per_step": 20,
        "share_steps_percent": [100],
        "largest_relevance_loss": 1.0,
    },
    "tune": {"ef_search": [20, 60], "target_recall": 0.9},
}

# What servers came to understand after PostgreSQL 13, by the first that does; release notes of 14 to 18.
NEWER = {
    r"\bpg_stat_progress_copy\b|\b(generic|custom)_plans\b|\bpg_stat_wal\b|\bdate_bin\b|\bstring_to_table\b": 14,
    r"\bOR REPLACE TRIGGER\b|\bclient_connection_check_interval\b|\bidle_session_timeout\b": 14,
    r"\bmultirange\b|\bbit_count\b|\btrim_array\b|\bunistr\b|\w\['\w+'\]": 14,
    r"\bMERGE INTO\b|\bregexp_(count|instr|like|substr)\b|\bNULLS (NOT )?DISTINCT\b|\bsecurity_invoker\b": 15,
    r"\bGENERIC_PLAN\b|\bany_value\b|\bpg_stat_io\b|\blast_(idx|seq)_scan\b|\bn_tup_newpage_upd\b": 16,
    r"\b\d+_\d{3}\b|\bjson_(array|arrayagg|object|objectagg)\s*\(|\barray_(sample|shuffle)\b|\bIS JSON\b": 16,
    r"\bpg_stat_checkpointer\b|\bjson_(table|query|value|exists)\b|\bMERGE_ACTION\b|\bON_ERROR\b|\bpg_maintain\b": 17,
    r"\bNOT ENFORCED\b|\bVIRTUAL\b|\buuidv7\b|\barray_(sort|reverse)\b|\bpg_get_loaded_modules\b": 18,
}
# Blocks that runbook_lib.core.versions sends to newer servers only.
SWITCHED = {"health.requested_checkpoints": 17, "retire.last_scans": 16, "upgrade.loaded": 18}

READS_THE_INDEX = "SELECT body->>'vector_reads_the_index' FROM runbook.entry WHERE kind = 'shadow'"

RELEASES = ("16.14 with 0.8.5", "17.9 with 0.8.2", "18.4 with 0.8.5", "18.3 with 0.8.2")


@pytest.fixture(params=[*RELEASES, *servers.elsewhere()])
def aged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """DSN of an empty database on a server of another age, which the parameters find through the environment."""
    with servers.reached(request.param) as dsn:
        monkeypatch.setenv(DSN_ENV, dsn)
        yield dsn


def test_there_and_back_on_every_server(aged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two hundred rows are searched within milliseconds by any way: what is faster is chance here.
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    with psycopg.connect(aged, autocommit=True) as connection:
        toy.create_articles(connection, trigram=False)
        # As for fast disks: with the default, so small a table is read whole by any way.
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} SET random_page_cost = 1.1").format(name))
        before = dump(aged)
        path = write_params(tmp_path, **SECTIONS)
        step_all("migrate", MIGRATE, path)
        assert connection.execute("SELECT route, share_percent FROM runbook.route").fetchall() == [("vector", 100)]
        assert connection.execute(READS_THE_INDEX).fetchall() == [("true",)]
        assert dump(aged) != before
        step_all("undo", UNDO, path)
        assert dump(aged) == before


def test_sql_says_nothing_that_the_oldest_server_does_not_know() -> None:
    modules = [p.stem for p in (Path(runbook_lib.__file__).parent / "sql").glob("*.sql")]
    blocks = [block for module in modules for block in load(module).values()]
    found = {
        block.name: version
        for block in blocks
        for pattern, version in NEWER.items()
        if re.search(pattern, block.text, re.I)
    }
    assert found.items() <= SWITCHED.items(), "put a switch into runbook_lib.core.versions, and name the block here"


@pytest.mark.parametrize(
    ("switch", "first"),
    [
        (versions.ends_statements_of_gone_clients, 140000),
        (versions.scans_ranges_of_blocks, 140000),
        (versions.dates_index_scans, 160000),
        (versions.has_checkpointer_view, 170000),
        (versions.names_loaded_libraries, 180000),
    ],
)
def test_a_switch_turns_at_its_release(switch: Callable[[int], bool], first: int) -> None:
    assert [switch(v) for v in (130000, first - 1, first, 180006)] == [first <= 130000, False, True, True]


def test_two_modules_alone_compare_release_numbers() -> None:
    package = Path(runbook_lib.__file__).parent
    for path in package.rglob("*.py"):
        if path.stem not in ("versions", "pgvector_releases"):
            assert not re.search(r"[<>]=?\s*1[3-9]0{4}|server_version(_num)?\s*[<>]", path.read_text()), path
