"""What a reviewer must see of a run, collected as plain data from its manifest and the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from markupsafe import Markup

from runbook_lib.core import pictures
from runbook_lib.core.db import BLOCKED_BY, lock_level
from runbook_lib.core.display import duration, number, size
from runbook_lib.core.gates import Verdict
from runbook_lib.core.registry import STEPS, UNDO, current, rolled_back_by
from runbook_lib.runner import charts, tables
from runbook_lib.runner.manifest import BY_HAND, Manifest, Status

Entry = Mapping[str, Any]

# Strongest first; PostgreSQL manual, "Explicit Locking".
LOCKS = tuple(BLOCKED_BY)
MEASURES = ("nDCG@10", "RR", "R@10", "R@100", "P@10")
LATENCIES = ("p50_ms", "p95_ms", "p99_ms")
SYSTEM_NAMES = {
    "legacy": "legacy search",
    "fulltext": "full text",
    "exact": "vectors, exact",
    "vector": "vectors, by index",
    "hybrid": "hybrid",
}


class Tile(NamedTuple):
    """A figure to be seen first. source: the earlier run that measured it; empty for this one."""

    label: str
    value: str
    detail: str = ""
    source: str = ""


# Of several attempts at a backfill, what is added up.
ADDED_UP = ("rows", "seconds", "batches", "wal_bytes", "table_growth_bytes", "put_off")


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


@dataclass(frozen=True)
class Record:
    """Plain data of one run: all that its page shows."""

    manifest: Manifest
    summary: Sequence[str]
    tiles: Sequence[Tile]
    phases: Sequence[Mapping[str, Any]]
    gates: Sequence[Mapping[str, Any]]
    statements: Sequence[Mapping[str, Any]]
    planned: Sequence[Mapping[str, Any]]
    pictures: Sequence[Picture]
    comparison: Figures | None
    tables: Sequence[tuple[str, Figures]]
    forecast: Sequence[tuple[str, str, str, str]]
    rollback: Sequence[tuple[str, str, str, str]]
    notes: Sequence[str] = field(default_factory=tuple)


class _Found(NamedTuple):
    body: Mapping[str, Any]
    source: str


def collect(run: Manifest, entries: Iterable[Entry], pages: Iterable[str] = (), notes: Sequence[str] = ()) -> Record:
    """All that the page shows, from the manifest and the target's ledger.

    entries: rows of every run of this target, in order. pages: phases whose notebook has a page. Figures that this
    run did not measure come from the newest run that did, named as their source, unless they were undone since.
    """
    entries = list(entries)
    own = [e for e in entries if e["run_id"] == run.run_id]
    statements = [{"phase": e["phase"]} | dict(e["body"]) for e in own if e["kind"] == "statement"]
    planned = [{"phase": e["phase"]} | dict(e["body"]) for e in own if e["kind"] == "planned"]
    gates = _gates(own)
    found = _Newest(run, entries)
    return Record(
        manifest=run,
        summary=_summary(run, found, gates, statements),
        tiles=_tiles(found),
        phases=_phases(run, gates, set(pages)),
        gates=gates,
        statements=statements,
        planned=planned,
        pictures=_pictures(found),
        comparison=_comparison(found),
        tables=_tables(found),
        forecast=_forecast(found),
        rollback=_rollback(run, found),
        notes=[*run.notes, *notes],
    )


class _Newest:
    """Finds the newest body of a kind: of this run, or of the newest one before that is still true."""

    def __init__(self, run: Manifest, entries: Sequence[Entry]) -> None:
        undone: dict[str, int] = {}
        for i, e in enumerate(entries):
            if e["kind"] == "phase" and e["body"].get("verdict") == "UNDONE":
                undone[current(e["phase"])] = i
        self._found: dict[str, _Found] = {}
        self._backfills: list[_Found] = []
        for i, e in enumerate(entries):
            own = e["run_id"] == run.run_id
            if own or i > undone.get(current(e["phase"]), -1):
                if e["kind"] == "backfill":
                    self._backfills.append(_Found(e["body"], "" if own else e["run_id"]))
                earlier = self._found.get(e["kind"])
                if own or earlier is None or earlier.source:
                    self._found[e["kind"]] = _Found(e["body"], "" if own else e["run_id"])

    def __call__(self, kind: str) -> _Found | None:
        return self._found.get(kind)

    def backfill(self) -> _Found | None:
        """Every attempt since the columns were added, as one: what they did is added up, the rest is the longest's.

        A backfill that went on after a stop, or was run again, did not migrate only the rows of its last attempt.
        """
        if not self._backfills:
            return None
        longest = max(self._backfills, key=lambda found: found.body["rows"])
        bodies = [found.body for found in self._backfills]
        summed = {key: sum(b.get(key) or 0 for b in bodies) for key in ADDED_UP if key in longest.body}
        own = any(not found.source and found.body["rows"] for found in self._backfills)
        return _Found({**longest.body, **summed, "attempts": len(bodies)}, "" if own else longest.source)


def _gates(own: Sequence[Entry]) -> list[dict[str, Any]]:
    """Gates grouped by phase, in the order of the run; of a gate judged twice the newer verdict."""
    by_phase: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for e in own:
        if e["kind"] == "gate":
            by_phase.setdefault(e["phase"], {})[(e["body"]["name"], e["body"]["subject"])] = e["body"]
    groups = []
    for phase, gates in by_phase.items():
        stopping = [g for g in gates.values() if g["verdict"] in (Verdict.FAIL, Verdict.UNKNOWN)]
        others = [g for g in gates.values() if g not in stopping]
        passed = sum(g["verdict"] == Verdict.PASS for g in others)
        groups.append({"phase": phase, "stopping": stopping, "others": others, "passed": passed})
    return sorted(groups, key=lambda group: not group["stopping"])


def _phases(run: Manifest, gates: Sequence[Mapping[str, Any]], pages: set[str]) -> list[dict[str, Any]]:
    # In a plan no gate is run: that none passed would read as a failure.
    count = {g["phase"]: (g["passed"], len(g["stopping"]) + len(g["others"])) for g in gates if run.execute}
    return [
        {
            "name": p.name,
            "status": p.status,
            "started": p.started,
            "seconds": p.seconds,
            "error": p.error,
            "sha256": p.sha256,
            "gates": "{} of {}".format(*count[p.name]) if p.name in count else "",
            "page": f"{p.file}.html" if p.name in pages else "",
        }
        for p in run.phases
    ]


def _measures(system: Mapping[str, Any]) -> dict[str, Any]:
    """Relevance and latency side by side, whether or not the measures stand in a mapping of their own."""
    return dict(system) | dict(system.get("measures") or {})


def _systems(found: _Newest) -> tuple[dict[str, dict[str, Any]], _Found] | None:
    for kind in ("shadow", "baseline"):
        if (entry := found(kind)) and entry.body.get("systems"):
            # In the order of SYSTEM_NAMES: jsonb keeps no order of its own.
            systems = entry.body["systems"]
            order = [n for n in SYSTEM_NAMES if n in systems] + [n for n in systems if n not in SYSTEM_NAMES]
            return {name: _measures(systems[name]) for name in order}, entry
    return None


def _tables(found: _Newest) -> list[tuple[str, Figures]]:
    made = []
    kinds = ((found("shadow"), tables.slices), (found("tuning"), tables.filters), (found.backfill(), tables.backfill))
    for entry, table in kinds:
        if entry and (shown := table(entry.body)):
            title, columns, rows = shown
            made.append((title, Figures(columns, rows, None, entry.source)))
    return made


def _chosen(tuning: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((p for p in tuning.get("points", ()) if pictures.is_chosen(tuning, p)), None)


def _tiles(found: _Newest) -> list[Tile]:
    tiles = []
    if entry := found.backfill():
        b = entry.body
        rate = f"{number(b['rows'] / b['seconds'])} rows/s" if b.get("seconds") else ""
        took = f"in {duration(b['seconds'])}, {rate}" + (f", {b['attempts']} attempts" if b["attempts"] > 1 else "")
        tiles.append(Tile("rows migrated", number(b["rows"]), took, entry.source))
    elif entry := found("plan"):
        # Rows without text get no vector; of all rows an earlier release knew nothing else.
        b = entry.body
        rows = b["table_rows"] if b.get("rows_with_text") is None else b["rows_with_text"]
        tiles.append(Tile("rows to migrate", number(rows), size(b["table_bytes"]), entry.source))
    if entry := found("index"):
        b = entry.body
        tiles.append(
            Tile("vector index", size(b["bytes"]), f"{b['method']}, built in {duration(b['seconds'])}", entry.source)
        )
    if (entry := found("tuning")) and (point := _chosen(entry.body)):
        detail = f"{point['setting']} = {point['value']}, target {entry.body['target_recall']:g}"
        tiles.append(Tile(f"recall@{entry.body['k']}", f"{point['recall']:.3f}", detail, entry.source))
    if systems := _systems(found):
        measured, entry = systems
        scored = {n: m["nDCG@10"] for n, m in measured.items() if m.get("nDCG@10") is not None}
        if scored:
            best = entry.body.get("winner") or max(scored, key=lambda n: scored[n])
            detail = _name(best)
            if "legacy" in scored and best != "legacy":
                detail += f"; legacy {scored['legacy']:.3f}"
            tiles.append(Tile("best nDCG@10", f"{scored[best]:.3f}" if best in scored else "–", detail, entry.source))
        route = found("route")
        answering = route.body["route"] if route and route.body["route"] in measured else "vector"
        if p50 := measured.get(answering, {}).get("p50_ms"):
            legacy = measured.get("legacy", {}).get("p50_ms")
            detail = _name(answering) + (f"; legacy {_ms(legacy)}" if legacy and answering != "legacy" else "")
            tiles.append(Tile("latency p50", _ms(p50), detail, entry.source))
    return tiles


def _name(system: str) -> str:
    return SYSTEM_NAMES.get(system, system)


def _ms(milliseconds: float) -> str:
    return f"{number(float(milliseconds))} ms"


def _count(n: int, what: str) -> str:
    return f"{number(n)} {what}" + ("" if n == 1 else "s")


def _summary(
    run: Manifest, found: _Newest, gates: Sequence[Mapping[str, Any]], statements: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What a reviewer must know, a sentence or two a line; only what this run did, unless it says otherwise."""
    lines = []
    stopped = next((p for p in run.phases if p.error), None)
    if stopped:
        left = [p.name for p in run.phases if p.status == Status.PENDING]
        after = f" Not begun: {', '.join(left)}." if left else ""
        lines.append(f"The run stopped in {stopped.name}.{after} Rerun the same command to resume there.")
    if not run.execute:
        lines.append(
            "Nothing was carried out: each notebook shows the statements that it would run, and their locks."
        )
    lines += _what_changed(run, found)
    if statements:
        lines.append(_under_which_locks(statements))
    if run.execute:
        passed, stopping = sum(g["passed"] for g in gates), sum(len(g["stopping"]) for g in gates)
        said = f"{_count(passed, 'gate')} passed" + (f", {stopping} did not" if stopping else "; none failed")
        took = f"The run took {duration(run.seconds)}. " if run.seconds is not None else ""
        lines.append(f"{took}{said}.")
    if (entry := found("tuning")) and (point := _chosen(entry.body)):
        t = entry.body
        lines.append(
            f"With {point['setting']} = {point['value']} the index finds {point['recall']:.1%} of the exact"
            f" {t['k']} nearest rows in {_ms(point['p50_ms'])} at the median; exact search takes"
            f" {_ms(t['exact_p50_ms'])} ({_count(t['queries'], 'query').replace('querys', 'queries')})."
            + _from(entry)
        )
    if line := _who_wins(found):
        lines.append(line)
    return lines


