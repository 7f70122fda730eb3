"""One YAML file per target, typed and checked whole before anything starts."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from runbook_lib.gates import BadInput, Gate, Verdict
from runbook_lib.phases import MIGRATE, READS_ONLY, UNDO

Name = Annotated[str, Field(min_length=1, max_length=63)]
# YAML has no paths: these alone are made from text; no other value changes its type.
AnyPath = Annotated[Path, Strict(False)]
Minutes = Annotated[float, Field(gt=0, le=100_000)]
ShortName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]

# pgvector's limits for a column with an index on it; README of pgvector, "Indexing".
MAX_INDEXED_DIMENSION = {"vector": 2000, "halfvec": 4000}

# In run.phase_timeout_minutes: the phases that are not named.
EVERY_PHASE = "every_phase"
# How a file of vectors tells its format.
FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".arrows": "arrow",
    ".ipc": "arrow",
    ".npy": "npy",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}
# What changes how vectors are fetched, but not which vectors they are.
NOT_OF_THE_MODEL = {
    "batch_rows",
    "request_texts",
    "request_timeout_s",
    "request_tries",
    "parallel_requests",
    "api_key_env",
    "accept_refused_rows",
    "refresh_tries",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Connection(Section):
    """Where the server is. Holds names only: a secret written here would reach every record."""

    dsn_env: str | None = Field(None, description="Name of the environment variable that holds the DSN.")
    service: str | None = Field(None, description="Name of a service in pg_service.conf.")
    passfile: str | None = Field(None, description="Path of a password file, used beside service or dsn_env.")

    @model_validator(mode="after")
    def one_way_in(self) -> Self:
        if (self.dsn_env is None) == (self.service is None):
            raise ValueError("give exactly one of dsn_env and service")
        return self

    @field_validator("dsn_env")
    @classmethod
    def is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.replace("_", "").isalnum():
            raise ValueError("names an environment variable; the DSN itself must not stand in this file")
        return value


class Target(Section):
    """The table being migrated."""

    name: ShortName = Field(description="Names the ledger's rows, the staging table and, by default, the function.")
    schema_: Name = Field("public", alias="schema", description="Schema of the table.")
    table: Name = Field(description="The table as PostgreSQL spells it, without quotes.")
    key: Name = Field(description="Primary key or NOT NULL unique column; bigint, integer, uuid or text.")
    text_columns: list[Name] = Field(min_length=1, description="Columns whose text is embedded, in this order.")
    filters: list[Name] = Field([], description="Columns that the application filters by, with equality.")


class Vector(Section):
    """The column to add."""

    column: Name = Field("embedding", description="Name of the new column.")
    type: Literal["vector", "halfvec"] = Field("vector", description="pgvector type: 4 or 2 bytes a dimension.")
    dimension: int = Field(ge=1, description="Dimensions of every vector.")
    distance: Literal["cosine", "l2", "inner_product"] = Field("cosine", description="What the model was made for.")
    layout: Literal["column", "side_table"] = Field(
        "column", description="A column of the table, or a table of its own with one row a key, beside it."
    )

    @model_validator(mode="after")
    def within_pgvector(self) -> Self:
        limit = MAX_INDEXED_DIMENSION[self.type]
        if self.dimension > limit:
            way_out = "type: halfvec allows 4000" if self.dimension <= 4000 else "use a model with fewer dimensions"
            raise ValueError(f"dimension {self.dimension} cannot be indexed: {self.type} allows {limit}; {way_out}")
        return self


class Embeddings(Section):
    """Where the vectors come from."""

    source: Literal["wordllama", "callable", "http", "file", "table"] = Field(
        description="A packaged model, module:function, an HTTP endpoint, or vectors in a file or table."
    )
    callable: str | None = Field(None, pattern=r"^[\w.]+:\w+$", description="module:function from texts to vectors.")
    file: AnyPath | None = Field(
        None,
        description="File with the key column under its own name, and `embedding`; `text_hash` (hex of the first 16"
        " bytes of the text's SHA-256) or `text`, if there, keeps its vectors from texts changed since.",
    )
    format: Literal["parquet", "arrow", "npy", "jsonl", "csv"] | None = Field(
        None, description="Format of the file; by its suffix if not given."
    )
    ids_file: AnyPath | None = Field(
        None, description="For an .npy file: the keys of its rows, an .npy file too or text with a key a line."
    )
    table: str | None = Field(
        None,
        pattern=r"^[^.]+\.[^.]+$",
        description="schema.table with the key column, indexed, and `embedding`: vector, halfvec or an array;"
        " `text_hash` or `text` as in a file.",
    )
    url: str | None = Field(
        None, pattern=r"^https?://\S+$", description="Address of an OpenAI-compatible endpoint, …/v1/embeddings."
    )
    model: str | None = Field(None, description="Name of the endpoint's model.")
    api_key_env: str | None = Field(
        None,
        pattern=r"^\w+$",
        description="Environment variable that holds the endpoint's key; the key never stands here.",
    )
    send_dimensions: bool = Field(False, description="Ask the endpoint for vector.dimension dimensions.")
    request_texts: int = Field(64, ge=1, le=2048, description="Texts of one request.")
    request_timeout_s: float = Field(60.0, gt=0, le=3600, description="Longest wait for one answer.")
    request_tries: int = Field(
        6, ge=1, le=100, description="Tries of one request, after 429, 5xx, a timeout or a lost connection."
    )
    parallel_requests: int = Field(4, ge=1, le=64, description="Requests under way at once.")
    batch_rows: int | None = Field(
        None,
        ge=1,
        le=50_000,
        description="Rows embedded and copied in one transaction; 1000 from a model, 5000 from a file or table.",
    )
    accept_refused_rows: int = Field(
        0,
        ge=0,
        description="Rows of a file or table that may be refused (key unknown or twice, older text, unsound vector)"
        " without failing the gate, where every row with text has its vector all the same.",
    )
    refresh_tries: int = Field(
        3, ge=1, le=100, description="Tries to embed a changed row before it is set aside with its error."
    )

    @model_validator(mode="after")
    def source_is_complete(self) -> Self:
        for source, key in (("callable", "callable"), ("file", "file"), ("table", "table"), ("http", "url")):
            given = getattr(self, key) is not None
            if given != (self.source == source):
                raise ValueError(f"source: {self.source} and {key}: {'given' if given else 'missing'} do not fit")
        if (self.model is not None) != (self.source == "http"):
            raise ValueError("source: http and model: name the endpoint's model, and only there")
        if self.file is not None and self.file_format is None:
            raise ValueError(f"format: is needed, since {self.file.name} does not tell by its suffix")
        if (self.ids_file is not None) != (self.file_format == "npy"):
            raise ValueError("ids_file: is needed for an .npy file, and only there")
        return self

    @property
    def file_format(self) -> str | None:
        """The format of the file, as given or by its suffix; None where neither tells."""
        return self.format or (FORMATS.get(self.file.suffix.lower()) if self.file else None)

    @property
    def has_model(self) -> bool:
        """Can a text that is new today be embedded?"""
        return self.source not in ("file", "table")

    @property
    def rows_a_batch(self) -> int:
        """Rows of one transaction. A packed COPY gains up to 5000 rows; a model's batch is work lost by a stop."""
        return self.batch_rows or (1000 if self.has_model else 5000)


