"""Can hybrid find words? Its tsvector, a column or an expression, its configuration, and the index that serves it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

import psycopg

from runbook_lib.backfill import update_effects
from runbook_lib.core import db, table_kind
from runbook_lib.core.display import number
from runbook_lib.core.gates import Gate, Verdict, gate
from runbook_lib.core.names import identifier, names, shortened, spelled
from runbook_lib.core.query_plan import SMALL_PARTITION_ROWS, QueryPlan, explain
from runbook_lib.indexes import partitions
from runbook_lib.migrate import filter_checks
from runbook_lib.params import Params
from runbook_lib.search import statements
from runbook_lib.search.search_path import as_in_the_function
from runbook_lib.sql import load

SQL = load("fulltext")

TSVECTOR = "tsvector"
NAMED = re.compile(r"\bto_tsvector\(\s*'((?:[^']|'')+)'", re.I)
# What is planned; no row is looked for.
WORD = {"query": "word", "k": 1}
# A message with a statement for each of many partitions helps nobody.
MOST_STATEMENTS = 3


def check(connection: db.Connection, params: Params, columns: Mapping[str, db.Row]) -> Iterator[Gate]:
    """Gates of search.fulltext_column or search.fulltext_expression; none where hybrid is not wanted."""
    if not params.search.has_tsvector:
        return
    document = _expression(connection, params) if params.search.fulltext_expression else _column(params, columns)
    config = _config(connection, params)
    yield document
    yield config
    sound = document.verdict is config.verdict is Verdict.PASS
    # Without hybrid only 80_shadow searches a column's words.
    wanted = params.search.fulltext_expression or params.cut_over.route == "hybrid"
    if sound and wanted and table_kind.of(params).takes_trials:
        yield _index(connection, params)


def _column(params: Params, columns: Mapping[str, db.Row]) -> Gate:
    column = params.search.fulltext_column or ""
    kind = columns[column]["type"] if column in columns else None
    near = difflib.get_close_matches(column, list(columns), n=1, cutoff=0.5) if kind is None else []
    return gate(
        "inputs.fulltext_column_is_tsvector",
        kind == TSVECTOR,
        f"{column} of {spelled(params, 'table')}",
        found=kind or "no such column",
        needed="a tsvector column for the hybrid route",
        danger="the hybrid route's text half would fail, or match nothing",
        do=f"did you mean {near[0]}?"
        if near
        else "leave search.fulltext_column out, or give search.fulltext_expression, which adds no column",
    )


def _expression(connection: db.Connection, params: Params) -> Gate:
    problem, kinds = "", list[str]()
    try:
        with as_in_the_function(connection, params):
            names_of_it = statements.fulltext_names(connection, params)
            cursor = connection.execute(SQL["shape"].compose(names(params) | names_of_it), {}, prepare=False)
            kinds = [c.type_display for c in cursor.description or []]
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        problem = update_effects.said(error)
    return gate(
        "inputs.fulltext_expression_is_tsvector",
        kinds == [TSVECTOR],
        "search.fulltext_expression",
        found=f"PostgreSQL says: {problem}" if problem else ", ".join(kinds),
        needed=f"one expression of type tsvector over the columns of {spelled(params, 'table')}",
        danger="the hybrid route's text half would fail, or match nothing",
        do="write it as CREATE INDEX takes it: columns without the table's name; functions and configurations of your"
        " own with their schema",
    )


def check_words_query(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Gates of search.words_query, with sound filters; none without words_query."""
    if params.search.words_query is None:
        return
    seen = filter_checks.of_condition(connection, params, statements.words_query_condition(connection, params))
    yield gate(
        "inputs.words_query_can_be_planned",
        not seen.problem,
        "search.words_query",
        found=f"PostgreSQL says: {seen.problem}" if seen.problem else "planned",
        needed=f"a SELECT of two columns, {params.target.key_shown} of {spelled(params, 'table')} and a score",
        danger="every hybrid search would fail",
        do="try it in psql with values in place of :query and :k; qualify names from other schemas",
    )
    if not seen.problem:
        name = "inputs.callers_may_read_what_words_query_reads"
        yield filter_checks.privileges(name, params, seen.lacking, "search.words_query names", "hybrid searches")


