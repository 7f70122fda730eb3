"""The whole way with IVFFlat, there and back; and lists that have aged are found, named and made again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from runbook_lib.benchmark import comparison
from runbook_lib.core.gates import Gate, GateFailed
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings, tune
from runbook_lib.operate import ivfflat_drift, rebuild_index
from runbook_lib.search import search_function
from tests import toy
from tests.conftest import DSN_ENV, write_params
from tests.opened import opened_for_a_while
from tests.servers import dump
from tests.stepping import step, step_all
from tests.test_migration import rows
from tests.test_server_versions import SECTIONS

ROWS, LISTS = 900, 16
IVFFLAT: dict[str, Any] = SECTIONS | {
    "index": {"method": "ivfflat", "lists": LISTS},
    "tune": {"probes": [1, 2, 4, 8, 16], "target_recall": 0.95, "queries": 100},
    "embeddings": {"callable": "tests.test_ivfflat:embed"},
}


def embed(texts: list[str]) -> np.ndarray:
    """A direction of its own for each text. That of a new one lies nearly at right angles to all that are old, and
    that of one that is quite new at right angles, so that no centre of theirs is nearer to it than another.
    """
    vectors = np.zeros((len(texts), toy.DIMENSION), dtype=np.float32)
    half = toy.DIMENSION // 2
    for i, text in enumerate(texts):
        draw = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
        words = set(text.split())
        vectors[i, half:] = draw.normal(size=half) if words & {"new", "newest"} else 0
        vectors[i, :half] = draw.normal(size=half) * (0 if "newest" in words else 0.15 if "new" in words else 1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def add(connection: psycopg.Connection[Any], kind: str, how_many: int) -> None:
    connection.execute(
        "INSERT INTO articles (title, body) SELECT %s, 'row ' || i FROM generate_series(1, %s) i", [kind, how_many]
    )
    connection.execute("ANALYZE articles")


def lists_of(connection: psycopg.Connection[Any]) -> tuple[Any, ...] | None:
    return connection.execute(
        "SELECT reloptions, oid FROM pg_class WHERE relname = 'articles_embedding_ivfflat'"
    ).fetchone()


def test_there_through_age_and_a_rebuild_and_back(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles.execute("ALTER TABLE articles SET (autovacuum_enabled = off)")
    add(articles, "old", ROWS)
    # A busy machine says nothing of the search: differences below this count as noise.
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000.0)
    before, own_rows = dump(database), rows(articles)
    path = write_params(tmp_path, **IVFFLAT)
    step_all("migrate", MIGRATE, path)
    settings = articles.execute(
        "SELECT proconfig FROM pg_proc WHERE proname = 'search_articles' AND proconfig::text ~ 'ivfflat'"
    ).fetchone()
    assert settings and "ivfflat.iterative_scan=relaxed_order" in settings[0]
    assert any(s.startswith("ivfflat.probes=") for s in settings[0])
    vector = "(SELECT embedding FROM articles WHERE id = 3)::real[]"
    answer = articles.execute(f"SELECT id, answered_by FROM search_articles('x', {vector}, 3)").fetchall()
    assert len(answer) == 3 and toy.as_near_as_row_3(answer[0])
    articles.execute("VACUUM ANALYZE articles")
    young = step("operate/monitor", path)["gates"]
    assert {g.name: str(g.verdict) for g in young if g.name.startswith("drift.")} == {"drift.lists_are_even": "PASS"}

    add(articles, "new", ROWS)
    step("operate/refresh", path)
    articles.execute("VACUUM ANALYZE articles")
    with pytest.raises(GateFailed) as raised:
        step("operate/monitor", path)
    aged = {g.name: g for g in raised.value.gates.failed}
    found = aged["drift.new_rows_are_found"]
    assert found.figures["newer"] < 0.85 < 0.88 < found.figures["older"]
    assert (
        f"{ROWS:,} of {2 * ROWS + toy.ROWS:,} rows are newer than the index, and the table holds 1.8 × the rows"
        in (found.found)
    )
    assert found.do.startswith("run operate/rebuild_index")

    was = lists_of(articles)
    step("operate/rebuild_index", path)
    now = lists_of(articles)
    assert was and now and (was[0], was[1] != now[1]) == (now[0], True)
    again = step("operate/monitor", path)["gates"]
    assert again.passed, str(again)
    by_name = {g.name: g for g in again}
    assert "drift.new_rows_are_found" not in by_name
    assert by_name["drift.lists_are_even"].found.endswith(
        f"; 0 of {2 * ROWS + toy.ROWS:,} rows are newer than the index, too few to judge how they are found"
    )

    step_all("undo", UNDO, path)
    assert dump(database) == before
    assert rows(articles)[: len(own_rows)] == own_rows


@pytest.fixture(scope="module")
def template(server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a database of old rows, with an index and its setting, to be copied."""
    name, folder = "ivfflat", tmp_path_factory.mktemp("ivfflat")
    dsn = make_conninfo(server, dbname=name)
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as patch:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        patch.setenv(DSN_ENV, dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            toy.create_articles(connection)
            connection.execute("ALTER TABLE articles SET (autovacuum_enabled = off)")
            add(connection, "old", ROWS)
        with opened(write_params(folder, **IVFFLAT)) as phase:
            phase.ledger.create()
            for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index, tune):
                module.apply(phase)
    return name


@contextmanager
def opened(path: Path, name: str = "operate/monitor") -> Iterator[Phase]:
    with opened_for_a_while(load_params(path), name) as phase:
        yield phase


