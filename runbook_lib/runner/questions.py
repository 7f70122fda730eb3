"""The ten questions of a reviewer, answered in a sentence or two each; what is not known yet is said in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from runbook_lib.core.db import BLOCKED_BY, lock_level
from runbook_lib.core.display import duration, number, size
from runbook_lib.core.registry import MIGRATE, current, rolled_back_by, short
from runbook_lib.runner import rollbacks
from runbook_lib.runner.figures import Entry, Figure, Newest, chosen, ms, name, systems
from runbook_lib.runner.manifest import Manifest, Status
from runbook_lib.runner.rollbacks import Rollback

# Strongest first; PostgreSQL manual, "Explicit Locking".
LOCKS = tuple(BLOCKED_BY)
# Of a query or a row, in the tables of gains and losses.
LONGEST_SHOWN = 60
# Parameters that let pass what would stop a run, and the value that lets nothing pass.
ACCEPTING: dict[str, Any] = {
    "accept.triggers": [],
    "accept.rules": [],
    "accept.publications": [],
    "accept.open_schemas": [],
    "target.distributed": None,
    "target.key_from_one_source": False,
    "embeddings.accept_refused_rows": 0,
    "embeddings.accept_unread_percent": 5.0,
    "partitioning.accept_wider_key": False,
    "cut_over.accept_unjudged": False,
    "cut_over.largest_relevance_loss": 0.0,
    "cut_over.largest_slowdown": 1.0,
    "retire.accept_unseen_standbys": False,
}
UNREAD = "Not known: the ledger could not be read when this page was made."


class Question(NamedTuple):
    """answers: sentences. code: a command to copy. evidence: the id of the section that shows more, and its title."""

    asked: str
    answers: Sequence[str]
    evidence: tuple[str, str]
    code: str = ""


class Moved(NamedTuple):
    """Queries that gained or lost most: query, place of the first right answer before and after, and that row."""

    title: str
    rows: Sequence[tuple[str, str, str, str]]
    source: str


def answer(
    run: Manifest,
    found: Newest,
    own: Sequence[Entry],
    gates: Sequence[Mapping[str, Any]],
    rollback: Sequence[Rollback],
    head: str,
    *,
    read: bool,
) -> list[Question]:
    """The ten, in the order in which a reviewer asks them.

    own: the run's rows of the ledger. gates: grouped by phase. head: hash of the ledger's newest row. read: False
    where the ledger could not be read; then nothing is said of what it would tell.
    """

    def known(told: list[str]) -> list[str]:
        return told if read else [UNREAD]

    statements = [e["body"] for e in own if e["kind"] == "statement"]
    changed, locks = known(_what_changed(run, found, statements)), known(_locks(statements))
    shown = ("statements", "statements") if statements else ("phases", "phases")
    params_file = shlex.quote(run.params_file)
    return [
        Question("What changed?", [*_stopped(run), *changed], shown),
        Question("Which was the strongest lock, for how long, and what waited?", locks, shown),
        Question("Who ran it, where?", who(run, own), ("evidence", "versions and parameters")),
        Question("Who signed what?", known(_signed(run, found, own)), ("gates", "gates")),
        Question("Was it proved?", known(_proved(run, found, gates)), ("figures", "figures")),
        Question("Is the new search better for users?", known(_better(found)), ("moved", "gains and losses")),
        Question("What does it cost?", known(_cost(found)), ("forecast", "forecast and actual")),
        Question("What was skipped or accepted?", accepted(run, found), ("evidence", "parameters")),
        Question("How is it rolled back?", *_rolled_back(run, rollback)),
        Question(
            "Is the record untampered?",
            [_head(head)],
            ("evidence", "hashes"),
            f"runbook verify {params_file} {run.run_id}",
        ),
    ]


def count(n: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number(n)} {what}" + ("" if n == 1 else "s")


def _queries(n: int) -> str:
    return f"{number(n)} {'query' if n == 1 else 'queries'}"


def _from(entry: Figure) -> str:
    return f" Measured in run {entry.source}." if entry.source else ""


def _stopped(run: Manifest) -> list[str]:
    at = next((p.name for p in run.phases if p.error), None)
    if at is None:
        return []
    left = [p.name for p in run.phases if p.status == Status.PENDING]
    after = f" Not begun: {', '.join(left)}." if left else ""
    return [f"The run stopped in {at}.{after} Rerun the same command to resume there."]


def _what_changed(run: Manifest, found: Newest, statements: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    back = [n for p in run.phases if p.status == Status.PASSED for n in rolled_back_by(p.name)]
    if back or run.way in ("undo", "undo_operation"):
        lines.append(f"Rolled back on {run.table}: {', '.join(back) or 'nothing'}.")
    if (entry := found.backfill()) and not entry.source:
        rows, seconds = entry.body["rows"], entry.body["seconds"]
        lines.append(f"{count(rows, 'row')} of {run.table} got a vector in {duration(seconds)}.")
    if (entry := found("route")) and not entry.source:
        share = entry.body.get("share_percent")
        share_text = f", {share} % of the calls" if share is not None and share != 100 else ", every call"
        lines.append(f"Reads now go to: {name(entry.body['route'])}{share_text}.")
    lines.append(f"{count(len(statements), 'statement')} changed something." if statements else "No statement ran.")
    return lines


def _locks(statements: Sequence[Mapping[str, Any]]) -> list[str]:
    def strength(s: Mapping[str, Any]) -> int:
        return LOCKS.index(level) if (level := lock_level(s["lock"])) else len(LOCKS)

    if not statements:
        return ["None: no statement ran."]
    strongest = min(statements, key=lambda s: (strength(s), -s["seconds"]))
    if strength(strongest) == len(LOCKS):
        return ["None took a lock on the table that keeps others waiting."]
    same = [s for s in statements if strength(s) == strength(strongest)]
    retried = sum(s.get("tries", 1) > 1 for s in statements)
    waits = f"{count(retried, 'statement') if retried else 'none'} had to try again for its lock"
    return [
        f"The strongest lock was {LOCKS[strength(strongest)]} ({count(len(same), 'statement')}, the longest"
        f" {duration(max(s['seconds'] for s in same))}), which blocks {strongest['blocks']}; {waits}."
    ]


def roles(own: Sequence[Entry]) -> list[str]:
    """The database roles that wrote these rows, sign-offs left out."""
    return sorted({e["written_by"] for e in own if e.get("written_by") and e["kind"] != "approval"})


def who(run: Manifest, own: Sequence[Entry]) -> list[str]:
    """By which people and roles, on which server, in which versions."""
    by = roles(own)
    person = f"OS user {run.user} on host {run.host}" if run.user else f"Host {run.host}; the OS user was not noted"
    role = f" as role {', '.join(by)}" if by else ""
    took = f" It took {duration(run.seconds)}." if run.seconds is not None else ""
    versions = ", ".join(
        f"{what} {run.versions[what]}" for what in ("PostgreSQL", "pgvector", "runbook") if what in run.versions
    )
    return [f"{person}{role}, on {run.server or 'a server that was not noted'}.{took}", f"Versions: {versions}."]


def _signed(run: Manifest, found: Newest, own: Sequence[Entry]) -> list[str]:
    given = [e for e in own if e["kind"] == "gate" and e["body"]["name"] == "approval.is_given"]
    # Also those that the parameters named once: taking one out of the file does not free it.
    noted = entry.body["phases"] if (entry := found("waits")) else []
    wanted = sorted({*map(current, noted), *run.parameters.get("approval", {}).get("phases", [])})
    lines = [f"{e['phase']}: {e['body']['found']}." for e in given if e["body"]["verdict"] == "PASS"]
    waiting = [p.name for p in run.phases if p.status == Status.WAITING]
    lines += [f"{', '.join(waiting)} waits for approval, or for its hours."] if waiting else []
    if not lines and wanted:
        lines.append(f"Nothing in this run; {', '.join(wanted)} waits for a sign-off (approval.phases).")
    return lines or ["No step waits for a sign-off (approval.phases names none)."]


def _proved(run: Manifest, found: Newest, gates: Sequence[Mapping[str, Any]]) -> list[str]:
    passed, stopping = sum(g["passed"] for g in gates), sum(len(g["stopping"]) for g in gates)
    unproved = [p.name for p in run.phases if p.status != Status.PASSED]
    lines = [
        f"{count(passed, 'gate')} passed"
        + (f", {stopping} did not." if stopping else "; none failed.")
        + (f" Not proved: {', '.join(unproved)}." if unproved else "")
    ]
    if (entry := found("tuning")) and (point := chosen(entry.body)):
        t = entry.body
        lines.append(
            f"With {point['setting']} = {point['value']} the index finds {point['recall']:.1%} of the exact"
            f" {t['k']} nearest rows in {ms(point['p50_ms'])} at the median; exact search takes"
            f" {ms(t['exact_p50_ms'])} ({_queries(t['queries'])})." + _from(entry)
        )
    else:
        lines.append("No recall: no setting met the target." if entry else "No recall yet: 70_tune measured none.")
    return lines


def _better(found: Newest) -> list[str]:
    compared = systems(found)
    if compared is None or found("shadow") is None:
        return ["Not known yet: no comparison by 80_shadow."]
    measured, entry = compared
    scored = {n: m["nDCG@10"] for n, m in measured.items() if m.get("nDCG@10") is not None}
    if len(scored) < 2:
        return ["Not known: no query is judged; only how many answers the searches have in common."]
    order = sorted(scored, key=lambda n: scored[n], reverse=True)
    judged = entry.body.get("judged")
    rest = ", ".join(f"{name(n)} {scored[n]:.3f}" for n in order[1:])
    on = f"On {number(judged)} judged queries" if judged else "On the judged queries"
    best = f"{on}, {name(order[0])} answers best: nDCG@10 {scored[order[0]]:.3f}; {rest}.{_from(entry)}"
    moves = entry.body.get("moved")
    told = f"{number(moves['better'])} are answered better, {number(moves['worse'])} worse" if moves else ""
    return [best, f"Of these queries {told}, {number(moves['alike'])} alike."] if moves else [best]


def _cost(found: Newest) -> list[str]:
    index, backfill, plan = found("index"), found.backfill(), found("plan")
    disk = [f"{size(index.body['bytes'])} of index"] if index else []
    disk += [f"{size(b)} more of table" for b in [(backfill.body if backfill else {}).get("table_growth_bytes")] if b]
    if not disk:
        return ["Not known yet: no figures of 50_backfill or 60_build_index."]
    wal = (backfill.body if backfill else {}).get("wal_bytes")
    lines = [f"Disk: {', '.join(disk)}" + (f"; the backfill wrote {size(wal)} of WAL." if wal else ".")]
    if index:
        wanted = (plan.body.get("forecast") or {}).get("build_memory_bytes") if plan else None
        build = f"; its build was to need {size(wanted)}" if wanted else ""
        lines.append(f"Memory: the index answers fast while its {size(index.body['bytes'])} are cached{build}.")
    hot = (backfill.body if backfill else {}).get("hot_share")
    said = f" Of the backfill's own updates {hot:.0%} touched no index." if hot is not None else ""
    return [*lines, f"Writes: {write_cost(found)}{said}"]


def write_cost(found: Newest) -> str:
    """What capture and vector index add to a write of the text, by the largest sample of a rehearsal."""
    rehearsal = found("rehearsal")
    measured = [s for s in rehearsal.body.get("samples", ()) if s.get("write_ms")] if rehearsal else []
    if rehearsal is None or not measured:
        return "how much slower they become was not measured; operate/rehearse measures it."
    last = measured[-1]
    return (
        f"an update of a text took {ms(last['write_ms'])} in the server, {ms(last['bare_write_ms'])} without vector"
        f" index and capture, on a sample of {count(last['vectors'], 'row')}.{_from(rehearsal)}"
    )


def accepted(run: Manifest, found: Newest) -> list[str]:
    lines = []
    for key, nothing in ACCEPTING.items():
        section, _, field = key.partition(".")
        value = (run.parameters.get(section) or {}).get(field, nothing)
        if value != nothing:
            lines.append(f"Accepted by {key}: {', '.join(value) if isinstance(value, list) else value}.")
    if run.way == "migrate":
        names = {current(p.name) for p in run.phases}
        if skipped := [p for p in MIGRATE if p not in names]:
            lines.append(f"Not in this run: {', '.join(skipped)}.")
    baseline = found("baseline")
    if baseline and (left := baseline.body.get("left")):
        lines.append(f"{_queries(len(left))} did not fit into queries.baseline_minutes and were left out.")
    return lines or ["Nothing: no parameter lets a gate pass."]


def _rolled_back(run: Manifest, rollback: Sequence[Rollback]) -> tuple[list[str], tuple[str, str], str]:
    if not rollback:
        return ["This run passed nothing that a rollback would remove."], ("phases", "phases"), ""
    first, last = rollback[0], rollback[-1]
    lines = [f"First {short(first.name)} (removes {first.removes}): {first.takes}."]
    if len(rollback) > 1:
        lines.append(f"Back to where it began: {len(rollback)} steps, the last {short(last.name)}.")
    return lines, ("back", "how to roll back"), rollbacks.command(run.params_file, first.name)


def _head(head: str) -> str:
    kept = f"The ledger ended with {head} when this page was made" if head else "The ledger could not be read"
    return f"{kept}; the run's own head is in manifest.json. Keep it elsewhere, and check with --head."


def moved(found: Newest, queries: Mapping[str, str], rows: Mapping[str, str]) -> list[Moved]:
    """The queries that gained most, and those that lost most, as 80_shadow noted them."""
    entry = found("shadow")
    moves = (entry.body.get("moved") or {}) if entry else {}
    return [
        Moved(title, [_move(m, queries, rows) for m in moves[key]], entry.source if entry else "")
        for key, title in (("gains", "Largest gains"), ("losses", "Largest losses"))
        if moves.get(key)
    ]


def _move(m: Mapping[str, Any], queries: Mapping[str, str], rows: Mapping[str, str]) -> tuple[str, str, str, str]:
    """The right answer is that of the search that has it higher up."""
    before, after = (m[side] or (None, "") for side in ("before", "after"))
    key = (after if m["difference"] > 0 else before)[1]
    places = [str(place) if place else "not found" for place, _ in (before, after)]
    return _begin(queries.get(m["query_id"], m["query_id"])), places[0], places[1], _begin(rows.get(key, key))


def _begin(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1].rstrip()}…"
