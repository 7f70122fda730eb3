"""One run at a time on one target. A runner holds its claim from its first phase to its last, so that no other run
slips in between two of them; its notebooks know the claim as theirs by the run's id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runbook_lib import db
from runbook_lib.gates import BadInput, Gate, Verdict
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("claim")


@contextmanager
def held_by_runner(params: Params, run_id: str) -> Iterator[None]:
    """Holds the target for the length of a block. Raises BadInput, naming the run that has it."""
    with db.connect(params, _runner_name(run_id)) as connection:
        if not db.one(connection, SQL["take_target"], params)["taken"]:
            raise BadInput([_taken(params, db.rows(connection, SQL["who_has_target"], params))])
        yield


def take_for_notebook(connection: db.Connection, params: Params, run_id: str) -> None:
    """Claims the target for this session, until it ends; inside the claim of the notebook's own runner.

    Raises BadInput, naming the run or the notebook that has it.
    """
    if not db.one(connection, SQL["take_target"], params)["taken"]:
        holders = db.rows(connection, SQL["who_has_target"], params)
        if [h["application_name"] for h in holders] != [_runner_name(run_id)]:
            raise BadInput([_taken(params, holders)])
    if not db.one(connection, SQL["take_phase"], params)["taken"]:
        raise BadInput([_taken(params, db.rows(connection, SQL["who_has_phase"], params))])


def _runner_name(run_id: str) -> str:
    return f"runbook-runner {run_id}"[:63]  # PostgreSQL keeps 63 bytes of an application name


def _taken(params: Params, holders: list[db.Row]) -> Gate:
    found = "; ".join(
        f"pid {h['pid']}, {h['application_name']}, {h['usename']}, since {h['backend_start']:%F %T %Z}"
        for h in holders
    )
    return Gate(
        "phase.target_is_free",
        Verdict.FAIL,
        params.target.name,
        found or "another run has just finished",
        "no other run at work on this target",
        "two runs would carry out the same statements against each other",
        "wait for that run, or close its notebook's kernel, and run the same command again",
    )
