"""The ledger in the target database: what was done and proved, append-only and hash-chained."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from runbook_lib.core import closed, db
from runbook_lib.core.display import frame, frame_of, some
from runbook_lib.core.gates import BadInput, Gate, Gates, LockNotObtained, Verdict, gate
from runbook_lib.core.names import names, spelled
from runbook_lib.core.redaction import redacted
from runbook_lib.core.registry import names_in_the_ledger
from runbook_lib.params import Params
from runbook_lib.sql import load

if TYPE_CHECKING:
    import pandas

SQL = load("ledger")
CREATE = (
    "create_schema",
    "create_entry",
    "add_by_owner",
    "create_chain_lock",
    "create_claims",
    "create_chain_function",
    "create_chain_triggers",
    "create_sign_off",
)
# The columns of every row in a DataFrame.
HEADS = ("seq", "written_at", "written_by", "run_id", "phase", "kind")
# Rows of others that a message names.
MOST_NAMED = 5


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
        """Is there a ledger in this database yet? Raises BadInput for one that an earlier release has made."""
        there = self._there()
        if there["there"] and not there["is_up_to_date"]:
            raise BadInput([_of_an_earlier_release(self.params)])
        return bool(there["there"])

    def create(self) -> None:
        """Makes the schema and its tables, or brings those of an earlier release up to date; else does nothing.

        Raises BadInput where somebody else has made something in that schema before.
        """
        require_ours(self.connection, self.params)
        if missing := self.missing():
            with self.connection.transaction():
                for name in missing:
                    closed.run(self.connection, SQL[name].compose(names(self.params)), {})

    def missing(self) -> tuple[str, ...]:
        """The blocks that make what is not there, or is an earlier release's. A schema that somebody else made, as a
        role without CREATE on the database needs it, is not made again: PostgreSQL asks for the right before it looks
        whether it is there."""
        if self._there()["is_up_to_date"]:
            return ()
        schema = spelled(self.params, "ledger")
        there = db.one(self.connection, SQL["schema_exists"], self.params, schema=schema)["there"]
        return CREATE[1:] if there else CREATE

    def bring_up_to_date(self) -> None:
        """What :meth:`create` does, where there is a ledger. Raises BadInput on a standby, which takes no writes, and
        where this role may not write it."""
        there = self._there()
        if there["is_standby"]:
            raise BadInput([_on_a_standby(self.connection)])
        if there["there"]:
            if not db.one(self.connection, SQL["writer"], self.params, entry=self._spelled)["is_member"]:
                raise BadInput([may_not_write(self.connection, self.params)])
            self.create()

    def _there(self) -> DictRow:
        return db.one(self.connection, SQL["exists"], self.params, entry=self._spelled)

    @property
    def _spelled(self) -> str:
        return spelled(self.params, "entry")

    def append(self, kind: str, body: Mapping[str, Any]) -> str:
        """Appends one row and returns its hash. ``body`` is plain data and holds neither secrets nor vectors.

        Raises BadInput where this role may not write the ledger, LockNotObtained where another session keeps the turn
        to write.
        """
        values = {"target": self.params.target.name, "run_id": self.run_id, "phase": self.phase, "kind": kind}
        taken = Jsonb(storable_in(self.connection, redacted(storable(dict(body)))))
        try:
            row = db.one(self.connection, SQL["append"], self.params, body=taken, **values)
        except psycopg.errors.InsufficientPrivilege as error:
            raise BadInput([may_not_write(self.connection, self.params)]) from error
        except psycopg.errors.LockNotAvailable as error:
            raise _no_turn(self.connection, self.params) from error
        return str(row["hash"])

    def append_gates(self, gates: Gates) -> None:
        """A row a gate, with its figures."""
        for g in gates:
            self.append("gate", as_data(g))

    def latest(self, kind: str, phase: str | None = None) -> dict[str, Any] | None:
        """The body of the newest row of this kind, in one phase or in any; None if there is none."""
        if not self.exists():
            return None
        phases = names_in_the_ledger(phase) if phase else None
        found = db.rows(self.connection, SQL["latest"], self.params, kind=kind, phases=phases)
        return dict(found[0]["body"]) if found else None

    def latest_standing(self, kind: str, *phases: str) -> dict[str, Any] | None:
        """The body of the newest row of this kind; None where one of these phases was rolled back after it."""
        if not self.exists():
            return None
        called = [name for phase in phases for name in names_in_the_ledger(phase)]
        found = db.rows(self.connection, SQL["latest_standing"], self.params, kind=kind, phases=called)
        return dict(found[0]["body"]) if found else None

    def last_row(self, phase: str) -> DictRow | None:
        """The newest row of a phase or an operation, whatever its kind; None if there is none."""
        if not self.exists():
            return None
        found = db.rows(self.connection, SQL["last_row"], self.params, phases=names_in_the_ledger(phase))
        return found[0] if found else None

    def phase_verdict(self, phase: str) -> str:
        """PASS, FAIL or UNDONE as the newest record of that phase says; NOT RUN where there is none."""
        body = self.latest("phase", phase)
        return str(body["verdict"]) if body else "NOT RUN"

    def entries(self, run_id: str | None = None) -> list[DictRow]:
        """The rows that count of a run, or of every run of this target, in order; sign-offs among them."""
        return db.rows(self.connection, SQL["entries"], self.params, run_id=run_id) if self.exists() else []

    def to_frame(self, kind: str = "", part: str = "", run_id: str | None = None) -> pandas.DataFrame:
        """The rows by the ledger's owner for this target, or for one of its runs, oldest first.

        kind: only these rows (``statement``, ``gate``, ``tuning``, …), each item of their body a column. part: a list
        in the body of the newest of them, one row per element: ``to_frame("tuning", "points")``. Raises ValueError
        for a part that does not exist, and lists those that do.
        """
        found = [r for r in self.entries(run_id) if kind in ("", r["kind"])]
        if part:
            return frame_of(_elements(kind, found[-1]["body"], part) if found else ())
        if not kind:
            return frame((*HEADS, "body"), [[r[name] for name in (*HEADS, "body")] for r in found])
        bodies = [{f"body.{k}" if k in HEADS else k: v for k, v in r["body"].items()} for r in found]
        return frame_of({name: r[name] for name in HEADS} | body for r, body in zip(found, bodies, strict=True))

    def all_entries(self, run_id: str | None = None) -> list[DictRow]:
        """All rows of a run, or of every run of this target, in order, whoever wrote them."""
        return db.rows(self.connection, SQL["all_entries"], self.params, run_id=run_id) if self.exists() else []


def _elements(kind: str, body: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """A list in a body, or a mapping with the names of its elements, as records."""
    parts = {name: value for name, value in body.items() if isinstance(value, list | dict)}
    if part not in parts:
        raise ValueError(
            f"no part {part!r} in the newest row of kind {kind!r}; there are: {', '.join(parts) or 'none'}"
        )
    found = parts[part]
    named = [{"name": name} for name in found] if isinstance(found, dict) else [{} for _ in found]
    values = found.values() if isinstance(found, dict) else found
    return [n | (v if isinstance(v, dict) else {"value": v}) for n, v in zip(named, values, strict=True)]


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


def storable(value: Any, missing: Collection[str] = ()) -> Any:
    """Plain data as jsonb takes it: without NUL and halves of characters, which an error message may quote.

    missing: characters that the database's encoding does not have; they are written as ASCII, such as ``\\u2026``.
    """
    if isinstance(value, str):
        sound = value.replace("\x00", "\N{SYMBOL FOR NULL}").encode(errors="backslashreplace").decode()
        return "".join(ascii(c)[1:-1] if c in missing else c for c in sound) if missing else sound
    if isinstance(value, Mapping):
        return {storable(k, missing): storable(v, missing) for k, v in value.items()}
    return [storable(v, missing) for v in value] if isinstance(value, list | tuple) else value


def storable_in(connection: db.Connection, value: Any) -> Any:
    """Plain data as jsonb takes it in the encoding of this database."""
    sound = storable(value)
    return storable(sound, db.missing_characters(connection, json.dumps(sound, ensure_ascii=False)))


def require_ours(connection: db.Connection, params: Params) -> None:
    """Raises BadInput where a role that this one has no reason to trust owns the ledger's schema, or a part of it."""
    found = db.rows(
        connection, SQL["strangers"], params, schema=params.ledger.schema_, table=spelled(params, "table")
    )
    if found:
        owners = ", ".join(str(f["owner"]) for f in found)
        what = "; ".join(f"{f['owner']} owns {f['what']}" for f in found)
        raise BadInput(
            [
                Gate(
                    "ledger.is_our_own",
                    Verdict.FAIL,
                    f"schema {params.ledger.schema_}",
                    what,
                    "a schema in which everything belongs to this role, to one that it is a member of, to the table's"
                    " or the database's owner, or to a superuser",
                    f"{owners} could write there what opens phases, and have code run with this role's rights",
                    "drop what is theirs, or name another schema in ledger.schema; if that role is to run the"
                    " migration, connect as it or as a member of it",
                )
            ]
        )


