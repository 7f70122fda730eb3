"""The figures of a migration, collected from the ledger: what was measured, as tiles, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from runbook_lib.core import pictures
from runbook_lib.core.display import duration, number, size
from runbook_lib.core.registry import current
from runbook_lib.runner import charts

Entry = Mapping[str, Any]

MEASURES = ("nDCG@10", "RR", "R@10", "R@100", "P@10")
LATENCIES = ("p50_ms", "p95_ms", "p99_ms")
# Of fewer queries the slowest alone would be the p99.
FEWEST_FOR_P99 = 100
SYSTEM_NAMES = {
    "legacy": "legacy search",
    "fulltext": "full text",
    "exact": "vectors, exact",
    "vector": "vectors, by index",
    "hybrid": "hybrid",
}
# Of several attempts at a backfill, what is added up.
ADDED_UP = ("rows", "seconds", "batches", "wal_bytes", "table_growth_bytes", "put_off")


class Tile(NamedTuple):
    """A figure to be seen first. source: the earlier run that measured it; empty for this one."""

    label: str
    value: str
    detail: str = ""
    source: str = ""


class Figures(NamedTuple):
    """A table of figures. marked: the row to point out. source: as in Tile."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    marked: int | None = None
    source: str = ""


class Picture(NamedTuple):
    """svg: inline markup. alt: what it shows, in words. figures: the same as a table."""

    title: str
    svg: str
    alt: str
    figures: Figures | None = None
    source: str = ""


# A title, column heads, and rows; each from one body of the ledger, which an older run may have written without it.
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


class Figure(NamedTuple):
    """A body of the ledger, and the earlier run that wrote it; empty for this one."""

    body: Mapping[str, Any]
    source: str


class Newest:
    """Finds the newest body of a kind: of this run, or of the newest one before that is still true.

    run_id: empty for a page that belongs to no run; then every body names its run.
    """

    def __init__(self, run_id: str, entries: Iterable[Entry]) -> None:
        entries = list(entries)
        undone: dict[str, int] = {}
        for i, e in enumerate(entries):
            if e["kind"] == "phase" and e["body"].get("verdict") == "UNDONE":
                undone[current(e["phase"])] = i
        self._found: dict[str, Figure] = {}
        self._backfills: list[Figure] = []
        for i, e in enumerate(entries):
            own = e["run_id"] == run_id
            if own or i > undone.get(current(e["phase"]), -1):
                if e["kind"] == "backfill":
                    self._backfills.append(Figure(e["body"], "" if own else e["run_id"]))
                earlier = self._found.get(e["kind"])
                if own or earlier is None or earlier.source:
                    self._found[e["kind"]] = Figure(e["body"], "" if own else e["run_id"])

    def __call__(self, kind: str) -> Figure | None:
        return self._found.get(kind)

    def backfill(self) -> Figure | None:
        """Every attempt since the columns were added, as one: what they did is added up, the rest is the longest's.

        A backfill that went on after a stop, or was run again, did not migrate only the rows of its last attempt.
        """
        if not self._backfills:
            return None
        longest = max(self._backfills, key=lambda found: found.body["rows"])
        bodies = [found.body for found in self._backfills]
        summed = {key: sum(b.get(key) or 0 for b in bodies) for key in ADDED_UP if key in longest.body}
        own = any(not found.source and found.body["rows"] for found in self._backfills)
        return Figure({**longest.body, **summed, "attempts": len(bodies)}, "" if own else longest.source)


def _measures(system: Mapping[str, Any], timed: int) -> dict[str, Any]:
    """Relevance and latency side by side, whether or not the measures stand in a mapping of their own; without the
    p99 of so few queries that it says nothing.
    """
    found = dict(system) | dict(system.get("measures") or {})
    enough = (found.get("timed") or timed) >= FEWEST_FOR_P99
    return found if enough else {k: v for k, v in found.items() if k != "p99_ms"}


