"""Phase 00: the facts, the risks, the forecast and the plan. It reads, and tries what it rolls back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg

from runbook_lib.backfill import vector_store
from runbook_lib.core import db, row_counts, versions
from runbook_lib.core.display import Table, duration, number, size
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.names import names, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.embeddings import masking
from runbook_lib.indexes import forecast as forecast_module
from runbook_lib.indexes.forecast import Forecast
from runbook_lib.migrate import (
    capacity,
    extension,
    inputs,
    replica_checks,
    statement_statistics,
    table_checks,
    text_lengths,
)
from runbook_lib.migrate.capacity import Room
from runbook_lib.migrate.inputs import input_problems as input_problems
from runbook_lib.params import Params
from runbook_lib.sql import load

if TYPE_CHECKING:
    import pandas

SQL = load("preflight")

# A concurrent build waits for transactions that began before it; five minutes is longer than a page or a report.
OLD_SNAPSHOT_S = 300
SAMPLED_ROWS = 1000
SAMPLED_CHARACTERS = 10_000
SHOWN_STATEMENTS = 5
SHOWN_LETTERS = 200


@dataclass(frozen=True)
class Facts:
    """What there is before anything is changed. Sizes in bytes, ages in seconds; a fact that could not be looked at
    is None, and ``not_seen`` says why."""

    server_version: int
    pgvector_available: str | None
    pgvector_installed: str | None
    rows: int
    rows_are_counted: bool
    rows_with_text: int | None
    partitions: int
    largest_partition: float
    heap_bytes: int
    toast_bytes: int
    indexes_bytes: int
    indexes: tuple[tuple[str, str, int, bool], ...]
    fillfactor: int
    triggers: tuple[str, ...]
    updates_per_s: float
    inserts_per_s: float
    hot_updates_percent: float | None
    dead_rows: int
    row_bytes: int | None
    text_bytes: int | None
    chunks_a_row: float
    sampled_rows: int
    sensitive_rows: Mapping[str, int] | None
    open_transactions: int
    oldest_transaction_s: float | None
    replicas: tuple[str, ...]
    slots: tuple[str, ...]
    room: Room
    settings: Mapping[str, str]
    legacy_statements: tuple[tuple[int, float, str], ...] | None
    not_seen: Mapping[str, str]

    def table(self) -> Table:
        """The facts as a reviewer reads them."""
        how = "counted" if self.rows_are_counted else "estimated by the last ANALYZE"
        hot = "" if self.hot_updates_percent is None else f", {self.hot_updates_percent:.0f} % of them HOT"
        found = [
            ("server", f"PostgreSQL {versions.readable(self.server_version)}"),
            (
                "pgvector",
                f"{self.pgvector_installed or 'not installed'}; offered: {self.pgvector_available or 'none'}",
            ),
            ("rows", f"{number(self.rows)}, {how}"),
            ("rows with text", self._or_why("sample", self._with_text())),
            ("partitions", self._partitions()),
            ("table", f"{size(self.heap_bytes)}, TOAST {size(self.toast_bytes)}, fillfactor {self.fillfactor}"),
            ("indexes", f"{len(self.indexes)}, {size(self.indexes_bytes)}"),
            *(
                (f"index {name}", f"{method}, {size(b)}{'' if ok else ', invalid'}")
                for name, method, b, ok in self.indexes
            ),
            ("triggers", ", ".join(self.triggers) or "none"),
            ("writes a second", f"{number(self.inserts_per_s)} inserts, {number(self.updates_per_s)} updates{hot}"),
            ("dead rows", number(self.dead_rows)),
            ("average row", self._or_why("sample", None if self.row_bytes is None else size(self.row_bytes))),
            ("text, all rows", self._or_why("sample", None if self.text_bytes is None else size(self.text_bytes))),
            *([("chunks", f"about {self.chunks_a_row:.1f} a row")] if self.chunks_a_row > 1 else []),
            ("sensitive data", self._or_why("sample", self._sensitive())),
            ("open transactions", self._or_why("sessions", self._transactions())),
            ("replicas", ", ".join(self.replicas) or "none"),
            ("replication slots", ", ".join(self.slots) or "none"),
            *((f"setting {name}", value) for name, value in self.settings.items()),
            *self._statements(),
            ("free disk", str(self.room.free_disk)),
            ("shared memory", str(self.room.shared_memory)),
        ]
        return Table(("fact", "found"), found)

    def _or_why(self, what: str, value: str | None) -> str:
        if value is None:
            return f"not seen: {self.not_seen[what]}"
        return f"{value} ({self.not_seen[what]})" if what in self.not_seen else value

    def _with_text(self) -> str | None:
        """Those that get a vector; all of them known where the sample is the whole table."""
        if self.rows_with_text is None:
            return None
        about = "" if self.sampled_rows == self.rows else "about "
        return f"{about}{number(self.rows_with_text)}, by {number(self.sampled_rows)} rows sampled; they get a vector"

    def _sensitive(self) -> str | None:
        if self.sensitive_rows is None:
            return None
        some = [f"{kind} in {n}" for kind, n in self.sensitive_rows.items() if n]
        return f"{', '.join(some) or 'no known shape'}, of {number(self.sampled_rows)} rows sampled"

    def _transactions(self) -> str:
        oldest = self.oldest_transaction_s
        return f"{self.open_transactions}" + (f", the oldest for {duration(oldest)}" if oldest is not None else "")

    def _partitions(self) -> str:
        share = f", the largest with {self.largest_partition:.0%} of the rows"
        return f"{number(self.partitions)}{share}" if self.partitions else "none"

    def _statements(self) -> Iterator[tuple[str, str]]:
        if self.legacy_statements is None:
            yield "searches seen", f"not seen: {self.not_seen['statements']}"
        for calls, mean_ms, text in self.legacy_statements or ():
            yield f"search seen {number(calls)} times", f"{duration(mean_ms / 1000)} on average: {text}"

    def to_frame(self) -> pandas.DataFrame:
        """The table as a DataFrame."""
        return self.table().to_frame()

    def __str__(self) -> str:
        return str(self.table())

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _table_name(params: Params) -> str:
    return spelled(params, "table")


def facts(phase: Phase) -> Facts:
    """Looks at table and server. What this role may not see is named with its cause, never guessed.

    Raises BadInput where the table does not exist.
    """
    c, p, table = phase.connection, phase.params, _table_name(phase.params)
    table_checks.require_table(c, p)
    not_seen: dict[str, str] = {}
    shape = db.one(c, SQL["table"], p, table=table)
    whole = row_counts.of(c, p)
    n = whole.n
    sample = _sample(c, p, n, not_seen)
    pgvector = db.one(c, extension.SQL["offered"], p, schema=p.extension.schema_)
    sessions = db.rows(c, SQL["snapshots"], p)
    if hidden := db.one(c, SQL["hidden_sessions"], p)["hidden"]:
        not_seen["sessions"] = f"{hidden} sessions hidden from this role: GRANT pg_read_all_stats to it"
    counted_for_s = max(float(shape["counted_for_s"] or 0), 1.0)
    with_text = [r["has_text"] for r in sample or []]
    text_bytes = [r["text_bytes"] or 0 for r in sample or []]
    row_bytes = [r["row_bytes"] for r in sample or []]
    return Facts(
        server_version=c.info.server_version,
        pgvector_available=pgvector["default_version"],
        pgvector_installed=pgvector["installed"],
        rows=n,
        rows_are_counted=whole.counted,
        rows_with_text=None if sample is None else round(n * sum(with_text) / max(len(sample), 1)),
        partitions=shape["partitions"],
        largest_partition=_largest_partition(shape),
        heap_bytes=shape["heap_bytes"],
        toast_bytes=shape["toast_bytes"],
        indexes_bytes=shape["indexes_bytes"],
        indexes=tuple(
            (r["index"], r["method"], r["bytes"], r["valid"]) for r in db.rows(c, SQL["indexes"], p, table=table)
        ),
        fillfactor=shape["fillfactor"],
        triggers=tuple(r["name"] for r in db.rows(c, SQL["triggers"], p, table=table)),
        updates_per_s=shape["updates"] / counted_for_s,
        inserts_per_s=shape["inserts"] / counted_for_s,
        hot_updates_percent=100 * shape["hot_updates"] / shape["updates"] if shape["updates"] else None,
        dead_rows=shape["dead_rows"],
        row_bytes=None if sample is None else round(sum(row_bytes) / max(len(sample), 1)),
        text_bytes=None if sample is None else round(n * sum(text_bytes) / max(len(sample), 1)),
        chunks_a_row=1.0 if sample is None else text_lengths.chunks_a_row(c, p),
        sampled_rows=len(sample or []),
        sensitive_rows=None if sample is None else masking.count(r["text"] or "" for r in sample),
        open_transactions=len(sessions),
        oldest_transaction_s=float(sessions[0]["age_s"]) if sessions else None,
        replicas=tuple(_replica(r) for r in db.rows(c, SQL["replicas"], p)),
        slots=tuple(capacity.slot(r) for r in db.rows(c, capacity.SQL["slots"], p)),
        room=capacity.look(c, p),
        settings={r["name"]: r["value"] for r in db.rows(c, SQL["settings"], p)},
        legacy_statements=_legacy_statements(c, p, not_seen),
        not_seen=not_seen,
    )


def _sample(connection: db.Connection, params: Params, n: int, not_seen: dict[str, str]) -> list[db.Row] | None:
    query = SQL["sample"].compose(names(params) | {"tablesample": row_counts.some_pages(n, SAMPLED_ROWS)})
    try:
        values = {"longest": SAMPLED_CHARACTERS, "rows": SAMPLED_ROWS}
        return connection.execute(query, values).fetchall()
    except (
        psycopg.errors.InsufficientPrivilege,
        psycopg.errors.UndefinedColumn,
        # Citus samples no pages across shards.
        psycopg.errors.FeatureNotSupported,
    ) as error:
        not_seen["sample"] = str(error).splitlines()[0]
        return None


def _largest_partition(shape: db.Row) -> float:
    """Share of the rows in the largest partition, 0 to 1; all of them where nothing is known."""
    known = shape["partitions"] and shape["estimated_rows"]
    return float(shape["largest_partition_rows"] / shape["estimated_rows"]) if known else 1.0


def _replica(r: db.Row) -> str:
    lag = "" if r["lag_s"] is None else f", {duration(r['lag_s'])} behind"
    return f"{r['name'] or 'unnamed'} ({r['state'] or 'state hidden from this role'}{lag})"


def _legacy_statements(
    connection: db.Connection, params: Params, not_seen: dict[str, str]
) -> tuple[tuple[int, float, str], ...] | None:
    seen = statement_statistics.look(connection, params, params.target.text_columns, SHOWN_STATEMENTS)
    if seen.why:
        not_seen["statements"] = seen.why
        return None
    return tuple((s.calls, s.mean_ms, s.line(SHOWN_LETTERS)) for s in seen.searches)


def _trigram_bytes(found: Facts, connection: db.Connection, params: Params) -> float:
    """Text of a row that inverted indexes hold; one of words counts for less than one of trigrams."""
    indexes = db.rows(connection, SQL["inverted"], params, table=_table_name(params))
    weights = (1.0 if i["of_trigrams"] else forecast_module.WORDS_FOR_TRIGRAMS for i in indexes)
    return sum(weights) * (found.text_bytes or 0) / max(found.rows, 1)


def expected(found: Facts, connection: db.Connection, params: Params, rows: int | None = None) -> Forecast:
    """The forecast from these facts, for all of the table or for so many of its rows."""
    n = found.rows if rows is None else rows
    return forecast_module.forecast(
        # A table of chunks has a row for each.
        round(n * found.chunks_a_row),
        params,
        row_bytes=found.row_bytes or round(found.heap_bytes / max(found.rows, 1)),
        table_bytes=round(found.heap_bytes * n / max(found.rows, 1)),
        indexes=len(found.indexes),
        trigram_bytes=_trigram_bytes(found, connection, params),
        largest_partition=vector_store.of(params).built_at_once(found.largest_partition),
        max_wal_bytes=found.room.max_wal_bytes,
    )


def look(phase: Phase) -> Gates:
    """The gates of 00_preflight: the inputs, and, where these are sound, the risks."""
    checked = inputs.check(phase.connection, phase.params)
    return checked if checked.failed else checked + collect(_risks(phase))


def _risks(phase: Phase) -> Iterator[Gate]:
    connection, params = phase.connection, phase.params
    yield _no_old_snapshot(connection, params)
    yield _no_prepared_transactions(connection, params)
    yield from capacity.gates(connection, params, expected(facts(phase), connection, params))
    yield from replica_checks.gates(connection, params)
    yield from text_lengths.gates(connection, params)


def _no_old_snapshot(connection: db.Connection, params: Params) -> Gate:
    old = [r for r in db.rows(connection, SQL["snapshots"], params) if r["age_s"] >= OLD_SNAPSHOT_S]
    hidden = db.one(connection, SQL["hidden_sessions"], params)
    found = "; ".join(
        f"pid {r['pid']} ({r['role']}, {r['application'] or 'no application name'}, {r['state']}) for"
        f" {duration(r['age_s'])}"
        for r in old
    )
    if not old and hidden["hidden"]:
        found = f"{hidden['hidden']} sessions that {hidden['role']} may not look into"
        do = f"have a superuser run: GRANT pg_read_all_stats TO {hidden['role']};"
    else:
        found, do = found or "none", "wait for them, or end them: SELECT pg_terminate_backend(<pid>);"
    return gate(
        "preflight.no_old_snapshot",
        False if old else None if hidden["hidden"] else True,
        _table_name(params),
        found=found,
        needed=f"no transaction of this database open for {OLD_SNAPSHOT_S} s or longer",
        danger="CREATE INDEX CONCURRENTLY waits for each of them, and dead rows of the backfill cannot be cleaned",
        do=do,
        figures={"oldest_s": max((r["age_s"] for r in old), default=0.0), "hidden_sessions": hidden["hidden"]},
    )


def _no_prepared_transactions(connection: db.Connection, params: Params) -> Gate:
    found = db.rows(connection, SQL["prepared"], params)
    return gate(
        "preflight.no_prepared_transactions",
        not found,
        _table_name(params),
        found="; ".join(f"{r['gid']} of {r['owner']}, for {duration(r['age_s'])}" for r in found) or "none",
        needed="none in this database",
        danger="it holds its locks and its snapshot through restarts, and CREATE INDEX CONCURRENTLY waits for it",
        do="ask its owner, then COMMIT PREPARED or ROLLBACK PREPARED it by its name",
        figures={"prepared": len(found)},
    )


def plan_body(phase: Phase, found: Facts | None = None) -> dict[str, Any]:
    """What this migration will do to this table, by the figures of today: the body of the ledger's row ``plan``."""
    found = found or facts(phase)
    expects = expected(found, phase.connection, phase.params)
    return {
        "fingerprint": phase.params.fingerprint(),
        "server_version": found.server_version,
        "pgvector_available": found.pgvector_available,
        "pgvector_installed": found.pgvector_installed,
        "table_rows": found.rows,
        "rows_with_text": found.rows_with_text,
        "table_bytes": found.heap_bytes + found.toast_bytes,
        "indexes_bytes": found.indexes_bytes,
        "forecast": {
            "index_bytes": expects.index_bytes,
            "build_memory_bytes": expects.build_memory_bytes,
            "table_growth_bytes": expects.table_growth_bytes,
            "staging_bytes": expects.staging_bytes,
            "wal_bytes": expects.wal_bytes,
            "backfill_wal_bytes": expects.backfill_wal_bytes,
            "load_seconds": round(expects.load_seconds, 3),
            "build_seconds": round(expects.build_seconds, 3),
            "backfill_seconds": round(expects.backfill_seconds, 3),
        },
        "params": phase.params.for_record(),
    }


@changes
def take(phase: Phase) -> Forecast:
    """Makes the ledger and writes the plan into it, where the run carries things out; shows the forecast."""
    found = facts(phase)
    if phase.execute:
        phase.ledger.create()
        phase.note("plan", plan_body(phase, found))
    else:
        phase.note_in_plan("plan", plan_body(phase, found))
    return expected(found, phase.connection, phase.params)