def _what_changed(run: Manifest, found: _Newest) -> list[str]:
    lines = []
    back = [name for p in run.phases if p.status == Status.PASSED for name in rolled_back_by(p.name)]
    if run.execute and (back or run.way in ("undo", "undo_operation")):
        lines.append(f"Taken back on {run.table}: {', '.join(back) or 'nothing'}.")
    if (entry := found.backfill()) and not entry.source:
        lines.append(
            f"{_count(entry.body['rows'], 'row')} of {run.table} got a vector in {duration(entry.body['seconds'])}."
        )
    if (entry := found("route")) and not entry.source:
        share = entry.body.get("share_percent")
        share_text = f", {share} % of the calls" if share is not None and share != 100 else ", every call"
        lines.append(f"Reads now go to: {_name(entry.body['route'])}{share_text}.")
    return lines


def _under_which_locks(statements: Sequence[Mapping[str, Any]]) -> str:
    def strength(s: Mapping[str, Any]) -> int:
        return LOCKS.index(level) if (level := lock_level(s["lock"])) else len(LOCKS)

    strongest = min(statements, key=lambda s: (strength(s), -s["seconds"]))
    text = f"{_count(len(statements), 'statement')} changed something."
    if strength(strongest) == len(LOCKS):
        return f"{text} None took a lock on the table that keeps others waiting."
    level = LOCKS[strength(strongest)]
    same = [s for s in statements if strength(s) == strength(strongest)]
    retried = sum(s.get("tries", 1) > 1 for s in statements)
    waits = f"{_count(retried, 'statement')} had to try again for its lock" if retried else "none waited for its lock"
    return (
        f"{text} The strongest lock was {level} ({_count(len(same), 'statement')}, the longest"
        f" {duration(max(s['seconds'] for s in same))}), which blocks {strongest['blocks']}; {waits}."
    )


