"""How it is migrated: the index, locks, pace, targets, the steps of the cut-over, and the check that stays."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from runbook_lib.params.section import AnyPath, Name, Section

# Binary codes alone find about a third of the nearest rows; fewer candidates than this times k mend little of it.
LEAST_RERANK = 4


class Index(Section):
    """The vector index."""

    method: Literal["hnsw", "ivfflat"] = Field("hnsw", description="HNSW, or IVFFlat as the fallback.")
    storage: Literal["vector", "halfvec", "bit"] = Field(
        "vector",
        description="What the index holds: the column as it is, its two-byte numbers, or a bit a dimension, whose"
        " nearest rows are sorted again by the full vectors.",
    )
    rerank: int = Field(
        10, ge=1, le=1000, description="Storage bit: so many times k rows are sorted again by the full vectors."
    )
    m: int = Field(16, ge=2, le=100, description="HNSW: links a node.")
    ef_construction: int = Field(64, ge=4, le=1000, description="HNSW: candidates while building; at least 2 × m.")
    lists: int | None = Field(None, ge=1, le=32768, description="IVFFlat: lists; by pgvector's rule if not given.")
    maintenance_work_mem_mb: int = Field(256, ge=32, le=1_048_576, description="For the build's session only.")
    parallel_workers: int = Field(2, ge=0, le=64, description="max_parallel_maintenance_workers for the build.")
    prewarm: bool = Field(
        False, description="Read the finished index into shared_buffers, as far as they hold it, with pg_prewarm."
    )

    @model_validator(mode="after")
    def candidates_cover_links(self) -> Self:
        if self.method == "hnsw" and self.ef_construction < 2 * self.m:
            raise ValueError(f"ef_construction {self.ef_construction} must be at least 2 × m = {2 * self.m}")
        return self

    @model_validator(mode="after")
    def bits_are_ranked_again(self) -> Self:
        if self.storage == "bit" and self.rerank < LEAST_RERANK:
            raise ValueError(f"storage: bit needs rerank of {LEAST_RERANK} at least: bits alone rank too coarsely")
        return self


class Preflight(Section):
    """What the runbook cannot see of a server on another machine, stated by who can."""

    free_disk_gb: float | None = Field(
        None, ge=0, le=1_000_000, description="Free disk for data and WAL on the server, as df says there."
    )
    shared_memory_mb: int | None = Field(
        None, ge=0, le=16_777_216, description="Size of /dev/shm where the server runs, as df says there."
    )


class Rehearse(Section):
    """Samples that the migration is rehearsed on."""

    sample_percents: list[Annotated[float, Field(gt=0, le=100)]] = Field(
        [1.0, 2.0, 5.0], min_length=1, max_length=10, description="Samples, in per cent of the table's rows."
    )
    most_rows: int = Field(
        100_000, ge=100, le=10_000_000, description="Rows of the largest sample at most; the others shrink with it."
    )
    server: Literal["target", "embedded"] = Field(
        "target",
        description="Where: in a schema of its own of the target's database, or on an embedded PostgreSQL beside"
        " this process, which only reads a sample from the target; its times are those of this machine.",
    )
    statement_timeout_minutes: float = Field(
        15.0, gt=0, le=1440, description="A statement of the rehearsal that takes longer is cancelled."
    )


class Storage(Section):
    """What an index could hold, compared on the table's own rows before ``index.storage`` is chosen."""

    sample_rows: int = Field(
        100_000, ge=100, le=100_000_000, description="Rows of the scratch table; all rows where there are fewer."
    )
    where: Literal["sample", "column"] = Field(
        "sample", description="Build on a scratch table with a sample of the vectors, or on the real column."
    )
    rerank: list[Annotated[int, Field(ge=1, le=1000)]] = Field(
        [4, 10, 40],
        min_length=1,
        description="Where the index only finds candidates: so many times k are sorted again; depths to try.",
    )
    ivfflat: bool = Field(True, description="Compare IVFFlat with halfvec too.")


class Extension(Section):
    """pgvector on the server."""

    version: str | None = Field(
        None, description="Release to install or update to; the server's default if not given."
    )
    schema_: Name = Field(
        "public", alias="schema", description="Schema of pgvector: where it is, or where CREATE EXTENSION puts it."
    )


class Locks(Section):
    """How long a statement that changes something may stand in the way of others."""

    timeout_ms: int = Field(200, ge=10, le=60_000, description="lock_timeout of one try.")
    tries: int = Field(20, ge=1, le=1000, description="Tries before the phase gives up and names the blocker.")
    longest_wait_between_tries_s: float = Field(15.0, ge=0.01, le=600, description="Waits double up to this.")


