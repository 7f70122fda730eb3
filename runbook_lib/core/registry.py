"""Every step: its name, what it needs, how its plan is made, and how it is rolled back, or why it cannot be.

A step is one notebook: a phase of the migration, which is numbered; an operation on a table that was migrated; or the
rollback of either. Its name is the path of its notebook; of a phase without the folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

import runbook_lib

NOTEBOOKS_ENV = "RUNBOOK_NOTEBOOKS"


class Kind(StrEnum):
    """What sort of step it is."""

    PHASE = "phase"
    OPERATION = "operation"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class Step:
    """One step.

    does: in a few words; of a rollback, what it removes. needs: of an operation, the last phase that it relies on; a
    phase relies on all before it. plans: the functions of ``runbook_lib`` that its notebook calls for its plan, in
    their order. rolls_back: of a rollback, the phases or the operation. after: of a rollback, a later operation that
    has to be rolled back first. no_rollback: of an operation, why there is none. instead: what to do in its place.
    concurrent: it only reads, or shares its work by claims on rows, so it needs no claim on the target. repeated: a
    schedule repeats it, so its records may be pruned. takes: of a rollback of phases, how long it takes, whatever the
    size of the table. measures: what it proves is measured or made anew each time, so that no plan can look at it.
    one_server: why it is not offered for a table that Citus distributes; empty where it is.
    """

    name: str
    kind: Kind
    does: str
    plans: tuple[str, ...] = ()
    needs: str = ""
    rolls_back: tuple[str, ...] = ()
    after: str = ""
    no_rollback: str = ""
    instead: str = ""
    concurrent: bool = False
    reads_only: bool = False
    repeated: bool = False
    takes: str = ""
    measures: bool = False
    one_server: str = ""


def _phase(name: str, does: str, *plans: str, reads_only: bool = False, measures: bool = False) -> Step:
    return Step(name, Kind.PHASE, does, plans, reads_only=reads_only, measures=measures)


def _rollback(name: str, does: str, *plans: str, of: tuple[str, ...], takes: str = "", after: str = "") -> Step:
    return Step(f"undo/{name}", Kind.ROLLBACK, does, plans, rolls_back=of, takes=takes, after=after)


_STEPS = (
    _phase("00_preflight", "reads, and tries what the phases will do in rolled-back transactions", reads_only=True),
    _phase(
        "10_baseline",
        "measures the legacy search, creates the search function",
        "search.search_function.plan",
        measures=True,
    ),
    _phase("20_extension", "installs or updates pgvector", "migrate.extension.plan"),
    _phase("30_expand_schema", "adds columns, staging table and change capture", "migrate.expand_schema.plan"),
    _phase("40_load_embeddings", "loads the vectors into the staging table", "migrate.load_embeddings.plan"),
    _phase("50_backfill", "moves the vectors into the table in batches", "migrate.backfill.plan"),
    _phase("60_build_index", "builds the vector index concurrently", "migrate.build_index.plan"),
    _phase("70_tune", "finds the cheapest setting that meets the target recall", "migrate.tune.plan", measures=True),
    _phase("80_shadow", "compares the new search with the legacy search", "search.live_shadow.plan", measures=True),
    _phase("90_cut_over", "moves the reads to the new search", "migrate.cut_over.plan"),
    Step(
        "operate/rehearse",
        Kind.OPERATION,
        "carries out the migration on samples of the table, and forecasts what the whole will take",
        ("operate.rehearse.plan",),
        needs="00_preflight",
        no_rollback="it leaves nothing: its samples are dropped when it ends",
        instead="after a kill run operate/rehearse again, which drops them first",
        concurrent=True,
        measures=True,
        one_server="its samples are drawn by pages and kept in tables of this server",
    ),
    Step(
        "operate/refresh",
        Kind.OPERATION,
        "embeds rows that were inserted or changed, by draining the queue that the triggers fill",
        ("operate.refresh.plan",),
        needs="50_backfill",
        no_rollback="each row has the vector of its current text; older vectors are not kept",
        instead="nothing needs to be done; to remove all vectors, `runbook undo PARAMS --execute`",
        concurrent=True,
        repeated=True,
    ),
    Step(
        "operate/monitor",
        Kind.OPERATION,
        "checks whether the search still meets the accepted baseline",
        needs="70_tune",
        no_rollback="it only reads, and records its findings in the ledger",
        instead="nothing needs to be done",
        concurrent=True,
        repeated=True,
    ),
    Step(
        "operate/update_extension",
        Kind.OPERATION,
        "updates pgvector to a newer release without re-embedding",
        ("operate.update_extension.plan",),
        needs="60_build_index",
        no_rollback="pgvector has no script from a newer release to an older one, and the vectors were never touched",
        instead="the administrator installs the package of the older release and restarts the server; from 0.8.0 on"
        " it works with the catalogue of a newer one",
        measures=True,
        one_server="it proves which library is loaded on this server alone",
    ),
    Step(
        "operate/rebuild_index",
        Kind.OPERATION,
        "rebuilds the vector index",
        ("operate.rebuild_index.plan",),
        needs="60_build_index",
        measures=True,
        one_server="it hides and renames indexes, which Citus keeps once for each shard",
    ),
    Step(
        "operate/compare_storage",
        Kind.OPERATION,
        "compares size, build time, recall, latency and relevance of each index format on your own rows",
        ("operate.compare_storage.plan",),
        needs="50_backfill",
        no_rollback="it leaves nothing: its scratch table and its indexes are dropped when it ends",
        instead="after a kill run operate/compare_storage again, which drops what is left",
        measures=True,
        one_server="its copies of the vectors are tables of this server",
    ),
    Step(
        "operate/change_model",
        Kind.OPERATION,
        "lets the search function accept vectors of a new model as well as the old, so that the application's servers"
        " can move one by one",
        ("operate.model_change.plan",),
        needs="80_shadow",
        measures=True,
        one_server="two models would need index settings of their own, and a role has them once",
    ),
    Step(
        "operate/retire_model",
        Kind.OPERATION,
        "removes the old model's column, index, queue and triggers, once no server sends its vectors",
        ("operate.retire_model.plan",),
        needs="80_shadow",
        no_rollback="the old vectors are gone; they can only be made again",
        instead="take the old target through its own phases again, as a target that replaces this one; before the"
        " retirement `change_model --undo` rolls back",
        one_server="it ends a change of the model, which is not offered here",
    ),
    Step(
        "operate/serve_filters",
        Kind.OPERATION,
        "gives slow or low-recall filter values a partial vector index",
        ("operate.serve_filters.plan",),
        needs="70_tune",
        measures=True,
        one_server="each value would need index settings of its own, which do not reach the workers",
    ),
    Step(
        "operate/partition_by_filter",
        Kind.OPERATION,
        "partitions the table online by a filter column, so that a search with that filter reads one partition and"
        " its index",
        ("operate.partition_by_filter.plan",),
        needs="70_tune",
        measures=True,
        one_server="Citus copies the rows of a distributed table by itself",
    ),
    Step(
        "operate/retire_legacy",
        Kind.OPERATION,
        "drops the indexes that only the legacy search uses, once nobody has used it for `retire.unused_days`, and"
        " removes it from the search function",
        ("operate.retire_legacy.plan",),
        needs="90_cut_over",
        one_server="the workers count how often an index is used, and this server does not",
    ),
    _rollback(
        "reads",
        "nothing: reads go back to legacy",
        "operate.reads_to_legacy.undo_plan",
        of=("90_cut_over", "80_shadow"),
        takes="one row, one transaction: milliseconds",
    ),
    _rollback(
        "index",
        "the vector index and the tuned settings",
        "migrate.tune.undo_plan",
        "operate.serve_filters.undo_plan",
        "migrate.build_index.undo_plan",
        of=("70_tune", "60_build_index"),
        takes="seconds, after transactions that were open before it",
    ),
    _rollback(
        "schema",
        "the vectors: columns or side table, staging, queue and triggers",
        "migrate.expand_schema.undo_plan",
        of=("50_backfill", "40_load_embeddings", "30_expand_schema"),
        takes="milliseconds once it has its lock",
    ),
    _rollback(
        "search_function",
        "the search function, which the application must no longer call",
        "search.live_shadow.undo_plan",
        "search.search_function.undo_plan",
        of=("10_baseline",),
        takes="milliseconds",
    ),
    _rollback(
        "extension",
        "pgvector, if this runbook installed it and nothing else uses it",
        "migrate.extension.undo_plan",
        of=("20_extension", "00_preflight"),
        takes="milliseconds",
    ),
    _rollback(
        "rebuild_index",
        "the rebuilt index: the former one serves again, built again where it is gone",
        "operate.rebuild_index.undo_plan",
        of=("operate/rebuild_index",),
        after="operate/partition_by_filter",
    ),
    _rollback(
        "change_model",
        "the new model's share of the search function: the former function answers again",
        "operate.model_change.undo_plan",
        of=("operate/change_model",),
    ),
    _rollback(
        "serve_filters",
        "the partial indexes: each value is searched as before",
        "operate.serve_filters.undo_plan",
        of=("operate/serve_filters",),
        after="operate/partition_by_filter",
    ),
    _rollback(
        "partition_by_filter",
        "the partitioned table: the ordinary one serves again, with every write since",
        "operate.partition_by_filter.undo_plan",
        of=("operate/partition_by_filter",),
    ),
    _rollback(
        "retire_legacy",
        "nothing: every index of the legacy search is built again, then the function has its legacy branch",
        "operate.retire_legacy.undo_plan",
        of=("operate/retire_legacy",),
    ),
)
# What is checked of parameters, files and server before a run of phases is started.
INPUTS = "migrate.inputs.input_problems"
STEPS = {step.name: step for step in _STEPS}
MIGRATE = tuple(s.name for s in _STEPS if s.kind is Kind.PHASE)
OPERATE = tuple(s.name for s in _STEPS if s.kind is Kind.OPERATION)
# The rollbacks of phases, in the order in which they are run; and those of operations.
UNDO = tuple(s.name for s in _STEPS if set(s.rolls_back) & {*MIGRATE})
UNDO_OPERATION = tuple(s.name for s in _STEPS if set(s.rolls_back) & {*OPERATE})
# What operations and rollbacks were called up to release 0.1: in parameters, on the command line, in the ledger.
OLD_NAMES = {
    "00_rehearse": "operate/rehearse",
    "10_refresh": "operate/refresh",
    "20_watch": "operate/monitor",
    "30_update_extension": "operate/update_extension",
    "40_rebuild_index": "operate/rebuild_index",
    "50_compare_storage": "operate/compare_storage",
    "60_change_model": "operate/change_model",
    "65_retire_model": "operate/retire_model",
    "70_serve_filters": "operate/serve_filters",
    "75_partition_by_filter": "operate/partition_by_filter",
    "80_retire_legacy": "operate/retire_legacy",
    "10_reads_to_legacy": "undo/reads",
    "20_remove_index": "undo/index",
    "30_remove_schema": "undo/schema",
    "40_remove_search_function": "undo/search_function",
    "50_remove_extension": "undo/extension",
    "undo_40_rebuild_index": "undo/rebuild_index",
    "undo_60_change_model": "undo/change_model",
    "undo_70_serve_filters": "undo/serve_filters",
    "undo_75_partition_by_filter": "undo/partition_by_filter",
    "undo_80_retire_legacy": "undo/retire_legacy",
}


def current(name: str, folder: str = "") -> str:
    """The name of a step, given as of today, as an earlier release had it, or without its folder; any other name as
    it is. folder: ``operate`` or ``undo``, where the name alone would not say which.
    """
    name = OLD_NAMES.get(name, name)
    guesses = (f"{folder}/{name}",) if folder else (f"operate/{name}", f"undo/{name}")
    return name if name in STEPS else next((g for g in guesses if g in STEPS), name)


def short(name: str) -> str:
    """The name of an operation, or of a rollback, as the command that it belongs to takes it."""
    return name.rpartition("/")[2]


def names_in_the_ledger(name: str) -> list[str]:
    """What the rows of a step may be called: a ledger is append-only, and an earlier release may have begun it."""
    return [name, *(old for old, new in OLD_NAMES.items() if new == name)]


def function(path: str) -> Any:
    """A function of ``runbook_lib`` by its dotted path: the rooms above are not imported here, and of them only what
    is needed.
    """
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"runbook_lib.{module}"), name)


def notebooks() -> Path:
    """The folder of the notebooks: next to the package, or where RUNBOOK_NOTEBOOKS points."""
    elsewhere = os.environ.get(NOTEBOOKS_ENV)
    return Path(elsewhere) if elsewhere else Path(runbook_lib.__file__).parent.parent / "notebooks"


def notebook(name: str) -> str:
    """The path of a step's notebook, below the folder of the notebooks."""
    return f"{name}.ipynb" if "/" in name else f"migrate/{name}.ipynb"