class Masking(Section):
    """What is taken out of a text before it leaves for the model."""

    rules: list[Literal["email", "phone", "card", "iban", "ip", "token"]] = Field(
        [], description="Shapes replaced by placeholders such as <email>."
    )
    patterns: dict[ShortName, str] = Field(
        {}, description="Own rules: a name, which becomes the placeholder, and a regular expression."
    )
    named_entities: bool = Field(
        False, description="Names of people and places too, through presidio-analyzer (extra `masking`)."
    )
    phone_region: str | None = Field(
        None, pattern=r"^[A-Z]{2}$", description="Country of phone numbers without +; only those with + if not given."
    )

    @field_validator("patterns")
    @classmethod
    def patterns_compile(cls, value: dict[str, str]) -> dict[str, str]:
        for name, pattern in value.items():
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name} is no regular expression: {error}") from None
            if compiled.search(""):
                raise ValueError(f"{name} matches where there is nothing, so it would mask every place of a text")
        return value


class Legacy(Section):
    """The search of today."""

    query: str = Field(
        description="The statement of today, best answer first; :query and :k stand for the text and the number"
        " of rows wanted, :<filter> for a filter's value or NULL. It must return the key column."
    )

    @field_validator("query")
    @classmethod
    def has_placeholders(cls, value: str) -> str:
        missing = [p for p in (":query", ":k") if p not in value]
        if missing:
            raise ValueError(f"the statement does not mention {' and '.join(missing)}")
        return value.strip().rstrip(";")


