"""Claims: held by one run, by nobody who merely can connect, and given back when the session ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.core import claim, db
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params

TARGET, TABLE = "runbook target articles", 'runbook table "public"."articles"'
REHEARSAL = "runbook rehearsal articles"


@pytest.fixture
def anybody(database: str) -> Iterator[str]:
    """DSN of a role that can connect, and no more."""
    name = f"anybody_{abs(hash(database)):x}"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        yield make_conninfo(database, user=name)
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.mark.attack
def test_a_role_that_can_only_connect_stops_no_run(open_phase: Callable[..., Phase], anybody: str) -> None:
    """Neither by guessing a lock before, nor by waiting for one that it has seen."""
    p = open_phase().params
    with psycopg.connect(anybody, autocommit=True) as attacker:
        for subject in (TARGET, TABLE, REHEARSAL, "runbook phase articles", "runbook ledger runbook"):
            attacker.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [subject])
        with claim.held_by_runner(p, "one"):
            seen = attacker.execute(
                "SELECT classid::bigint << 32 | objid::bigint FROM pg_locks"
                " WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
            ).fetchall()
            assert len(seen) == 2
            with pytest.raises(BadInput, match="runbook-runner one"), claim.held_by_runner(p, "two"):
                pass
        with db.connect(p, "rehearses") as first, db.connect(p, "another") as second:
            assert claim.take(first, p, REHEARSAL) == []
            assert [h["application_name"] for h in claim.take(second, p, REHEARSAL)] == ["rehearses"]
            assert [h["application_name"] for h in claim.holders(second, p, REHEARSAL)] == ["rehearses"]
        for (key,) in seen:
            attacker.execute("SELECT pg_advisory_lock(%s)", [key])
        with claim.held_by_runner(p, "three"):
            pass
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            attacker.execute("SELECT * FROM runbook.claims")


@pytest.mark.attack
def test_two_targets_on_one_table_do_not_run_at_once(
    open_phase: Callable[..., Phase], make_params: Callable[..., Params]
) -> None:
    first = open_phase().params
    second = make_params(target={"name": "second"})
    with claim.held_by_runner(first, "one"):
        with pytest.raises(BadInput) as error, claim.held_by_runner(second, "two"):
            pass
        gate = error.value.problems.gates[0]
        assert (gate.name, gate.subject) == ("phase.target_is_free", '"public"."articles"')
        assert gate.found.startswith("pid ") and ", runbook-runner one, postgres, since " in gate.found
        assert gate.found.endswith(", from the server's own machine")
    with claim.held_by_runner(second, "two"):
        pass


@pytest.mark.usefixtures("articles")
def test_before_there_is_a_ledger_the_holder_is_named_and_still_holds_after_it(
    make_params: Callable[..., Params], open_phase: Callable[..., Phase], anybody: str, tmp_path: Path
) -> None:
    p = make_params()
    with psycopg.connect(anybody, autocommit=True, application_name="a guess") as attacker:
        attacker.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [TARGET])
        with pytest.raises(BadInput, match=", a guess, anybody_"), claim.held_by_runner(p, "one"):
            pass
    with claim.held_by_runner(p, "one"):
        open_phase()
        with pytest.raises(BadInput, match="runbook-runner one"), claim.held_by_runner(p, "two"):
            pass
        with ExitStack() as held:
            own = held.enter_context(db.connect(p, "runbook one 00_preflight ledger"))
            claim.take_for_notebook(own, p, "one")
            other = held.enter_context(db.connect(p, "runbook two 00_preflight ledger"))
            with pytest.raises(BadInput, match=r"runbook(-runner)? one"):
                claim.take_for_notebook(other, p, "two")
