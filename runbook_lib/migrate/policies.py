"""Row level security of the table: refused where it would not hold for the vectors, or would keep rows from the
runbook itself. And after a swap for partitions, the privileges and policies of both tables, which must be the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from runbook_lib.backfill import partitioned_twin, vector_store
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("policies")


def security(connection: db.Connection, params: Params) -> db.Row:
    """Whether the table or a partition of it has row level security, and whether it keeps rows from this role."""
    schema, table = spelled(params, "schema"), params.target.table
    return db.one(connection, SQL["security"], params, schema=schema, table=table)


def check(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """A gate for each fault: policies that keep rows from this role, or do not hold for vectors in a table of their
    own, and a kept table that is more open or more closed. None where nothing is wrong.
    """
    table, found = spelled(params, "table"), security(connection, params)
    if found["for_us"]:
        yield gate(
            "inputs.sees_every_row",
            False,
            table,
            found=f"row security is {'forced on the owner too' if found['is_forced'] else 'on'}, and {found['role']}"
            " does not bypass it",
            needed="a role that sees every row",
            danger="rows that this role does not see would get no vector, and no count would miss them",
            do=f"have a superuser run: ALTER ROLE {found['role']} BYPASSRLS;",
        )
    yield from kept_table_is_as_open(connection, params)
    if found["is_on"] and vector_store.of(params).table(params):
        yield gate(
            "inputs.policies_hold_for_vectors",
            False,
            spelled(params, "vectors"),
            found=f"{table} has row level security, and vector.layout is {params.vector.layout}",
            needed="vectors in the table itself, where its policies hold for them",
            danger="whoever may read the table would read the keys and vectors of every row in the side table,"
            " whatever the policies say",
            do="set vector.layout: column; if the vectors are in a side table already, undo/schema first",
        )


def kept_table_is_as_open(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """After a swap by operate/partition_by_filter: whoever lost rights on the table must not read the one kept
    beside it, nor have them back with the rollback. No gate where both are alike, or there is none."""
    table, whole = params.target.table, partitioned_twin.beside_name(params.target.table, partitioned_twin.WHOLE)
    found = db.rows(
        connection,
        SQL["not_in_both"],
        params,
        schema=spelled(params, "schema"),
        ledger=spelled(params, "ledger"),
        table=table,
        whole=whole,
        move=f"{params.target.name}_move",
    )
    if found:
        yield gate(
            "partitioning.kept_table_is_as_open",
            False,
            partitioned_twin.spelled_beside(params, partitioned_twin.WHOLE),
            found="; ".join(f"{row['relation']} alone: {row['line']}" for row in found),
            needed=f"the privileges and policies of {spelled(params, 'table')}",
            danger="rows can be read past what was changed on the table since the swap, and a rollback undoes it",
            do=f"make the same change on {partitioned_twin.spelled_beside(params, partitioned_twin.WHOLE)}",
        )