def rollback_of(operation: str) -> str:
    """The rollback of an operation; empty where it has none."""
    return next((name for name in UNDO_OPERATION if operation in STEPS[name].rolls_back), "")


def operation_of(name: str) -> str:
    """The operation that a rollback is the rollback of; every other name as it is."""
    return STEPS[name].rolls_back[0] if name in UNDO_OPERATION else name


def rolled_back_by(name: str) -> tuple[str, ...]:
    """The phases, or the operation, that a rollback rolls back; none where it is no rollback."""
    step = STEPS.get(current(name))
    return step.rolls_back if step else ()


def waits(name: str) -> bool:
    """Does it keep the maintenance window, and may it wait for a sign-off? The rollback of an operation does as the
    operation does; that of the migration never does.
    """
    step = STEPS.get(operation_of(name))
    return step is not None and step.kind is not Kind.ROLLBACK and not (step.concurrent or step.reads_only)


def relied_on(name: str) -> tuple[str, ...]:
    """The phases of the migration that a phase or an operation relies on, in their order; what the rollback of an
    operation relies on ends with the operation.
    """
    if name in UNDO_OPERATION:
        operation = operation_of(name)
        return (*relied_on(operation), operation)
    if name in OPERATE:
        return MIGRATE[: MIGRATE.index(STEPS[name].needs) + 1]
    return MIGRATE[: MIGRATE.index(name)] if name in MIGRATE else ()


def following(name: str) -> str:
    """What comes after a phase or its rollback; an operation stands for itself."""
    order = next((order for order in (MIGRATE, UNDO) if name in order), ())
    if not order:
        return "nothing: an operation is complete in itself"
    here = order.index(name) + 1
    return order[here] if here < len(order) else "nothing: this was the last"