def _config(connection: db.Connection, params: Params) -> Gate:
    """Is it there; and where it was left at its default, is it the one that the tsvector is made with?"""
    wanted = params.search.fulltext_config
    config = statements.text_search_config(connection, params)
    made = _made_with(connection, params) if "fulltext_config" not in params.search.model_fields_set else {}
    other = ", ".join(made.values()) if config and made and config["oid"] not in made else ""
    known = [r["name"] for r in db.rows(connection, SQL["configurations"], params)]
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    return gate(
        "inputs.fulltext_config_exists",
        config is not None and not other,
        wanted,
        found=f"the default, but the tsvector is made with {other}"
        if other
        else "there"
        if config
        else "no such text search configuration",
        needed="the configuration that the tsvector is made with",
        danger="queries would be cut into other words than the rows",
        do=f"name it in search.fulltext_config: {other}"
        if other
        else f"did you mean {near[0]}?"
        if near
        else f"this server has: {', '.join(known)}",
    )


def _made_with(connection: db.Connection, params: Params) -> dict[int, str]:
    """The configurations that the expression names, or that of the generated column: by oid, their names."""
    column, table = params.search.fulltext_column, spelled(params, "table")
    generated = db.rows(connection, SQL["generated"], params, table=table, column=column)
    expression = params.search.fulltext_expression or "".join(row["expression"] for row in generated)
    named = [
        statements.text_search_config(connection, params, n.replace("''", "'")) for n in NAMED.findall(expression)
    ]
    return {c["oid"]: c["spelled"] for c in named if c}


def _index(connection: db.Connection, params: Params) -> Gate:
    """Has the words half planned with table scans switched off: what is read whole then has no index for it."""
    plan = _plan(connection, params)
    whole, used = plan.read_whole, plan.indexes
    there = db.rows(connection, SQL["candidates"], params, table=spelled(params, "table")) if whole else []
    others = [c for c in there if c["bare_name"] not in used]
    rows = _few_rows(connection, params) if whole and params.search.fulltext_column else None
    refused = _cannot_be_indexed(connection, params) if whole and params.search.fulltext_expression else ""
    if not whole:
        found = f"{', '.join(used)} serves it"
    elif rows is not None:
        found = f"no index, and with {number(rows)} rows none is needed"
    elif refused:
        found = f"no index, and PostgreSQL says to one: {refused}"
    else:
        found = "; ".join(map(_why_not, others[:MOST_STATEMENTS])) or "no index on a tsvector"
    return gate(
        "inputs.fulltext_index_serves_hybrid",
        not whole or rows is not None,
        f"search.{'fulltext_expression' if params.search.fulltext_expression else 'fulltext_column'}"
        f" of {spelled(params, 'table')}",
        found=found,
        needed="a valid GIN or GiST index on exactly this, without a condition",
        danger="every hybrid search would read the whole table"
        + (", and compute each row's words again" if params.search.fulltext_expression else ""),
        do="name the configuration, as in to_tsvector('english', body), and call IMMUTABLE functions only"
        if refused
        else _how_to_make(connection, params, plan, others),
        figures={"indexes": used, "read_whole": whole},
    )


def _plan(connection: db.Connection, params: Params) -> QueryPlan:
    statement = statements.any_word_statement(connection, params)
    with as_in_the_function(connection, params):
        connection.execute(SQL["without_scans"].compose({}))
        return explain(connection, statement, WORD)


def _few_rows(connection: db.Connection, params: Params) -> int | None:
    """The number of rows, where a scan of so few is as good as an index; None where there are more."""
    most = SMALL_PARTITION_ROWS
    rows = int(db.one(connection, SQL["first_rows"], params, most=most + 1)["rows"])
    return rows if rows <= most else None


