"""Writes a params file from the live table: what is found is suggested, what is suggested says why.

Nothing is changed in the database. Each answer can be given as a flag; what is neither given nor answered is taken
as found, and what cannot be found is an error that names the flag.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from psycopg import sql

from runbook_lib.cli import legacy_statement, suggest
from runbook_lib.cli.console import names_in
from runbook_lib.cli.legacy_statement import LegacyQuery
from runbook_lib.cli.suggest import SQL, FoundTable, Setting
from runbook_lib.core import db
from runbook_lib.core.display import number, size
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.target import load_params
from runbook_lib.migrate import inputs, statement_statistics, table_checks
from runbook_lib.migrate.statement_statistics import CountedSearch
from runbook_lib.params import Params
from runbook_lib.params.filters import Condition
from runbook_lib.runner.manifest import write_atomically

T = TypeVar("T")
Ask = Callable[[str, str], str]
Say = Callable[[str], None]

PACKAGED_DIMENSION = {"wordllama": 256}
MOST_FILTERS = 4
MOST_STATEMENTS = 20

PLACEHOLDER = (
    "A PLACEHOLDER, not the search of today: none was found. Put the application's own statement here, or every"
    " comparison of old and new means nothing."
)


@dataclass(frozen=True)
class Wishes:
    """What was given as a flag; None is to be found or asked."""

    dsn_env: str | None = None
    service: str | None = None
    schema: str | None = None
    table: str | None = None
    key: str | None = None
    text_columns: tuple[str, ...] | None = None
    filters: tuple[str, ...] | None = None
    legacy_query_file: Path | None = None
    queries_file: Path | None = None
    model: str | None = None
    dimension: int | None = None


def write(wishes: Wishes, output: Path | None, *, force: bool, ask: Ask, say: Say, interactive: bool = False) -> Path:
    """Looks, asks, and writes the params file, and a starter queries file if none was given; returns its path.

    interactive: an answer that cannot be used is asked for again, with the reason. Raises BadInput where a file
    already exists (without ``force``), the server cannot be reached, or the table has no key or no text; then nothing
    was written.
    """
    patiently = partial(_patiently, say, interactive)
    wishes, only_connection, opened = patiently(wishes.dsn_env or wishes.service, lambda: _connection(wishes, ask))
    with opened as connection:
        connection.execute("SET default_transaction_read_only = on")
        table, found = patiently(wishes.table, lambda: _table(connection, only_connection, wishes, ask))
        output = output or Path("params") / f"{_short_name(table)}.yaml"
        starter = output.with_name(f"{output.stem}-queries.jsonl")
        _refuse_to_overwrite([output] if wishes.queries_file else [output, starter], force)
        say(f"{found.name}: {number(found.rows)} rows, {len(found.columns)} columns")
        queries = _relative(wishes.queries_file, output) if wishes.queries_file else starter.name
        settings, first_text = _settings(connection, found, wishes, queries, ask, say, patiently)
        settings.append(Setting("record", "runs_dir", _relative(Path("runs"), output), "relative to this file"))
        content = suggest.render(found, settings)
        _load(content)
        output.parent.mkdir(parents=True, exist_ok=True)
        if not wishes.queries_file:
            write_atomically(starter, suggest.starter_queries(connection, found, first_text))
            say(f"{starter}: starter queries, cut from {first_text}; put those of your users in their place")
    write_atomically(output, content)
    return output


def _connection(wishes: Wishes, ask: Ask) -> tuple[Wishes, Params, db.Connection]:
    """The wishes with a way in, parameters of it alone, and a connection that it leads to."""
    if wishes.dsn_env is None and wishes.service is None:
        asked = ask("environment variable that holds the DSN", "")
        wishes = replace(wishes, dsn_env=_needed(asked, "connection.dsn_env", "--dsn-env or --service"))
    draft = _draft(wishes, schema="public", table="?", key="?", text_columns=["?"])
    return wishes, draft, db.connect(draft, "runbook init")


def _settings(
    connection: db.Connection,
    found: FoundTable,
    wishes: Wishes,
    queries: str,
    ask: Ask,
    say: Say,
    patiently: Callable[[Any, Callable[[], Any]], Any],
) -> tuple[list[Setting], str]:
    """Every line of the file, asked or found, and the first text column."""
    key = patiently(wishes.key or not found.keys, lambda: _which_key(found, wishes, ask))
    seen = _which_legacy(connection, found, key, wishes, ask, say)
    texts = patiently(wishes.text_columns, lambda: _which_texts(found, key, seen, wishes, ask))
    filters = patiently(wishes.filters is not None, lambda: _which_filters(found, key, texts, seen, wishes, ask))
    source, dimension = patiently(wishes.dimension, lambda: _which_model(wishes, ask))
    search_of_today = seen or _placeholder(found, key, texts, filters)
    way_in = Setting("connection", *(("service", wishes.service) if wishes.service else ("dsn_env", wishes.dsn_env)))
    vector = suggest.vector(found, source, dimension)
    kind = next(s.value for s in vector if s.key == "type")
    settings = [
        *suggest.target(found, way_in, _short_name(found.draft.target.table), key, texts, _as_filters(filters, seen)),
        *vector,
        *suggest.extension(connection, found),
        Setting("legacy", "query", search_of_today.query, "; ".join(search_of_today.assumed)),
        *suggest.queries(queries, given=wishes.queries_file is not None),
        *suggest.search(found),
        *suggest.index(found, kind, dimension),
    ]
    return settings, texts[0]


def _patiently(say: Say, interactive: bool, given: Any, look: Callable[[], T]) -> T:
    """What an answer comes to; asked for again where it cannot be used, unless it was given on the command line."""
    while True:
        try:
            return look()
        except BadInput as error:
            if given or not interactive:
                raise
            say(str(error).strip("\n"))


def _relative(path: Path, output: Path) -> str:
    """Paths in a params file are relative to its own folder."""
    return os.path.relpath(path.resolve(), output.parent.resolve())


def _problem(fact: str, subject: str, found: str, needed: str, do: str) -> BadInput:
    danger = "the runbook would work on a guess; nothing was written"
    return BadInput([Gate(f"init.{fact}", Verdict.FAIL, subject, found, needed, danger, do)])


def _needed(answer: str, subject: str, flag: str) -> str:
    if not answer.strip():
        raise _problem("answer_is_given", subject, "not given, and not to be found out", "an answer", f"say {flag}")
    return answer.strip()


def _refuse_to_overwrite(paths: Iterable[Path], force: bool) -> None:
    there = [str(p) for p in paths if p.exists()]
    if there and not force:
        raise _problem(
            "file_is_free", ", ".join(there), "there already", "no such file", "say --force, or another --output"
        )


def _draft(wishes: Wishes, **target: Any) -> Params:
    """Parameters enough to connect and to name the table; what they say of the rest is not used."""
    way_in = {"dsn_env": wishes.dsn_env} if wishes.dsn_env else {"service": wishes.service}
    data = {
        "connection": way_in,
        "target": {"name": "init", **target},
        "vector": {"dimension": 1},
        "embeddings": {"source": "wordllama"},
        "legacy": {"query": ":query :k"},
        "queries": {"file": "none"},
    }
    return _load(yaml.safe_dump(data))


def _load(content: str) -> Params:
    """The parameters that this content will be. Raises BadInput as for any params file, before it is written."""
    with tempfile.TemporaryDirectory(prefix="runbook-init-") as folder:
        path = Path(folder) / "params.yaml"
        path.write_text(content, "utf-8")
        return load_params(path)


def _short_name(table: str) -> str:
    """The table's name as ledger and staging table can carry it."""
    plain = re.sub(r"[^a-z0-9_]+", "_", table.lower()).strip("_")
    return (plain if plain[:1].isalpha() else f"t_{plain}")[:40]


