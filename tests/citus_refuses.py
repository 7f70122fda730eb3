"""What Citus refuses, in its own words: those of release 14.0.1 with PostgreSQL 18.6, as a cluster gave them."""

from __future__ import annotations

import re
from typing import Any

import psycopg
import pytest
from psycopg import sql

FEATURE, INTERNAL, SYNTAX = (
    psycopg.errors.FeatureNotSupported,
    psycopg.errors.InternalError_,
    psycopg.errors.SyntaxError,
)
# Of the distributed tables of the toy target: the table, its staging table and its queue.
DISTRIBUTED = r'"articles(_staging|_queue)?"'
REFERENCE = r'"(route|strategy)"'
REFUSALS: tuple[tuple[str, type[psycopg.Error], str], ...] = (
    (
        rf"\b(CREATE|DROP) TRIGGER\b[^;]*{DISTRIBUTED}\s[^;]*;\s*[^\s-]",
        SYNTAX,
        "cannot insert multiple commands into a prepared statement",
    ),
    (
        r"ENABLE ALWAYS TRIGGER [^;]*, ENABLE",
        INTERNAL,
        "cannot execute ENABLE/DISABLE TRIGGER command with other subcommands",
    ),
    (
        rf"^\s*UPDATE [^;]*{DISTRIBUTED}.*\b(concat_ws|convert_to)\(",
        FEATURE,
        "STABLE functions used in UPDATE queries cannot be called with column references",
    ),
    (
        rf"{DISTRIBUTED}.*= ANY.*\bFOR (NO KEY )?(UPDATE|SHARE)\b|{DISTRIBUTED}.*\bSKIP LOCKED\b",
        FEATURE,
        "could not run distributed query with FOR UPDATE/SHARE commands",
    ),
    (
        rf"^\s*UPDATE [^;]*{DISTRIBUTED}.*\bRETURNING\b.*\bjsonb_build_array\(",
        FEATURE,
        "non-IMMUTABLE functions are not allowed in the RETURNING clause",
    ),
    (
        rf"^\s*UPDATE [^;]*{DISTRIBUTED}.*\bnow\(\).*\) IN \(SELECT",
        SYNTAX,
        "subquery has too many columns",
    ),
    (
        rf"EXISTS \(SELECT FROM [^)]*({DISTRIBUTED}\)|{REFERENCE})",
        SYNTAX,
        'a column definition list is required for functions returning "record"',
    ),
)


def words(message: str) -> str:
    """What Citus says to a message, which may hold several commands; empty where it carries it out."""
    return next((said for pattern, _, said in REFUSALS if re.search(pattern, message, re.S)), "")


def refuse(patch: pytest.MonkeyPatch) -> None:
    """Lets every connection of this process refuse what Citus does."""
    carry_out = psycopg.Connection.execute

    def execute(connection: psycopg.Connection[Any], query: Any, *given: Any, **options: Any) -> Any:
        text = query.as_string(connection) if isinstance(query, sql.Composable) else str(query)
        for pattern, error, said in REFUSALS:
            if re.search(pattern, text, re.S):
                raise error(said)
        return carry_out(connection, query, *given, **options)

    patch.setattr(psycopg.Connection, "execute", execute)
