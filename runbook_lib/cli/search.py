"""``runbook search``: calls the live function with each route that can answer, and shows the rows side by side."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runbook_lib.cli.console import EXIT_CODES_HELP, GATE_DID_NOT_PASS, PARAMS, plain_errors, say

if TYPE_CHECKING:
    from runbook_lib.core import db
    from runbook_lib.params import Params

NARROWEST = 28
BETWEEN = "  "
MOST_K = 1000
# Each row comes with its key as one value first, by a name that no column has.
KEY = ""
# By each route: a legacy search reads a large table whole.
LONGEST_SEARCH = "60 s"


@dataclass(frozen=True)
class Answer:
    """What one route found. problem: why it could not answer; then there are no rows."""

    route: str
    ms: float
    rows: Sequence[Mapping[str, Any]]
    problem: str = ""


def _pair(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    if wrong := [each for each in given if "=" not in each]:
        raise click.BadParameter(f"{wrong[0]}: needed: name=value")
    return dict(each.split("=", 1) for each in given)


@click.command(epilog=EXIT_CODES_HELP)
@PARAMS
@click.argument("words")
@click.option("--k", default=10, show_default=True, type=click.IntRange(1, MOST_K), help="Rows to find.")
@click.option("--filter", "filters", multiple=True, callback=_pair, metavar="NAME=VALUE", help="Of target.filters.")
def search(params_file: Path, words: str, k: int, filters: dict[str, str]) -> None:
    """Ask the search function, and show what each route finds. Changes nothing.

    \b
    Example:
      runbook search params/articles.yaml "no login" --k 5 --filter status=open
    """
    from runbook_lib.core import db
    from runbook_lib.core.target import load_params

    with plain_errors():
        params = load_params(params_file)
        if unknown := set(filters) - set(params.target.filters):
            known = ", ".join(params.target.filters) or "none"
            raise click.UsageError(f"--filter {min(unknown)}: target.filters has {known}")
        with (
            db.connect(params, "runbook search") as connection,
            db.bounded(connection, LONGEST_SEARCH),
            connection.transaction(force_rollback=True),
        ):
            connection.execute("SET TRANSACTION READ ONLY")
            live, answers = ask(connection, params, words, k, filters)
            texts = _texts(connection, params, answers)
        for answer in answers:
            if answer.problem:
                say(f"{answer.route}: {answer.problem}")
        answered = [a for a in answers if not a.problem]
        click.echo(f"calls are answered by: {live}")
        click.echo(shown(answered, texts, shutil.get_terminal_size((120, 24)).columns))
        if not answered:
            sys.exit(GATE_DID_NOT_PASS)


def ask(
    connection: db.Connection, params: Params, words: str, k: int, filters: Mapping[str, str]
) -> tuple[str, list[Answer]]:
    """Where calls go now, and each route's answer. Raises BadInput where there is no search function."""
    from runbook_lib.core.gates import BadInput, gate
    from runbook_lib.search import search_function

    if search_function.function_state(connection, params) is None:
        missing = gate(
            "search.function_is_there",
            False,
            params.function_name,
            found="no such function",
            needed="the search function of this target",
            danger="nothing was asked",
            do="run 10_baseline, which creates it",
        )
        raise BadInput([missing])
    route, share = search_function.current_route(connection, params)
    live = (
        route if route == "legacy" or share == 100 else f"{route} for {share} % of the texts, legacy for the others"
    )
    values = {"query": words, "k": k, **dict.fromkeys(params.target.filters), **filters}
    vector, why = _vector(params, words)
    asked = ["legacy", "vector", *(["hybrid"] if params.search.has_fulltext else [])]
    if search_function.legacy_is_retired(connection, params):
        asked.remove("legacy")
    return live, [
        Answer(route, 0, (), f"not asked: {why}")
        if vector is None and route != "legacy"
        else _by(connection, params, route, values | {"embedding": None if route == "legacy" else vector})
        for route in asked
    ]


def _vector(params: Params, words: str) -> tuple[list[float] | None, str]:
    """The vector of the words, from the target's model or from the file of query vectors; or why there is none."""
    from runbook_lib.benchmark import query_set
    from runbook_lib.benchmark.query_set import Query
    from runbook_lib.core.gates import BadInput

    try:
        known = [q for q in query_set.read_queries(params) if q.text == words] if params.queries.embeddings else []
        (query,) = query_set.with_vectors(params, known[:1] or [Query("words", words)])
    except BadInput as error:
        first = next(iter(error.problems))
        return None, f"{first.found}; {first.do}"
    return [float(x) for x in query_set.vector_of(query)], ""


def _by(connection: db.Connection, params: Params, route: str, values: Mapping[str, Any]) -> Answer:
    import psycopg

    from runbook_lib.core import db
    from runbook_lib.core.names import key_of
    from runbook_lib.search import statements

    call = statements.filtered_call_statement(connection, params, as_application=True)
    try:
        with connection.transaction():
            statements.force_route(connection, params, route)
            started = time.perf_counter()
            rows = connection.execute(call, values).fetchall()
            ms = 1000 * (time.perf_counter() - started)
            return Answer(route, ms, [{KEY: key_of(params).text_in(row), **row} for row in rows])
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        return Answer(route, 0, (), f"the server says: {error.diag.message_primary or error}")


def _texts(connection: db.Connection, params: Params, answers: Sequence[Answer]) -> dict[Any, str]:
    """The first text of each row that was found, by its key."""
    from runbook_lib.core.names import names, verbatim
    from runbook_lib.search import conditions
    from runbook_lib.sql import load

    found = list({row[KEY]: None for answer in answers for row in answer.rows})
    kind = {"key_type": verbatim(conditions.types(connection, params)[params.target.key_columns[0]])}
    query = load("search")["texts_of"].compose(names(params) | kind)
    return {str(row["key"]): row["text"] for row in connection.execute(query, {"keys": found}).fetchall()}


def shown(answers: Sequence[Answer], texts: Mapping[Any, str], width: int) -> str:
    """The answers side by side, or one below the other on a narrow terminal."""
    if not answers:
        return "no route answered"
    each = (width - len(BETWEEN) * (len(answers) - 1)) // len(answers)
    if each < NARROWEST:
        return "\n\n".join("\n".join(_column(answer, texts, width)) for answer in answers)
    columns = [_column(answer, texts, each) for answer in answers]
    lines = max(map(len, columns))
    padded = [[*column, *[""] * (lines - len(column))] for column in columns]
    return "\n".join(BETWEEN.join(cell.ljust(each) for cell in row).rstrip() for row in zip(*padded, strict=True))


def _column(answer: Answer, texts: Mapping[Any, str], width: int) -> list[str]:
    lines = [f"{answer.route}, {answer.ms:.1f} ms", "-" * width]
    for rank, row in enumerate(answer.rows, 1):
        key = next(iter(row.values()))
        alike = row.get("similarity")
        head = f"{row.get('rank', rank):>3} {'' if alike is None else f'{alike:.3f} '}{key} "
        lines.append((head + " ".join(texts.get(key, "").split()))[:width])
    return lines if answer.rows else [*lines, "no row"]
