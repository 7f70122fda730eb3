"""The ledger: append-only, chained, and checked from outside."""

from collections.abc import Callable

import psycopg
import pytest

from runbook_lib import db, ledger
from runbook_lib.phase import Phase


def test_a_new_ledger_verifies(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    for i in range(5):
        phase.ledger.append("note", {"i": i, "text": 'quotes " and \x1f separators'.replace("\x1f", " ")})
    g = ledger.verify_chain(phase.ledger.connection, phase.params)
    assert (g.verdict, g.figures["rows"]) == ("PASS", 5)


@pytest.mark.parametrize("statement", ["UPDATE {} SET phase = 'x'", "DELETE FROM {}", "TRUNCATE {}"])
def test_rows_cannot_be_changed_by_mistake(open_phase: Callable[..., Phase], statement: str) -> None:
    phase = open_phase()
    phase.ledger.append("note", {})
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        phase.connection.execute(statement.format("runbook.entry"))


@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        (
            """UPDATE runbook.entry SET body = '{"i": 9}' WHERE seq = 2""",
            "row 2 (note of 00_preflight, run test-run) was changed",
        ),
        ("DELETE FROM runbook.entry WHERE seq = 2", "row 2 is missing"),
        (
            "UPDATE runbook.entry SET seq = -2 WHERE seq = 2; UPDATE runbook.entry SET seq = 2 WHERE seq = 3;"
            "UPDATE runbook.entry SET seq = 3 WHERE seq = -2",
            "row 2 does not follow the row before it",
        ),
    ],
)
def test_tampering_is_found_and_named(open_phase: Callable[..., Phase], tampering: str, found: str) -> None:
    phase = open_phase()
    for i in range(4):
        phase.ledger.append("note", {"i": i})
    phase.connection.execute("ALTER TABLE runbook.entry DISABLE TRIGGER ALL")
    phase.connection.execute(tampering)
    g = ledger.verify_chain(phase.ledger.connection, phase.params)
    assert (g.verdict, g.found) == ("FAIL", found)


def test_concurrent_writers_make_one_chain(open_phase: Callable[..., Phase]) -> None:
    first, second = open_phase(), open_phase("10_baseline")
    for _ in range(20):
        first.ledger.append("note", {})
        second.ledger.append("note", {})
    assert ledger.verify_chain(first.ledger.connection, first.params).figures["rows"] == 40


def test_an_absent_ledger_says_not_run(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    phase.connection.execute("DROP SCHEMA runbook CASCADE")
    assert not phase.ledger.exists()
    assert phase.ledger.phase_verdict("00_preflight") == "NOT RUN"


def test_a_statement_waits_briefly_and_names_the_blocker(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    add = db.Statement(
        "test.add", "add a column", "ACCESS EXCLUSIVE on articles", "drop it",
        db.sql.Composed([db.sql.SQL("ALTER TABLE articles ADD COLUMN x int")]), {},
    )  # fmt: skip
    with db.connect(phase.params, "the reader") as reader, reader.transaction():
        reader.execute("SELECT count(*) FROM articles")
        with pytest.raises(db.LockNotObtained) as error:
            phase.do(add)
    assert "the reader" in error.value.found and "AccessShareLock" in error.value.found
    assert phase.do(add).tries == 1
