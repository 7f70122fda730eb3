"""How it is migrated: the index, locks, pace, targets, the steps of the cut-over, and the check that stays."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from runbook_lib.params.section import AnyPath, Name, Section

# Binary codes alone find about a third of the nearest rows; fewer candidates than this times k recover little of it.
LEAST_RERANK = 4


class Index(Section):
    """The vector index."""

    method: Literal["hnsw", "ivfflat"] = Field("hnsw", description="HNSW, or IVFFlat as a fallback.")
    storage: Literal["vector", "halfvec", "bit"] = Field(
        "vector",
        description="What the index holds: the column's type, halfvec, or one bit a dimension with re-ranking by the"
        " full vectors.",
    )
    rows: Literal["all", "always"] = Field(
        "all",
        description="Rows in the index: all, or those that target.always lets through, as a partial index (with"
        " vector.layout: column).",
    )
    rerank: int = Field(10, ge=1, le=1000, description="With bit: re-rank this many times k rows.")
    m: int = Field(16, ge=2, le=100, description="HNSW: links per node.")
    ef_construction: int = Field(64, ge=4, le=1000, description="HNSW: candidates while building; at least 2 × m.")
    lists: int | None = Field(None, ge=1, le=32768, description="IVFFlat: lists; by pgvector's rule if unset.")
    maintenance_work_mem_mb: int = Field(256, ge=32, le=1_048_576, description="For the build's session only.")
    parallel_workers: int = Field(2, ge=0, le=64, description="max_parallel_maintenance_workers of the build.")

    @model_validator(mode="before")
    @classmethod
    def prewarm_is_done_by_hand(cls, given: Any) -> Any:
        """Older files may name it. ``false`` asks for nothing, and is passed over."""
        if not isinstance(given, dict) or "prewarm" not in given:
            return given
        if given["prewarm"] is not False:
            raise ValueError(
                "prewarm was removed: delete the key, and warm the cache with pg_prewarm after 60_build_index, as"
                " docs/guide.md says"
            )
        return {key: value for key, value in given.items() if key != "prewarm"}

    @model_validator(mode="after")
    def candidates_cover_links(self) -> Self:
        if self.method == "hnsw" and self.ef_construction < 2 * self.m:
            raise ValueError(f"ef_construction {self.ef_construction} must be at least 2 × m = {2 * self.m}")
        return self

    @model_validator(mode="after")
    def bits_are_ranked_again(self) -> Self:
        if self.storage == "bit" and self.rerank < LEAST_RERANK:
            raise ValueError(
                f"storage: bit needs rerank of {LEAST_RERANK} at least: binary quantization alone ranks too coarsely"
            )
        return self


class Preflight(Section):
    """Facts of a remote server that the runbook cannot see."""

    free_disk_gb: float | None = Field(
        None, ge=0, le=1_000_000, description="Free disk there for data and WAL, from df."
    )
    shared_memory_mb: int | None = Field(None, ge=0, le=16_777_216, description="Size of /dev/shm there, from df.")


class Rehearse(Section):
    """Samples for a rehearsal."""

    sample_percents: list[Annotated[float, Field(gt=0, le=100)]] = Field(
        [1.0, 2.0, 5.0], min_length=1, max_length=10, description="Sample sizes, in percent of the rows."
    )
    most_rows: int = Field(
        100_000,
        ge=100,
        le=10_000_000,
        description="At most this many rows in the largest sample; the others shrink with it.",
    )
    statement_timeout_minutes: float = Field(15.0, gt=0, le=1440, description="Timeout of each statement.")


class Storage(Section):
    """Index formats to compare before choosing ``index.storage``."""

    sample_rows: int = Field(100_000, ge=100, le=100_000_000, description="Rows in the scratch table.")
    where: Literal["sample", "column"] = Field(
        "sample", description="Build on a sample in a scratch table, or on the real column."
    )
    rerank: list[Annotated[int, Field(ge=1, le=1000)]] = Field(
        [4, 10, 40],
        min_length=1,
        description="Re-ranking depths to try, as multiples of k.",
    )
    ivfflat: bool = Field(True, description="Also compare IVFFlat with halfvec.")


class Extension(Section):
    """pgvector on the server."""

    version: str | None = Field(None, description="Version to install or update to; the server's default if unset.")
    schema_: Name = Field("public", alias="schema", description="Schema that pgvector is in, or is installed into.")


class Locks(Section):
    """How long a statement may wait for its lock while others queue behind it."""

    timeout_ms: int = Field(200, ge=10, le=60_000, description="lock_timeout of one try.")
    tries: int = Field(20, ge=1, le=1000, description="Tries before the phase gives up and names the blocker.")
    longest_wait_between_tries_s: float = Field(
        15.0, ge=0.01, le=600, description="The wait between tries doubles up to this."
    )


class Backfill(Section):
    """From staging into the table."""

    strategy: Literal["auto", "page_interleaved", "key_ranges"] = Field(
        "auto", description="How rows are grouped into batches; auto decides from the table's facts."
    )
    workers: int = Field(1, ge=1, le=64, description="Workers in this run, each with its own connection.")
    batch_rows: int = Field(
        500, ge=1, le=100_000, description="Rows in the first transaction; later ones are sized by batch_ms."
    )
    batch_ms: int = Field(60, ge=5, le=60_000, description="Target duration of a transaction.")
    most_batch_rows: int = Field(20_000, ge=1, le=1_000_000, description="At most this many rows per transaction.")
    pause_between_batches_ms: int = Field(0, ge=0, le=60_000, description="Pause after each batch.")
    lease_s: int = Field(60, ge=1, le=86_400, description="A worker that is silent for longer loses its range.")


class Health(Section):
    """When the backfill pauses; checked once a second."""

    replica_lag_mb: int = Field(256, ge=1, description="WAL a standby has not replayed.")
    replica_lag_s: int = Field(30, ge=1, description="Replay lag of a standby.")
    wal_since_checkpoint_percent: int = Field(
        100,
        ge=10,
        le=1000,
        description="WAL since the last checkpoint, in percent of max_wal_size. Below 100 a pause can last for"
        " checkpoint_timeout.",
    )
    wal_mb_per_s: int | None = Field(None, ge=1, description="WAL rate of the whole server; no limit if unset.")
    archiver_backlog_files: int = Field(64, ge=1, description="WAL files waiting for the archiver.")
    pause_for_autovacuum: bool = Field(True, description="Pause while autovacuum works on the table.")
    blocked_session_ms: int = Field(1000, ge=1, description="Longest wait of a session that we block.")
    oldest_snapshot_s: int = Field(300, ge=1, description="Age of the oldest transaction, which keeps dead rows.")
    stop_file: AnyPath | None = Field(None, description="Pause while this file exists.")
    longest_pause_minutes: float = Field(
        60, ge=0, le=10_080, description="After that the phase ends and can be resumed."
    )


class Tune(Section):
    """Target recall, and the settings to try."""

    target_recall: float = Field(0.95, gt=0, le=1, description="recall@k against exact search.")
    queries: int = Field(500, ge=10, le=100_000, description="Queries that measure recall, picked by hash.")
    ef_search: list[Annotated[int, Field(ge=1, le=1000)]] = Field(
        [20, 40, 80, 160, 320, 640, 1000], min_length=1, description="HNSW settings to try."
    )
    probes: list[Annotated[int, Field(ge=1, le=32768)]] = Field(
        [1, 2, 4, 8, 16, 32], min_length=1, description="IVFFlat settings to try."
    )
    max_scan_tuples: list[Annotated[int, Field(ge=1, le=2_147_483_647)]] = Field(
        [20_000, 100_000], min_length=1, description="HNSW: scan limits to try for filtered searches."
    )


class Filters(Section):
    """Filter values that get a partial vector index."""

    partial_indexes: dict[Name, list[Annotated[str, Field(min_length=1)]]] = Field(
        {},
        description="Column: values (as text). If empty, the values that 70_tune found slow or below the target.",
    )
    most_indexes: int = Field(
        4, ge=1, le=100, description="At most this many indexes; for more values, partition instead."
    )
    smallest_share: float = Field(
        0.01, ge=0, le=1, description="Share of the rows that an unlisted value must reach."
    )
    slow_ms: float = Field(5.0, gt=0, le=60_000, description="p50 above which a filter counts as slow.")
    smallest_gain: float = Field(1.5, gt=0, le=1000, description="Speed-up that a value needs to keep its index.")


class Partitioning(Section):
    """Turning an ordinary table into a partitioned one."""

    column: Name | None = Field(None, description="Filter column to partition by.")
    method: Literal["list", "hash"] = Field(
        "list", description="list: one partition per value and one for the rest; hash: a fixed number."
    )
    smallest_share: float = Field(
        0.01, ge=0.0001, le=1, description="list: share of the rows that a value must reach for its own partition."
    )
    most_partitions: int = Field(
        50, ge=1, le=1000, description="list: at most this many values with their own partition."
    )
    hash_partitions: int = Field(8, ge=2, le=1000, description="hash: number of partitions.")
    accept_wider_key: bool = Field(
        False,
        description="The primary key becomes (key, column); only its sequence then keeps the key unique.",
    )
    most_rows_in_swap: int = Field(
        500, ge=1, le=100_000, description="Changes that may remain for the swap, which locks the table."
    )
    longest_catch_up_minutes: float = Field(
        60,
        gt=0,
        le=10_080,
        description="Limit for catching up with changes; after that the phase ends and can be resumed.",
    )


class Shadow(Section):
    """Live calls answered by both searches; both answers are logged, without texts."""

    sample_percent: float = Field(
        0, ge=0, le=100, description="Share of the calls of search_<target>_shadow; 0 creates no such function."
    )
    calls_per_minute: int = Field(60, ge=1, le=100_000, description="At most this many sampled calls a minute.")


class CutOver(Section):
    """How reads move."""

    route: Literal["vector", "hybrid"] = Field("vector", description="Route that answers afterwards.")
    share_steps_percent: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        [10, 100],
        min_length=1,
        description="Shares of calls to move, in steps; the last is 100.",
    )
    largest_relevance_loss: float = Field(0.0, ge=0, le=1, description="nDCG@10 that the new route may lose.")
    largest_slowdown: float = Field(
        1.0, ge=0.1, le=1000, description="p95 allowed for the new route, × legacy's; 5 ms more are noise."
    )
    accept_unjudged: bool = Field(False, description="Move reads without any judgements.")
    calls_per_step: int = Field(200, ge=10, le=1_000_000, description="Calls that judge each step.")
    hold_s: float = Field(0, ge=0, le=604_800, description="Seconds to spread a step's calls over.")
    smallest_overlap: float = Field(
        0.9, ge=0, le=1, description="Share of a step's answers that must match 80_shadow."
    )

    @field_validator("share_steps_percent")
    @classmethod
    def rises_to_all(cls, value: list[int]) -> list[int]:
        if value != sorted(set(value)) or value[-1] != 100:
            raise ValueError("shares must rise and end at 100")
        return value


class ModelChange(Section):
    """A second target that takes over the search function with another model or dimension."""

    replaces_params: AnyPath | None = Field(
        None, description="Params file of the target that it replaces, on the same table."
    )
    tell_apart: Literal["dimension", "setting"] = Field(
        "dimension",
        description="How a call tells which model made its vector: its dimension or, if both are equal, the session"
        " setting `<ledger schema>.<replaced target>`.",
    )
    quiet_hours: float = Field(
        24, ge=0, le=10_000, description="Hours without a search of the old vectors before they may be retired."
    )


class Retire(Section):
    """When the legacy search may go, and what goes with it."""

    unused_days: float = Field(
        30, ge=0, le=3650, description="Days without a legacy search or a read of its indexes."
    )
    indexes: list[Name] = Field(
        [], description="Indexes to drop; by default those that only LIKE or full-text search can use."
    )
    remove_capture: bool = Field(
        False, description="Also remove staging, queue and triggers, if texts never change any more."
    )
    drop_fulltext_column: bool = Field(
        False, description="Also drop search.fulltext_column, if it is generated and hybrid does not need it."
    )
    accept_unseen_standbys: bool = Field(
        False, description="Proceed although a connected standby's reads are unknown."
    )


class Watch(Section):
    """What the recurring check tolerates."""

    largest_recall_loss: float = Field(0.02, ge=0, le=1, description="Recall below tune.target_recall.")
    largest_relevance_loss: float = Field(0.02, ge=0, le=1, description="nDCG@10 below what 80_shadow recorded.")
    oldest_queued_s: float = Field(3600, gt=0, description="Age of the oldest change without a vector.")
    dead_rows_percent: float = Field(20, gt=0, le=100, description="Dead rows of the table.")
    index_growth: float = Field(2.0, ge=1, description="Index size, as a multiple of the forecast.")
    list_unevenness: float = Field(
        4.0, ge=1, description="IVFFlat: size of a row's list, as a multiple of the average."
    )
    queries: int = Field(50, ge=10, le=10_000, description="Queries, and as many rows, that measure recall.")
    judged: int = Field(200, ge=10, le=100_000, description="Judged queries that measure relevance.")
    count_up_to_rows: int = Field(200_000, ge=1000, description="Above this, missing and stale rows are sampled.")
