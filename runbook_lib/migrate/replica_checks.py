"""Can searches be measured on the replica: is it there, the target's own, level with it, and planned alike?"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg

from runbook_lib.benchmark.replica import SQL
from runbook_lib.core import db, thresholds, versions
from runbook_lib.core.display import duration
from runbook_lib.core.gates import BadInput, Gate, gate
from runbook_lib.core.thresholds import apart
from runbook_lib.params import Params

MB = 1024 * 1024
# A standby that waits for a scan less long than this cancels a good part of the exact searches.
SHORTEST_DELAY_MS = 10_000
DANGER = "what is measured there would say nothing about this database"


def gates(primary: db.Connection, params: Params) -> Iterator[Gate]:
    """Can searches be measured there? Nothing where no replica is given."""
    variable = params.search.read_dsn_env
    if variable is None:
        return
    try:
        connection = db.beside(primary, params, "replica", conninfo=db.read_dsn(params))
    except (BadInput, psycopg.Error) as error:
        yield _is_reachable(variable, error.found if isinstance(error, BadInput) else str(error).splitlines()[0])
        return
    with connection:
        yield _is_reachable(variable, "")
        own = _is_the_targets_own(primary, params, connection)
        yield own
        if own.figures["standby"]:
            yield _has_pgvector(primary, params, connection)
            yield _is_level(primary, params, connection)
            yield _lets_scans_end(params, connection)
            yield _plans_as_the_primary(primary, params, connection)


def _is_reachable(variable: str, problem: str) -> Gate:
    return gate(
        "replica.is_reachable",
        not problem,
        variable,
        found=problem or "reachable",
        needed="a connection to the replica, with pgvector's library where the extension is installed",
        danger="nothing could be measured, and 70_tune would stop half-way through the migration",
        do="fix the DSN, the replica's pg_hba.conf or its packages, or take search.read_dsn_env out",
    )


def _is_the_targets_own(primary: db.Connection, params: Params, connection: db.Connection) -> Gate:
    """The same system and the same database, in recovery."""
    here, there = (db.one(c, SQL["identity"], params) for c in (primary, connection))
    try:
        systems = [str(db.one(c, SQL["system"], params)["number"]) for c in (primary, connection)]
    except psycopg.errors.InsufficientPrivilege:
        systems = []
    same = systems[0] == systems[1] if systems else None
    same_database = here["oid"] == there["oid"] and here["database"] == there["database"]
    unlike = [
        *([] if there["standby"] else ["no standby: it takes writes"]),
        *(["another system"] if same is False else []),
        *([] if same_database else [f"database {there['database']}, the target's is {here['database']}"]),
    ]
    return gate(
        "replica.is_the_targets_own",
        False if unlike else same,
        str(params.search.read_dsn_env),
        found="; ".join(unlike)
        or (f"a standby of this system at {there['address']}" if same else "this role may not ask for the system"),
        needed="a standby in recovery, of this system and this database",
        danger=DANGER,
        do="point the variable at the replica of this server and this database"
        if unlike
        else "have a superuser run: GRANT EXECUTE ON FUNCTION pg_control_system() TO the role;",
        figures={"standby": there["standby"], "address": there["address"], "same_system": same},
    )


def _has_pgvector(primary: db.Connection, params: Params, connection: db.Connection) -> Gate:
    here, there = (db.one(c, SQL["pgvector"], params) for c in (primary, connection))
    needed = here["installed"] or params.extension.version or here["offered"]
    offered = there["offered"] is not None and (needed is None or versions.at_least(there["offered"], needed))
    loads = here["installed"] is None or there["knows_settings"]
    return gate(
        "replica.has_pgvector",
        offered and loads,
        str(params.search.read_dsn_env),
        found=f"the replica's packages offer {there['offered'] or 'none'}"
        + ("" if loads else ", and the library does not know its settings"),
        needed=f"{needed or 'pgvector'}, as on the primary",
        danger="the extension is replayed there, and every search then fails: could not access file $libdir/vector",
        do="install the same package of pgvector on the replica",
        figures={"offered": there["offered"], "primary": needed},
    )


def _is_level(primary: db.Connection, params: Params, connection: db.Connection) -> Gate:
    written = db.one(primary, SQL["written"], params)["lsn"]
    found = db.one(connection, SQL["replayed"], params, lsn=written)
    behind_s = found["behind_s"] or 0.0
    holds = found["behind_bytes"] <= params.health.replica_lag_mb * MB and not found["paused"]
    behind, most = apart(found["behind_bytes"], params.health.replica_lag_mb * MB, thresholds.size)
    behind_for, longest = apart(behind_s, params.health.replica_lag_s, thresholds.duration)
    return gate(
        "replica.is_level",
        holds and behind_s <= params.health.replica_lag_s,
        str(params.search.read_dsn_env),
        found=f"{behind} behind"
        + (f", by {behind_for}" if behind_s else "")
        + ("; its replay is paused" if found["paused"] else ""),
        needed=f"at most {most} and {longest} (health), replay not paused",
        danger=f"each measuring session would wait for it, and give up after {duration(params.search.read_wait_s)}",
        do="SELECT pg_wal_replay_resume(); on the replica"
        if found["paused"]
        else "wait until it has caught up; see pg_stat_replication on the primary",
        figures={"behind_bytes": found["behind_bytes"], "behind_s": round(behind_s, 3)},
    )


def _lets_scans_end(params: Params, connection: db.Connection) -> Gate:
    """What a long scan meets: feedback holds back the primary's vacuum, a delay holds back the replay."""
    found = db.one(connection, SQL["patience"], params)
    delay = found["delay_ms"]
    shown, shortest = apart(delay / 1000, SHORTEST_DELAY_MS / 1000, thresholds.duration)
    waits = "for ever" if delay < 0 else f"for {shown}"
    return gate(
        "replica.lets_scans_end",
        found["feedback"] or delay < 0 or delay >= SHORTEST_DELAY_MS,
        str(params.search.read_dsn_env),
        found=f"hot_standby_feedback {'on' if found['feedback'] else 'off'}, replay waits {waits} for a scan;"
        f" {found['cancelled']} cancelled so far",
        needed=f"hot_standby_feedback on, or max_standby_streaming_delay from {shortest}",
        danger="exact search reads the whole table, and is cancelled whenever the primary vacuums a row that it sees",
        do="on the replica: ALTER SYSTEM SET hot_standby_feedback = on; SELECT pg_reload_conf();",
        figures=found,
    )


def _plans_as_the_primary(primary: db.Connection, params: Params, connection: db.Connection) -> Gate:
    """Other prices make other plans; other sizes make other latencies, which is what a replica is measured for."""
    here = {row["name"]: row["value"] for row in db.rows(primary, SQL["planner"], params)}
    there = db.rows(connection, SQL["planner"], params)
    differ = [row for row in there if here.get(row["name"]) != row["value"]]
    said = [f"{row['name']} {row['value']} there, {here.get(row['name'], 'unknown')} here" for row in differ]
    prices = [row["name"] for row in differ if row["is_price"]]
    return gate(
        "replica.plans_as_the_primary",
        not prices,
        str(params.search.read_dsn_env),
        found="; ".join(said) or "the same prices, switches and sizes",
        needed="the same prices and switches of the planner; sizes may differ",
        danger="a plan that is proved there is another one here",
        do=f"set {', '.join(prices)} alike on both servers",
        figures={"differ": {row["name"]: row["value"] for row in differ}},
    )
