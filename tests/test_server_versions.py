"""The whole way there and back on servers of another age; what they lack is switched in runbook_lib.versions."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib import compare
from runbook_lib.phase import MIGRATE, UNDO
from tests import servers, toy
from tests.conftest import DSN_ENV, write_params
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


@pytest.fixture(params=["16.14 with 0.8.5", "18.4 with 0.8.5", "18.3 with 0.8.2"])
def aged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """The release of a server that is running, and its DSN, which the parameters find through the environment."""
    with tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as folder:
        with servers.running(request.param, Path(folder) / "data") as dsn:
            monkeypatch.setenv(DSN_ENV, dsn)
            yield request.param, dsn


def dump(release: str, dsn: str) -> str:
    """The schema as the server's own pg_dump sees it, without the ledger's schema and the key drawn anew each time."""
    command = [str(servers.binaries(release) / "pg_dump"), "--schema-only", "--exclude-schema=runbook", dsn]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return "\n".join(line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))


def test_there_and_back_on_every_server(
    aged: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, dsn = aged
    # Two hundred rows are searched within milliseconds by any way: what is faster is chance here.
    monkeypatch.setattr(compare, "FAST_ENOUGH_MS", 1000)
    with psycopg.connect(dsn, autocommit=True) as connection:
        toy.create_articles(connection, trigram=False)
        before = dump(release, dsn)
        path = write_params(tmp_path, **SECTIONS)
        step_all("migrate", MIGRATE, path)
        assert connection.execute("SELECT route, share_percent FROM runbook.route").fetchall() == [("vector", 100)]
        assert dump(release, dsn) != before
        step_all("undo", UNDO, path)
        assert dump(release, dsn) == before
