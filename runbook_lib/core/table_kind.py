"""What differs by the kind of table: one of this server, or one whose rows Citus has distributed over several.

Two values of one dataclass answer it, so that callers need not ask which of them it is. Run on Citus 14.0.1 with
PostgreSQL 18.6 and pgvector 0.8.6 (tests/drills/test_citus.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from psycopg import sql

from runbook_lib.core.names import HASH_BYTES, changing, identifier, key_of, literal, names, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.sql import Block, load

# Relations whose names functions of Citus take as text.
NAMED = ("table", "staging", "rejected", "queue", "route", "strategy")


@dataclass(frozen=True)
class TableKind:
    """One kind of table.

    name: who distributes it; empty for a table of this server. has_pages_here: do its rows, and the counts of its
    scans, lie on this server? takes_trials: can its statements be tried in one transaction that is rolled back?
    keeps_generic_plans: may a prepared search turn to a plan for any values? session: settings of every session,
    whether the server shows them in pg_settings or not. settings_stay: do settings of a session, or of a function,
    reach where the rows are searched? Otherwise only those of a transaction do, and those that ALTER ROLE gives.
    of_a_change: settings of a transaction that changes what there is; of_a_batch: of one of the backfill's.
    rows_a_key_range: of the backfill, at most; fewest_rows_a_key_range: at least.
    fewest_rows_a_batch: however long such a batch takes. blocks: in place of those of the same names.
    """

    name: str = ""
    has_pages_here: bool = True
    takes_trials: bool = True
    keeps_generic_plans: bool = True
    session: Mapping[str, str] = field(default_factory=dict)
    settings_stay: bool = True
    of_a_change: Mapping[str, str] = field(default_factory=dict)
    of_a_batch: Mapping[str, str] = field(default_factory=dict)
    rows_a_key_range: int = 10_000
    fewest_rows_a_key_range: int = 10_000
    fewest_rows_a_batch: int = 10
    blocks: Mapping[str, Block] = field(default_factory=dict)

    def block(self, given: Block) -> Block:
        """The block that does the same on this kind of table. What it is called, in plans and records, stays."""
        return replace(found, name=given.name) if (found := self.blocks.get(given.name)) else given

    def names(
        self, params: Params, given: Block, extra: Mapping[str, sql.Composable] | None = None
    ) -> dict[str, sql.Composable]:
        """What only the blocks of this kind name: ``{own}``, the block that they take the place of, and literals."""
        if given.name not in self.blocks:
            return {}
        known = names(params) | changing(params) | dict(extra or {})
        shown = {f"{name}_name": literal(spelled(params, name)) for name in NAMED}
        return {**shown, "own": given.compose(known), "hash_bytes": sql.Literal(HASH_BYTES), **_of_the_key(params)}


def _of_the_key(params: Params) -> dict[str, sql.Composable]:
    """The first column of the key is the one by which a table is distributed. A batch of keys of several columns says
    its values by themselves; those of one column say it anyway.
    """
    key, function = key_of(params), identifier(params.ledger.schema_, f"{params.target.name}_key_part")
    blocks, own = load("citus"), {"key_part_function": function}

    def in_one_shard(column: sql.Composable) -> sql.Composable:
        parts = own | {"column": column, "type": verbatim(params.target.key_types[0])}
        return key.if_several(sql.SQL("{} ").format(blocks["of_one_shard"].compose(parts)))

    return {
        "own_distributed": key.own[0],
        "own_distribution_column": sql.Literal(key.own[0].as_string()),
        "make_key_part": key.if_several(sql.SQL("{};\n").format(blocks["make_key_part"].compose(own))),
        "drop_key_part": key.if_several(blocks["drop_key_part"].compose(own)),
        "staged_in_one_shard": in_one_shard(sql.SQL("s.{}").format(key.own[0])),
        "row_in_one_shard": in_one_shard(sql.SQL("t.{}").format(key.columns[0])),
    }


ORDINARY = TableKind()
CITUS = TableKind(
    name="Citus",
    has_pages_here=False,
    takes_trials=False,
    # It plans a query of many shards for the values of each call.
    keeps_generic_plans=False,
    session={
        # A capture trigger is made, and dropped, only where this is on; it fires whatever it is. The trigger writes
        # to the shard of the queue on the row's own node, so none of the dangers that Citus names is there.
        "citus.enable_unsafe_triggers": "on",
        # SET LOCAL reaches the workers; neither SET nor set_config nor a function's SET does.
        "citus.propagate_set_commands": "local",
    },
    settings_stay=False,
    # One connection a node: a function or a reference table cannot be changed after shards were changed in parallel.
    of_a_change={"citus.multi_shard_modify_mode": "sequential"},
    # Waiting for the disk at each commit would take half of the time. What a crash of a node takes away is missing in
    # the table, so that a rerun finds it; on one server the session has this setting.
    of_a_batch={"synchronous_commit": "off"},
    # A range is divided by shards once more: of 32 shards each has a batch or two of it.
    rows_a_key_range=100_000,
    fewest_rows_a_key_range=40_000,
    # A batch has a price of its own, of messages between nodes, which fewer rows do not lower.
    fewest_rows_a_batch=200,
    # By "module.name"; the others are asked for by their own.
    blocks={name: block for name, block in load("citus").items() if "." in name},
)


def of(params: Params) -> TableKind:
    """That of the target, as the parameters say; preflight has compared it with the catalogue."""
    return CITUS if params.target.distributed else ORDINARY
