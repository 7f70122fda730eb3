"""Searches of today as pg_stat_statements has counted them, and which of its statements are searches at all.

Statements are told by their text. An operator counts only as a whole: pgvector's ``<~>`` is no regular expression,
its ``<%>`` no trigram search. ``<->`` and ``%`` mean a search where a text column is one of their operands; elsewhere
they are a distance of vectors or points, and a remainder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg

from runbook_lib.core import db
from runbook_lib.core.display import number
from runbook_lib.core.names import identifier
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("statements")

# Regular expressions of PostgreSQL. A character of an operator, and what may come before a SELECT.
_SIGN = r"-+*/<>=~!@#%^&|`?"
_WHOLE = rf"(?:^|[^{_SIGN}])(?:{{}})(?:$|[^{_SIGN}])"
READS = r"^(?:\s|\(|/\*(?:[^*]|\*[^/])*\*/|--[^\n]*\n)*(?:select|with|declare)\M"
# LIKE and regular expressions, full text, words by trigrams, prefixes; and the functions that do the same.
SEARCHES = (
    r"\m(?:i?like|similar\s+to)\M"
    r"|\m(?:(?:strict_)?(?:word_)?similarity|strpos|regexp_\w+|\w*to_tsquery)\s*\("
    r"|\mposition\s*\([^()]*\min\M|" + _WHOLE.format(r"!?~{1,2}\*?|@@@?|<{1,2}%|%>{1,2}|\^@")
)
OWN = r"\mpg_(?:stat\w*|class|attribute|settings|proc)\M|\mas any_word\M|\) as legacy limit"
_OF_TEXT = r"<{1,3}->{1,3}|%"
# Between a column and its operator: no other clause, and no other column of a list.
_BETWEEN = r"(?:(?!\m(?:from|by|where|and|or|select|on)\M)(?:,\s*[$']|[^,;<>])){0,60}"


@dataclass(frozen=True)
class CountedSearch:
    """A statement that searches the table. id: of pg_stat_statements. mean_ms: of its execution."""

    id: str
    calls: int
    mean_ms: float
    text: str

    def line(self, most: int) -> str:
        """Its text on one line, cut."""
        return " ".join(self.text.split())[:most]


@dataclass(frozen=True)
class Counted:
    """What was seen. why: why nothing can be, empty otherwise. reset_s: since when it counts, in seconds since 1970;
    None where this release of the extension does not say. thrown_out: how often entries were lost for want of room,
    as far as that is told. entries, most, calls: of all statements of the server.
    """

    searches: tuple[CountedSearch, ...]
    why: str = ""
    reset_s: float | None = None
    thrown_out: int = 0
    hidden: int = 0
    entries: int = 0
    most: int = 0
    calls: int = 0


def look(connection: db.Connection, params: Params, text_columns: Sequence[str], rows: int | None = None) -> Counted:
    """The searches of the target's table, the most frequent first.

    text_columns: by whose names ``<->`` and ``%`` are told. rows: at most so many. Works with every release of the
    extension since 1.4, which may be older than the server after pg_upgrade.
    """
    found = db.rows(connection, SQL["source"], params)
    if not found:
        return Counted((), "pg_stat_statements is not installed in this database")
    source = found[0]
    if source["track"] == "none":
        return Counted((), "pg_stat_statements.track is none: nothing is counted")
    views = {
        "statements": identifier(source["schema"], "pg_stat_statements"),
        "statements_info": identifier(source["schema"], "pg_stat_statements_info"),
        "mean_ms": identifier("mean_exec_time" if source["has_exec_time"] else "mean_time"),
    }
    values = {
        "table_name": params.target.table,
        "reads": READS,
        "searches": SEARCHES,
        "near_text": near_text(text_columns),
        "own": OWN,
        "rows": rows,
    }
    try:
        searches = connection.execute(SQL["searches"].compose(views), values).fetchall()
        counted = connection.execute(SQL["counted"].compose(views), {}).fetchone()
        since = connection.execute(SQL["since"].compose(views), {}).fetchone() if source["has_info"] else None
    except (psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.InsufficientPrivilege) as error:
        return Counted((), f"pg_stat_statements cannot be read: {str(error).splitlines()[0]}")
    assert counted is not None
    return Counted(
        tuple(CountedSearch(**row) for row in searches),
        reset_s=since["reset_s"] if since else None,
        thrown_out=since["thrown_out"] if since else 0,
        hidden=counted["hidden"],
        entries=counted["entries"],
        most=source["most"] or 0,
        calls=counted["calls"],
    )


def hidden(seen: Counted) -> str:
    """Why silence proves nothing: a role that may not see others' statements sees no search of theirs; or empty."""
    if not seen.hidden:
        return ""
    return f"{number(seen.hidden)} statements are hidden from this role: GRANT pg_read_all_stats to it"


def near_text(columns: Sequence[str]) -> str:
    """A regular expression of PostgreSQL: an operator that means a search of text only, with one of these columns."""
    if not columns:
        return r"(?!)"
    named = "|".join(re.sub(r"([^\w\s])", r"\\\1", column) for column in columns)
    column, operator = rf'(?:\m|")(?:{named})(?:\M|")', _WHOLE.format(_OF_TEXT)
    return f"{column}{_BETWEEN}{operator}|{operator}{_BETWEEN}{column}"
