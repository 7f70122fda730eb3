"""One embedded server for the whole test session, a database of its own for each test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.cli import embedded
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings
from runbook_lib.params import Params
from tests import toy
from tests.opened import opened

DSN_ENV = "RUNBOOK_TEST_DSN"
# URL of a server, and of a superuser there, to run any test file on; it must hold nothing else.
SERVER_ENV = "RUNBOOK_TEST_SERVER"
ROOT_OF_TESTS = Path(__file__).parent
# Files of tests that start servers, kernels or programs without the fixture ``server``.
STARTS_ITS_OWN = {
    "test_embedded",
    "test_ends",
    "test_kernels",
    "test_main",
    "test_notify",
    "test_partition_by_filter",
    "test_partitions",
    "test_recipes",
    "test_replica",
    "test_replication",
    "test_server_versions",
    "test_update_extension",
}
LONGEST = {
    "test_cut_over",
    "test_ends",
    "test_lab",
    "test_live_shadow",
    "test_operate",
    "test_partition_by_filter",
    "test_partitions",
    "test_rehearse",
    "test_replica",
    "test_runner",
    "test_serve_filters",
    "test_server_versions",
    "test_storage_switch",
    "test_undo_anywhere",
    "test_update_extension",
    "test_wrong_order",
}


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, since a worker often waits for a kernel or a lock."""
    return min(4, (os.cpu_count() or 1) + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that no worker is left alone with one in the end, and marks as fast what
    starts nothing: no server, no kernel, no program; `make check` runs these.
    """
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        starts = item.path.stem in STARTS_ITS_OWN or not ROOT_OF_TESTS.samefile(item.path.parent)
        if not starts and "server" not in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """DSN of a running embedded server, or of the one that the environment names."""
    if elsewhere := os.environ.get(SERVER_ENV):
        yield elsewhere
        return
    folder = Path(tempfile.mkdtemp(prefix="runbook-tests-"))
    try:
        with embedded.running(folder / "data") as dsn:
            with psycopg.connect(dsn, autocommit=True) as admin:
                # Nothing of this server has to outlive a power cut; drills that crash one have their own.
                admin.execute("ALTER SYSTEM SET fsync = off")
                admin.execute("SELECT pg_reload_conf()")
            yield dsn
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def with_articles(server: str) -> str:
    """Name of a database with the toy table, to be copied: quicker than making the table for each test."""
    name = "with_articles"
    with psycopg.connect(server, autocommit=True) as admin:
        # A server that is not this session's own may have it from an earlier one.
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(name)))
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    with psycopg.connect(make_conninfo(server, dbname=name), autocommit=True) as connection:
        toy.create_articles(connection)
    return name


@pytest.fixture
def database(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """DSN of a database, which the parameters find through the environment; dropped afterwards.

    It holds the toy table where the test asks for ``articles``, and is empty elsewhere.
    """
    name = f"t_{abs(hash(request.node.nodeid)):x}"
    origin = request.getfixturevalue("with_articles") if "articles" in request.fixturenames else "template1"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(origin))
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(create)
        dsn = make_conninfo(server, dbname=name)
        monkeypatch.setenv(DSN_ENV, dsn)
        yield dsn
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def articles(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to a database that holds the toy table."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def make_params(tmp_path: Path) -> Callable[..., Params]:
    """Parameters for the toy table; keyword arguments replace keys of a section: ``vector={"dimension": 3}``."""

    def make(**sections: dict[str, Any]) -> Params:
        return load_params(write_params(tmp_path, **sections))

    return make


def write_params(folder: Path, **sections: dict[str, Any]) -> Path:
    """Writes a params file for the toy table, and its query files, into a folder; returns its path."""
    toy.write_queries(folder)
    data = toy.params(DSN_ENV)
    for section, values in sections.items():
        data[section] = data.get(section, {}) | values
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.fixture
def open_phase(
    articles: psycopg.Connection[Any], make_params: Callable[..., Params]
) -> Iterator[Callable[..., Phase]]:
    """Opens a phase on the toy table, with a ledger; the connections are closed after the test."""
    phases: list[Phase] = []

    def make(name: str = "00_preflight", execute: bool = True, **sections: dict[str, Any]) -> Phase:
        phases.append(opened(make_params(**sections), name, execute=execute))
        return phases[-1]

    yield make
    for phase in phases:
        phase.end("was ended by the test", "nothing")


@pytest.fixture
def filled(open_phase: Callable[..., Phase]) -> Callable[..., Phase]:
    """Opens phase 60 on a table that has its vectors."""

    def make(**sections: dict[str, Any]) -> Phase:
        phase = open_phase("60_build_index", **sections)
        for module in (extension, expand_schema, load_embeddings, backfill):
            module.apply(phase)
        return phase

    return make
