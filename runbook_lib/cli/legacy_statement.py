"""Turns a statement as pg_stat_statements keeps it into a legacy query, as far as that can be told from its text.

pg_stat_statements writes ``$n`` for constants and parameters alike. What a ``$n`` was is told from what stands
around it; where that is an assumption it is said, and what cannot be told is left as it is and named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from runbook_lib.params import placeholders

# A placeholder, a cast behind it, and several of them joined: $1, $2::text || $1 || $3.
PART = r"\$\d+(?:::[\w\[\]]+)?"
JOINED = rf"{PART}(?:\s*\|\|\s*{PART})*"
FUNCTIONS = r"(?P<functions>(?:\w+\(\s*)*)"
LIMIT = re.compile(r"\b(?:LIMIT\s+\$\d+|FETCH\s+(?:FIRST|NEXT)\s+\(?\$\d+\)?\s+ROWS?\s+ONLY)", re.I)
OFFSET = re.compile(r"\s*\bOFFSET\s+\$\d+(?:\s+ROWS?\b)?", re.I)
ANY_LIMIT = re.compile(r"\b(?:LIMIT\s+\d+|FETCH\s+(?:FIRST|NEXT)\b)", re.I)
TSQUERY = r"(?:to|plainto|phraseto|websearch_to)_tsquery"
TEXT_SEARCH_CONFIG = re.compile(rf"\b(?P<function>{TSQUERY}|to_tsvector)\(\s*{PART}\s*,", re.I)
TEXT_SEARCH = re.compile(rf"\b(?P<head>{TSQUERY}\(\s*(?:'[^']*'(?:::\w+)?\s*,\s*)?){PART}", re.I)
LIKE = re.compile(rf"(?P<operator>\bI?LIKE|~~\*?)\s*(?P<open>\(?\s*){FUNCTIONS}(?P<joined>{JOINED})", re.I)
MATCH = re.compile(rf"(?P<operator>\bSIMILAR\s+TO|(?<![!~])~\*?|<?<->>?|<%|%>|%)\s*{FUNCTIONS}{PART}", re.I)
SIMILARITY = re.compile(rf"(?P<head>\b(?:similarity|strpos|word_similarity)\([^()$]*,\s*){PART}", re.I)
INSIDE = r'(?:[^"]|"")+'
NAMED = rf'(?P<column>(?:(?:"{INSIDE}"|\w+)\.)?(?:"(?P<quoted>{INSIDE})"|(?P<plain>\w+)))'
EQUALS = re.compile(rf"{NAMED}\s*=\s*{PART}")
# pg_stat_statements of PostgreSQL 18 writes a list of constants as a single one with a comment.
LISTED = rf"(?:=\s*ANY\s*\(\s*{PART}\s*\)|IN\s*\(\s*{PART}(?:\s*,\s*{PART}|\s*/\*, \.\.\. \*/)*\s*\))"
COMPARED = re.compile(
    rf"{NAMED}\s*(?:(?P<operator><=|>=|<(?![@<=>-])|>(?!>)|@>|&&)\s*{PART}|(?P<listed>{LISTED}))", re.I
)
# The same in a query that a person wrote, with names.
BY_NAME = rf"""{NAMED}\s*(?P<operator><=|>=|<|>|=|@>|&&)\s*(?P<any>ANY\s*\(\s*)?:(?P<name>[^\W\d]\w*)"""
PREFIX = {"<": "max", "<=": "max", ">": "min", ">=": "min", "@>": "has", "&&": "shares"}
CLAUSE = re.compile(r"(?<=\s)(?:FROM|WHERE|GROUP\s+BY|ORDER\s+BY|LIMIT)\b", re.I)
UNKNOWN = re.compile(r"\$\d+")


@dataclass(frozen=True)
class LegacyQuery:
    """A query with :query, :k and :<filter>; what was assumed; and the placeholders that could not be identified.

    filters: all of them, those of ``conditions`` among them, which have a type and a condition on the row t.
    """

    query: str
    filters: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    conditions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every placeholder told, and the text of the user among them."""
        return not self.unknown and ":query" in self.query


def of_statement(text: str, filters: Mapping[str, str], text_search_config: str) -> LegacyQuery:
    """Names the placeholders of a normalised statement.

    filters: type by name of each column that an equality may be a filter on. text_search_config: put where the
    statement named a configuration, which pg_stat_statements dropped.
    """
    assumed: list[str] = []
    query = OFFSET.sub("", LIMIT.sub("LIMIT :k", text.strip().rstrip(";")))
    if OFFSET.search(text):
        assumed.append("the first page is what is compared, so OFFSET was left out")
    query = _text_search(query, text_search_config, assumed)
    query = LIKE.sub(lambda m: _pattern(m, assumed), query)
    query = MATCH.sub(lambda m: f"{m['operator']} {m['functions']}:query", query)
    query = SIMILARITY.sub(lambda m: f"{m['head']}:query", query)
    query, used = _equalities(query, filters)
    if used:
        assumed.append(f"an equality is a filter that may be absent: {', '.join(used)}")
    query, conditions = _comparisons(query, filters)
    if conditions:
        assumed.append(f"each comparison became an optional filter: {', '.join(conditions)}")
    if ":k" not in query:
        query, missing = _with_limit(query)
        assumed.append(missing)
    unknown = tuple(dict.fromkeys(UNKNOWN.findall(query)))
    return LegacyQuery(
        query if "\n" in query else _laid_out(query), (*used, *conditions), tuple(assumed), unknown, conditions
    )


def _laid_out(query: str) -> str:
    """A long line broken before each clause that stands outside brackets."""
    lines, start = [], 0
    for clause in CLAUSE.finditer(query):
        before = query[: clause.start()]
        if before.count("(") == before.count(")"):
            lines.append(query[start : clause.start()].rstrip())
            start = clause.start()
    return "\n".join([*lines, query[start:]])


def _text_search(query: str, config: str, assumed: list[str]) -> str:
    literal = "'" + config.replace("'", "''") + "'"
    named = TEXT_SEARCH_CONFIG.sub(lambda m: f"{m['function']}({literal},", query)
    if named != query:
        assumed.append(f"the text search configuration is {config}")
    return TEXT_SEARCH.sub(lambda m: f"{m['head']}:query", named)


def _pattern(match: re.Match[str], assumed: list[str]) -> str:
    """The right side of LIKE. Constants are numbered after parameters, so of two the lower number is the text."""
    parts = re.findall(r"\$(\d+)", match["joined"])
    if len(parts) == 1:
        joined = "'%' || :query || '%'"
        _once(assumed, "the application puts % around the user's text for LIKE")
    else:
        text = 1 if len(parts) == 3 else min(range(len(parts)), key=lambda i: int(parts[i]))
        joined = " || ".join(":query" if i == text else "'%'" for i in range(len(parts)))
        _once(assumed, "what is joined to the user's text for LIKE is %")
    return f"{match['operator']} {match['open']}{match['functions']}{joined}"


def _equalities(query: str, filters: Mapping[str, str]) -> tuple[str, list[str]]:
    used: list[str] = []

    def named(match: re.Match[str]) -> str:
        column = _column(match)
        if column not in filters:
            return match[0]
        _once(used, column)
        value = placeholders.written(column)
        return f"({value}::{filters[column]} IS NULL OR {match['column']} = {value})"

    return EQUALS.sub(named, query), used


def _comparisons(query: str, filters: Mapping[str, str]) -> tuple[str, dict[str, dict[str, str]]]:
    """Ranges, sets and arrays. filters: as in :func:`of_statement`."""
    found: dict[str, dict[str, str]] = {}

    def named(match: re.Match[str]) -> str:
        column = _column(match)
        if column not in filters:
            return match[0]
        kind, operator = filters[column], match["operator"]
        if operator in ("@>", "&&") and not kind.endswith("[]"):
            return match[0]
        name = re.sub(r"\W", "_", f"{PREFIX[operator]}_{column}" if operator else f"{column}_any")
        value = placeholders.written(name)
        test = f"{operator} {value}" if operator else f"= ANY ({value})"
        kind = kind if operator else f"{kind}[]"
        found[name] = {"type": kind, "where": f"t.{_quoted(column)} {test}"}
        return f"({value}::{kind} IS NULL OR {match['column']} {test})"

    return COMPARED.sub(named, query), found


def conditions_by_name(query: str, columns: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """For a handwritten query: what placeholders other than columns are compared with. columns: types."""
    found: dict[str, dict[str, str]] = {}
    for match in re.finditer(BY_NAME, query, re.I):
        column, name = _column(match), match["name"]
        if column not in columns or name in columns or name in ("query", "k"):
            continue
        test = f"{match['operator']} {'ANY (' if match['any'] else ''}:{name}{')' if match['any'] else ''}"
        kind = f"{columns[column]}[]" if match["any"] else columns[column]
        found.setdefault(name, {"type": kind, "where": f"t.{_quoted(column)} {test}"})
    return found


def _column(match: re.Match[str]) -> str:
    return (match["quoted"] or match["plain"].lower()).replace('""', '"')


def _quoted(column: str) -> str:
    plain = re.fullmatch(r"[a-z_][a-z0-9_]*", column)
    return column if plain else '"' + column.replace('"', '""') + '"'


def _with_limit(query: str) -> tuple[str, str]:
    if ANY_LIMIT.search(query):
        fixed = re.sub(r"\bLIMIT\s+\d+\s*$", "LIMIT :k", query, flags=re.I)
        return fixed, "the number of rows wanted is at the end"
    return f"{query}\nLIMIT :k", "the statement had no LIMIT; the application took the first rows"


def _once(items: list[str], item: str) -> None:
    if item not in items:
        items.append(item)
