"""What `runbook init` finds in a table and suggests for it, each suggestion with its reason; and the file of them."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from runbook_lib.core import db, row_counts, session
from runbook_lib.core.display import number, size
from runbook_lib.core.names import identifier, names, spelled
from runbook_lib.indexes import forecast
from runbook_lib.migrate import table_checks
from runbook_lib.params import Params
from runbook_lib.params.data import MAX_INDEXED_DIMENSION
from runbook_lib.sql import load

SQL = load("init")

# A column whose average text is at least this long is prose; one named like these is text whatever its length. One
# named like the last is not.
PROSE_BYTES = 16
TEXT_NAMES = re.compile(
    r"title|name|subject|head|summary|descr|abstract|body|content|text|comment|note|question|answer"
)
TITLE_NAMES = re.compile(r"title|name|subject|head")
NOT_PROSE = re.compile(
    r"(^|_)(url|uri|link|e?mail|hash|md5|sha\d*|token|password|secret|path|uuid|slug|phone|ip|version)(_|$)|homepage|website"
)
# A filter that few values share; the manual of pg_stats: n_distinct above zero is their number.
MOST_FILTER_VALUES = 50
FILTER_CATEGORIES = "BENS"  # boolean, enum, number, string; pg_type.typcategory
LONGEST_FILTER_BYTES = 32

# The table grows while the migration runs, and a graph that does not fit is ten times as slow.
ROOM_TO_GROW = 1.2
MEMORY_STEP_MB = 64
# Of effective_cache_size, which is commonly set to between a half and three quarters of the server's memory.
LARGEST_SHARE_OF_CACHE = 0.5
MB_A_WORKER = 32  # PostgreSQL wants so much maintenance_work_mem for each participant of a parallel build

STARTER_QUERIES = 50
WORDS_OF_A_QUERY = 8
SAMPLED_TITLES = 1000
LINE = 110


@dataclass(frozen=True)
class Setting:
    """One line of the file. why: the comment above it."""

    section: str
    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class FoundTable:
    """The table as it is. columns by name; keys: the columns of each, the primary key first; readers: roles that may
    SELECT.

    fulltext: by index, the longest expression of type tsvector that it is on; the longest first.
    """

    draft: Params
    rows: int
    analyzed: bool
    columns: Mapping[str, db.Row]
    keys: tuple[tuple[str, ...], ...]
    readers: tuple[str, ...]
    fulltext: Mapping[str, str]
    server: Mapping[str, Any]

    @property
    def name(self) -> str:
        return spelled(self.draft, "table")


def look(connection: db.Connection, draft: Params) -> FoundTable:
    """Reads the catalogue and the statistics of the table that the draft names. Raises BadInput if it is no table."""
    table_checks.require_table(connection, draft)
    relation, target = spelled(draft, "table"), draft.target
    whole = row_counts.of(connection, draft)
    columns = db.rows(connection, SQL["columns"], draft, relation=relation, schema=target.schema_, table=target.table)
    keys = db.rows(connection, SQL["keys"], draft, relation=relation)
    return FoundTable(
        draft,
        whole.n,
        not whole.counted,
        {c["name"]: c for c in columns},
        tuple(tuple(k["columns"]) for k in keys if set(k["types"]) <= set(table_checks.KEY_TYPES)),
        tuple(r["role"] for r in db.rows(connection, SQL["readers"], draft, relation=relation)),
        _fulltext(connection, draft),
        db.one(connection, SQL["settings"], draft),
    )


def _fulltext(connection: db.Connection, draft: Params) -> dict[str, str]:
    with session.fixed_path(connection):
        found = db.rows(connection, SQL["fulltext_indexes"], draft, relation=spelled(draft, "table"))
    longest: dict[str, str] = {}
    for row in found:
        longest.setdefault(row["index"], row["expression"])
    return longest


def _is_few(column: db.Row) -> bool:
    """Does the last ANALYZE say that few values share the column?"""
    return column["n_distinct"] is not None and 1 < column["n_distinct"] <= MOST_FILTER_VALUES


def texts(found: FoundTable, key: Sequence[str], search_of_today: str = "") -> list[str]:
    """Columns whose text is worth embedding: titles first, then by their place in the table.

    Where the search of today is known, only those that it names behind its WHERE, if it names any.
    """
    good = []
    for name, column in found.columns.items():
        low = name.lower()
        prose = (column["avg_width"] or 0) >= PROSE_BYTES or TEXT_NAMES.search(low)
        # A small table of notes holds few different texts; only a short column of few values is a filter.
        is_filter = _is_few(column) and (column["avg_width"] or 0) <= LONGEST_FILTER_BYTES
        if column["is_text"] and name not in key and prose and not NOT_PROSE.search(low) and not is_filter:
            good.append(name)
    conditions = re.split(r"\bWHERE\b", search_of_today, maxsplit=1, flags=re.I)[-1]
    named = [name for name in good if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", conditions)]
    return sorted(named or good, key=lambda name: TITLE_NAMES.search(name.lower()) is None)


def filters(found: FoundTable, key: Sequence[str], text_columns: Sequence[str]) -> list[str]:
    """Columns that few values share, and that are short enough to be compared."""
    return [
        name
        for name, c in found.columns.items()
        # The first of several columns of a key tells tenants apart; the last tells rows.
        if name not in (key[-1], *text_columns)
        and _is_few(c)
        and c["category"] in FILTER_CATEGORIES
        and (c["avg_width"] or 0) <= LONGEST_FILTER_BYTES
    ]


def target(
    found: FoundTable,
    way_in: Setting,
    name: str,
    key: Sequence[str],
    text_columns: Sequence[str],
    chosen: Mapping[str, Any],
) -> list[Setting]:
    """Sections connection and target. chosen: filters by name, as in the file."""
    others = [f for f in filters(found, key, text_columns) if f not in chosen]
    why = "columns that the application filters by, with equality"
    if any(chosen.values()):
        why = "what the application filters by: columns, with equality, and conditions on the row t"
    if others:
        why += f"; few values also share: {', '.join(others)}"
    # CREATE INDEX counts the rows, but only ANALYZE looks at their values.
    seen = {t: c["avg_width"] for t in text_columns if (c := found.columns[t])["avg_width"] is not None}
    if not seen:
        why += "; the table was never analyzed, so nothing is known of its values: ANALYZE, then init again"
    widths = [f"{t} {number(width)} bytes" for t, width in seen.items()]
    wide = f"average {', '.join(widths)}; " if widths else ""
    t, together = found.draft.target, "" if len(key) == 1 else " together, in the order of their index"
    kinds = ", ".join(found.columns[c]["type"] for c in key)
    return [
        way_in,
        Setting("target", "name", name, "names the ledger's rows, the staging table and the function"),
        Setting("target", "schema", t.schema_),
        Setting("target", "table", t.table),
        Setting("target", "key", key[0] if len(key) == 1 else list(key), f"{kinds}, NOT NULL and unique{together}"),
        Setting("target", "text_columns", list(text_columns), f"{wide}embedded together, in this order"),
        Setting("target", "filters", dict(chosen) if any(chosen.values()) else list(chosen), why),
    ]


def vector(found: FoundTable, source: Mapping[str, str], dimension: int) -> list[Setting]:
    """Sections vector and embeddings: vector as long as it can be indexed, halfvec beyond."""
    limit = MAX_INDEXED_DIMENSION["vector"]
    kind = "vector" if dimension <= limit else "halfvec"
    why = "halfvec would halve the size" if kind == "vector" else f"pgvector indexes vector only up to {limit}"
    free = next(c for c in ("embedding", "search_embedding", "runbook_embedding") if c not in found.columns)
    return [
        Setting("vector", "column", free, "a name that is free in this table"),
        Setting("vector", "type", kind, why),
        Setting("vector", "dimension", dimension, "the model's"),
        Setting("vector", "distance", "cosine", "what most models of text were made for; the model's card says"),
        *(Setting("embeddings", k, v) for k, v in source.items()),
    ]


def extension(connection: db.Connection, found: FoundTable) -> list[Setting]:
    """Section extension, where pgvector is in another schema than it is taken to be in."""
    schema = session.pgvectors_schema(connection)
    usual = schema in ("", found.draft.extension.schema_)
    return [] if usual else [Setting("extension", "schema", schema, "where pgvector is installed")]


def queries(file: str, *, given: bool) -> list[Setting]:
    """Section queries, which says where the file is only a starter."""
    why = "" if given else "A STARTER cut from the table's own titles; replace it by what your users search for"
    without = "no judgements: relevance cannot be measured, and 80_shadow wants cut_over.accept_unjudged"
    return [Setting("queries", "file", file, f"{why}; {without}" if why else without), Setting("queries", "k", 10)]


def search(found: FoundTable) -> list[Setting]:
    """Section search: full text, by a column or else by an index on an expression; and who reads the table today."""
    settings = []
    columns = [(name, c["expression"] or "") for name, c in found.columns.items() if c["type"] == "tsvector"]
    if columns:
        name, expression = columns[0]
        settings += [
            Setting("search", "fulltext_column", name, "lets cut_over.route be hybrid"),
            _config(found, expression, "the column's own expression"),
        ]
    elif found.fulltext:
        index, expression = next(iter(found.fulltext.items()))
        others = [name for name in found.fulltext if name != index]
        why = f"as the index {index} has it" + (f"; others on words: {', '.join(others)}" if others else "")
        settings += [
            Setting("search", "fulltext_expression", expression, f"{why}; lets cut_over.route be hybrid"),
            _config(found, expression, "that expression"),
        ]
    if found.readers:
        settings.append(Setting("search", "grant_to", list(found.readers), "these roles may SELECT from the table"))
    return settings


def _config(found: FoundTable, expression: str, where: str) -> Setting:
    config = re.search(r"to_tsvector\('((?:[^']|'')+)'::regconfig", expression)
    value = config[1].replace("''", "'") if config else found.server["text_search_config"].removeprefix("pg_catalog.")
    return Setting("search", "fulltext_config", value, f"by {where if config else 'default_text_search_config'}")


def index(found: FoundTable, kind: str, dimension: int) -> list[Setting]:
    """Section index: HNSW in memory; IVFFlat where the graph would take too much of what the server seems to have."""
    rows = round(found.rows * ROOM_TO_GROW)
    graph = rows * forecast.hnsw_build_bytes_per_row(16, dimension, kind)
    limit = found.server["effective_cache_bytes"] * LARGEST_SHARE_OF_CACHE
    fits = graph <= limit
    lists = forecast.lists_rule(rows)
    wanted = graph + forecast.HNSW_PARALLEL_RESERVE
    if not fits:
        wanted = forecast.ivfflat_build_bytes(rows, dimension, kind, lists)
    memory_mb = max(1, -(-round(wanted) // (MEMORY_STEP_MB * forecast.MB))) * MEMORY_STEP_MB
    most = min(found.server["maintenance_workers"], found.server["workers"])
    workers = max(0, min(most, memory_mb // MB_A_WORKER - 1))
    why = f"its graph takes {size(graph)} while it is built; effective_cache_size allows {size(limit)}"
    if not fits:
        why = f"an HNSW graph would take {size(graph)}, and half of effective_cache_size is {size(limit)}"
    return [
        Setting("index", "method", "hnsw" if fits else "ivfflat", why),
        Setting(
            "index",
            "maintenance_work_mem_mb",
            memory_mb,
            f"by the forecast for {number(rows)} rows, a fifth more than today; the server must have it to spare",
        ),
        Setting("index", "parallel_workers", workers, f"the server allows {most}, each with {MB_A_WORKER} MB"),
    ]


def render(found: FoundTable, settings: Sequence[Setting]) -> str:
    """The params file: sections in the order given, the reason above each line."""
    lines = [
        f"# {found.name}, {number(found.rows)} rows. Written by `runbook init` from what the server says.",
        "# Check every line; the reason is above it. Anything left out has its default: docs/reference.md.",
    ]
    section = ""
    for s in settings:
        if s.section != section:
            lines += ["", f"{s.section}:"]
            section = s.section
        lines += [f"  # {part}" for part in textwrap.wrap(s.why, LINE)]
        lines += textwrap.indent(_yaml(s.key, s.value), "  ").splitlines()
    return "\n".join(lines) + "\n"


def _yaml(key: str, value: Any) -> str:
    text = str(value)
    if "\n" in text and isinstance(value, str):
        block = f"{key}: |\n" + textwrap.indent("\n".join(x.rstrip() for x in text.expandtabs().splitlines()), "  ")
        if yaml.safe_load(block)[key].split() == text.split():
            return block
    options: dict[str, Any] = {"allow_unicode": True, "width": 10_000, "sort_keys": False}
    if isinstance(value, list):
        return f"{key}: {yaml.safe_dump(value, default_flow_style=True, **options).strip()}"
    return str(yaml.safe_dump({key: value}, default_flow_style=False, **options)).strip()


def starter_queries(connection: db.Connection, found: FoundTable, column: str) -> str:
    """JSON lines: the first words of texts sampled from the column, spread over the sample; each said a starter."""
    how = row_counts.some_pages(found.rows, SAMPLED_TITLES)
    block = SQL["titles"].compose(names(found.draft) | {"column": identifier(column), "tablesample": how})
    rows = connection.execute(block, {"rows": SAMPLED_TITLES}).fetchall()
    cut = list(dict.fromkeys(" ".join(r["text"].split()[:WORDS_OF_A_QUERY]) for r in rows))
    spread = cut[:: max(1, len(cut) // STARTER_QUERIES)][:STARTER_QUERIES]
    records = ({"query_id": f"starter-{i}", "text": text} for i, text in enumerate(spread, 1))
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