class Backfill(Section):
    """Staging to table."""

    strategy: Literal["auto", "page_interleaved", "key_ranges"] = Field(
        "auto", description="How the rows are divided into batches; auto picks from the table's own facts."
    )
    workers: int = Field(1, ge=1, le=64, description="Workers of this run, each with a connection of its own.")
    batch_rows: int = Field(500, ge=1, le=100_000, description="Rows of the first transaction; then time decides.")
    batch_ms: int = Field(60, ge=5, le=60_000, description="Time that a transaction should take.")
    most_batch_rows: int = Field(20_000, ge=1, le=1_000_000, description="Rows of one transaction at most.")
    pause_between_batches_ms: int = Field(0, ge=0, le=60_000, description="Rest after each batch.")
    lease_s: int = Field(60, ge=1, le=86_400, description="A worker that is silent for longer loses its window.")


class Health(Section):
    """When the backfill pauses; each limit is looked at once a second."""

    replica_lag_mb: int = Field(256, ge=1, description="WAL that a standby has not replayed.")
    replica_lag_s: int = Field(30, ge=1, description="Time by which a standby's replay is behind.")
    wal_since_checkpoint_percent: int = Field(
        90, ge=10, le=1000, description="WAL since the last checkpoint, of max_wal_size."
    )
    wal_mb_per_s: int | None = Field(None, ge=1, description="WAL of the whole server; no limit if not given.")
    archiver_backlog_files: int = Field(64, ge=1, description="WAL files that wait for the archiver.")
    pause_for_autovacuum: bool = Field(True, description="Pause while autovacuum works on the table.")
    blocked_session_ms: int = Field(1000, ge=1, description="How long another session waits for one of ours.")
    oldest_snapshot_s: int = Field(300, ge=1, description="Age of the oldest transaction; dead rows stay for it.")
    stop_file: AnyPath | None = Field(None, description="While this file is there, the backfill pauses.")
    longest_pause_minutes: float = Field(60, ge=0, le=10_080, description="After that the phase ends, resumable.")


class Tune(Section):
    """Recall and the setting that reaches it."""

    target_recall: float = Field(0.95, gt=0, le=1, description="recall@k against exact search.")
    queries: int = Field(500, ge=10, le=100_000, description="Queries that measure recall, chosen by hash.")
    ef_search: list[Annotated[int, Field(ge=1, le=1000)]] = Field(
        [20, 40, 80, 160, 320, 640], min_length=1, description="HNSW settings to try."
    )
    probes: list[Annotated[int, Field(ge=1, le=32768)]] = Field(
        [1, 2, 4, 8, 16, 32], min_length=1, description="IVFFlat settings to try."
    )
    max_scan_tuples: list[Annotated[int, Field(ge=1, le=2_147_483_647)]] = Field(
        [20_000, 100_000], min_length=1, description="HNSW: rows that a filtered search may scan; settings to try."
    )


class Filters(Section):
    """Values of a filter that get a vector index of their own."""

    partial_indexes: dict[Name, list[Annotated[str, Field(min_length=1)]]] = Field(
        {},
        description="Filter column: values, as text, that get an index of their own; where empty, the values of the"
        " classes that 70_tune found slow or below the target.",
    )
    most_indexes: int = Field(4, ge=1, le=100, description="Indexes at most; more values call for partitions.")
    smallest_share: float = Field(
        0.01, ge=0, le=1, description="Share of the rows below which a value gets none unless it is named."
    )
    slow_ms: float = Field(
        5.0, gt=0, le=60_000, description="p50 above which a class that reaches the target is slow."
    )
    smallest_gain: float = Field(
        1.5, gt=0, le=1000, description="Times faster than before that a value must become to keep its index."
    )


class Partitioning(Section):
    """An ordinary table that becomes a partitioned one."""

    column: Name | None = Field(None, description="Filter by whose values the table is divided; none if not given.")
    method: Literal["list", "hash"] = Field(
        "list", description="A partition a value and one for the rest, or so many partitions by hash."
    )
    smallest_share: float = Field(
        0.01, ge=0.0001, le=1, description="list: share of the rows from which on a value has its own partition."
    )
    most_partitions: int = Field(50, ge=1, le=1000, description="list: values with a partition of their own at most.")
    hash_partitions: int = Field(8, ge=2, le=1000, description="hash: partitions.")
    accept_wider_key: bool = Field(
        False,
        description="The primary key becomes key and column: nothing but its sequence keeps the key alone unique.",
    )
    most_rows_in_swap: int = Field(
        500, ge=1, le=100_000, description="Changes that may be left for the moment when everybody waits."
    )
    longest_catch_up_minutes: float = Field(
        60,
        gt=0,
        le=10_080,
        description="After that the phase ends, resumable: changes come faster than they are copied.",
    )