def _cannot_be_indexed(connection: db.Connection, params: Params) -> str:
    """What PostgreSQL says to an index on the expression, tried on an empty copy; empty if it takes it."""
    named = names(params) | statements.fulltext_names(connection, params)
    try:
        with as_in_the_function(connection, params):
            for block in ("create_probe", "index_probe"):
                connection.execute(SQL[block].compose(named), {}, prepare=False)
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        return update_effects.said(error)
    return ""


def _why_not(c: db.Row) -> str:
    """Why an index on a tsvector does not serve."""
    if c["being_built"]:
        return f"{c['name']} is still being built"
    if not c["usable"]:
        why = "a partition lacks its part of it" if c["is_parent"] else "an earlier concurrent build did not finish"
        return f"{c['name']} is not valid ({why})"
    if c["condition"]:
        return f"{c['name']} is partial, WHERE {c['condition']}, and a search asks for every row"
    return f"{c['name']} is on another expression, {c['document']}"


def _how_to_make(connection: db.Connection, params: Params, plan: QueryPlan, others: Sequence[db.Row]) -> str:
    """The statements that make the index, what they lock, and the one that takes it away.

    others: the indexes on a tsvector that are there. Those that cannot be used are dropped, unless partitions are
    part of them.
    """
    if any(c["being_built"] for c in others):
        return "wait until it is built, and look again: SELECT * FROM pg_stat_progress_create_index;"
    table, expression = spelled(params, "table"), params.search.fulltext_expression
    document = f"({expression.strip()})" if expression else _quoted(params.search.fulltext_column or "")
    using = f"USING gin ({document})"
    unusable = [c for c in others if not c["usable"]]
    drops = [
        f"DROP INDEX {'' if c['is_parent'] else 'CONCURRENTLY '}{c['name']};"
        for c in unusable
        if not c["is_attached"]
    ]
    leaves = [p for p in partitions.tree(connection, params, table) if p.is_leaf and p.level > 0]
    if leaves:
        lacking = [p for p in leaves if p.name in plan.read_whole]
        serving = partitions.with_their_parents(connection, params, plan.indexes)
        unfinished = {c["relation"]: c["name"] for c in unusable if c["is_parent"] and c["bare_name"] in serving}
        made, undo = _on_partitions(params, lacking, using, unfinished)
    else:
        own = f"{params.target.name}_fulltext"
        made = [f"CREATE INDEX CONCURRENTLY {_quoted(own)} ON {table} {using};"]
        undo = f"DROP INDEX CONCURRENTLY {_quoted(params.target.schema_, own)};"
    return (
        f"{' '.join([*drops, *made])} ANALYZE {table}; CONCURRENTLY takes SHARE UPDATE EXCLUSIVE, which keeps no"
        f" reader and no writer waiting, and waits for transactions older than itself; undo: {undo}"
    )


def _on_partitions(
    params: Params, lacking: Sequence[partitions.Part], using: str, unfinished: Mapping[int | None, str]
) -> tuple[list[str], str]:
    """The statements for these partitions, and the one that takes the index away.

    unfinished: by the table's oid, its index that is not valid before each of its partitions has a part of it.
    """
    made = []
    for part in lacking[:MOST_STATEMENTS]:
        own = shortened(part.name, "_fulltext")
        if whole := unfinished.get(part.parent):
            made.append(f"CREATE INDEX CONCURRENTLY {_quoted(own)} ON {part.shown} {using};")
            made.append(f"ALTER INDEX {whole} ATTACH PARTITION {_quoted(part.schema, own)};")
        else:
            made.append(f"CREATE INDEX CONCURRENTLY ON {part.shown} {using};")
    if len(lacking) > MOST_STATEMENTS:
        made.append(f"the same for {len(lacking) - MOST_STATEMENTS} more partitions;")
    if unfinished:
        return made, " ".join(f"DROP INDEX {whole};" for whole in unfinished.values())
    name, table = f"{params.target.name}_fulltext", spelled(params, "table")
    made.append(f"CREATE INDEX {_quoted(name)} ON {table} {using}; which takes these over under SHARE;")
    return made, f"DROP INDEX {_quoted(params.target.schema_, name)};"


def _quoted(*parts: str) -> str:
    return identifier(*parts).as_string().replace("%%", "%")