def _which_table(connection: db.Connection, draft: Params, wishes: Wishes, ask: Ask) -> tuple[str, str]:
    if wishes.table:
        return wishes.schema or "public", wishes.table
    known = db.rows(connection, SQL["tables"], draft, ledger=draft.ledger.schema_)
    known = [t for t in known if wishes.schema in (None, t["schema"])]
    shown = ", ".join(f"{t['schema']}.{t['table']} ({size(t['bytes'])})" for t in known)
    answer = _needed(ask(f"table, of {shown or 'none that holds text'}", ""), "target.table", "--table")
    chosen = [t for t in known if answer in (t["table"], f"{t['schema']}.{t['table']}")]
    return (chosen[0]["schema"], chosen[0]["table"]) if chosen else (wishes.schema or "public", answer)


def _table(connection: db.Connection, draft: Params, wishes: Wishes, ask: Ask) -> tuple[str, FoundTable]:
    """The table's name, and what is found in it. Raises BadInput where there is no such table."""
    schema, table = _which_table(connection, draft, wishes, ask)
    return table, suggest.look(connection, _draft(wishes, schema=schema, table=table, key="?", text_columns=["?"]))


def _which_key(found: FoundTable, wishes: Wishes, ask: Ask) -> tuple[str, ...]:
    """The columns of the key."""
    offered = [columns[0] if len(columns) == 1 else _joined(columns) for columns in found.keys]
    key = wishes.key or ask("key", next(iter(offered), ""))
    for columns in ((key,), names_in(key)):
        if columns in found.keys:
            return columns
    new = "id" if "id" not in found.columns else "row_id"
    raise _problem(
        "key_is_found",
        found.name,
        f"{key} is not one" if key else "no column that identifies a row by itself",
        f"a NOT NULL column of type {', '.join(table_checks.KEY_TYPES)} with its own unique index, or several",
        _nearest(key, offered) + f"say --key with one of {'; '.join(offered)}"
        if offered
        else f"ALTER TABLE {found.name} ADD COLUMN {new} bigint GENERATED ALWAYS AS IDENTITY UNIQUE;"
        " (it rewrites the table under a lock; for a large one add the column, fill and index it in steps)",
    )


