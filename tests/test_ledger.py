"""The ledger: append-only, chained, and checked from outside."""

from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput
from runbook_lib.core.ledger import HEADS
from runbook_lib.core.phase import Phase
from runbook_lib.runner import verify
from tests.conftest import DSN_ENV
from tests.opened import write


def test_a_new_ledger_verifies(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    for i in range(5):
        phase.ledger.append("note", {"i": i, "text": 'quotes " and \x1f separators'.replace("\x1f", " ")})
    g = verify.verify_chain(phase.ledger.connection, phase.params)
    assert (g.verdict, g.figures["rows"]) == ("PASS", 5)


@pytest.mark.attack
@pytest.mark.parametrize("statement", ["UPDATE {} SET phase = 'x'", "DELETE FROM {}", "TRUNCATE {}"])
def test_rows_cannot_be_changed_by_mistake(open_phase: Callable[..., Phase], statement: str) -> None:
    phase = open_phase()
    phase.ledger.append("note", {})
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        write(phase, statement.format("runbook.entry"))


@pytest.mark.attack
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
    write(phase, "ALTER TABLE runbook.entry DISABLE TRIGGER ALL")
    write(phase, tampering)
    g = verify.verify_chain(phase.ledger.connection, phase.params)
    assert (g.verdict, g.found) == ("FAIL", found)


def test_concurrent_writers_make_one_chain(open_phase: Callable[..., Phase]) -> None:
    first, second = open_phase(), open_phase("10_baseline")
    for _ in range(20):
        first.ledger.append("note", {})
        second.ledger.append("note", {})
    assert verify.verify_chain(first.ledger.connection, first.params).figures["rows"] == 40


def test_a_frame_of_the_ledger_holds_its_rows_or_those_of_a_kind_or_a_part_of_the_newest(
    open_phase: Callable[..., Phase],
) -> None:
    phase = open_phase()
    assert list(phase.ledger.to_frame().columns) == [*HEADS, "body"] and len(phase.ledger.to_frame()) == 0
    for seconds in (1.5, 2):
        phase.ledger.append("toy", {"seconds": seconds, "kind": "its own", "way": {"lists": 3}})
    phase.ledger.append("sweep", {"points": [{"recall": 0.5}, {"recall": 1}], "by": {"a": {"n": 1}, "b": 2}})
    whole = phase.ledger.to_frame()
    assert whole["kind"].tolist() == ["toy", "toy", "sweep"] and whole["written_at"].dtype.kind == "M"
    toys = phase.ledger.to_frame("toy")
    assert toys["seconds"].tolist() == [1.5, 2] and toys["way.lists"].dtype == "int64"
    assert toys["kind"].tolist() == ["toy"] * 2 and toys["body.kind"].tolist() == ["its own"] * 2
    assert phase.ledger.to_frame("sweep", "points")["recall"].tolist() == [0.5, 1]
    assert phase.ledger.to_frame("sweep", "by")["name"].tolist() == ["a", "b"]
    assert len(phase.ledger.to_frame("toy", run_id="another")) == len(phase.ledger.to_frame("none", "points")) == 0
    with pytest.raises(ValueError, match="no part 'point' in the newest row of kind 'sweep'; there are: by, points"):
        phase.ledger.to_frame("sweep", "point")


def test_an_absent_ledger_says_not_run(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    write(phase, "DROP SCHEMA runbook CASCADE")
    assert not phase.ledger.exists()
    assert phase.ledger.phase_verdict("00_preflight") == "NOT RUN"
    assert len(phase.ledger.to_frame()) == len(phase.ledger.to_frame("tuning", "points")) == 0


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


EARLIER = """
    DROP TRIGGER chain ON runbook.entry; DROP TRIGGER keep ON runbook.entry;
    DROP FUNCTION runbook.sign_off(bigint, jsonb, text); DROP FUNCTION runbook.chain_entry();
    DROP TABLE runbook.claims, runbook.chain_lock; ALTER TABLE runbook.entry DROP COLUMN by_owner;
    UPDATE runbook.entry SET hash = encode(sha256(convert_to(concat_ws(E'\\x1f', previous_hash, seq, target, run_id,
        phase, kind, to_char(written_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), written_by, body),
        'UTF8')), 'hex')
"""


def test_a_ledger_of_an_earlier_release_is_named_and_brought_up_to_date(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    phase.ledger.append("phase", {"verdict": "PASS"})
    write(phase, EARLIER)
    with pytest.raises(BadInput) as error:
        phase.ledger.phase_verdict("00_preflight")
    assert str(error.value.problems) == (
        'FAIL    ledger.is_up_to_date   "runbook"."entry"\n'
        "  found   made by an earlier release: no row says whether the ledger's owner wrote it\n"
        "  needed  the ledger of this release\n"
        "  danger  a row that somebody else wrote could not be told from one of the runbook's\n"
        "  do      let the ledger's owner run any command with --execute, or open any notebook with execute: true: it"
        " adds the column and keeps every row"
    )
    phase.ledger.bring_up_to_date()
    phase.ledger.bring_up_to_date()
    assert phase.ledger.phase_verdict("00_preflight") == "PASS"
    phase.ledger.append("note", {})
    g = verify.verify_chain(phase.ledger.connection, phase.params)
    assert (g.verdict, g.figures["rows"]) == ("PASS", 2)


@pytest.mark.attack
def test_marking_an_older_row_as_the_owners_is_tampering(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    phase.ledger.append("note", {})
    write(phase, EARLIER)
    phase.ledger.create()
    write(phase, "ALTER TABLE runbook.entry DISABLE TRIGGER ALL; UPDATE runbook.entry SET by_owner = true")
    g = verify.verify_chain(phase.ledger.connection, phase.params)
    assert (g.verdict, g.found) == ("FAIL", "row 1 (note of 00_preflight, run test-run) was changed")


def test_what_an_error_quotes_can_be_written_down(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    phase.ledger.append("note", {"error": "a\x00b \ud800", "list": ["\x00"]})
    assert phase.ledger.latest("note") == {"error": "a\u2400b \\ud800", "list": ["\u2400"]}


@pytest.mark.attack
def test_a_schema_that_somebody_made_before_us_is_refused(open_phase: Callable[..., Phase]) -> None:
    """Its owner's triggers and functions would run with the rights of a migrating superuser."""
    phase = open_phase()
    write(phase, "DROP SCHEMA runbook CASCADE; CREATE ROLE squatter")
    try:
        write(phase, "CREATE SCHEMA runbook AUTHORIZATION squatter")
        with pytest.raises(BadInput) as error:
            phase.ledger.create()
        assert error.value.problems.gates[0].found == "squatter owns the schema"
        write(
            phase,
            "ALTER SCHEMA runbook OWNER TO postgres; GRANT CREATE ON SCHEMA runbook TO squatter;"
            "SET ROLE squatter; CREATE TABLE runbook.entry (seq int); RESET ROLE",
        )
        with pytest.raises(BadInput, match="squatter owns entry"):
            phase.ledger.create()
        write(phase, "GRANT squatter TO postgres")
        write(phase, "DROP TABLE runbook.entry")
        phase.ledger.create()
        assert phase.ledger.exists()
    finally:
        write(phase, "DROP OWNED BY squatter; DROP ROLE squatter")


def test_whoever_keeps_the_turn_to_write_is_named(
    open_phase: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = open_phase()
    write(phase, "ALTER FUNCTION runbook.chain_entry() SET lock_timeout = '50ms'")
    with db.connect(phase.params, "left open") as other, other.transaction():
        other.execute("LOCK TABLE runbook.chain_lock IN EXCLUSIVE MODE")
        with pytest.raises(db.LockNotObtained) as error:
            phase.ledger.append("note", {})
    assert error.value.found.endswith("(postgres, left open, idle in transaction)")
    phase.ledger.append("note", {})


@pytest.mark.attack
def test_a_guessed_advisory_lock_stops_no_row(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase()
    with db.connect(phase.params, "somebody") as other:
        other.execute("SELECT pg_advisory_lock(hashtextextended('runbook ledger runbook', 0))")
        phase.ledger.append("note", {})


@pytest.mark.attack
@pytest.mark.usefixtures("articles")
def test_a_role_that_does_not_own_the_ledger_is_told_so(
    open_phase: Callable[..., Phase], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = open_phase()
    write(phase, "CREATE ROLE other_dba LOGIN; GRANT USAGE ON SCHEMA runbook TO other_dba;"
                             "GRANT ALL ON runbook.entry TO other_dba")  # fmt: skip
    try:
        monkeypatch.setenv(DSN_ENV, make_conninfo(database, user="other_dba"))
        with db.connect(phase.params, "other") as connection:
            with pytest.raises(BadInput) as error:
                replace(phase.ledger, connection=connection).append("note", {})
            assert str(error.value.problems) == (
                'FAIL    ledger.takes_rows_from_this_role   "runbook"."entry"\n'
                "  found   owned by postgres, and other_dba is not a member of it\n"
                "  needed  the role that owns the ledger, or a member of it: nobody else's rows open phases\n"
                "  danger  what this role does could not be written down, so it was not done\n"
                "  do      have a superuser run: GRANT postgres TO other_dba;"
            )
    finally:
        write(phase, "DROP OWNED BY other_dba; DROP ROLE other_dba")
