"""The triggers and rules that an UPDATE of the table may set off, and which of them act outside of the database.

A rollback undoes what a trigger did to tables. It undoes neither a call to another server nor a file; whoever does
such things is recognised by its source, and is replaced in a trial by a function that does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from runbook_lib.core import db
from runbook_lib.core.names import identifier, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("trials")

# Calls whose effect no rollback takes back: other servers, programs, files, messages outside of the transaction.
ACTS_OUTSIDE = re.compile(
    r"\b(dblink\w*|https?_\w+|http|net\.http_\w+|pg_net|pg_file_write|lo_export|pg_background_launch|aws_lambda\.\w+"
    r"|pg_logical_emit_message)\s*\(|\bcopy\b[^;]+\bto\s+(program\b|')",
    re.IGNORECASE,
)
NOTIFIES = re.compile(r"\bpg_notify\s*\(|(^|;|\bthen|\bbegin)\s*notify\s+\w", re.IGNORECASE)
# Written by the server's own developers or by an extension's, in C; they are no procedures of the table's owner.
COMPILED = ("c", "internal")


@dataclass(frozen=True)
class Hook:
    """A trigger or a rule. relation: as SQL spells it. outside: how it acts outside of the database, if it does."""

    kind: str
    name: str
    relation: str
    table_name: str
    definition: str
    outside: str = ""
    notifies: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def accepted(self, params: Params) -> bool:
        """Do the parameters agree to it by name?"""
        return self.name in (params.accept.triggers if self.kind == "trigger" else params.accept.rules)


def look(connection: db.Connection, params: Params) -> list[Hook]:
    """The enabled triggers and rules on UPDATE, the runbook's own left out."""
    ledger = spelled(params, "ledger")
    rows = db.rows(connection, SQL["hooks"], params, table=spelled(params, "table"), ledger=ledger)
    sources = _sources(connection, params, [r["function"] for r in rows if r["function"]])
    return [_hook(r, sources.get(r["function"], [])) for r in rows]


def _sources(connection: db.Connection, params: Params, functions: Sequence[int]) -> dict[int, list[db.Row]]:
    found: dict[int, list[db.Row]] = {}
    for row in db.rows(connection, SQL["sources"], params, functions=list(functions)) if functions else ():
        found.setdefault(row["root"], []).append(row)
    return found


def _hook(row: db.Row, sources: Sequence[db.Row]) -> Hook:
    outside = ""
    for s in sources:
        if s["language"] in COMPILED:
            continue
        if found := ACTS_OUTSIDE.search(s["source"]):
            outside = f"calls {' '.join(found[0].rstrip('(').split())}"
        elif not s["trusted"]:
            outside = outside or f"is written in {s['language']}, which may act outside of the database"
    notifies = any(NOTIFIES.search(s["source"]) for s in sources if s["language"] not in COMPILED)
    return Hook(
        row["kind"], row["name"], row["relation"], row["table_name"], row["definition"], outside, bool(notifies)
    )


def leave_out(connection: db.Connection, params: Params, hook: Hook) -> None:
    """Disables one, in a transaction that is rolled back."""
    extra = {"relation": verbatim(hook.relation), "hook": identifier(hook.name)}
    statement = db.statement(SQL[f"disable_{hook.kind}"], params, extra)
    connection.execute(statement.query, {}, prepare=False)


def make_harmless(connection: db.Connection, params: Params, hooks: Sequence[Hook]) -> None:
    """Puts a function that does nothing in the place of those that act outside, in a transaction that is rolled back;
    whether they would have been called is seen all the same."""
    outside = [h for h in hooks if h.outside]
    if outside:
        connection.execute(db.statement(SQL["create_harmless_function"], params).query, {}, prepare=False)
    for hook in outside:
        extra = {"relation": verbatim(hook.relation), "hook": identifier(hook.name)}
        connection.execute(db.statement(SQL["drop_trigger"], params, extra).query, {}, prepare=False)
        head = hook.definition[: hook.definition.rindex(" EXECUTE ")]
        connection.execute(verbatim(f"{head} EXECUTE FUNCTION pg_temp.runbook_trial()"), {}, prepare=False)
