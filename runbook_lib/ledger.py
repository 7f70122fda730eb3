"""The ledger in the target database: what was done and proved, append-only and hash-chained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from runbook_lib import db
from runbook_lib.gates import Gate, Gates, gate
from runbook_lib.names import names, spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("ledger")
CREATE = ("create_schema", "create_entry", "create_chain_function", "create_chain_triggers")
SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Ledger:
    """One target's view of the ledger, written by one phase of one run.

    connection: in autocommit, and not the one that does the work, so that a record outlives a rollback.
    """

    connection: db.Connection
    params: Params
    run_id: str
    phase: str

    def exists(self) -> bool:
        """Is there a ledger in this database yet?"""
        entry = spelled(self.params, "entry")
        return bool(db.one(self.connection, SQL["exists"], self.params, entry=entry)["there"])

    def create(self) -> None:
        """Makes the schema and its table; does nothing where they are there."""
        if not self.exists():
            with self.connection.transaction():
                for name in self.missing():
                    self.connection.execute(SQL[name].compose(names(self.params)), {})

    def missing(self) -> tuple[str, ...]:
        """The blocks that make what is not there. A schema that somebody else made, as a role without CREATE on the
        database needs it, is not made again: PostgreSQL asks for the right before it looks whether it is there."""
        if self.exists():
            return ()
        schema = spelled(self.params, "ledger")
        there = db.one(self.connection, SQL["schema_exists"], self.params, schema=schema)["there"]
        return CREATE[1:] if there else CREATE

    def append(self, kind: str, body: Mapping[str, Any]) -> str:
        """Appends one row and returns its hash. ``body`` is plain data and holds neither secrets nor vectors."""
        row = db.one(
            self.connection,
            SQL["append"],
            self.params,
            target=self.params.target.name,
            run_id=self.run_id,
            phase=self.phase,
            kind=kind,
            body=Jsonb(dict(body)),
        )
        return str(row["hash"])

    def append_gates(self, gates: Gates) -> None:
        """A row a gate, with its figures."""
        for g in gates:
            self.append("gate", as_data(g))

    def latest(self, kind: str, phase: str | None = None) -> dict[str, Any] | None:
        """The body of the newest row of this kind, in one phase or in any; None if there is none."""
        if not self.exists():
            return None
        found = db.rows(self.connection, SQL["latest"], self.params, kind=kind, phase=phase)
        return dict(found[0]["body"]) if found else None

    def latest_standing(self, kind: str, *phases: str) -> dict[str, Any] | None:
        """The body of the newest row of this kind; None where one of these phases was taken back after it."""
        if not self.exists():
            return None
        found = db.rows(self.connection, SQL["latest_standing"], self.params, kind=kind, phases=list(phases))
        return dict(found[0]["body"]) if found else None

    def last_row(self, phase: str) -> DictRow | None:
        """The newest row of a phase or an operation, whatever its kind; None if there is none."""
        found = db.rows(self.connection, SQL["last_row"], self.params, phase=phase) if self.exists() else []
        return found[0] if found else None

    def phase_verdict(self, phase: str) -> str:
        """PASS, FAIL or UNDONE as the newest record of that phase says; NOT RUN where there is none."""
        body = self.latest("phase", phase)
        return str(body["verdict"]) if body else "NOT RUN"

    def entries(self, run_id: str | None = None) -> list[DictRow]:
        """All rows of a run, or of every run of this target, in order."""
        return db.rows(self.connection, SQL["entries"], self.params, run_id=run_id) if self.exists() else []


def as_data(g: Gate) -> dict[str, Any]:
    """A gate as plain data, for the ledger."""
    return {
        "name": g.name,
        "verdict": str(g.verdict),
        "subject": g.subject,
        "found": g.found,
        "needed": g.needed,
        "danger": g.danger,
        "do": g.do,
        "figures": dict(g.figures),
    }


def verify_chain(connection: db.Connection, params: Params) -> Gate:
    """Hashes the whole chain again, outside the database, and names the first row that does not fit."""
    previous, expected_seq, broken = "", 1, ""
    rows = db.rows(connection, SQL["chain"], params)
    for row in rows:
        text = previous + SEPARATOR + row["hashed_text"]
        if row["seq"] != expected_seq:
            broken = f"row {expected_seq} is missing"
        elif row["previous_hash"] != previous:
            broken = f"row {row['seq']} does not follow the row before it"
        elif hashlib.sha256(text.encode()).hexdigest() != row["hash"]:
            broken = f"row {row['seq']} ({row['kind']} of {row['phase']}, run {row['run_id']}) was changed"
        if broken:
            break
        previous, expected_seq = row["hash"], expected_seq + 1
    return gate(
        "ledger.chain_is_whole",
        not broken,
        f"{params.ledger.schema_}.entry",
        found=broken or f"{len(rows)} rows, each fits the one before it",
        needed="every row as it was written, in order, none missing",
        danger="somebody changed the record of what was done; its figures cannot be relied on",
        do="compare with the executed notebooks and a backup from before the named row",
        figures={"rows": len(rows)},
    )
