"""Where a target stands, for `runbook status` and for the notebook that everything begins with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from IPython.display import Markdown

from runbook_lib.core import approval, claim, db
from runbook_lib.core.approval import written_at
from runbook_lib.core.gates import SYMBOLS, BadInput, Gate, Verdict
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier, spelled
from runbook_lib.core.registry import (
    MIGRATE,
    OPERATE,
    UNDO,
    UNDO_OPERATION,
    current,
    names_in_the_ledger,
    notebook,
    notebooks,
    operation_of,
)
from runbook_lib.core.target import load_params
from runbook_lib.params import Params
from runbook_lib.runner import manifest
from runbook_lib.sql import load

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")
SQL, SEARCH, LEDGER = load("status"), load("search"), load("ledger")
# Each question to the ledger; one of many years is read in less.
LONGEST_LOOK = "10s"
BEGUN, UNDONE = "BEGUN", "UNDONE"
DOCUMENTS = {"guide": "Guide and messages", "operations": "Operations", "reference": "Parameters and locks"}
MOST_RECORDS = 10


def where_it_stands(params: Params) -> dict[str, Any]:
    """Target, state of each phase, what comes next, what waits, and the route, as plain data.

    Raises BadInput where the server cannot be reached, or the ledger not be read.
    """
    return _asked(params, partial(_stands, params))


def ledger_rows(params_file: str | Path, kind: str = "", part: str = "") -> pandas.DataFrame:
    """The ledger of this file's target as :meth:`Ledger.to_frame` gives it. Raises BadInput as the others do."""
    return _asked(load_params(params_file), lambda ledger: ledger.to_frame(kind, part))


def _asked(params: Params, question: Callable[[Ledger], T]) -> T:
    with db.connect(params, "runbook status") as connection, db.bounded(connection, LONGEST_LOOK):
        try:
            return question(Ledger(connection, params, "", ""))
        except psycopg.errors.InsufficientPrivilege as error:
            raise BadInput([_may_not_read(connection, params, error)]) from error


def has_vectors(stands: Mapping[str, Any]) -> bool:
    """Is there a place for vectors, so that rows without one can be looked for?"""
    return any(p["name"] == "30_expand_schema" and p["verdict"] == Verdict.PASS for p in stands["phases"])


def _stands(params: Params, ledger: Ledger) -> dict[str, Any]:
    there, info = ledger.exists(), ledger.connection.info
    verdicts = _newest(ledger, "verdicts") if there else {}
    statements = _newest(ledger, "statements") if there else {}
    phases = [_step(name, verdicts.get(name), statements.get(name)) for name in MIGRATE]
    following = next((p["name"] for p in phases if p["verdict"] != Verdict.PASS), None)
    for phase in phases:
        phase["why"] = _why(ledger, phase["name"]) if phase["verdict"] == Verdict.FAIL else None
    route, share = _route(ledger) if there else ("legacy", 100)
    runs = db.rows(ledger.connection, LEDGER["latest"], params, kind="run", phases=None) if there else []
    return {
        "target": params.target.name,
        "table": f"{params.target.schema_}.{params.target.table}",
        "server": f"{info.dbname} at {info.host}:{info.port}",
        "ledger": there,
        "phases": phases,
        "operations": [_step(name, verdicts[name]) for name in OPERATE if name in verdicts],
        "next": following,
        "running": _running(ledger) if there else None,
        "waits_for_approval": _waiting_for_approval(ledger, verdicts) if there else [],
        "route": route,
        "share_percent": share,
        "last_run": {"run_id": runs[0]["run_id"], **runs[0]["body"]} if runs else None,
        "record": _newest_record(params),
        "summary": (f"next is {following}" if following else "every phase has passed")
        + f"; reads go to {route}"
        + (f" ({share} % of the calls)" if 0 < share < 100 else ""),
    }


def _newest(ledger: Ledger, block: str) -> dict[str, db.Row]:
    """The newest row of each step, by the name that the step has today."""
    rows = sorted(db.rows(ledger.connection, SQL[block], ledger.params), key=lambda row: row["seq"])
    return {current(row["phase"]): row for row in rows}


def _why(ledger: Ledger, phase: str) -> str | None:
    called = names_in_the_ledger(phase)
    failed = db.rows(ledger.connection, SQL["failed_gate"], ledger.params, phases=called)
    return f"{failed[0]['name']}: {failed[0]['found']}" if failed else None


def _step(name: str, verdict: db.Row | None = None, statement: db.Row | None = None) -> dict[str, Any]:
    """One step. BEGUN: it has carried statements out since it was last closed or rolled back, if it ever was."""
    began = statement and (verdict is None or (verdict["verdict"] == UNDONE and statement["seq"] > verdict["seq"]))
    row = statement if began else verdict
    return {
        "name": name,
        "verdict": BEGUN if began else verdict["verdict"] if verdict else str(Verdict.NOT_RUN),
        "run_id": row["run_id"] if row else None,
        "at": written_at(row) if row else None,
        "by": row["written_by"] if row else None,
        "why": None,
    }


def _route(ledger: Ledger) -> tuple[str, int]:
    """Where reads go, by the row that the search function reads; by the ledger, where this role may not read it."""
    connection, noted = ledger.connection, ledger.latest("route")
    with suppress(psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable):
        if row := next(iter(db.rows(connection, SEARCH["current_route"], ledger.params)), None):
            return row["route"], row["share_percent"]
    return (noted["route"], noted.get("share_percent", 100)) if noted else ("legacy", 100)