def _which_texts(
    found: FoundTable, key: Sequence[str], seen: LegacyQuery | None, wishes: Wishes, ask: Ask
) -> list[str]:
    candidates = suggest.texts(found, key, seen.query if seen else "")
    texts = list(wishes.text_columns or names_in(ask("text columns, title first", _joined(candidates))))
    bad = [t for t in texts if t not in found.columns or not found.columns[t]["is_text"]]
    if texts and not bad:
        return texts
    shown = ", ".join(f"{n} {c['type']}" for n, c in found.columns.items())
    raise _problem(
        "text_is_found",
        found.name,
        f"no text column named {', '.join(bad)}" if bad else "no column that looks like text to search in",
        "at least one column of text",
        _nearest(bad[0] if bad else "", found.columns) + f"say --text-columns; the table has: {shown}",
    )


def _which_filters(
    found: FoundTable, key: Sequence[str], texts: Sequence[str], seen: LegacyQuery | None, wishes: Wishes, ask: Ask
) -> list[str]:
    """What today's search filters by; where that is not known, the columns that few values share."""
    if wishes.filters is not None:
        filters = list(wishes.filters)
    else:
        suggested = list(seen.filters) if seen else suggest.filters(found, key, texts)[:MOST_FILTERS]
        filters = list(names_in(ask("filters of the application, - for none", _joined(suggested))))
    unknown = [f for f in filters if f not in found.columns and not (seen and f in seen.conditions)]
    if unknown:
        do = _nearest(unknown[0], found.columns) + f"say --filters; the table has: {', '.join(found.columns)}"
        raise _problem("filter_is_found", found.name, f"no {', '.join(unknown)}", "columns of the table", do)
    return filters


def _as_filters(names: Sequence[str], seen: LegacyQuery | None) -> dict[str, Any]:
    """The filters by name, as in the file: nothing for a column, else type and condition."""
    return {name: dict(seen.conditions[name]) if seen and name in seen.conditions else None for name in names}


