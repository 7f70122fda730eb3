"""A phase on the dictionaries' table, with vectors and index, kept for all benchmarks of a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg.conninfo import make_conninfo

from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.search import search_function
from tests.benchmarks import dictionaries
from tests.opened import gates_passed

DSN_ENV = "RUNBOOK_BENCHMARK_DSN"


@pytest.fixture(scope="session")
def dictionary(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Phase]]:
    """Opens phase 70 on the glosses; keyword arguments replace keys of a section of the parameters."""
    folder = tmp_path_factory.mktemp("glosses")
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("CREATE DATABASE glosses")
    os.environ[DSN_ENV] = make_conninfo(server, dbname="glosses")
    with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as connection:
        dictionaries.create(connection)
    opened: list[Phase] = []

    def make(**sections: dict[str, Any]) -> Phase:
        path = Path(folder, "params.yaml")
        path.write_text(yaml.safe_dump(dictionaries.params(folder, DSN_ENV, **sections)))
        p = load_params(path)
        ledger = Ledger(db.connect(p, "benchmark ledger"), p, "benchmark", "70_tune")
        ledger.create()
        phase = gates_passed(Phase("70_tune", "benchmark", True, p, db.connect(p, "benchmark"), ledger))
        search_function.apply(phase)
        for module in (extension, expand_schema, load_embeddings, backfill, build_index) if not opened else ():
            module.apply(phase)
        phase.connection.execute("VACUUM ANALYZE glosses")
        db.use_search_path(phase.connection)
        opened.append(phase)
        return phase

    yield make
    for phase in opened:
        phase.end("was ended by the test", "nothing")