def _who_wins(found: _Newest) -> str:
    systems = _systems(found)
    if not systems:
        return ""
    measured, entry = systems
    scored = {n: m["nDCG@10"] for n, m in measured.items() if m.get("nDCG@10") is not None}
    if len(scored) < 2:
        return ""
    order = sorted(scored, key=lambda n: scored[n], reverse=True)
    judged = entry.body.get("judged")
    rest = ", ".join(f"{_name(n)} {scored[n]:.3f}" for n in order[1:])
    on = f"On {number(judged)} judged queries" if judged else "On the judged queries"
    return f"{on}, {_name(order[0])} answers best: nDCG@10 {scored[order[0]]:.3f}; {rest}.{_from(entry)}"


def _from(entry: _Found) -> str:
    return f" Measured in run {entry.source}." if entry.source else ""


def _pictures(found: _Newest) -> list[Picture]:
    made = []
    if systems := _systems(found):
        measured, entry = systems
        made.append(_bars(measured, "nDCG@10", "Relevance on the judged queries", entry.source))
        made.append(_bars(measured, "p50_ms", "Latency at the median", entry.source))
    if (entry_or_none := found("tuning")) and entry_or_none.body.get("points"):
        made.append(_recall(entry_or_none))
    if (entry_or_none := found.backfill()) and len(entry_or_none.body.get("samples") or ()) > 1:
        made.append(_progress(entry_or_none))
    return [picture for picture in made if picture]