class Search(Section):
    """The function that the application calls."""

    function: Name | None = Field(None, description="Its name, in the table's schema; search_<target> if not given.")
    grant_to: list[Name] = Field([], description="Roles that may call the function.")
    fulltext_column: Name | None = Field(None, description="A tsvector column; the hybrid route needs one.")
    fulltext_config: Name = Field("english", description="Text search configuration of that column.")
    hybrid_candidates: int = Field(100, ge=10, le=1000, description="Rows that each half of hybrid contributes.")
    mode: Literal["function", "application"] = Field(
        "function", description="Who holds the new query: the search function, or the application in its own SQL."
    )
    application_query: str | None = Field(
        None,
        description="mode application: the statement that the application will send, whose plan is proved; :query,"
        " :embedding, :k and :<filter> stand for its values.",
    )

    @model_validator(mode="after")
    def application_gives_its_query(self) -> Self:
        if self.mode == "application" and ":embedding" not in (self.application_query or ""):
            raise ValueError("mode: application needs application_query, a statement that mentions :embedding")
        return self


class Queries(Section):
    """Representative queries, and judgements where there are any."""

    file: AnyPath = Field(description='JSON lines: {"query_id": …, "text": …}.')
    judgements: AnyPath | None = Field(None, description='JSON lines: {"query_id": …, "key": …, "relevance": …}.')
    embeddings: AnyPath | None = Field(
        None,
        description="Vectors of these queries, made by the model that made the file or table: Parquet, Arrow, JSON"
        " lines or CSV with `query_id` and `embedding`.",
    )
    k: int = Field(10, ge=1, le=100, description="Answers that the application shows.")
    sample: int = Field(200, ge=10, le=10_000, description="Queries that are timed and compared, chosen by hash.")
    judged_sample: int = Field(
        1000, ge=10, le=100_000, description="Judged queries that measure relevance, likewise."
    )


class Index(Section):
    """The vector index."""

    method: Literal["hnsw", "ivfflat"] = Field("hnsw", description="HNSW, or IVFFlat as the fallback.")
    m: int = Field(16, ge=2, le=100, description="HNSW: links a node.")
    ef_construction: int = Field(64, ge=4, le=1000, description="HNSW: candidates while building; at least 2 × m.")
    lists: int | None = Field(None, ge=1, le=32768, description="IVFFlat: lists; by pgvector's rule if not given.")
    maintenance_work_mem_mb: int = Field(256, ge=32, le=1_048_576, description="For the build's session only.")
    parallel_workers: int = Field(2, ge=0, le=64, description="max_parallel_maintenance_workers for the build.")

    @model_validator(mode="after")
    def candidates_cover_links(self) -> Self:
        if self.method == "hnsw" and self.ef_construction < 2 * self.m:
            raise ValueError(f"ef_construction {self.ef_construction} must be at least 2 × m = {2 * self.m}")
        return self


