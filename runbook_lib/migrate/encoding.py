"""The database's encoding: which characters it can hold, and be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from runbook_lib.benchmark import query_set
from runbook_lib.core import db
from runbook_lib.core.display import some
from runbook_lib.core.gates import BadInput, Gate, gate
from runbook_lib.params import Params

SHOWN = 5


def check(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Models read characters, so their bytes must be known: what leaves and what is hashed is UTF-8 everywhere."""
    encoding = str(connection.info.parameter_status("server_encoding"))
    known = encoding != "SQL_ASCII"
    database = f"database {connection.info.dbname}"
    yield gate(
        "encoding.characters_are_known",
        known,
        database,
        found=encoding
        if encoding == "UTF8"
        else f"{encoding}, converted to UTF-8 for the model and for hashes"
        if known
        else "SQL_ASCII: PostgreSQL takes any bytes, and does not know which characters they are",
        needed="a database with an encoding; UTF8 has every character",
        danger="one text in Latin-1 among those in UTF-8 stops loading, backfill and refresh, whenever it is written",
        do="make a database in UTF8 and restore into it what pg_dump --encoding wrote, naming the encoding that the"
        " texts have; what is in no encoding must be fixed first",
    )
    if known and encoding != "UTF8":
        # Of a file that cannot be read, inputs.queries_are_readable tells.
        with suppress(BadInput):
            yield _queries(connection, params, encoding, database)


def _queries(connection: db.Connection, params: Params, encoding: str, database: str) -> Gate:
    """A character that the encoding lacks is refused by the server before any function sees it, today as well."""
    queries = query_set.read_queries(params)
    missing = db.missing_characters(connection, "".join(q.text for q in queries))
    refused = [q.query_id for q in queries if missing & set(q.text)]
    return gate(
        "encoding.queries_can_be_asked",
        not refused,
        database,
        found=f"{encoding} has no {' '.join(sorted(missing))}, asked for by {some(refused, SHOWN)}"
        if refused
        else f"{encoding} has every character of the queries",
        needed=f"queries with characters of {encoding} only, here and from the application",
        danger="the server refuses such a query, with the legacy search as with the new one",
        do=f"take them out of {params.queries.file}, or move to a database in UTF8",
    )