def _comparison(found: _Newest) -> Figures | None:
    """Every search with every measure; the winner on the judgements is marked."""
    systems = _systems(found)
    if not systems:
        return None
    measured, entry = systems
    columns = [c for c in (*MEASURES, *LATENCIES) if any(m.get(c) is not None for m in measured.values())]
    rows = [(_name(n), *(_cell(c, m.get(c)) for c in columns)) for n, m in measured.items()]
    best = _best(measured, "nDCG@10")
    marked = list(measured).index(best) if best else None
    return Figures(("search", *(c.replace("_ms", "") for c in columns)), rows, marked, entry.source)


def _cell(measure: str, value: float | None) -> str | None:
    if value is None:
        return None
    return _ms(value) if measure in LATENCIES else f"{value:.3f}"


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
    said = ", ".join(f"{_name(n)} {_cell(measure, v)}" for n, v in scored.items())
    drawn = charts.bars([_name(n) for n in scored], list(scored.values()), what, list(scored).index(best))
    return Picture(title, Markup(drawn), f"Bars of {what}: {said}.", None, source)  # noqa: S704


def _recall(entry: _Found) -> Picture:
    tuning = entry.body
    points = list(tuning["points"])
    marked = next((i for i, p in enumerate(points) if pictures.is_chosen(tuning, p)), None)
    said = "; ".join(f"{p['value']}: {p['recall']:.3f} at {_ms(p['p50_ms'])}" for p in points)
    chosen = f" Chosen: {points[marked]['value']}." if marked is not None else " No setting met the target."
    return Picture(
        "Recall against latency",
        Markup(pictures.recall_against_latency(tuning)),  # noqa: S704
        f"Recall@{tuning['k']} over latency, a point a setting of {points[0]['setting']}: {said}.{chosen}",
        Figures(
            (str(points[0]["setting"]), f"recall@{tuning['k']}", "p50", "p95", "queries short of rows"),
            [
                (p["value"], f"{p['recall']:.3f}", _ms(p["p50_ms"]), _ms(p["p95_ms"]), p.get("rows_short"))
                for p in points
            ],
            marked,
        ),
        entry.source,
    )


