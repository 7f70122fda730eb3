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
from runbook_lib.core.names import digits, identifier, shortened, spelled, trigger_name, verbatim
from runbook_lib.core.phase import Phase
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


def column(phase: Phase) -> str:
    """The column whose values divide the table; empty where the parameters name none."""
    return phase.params.partitioning.column or ""


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


def standing(phase: Phase) -> TwinState:
    """How far the move has come, by the catalogue."""
    p = phase.params
    row = db.one(
        phase.connection,
        SQL["standing"],
        p,
        table=spelled(p, "table"),
        parts=spelled_beside(p, PARTS),
        whole=spelled_beside(p, WHOLE),
        move=spelled(p, "move"),
    )
    return TwinState(**row)


def catalogue(phase: Phase, block: str, **values: Any) -> list[db.Row]:
    """What the catalogue says about the table that serves."""
    return db.rows(phase.connection, SQL[block], phase.params, table=spelled(phase.params, "table"), **values)


def move(phase: Phase) -> Move:
    """From the table that serves to the one beside it."""
    p = phase.params
    columns = [row["name"] for row in catalogue(phase, "columns")]
    key = db.one(phase.connection, CONDITIONS["column_types"], p, table=spelled(p, "table"), columns=[p.target.key])

    def listed(alias: str = "") -> sql.Composable:
        return sql.SQL(", ").join(identifier(*([alias] if alias else []), c) for c in columns)

    other = beside(p, WHOLE if standing(phase).serves == "p" else PARTS)
    extra = {"beside": other, "columns": listed("t"), "columns_beside": listed("b"), "written": listed()}
    return Move(phase, extra | {"key_type": verbatim(key["type"])})


@dataclass(frozen=True)
class Leaf:
    """A partition: its name, what it holds for a person to read, the share of the rows, and its statement."""

    name: str
    holds: str
    share: float | None
    statement: sql.Composable


def leaves(phase: Phase, shares: Mapping[str, float]) -> list[Leaf]:
    """The partitions that will be made. shares: of the rows, by value of the column; not asked for by hash."""
    p, settings = phase.params, phase.params.partitioning
    options = [row["option"].partition("=") for row in catalogue(phase, "options")]
    pairs = sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.SQL(name), sql.Literal(v)) for name, _, v in options)
    common = {
        "parts": beside(p, PARTS),
        "options": sql.SQL("WITH ({})").format(pairs) if options else sql.SQL(""),
    }

    def leaf(block: str, tail: str, holds: str, share: float | None, **own: sql.Composable) -> Leaf:
        name = beside_name(p.target.table, tail)
        made = SQL[block].compose(common | own | {"leaf": identifier(p.target.schema_, name)})
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
            value=verbatim(sql.Literal(v).as_string()),
        )
        for v, share in own
    ]
    rest = max(0.0, 1 - sum(share for _, share in own))
    return [*made, leaf("partition_of_rest", "_p_rest", "every other value", rest)]


def expected(phase: Phase, shares: Mapping[str, float]) -> Table:
    """The partitions that will be made, or that there are, with their rows."""
    if standing(phase).serves == "p":
        return Table.of(catalogue(phase, "partitioned_by", relation=spelled(phase.params, "table")))
    rows = [(f.name, f.holds, None if f.share is None else f"{f.share:.1%}") for f in leaves(phase, shares)]
    return Table(("partition", "holds", "rows"), rows, "the disk must hold the table twice, with its indexes")


def create_table(phase: Phase, shares: Mapping[str, float]) -> db.Statement:
    """The twin, empty, with its partitions, its key and the owner of the table."""
    p, made = phase.params, leaves(phase, shares)
    key = catalogue(phase, "key", column=column(phase))[0]
    owned = [identifier(p.target.schema_, f.name) for f in made] + [beside(p, PARTS)]
    owners = [
        SQL["set_owner"].compose({"relation": relation, "owner": identifier(key["owner"])})
        for relation in owned
        if key["owner"] != key["role"]
    ]
    return db.statement(
        SQL["create_table"],
        p,
        {
            "parts": beside(p, PARTS),
            "method": sql.SQL(p.partitioning.method),
            "column": identifier(column(phase)),
            "partitions": sql.SQL(";\n").join([*(f.statement for f in made), *owners]),
            "parts_key": identifier(beside_name(key["key_name"] or "key", PARTS)),
        },
    )


def indexes(phase: Phase, relation: str) -> dict[str, db.Row]:
    """The indexes of a relation by name."""
    return {row["name"]: row for row in db.rows(phase.connection, SQL["indexes"], phase.params, relation=relation)}


def missing_indexes(phase: Phase) -> list[db.Statement]:
    """CREATE INDEX for each index that the partitioned table lacks; vector indexes last, since they take longest."""
    p = phase.params
    there = indexes(phase, spelled_beside(p, PARTS))
    return [
        db.statement(
            SQL["create_index"],
            p,
            {
                "beside_index": identifier(beside_name(name, PARTS)),
                "parts": beside(p, PARTS),
                "tail": verbatim(row["tail"]),
            },
        )
        for name, row in indexes(phase, spelled(p, "table")).items()
        if not row["is_key"] and beside_name(name, PARTS) not in there
    ]


def _renames(phase: Phase, names: Sequence[str], was: str, becomes: str) -> sql.Composable:
    """ALTER INDEX for each name, with a tail or without; a space where there is none."""

    def with_tail(name: str, tail: str) -> str:
        return beside_name(name, tail) if tail else name

    schema = phase.params.target.schema_
    return sql.SQL(";\n").join(
        SQL["rename_index"].compose(
            {
                "index_was": identifier(schema, with_tail(name, was)),
                "index_becomes": identifier(with_tail(name, becomes)),
            }
        )
        for name in names
    )


def swap_statement(phase: Phase) -> db.Statement:
    """The swap, or the swap back where the partitioned table serves."""
    p, found = phase.params, standing(phase)
    back = found.serves == "p"
    leaves_with, comes_with = (PARTS, WHOLE) if back else (WHOLE, PARTS)
    there = indexes(phase, spelled_beside(p, comes_with))
    names = [n for n in indexes(phase, spelled(p, "table")) if not there or beside_name(n, comes_with) in there]
    texts = [row["statement"] for row in catalogue(phase, "owned_sequences")]
    own = [trigger_name(p, event) for event in ("move", "move_truncate")]
    if back:
        kept = {"beside": spelled_beside(p, comes_with), "own_triggers": own}
        texts += [row["statement"] for row in catalogue(phase, "fire_always", **kept)]
    else:
        texts += [row["statement"] for row in catalogue(phase, "definitions", own_triggers=own)]
    stands = found.whole if back else found.parts
    goes_on = catalogue(phase, "identities", beside=spelled_beside(p, comes_with)) if stands else []
    return db.statement(
        SQL["swap_back" if back else "swap"],
        p,
        {
            "parts": beside(p, PARTS),
            "whole": beside(p, WHOLE),
            "parts_name": identifier(beside_name(p.target.table, PARTS)),
            "whole_name": identifier(beside_name(p.target.table, WHOLE)),
            "table_name": identifier(p.target.table),
            "indexes_away": _renames(phase, names, "", leaves_with),
            "indexes_here": _renames(phase, names, comes_with, ""),
            "identities": sql.SQL(";\n").join(verbatim(row["statement"]) for row in goes_on),
            "definitions": sql.SQL(";\n").join(map(verbatim, texts)),
        },
    )
