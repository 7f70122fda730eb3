"""Sign-off: by another database user, of this plan, on this evidence; whatever changes one of them voids it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.cli.main import main
from runbook_lib.core import approval, ledger
from runbook_lib.core.gates import BadInput, GateFailed, NotApproved
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, STEPS, notebook
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from tests.conftest import DSN_ENV, write_params
from tests.opened import write

PHASE = "30_expand_schema"
WAITING = {"approval": {"phases": [PHASE]}}
SCHEMA, SELECT = "USAGE ON SCHEMA runbook", "SELECT ON runbook.entry"
EXECUTE = "EXECUTE ON FUNCTION runbook.sign_off"
BEFORE = MIGRATE[: MIGRATE.index(PHASE)]


@pytest.fixture
def approver(database: str) -> Iterator[str]:
    """A role of its own that may read the ledger and sign, and nothing else."""
    name = f"approver_{abs(hash(database)):x}"
    role = sql.Identifier(name)
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("CREATE EXTENSION IF NOT EXISTS vector")
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        yield name
        admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
        admin.execute(sql.SQL("DROP ROLE {}").format(role))


def grant(connection: psycopg.Connection[Any], name: str, *rights: str) -> None:
    for right in rights or (SCHEMA, SELECT, EXECUTE):
        connection.execute(sql.SQL(f"GRANT {right} TO {{}}").format(sql.Identifier(name)))


@pytest.fixture
def waiting(open_phase: Callable[..., Phase], articles: psycopg.Connection[Any], approver: str) -> Phase:
    """A phase that has asked for its sign-off, the phases before it proved."""
    phase = open_phase(PHASE, **WAITING)
    for name in BEFORE:
        replace(phase.ledger, phase=name).append("phase", {"verdict": "PASS"})
    grant(articles, approver)
    with pytest.raises(NotApproved):
        phase.require()
    return phase


@pytest.fixture
def approve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> Callable[..., Result]:
    """``runbook approve`` as a database user; keyword arguments are libpq's."""

    def call(user: str, *arguments: str, phase: str = PHASE, **conninfo: str) -> Result:
        path = write_params(tmp_path, **WAITING)
        with monkeypatch.context() as patch:
            patch.setenv(DSN_ENV, make_conninfo(database, user=user, **conninfo))
            return CliRunner().invoke(main, ["approve", str(path), phase, *arguments])

    return call


def refusal(phase: Phase) -> NotApproved:
    with pytest.raises(NotApproved) as error:
        phase.require()
    return error.value


def asked(phase: Phase) -> approval.Asked:
    return approval.what_is_asked(phase.name, phase.ledger, phase.planned())


def with_params(phase: Phase, params: Params) -> Phase:
    return replace(phase, params=params, ledger=replace(phase.ledger, params=params))


def test_the_plans_are_those_that_the_notebooks_show() -> None:
    root = Path(__file__).parent.parent / "notebooks"
    for name in STEPS:
        cells = nbformat.read(root / notebook(name), as_version=4).cells
        code = "\n".join(c.source for c in cells if c.cell_type == "code")
        shown = tuple(re.findall(r"(\w+\.(?:undo_)?plan)\(phase\)", code))
        assert tuple(p.partition(".")[2] for p in STEPS[name].plans) == shown, name


def test_a_phase_that_waits_says_what_for_and_asks_once(waiting: Phase) -> None:
    error, now = refusal(waiting), asked(waiting)
    assert str(error) == (
        f"\n  found   {PHASE} has no sign-off"
        f"\n  needed  the sign-off of another database user for plan {now.plan[:16]} on evidence {now.evidence[:16]}"
        "\n  danger  one person alone would carry out what the parameters want two to answer for"
        f"\n  do      let another person run `runbook approve PARAMS {PHASE}`, then run the same command again"
    )
    assert [e["kind"] for e in waiting.ledger.entries()].count("request") == 1
    assert waiting.ledger.phase_verdict(PHASE) == "NOT RUN"


