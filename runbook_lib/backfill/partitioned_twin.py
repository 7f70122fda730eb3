"""A table and its partitioned twin: their names, the twin's partitions and indexes, and the change of names.

Everything is read from the catalogue of the table that serves: what it has, its twin is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import sql

from runbook_lib.backfill.online_copy import Move
from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.names import digits, identifier, literal, shortened, spelled, trigger_name, verbatim
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("partitioning")
CONDITIONS = load("conditions")

PARTS, WHOLE = "_parts", "_whole"


def beside_name(name: str, tail: str) -> str:
    """A name with a tail; where it must be cut, with digits that no other name has."""
    return shortened(name, tail, unlike=name)


def beside(params: Params, tail: str) -> sql.Composable:
    """Qualified name of the twin (PARTS), or of the ordinary table after the swap (WHOLE)."""
    return identifier(params.target.schema_, beside_name(params.target.table, tail))


def spelled_beside(params: Params, tail: str) -> str:
    """The same as SQL spells it."""
    return beside(params, tail).as_string().replace("%%", "%")


def column(params: Params) -> str:
    """The column whose values divide the table; empty where the parameters name none."""
    return params.partitioning.column or ""


@dataclass(frozen=True)
class TwinState:
    """serves: relkind of the table. parts, whole: is the other table kept? begun: are queue and checkpoint there?"""

    serves: str | None
    parts: bool
    whole: bool
    begun: bool

    @property
    def swapped(self) -> bool:
        """Does the partitioned table serve, with the ordinary one beside it?"""
        return self.serves == "p" and self.whole

    @property
    def retired(self) -> bool:
        """Does the partitioned table serve alone?"""
        return self.serves == "p" and not self.whole

    def __str__(self) -> str:
        if self.swapped:
            return "the partitioned table serves, the ordinary one is kept current"
        if self.retired:
            return "the partitioned table serves alone"
        return "the ordinary table serves" + (", the partitioned one is being filled" if self.parts else "")


def standing(connection: db.Connection, params: Params) -> TwinState:
    """How far the move has come, by the catalogue."""
    row = db.one(
        connection,
        SQL["standing"],
        params,
        table=spelled(params, "table"),
        parts=spelled_beside(params, PARTS),
        whole=spelled_beside(params, WHOLE),
        move=spelled(params, "move"),
    )
    return TwinState(**row)


def catalogue(connection: db.Connection, params: Params, block: str, **values: Any) -> list[db.Row]:
    """What the catalogue says about the table that serves."""
    return db.rows(connection, SQL[block], params, table=spelled(params, "table"), **values)


def move(connection: db.Connection, params: Params) -> Move:
    """From the table that serves to the one beside it."""
    columns = [row["name"] for row in catalogue(connection, params, "columns")]
    key = db.one(
        connection,
        CONDITIONS["column_types"],
        params,
        table=spelled(params, "table"),
        columns=list(params.target.key_columns),
    )

    def listed(alias: str = "") -> sql.Composable:
        return sql.SQL(", ").join(identifier(*([alias] if alias else []), c) for c in columns)

    other = beside(params, WHOLE if standing(connection, params).serves == "p" else PARTS)
    extra = {"beside": other, "columns": listed("t"), "columns_beside": listed("b"), "written": listed()}
    return Move(params, extra | {"key_type": verbatim(key["type"])})


@dataclass(frozen=True)
class Leaf:
    """A partition: its name, what it holds for a person to read, the share of the rows, and its statement."""

    name: str
    holds: str
    share: float | None
    statement: sql.Composable


def leaves(connection: db.Connection, params: Params, shares: Mapping[str, float]) -> list[Leaf]:
    """The partitions that will be made. shares: of the rows, by value of the column; not asked for by hash."""
    settings = params.partitioning
    options = [row["option"].partition("=") for row in catalogue(connection, params, "options")]
    pairs = sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.SQL(name), sql.Literal(v)) for name, _, v in options)
    common = {
        "parts": beside(params, PARTS),
        "options": sql.SQL("WITH ({})").format(pairs) if options else sql.SQL(""),
    }

    def leaf(block: str, tail: str, holds: str, share: float | None, **own: sql.Composable) -> Leaf:
        name = beside_name(params.target.table, tail)
        made = SQL[block].compose(common | own | {"leaf": identifier(params.target.schema_, name)})
        return Leaf(name, holds, share, made)

    if settings.method == "hash":
        n = settings.hash_partitions
        return [
            leaf(
                "partition_by_hash",
                f"_p{i}",
                f"{i + 1} of {n} by hash",
                1 / n,
                modulus=sql.Literal(n),
                remainder=sql.Literal(i),
            )
            for i in range(n)
        ]
    common_first = sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))[: settings.most_partitions]
    own = [(v, share) for v, share in common_first if share >= settings.smallest_share]
    made = [
        leaf(
            "partition_of_value",
            f"_p_{digits(v)}",
            v,
            share,
            value=literal(v),
        )
        for v, share in own
    ]
    rest = max(0.0, 1 - sum(share for _, share in own))
    return [*made, leaf("partition_of_rest", "_p_rest", "every other value", rest)]


def expected(connection: db.Connection, params: Params, shares: Mapping[str, float]) -> Table:
    """The partitions that will be made, or that there are, with their rows."""
    if standing(connection, params).serves == "p":
        return Table.of(catalogue(connection, params, "partitioned_by", relation=spelled(params, "table")))
    rows = [
        (f.name, f.holds, None if f.share is None else f"{f.share:.1%}") for f in leaves(connection, params, shares)
    ]
    return Table(("partition", "holds", "rows"), rows, "the disk must hold the table twice, with its indexes")


def create_table(connection: db.Connection, params: Params, shares: Mapping[str, float]) -> db.Statement:
    """The twin, empty, with its partitions, its key and the owner of the table."""
    made = leaves(connection, params, shares)
    key = catalogue(connection, params, "key", column=column(params))[0]
    owned = [identifier(params.target.schema_, f.name) for f in made] + [beside(params, PARTS)]
    owners = [
        SQL["set_owner"].compose({"relation": relation, "owner": identifier(key["owner"])})
        for relation in owned
        if key["owner"] != key["role"]
    ]
    return db.statement(
        SQL["create_table"],
        params,
        {
            "parts": beside(params, PARTS),
            "method": sql.SQL(params.partitioning.method),
            "column": identifier(column(params)),
            "partitions": sql.SQL(";\n").join([*(f.statement for f in made), *owners]),
            "parts_key": identifier(beside_name(key["key_name"] or "key", PARTS)),
        },
    )


def indexes(connection: db.Connection, params: Params, relation: str) -> dict[str, db.Row]:
    """The indexes of a relation by name."""
    return {row["name"]: row for row in db.rows(connection, SQL["indexes"], params, relation=relation)}


def missing_indexes(connection: db.Connection, params: Params) -> list[db.Statement]:
    """CREATE INDEX for each index that the partitioned table lacks; vector indexes last, since they take longest."""
    there = indexes(connection, params, spelled_beside(params, PARTS))
    return [
        db.statement(
            SQL["create_index"],
            params,
            {
                "beside_index": identifier(beside_name(name, PARTS)),
                "parts": beside(params, PARTS),
                "tail": verbatim(row["tail"]),
            },
        )
        for name, row in indexes(connection, params, spelled(params, "table")).items()
        if not row["is_key"] and beside_name(name, PARTS) not in there
    ]


def _renames(params: Params, names: Sequence[str], was: str, becomes: str) -> sql.Composable:
    """ALTER INDEX for each name, with a tail or without; a space where there is none."""

    def with_tail(name: str, tail: str) -> str:
        return beside_name(name, tail) if tail else name

    schema = params.target.schema_
    return sql.SQL(";\n").join(
        SQL["rename_index"].compose(
            {
                "index_was": identifier(schema, with_tail(name, was)),
                "index_becomes": identifier(with_tail(name, becomes)),
            }
        )
        for name in names
    )


def swap_statement(connection: db.Connection, params: Params) -> db.Statement:
    """The swap, or the swap back where the partitioned table serves."""
    found = standing(connection, params)
    back = found.serves == "p"
    leaves_with, comes_with = (PARTS, WHOLE) if back else (WHOLE, PARTS)
    there = indexes(connection, params, spelled_beside(params, comes_with))
    names = [
        n
        for n in indexes(connection, params, spelled(params, "table"))
        if not there or beside_name(n, comes_with) in there
    ]
    texts = [row["statement"] for row in catalogue(connection, params, "owned_sequences")]
    own = [trigger_name(params, event) for event in ("move", "move_truncate")]
    if back:
        kept = {"beside": spelled_beside(params, comes_with), "own_triggers": own}
        texts += [row["statement"] for row in catalogue(connection, params, "fire_always", **kept)]
    else:
        texts += [row["statement"] for row in catalogue(connection, params, "definitions", own_triggers=own)]
    stands = found.whole if back else found.parts
    goes_on = catalogue(connection, params, "identities", beside=spelled_beside(params, comes_with)) if stands else []
    return db.statement(
        SQL["swap_back" if back else "swap"],
        params,
        {
            "parts": beside(params, PARTS),
            "whole": beside(params, WHOLE),
            "parts_name": identifier(beside_name(params.target.table, PARTS)),
            "whole_name": identifier(beside_name(params.target.table, WHOLE)),
            "table_name": identifier(params.target.table),
            "indexes_away": _renames(params, names, "", leaves_with),
            "indexes_here": _renames(params, names, comes_with, ""),
            "identities": sql.SQL(";\n").join(verbatim(row["statement"]) for row in goes_on),
            "definitions": sql.SQL(";\n").join(map(verbatim, texts)),
        },
    )
