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
    "10_reads_to_legacy": ("90_cut_over", "80_shadow"),
    "20_remove_index": ("70_tune", "60_build_index"),
    "30_remove_schema": ("50_backfill", "40_load_embeddings", "30_expand_schema"),
    "40_remove_search_function": ("10_baseline",),
    "50_remove_extension": ("20_extension", "00_preflight"),
}
# What comes after, and the phase that each relies on.
OPERATE = {
    "00_rehearse": "00_preflight",
    "10_refresh": "50_backfill",
    "20_watch": "70_tune",
    "30_update_extension": "60_build_index",
    "40_rebuild_index": "60_build_index",
    "50_compare_storage": "50_backfill",
    "60_change_model": "80_shadow",
    "65_retire_model": "80_shadow",
    "70_serve_filters": "70_tune",
    "75_partition_by_filter": "70_tune",
    "80_retire_legacy": "90_cut_over",
}
# The notebook that takes an operation back, and the operation.
UNDO_OPERATION = {
    f"undo_{name}": name
    for name in (
        "40_rebuild_index",
        "60_change_model",
        "70_serve_filters",
        "75_partition_by_filter",
        "80_retire_legacy",
    )
}
# An operation, and the later one that is taken back before it.
STANDS_ON = {
    "40_rebuild_index": "75_partition_by_filter",
    "70_serve_filters": "75_partition_by_filter",
}
# Share their work by claims on rows, or only read: they may run beside themselves and beside a run of the migration.
RUNS_BESIDE = frozenset({"00_rehearse", "10_refresh", "20_watch"})
# Reads only, so it needs neither a sign-off nor the maintenance window.
READS_ONLY = MIGRATE[0]


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