class Extension(Section):
    """pgvector on the server."""

    version: str | None = Field(
        None, description="Release to install or update to; the server's default if not given."
    )
    schema_: Name = Field(
        "public", alias="schema", description="Schema for CREATE EXTENSION, where it is not there yet."
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
        [20, 40, 80, 160, 320], min_length=1, description="HNSW settings to try."
    )
    probes: list[Annotated[int, Field(ge=1, le=32768)]] = Field(
        [1, 2, 4, 8, 16, 32], min_length=1, description="IVFFlat settings to try."
    )
    max_scan_tuples: list[Annotated[int, Field(ge=1, le=2_147_483_647)]] = Field(
        [20_000, 100_000], min_length=1, description="HNSW: rows that a filtered search may scan; settings to try."
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


class Watch(Section):
    """What the check that stays tolerates."""

    largest_recall_loss: float = Field(0.02, ge=0, le=1, description="Recall below tune.target_recall.")
    largest_relevance_loss: float = Field(0.02, ge=0, le=1, description="nDCG@10 below what 80_shadow recorded.")
    oldest_queued_s: float = Field(3600, gt=0, description="Age of the oldest change that still waits for a vector.")
    dead_rows_percent: float = Field(20, gt=0, le=100, description="Dead rows of all rows of the table.")
    index_growth: float = Field(2.0, ge=1, description="Index bytes as a multiple of the forecast for its rows.")
    queries: int = Field(50, ge=10, le=10_000, description="Queries, and as many rows, that measure recall.")
    judged: int = Field(200, ge=10, le=100_000, description="Judged queries that measure relevance.")
    count_up_to_rows: int = Field(200_000, ge=1000, description="Above it, missing and stale rows are sampled.")


class Approval(Section):
    """Phases that wait for a second person."""

    phases: list[str] = Field([], description="Phases that wait for `runbook approve` by another database user.")

    @field_validator("phases")
    @classmethod
    def can_wait(cls, value: list[str]) -> list[str]:
        # A way back never waits, and preflight changes nothing.
        _require_known(value, [p for p in MIGRATE if p != READS_ONLY])
        return value


def _require_known(given: Iterable[str], known: Sequence[str]) -> None:
    """A mistyped phase would never wait, or never end: it must not pass for a setting."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise ValueError(f"{name}: " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"))


def _for_every_phase(value: Any) -> Any:
    return {EVERY_PHASE: value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class Run(Section):
    """When phases may run, and for how long."""

    phase_timeout_minutes: Annotated[dict[str, Minutes], BeforeValidator(_for_every_phase)] = Field(
        {}, description="A phase that takes longer is interrupted: one number for every phase, or phase: number."
    )
    window: str | None = Field(
        None,
        pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$",
        description='Phases that change something start, and long ones go on, only in these hours: "22:00-05:00".',
    )
    time_zone: str = Field("UTC", description="Time zone of the window, for instance Europe/Berlin.")
    outside_window: Literal["wait", "stop"] = Field(
        "wait", description="Outside the window, wait until it opens, or stop with exit code 3."
    )

    @field_validator("phase_timeout_minutes")
    @classmethod
    def names_phases(cls, value: dict[str, float]) -> dict[str, float]:
        _require_known(value, [EVERY_PHASE, *MIGRATE, *UNDO])
        return value

    @field_validator("time_zone")
    @classmethod
    def is_a_time_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError("a name of the IANA time zone database, for instance Europe/Berlin") from error
        return value

    @model_validator(mode="after")
    def window_is_open_at_some_time(self) -> Self:
        if self.window and self.window[:5] == self.window[6:]:
            raise ValueError("run.window opens and closes at the same minute; leave it out to be always open")
        return self

    def timeout_minutes(self, phase: str) -> float | None:
        """The limit of one phase; None if it has none."""
        return self.phase_timeout_minutes.get(phase, self.phase_timeout_minutes.get(EVERY_PHASE))


class Notify(Section):
    """Who hears of a gate that did not pass, a sign-off that is wanted, and the end of a run."""

    command: list[str] = Field([], description="Program and arguments; gets the event as JSON on standard input.")
    webhook_env: str | None = Field(
        None, description="Name of the environment variable that holds a URL; the event is sent there by POST."
    )
    timeout_s: float = Field(10.0, gt=0, le=120, description="How long either may take.")

    @field_validator("webhook_env")
    @classmethod
    def is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.replace("_", "").isalnum():
            raise ValueError("names an environment variable; the URL itself is a secret and must not stand here")
        return value


class Record(Section):
    """What a run leaves."""

    runs_dir: AnyPath = Field(Path("runs"), description="Folder of the runs, relative to the params file.")


class Ledger(Section):
    """The runbook's own schema in the target database."""

    schema_: ShortName = Field("runbook", alias="schema", description="Schema of the ledger and the staging table.")


class Params(Section):
    """Everything that one target's migration needs to know."""

    connection: Connection
    target: Target
    vector: Vector
    embeddings: Embeddings
    legacy: Legacy
    queries: Queries
    masking: Masking = Masking()
    search: Search = Search()
    extension: Extension = Extension()
    index: Index = Index()
    locks: Locks = Locks()
    backfill: Backfill = Backfill()
    health: Health = Health()
    tune: Tune = Tune()
    shadow: Shadow = Shadow()
    cut_over: CutOver = CutOver()
    watch: Watch = Watch()
    approval: Approval = Approval()
    run: Run = Run()
    notify: Notify = Notify()
    record: Record = Record()
    ledger: Ledger = Ledger()

    @model_validator(mode="after")
    def fits_together(self, info: ValidationInfo) -> Self:
        if self.cut_over.route == "hybrid" and self.search.fulltext_column is None:
            raise ValueError("cut_over.route: hybrid needs search.fulltext_column")
        if len(set(self.target.text_columns)) < len(self.target.text_columns):
            raise ValueError("target.text_columns names a column twice")
        return self

    @property
    def function_name(self) -> str:
        return self.search.function or f"search_{self.target.name}"

    def for_record(self) -> dict[str, Any]:
        """The parameters as plain data; they hold no secrets, so they can be shown whole."""
        return self.model_dump(mode="json", by_alias=True)

    def fingerprint(self) -> str:
        """SHA-256 of what must not change between two phases: target, vector, model, ledger."""
        included = {"target", "vector", "embeddings", "masking", "ledger"}
        parts = self.model_dump(mode="json", include=included)
        parts["embeddings"] = {k: v for k, v in parts["embeddings"].items() if k not in NOT_OF_THE_MODEL}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; a setting that is not in force would look like one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands twice: lines {seen[key]} and {line}"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


def load(path: str | Path) -> Params:
    """Reads and checks one params file. Relative paths in it are relative to the file's own folder.

    Raises BadInput with every problem found: a missing file, an unknown key (with the nearest valid name), a
    wrong type, a value out of range.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text("utf-8"), _UniqueKeys)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise BadInput(
            [_problem("file_is_readable", str(path), error.strerror or "unreadable", "a YAML file")]
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput([_problem("file_is_yaml", str(path), " ".join(str(error).split()), "valid YAML")]) from error
    if not isinstance(data, dict):
        raise BadInput([_problem("file_is_yaml", str(path), type(data).__name__, "sections with keys")])
    try:
        params = Params.model_validate(data)
    except ValidationError as error:
        # Without its cause, whose text repeats what was given, be it a secret.
        raise BadInput([_from_pydantic(path, e) for e in error.errors()]) from None
    return _absolute(params, path.parent.resolve())


def _absolute(params: Params, folder: Path) -> Params:
    def at(value: Path | None) -> Path | None:
        return None if value is None else folder / value

    return params.model_copy(
        update={
            "queries": params.queries.model_copy(
                update={
                    "file": at(params.queries.file),
                    "judgements": at(params.queries.judgements),
                    "embeddings": at(params.queries.embeddings),
                }
            ),
            "embeddings": params.embeddings.model_copy(
                update={"file": at(params.embeddings.file), "ids_file": at(params.embeddings.ids_file)}
            ),
            "record": params.record.model_copy(update={"runs_dir": at(params.record.runs_dir)}),
            "health": params.health.model_copy(update={"stop_file": at(params.health.stop_file)}),
        }
    )


def _problem(fact: str, subject: str, found: str, needed: str, do: str = "") -> Gate:
    return Gate(
        f"params.{fact}",
        Verdict.FAIL,
        subject,
        found,
        needed,
        "a misread parameter would act on the wrong thing; nothing was started",
        do or "mend the file and run the same command again",
    )


def _from_pydantic(path: Path, error: Any) -> Gate:
    where = ".".join(str(part) for part in error["loc"]) or "the file as a whole"
    subject = f"{path}: {where}"
    if error["type"] == "extra_forbidden":
        names = _valid_names(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1, cutoff=0.5)
        do = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(names)}"
        return _problem("key_is_known", subject, "unknown key", "a key that the runbook knows", do)
    if error["type"] == "missing":
        return _problem("key_is_given", subject, "not given", _describe(error["loc"]))
    found = _shown(error["loc"], error["input"])
    needed = error["msg"].removeprefix("Value error, ")
    # Where a section's keys do not fit each other, what the section is for would help nobody.
    do = "" if isinstance(error["input"], dict) else _describe(error["loc"])
    return _problem("value_is_valid", subject, found, needed[:1].lower() + needed[1:], do)


def _shown(loc: tuple[Any, ...], value: Any) -> str:
    if isinstance(value, dict):
        return "this combination"
    # Somebody who put the DSN where its name belongs must not find the password in every log.
    return "a value that is not shown, since it may hold a secret" if loc[:1] == ("connection",) else repr(value)


def _section(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    model: type[BaseModel] = Params
    for part in loc:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    return model


def _valid_names(loc: tuple[Any, ...]) -> list[str]:
    model = _section(loc)
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _describe(loc: tuple[Any, ...]) -> str:
    """What the key is for, from its own description."""
    model = _section(loc[:-1])
    if model is None or not loc:
        return ""
    for name, field in model.model_fields.items():
        if loc[-1] in (name, field.alias):
            return field.description or f"the section {loc[-1]}"
    return ""


def reference() -> list[tuple[str, str, str, str]]:
    """Every parameter as (key, type, default, description), in the order of the model; for the documents."""
    rows: list[tuple[str, str, str, str]] = []
    for section_name, section in Params.model_fields.items():
        model = typing.cast(type[BaseModel], section.annotation)
        for name, field in model.model_fields.items():
            key = f"{section_name}.{field.alias or name}"
            default = "required" if field.is_required() else json.dumps(field.default, default=str)
            rows.append((key, _type_name(field.annotation), default, field.description or ""))
    return rows


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return _type_name(args[0])
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin is dict:
        return f"{_type_name(args[1])}, or phase: {_type_name(args[1])}"
    if origin is dict:
        return f"{_type_name(args[0])} to {_type_name(args[1])}"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(a) for a in args if a is not type(None))
    return {
        "str": "text",
        "int": "whole number",
        "float": "number",
        "Path": "path",
        "bool": "true | false",
    }.get(getattr(annotation, "__name__", ""), str(annotation))