def test_an_approval_is_shown_given_and_stands_in_the_record(
    waiting: Phase, approve: Callable[..., Result], approver: str, open_phase: Callable[..., Phase]
) -> None:
    unread = approve(approver)
    assert (unread.exit_code, unread.stderr) == (2, "no terminal to ask at: read the above, then rerun with --yes\n")
    assert "lock: ACCESS EXCLUSIVE" in unread.stdout and "ADD COLUMN" in unread.stdout
    assert all(name in unread.stdout for name in BEFORE)
    refusal(waiting)

    given = approve(approver, "--yes", "--reason", "change 4711")
    assert given.exit_code == 0, given.stderr
    assert given.stdout.endswith(f"✔ {PHASE} is approved; the next run carries it out\n")
    gate = waiting.require().gates[-1]
    assert (gate.name, gate.verdict) == ("approval.is_given", "PASS")
    assert gate.found.startswith(f"by {approver} at ") and gate.found.endswith(": change 4711")
    assert "approval.is_given" in [e["body"].get("name") for e in waiting.ledger.entries()]
    (planned,) = (g for g in open_phase(PHASE, execute=False, **WAITING).require() if g.name == gate.name)
    assert (str(planned.verdict), planned.found) == ("WOULD PASS", gate.found)


def test_a_plan_needs_no_sign_off_and_says_that_it_would(open_phase: Callable[..., Phase]) -> None:
    gate = open_phase(PHASE, execute=False, **WAITING).require().gates[-1]
    assert (gate.name, gate.verdict) == ("approval.is_given", "NOT RUN")
    assert gate.found == f"{PHASE} has no sign-off; it asks for one when it is about to run"


@pytest.mark.attack
def test_who_ran_it_cannot_approve_it_even_by_another_role(
    waiting: Phase, approve: Callable[..., Result], approver: str
) -> None:
    for conninfo in ({}, {"options": f"-c role={approver}"}):
        result = approve("postgres", "--yes", **conninfo)
        assert result.exit_code == 1
        assert "found   postgres asked for this sign-off" in result.stderr
    refusal(waiting)


@pytest.mark.attack
def test_an_approval_by_who_runs_the_phase_does_not_count(waiting: Phase) -> None:
    waiting.ledger.append("approval", asked(waiting).as_data() | {"reason": "myself"})
    assert refusal(waiting).found.endswith("does not count: postgres also runs this phase")


@pytest.mark.attack
def test_who_proved_the_evidence_cannot_approve_what_rests_on_it(
    waiting: Phase, approve: Callable[..., Result], approver: str, articles: psycopg.Connection[Any], database: str
) -> None:
    """A member of the role that owns the ledger, who has run the phase before."""
    articles.execute(sql.SQL("ALTER ROLE {} SUPERUSER").format(sql.Identifier(approver)))
    with psycopg.connect(make_conninfo(database, user=approver), autocommit=True) as connection:
        connection.execute(FORGED, [BEFORE[-1]])
    refusal(waiting)
    result = approve(approver, "--yes")
    assert f"found   {approver} ran {BEFORE[-1]}, which this sign-off rests on" in result.stderr


FORGED = (
    "INSERT INTO runbook.entry (target, run_id, phase, kind, body)"
    " VALUES ('articles', 'r', %s, 'phase', '{\"verdict\": \"PASS\"}')"
)