def may_not_write(connection: db.Connection, params: Params) -> Gate:
    """Why this role may not add a row, and the grant that would let it."""
    who = db.one(connection, SQL["writer"], params, entry=spelled(params, "entry"))
    return Gate(
        "ledger.takes_rows_from_this_role",
        Verdict.FAIL,
        spelled(params, "entry"),
        f"owned by {who['owner']}, and {who['session_user']} is not a member of it",
        "the role that owns the ledger, or a member of it: nobody else's rows open phases",
        "what this role does could not be written down, so it was not done",
        f"have a superuser run: GRANT {who['quoted_owner']} TO {who['quoted_session_user']};",
    )


def _no_turn(connection: db.Connection, params: Params) -> LockNotObtained:
    held = db.rows(connection, SQL["who_writes"], params, chain_lock=spelled(params, "chain_lock"))
    who = "; ".join(f"pid {h['pid']} ({h['usename']}, {h['application_name']}, {h['state']})" for h in held)
    return LockNotObtained(
        found=f"another session is writing into the ledger: {who or 'it is gone by now'}",
        needed=f"its turn, the lock on {spelled(params, 'chain_lock')}, within ten seconds",
        danger="what was done could not be written down",
        do="end that session, or let it commit, and run the same command again: what was done stays done",
    )


