"""What the whole table will take by its samples, beside the forecast by formula, and what the figures do not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runbook_lib.backfill import vector_store
from runbook_lib.core.display import Table, duration, number, share, size
from runbook_lib.core.phase import Phase
from runbook_lib.indexes.forecast import Forecast
from runbook_lib.migrate import preflight
from runbook_lib.migrate.preflight import Facts
from runbook_lib.operate import extrapolate
from runbook_lib.operate.extrapolate import Range
from runbook_lib.operate.sample import Sample
from runbook_lib.params import Params

# Figure of the ledger's row: how it is called, and how it reads.
FIGURES = {
    "staging_bytes": ("staging table", size),
    "table_growth_bytes": ("growth of the table until the next vacuum", size),
    "index_bytes": ("index", size),
    "build_memory_bytes": ("memory that its build wants", size),
    "wal_bytes": ("WAL", size),
    "load_seconds": ("loading into staging, without the model", duration),
    "backfill_seconds": ("backfill", duration),
    "build_seconds": ("build of the index", duration),
}


def figures(params: Params, facts: Facts, expects: Forecast, found: Sequence[Sample]) -> dict[str, Range]:
    """What the whole table will take by these samples."""
    rows, largest = facts.rows, found[-1]
    vectors = round(rows * largest.vectors / largest.rows)
    out = {
        name: extrapolate.linear([(s.rows, getattr(s, name)) for s in found], rows)
        for name in ("staging_bytes", "table_growth_bytes", "index_bytes", "load_seconds", "backfill_seconds")
    }
    wal = [(s.rows, s.load_wal_bytes + s.backfill_wal_bytes + s.build_wal_bytes) for s in found]
    out["wal_bytes"] = extrapolate.linear(wal, rows).plus(0, _full_images(params, facts, largest))
    at_once = vectors * built_at_once(params, facts)
    if memory := [s.memory_bytes_a_row * at_once for s in found if s.memory_bytes_a_row]:
        out["build_memory_bytes"] = extrapolate.of(memory)
    if expects.lists is None:
        out["build_seconds"] = extrapolate.hnsw_seconds([(s.vectors, s.build_seconds) for s in found], vectors)
    else:
        built = [(s.vectors, s.lists or 1, s.build_seconds) for s in found]
        out["build_seconds"] = extrapolate.ivfflat_seconds(built, vectors, expects.lists)
    return out


def built_at_once(params: Params, facts: Facts) -> float:
    """Share of the rows that one build holds in memory: partitions are built one after the other."""
    return vector_store.of(params).built_at_once(facts.largest_partition)


def _full_images(params: Params, facts: Facts, s: Sample) -> int:
    """Pages that a checkpoint lets be logged whole, once each: a sample is too quick to show them."""
    if not vector_store.of(params).in_the_table:
        return 0
    return facts.heap_bytes + round(facts.indexes_bytes * (1 - s.hot_share))


def body(phase: Phase, facts: Facts, found: Sequence[Sample]) -> dict[str, Any]:
    """The ledger's row of a rehearsal: the samples, the whole by them and by the forecast, and remarks."""
    expects = preflight.expected(facts, phase)
    whole = figures(phase.params, facts, expects, found)
    return {
        "run_id": phase.run_id,
        "table_rows": facts.rows,
        "samples": [s.as_data() for s in found],
        "whole": {
            name: {"forecast": getattr(expects, name), **whole[name].as_data()} for name in FIGURES if name in whole
        },
        "remarks": _remarks(facts, expects, found, whole["wal_bytes"].expected),
    }


def _remarks(facts: Facts, expects: Forecast, found: Sequence[Sample], wal_bytes: float) -> list[str]:
    """What the figures do not hold, said openly."""
    last, remarks = found[-1], []
    if random := last.vectors_from.get("random"):
        remarks.append(
            f"{number(random)} of {number(last.vectors)} vectors are random, since the target has none yet: a build"
            " over the vectors of texts may be quicker, sizes are the same"
        )
    if facts.triggers:
        remarks.append(f"triggers of the table did not fire: {', '.join(facts.triggers)}")
    if len(found) == 1:
        remarks.append("one sample only, so the range says nothing about its error")
    if last.rows == facts.rows:
        remarks.append("the largest sample is the whole table")
    if expects.lists is None and expects.build_memory_bytes > expects.build_budget_bytes:
        remarks.append("the time of the build holds only while its graph fits into memory; the whole one does not")
    if expects.max_wal_bytes and wal_bytes > expects.max_wal_bytes:
        times = number(int(wal_bytes / expects.max_wal_bytes))
        remarks.append(
            f"that WAL passes max_wal_size, {size(expects.max_wal_bytes)}, {times} times: the backfill pauses for"
            " checkpoints, and its pauses are not among these times"
        )
    if last.others_wal_bytes_per_s > 0:
        remarks.append(f"others wrote {size(last.others_wal_bytes_per_s)} of WAL a second meanwhile, left out here")
    return remarks


def compare(phase: Phase) -> Table:
    """The forecast by formula beside the rehearsal's range, for the whole table."""
    noted = phase.ledger.latest("rehearsal")
    if noted is None:
        return Table(("the whole table",), [("not rehearsed yet",)])
    rows: list[Sequence[str]] = []
    for name, (title, shown) in FIGURES.items():
        if not (figure := noted["whole"].get(name)):
            continue
        ratio = figure["expected"] / figure["forecast"] if figure["forecast"] else None
        rows.append(
            (
                title,
                shown(figure["forecast"]),
                f"{shown(figure['low'])} to {shown(figure['high'])}",
                shown(figure["expected"]),
                "" if ratio is None else f"{ratio:.2f} ×",
            )
        )
    caption = f"{number(noted['table_rows'])} rows. " + ". ".join(noted["remarks"])
    return Table(("the whole table", "forecast", "rehearsed", "about", "rehearsed / forecast"), rows, caption)


def shown(phase: Phase) -> Table:
    """What each sample took."""
    noted = phase.ledger.latest("rehearsal") or {"samples": []}
    return Table(
        (
            "vectors",
            "load, µs a row",
            "backfill, µs a row",
            "HOT",
            "WAL a row",
            "index a row",
            "build",
            "memory a row",
            "update of a text, without and with index and capture",
        ),
        [
            (
                number(s["vectors"]),
                1e6 * s["load_seconds"] / s["vectors"],
                1e6 * s["backfill_seconds"] / s["vectors"],
                share(s["hot_share"]),
                size((s["load_wal_bytes"] + s["backfill_wal_bytes"] + s["build_wal_bytes"]) / s["vectors"]),
                size(s["index_bytes"] / s["vectors"]),
                duration(s["build_seconds"]),
                size(s["memory_bytes_a_row"]) if s["memory_bytes_a_row"] else "not measured",
                f"{number(s['bare_write_ms'])} ms, {number(s['write_ms'])} ms"
                if s.get("write_ms")
                else "not measured",
            )
            for s in noted["samples"]
        ],
    )
