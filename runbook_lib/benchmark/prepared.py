"""A statement as the application prepares it, and the plan that the server makes for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

from psycopg import sql

from runbook_lib.core import db, session, table_kind, versions
from runbook_lib.core.names import index_name, spelled
from runbook_lib.core.query_plan import QueryPlan, explain
from runbook_lib.indexes import partitions
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("explain")

# A prepared statement may turn to a generic plan after its fifth execution; PostgreSQL manual, PREPARE.
EXECUTIONS_TO_A_GENERIC_PLAN = 6
# Calls that prove how a statement is planned: so many with a custom plan, and as many with a generic one.
CALLS = 2 * EXECUTIONS_TO_A_GENERIC_PLAN
# Settings that decide how a search is planned and carried out, by the beginning of their names.
OF_PLANS = ("enable_", "hnsw.", "ivfflat.")
PARAMETER = re.compile(r"\$(\d+)\b")
_probes = count(1)


def fresh_name() -> sql.Identifier:
    """A name that no other prepared statement of this session has: PREPARE outlives a rollback."""
    return sql.Identifier(f"runbook_probe_{next(_probes)}")


def call_prepared(
    connection: db.Connection, types: Sequence[str], statement: sql.Composable, values: Sequence[object]
) -> None:
    """:data:`CALLS` executions of one prepared statement, as a driver makes them: half with a custom plan.

    statement: with $1, $2, …, one of ``types`` each. Sets plan_cache_mode for the caller's transaction.
    """
    name = fresh_name()
    declared = sql.SQL(", ").join(map(sql.SQL, types))
    connection.execute(sql.SQL("PREPARE {} ({}) AS {}").format(name, declared, statement))
    execute = sql.SQL("EXECUTE {} ({})").format(name, sql.SQL(", ").join(map(sql.Literal, values)))
    # On PostgreSQL 13 a forced generic plan reaches the EXECUTE of a function, where none ever arises by itself.
    reaches_in = not versions.spares_execute_of_generic_plans(connection.info.server_version)
    for kind in ("force_custom_plan", "auto" if reaches_in else "force_generic_plan"):
        use(connection, {"plan_cache_mode": kind})
        for _ in range(EXECUTIONS_TO_A_GENERIC_PLAN):
            connection.execute(execute)


def scans(connection: db.Connection, params: Params, oids: Sequence[int]) -> int:
    """Scans of these indexes that this transaction has begun, by the server's own count."""
    return int(db.one(connection, SQL["scans"], params, oids=list(oids))["scans"])


def use_setting(connection: db.Connection, name: str, value: str, *, local: bool) -> str:
    """Gives a setting a value, for this transaction (``local``) or this session; returns it as the server writes it.

    Raises psycopg.Error where the server refuses it.
    """
    row = connection.execute(SQL["set"].compose({}), {"name": name, "value": value, "local": local}).fetchone()
    return str(row["value"]) if row else value


def use(connection: db.Connection, settings: Mapping[str, str], *, local: bool = True) -> None:
    """The same for several settings; those of plans, for one transaction, by the command that reaches the workers of
    Citus too.
    """
    for name, value in settings.items():
        if local and name.startswith(OF_PLANS):
            db.set_local(connection, {name: value})
        else:
            use_setting(connection, name, value, local=local)


@contextmanager
def settled(connection: db.Connection, params: Params, settings: Mapping[str, str]) -> Iterator[None]:
    """With these settings wherever the rows are searched. On a distributed table it is one transaction."""
    stay = table_kind.of(params).settings_stay
    with nullcontext() if stay else connection.transaction():
        use(connection, settings, local=not stay)
        yield


@dataclass(frozen=True)
class Sent:
    """A statement as the application sends it.

    text: with $1, $2, …. names: what they stand for, as the parameters call them. values: one for each. types: of
    the search function's query; of the application's own the server infers them.
    """

    subject: str
    text: str
    names: tuple[str, ...]
    values: tuple[Any, ...]
    types: tuple[str, ...] = ()

    @property
    def is_the_applications(self) -> bool:
        """Is it the application's own, whose names resolve on its search path? The function's are all qualified."""
        return not self.types

    def with_text(self, text: str) -> Sent:
        """Another text with the same values; those that it no longer mentions are left out, the rest renumbered."""
        used = sorted({int(n) - 1 for n in PARAMETER.findall(text)})

        def pick(given: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(given[i] for i in used) if given else ()

        renumbered = PARAMETER.sub(lambda m: f"${used.index(int(m[1]) - 1) + 1}", text)
        return Sent(self.subject, renumbered, pick(self.names), pick(self.values), pick(self.types))


def plan_of(
    connection: db.Connection, sent: Sent, kind: str = "custom", settings: Mapping[str, str] | None = None
) -> QueryPlan:
    """The plan of a prepared statement, ``custom``, ``generic``, or ``auto``, which the server chooses: after six
    executions, or under other settings.

    settings: last for this look only; with them the statement is planned and not carried out. Raises psycopg.Error
    where the server refuses it.
    """
    name = fresh_name()
    declared = sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.SQL, sent.types))) if sent.types else sql.SQL("")
    path = session.users_path(connection) if sent.is_the_applications else nullcontext()
    with connection.transaction(force_rollback=True), path:
        mode = "auto" if kind == "auto" else f"force_{kind}_plan"
        use(connection, {**(settings or {}), "plan_cache_mode": mode})
        connection.execute(sql.SQL("PREPARE {}{} AS {}").format(name, declared, sql.SQL(sent.text)))
        execute = sql.SQL("EXECUTE {}").format(name)
        if sent.values:
            execute += sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Literal, sent.values)))
        for _ in range(EXECUTIONS_TO_A_GENERIC_PLAN if settings is None else 0):
            connection.execute(execute)
        return explain(connection, execute)


def reads_index(connection: db.Connection, params: Params, plan: QueryPlan) -> bool:
    """Does this plan read the runbook's index, or that of a partition which is part of it?"""
    found = partitions.with_their_parents(connection, params, plan.indexes)
    return any(index_name(params) in name for name in found)


def vector_indexes(connection: db.Connection, params: Params) -> list[db.Row]:
    """The vector indexes that a search could use, as the catalogue has them."""
    values = {"table": spelled(params, "vectors"), "column": params.vector.column}
    return db.rows(connection, SQL["vector_indexes"], params, **values)