def _on_a_standby(connection: db.Connection) -> Gate:
    return Gate(
        "ledger.server_takes_writes",
        Verdict.FAIL,
        f"database {connection.info.dbname}",
        "a standby, in recovery",
        "the primary",
        "nothing can be written there; nothing was started",
        "name the primary in the DSN, or all servers with target_session_attrs=read-write; where the primary is lost,"
        " promote the standby first: the run resumes where its ledger says",
    )


def _of_an_earlier_release(params: Params) -> Gate:
    return Gate(
        "ledger.is_up_to_date",
        Verdict.FAIL,
        spelled(params, "entry"),
        "made by an earlier release: no row says whether the ledger's owner wrote it",
        "the ledger of this release",
        "a row that somebody else wrote could not be told from one of the runbook's",
        "let the ledger's owner run any command with --execute, or open any notebook with execute: true: it adds the"
        " column and keeps every row",
    )


def only_the_owner_wrote(connection: db.Connection, params: Params) -> Gate:
    """Names the rows that somebody else has written; they open no phase, but who wrote them wanted them to."""
    found = db.rows(connection, SQL["rows_of_others"], params)
    said = [f"row {r['seq']} ({r['kind']} of {r['phase']}) by {r['written_by']}" for r in found]
    return gate(
        "ledger.only_its_owner_wrote",
        not found,
        f"{params.ledger.schema_}.entry",
        found=some(said, MOST_NAMED, "; ")
        or "every row but sign-offs is by the ledger's owner, or by a member of it",
        needed="rows of the role that owns the ledger alone",
        danger="somebody tried to open a phase or to forge a record; these rows count for nothing",
        do=f"ask who wrote them; REVOKE INSERT ON {spelled(params, 'entry')} from everybody but its owner",
        figures={"rows": len(found)},
    )
