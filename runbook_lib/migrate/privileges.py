"""Privileges of other roles: on the runbook's tables, sequences, functions and schema; and where they may create
objects that an unqualified call would find. The runbook's objects are closed when they are created
(:mod:`runbook_lib.core.closed`); this checks what has been granted since.
"""

from __future__ import annotations

from runbook_lib.backfill import partitioned_twin, vector_store
from runbook_lib.core import db, session
from runbook_lib.core.display import some
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import WAYS_TO_ANSWER, changing, function_of, names, spelled, words_functions
from runbook_lib.params import Params
from runbook_lib.search import live_shadow
from runbook_lib.sql import load

SQL = load("privileges")

# Of the log of live calls, all but the number and the time of a row.
WRITTEN_BY_CALLERS = (
    *("text_hash", "filters", "live_route", "live_ms", "live_keys"),
    *("other_route", "other_ms", "other_keys", "problem"),
)
# Privileges that others may be given: by what they are on, and their column where it is that column's alone.
FOR_CALLERS = {
    ("schema", "", "USAGE"),
    ("route", "", "SELECT"),
    ("way_to_search", "", "EXECUTE"),
    ("search", "", "EXECUTE"),
    ("log", "logged_at", "SELECT"),
    *(("log", column, "INSERT") for column in WRITTEN_BY_CALLERS),
}
# Whoever signs is not the application, whose password is kept in more places.
FOR_APPROVERS = {("entry", "", "SELECT"), ("sign_off", "", "EXECUTE")}
FOR_READERS_OF_THE_TABLE = {("vectors", "", "SELECT")}
# Made there for every target, and named nowhere else but in the blocks that make them.
IN_LEDGER = ("chain_entry", "sign_off")
MOST_NAMED, CREATORS_NAMED = 8, 3


def check(connection: db.Connection, params: Params) -> Gate:
    """Nobody but the owner has a privilege on an object of the runbook's that is not meant for them."""
    values = {
        "ledger": spelled(params, "ledger"),
        "schema": spelled(params, "schema"),
        "table": params.target.table,
        "vectors": vector_store.of(params).table(params),
    }
    found = [row for row in _open(connection, params, values) if not _is_meant(row)]
    revokes = dict(_said_and_revoke(row) for row in found)
    return gate(
        "privileges.only_what_is_meant",
        not found,
        f"schema {params.ledger.schema_}, and what the runbook made next to the table",
        found=some(list(revokes), MOST_NAMED, "; ")
        or "no other role may write or read them" + _by_default(connection, params, values),
        needed="for callers: the search function, the route, and the way to search by a value; for approvers: reads"
        " of the ledger, and sign-offs",
        danger="whoever may write them moves the reads, changes answers, or opens steps; whoever may read them sees"
        " keys and vectors past the table's own privileges and policies",
        do=" ".join(revokes.values()),
        figures={"privileges": len(found)},
    )


def _open(connection: db.Connection, params: Params, values: dict[str, str | None]) -> list[db.Row]:
    answering = [*(function_of(params, way) for way in WAYS_TO_ANSWER), *words_functions(params).values()]
    functions = [params.function_name, live_shadow.function_name(params), *answering, "check_vector"]
    own = [*_in_ledger(params), *IN_LEDGER, live_shadow.log_name(params)]
    beside = {
        "parts": partitioned_twin.beside_name(params.target.table, partitioned_twin.PARTS),
        "log": live_shadow.log_name(params),
    }
    return db.rows(
        connection,
        SQL["open"],
        params,
        own=own,
        functions=functions,
        callers=params.search.grant_to,
        **values,
        **beside,
    )


def _in_ledger(params: Params) -> list[str]:
    """The names that are made for this target in the ledger's schema, which may hold others' objects too."""
    known = names(params) | changing(params)
    prefix = f"{spelled(params, 'ledger')}."
    others = {known[name].as_string() for name in ("table", "vectors", "function", "qualified_index")}
    qualified = [n.as_string().replace("%%", "%") for n in known.values() if n.as_string() not in others]
    return [n.removeprefix(f'{prefix}"')[:-1].replace('""', '"') for n in qualified if n.startswith(f'{prefix}"')]


