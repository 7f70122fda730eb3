"""Where a target stands, on one screen of a terminal: at most 24 lines of 80 characters."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from runbook_lib.core.display import Table, duration, number, one_line, plain
from runbook_lib.core.gates import Verdict
from runbook_lib.core.registry import OPERATE, operation_of, rollback_of, short
from runbook_lib.runner.status_rows import MOST_CHANGES_COUNTED

WIDTH, MOST_LINES = 80, 24
TO_THE_MINUTE = len("2026-11-30 03:11")


def of(stands: Mapping[str, Any], rows: Mapping[str, Any], params_file: str) -> str:
    """The screen. stands: :func:`target_status.where_it_stands`; rows: :func:`status_rows.look`, or nothing.

    Where nothing has begun it is one line.
    """
    if not stands["ledger"]:
        return f"{stands['table']}: nothing has begun here; next: {_next(stands, rows, params_file)}"
    table = Table(
        ("phase", "state", "when (UTC)", "by"),
        [(p["name"], p["verdict"], (p["at"] or "")[:TO_THE_MINUTE], p["by"]) for p in stands["phases"]],
    )
    below = [*_below(stands, rows), ("next", _next(stands, rows, params_file))]
    lines = [f"{stands['table']} (target {stands['target']}), {stands['server']}", ""]
    lines += [*str(table).splitlines(), "", *(f"{what:<10}{said}" for what, said in below)]
    # A command is never cut: half of it would be another one.
    return "\n".join(line if line.startswith("next") else _cut(line) for line in lines)


def _below(stands: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if running := stands["running"]:
        run = running["application_name"].removeprefix("runbook-runner ")
        yield "running", f"{run}, by {running['usename']}, since {running['since']:%F %H:%M}"
    if stopped := [f"{p['name']}: {p['why']}" for p in stands["phases"] if p["why"]]:
        yield "stopped", "; ".join(stopped)
    if asked := [f"{a['step']}, asked for by {a['asked_by']}" for a in stands["waits_for_approval"]]:
        yield "approval", "; ".join(asked)
    share = stands["share_percent"]
    yield "reads", f"{stands['route']}" + (f", {share} % of the calls" if 0 < share < 100 else "")
    yield from _rows(rows)
    # Those that can be rolled back, and have not been: they are part of how the table is searched now.
    done = [o["name"] for o in stands["operations"] if o["verdict"] == Verdict.PASS]
    if standing := [short(name) for name in done if rollback_of(name)]:
        yield "also done", ", ".join(standing)
    if record := stands["record"]:
        yield "record", f"{record['status']}, {record['path']}"


def _rows(rows: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "why_not" in rows:
        yield "rows", f"not checked: {rows['why_not']}"
        return
    if "missing" in rows:
        seen = "all" if rows["whole"] else f"{number(rows['looked_at'])} sampled of {number(rows['rows'])}"
        besides = " besides the queued" if rows.get("changes") else ""
        yield "rows", f"{number(rows['missing'])} missing, {number(rows['stale'])} stale{besides}, in {seen}"
    if changes := rows.get("changes"):
        counted = f"over {number(MOST_CHANGES_COUNTED)}" if changes > MOST_CHANGES_COUNTED else number(changes)
        yield "queue", f"{counted} changes wait for a vector, the oldest for {duration(rows['oldest_s'])}"


def _next(stands: Mapping[str, Any], rows: Mapping[str, Any], params_file: str) -> str:
    """What to type now."""
    file = shlex.quote(params_file)
    if stands["running"]:
        return "nothing while this run is active"
    for asked in stands["waits_for_approval"]:
        step = asked["step"]
        if step == stands["next"] or operation_of(step) in OPERATE:
            return f"runbook approve {file} {step}   (as another database user)"
    if stands["next"]:
        return f"runbook run {file} --execute" if stands["ledger"] else f"runbook check {file}"
    if rows.get("missing") or rows.get("stale"):
        return f"runbook run {file} --execute --from 40_load_embeddings --to 50_backfill"
    if rows.get("changes"):
        return f"runbook operate {file} refresh --execute"
    return f"runbook check {file}"


def _cut(line: str) -> str:
    line = plain(one_line(line))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