def _nearest(given: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {near[0]}? Else " if near else ""


def _joined(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' if "," in name else name for name in names)


def _which_model(wishes: Wishes, ask: Ask) -> tuple[dict[str, str], int]:
    model = wishes.model or ask("model: wordllama (packaged), module:function, or a file of vectors", "wordllama")
    if model in PACKAGED_DIMENSION:
        return {"source": model}, wishes.dimension or PACKAGED_DIMENSION[model]
    source = "callable" if re.fullmatch(r"[\w.]+:\w+", model) else "file"
    answer = wishes.dimension or _needed(ask(f"dimensions of {model}", ""), "vector.dimension", "--dimension")
    if not str(answer).isdecimal():
        raise _problem("dimension_is_a_number", "vector.dimension", str(answer), "a whole number", "say --dimension")
    return {"source": source, source: model}, int(answer)


def _which_legacy(
    connection: db.Connection,
    found: FoundTable,
    key: tuple[str, ...],
    wishes: Wishes,
    ask: Ask,
    say: Say,
) -> LegacyQuery | None:
    """The search of today: given, or seen and confirmed; None where there is neither."""
    kinds = {n: c["type"] for n, c in found.columns.items() if n != key[-1]}
    if wishes.legacy_query_file:
        return _from_file(wishes.legacy_query_file, kinds)
    for statement in _statements(connection, found, say):
        candidate = legacy_statement.of_statement(statement.text, kinds, found.server["text_search_config"])
        problem = _cannot_be_used(connection, found, key, candidate)
        say(f"\nseen {number(statement.calls)} times, {statement.mean_ms:.1f} ms on average:")
        say(textwrap.indent(candidate.query, "    "))
        if problem:
            say(f"  not usable as it is: {problem}")
            continue
        for assumption in candidate.assumed:
            say(f"  assumed: {assumption}")
        if ask("is this the search of today (yes, no)", "yes").lower().startswith("y"):
            return candidate
    say("no search of today was found; a placeholder is written in its place (or say --legacy-query-file)")
    return None


def _from_file(path: Path, kinds: Mapping[str, str]) -> LegacyQuery:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        found = error.strerror or "cannot be read"
        raise _problem(
            "legacy_is_readable", str(path), found, "a file", "name another file, or make it readable"
        ) from error
    used = [name for name in kinds if re.search(rf"(?<![:\w]):{re.escape(name)}\b", text)]
    conditions = legacy_statement.conditions_by_name(text, kinds)
    return LegacyQuery(text.strip().rstrip(";"), (*used, *conditions), conditions=conditions)


def _statements(connection: db.Connection, found: FoundTable, say: Say) -> tuple[CountedSearch, ...]:
    """Searches of this table that pg_stat_statements has seen; none, and a word why, where it cannot be read."""
    columns = [name for name, column in found.columns.items() if column["is_text"]]
    seen = statement_statistics.look(connection, found.draft, columns, MOST_STATEMENTS)
    if seen.why:
        say(f"{seen.why}, so the search of today cannot be looked up")
    return seen.searches


def _cannot_be_used(
    connection: db.Connection, found: FoundTable, key: tuple[str, ...], candidate: LegacyQuery
) -> str:
    """Why this query cannot stand in the file; empty if PostgreSQL plans it and it returns the key."""
    if candidate.unknown:
        return f"what stood for {', '.join(candidate.unknown)} is not kept by pg_stat_statements"
    if not candidate.complete:
        return "the text of the user is not to be seen in it"
    conditions = {name: Condition(**given) for name, given in candidate.conditions.items()}
    filters = {name: conditions.get(name) for name in candidate.filters}
    target = found.draft.target.model_copy(update={"key": key[0] if len(key) == 1 else key, "filters": filters})
    legacy_section = found.draft.legacy.model_copy(update={"query": candidate.query})
    probe = found.draft.model_copy(update={"target": target, "legacy": legacy_section})
    gate = inputs.legacy_query_runs(connection, probe)
    return "" if gate.verdict is Verdict.PASS else gate.found


def _placeholder(found: FoundTable, key: Sequence[str], texts: Sequence[str], filters: Sequence[str]) -> LegacyQuery:
    """A plain ILIKE over the text columns, for a table whose search is not known."""
    quoted = {name: sql.Identifier(name).as_string() for name in (*key, *texts, *filters)}
    columns = ", ".join(f"t.{quoted[c]}" for c in key)
    conditions = " OR ".join(f"t.{quoted[t]} ILIKE '%' || :query || '%'" for t in texts)
    lines = [f"SELECT {columns}", f"FROM {found.name} AS t", f"WHERE ({conditions})"]
    for name in filters:
        kind = found.columns[name]["type"]
        lines.append(f"  AND (:{name}::{kind} IS NULL OR t.{quoted[name]} = :{name})")
    lines += [f"ORDER BY {columns}", "LIMIT :k"]
    return LegacyQuery("\n".join(lines), tuple(filters), (PLACEHOLDER,))