def _is_meant(row: db.Row) -> bool:
    key = (row["what"], row["of_column"], row["privilege"])
    if row["grantee"] is None and key != ("vectors", "", "SELECT"):
        return False
    return (
        key in FOR_CALLERS
        or (key in FOR_APPROVERS and not row["is_caller"])
        or (key in FOR_READERS_OF_THE_TABLE and row["reads_table"])
    )


def _said_and_revoke(row: db.Row) -> tuple[str, str]:
    """What somebody has, in words, and the statement that takes it away."""
    grantee, name, kind = row["grantee"] or "PUBLIC", row["name"], row["kind"]
    if kind == "ROLE":
        return f"{grantee} is a member of {name}", f"REVOKE {name} FROM {grantee};"
    privilege = row["privilege"] + (f" ({row['of_column']})" if row["of_column"] else "")
    return (
        f"{grantee} has {privilege} on {kind.lower()} {name}",
        f"REVOKE {privilege} ON {kind} {name} FROM {grantee};",
    )


def _by_default(connection: db.Connection, params: Params, values: dict[str, str | None]) -> str:
    """What default privileges would give, named: it is taken back from each object as it is made."""
    found = db.rows(connection, SQL["by_default"], params, ledger=values["ledger"], schema=values["schema"])
    given = "; ".join(f"{row['grantee']} on {row['made']}" for row in found)
    return (
        f"; ALTER DEFAULT PRIVILEGES gives rights to {given}, which each object loses as it is made" if given else ""
    )


def check_open_schemas(connection: db.Connection, params: Params) -> Gate:
    """Who else may create, or has created, in a schema that ``legacy.query`` finds its names in (CVE-2018-1058)?

    The runbook's own SQL is qualified. What remains are the application's statements, which need its search path.
    """
    in_path = {*session.inherited(connection), params.target.schema_}
    found = [row for row in session.open_schemas(connection) if row["schema"] in in_path]
    open_now = [row for row in found if row["schema"] not in params.accept.open_schemas]
    agreed = [row["schema"] for row in found if row["schema"] in params.accept.open_schemas]
    # This list replaces the one in the file, so it includes what was accepted before.
    names = ", ".join(dict.fromkeys([*params.accept.open_schemas, *(row["schema"] for row in open_now)]))
    return gate(
        "inputs.only_the_trusted_create_on_the_path",
        not open_now,
        "schemas on legacy.query's search path",
        found="; ".join(map(_described, open_now))
        or ("others may create in none" + (f", but for {', '.join(agreed)}: agreed to" if agreed else "")),
        needed="CREATE only for superusers, this role, and the owners of the database and the table",
        danger=f"what is made in {', '.join(row['schema'] for row in open_now)} and fits a call of legacy.query"
        f" better than PostgreSQL's function or operator runs as {connection.info.user}, and in the search"
        " function as its caller",
        do=" ".join([*filter(None, map(_remedy, open_now)), f"or accept it: accept.open_schemas: [{names}]"]),
    )


def _described(row: db.Row) -> str:
    facts = []
    if row["creators"]:
        facts.append(f"{some(row['creators'], CREATORS_NAMED)} may create in {row['schema']}")
    if row["planted"]:
        facts.append(f"in {row['schema']} is {some(row['planted'], CREATORS_NAMED)}")
    return ", ".join(facts)


def _remedy(row: db.Row) -> str:
    revoke = f"REVOKE CREATE ON SCHEMA {row['quoted']} FROM {', '.join(row['grantees'])};" if row["grantees"] else ""
    return " ".join(filter(None, [revoke, "look at what was made there, and drop it;" if row["planted"] else ""]))