def systems(found: Newest) -> tuple[dict[str, dict[str, Any]], Figure] | None:
    """Each search with its measures, from the newest comparison, or from the baseline alone."""
    for kind in ("shadow", "baseline"):
        if (entry := found(kind)) and entry.body.get("systems"):
            # In the order of SYSTEM_NAMES: jsonb keeps no order of its own.
            systems, timed = entry.body["systems"], entry.body.get("timed") or 0
            order = [n for n in SYSTEM_NAMES if n in systems] + [n for n in systems if n not in SYSTEM_NAMES]
            return {name: _measures(systems[name], timed) for name in order}, entry
    return None


def tables(found: Newest) -> list[tuple[str, Figures]]:
    """The smaller tables: classes of queries, filters, and how the backfill went."""
    made = []
    kinds = ((found("shadow"), _slices), (found("tuning"), _filters), (found.backfill(), _backfill))
    for entry, table in kinds:
        if entry and (shown := table(entry.body)):
            title, columns, rows = shown
            made.append((title, Figures(columns, rows, None, entry.source)))
    return made


def _filters(tuning: Mapping[str, Any]) -> Table | None:
    """The way that the search function takes for each class of filter, next to common practice."""
    rows = []
    for c in tuning.get("classes") or ():
        if c["column"] and (chosen := c.get("chosen")):
            scan = chosen["scan"]
            way = scan if scan == "exact" else f"{scan}, {chosen['candidates']} candidates"
            practice = c.get("practice") or {}
            rows.append(
                (
                    f"{c['column']}, {c['bucket']} of the rows",
                    way,
                    f"{chosen['recall']:.3f} (from {chosen['low']:.3f})",
                    f"{chosen['p50_ms']:.2f} ms",
                    f"{practice['recall']:.3f} in {practice['p50_ms']:.2f} ms" if practice else "",
                )
            )
    heads = ("filter", "way chosen", "recall, lower bound", "p50", "common practice")
    return ("Filters, on queries that the choice did not see", heads, rows) if rows else None


def _slices(shadow: Mapping[str, Any]) -> Table | None:
    """Classes of queries: where the new route wins, where legacy does, and what is to blame."""
    rows = [
        (
            s["slice"],
            s["queries"],
            f"{s['legacy']:.3f}",
            f"{s['route']:.3f}",
            f"{s['low']:+.3f} to {s['high']:+.3f}, p = {s['p_value']:.2g}",
            f"the {s['blame']}" if s["difference"] < 0 else "",
        )
        for s in shadow.get("slices") or ()
    ]
    heads = ("queries", "number", "legacy nDCG@10", "route nDCG@10", "difference", "what loses")
    shown = 6 if any(row[-1] for row in rows) else 5
    return ("Classes of queries", heads[:shown], [row[:shown] for row in rows]) if rows else None


def _backfill(body: Mapping[str, Any]) -> Table | None:
    """How the vectors reached their rows: strategy, HOT share, WAL, pauses, take-overs."""
    if "strategy" not in body:
        return None
    rows: list[tuple[Any, ...]] = [
        ("strategy", body["strategy"].replace("_", " ")),
        ("updates that touched no index", f"{body['hot_share']:.0%}"),
        ("batches", f"{number(body['batches'])}: p50 {ms(body['batch_p50_ms'])}, p95 {ms(body['batch_p95_ms'])}"),
        ("WAL", size(body["wal_bytes"])),
        ("workers, ranges taken over", f"{body['workers']}, {body['windows_taken_over']}"),
        ("pauses", f"{len(body['pauses'])}"),
    ]
    return "The backfill", ("", ""), rows