class Shadow(Section):
    """Live calls that are answered by both searches; both answers are logged, none of the texts."""

    sample_percent: float = Field(
        0, ge=0, le=100, description="Share of the calls of search_<target>_shadow; 0 makes no such function."
    )
    calls_per_minute: int = Field(60, ge=1, le=100_000, description="Never more sampled calls a minute than this.")


class CutOver(Section):
    """Where reads go in the end."""

    route: Literal["vector", "hybrid"] = Field("vector", description="The route that answers after cut-over.")
    share_steps_percent: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        [10, 100],
        min_length=1,
        description="Shares of calls moved, one step after the other; the last is 100.",
    )
    largest_relevance_loss: float = Field(0.0, ge=0, le=1, description="nDCG@10 that the new route may lose.")
    largest_slowdown: float = Field(
        1.0, ge=0.1, le=1000, description="p95 of the new route, as a multiple of legacy's, that users may wait."
    )
    accept_unjudged: bool = Field(False, description="Move reads without any judgements; say so in the open.")
    calls_per_step: int = Field(200, ge=10, le=1_000_000, description="Calls that judge each step.")
    hold_s: float = Field(0, ge=0, le=604_800, description="Seconds over which the calls of a step are spread.")
    smallest_overlap: float = Field(
        0.9, ge=0, le=1, description="Share of a step's answers that must be those of 80_shadow."
    )

    @field_validator("share_steps_percent")
    @classmethod
    def rises_to_all(cls, value: list[int]) -> list[int]:
        if value != sorted(set(value)) or value[-1] != 100:
            raise ValueError("shares must rise and end at 100")
        return value


class ModelChange(Section):
    """Another model or dimension for a table that was migrated before: this target takes over the other's search."""

    replaces_params: AnyPath | None = Field(
        None, description="Params file of the target, on the same table, whose search function this one takes over."
    )
    tell_apart: Literal["dimension", "setting"] = Field(
        "dimension",
        description="How a call says which model made its vector: by its dimension, or, where both have the same, by"
        " the session's setting `<ledger schema>.<replaced target>`.",
    )
    quiet_hours: float = Field(
        24, ge=0, le=10_000, description="Hours without a search in the old vectors before they may be retired."
    )


class Retire(Section):
    """When the legacy search may go, and what goes with it."""

    unused_days: float = Field(
        30, ge=0, le=3650, description="Days for which nobody called a legacy search or read one of its indexes."
    )
    indexes: list[Name] = Field(
        [], description="Indexes to drop; those that only a search by LIKE or full text can read if not given."
    )
    remove_capture: bool = Field(
        False, description="Remove staging, queue and triggers too: for texts that never change any more."
    )
    drop_fulltext_column: bool = Field(
        False, description="Drop search.fulltext_column too, where it is generated and hybrid does not need it."
    )
    accept_unseen_standbys: bool = Field(
        False, description="Go on though a standby is connected whose reads nobody looked at; say so in the open."
    )


class Watch(Section):
    """What the check that stays tolerates."""

    largest_recall_loss: float = Field(0.02, ge=0, le=1, description="Recall below tune.target_recall.")
    largest_relevance_loss: float = Field(0.02, ge=0, le=1, description="nDCG@10 below what 80_shadow recorded.")
    oldest_queued_s: float = Field(3600, gt=0, description="Age of the oldest change that still waits for a vector.")
    dead_rows_percent: float = Field(20, gt=0, le=100, description="Dead rows of all rows of the table.")
    index_growth: float = Field(2.0, ge=1, description="Index bytes as a multiple of the forecast for its rows.")
    list_unevenness: float = Field(
        4.0, ge=1, description="IVFFlat: rows of the list that a row lies in, as a multiple of an even list."
    )
    queries: int = Field(50, ge=10, le=10_000, description="Queries, and as many rows, that measure recall.")
    judged: int = Field(200, ge=10, le=100_000, description="Judged queries that measure relevance.")
    count_up_to_rows: int = Field(200_000, ge=1000, description="Above it, missing and stale rows are sampled.")
