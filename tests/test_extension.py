"""Phase 20: installed, updated, applied twice, and removed only where the runbook brought it."""

from collections.abc import Callable
from typing import Any

import psycopg

from runbook_lib.core.phase import Phase
from runbook_lib.migrate import extension

OpenPhase = Callable[..., Phase]


def _verdicts(phase: Phase) -> list[tuple[str, str]]:
    return [(g.name, str(g.verdict)) for g in extension.verify(phase)]


ALL_PASS = [
    ("extension.version_is_recent_enough", "PASS"),
    ("extension.library_and_catalogue_agree", "PASS"),
]


def test_it_is_installed_and_a_second_apply_does_nothing(open_phase: OpenPhase) -> None:
    phase = open_phase("20_extension")
    assert [s.text(phase.connection) for s in extension.plan(phase)] == ['CREATE EXTENSION vector SCHEMA "public";']
    extension.apply(phase)
    assert _verdicts(phase) == ALL_PASS
    assert not list(extension.plan(phase))
    assert extension.apply(phase).rows == []
    statements = [e["body"]["name"] for e in phase.ledger.entries() if e["kind"] == "statement"]
    assert statements == ["extension.create"]


def test_a_version_asked_for_is_written_into_the_statement(open_phase: OpenPhase) -> None:
    phase = open_phase("20_extension", extension={"version": "0.8.6"})
    (create,) = extension.plan(phase)
    assert create.text(phase.connection) == """CREATE EXTENSION vector SCHEMA "public" VERSION '0.8.6';"""
    extension.apply(phase)
    assert _verdicts(phase) == ALL_PASS


def test_a_schema_that_needs_quoting_is_on_the_search_path_afterwards(
    articles: psycopg.Connection[Any], open_phase: OpenPhase
) -> None:
    articles.execute('CREATE SCHEMA "Ext %s; --"')
    phase = open_phase("20_extension", extension={"schema": "Ext %s; --"})
    extension.apply(phase)
    assert _verdicts(phase) == ALL_PASS
    assert phase.connection.execute("SELECT '[1,2]'::vector <-> '[1,2]' AS d").fetchone() == {"d": 0}


def test_an_older_catalogue_is_updated(articles: psycopg.Connection[Any], open_phase: OpenPhase) -> None:
    phase = open_phase("20_extension")
    articles.execute("CREATE EXTENSION vector; UPDATE pg_extension SET extversion = '0.8.2' WHERE extname = 'vector'")
    assert [g.verdict for g in extension.verify(phase)] == ["PASS", "FAIL"]
    assert [s.text(phase.connection) for s in extension.plan(phase)] == ["ALTER EXTENSION vector UPDATE;"]
    assert [row[0] for row in extension.brings(phase.connection, phase.params).rows] == [
        "0.8.3",
        "0.8.4",
        "0.8.5",
        "0.8.6",
    ]
    extension.apply(phase)
    assert _verdicts(phase) == ALL_PASS


def test_before_the_phase_both_gates_say_what_to_do(open_phase: OpenPhase) -> None:
    assert str(extension.verify(open_phase("20_extension"))) == (
        "FAIL    extension.version_is_recent_enough   vector\n"
        "  found   not installed\n"
        "  needed  0.8.2 or newer\n"
        "  danger  there is no type to store vectors in\n"
        "  do      run 20_extension with execute: true; the server needs the package of that release first\n"
        "FAIL    extension.library_and_catalogue_agree   vector\n"
        "  found   not installed\n"
        "  needed  one release in catalogue, files and library, which knows hnsw.iterative_scan\n"
        "  danger  fixes live in the library alone: the catalogue may name a release whose fixes are not loaded\n"
        "  do      leave extension.version out and run 20_extension again; sessions from before a package update"
        " keep the old library until they reconnect"
    )


def test_an_old_release_names_the_faults_it_has(articles: psycopg.Connection[Any], open_phase: OpenPhase) -> None:
    articles.execute("CREATE EXTENSION vector; UPDATE pg_extension SET extversion = '0.8.1' WHERE extname = 'vector'")
    g = extension.verify(open_phase("20_extension")).gates[0]
    assert (g.verdict, g.found) == ("FAIL", "0.8.1")
    assert g.danger == "CVE-2026-3172: buffer overflow in parallel HNSW builds, 0.6.0 to 0.8.1"


def test_a_placeholder_of_the_same_name_is_no_library(open_phase: OpenPhase) -> None:
    phase = open_phase("20_extension")
    phase.connection.execute("SET hnsw.iterative_scan = 'strict_order'")
    known = phase.connection.execute(extension.SQL["library_knows"].text, {"setting": "hnsw.iterative_scan"})
    assert known.fetchone() == {"known": False}


def test_undo_removes_what_the_runbook_installed_and_can_be_repeated(open_phase: OpenPhase) -> None:
    phase = open_phase("20_extension")
    extension.apply(phase)
    extension.undo(phase)
    assert phase.connection.execute("SELECT FROM pg_extension WHERE extname = 'vector'").fetchone() is None
    assert extension.verify_undone(phase).gates[0].found == "not installed"
    assert not list(extension.undo_plan(phase))
    extension.apply(phase)
    assert [s.name for s in extension.undo_plan(phase)] == ["extension.drop"]


def test_undo_leaves_an_extension_that_was_there_before(
    articles: psycopg.Connection[Any], open_phase: OpenPhase
) -> None:
    articles.execute("CREATE EXTENSION vector")
    phase = open_phase("20_extension")
    extension.apply(phase)
    assert extension.undo(phase).rows == []
    g = extension.verify_undone(phase).gates[0]
    assert (g.verdict, g.found) == ("PASS", "0.8.6, there before the runbook or installed by another role: it stays")


def test_undo_leaves_an_extension_that_others_have_come_to_use(
    articles: psycopg.Connection[Any], open_phase: OpenPhase
) -> None:
    phase = open_phase("20_extension")
    extension.apply(phase)
    articles.execute("CREATE TABLE theirs (a vector(3), b halfvec[])")
    articles.execute("CREATE INDEX theirs_ix ON theirs USING hnsw (a vector_l2_ops)")
    assert extension.undo(phase).rows == []
    g = extension.verify_undone(phase).gates[0]
    assert (g.verdict, g.found) == (
        "PASS",
        "0.8.6, used by column a of table theirs, column b of table theirs, index theirs_ix: it stays",
    )
    articles.execute("DROP TABLE theirs")
    assert extension.verify_undone(phase).gates[0].verdict == "FAIL"
    extension.undo(phase)
    assert extension.verify_undone(phase).passed


def test_without_execute_nothing_is_installed(open_phase: OpenPhase) -> None:
    phase = open_phase("20_extension", execute=False)
    assert extension.apply(phase).rows == [("Install pgvector: its types, operators and index methods.",)]
    assert [s.name for s in extension.plan(phase)] == ["extension.create"]