def chosen(tuning: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point of a sweep whose setting was taken; None where no setting met the target."""
    return next((p for p in tuning.get("points", ()) if pictures.is_chosen(tuning, p)), None)


def tiles(found: Newest) -> list[Tile]:
    """The figures to be seen first."""
    made = []
    if entry := found.backfill():
        b = entry.body
        rate = f"{number(b['rows'] / b['seconds'])} rows/s" if b.get("seconds") else ""
        took = f"in {duration(b['seconds'])}, {rate}" + (f", {b['attempts']} attempts" if b["attempts"] > 1 else "")
        made.append(Tile("rows migrated", number(b["rows"]), took, entry.source))
    elif entry := found("plan"):
        # Rows without text get no vector; of all rows an earlier release knew nothing else.
        b = entry.body
        rows = b["table_rows"] if b.get("rows_with_text") is None else b["rows_with_text"]
        made.append(Tile("rows to migrate", number(rows), size(b["table_bytes"]), entry.source))
    if entry := found("index"):
        b = entry.body
        made.append(
            Tile("vector index", size(b["bytes"]), f"{b['method']}, built in {duration(b['seconds'])}", entry.source)
        )
    if (entry := found("tuning")) and (point := chosen(entry.body)):
        detail = f"{point['setting']} = {point['value']}, target {entry.body['target_recall']:g}"
        made.append(Tile(f"recall@{entry.body['k']}", f"{point['recall']:.3f}", detail, entry.source))
    if compared := systems(found):
        measured, entry = compared
        scored = {n: m["nDCG@10"] for n, m in measured.items() if m.get("nDCG@10") is not None}
        if scored:
            best = entry.body.get("winner") or max(scored, key=lambda n: scored[n])
            detail = name(best)
            if "legacy" in scored and best != "legacy":
                detail += f"; legacy {scored['legacy']:.3f}"
            made.append(Tile("best nDCG@10", f"{scored[best]:.3f}" if best in scored else "–", detail, entry.source))
        route = found("route")
        answering = route.body["route"] if route and route.body["route"] in measured else "vector"
        if p50 := measured.get(answering, {}).get("p50_ms"):
            legacy = measured.get("legacy", {}).get("p50_ms")
            detail = name(answering) + (f"; legacy {ms(legacy)}" if legacy and answering != "legacy" else "")
            made.append(Tile("latency p50", ms(p50), detail, entry.source))
    return made


def name(system: str) -> str:
    """What a reader calls this search."""
    return SYSTEM_NAMES.get(system, system)


def ms(milliseconds: float) -> str:
    """Milliseconds as text."""
    return f"{number(float(milliseconds))} ms"


def drawn(found: Newest) -> list[Picture]:
    """The pictures that these figures are enough for."""
    made = []
    if compared := systems(found):
        measured, entry = compared
        made.append(_bars(measured, "nDCG@10", "Relevance on the judged queries", entry.source))
        made.append(_bars(measured, "p50_ms", "Latency at the median", entry.source))
    if (entry_or_none := found("tuning")) and entry_or_none.body.get("points"):
        made.append(_recall(entry_or_none))
    if (entry_or_none := found.backfill()) and len(entry_or_none.body.get("samples") or ()) > 1:
        made.append(_progress(entry_or_none))
    return [picture for picture in made if picture]


def comparison(found: Newest) -> Figures | None:
    """Every search with every measure; the winner on the judgements is marked."""
    compared = systems(found)
    if not compared:
        return None
    measured, entry = compared
    columns = [c for c in (*MEASURES, *LATENCIES) if any(m.get(c) is not None for m in measured.values())]
    rows = [(name(n), *(_cell(c, m.get(c)) for c in columns)) for n, m in measured.items()]
    best = _best(measured, "nDCG@10")
    marked = list(measured).index(best) if best else None
    return Figures(("search", *(c.replace("_ms", "") for c in columns)), rows, marked, entry.source)


def _cell(measure: str, value: float | None) -> str | None:
    if value is None:
        return None
    return ms(value) if measure in LATENCIES else f"{value:.3f}"


def _best(measured: Mapping[str, Mapping[str, Any]], measure: str) -> str | None:
    """The best search by a measure; None where there is nothing to compare."""
    scored = {n: float(m[measure]) for n, m in measured.items() if m.get(measure) is not None}
    if len(scored) < 2:
        return None
    return (min if measure in LATENCIES else max)(scored, key=lambda n: scored[n])


def _bars(measured: Mapping[str, Mapping[str, Any]], measure: str, title: str, source: str) -> Picture | None:
    best = _best(measured, measure)
    if best is None:
        return None
    scored = {n: float(m[measure]) for n, m in measured.items() if m.get(measure) is not None}
    what = "p50, ms" if measure == "p50_ms" else measure
    said = ", ".join(f"{name(n)} {_cell(measure, v)}" for n, v in scored.items())
    svg = charts.bars([name(n) for n in scored], list(scored.values()), what, list(scored).index(best))
    return Picture(title, Markup(svg), f"Bars of {what}: {said}.", None, source)  # noqa: S704


def _recall(entry: Figure) -> Picture:
    tuning = entry.body
    points = list(tuning["points"])
    marked = next((i for i, p in enumerate(points) if pictures.is_chosen(tuning, p)), None)
    said = "; ".join(f"{p['value']}: {p['recall']:.3f} at {ms(p['p50_ms'])}" for p in points)
    chosen = f" Chosen: {points[marked]['value']}." if marked is not None else " No setting met the target."
    return Picture(
        "Recall against latency",
        Markup(pictures.recall_against_latency(tuning)),  # noqa: S704
        f"Recall@{tuning['k']} over latency, a point a setting of {points[0]['setting']}: {said}.{chosen}",
        Figures(
            (str(points[0]["setting"]), f"recall@{tuning['k']}", "p50", "p95", "queries short of rows"),
            [
                (p["value"], f"{p['recall']:.3f}", ms(p["p50_ms"]), ms(p["p95_ms"]), p.get("rows_short"))
                for p in points
            ],
            marked,
        ),
        entry.source,
    )


def _progress(entry: Figure) -> Picture:
    b = entry.body
    return Picture(
        "Backfill",
        Markup(charts.progress(b["samples"], b["rows"])),  # noqa: S704
        f"{number(b['rows'])} rows in {duration(b['seconds'])}, rows over time.",
        None,
        entry.source,
    )


def _embedded(plan: Mapping[str, Any]) -> bool:
    """Did a model make the vectors while they were loaded? Otherwise they were read, from a file or a table."""
    source = (plan.get("params") or {}).get("embeddings") or {}
    return not (source.get("file") or source.get("table"))


def forecast(found: Newest) -> list[tuple[str, str, str, str]]:
    """What was foreseen, by preflight's formulas and by a rehearsal where there was one; what it came to; the ratio.

    An actual figure that nobody measured says so.
    """
    plan = found("plan")
    if not plan or not plan.body.get("forecast"):
        return []
    foreseen_by = plan.body["forecast"]
    index, backfill, load = found("index"), found.backfill(), found("load")
    rehearsal = found("rehearsal")
    rehearsed = rehearsal.body["whole"] if rehearsal else {}
    actual = {
        "index_bytes": index.body.get("bytes") if index else None,
        "load_seconds": load.body.get("seconds") if load else None,
        "build_seconds": index.body.get("seconds") if index else None,
        "table_growth_bytes": backfill.body.get("table_growth_bytes") if backfill else None,
        "backfill_wal_bytes": backfill.body.get("wal_bytes") if backfill else None,
        "backfill_seconds": backfill.body.get("seconds") if backfill else None,
    }
    names = {
        "index_bytes": "size of the index",
        "build_memory_bytes": "memory for the build",
        "table_growth_bytes": "growth of the table",
        "wal_bytes": "WAL of load, backfill and build",
        "backfill_wal_bytes": "WAL of the backfill, without HOT",
        "staging_bytes": "staging table",
        "load_seconds": "time of loading, without the model",
        "build_seconds": "time of the build",
        "backfill_seconds": "time of the backfill, without HOT",
    }
    rows: list[tuple[str, str, str, str]] = []
    for key, foreseen in foreseen_by.items():
        if not isinstance(foreseen, int | float):
            continue
        shown = duration if key.endswith("_seconds") else size
        was = actual.get(key)
        said: str = shown(was) if was is not None else "not measured"
        if key == "build_memory_bytes" and index:
            over = any("no longer fits" in n for n in index.body.get("notices", ()))
            said = "more than its limit" if over else "within its limit"
        ratio = f"{was / foreseen:.2f} ×" if was is not None and foreseen else ""
        if key == "load_seconds" and was is not None and _embedded(plan.body):
            said, ratio = f"{said} with the model", ""
        expected: str = shown(foreseen)
        if r := rehearsed.get(key):
            expected += f"; rehearsed {shown(r['low'])} to {shown(r['high'])}"
        rows.append((names.get(key, key.replace("_", " ")), expected, said, ratio))
    return rows