@pytest.mark.attack
def test_an_approver_can_write_nothing_but_sign_offs(
    waiting: Phase, articles: psycopg.Connection[Any], approver: str, database: str
) -> None:
    later = MIGRATE[MIGRATE.index(PHASE) + 1]
    with psycopg.connect(make_conninfo(database, user=approver), autocommit=True) as attacker:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for table entry"):
            attacker.execute(FORGED, [PHASE])
        for table in ("entry", "claims", "chain_lock"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), attacker.transaction():
                attacker.execute(f"LOCK TABLE runbook.{table} IN ROW EXCLUSIVE MODE")  # type: ignore[arg-type]
        # The rights that an earlier release asked for, and whatever else somebody grants on the table.
        grant(articles, approver, "ALL ON runbook.entry")
        for kind in ("phase", "gate", "run", "notebook", "record", "request", "approval"):
            with pytest.raises(
                psycopg.errors.InsufficientPrivilege, match="takes rows from its owner postgres alone"
            ):
                attacker.execute(FORGED.replace("'phase'", f"'{kind}'"), [PHASE])  # type: ignore[arg-type]
        with pytest.raises(psycopg.errors.RaiseException, match="asks for no sign-off"):
            attacker.execute("SELECT runbook.sign_off(1, '{}', '')")
        with pytest.raises(psycopg.errors.RaiseException, match="sign-off of something else"):
            attacker.execute("SELECT runbook.sign_off(max(seq), '{}', '') FROM runbook.entry")
    assert waiting.ledger.phase_verdict(PHASE) == "NOT RUN"
    with pytest.raises(GateFailed):
        replace(waiting, name=later, ledger=replace(waiting.ledger, phase=later)).require()


@pytest.mark.attack
def test_a_row_that_somebody_else_got_in_all_the_same_counts_for_nothing_and_is_named(
    waiting: Phase, articles: psycopg.Connection[Any], approver: str, database: str
) -> None:
    """As in a ledger of an earlier release, whose approvers could insert."""
    grant(articles, approver, "INSERT ON runbook.entry")
    articles.execute("DROP TRIGGER chain ON runbook.entry")
    columns = (
        "INSERT INTO runbook.entry"
        " (seq, written_at, written_by, previous_hash, hash, target, run_id, phase, kind, body)"
    )
    row = (
        f"VALUES (99, now(), '{approver}', '', '', 'articles', 'r', '{PHASE}', 'phase', '{{\"verdict\": \"PASS\"}}')"
    )
    with psycopg.connect(make_conninfo(database, user=approver), autocommit=True) as attacker:
        attacker.execute(f"{columns} {row}")  # type: ignore[arg-type]
    assert waiting.ledger.phase_verdict(PHASE) == "NOT RUN"
    assert waiting.ledger.last_row(PHASE)["kind"] == "request"  # type: ignore[index]
    found = ledger.only_the_owner_wrote(waiting.ledger.connection, waiting.params)
    assert str(found) == (
        "FAIL    ledger.only_its_owner_wrote   runbook.entry\n"
        f"  found   row 99 (phase of {PHASE}) by {approver}\n"
        "  needed  rows of the role that owns the ledger alone\n"
        "  danger  somebody tried to open a phase or to forge a record; these rows count for nothing\n"
        '  do      ask who wrote them; REVOKE INSERT ON "runbook"."entry" from everybody but its owner'
    )


def test_what_is_left_of_an_approved_plan_is_approved(
    waiting: Phase, approve: Callable[..., Result], approver: str
) -> None:
    approve(approver, "--yes")
    write(waiting, "ALTER TABLE articles ADD COLUMN embedding vector(8)")
    assert waiting.require().passed


@pytest.mark.attack
def test_a_changed_plan_voids_the_approval(waiting: Phase, approve: Callable[..., Result], approver: str) -> None:
    approve(approver, "--yes")
    changed = waiting.params.model_copy(
        update={"tune": waiting.params.tune.model_copy(update={"target_recall": 0.8})}
    )
    assert refusal(with_params(waiting, changed)).found.endswith("is void: the plan has changed, by its parameters")