def _progress(entry: _Found) -> Picture:
    b = entry.body
    rows = [("rows", number(b["rows"])), ("time", duration(b["seconds"]))]
    rows += [("batches", number(b["batches"]))] if "batches" in b else []
    rows += [(f"a batch, {p}", _ms(b[f"batch_{p}_ms"])) for p in ("p50", "p95") if b.get(f"batch_{p}_ms") is not None]
    return Picture(
        "Backfill",
        Markup(charts.progress(b["samples"], b["rows"])),  # noqa: S704
        f"{number(b['rows'])} rows in {duration(b['seconds'])}, rows over time.",
        Figures(("", ""), rows),
        entry.source,
    )


def _forecast(found: _Newest) -> list[tuple[str, str, str, str]]:
    """What was foreseen, by preflight's formulas and by a rehearsal where there was one; what it came to; the ratio.

    An actual figure that nobody measured says so.
    """
    plan = found("plan")
    if not plan or not plan.body.get("forecast"):
        return []
    forecast = plan.body["forecast"]
    index, backfill = found("index"), found.backfill()
    rehearsal = found("rehearsal")
    rehearsed = rehearsal.body["whole"] if rehearsal else {}
    actual = {
        "index_bytes": index.body.get("bytes") if index else None,
        "build_seconds": index.body.get("seconds") if index else None,
        "table_growth_bytes": backfill.body.get("table_growth_bytes") if backfill else None,
        "wal_bytes": backfill.body.get("wal_bytes") if backfill else None,
        "backfill_seconds": backfill.body.get("seconds") if backfill else None,
    }
    names = {
        "index_bytes": "size of the index",
        "build_memory_bytes": "memory for the build",
        "table_growth_bytes": "growth of the table",
        "wal_bytes": "write-ahead log",
        "build_seconds": "time of the build",
        "backfill_seconds": "time of the backfill",
    }
    rows = []
    for key, foreseen in forecast.items():
        if not isinstance(foreseen, int | float):
            continue
        shown = duration if key.endswith("_seconds") else size
        was = actual.get(key)
        said = shown(was) if was is not None else "not measured"
        if key == "build_memory_bytes" and index:
            over = any("no longer fits" in n for n in index.body.get("notices", ()))
            said = "did not fit into maintenance_work_mem" if over else "the build stayed within maintenance_work_mem"
        ratio = f"{was / foreseen:.2f} ×" if was is not None and foreseen else ""
        expected = shown(foreseen)
        if r := rehearsed.get(key):
            expected += f"; rehearsed {shown(r['low'])} to {shown(r['high'])}"
        rows.append((names.get(key, key.replace("_", " ")), expected, said, ratio))
    return rows


def _rollback(run: Manifest, found: _Newest) -> list[tuple[str, str, str, str]]:
    """The rollbacks of what this run passed, in the order in which they are run: name, phases, what goes, and
    how long it takes, there and forward again.
    """
    done = run.execute and run.way in ("migrate", BY_HAND)
    passed = {p.name for p in run.phases if p.status == Status.PASSED} if done else set()
    return [
        (name, ", ".join(p for p in STEPS[name].rolls_back if p in passed), STEPS[name].does, _takes(name, found))
        for name in UNDO
        if passed & set(STEPS[name].rolls_back)
    ]


def _takes(name: str, found: _Newest) -> str:
    """How long a rollback takes, and what would have to be done again afterwards, by the times of this migration."""
    index, backfill, load = found("index"), found.backfill(), found("load")
    again = {
        "undo/index": [("building it again", index)],
        "undo/schema": [("embedding and loading again", load), ("backfilling again", backfill)],
    }
    known = [f"{what} took {duration(e.body['seconds'])}" for what, e in again.get(name, ()) if e]
    return "; ".join([STEPS[name].takes, *known])