@pytest.fixture
def copied(server: str, template: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection[Any]]:
    """A copy of it, which the parameters find. It goes with the server: each DROP would wait for a checkpoint."""
    dsn = make_conninfo(server, dbname=f"ivfflat_{time.monotonic_ns()}")
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [template])
        names = [sql.Identifier(str(conninfo_to_dict(dsn)["dbname"])), sql.Identifier(template)]
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*names))
    monkeypatch.setenv(DSN_ENV, dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def watching(copied: psycopg.Connection[Any], tmp_path: Path) -> Iterator[Phase]:
    with opened(write_params(tmp_path, **IVFFLAT)) as phase:
        yield phase


def insert(connection: psycopg.Connection[Any], kind: str, how_many: int) -> None:
    """Rows that have their vectors already, as operate/refresh leaves them."""
    vectors = embed([f"{kind} {i}" for i in range(how_many)])
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO articles (title, embedding, embedding_updated_at)"
            " VALUES (%s, %s::real[], clock_timestamp())",
            [(kind, [float(x) for x in v]) for v in vectors],
        )
    connection.execute("ANALYZE articles")


def by_name(phase: Phase) -> dict[str, Gate]:
    return {g.name: g for g in ivfflat_drift.gates(phase.connection, phase.ledger, phase.params)}


def test_rows_that_fill_one_list_make_the_lists_uneven(watching: Phase, copied: psycopg.Connection[Any]) -> None:
    assert str(by_name(watching)["drift.lists_are_even"].verdict) == "PASS"
    insert(copied, "newest", ROWS)
    uneven = by_name(watching)["drift.lists_are_even"]
    held = uneven.figures["rows_of_a_list"]
    # By hand: half of the rows looked at lie in the list that holds all of the new ones.
    expected = (ROWS + (ROWS + toy.ROWS) / LISTS) / 2
    assert held == pytest.approx(expected, rel=0.35)
    assert (str(uneven.verdict), uneven.figures["lists"]) == ("FAIL", LISTS)
    assert str(uneven).endswith(
        "  needed  at most 4 × (watch.list_unevenness)\n"
        "  danger  a probe of a crowded list reads much of the table, and the others find little\n"
        "  do      run operate/rebuild_index, which makes the lists of the rows of today; then 70_tune"
    )


def test_more_rows_of_the_same_kind_are_no_drift(watching: Phase, copied: psycopg.Connection[Any]) -> None:
    insert(copied, "also old", ROWS)
    gates = by_name(watching)
    assert {str(g.verdict) for g in gates.values()} == {"PASS"}
    assert gates["drift.new_rows_are_found"].figures["growth"] == pytest.approx(1.8, abs=0.05)
    assert gates["drift.new_rows_are_found"].figures["rows_newer"] == ROWS


def test_a_few_new_rows_are_too_few_to_judge(watching: Phase, copied: psycopg.Connection[Any]) -> None:
    insert(copied, "new", ivfflat_drift.FEWEST_ROWS - 1)
    gates, rows = by_name(watching), ROWS + toy.ROWS + ivfflat_drift.FEWEST_ROWS - 1
    assert list(gates) == ["drift.lists_are_even"], "nothing is said to pass that was not looked at"
    assert gates["drift.lists_are_even"].found.split("; ")[1] == (
        f"9 of {rows:,} rows are newer than the index, too few to judge how they are found"
    )
    insert(copied, "new", 1)
    judged = by_name(watching)
    assert list(judged) == ["drift.new_rows_are_found", "drift.lists_are_even"]
    assert judged["drift.new_rows_are_found"].found.startswith("recall@") and "too few" not in str(judged)


@pytest.mark.usefixtures("copied")
def test_another_method_has_no_lists(tmp_path: Path) -> None:
    with opened(write_params(tmp_path, **IVFFLAT | {"index": {"method": "hnsw"}})) as phase:
        assert by_name(phase) == {}


def test_lists_made_of_too_little_data_stop_the_way_until_they_are_made_anew(
    articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    path = write_params(tmp_path, **IVFFLAT | {"index": {"method": "ivfflat", "lists": 400}})
    step_all("migrate", MIGRATE[:6], path)
    for _ in range(2):
        with pytest.raises(GateFailed) as raised:
            step("migrate/60_build_index", path)
        (failed,) = raised.value.gates.failed
        assert (failed.name, failed.found) == (
            "index.was_built_without_warning",
            "ivfflat index created with little data",
        ), "run again, it does not forget"
    with pytest.raises(GateFailed, match="60_build_index"):
        step("migrate/70_tune", path)
    step("undo/index", path)
    path = write_params(tmp_path, **IVFFLAT | {"index": {"method": "ivfflat"}})
    step_all("migrate", MIGRATE[6:8], path)
    found = lists_of(articles)
    assert found and found[0] == ["lists=1"], "by pgvector's rule, a list for each thousand rows"


def test_the_rebuilt_index_is_measured_against_the_aged_one(copied: psycopg.Connection[Any], tmp_path: Path) -> None:
    insert(copied, "new", ROWS)
    path = write_params(tmp_path, **IVFFLAT | {"queries": {"judgements": None}})
    # Searches for what is new, which the aged lists find by chance alone: no luck of a build makes them as good.
    queries = [{"query_id": str(i), "text": f"new words {i}"} for i in range(40)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    with opened(path, "operate/rebuild_index") as phase:
        rebuild_index.apply(phase)
        gates = rebuild_index.verify_new(phase)
        assert gates.passed, str(gates)
        measured = next(g for g in gates if g.name == "rebuild.new_index_finds_as_much").figures
        rebuild_index.swap(phase)
        latest = phase.ledger.latest("index")
    assert measured["before"] < 0.65 < measured["after"], "what is needed is what the aged index finds"
    assert latest and latest["rows"] == 2 * ROWS + toy.ROWS, "the lists' age counts from the new build"
