"""Phase 20: pgvector installed or updated; the rollback removes it only where the runbook brought it."""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

from runbook_lib.core import db, versions
from runbook_lib.core.display import Table, some
from runbook_lib.core.gates import Gate, Gates, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier
from runbook_lib.core.phase import Phase, changes
from runbook_lib.migrate import pgvector_releases
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("extension")

# A setting that every release since 0.8.0 defines: the catalogue may say so while an older library is loaded.
SETTING_OF_A_NEW_LIBRARY = "hnsw.iterative_scan"
SHOWN = 3


def check(connection: db.Connection, params: Params, server: db.Row) -> Iterator[Gate]:
    """Before anything is started: is the release offered, may this role install it, and is its schema the right one?

    server: of ``inputs.sql``.
    """
    v = db.one(connection, SQL["offered"], params, schema=params.extension.schema_)
    wanted = params.extension.version or v["default_version"]
    offered = sorted(v["offered"], key=versions.order)
    good = wanted in offered and versions.at_least(wanted, pgvector_releases.OLDEST_PGVECTOR)
    yield gate(
        "inputs.pgvector_is_available",
        good,
        "vector",
        found=f"the server offers {', '.join(offered)}" if offered else "no files of pgvector on the server",
        needed=params.extension.version or f"{pgvector_releases.OLDEST_PGVECTOR} or newer",
        danger="there is no type to store vectors in" if not offered else _faults_left(offered[-1]),
        do="install the server's package (postgresql-NN-pgvector, pgvector_NN), or build the tagged source as shown"
        " in 20_extension",
        figures={"default_version": v["default_version"], "installed": v["installed"]},
    )
    current = v["installed"] is not None and wanted is not None and versions.at_least(v["installed"], wanted)
    yield _may_make_extension(server, v, current)
    if v["installed"] is not None:
        yield gate(
            "inputs.extension_is_in_its_schema",
            v["installed_schema"] == params.extension.schema_,
            "vector",
            found=f"in schema {v['installed_schema']}",
            needed=f"in schema {params.extension.schema_}, as extension.schema says",
            danger="every statement names pgvector's type and operators with their schema, and would not find them",
            do=f"extension: {{schema: {v['installed_schema']}}} in the params file",
        )
    else:
        yield gate(
            "inputs.extension_schema_exists",
            v["schema_there"],
            params.extension.schema_,
            found="there" if v["schema_there"] else "no such schema",
            needed="a schema for CREATE EXTENSION",
            danger="20_extension would be refused by the server",
            do="CREATE SCHEMA, or name another in extension.schema",
        )


def _faults_left(newest: str) -> str:
    faults = [f for r in pgvector_releases.between(newest, pgvector_releases.OLDEST_PGVECTOR) for f in r.fixes]
    return "; ".join(faults) or "there is nothing to install by that name"


def _may_make_extension(server: db.Row, v: db.Row, current: bool) -> Gate:
    role = server["quoted_role"]
    by_trust = v["trusted"] and (v["owned"] if v["installed"] else v["may_create_in_database"])
    if current:
        how: str | None = f"{v['installed']} is installed already"
    elif server["superuser"]:
        how = f"{role} is a superuser"
    elif server["administrator_of"]:
        how = f"{role} is a member of {', '.join(server['administrator_of'])}"
    else:
        how = "the extension is trusted on this server" if by_trust else None
    verb = "ALTER EXTENSION vector UPDATE" if v["installed"] else "CREATE EXTENSION vector"
    return gate(
        "inputs.may_make_extension",
        how is not None,
        f"database {server['database']}",
        found=how or f"{role} is no superuser, and vector is not a trusted extension here",
        needed="a role that may install pgvector, or pgvector installed",
        danger="20_extension would be refused by the server",
        do=f"have a superuser run in this database: {verb};",
    )


def _state(connection: db.Connection, params: Params) -> tuple[str | None, str | None]:
    row = db.one(connection, SQL["state"], params)
    return row["installed"], row["default_version"]


def plan(phase: Phase) -> db.Plan:
    """CREATE EXTENSION, ALTER EXTENSION UPDATE, or nothing where the wanted release or a newer one is installed."""
    connection, params = phase.connection, phase.params
    installed, default = _state(connection, params)
    wanted = params.extension.version or default
    if installed is None:
        statements = [_statement(params, "create", "VERSION")]
    elif wanted is not None and not versions.at_least(installed, wanted):
        statements = [_statement(params, "update", "TO")]
    else:
        statements = []
    return db.Plan(tuple(statements), connection)


def _statement(params: Params, block: str, keyword: str) -> db.Statement:
    version = params.extension.version
    clause = sql.SQL(" {} {}").format(sql.SQL(keyword), sql.Literal(version)) if version else sql.SQL("")
    schema = identifier(params.extension.schema_)
    return db.statement(SQL[block], params, {"extension_schema": schema, "version_clause": clause})


