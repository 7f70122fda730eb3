"""Who still reads what the legacy search reads? What the servers have counted, now and at earlier looks.

Counters say how often, not when. Two looks apart do: what has not moved between them was not used between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from runbook_lib.benchmark import replica
from runbook_lib.core import db, versions
from runbook_lib.core.display import duration, number
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import statement_statistics
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("retire")

DAY_S = 86_400
SHOWN = 3
SHOWN_LETTERS = 120
# Once all of pg_stat_statements.max are taken, a twentieth is thrown out: below that share none was, for a while.
CROWDED = 0.95
KIND = "retire_look"


@dataclass(frozen=True)
class Look:
    """Counters of every server that was looked at, added up. Times in seconds since 1970.

    reset_s: since when all of them count reads. scans: of each index. last_s: when each index was last read, where
    the servers keep it; None where they do not. calls: of each statement that searches as legacy does, by its id;
    None where they cannot be seen. calls_reset_s, thrown_out: since when, and how many were lost for want of room;
    None and 0 where the release of pg_stat_statements does not say (before 1.9). all_calls: of every statement, a
    figure a server. crowded: has a server so many statements that some may have been thrown out?
    """

    at_s: float
    reset_s: float
    scans: dict[str, int]
    last_s: dict[str, float | None] | None
    calls: dict[str, int] | None
    calls_reset_s: float | None
    thrown_out: int
    texts: dict[str, str]
    why: str = ""
    all_calls: Sequence[int] = ()
    crowded: bool = False


def look(connection: db.Connection, params: Params) -> Look:
    """What the primary, and the replica where one is given, have counted by now."""
    looks = [_look(params, connection)]
    if replica.is_given(params):
        with replica.connect(connection, params, "usage") as reader:
            looks.append(_look(params, reader))
    return looks[0] if len(looks) == 1 else _together(looks)


def _look(params: Params, connection: db.Connection) -> Look:
    table = spelled(params, "table")
    since = db.one(connection, SQL["counted_since"], params)
    last = None
    if versions.dates_index_scans(connection.info.server_version):
        last = {r["name"]: r["last_s"] for r in db.rows(connection, SQL["last_scans"], params, table=table)}
    seen = statement_statistics.look(connection, params, params.target.text_columns)
    # A role that may not see the text of others' statements sees none of them, and must not take that for silence.
    why = seen.why or statement_statistics.hidden(seen)
    return Look(
        at_s=since["at_s"],
        reset_s=since["reset_s"] or 0.0,
        scans={r["name"]: r["scans"] for r in db.rows(connection, SQL["scans"], params, table=table)},
        last_s=last,
        calls=None if why else {x.id: x.calls for x in seen.searches},
        calls_reset_s=seen.reset_s,
        thrown_out=seen.thrown_out,
        texts={x.id: x.line(SHOWN_LETTERS) for x in seen.searches},
        why=why,
        all_calls=(seen.calls,),
        crowded=seen.entries > CROWDED * seen.most,
    )


def _together(looks: Sequence[Look]) -> Look:
    def summed(each: Sequence[Mapping[str, int]]) -> dict[str, int]:
        return {k: sum(e.get(k, 0) for e in each) for k in {k for e in each for k in e}}

    last: dict[str, float | None] | None = None
    if all(x.last_s is not None for x in looks):
        keys = {k for x in looks for k in x.last_s or {}}
        last = {k: max((v for x in looks if (v := (x.last_s or {}).get(k)) is not None), default=None) for k in keys}
    seen = [x for x in looks if x.calls is not None]
    whole = len(seen) == len(looks)
    return Look(
        at_s=min(x.at_s for x in looks),
        reset_s=max(x.reset_s for x in looks),
        scans=summed([x.scans for x in looks]),
        last_s=last,
        calls=summed([x.calls or {} for x in seen]) if whole else None,
        calls_reset_s=_latest([x.calls_reset_s for x in looks]) if whole else None,
        thrown_out=sum(x.thrown_out for x in looks),
        texts={k: v for x in looks for k, v in x.texts.items()},
        why="; ".join(x.why for x in looks if x.why),
        all_calls=tuple(n for x in looks for n in x.all_calls),
        crowded=any(x.crowded for x in looks),
    )


def _latest(times: Sequence[float | None]) -> float | None:
    known = [t for t in times if t is not None]
    return max(known) if known and len(known) == len(times) else None


def earlier(ledger: Ledger, params: Params, now: Look) -> Look | None:
    """The newest look that is old enough to compare with; None where there is none."""
    if not ledger.exists():
        return None
    before = _cutoff(params, now)
    found = db.rows(ledger.connection, SQL["earlier_look"], params, before=before)
    return Look(**found[0]["body"]) if found else None


def note(phase: Phase, now: Look) -> None:
    """Writes the look into the ledger, for a later one to compare with."""
    phase.note(KIND, asdict(now))


def _cutoff(params: Params, now: Look) -> float:
    return now.at_s - params.retire.unused_days * DAY_S


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _again(params: Params, since_s: float) -> str:
    return f"run this again from {_day(since_s + params.retire.unused_days * DAY_S)} on"


def gates(params: Params, now: Look, before: Look | None, chosen: Sequence[str]) -> Iterator[Gate]:
    """Nobody called a legacy search, and nobody read these indexes, for as long as the parameters ask."""
    yield _no_legacy_call(params, now, before)
    for name in chosen:
        yield _unread(params, now, before, name)


def _no_legacy_call(params: Params, now: Look, before: Look | None) -> Gate:
    holds, found, do = _judge_calls(params, now, before)
    return gate(
        "retire.legacy_is_not_called",
        holds,
        "searches by LIKE, full text or similarity",
        found=found,
        needed=f"no call for {params.retire.unused_days:g} days, as shown by two runs or by the age"
        " of the statistics",
        danger="whoever still sends such a search would read the whole table, again and again",
        do=do,
        figures={"calls": now.calls, "since_s": now.calls_reset_s, "earlier_s": before.at_s if before else None},
    )


def _judge_calls(params: Params, now: Look, before: Look | None) -> tuple[bool | None, str, str]:
    """Verdict, what was found, and what to do."""
    if now.calls is None:
        do = "CREATE EXTENSION pg_stat_statements (it must stand in shared_preload_libraries), and look again later"
        return None, now.why, do
    called = {i: n for i, n in now.calls.items() if n}
    if now.calls_reset_s is None:
        return _judge_without_age(params, now, before, called)
    if now.calls_reset_s > _cutoff(params, now):
        since = f"counted since {_day(now.calls_reset_s)} only"
        if called:
            return False, f"{_said(now, called)}; {since}", "find who sends it, by pg_stat_activity or the log"
        return None, f"no call, but {since}", _again(params, now.calls_reset_s)
    comparable = before is not None and before.calls is not None and before.calls_reset_s == now.calls_reset_s
    if comparable and before is not None:
        more = {i: n - (before.calls or {}).get(i, 0) for i, n in called.items()}
        more = {i: n for i, n in more.items() if n > 0}
        if more:
            do = "find who sends it, by pg_stat_activity or the log"
            return False, f"{_said(now, more)} since the look of {_day(before.at_s)}", do
        if now.thrown_out == before.thrown_out:
            return True, f"no call since the look of {_day(before.at_s)}", ""
    elif not called and not now.thrown_out:
        return True, f"no call since {_day(now.calls_reset_s)}, when counting began", ""
    if now.thrown_out and not called:
        lost = f"no call, but {number(now.thrown_out)} statements were thrown out for want of room"
        return None, lost, f"raise pg_stat_statements.max, and {_again(params, now.at_s)}"
    found = f"{_said(now, called)} since {_day(now.calls_reset_s)}; when, one look does not tell"
    return None, found, f"with execute: true this check is recorded; {_again(params, now.at_s)}"


def _judge_without_age(
    params: Params, now: Look, before: Look | None, called: Mapping[str, int]
) -> tuple[bool | None, str, str]:
    """The same where pg_stat_statements does not say since when it counts: two looks must show that nothing was lost
    between them.
    """
    lost = "nothing to compare with"
    if before is not None and before.calls is not None and before.calls_reset_s is None:
        fewer = any((now.calls or {}).get(i, 0) < n for i, n in before.calls.items())
        fewer |= any(a > b for a, b in zip(before.all_calls, now.all_calls, strict=False))
        lost = "counters were set back since the last look" if fewer else ""
        lost = lost or ("so many statements that some may have been thrown out" if now.crowded else "")
        more = {i: n - before.calls.get(i, 0) for i, n in called.items() if n > before.calls.get(i, 0)}
        if more:
            do = "find who sends it, by pg_stat_activity or the log"
            return False, f"{_said(now, more)} since the look of {_day(before.at_s)}", do
        if not lost:
            return True, f"no call since the look of {_day(before.at_s)}, and no counter was set back", ""
    found = f"{_said(now, called)}; " if called else "no call, but "
    found += f"since when it is counted this release of pg_stat_statements does not say, and there is {lost}"
    do = "ALTER EXTENSION pg_stat_statements UPDATE; on PostgreSQL 13 it does not help: look with execute: true"
    do += f", and {_again(params, now.at_s)}"
    return None, found, do


def _said(now: Look, calls: Mapping[str, int]) -> str:
    some = [f"{number(n)} calls of: {now.texts.get(i, i)}" for i, n in list(calls.items())[:SHOWN]]
    more = len(calls) - SHOWN
    return "; ".join(some) + (f"; and {more} more" if more > 0 else "")


def _unread(params: Params, now: Look, before: Look | None, name: str) -> Gate:
    holds, found, do = _judge_reads(params, now, before, name)
    return gate(
        "retire.index_is_unread",
        holds,
        name,
        found=found,
        needed=f"no read for {params.retire.unused_days:g} days",
        danger="the searches that read it would read the whole table instead",
        do=do,
        figures={"scans": now.scans.get(name), "since_s": now.reset_s},
    )


def _judge_reads(params: Params, now: Look, before: Look | None, name: str) -> tuple[bool | None, str, str]:
    cutoff, scans = _cutoff(params, now), now.scans.get(name, 0)
    find = "find the statement that reads it, by EXPLAIN; take the index out of retire.indexes if it is needed"
    if now.reset_s > cutoff:
        since = f"counted since {_day(now.reset_s)} only"
        if scans:
            return False, f"{number(scans)} scans; {since}", find
        return None, f"no scan, but {since}", _again(params, now.reset_s)
    if now.last_s is not None:
        last = now.last_s.get(name)
        if last is None or last <= cutoff:
            return True, f"last read {_day(last)}" if last else f"not read since {_day(now.reset_s)}", ""
        return False, f"last read {duration(now.at_s - last)} ago, on {_day(last)}", find
    if before is not None and before.reset_s == now.reset_s and name in before.scans:
        more = scans - before.scans[name]
        return not more, f"{number(more)} scans since the look of {_day(before.at_s)}", find if more else ""
    if not scans:
        return True, f"not read since {_day(now.reset_s)}", ""
    found = f"{number(scans)} scans since {_day(now.reset_s)}; when, one look does not tell"
    return None, found, f"with execute: true this check is recorded; {_again(params, now.at_s)}"
