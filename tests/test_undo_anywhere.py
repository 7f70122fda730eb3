"""The rollback leads home from anywhere: after each phase, and after one that failed half-way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.backfill import workers
from runbook_lib.benchmark import comparison
from runbook_lib.core import db
from runbook_lib.core.gates import GateFailed
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.indexes import building
from runbook_lib.migrate import cut_over
from tests import toy
from tests.conftest import DSN_ENV, write_params
from tests.servers import dump
from tests.stepping import step, step_all
from tests.test_server_versions import SECTIONS

# Small batches, so that there is a middle to fail in; two shares, so that there is one between them.
WAY = SECTIONS | {
    "embeddings": {"batch_rows": 40},
    "backfill": {"batch_rows": 20, "most_batch_rows": 20},
    "cut_over": SECTIONS["cut_over"] | {"share_steps_percent": [50, 100]},
}
CHECKSUM = """
    SELECT md5(string_agg(concat_ws('|', id, title, body, status, views, tsv), E'\\n' ORDER BY id)) FROM articles
"""


class Stopped(Exception):
    """What stands for a crash in the middle of a phase."""


def stop_at(n: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which at its n-th call stops the phase."""
    calls = itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == n:
            raise Stopped
        return real(*arguments, **named)

    return call


def knows_no_socket(texts: list[str], model: Callable[[list[str]], np.ndarray] = toy.embed) -> np.ndarray:
    """The toy model, which fails at one word: the load gets as far as those rows."""
    if any("socket" in text for text in texts):
        raise Stopped
    return model(texts)


@contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, value)
        yield


@contextmanager
def a_build_that_times_out(dsn: str) -> Iterator[None]:
    """A writer that does not end, and a build that gives up waiting for it: what is left is an invalid index."""
    real = building.SQL["settings"]
    text = real.text.replace("('statement_timeout', '0', false)", "('statement_timeout', '500', false)")
    assert text != real.text
    with psycopg.connect(dsn) as writer, pytest.MonkeyPatch.context() as patch:
        writer.execute("UPDATE articles SET views = views WHERE id = 1")
        patch.setitem(building.SQL, "settings", replace(real, text=text))
        yield
        writer.rollback()


@dataclass(frozen=True)
class Failure:
    """How a phase is made to fail, what it raises, and what it leaves, as a query that says true."""

    ends: Callable[[str], AbstractContextManager[Any]]
    raises: type[BaseException]
    leaves: str


FAILURES = {
    "30_expand_schema": Failure(
        lambda _: patched(db, "carry_out", stop_at(4, db.carry_out)),
        Stopped,
        "SELECT to_regclass('runbook.articles_staging') IS NOT NULL"
        " AND NOT EXISTS (SELECT FROM pg_trigger WHERE tgname LIKE 'runbook_%')",
    ),
    "40_load_embeddings": Failure(
        lambda _: patched(toy, "embed", knows_no_socket),
        GateFailed,
        "SELECT count(*) BETWEEN 1 AND 199 FROM runbook.articles_staging",
    ),
    "50_backfill": Failure(
        lambda _: patched(workers, "_update", stop_at(4, workers._update)),
        Stopped,
        "SELECT count(embedding) BETWEEN 1 AND 199 FROM articles",
    ),
    "60_build_index": Failure(
        a_build_that_times_out,
        psycopg.errors.QueryCanceled,
        "SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass('articles_embedding_hnsw')",
    ),
    "90_cut_over": Failure(
        lambda _: patched(cut_over, "_call", stop_at(2, cut_over._call)),
        Stopped,
        "SELECT (route, share_percent) = ('vector', 100) FROM runbook.route",
    ),
}


@dataclass(frozen=True)
class Points:
    """DSNs of a database for each point of the way there; the schema and the checksum from before the first."""

    after: dict[str, str]
    before: dict[str, str]
    schema: str
    checksum: str


def checksum(dsn: str) -> str:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(CHECKSUM).fetchone()
        return str(row[0]) if row else ""


@pytest.fixture(scope="module")
def points(server: str, tmp_path_factory: pytest.TempPathFactory) -> Points:
    """Goes the way there once; keeps a copy after each phase, and one before each that is made to fail."""
    path = write_params(tmp_path_factory.mktemp("way"), **WAY)
    chain = make_conninfo(server, dbname="way")
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as patch:

        def copied(name: str) -> str:
            # The sessions of the phase have been closed; one that is still ending would be in the way.
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'way'")
            admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE way").format(sql.Identifier(name)))
            return make_conninfo(server, dbname=name)

        admin.execute("CREATE DATABASE way")
        with psycopg.connect(chain, autocommit=True) as connection:
            toy.create_articles(connection)
        found = Points({}, {}, dump(chain), checksum(chain))
        patch.setenv(DSN_ENV, chain)
        # A busy machine says nothing of the search: differences below this count as noise.
        patch.setattr(comparison, "FAST_ENOUGH_MS", 1000.0)
        for name in MIGRATE:
            if name in FAILURES:
                found.before[name] = copied(f"before_{name}")
            step(f"migrate/{name}", path)
            found.after[name] = copied(f"after_{name}")
    # The databases go with the server: dropped one by one, each would wait for a checkpoint.
    return found


def assert_back_home(dsn: str, points: Points) -> None:
    assert dump(dsn) == points.schema
    assert checksum(dsn) == points.checksum
    with psycopg.connect(dsn) as connection:
        left = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('runbook')"
            " AND relkind = 'r' AND relname NOT IN ('entry', 'route', 'strategy', 'approval', 'control',"
            " 'chain_lock', 'claims', 'words', 'hybrid')"
        ).fetchall()
        assert left == [], "only the records are left, and tables that targets share"


@pytest.mark.parametrize("after", MIGRATE)
def test_after_each_phase(points: Points, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: str) -> None:
    dsn = points.after[after]
    monkeypatch.setenv(DSN_ENV, dsn)
    with psycopg.connect(dsn) as connection:
        # The share of the work that this copy has behind it; a test of the rollback from nothing cannot fail.
        proved = connection.execute("SELECT count(DISTINCT phase) FROM runbook.entry WHERE kind = 'phase'").fetchone()
    assert proved == (MIGRATE.index(after) + 1,)
    path = write_params(tmp_path, **WAY)
    step_all("undo", UNDO, path)
    assert_back_home(dsn, points)
    step_all("undo", UNDO, path)
    assert_back_home(dsn, points)


@pytest.mark.parametrize("failed", FAILURES)
def test_after_a_phase_that_failed_half_way(
    points: Points, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failed: str
) -> None:
    failure, dsn = FAILURES[failed], points.before[failed]
    monkeypatch.setenv(DSN_ENV, dsn)
    path = write_params(tmp_path, **WAY)
    with pytest.raises(failure.raises), failure.ends(dsn):
        step(f"migrate/{failed}", path)
    with psycopg.connect(dsn) as connection:
        assert connection.execute(failure.leaves).fetchone() == (True,), "it failed before or after its middle"
    step_all("undo", UNDO, path)
    assert_back_home(dsn, points)
