"""The phases in their order, and the ways back: names that every other module agrees on."""

from __future__ import annotations

MIGRATE = (
    "00_preflight",
    "10_baseline",
    "20_extension",
    "30_expand_schema",
    "40_load_embeddings",
    "50_backfill",
    "60_build_index",
    "70_tune",
    "80_shadow",
    "90_cut_over",
)
# Each way back, and the phases that it takes back.
UNDO = {
    "undo/reads": ("90_cut_over", "80_shadow"),
    "undo/index": ("70_tune", "60_build_index"),
    "undo/schema": ("50_backfill", "40_load_embeddings", "30_expand_schema"),
    "undo/search_function": ("10_baseline",),
    "undo/extension": ("20_extension", "00_preflight"),
}
# What comes after, and the phase that each relies on.
OPERATE = {
    "operate/rehearse": "00_preflight",
    "operate/refresh": "50_backfill",
    "operate/monitor": "70_tune",
    "operate/update_extension": "60_build_index",
    "operate/rebuild_index": "60_build_index",
    "operate/compare_storage": "50_backfill",
    "operate/change_model": "80_shadow",
    "operate/retire_model": "80_shadow",
    "operate/serve_filters": "70_tune",
    "operate/partition_by_filter": "70_tune",
    "operate/retire_legacy": "90_cut_over",
}
# The notebook that takes an operation back, and the operation.
UNDO_OPERATION = {
    name.replace("operate/", "undo/"): name
    for name in (
        "operate/rebuild_index",
        "operate/change_model",
        "operate/serve_filters",
        "operate/partition_by_filter",
        "operate/retire_legacy",
    )
}
# An operation, and the later one that is taken back before it.
STANDS_ON = {
    "operate/rebuild_index": "operate/partition_by_filter",
    "operate/serve_filters": "operate/partition_by_filter",
}
# Share their work by claims on rows, or only read: they may run beside themselves and beside a run of the migration.
RUNS_BESIDE = frozenset({"operate/rehearse", "operate/refresh", "operate/monitor"})
# Reads only, so it needs neither a sign-off nor the maintenance window.
READS_ONLY = MIGRATE[0]
STEPS = (*MIGRATE, *OPERATE, *UNDO, *UNDO_OPERATION)
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


def notebook(name: str) -> str:
    """The path of a step's notebook, below the folder of the notebooks."""
    return f"{name}.ipynb" if "/" in name else f"migrate/{name}.ipynb"


def waits(name: str) -> bool:
    """Does it keep the maintenance window, and may it wait for a sign-off? The way back of an operation does as the
    operation does; that of the migration never does.
    """
    return operation_of(name) in (*MIGRATE, *OPERATE) and name not in {READS_ONLY, *RUNS_BESIDE}


def operation_of(name: str) -> str:
    """The operation that a way back takes back; every other name as it is."""
    return UNDO_OPERATION.get(name, name)


def taken_back(name: str) -> tuple[str, ...]:
    """The phases, or the operation, that a way back takes back; none where it is no way back."""
    name = current(name)
    return (UNDO_OPERATION[name],) if name in UNDO_OPERATION else UNDO.get(name, ())


def relied_on(name: str) -> tuple[str, ...]:
    """The phases of the migration that a phase or an operation rests on, in their order; what an operation's way back
    rests on ends with the operation.
    """
    if name in UNDO_OPERATION:
        return (*relied_on(UNDO_OPERATION[name]), UNDO_OPERATION[name])
    if name in OPERATE:
        return MIGRATE[: MIGRATE.index(OPERATE[name]) + 1]
    return MIGRATE[: MIGRATE.index(name)]