@pytest.mark.attack
def test_a_statement_that_was_not_approved_voids_the_approval(
    waiting: Phase, approve: Callable[..., Result], approver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    approve(approver, "--yes")
    planned = waiting.planned()
    monkeypatch.setattr(Phase, "planned", lambda _: [*planned, planned[0] | {"sql": "DROP TABLE articles;"}])
    assert refusal(waiting).found.endswith(
        "is void: the plan has changed, 1 of its statements are not the approved ones"
    )


def test_newer_evidence_voids_the_approval_and_the_request(
    waiting: Phase, approve: Callable[..., Result], approver: str
) -> None:
    approve(approver, "--yes")
    replace(waiting.ledger, phase=BEFORE[-1]).append("gate", {"name": "x", "verdict": "PASS", "subject": "y"})
    late = approve(approver, "--yes")
    assert (late.exit_code, "there is newer evidence than the request rests on" in late.stderr) == (1, True)
    newest = waiting.ledger.entries()[-1]["seq"]
    found = refusal(waiting).found
    assert found.endswith(f"is void: there is newer evidence (row {newest}, gate of {BEFORE[-1]})")
    assert approve(approver, "--yes").exit_code == 0
    assert waiting.require().passed


def test_a_phase_taken_back_needs_a_new_approval(
    waiting: Phase, approve: Callable[..., Result], approver: str
) -> None:
    approve(approver, "--yes")
    waiting.ledger.append("phase", {"verdict": "UNDONE"})
    assert f"there is newer evidence (row {waiting.ledger.entries()[-1]['seq']}, phase of {PHASE})" in (
        refusal(waiting).found
    )


@pytest.mark.parametrize(
    ("rights", "missing", "grants"),
    [
        (
            (),
            "USAGE, SELECT, EXECUTE",
            (SCHEMA, SELECT, EXECUTE),
        ),
        ((SCHEMA, SELECT), "EXECUTE", (EXECUTE,)),
    ],
)
def test_missing_rights_are_named_with_their_grants(
    waiting: Phase,
    articles: psycopg.Connection[Any],
    approve: Callable[..., Result],
    approver: str,
    rights: tuple[str, ...],
    missing: str,
    grants: tuple[str, ...],
) -> None:
    articles.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(approver)))
    for right in rights:
        grant(articles, approver, right)
    result = approve(approver, "--yes")
    assert result.exit_code == 2
    assert result.stderr == (
        f"FAIL    approval.rights_are_there   {approver} on runbook.entry\n"
        f"  found   {missing} missing\n"
        "  needed  USAGE on the schema, SELECT on the table, EXECUTE on sign_off\n"
        "  danger  the request cannot be read, or the approval not be written\n"
        f"  do      let the ledger's owner run: {'; '.join(f'GRANT {g} TO {approver}' for g in grants)}\n"
    )


def test_a_phase_that_waits_for_nothing_cannot_be_approved(approve: Callable[..., Result], approver: str) -> None:
    result = approve(approver, "--yes", phase="90_cut_over")
    assert (result.exit_code, "found   this phase waits for no sign-off" in result.stderr) == (2, True)
    absent = approve(approver, "--yes")
    assert (absent.exit_code, "found   there is no ledger in schema runbook" in absent.stderr) == (1, True)


@pytest.mark.parametrize("name", ["00_preflight", "90_cut_ovre", "undo/reads"])
def test_only_phases_that_change_something_can_wait(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput) as error:
        load_params(write_params(tmp_path, approval={"phases": [name]}))
    assert error.value.needed.startswith(f"{name}: ")


@pytest.mark.attack
def test_a_file_replaced_after_the_approval_voids_it_and_is_named(
    waiting: Phase, approve: Callable[..., Result], approver: str
) -> None:
    approve(approver, "--yes")
    assert waiting.require().passed
    path = waiting.params.queries.file
    path.write_text(path.read_text() + "\n")
    assert refusal(waiting).found.endswith("is void: queries.file changed since")


@pytest.mark.attack
def test_a_changed_lock_timeout_voids_the_approval(
    waiting: Phase, approve: Callable[..., Result], approver: str
) -> None:
    approve(approver, "--yes")
    locks = waiting.params.locks.model_copy(update={"timeout_ms": 9000})
    changed = waiting.params.model_copy(update={"locks": locks})
    assert "is void: the plan has changed, by its parameters" in refusal(with_params(waiting, changed)).found


@pytest.mark.attack
def test_a_phase_taken_out_of_the_file_waits_all_the_same(waiting: Phase) -> None:
    alone = waiting.params.model_copy(update={"approval": waiting.params.approval.model_copy(update={"phases": []})})
    assert refusal(with_params(waiting, alone)).found == (f"{PHASE} has no sign-off")
