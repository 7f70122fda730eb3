"""One run at a time on one target, and on one table. A runner holds its claim from its first phase to its last, so
that no other run slips in between two of them; its notebooks know the claim as theirs by the run's id."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.ledger import may_not_write
from runbook_lib.core.names import names, spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("claim")


@contextmanager
def held_by_runner(params: Params, run_id: str) -> Iterator[None]:
    """Holds target and table for the length of a block. Raises BadInput, naming the run that has one of them."""
    with db.connect(params, runner_name(run_id)) as connection:
        for subject in _subjects(params):
            if held := take(connection, params, subject):
                raise BadInput([_taken(params, subject, held)])
        yield


def take_for_notebook(connection: db.Connection, params: Params, run_id: str) -> None:
    """Claims target and table for this session, until it ends; inside the claim of the notebook's own runner.

    Raises BadInput, naming the run or the notebook that has one of them.
    """
    for subject in _subjects(params):
        held = take(connection, params, subject)
        if held and [h["application_name"] for h in held] != [runner_name(run_id)]:
            raise BadInput([_taken(params, subject, held)])
    phase = f"runbook phase {params.target.name}"
    if held := take(connection, params, phase):
        raise BadInput([_taken(params, phase, held)])


def _subjects(params: Params) -> tuple[str, str]:
    """What a run claims. The table too: two targets of different names may be on one."""
    return f"runbook target {params.target.name}", f"runbook table {spelled(params, 'table')}"


def take(connection: db.Connection, params: Params, subject: str) -> list[db.Row]:
    """Claims one subject for the session, until it ends; returns who has it, nothing where it is ours now.

    The key of a claim is new each time: who sees it in pg_locks can wait for it, and then holds a key that no claim
    has any more. Before there is a ledger the key can be guessed, and its holder is named.
    """
    if not _is_ledger_there(connection, params):
        if db.one(connection, SQL["take_before_ledger"], params, subject=subject)["taken"]:
            return []
        return holders(connection, params, subject) or [{}]
    try:
        with connection.transaction():
            connection.execute("SELECT pg_catalog.set_config('lock_timeout', '10s', true)")
            connection.execute(SQL["turn"].compose(names(params)))
            held = holders(connection, params, subject)
            if not held:
                key = secrets.randbits(63)
                connection.execute(SQL["claim"].compose(names(params)), {"subject": subject, "key": key})
            return held
    except psycopg.errors.InsufficientPrivilege as error:
        raise BadInput([may_not_write(connection, params)]) from error


def holders(connection: db.Connection, params: Params, subject: str) -> list[db.Row]:
    """The other sessions that have claimed this: process, role, application, since when and from which address."""
    early = db.rows(connection, SQL["holder_before_ledger"], params, subject=subject, table=spelled(params, "table"))
    if not _is_ledger_there(connection, params):
        return early
    held = db.rows(connection, SQL["holder"], params, subject=subject)
    return held + [h for h in early if h["may_migrate"]]


def _is_ledger_there(connection: db.Connection, params: Params) -> bool:
    return bool(db.one(connection, SQL["there"], params, claims=spelled(params, "claims"))["there"])


def runner_name(run_id: str) -> str:
    """The application name of a run's own session."""
    return f"runbook-runner {run_id}"[:63]  # PostgreSQL keeps 63 bytes of an application name


def _taken(params: Params, subject: str, held: list[db.Row]) -> Gate:
    found = "; ".join(
        f"pid {h['pid']}, {h['application_name']}, {h['usename']}, since {h['since']:%F %T %Z}"
        + (f", from {h['host']}" if h["host"] else "")
        for h in held
        if h
    )
    on_table = subject.startswith("runbook table ")
    return Gate(
        "phase.target_is_free",
        Verdict.FAIL,
        spelled(params, "table") if on_table else params.target.name,
        found or "another run has just finished",
        "no other run at work on this target, nor on its table for another target",
        "two runs would carry out the same statements against each other",
        "wait for that run, or close its notebook's kernel, and run the same command again",
    )
