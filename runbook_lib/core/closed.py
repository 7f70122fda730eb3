"""What the runbook makes is closed to everybody but its owner, in the transaction that makes it.

ALTER DEFAULT PRIVILEGES may give any role every right on what a role makes, and PUBLIC may call every new function.
So whatever a statement makes loses all of that before anybody else sees it; what is meant is granted afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import DictRow

from runbook_lib.params.placeholders import OPAQUE, QUOTED_NAME
from runbook_lib.sql import load

SQL = load("closed")

# In a block that grants: what stands above it is closed before what stands below it grants.
MARK = "-- closed to everybody but its owner"
# What is looked up by name in one catalogue.
KINDS = {"relations": ("TABLE", "SEQUENCE"), "functions": ("FUNCTION",), "schemas": ("SCHEMA",)}
_NAME = r'"(?:[^"]|"")+"|\w+'
MADE = re.compile(
    r"^ *CREATE (?:OR REPLACE |UNLOGGED )?(TABLE|SEQUENCE|FUNCTION|SCHEMA) (?:IF NOT EXISTS )?"
    rf"((?:{_NAME})(?:\.(?:{_NAME}))?)",
    re.M,
)
BETWEEN_COMMANDS = re.compile(rf"{OPAQUE}|{QUOTED_NAME}|(?P<end>;)", re.S)


def commands(text: str) -> list[str]:
    """The commands of a statement. Each is a message of its own: of several in one message Citus refuses most."""
    ends = [match.start() for match in BETWEEN_COMMANDS.finditer(text) if match["end"]]
    parts = [text[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, None], strict=True)]
    return [part for part in parts if BETWEEN_COMMANDS.sub(_without_comments, part).strip()]


def _without_comments(match: re.Match[str]) -> str:
    return " " if match[0].startswith(("--", "/*")) else match[0]


def makes(text: str) -> list[tuple[str, str]]:
    """The tables, sequences, functions and schemas that a statement makes, or replaces: kind and name."""
    found = [(kind, name.replace("%%", "%")) for kind, name in MADE.findall(text)]
    return list(dict.fromkeys((kind, name) for kind, name in found if not name.startswith("pg_temp.")))


def run(connection: psycopg.Connection[DictRow], query: sql.Composed, values: Mapping[str, Any]) -> int:
    """Carries out a statement, closes what is new by it, and returns its rows; within a transaction of the caller's.

    What was there before keeps its privileges: a table IF NOT EXISTS, a function OR REPLACE.
    """
    text = query.as_string(connection)
    made = makes(text)
    if not made:
        return _each(connection, text, values)
    known = _there(connection, made)
    affected = -1
    for part in text.split(MARK):
        affected = max(affected, _each(connection, part, values))
        new = _there(connection, made) - known
        known |= new
        opened = {kind: [oid for of, oid in new if of == kind] for kind in KINDS}
        for row in connection.execute(SQL["revokes"].compose({}), opened).fetchall():
            connection.execute(row["statement"])
    return affected


def _each(connection: psycopg.Connection[DictRow], text: str, values: Mapping[str, Any]) -> int:
    """Carries out each command; returns the rows of the first."""
    rows = [connection.execute(sql.SQL(command), values).rowcount for command in commands(text)]
    return rows[0] if rows else -1


def _there(connection: psycopg.Connection[DictRow], made: list[tuple[str, str]]) -> set[tuple[str, int]]:
    values = {name: [n for kind, n in made if kind in of] for name, of in KINDS.items()}
    return {(row["kind"], row["oid"]) for row in connection.execute(SQL["there"].compose({}), values).fetchall()}