@changes
def apply(phase: Phase) -> Table:
    """Carries out the plan and puts pgvector's schema on this session's search path."""
    done = phase.carry_out(plan(phase))
    db.use_search_path(phase.connection)
    return done


def brings(connection: db.Connection, params: Params) -> Table:
    """What the update brings, release by release; empty where nothing changes."""
    installed, default = _state(connection, params)
    wanted = params.extension.version or default
    releases = pgvector_releases.between(
        installed or pgvector_releases.OLDEST_PGVECTOR, wanted or pgvector_releases.OLDEST_PGVECTOR
    )
    return Table(
        ("release", "date", "brings", "fixes"),
        [(r.version, f"{r.released:%Y-%m-%d}", r.brings, "; ".join(r.fixes)) for r in releases],
        f"from {installed or 'not installed'} to {wanted or 'not available'}",
    )


def verify(phase: Phase) -> Gates:
    """The installed release is recent enough, and the loaded library matches the catalogue."""
    connection, params = phase.connection, phase.params
    installed, default = _state(connection, params)
    wanted = params.extension.version
    needed = max(pgvector_releases.OLDEST_PGVECTOR, wanted or "", key=versions.order)
    recent = installed is not None and versions.at_least(installed, needed)
    missing = pgvector_releases.between(installed, needed) if installed else []
    return Gates(
        (
            gate(
                "extension.version_is_recent_enough",
                recent,
                "vector",
                found=installed or "not installed",
                needed=f"{needed} or newer",
                danger="; ".join(fix for r in missing for fix in r.fixes) or "there is no type to store vectors in",
                do="run 20_extension with execute: true; the server needs the package of that release first",
                figures={"installed": installed, "default_version": default},
            ),
            _library_gate(connection, params, installed, default),
        )
    )


def _library_gate(connection: db.Connection, params: Params, installed: str | None, default: str | None) -> Gate:
    knows = installed is not None and _library_knows(connection, params, SETTING_OF_A_NEW_LIBRARY)
    agree = installed is not None and installed == default and knows
    library = "knows" if knows else "does not know"
    return gate(
        "extension.library_and_catalogue_agree",
        agree,
        "vector",
        found=f"catalogue {installed}, files {default}; the loaded library {library} {SETTING_OF_A_NEW_LIBRARY}"
        if installed
        else "not installed",
        needed=f"one release in catalogue, files and library, which knows {SETTING_OF_A_NEW_LIBRARY}",
        danger="fixes live in the library alone: the catalogue may name a release whose fixes are not loaded",
        do="leave extension.version out and run 20_extension again; sessions from before a package update"
        " keep the old library until they reconnect",
        figures={"catalogue": installed, "files": default},
    )


def _library_knows(connection: db.Connection, params: Params, setting: str) -> bool:
    schema = db.one(connection, SQL["state"], params)["installed_schema"]
    cast = identifier(schema, "vector")
    connection.execute(SQL["load_library"].compose({"vector_in_schema": cast}), {})
    return bool(db.one(connection, SQL["library_knows"], params, setting=setting)["known"])


def _users(connection: db.Connection, params: Params) -> list[str]:
    return [str(row["object"]) for row in db.rows(connection, SQL["users"], params)]


def _is_ours(ledger: Ledger, params: Params) -> bool:
    if not ledger.exists():
        return False
    return bool(db.one(ledger.connection, SQL["installed_by_runbook"], params)["installed"])


def undo_plan(phase: Phase) -> db.Plan:
    """DROP EXTENSION … RESTRICT, or nothing where the runbook did not install it or something else uses it."""
    connection, params = phase.connection, phase.params
    installed, _ = _state(connection, params)
    removable = installed is not None and _is_ours(phase.ledger, params) and not _users(connection, params)
    return db.Plan((db.statement(SQL["drop"], params),) if removable else (), connection)


@changes
def undo(phase: Phase) -> Table:
    """Removes pgvector if the runbook brought it and nothing uses it; never with CASCADE."""
    return phase.carry_out(undo_plan(phase))


def verify_undone(phase: Phase) -> Gates:
    """pgvector is gone, or stays because something else needs it."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    installed, _ = _state(connection, params)
    users = _users(connection, params) if installed else []
    if installed is None:
        found = "not installed"
    elif not _is_ours(ledger, params):
        found = f"{installed}, there before the runbook or installed by another role: it stays"
    elif users:
        found = f"{installed}, used by {some(users, SHOWN)}: it stays"
    else:
        found = f"{installed}, installed by the runbook and used by nothing"
    return Gates(
        (
            gate(
                "extension.is_as_before",
                installed is None or not _is_ours(ledger, params) or bool(users),
                "vector",
                found=found,
                needed="removed, or kept for others",
                danger="the database is not as it was",
                do="run undo/extension again with execute: true",
            ),
        )
    )