def _running(ledger: Ledger) -> dict[str, Any] | None:
    """Who works on the target now; None where nobody does, or where this role may not see it."""
    with suppress(psycopg.errors.InsufficientPrivilege):
        subject = f"runbook target {ledger.params.target.name}"
        for held in claim.holders(ledger.connection, ledger.params, subject):
            return {key: held[key] for key in ("application_name", "usename", "pid", "since", "host")}
    return None


def _waiting_for_approval(ledger: Ledger, verdicts: Mapping[str, db.Row]) -> list[dict[str, Any]]:
    """Steps that have asked for a sign-off which nobody has given, and which have neither passed nor been rolled back
    since.
    """
    named, found = approval.waiting_steps(ledger), []
    for name in (*MIGRATE, *OPERATE, *UNDO_OPERATION):
        if operation_of(name) not in named:
            continue
        connection, params = ledger.connection, ledger.params
        asked, given = (approval.newest_row(connection, params, name, kind) for kind in ("request", "approval"))
        closed = verdicts.get(name)
        done = [row["seq"] for row in (given, closed) if row and row.get("verdict") != Verdict.FAIL]
        if asked and asked["seq"] > max(done, default=0):
            found.append({"step": name, "asked_by": asked["written_by"], "at": written_at(asked)})
    return found


def _newest_record(params: Params) -> dict[str, str] | None:
    """The newest run of this target that left a record on this machine."""
    for folder in sorted(params.record.runs_dir.glob(f"*-{params.target.name}*"), reverse=True):
        with suppress(OSError, ValueError):
            run = manifest.read(folder)
            if run.target == params.target.name:
                page = folder / "index.html"
                path = os.path.relpath(page if page.is_file() else folder)
                return {"path": path, "status": run.status, "run_id": run.run_id}
    return None


def _may_not_read(connection: db.Connection, params: Params, error: psycopg.Error) -> Gate:
    schema, entry = spelled(params, "ledger"), spelled(params, "entry")
    user = identifier(connection.info.user).as_string()
    return Gate(
        "ledger.can_be_read",
        Verdict.FAIL,
        entry,
        f"{connection.info.user}: {error.diag.message_primary}",
        "USAGE on the schema and SELECT on the table",
        "the state of the target is unknown",
        f"let the ledger's owner run: GRANT USAGE ON SCHEMA {schema} TO {user}; GRANT SELECT ON {entry} TO {user}",
    )


def overview(params_file: str | Path) -> Markdown:
    """Where the target of this file stands, with links to each notebook, documents and records.

    Raises BadInput for parameters or a server that cannot be worked with.
    """
    params = load_params(params_file)
    stands = where_it_stands(params)
    phases = [_phase(p, p["name"] == stands["next"]) for p in stands["phases"]]
    lines = [
        f"**{_plain(stands['table'])}**, by {_plain(Path(params_file).name)}: {stands['summary']}.",
        "",
        "| phase | verdict | at | run |",
        "|---|---|---|---|",
        *phases,
        "",
        f"**Rolling back**, in this order: {_links(UNDO)}",
        "",
        f"**After the migration**: {_links(OPERATE)}",
        "",
        f"**Rolling an operation back**: {_links(UNDO_OPERATION)}",
        *_documents(),
        *_records(params),
    ]
    return Markdown("\n".join(lines))  # type: ignore[no-untyped-call]


def _phase(phase: dict[str, Any], is_next: bool) -> str:
    link = f"[{phase['name']}](migrate/{phase['name']}.ipynb)"
    name = f"**{link}** ← next" if is_next else link
    symbol = SYMBOLS.get(phase["verdict"], "")
    return f"| {name} | {symbol} {phase['verdict']} | {phase['at'] or ''} | {_plain(phase['run_id'] or '')} |"


def _links(names: Iterable[str]) -> str:
    return " · ".join(f"[{name}]({notebook(name)})" for name in names)


def _documents() -> list[str]:
    """Links to the documents, where the project is checked out around its notebooks."""
    folder = notebooks().resolve().parent / "docs"
    there = {folder / f"{name}.md": title for name, title in DOCUMENTS.items() if (folder / f"{name}.md").is_file()}
    said = " · ".join(f"[{title}]({os.path.relpath(path)})" for path, title in there.items())
    return ["", f"**Documents**: {said}"] if said else []


def _records(params: Params) -> list[str]:
    """Links to the records of this target, newest first."""
    runs_dir = params.record.runs_dir
    pages = [
        (folder / "index.html", run)
        for folder, run in manifest.all_runs(runs_dir)
        if run.target == params.target.name and (folder / "index.html").is_file()
    ]
    said = [f"- [{_plain(run.run_id)}]({os.path.relpath(page)}): {run.status}" for page, run in pages]
    return ["", "**Records**", "", *said[:MOST_RECORDS]] if said else []


def _plain(text: str) -> str:
    """Text in which no character means anything to Markdown or HTML."""
    return "".join(c if c.isalnum() or c in " .-:_" else f"&#{ord(c)};" for c in text).replace("_", "&#95;")
