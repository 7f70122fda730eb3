"""What is migrated: the server, the table, its vectors and where they come from, the search of today."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from runbook_lib.params.filters import Expression, Filter, Filters, filters_of, placeholders_of
from runbook_lib.params.placeholders import is_one_expression, split, without_its_end, written
from runbook_lib.params.section import AnyPath, Name, NewColumn, Section, ShortName

# pgvector's limits for a column, and for what an index holds; README of pgvector, "Indexing".
MAX_DIMENSION = 16_000
MAX_INDEXED_DIMENSION = {"vector": 2000, "halfvec": 4000, "bit": 64_000}
# Arguments and results of the search function besides the key and the filters.
NAMES_IN_THE_FUNCTION = frozenset(
    {
        *("query_text", "query_embedding", "k", "min_similarity", "score", "answered_by", "similarity", "rank"),
        *("chunk_start", "chunk_length"),
    }
)
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


class Connection(Section):
    """The server. Names secrets, never holds them: everything here goes into every record."""

    dsn_env: str | None = Field(None, description="Environment variable that holds the DSN; this or `service`.")
    service: str | None = Field(None, description="Service in pg_service.conf.")
    passfile: str | None = Field(None, description="Password file to use with either.")

    @model_validator(mode="after")
    def one_way_in(self) -> Self:
        if (self.dsn_env is None) == (self.service is None):
            raise ValueError("give exactly one of dsn_env and service")
        return self

    @field_validator("dsn_env")
    @classmethod
    def is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.replace("_", "").isalnum():
            raise ValueError("takes the name of an environment variable; keep the DSN itself out of this file")
        return value


class Target(Section):
    """The table to migrate."""

    name: ShortName = Field(
        description="Short name: used in the ledger, the staging table and the function's default name."
    )
    schema_: Name = Field("public", alias="schema", description="Its schema.")
    table: Name = Field(description="Table name as PostgreSQL spells it, unquoted.")
    key: Name | tuple[Name, ...] = Field(
        description="Primary key, or a NOT NULL unique column: bigint, integer, uuid or text; or several, in the"
        " order of their index."
    )
    key_from_one_source: bool = Field(
        False,
        description="Partitioned table without a unique index on its key: you state that no key is issued twice.",
    )
    distributed: Literal["citus"] | None = Field(
        None, description="Set to citus for a table that Citus distributes by hash of its key."
    )
    text_columns: list[Name] = Field(min_length=1, description="Columns to embed, in this order.")
    filters: Filters = Field(
        {},
        description="What the application filters by: a list of columns, or names, each with nothing (a column) or"
        " with a condition on the row t and the type of its value.",
    )
    always: Expression | None = Field(
        None, description='Condition on the row t that every search adds, such as "t.deleted_at IS NULL".'
    )
    counted_rows: Literal["all", "searched"] = Field(
        "all",
        description="Rows that must have a vector of their current text, or else count as missing or stale: all with"
        " text, or only those that `always` lets through.",
    )

    _key_types: tuple[str, ...] = PrivateAttr(())

    @field_validator("key", mode="before")
    @classmethod
    def a_list_of_one_is_one(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return value[0] if len(value) == 1 else tuple(value)
        return value

    @field_validator("key")
    @classmethod
    def key_is_no_other_column_of_the_function(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        columns = (value,) if isinstance(value, str) else value
        if not columns or len(set(columns)) < len(columns):
            raise ValueError("name each column of the key once")
        if taken := [c for c in columns if c in NAMES_IN_THE_FUNCTION]:
            raise ValueError(
                f"the search function has an argument or a result named {taken[0]}; use a generated column"
                " of another name, with a UNIQUE index"
            )
        return value

    @field_validator("always")
    @classmethod
    def always_takes_no_value(cls, value: str | None) -> str | None:
        if value is not None and (named := placeholders_of(value)):
            raise ValueError(f"{written(named[0])}: a condition of every search cannot take a value")
        return value

    @model_validator(mode="after")
    def searched_rows_are_told_by_always(self) -> Self:
        if self.counted_rows == "searched" and self.always is None:
            raise ValueError("counted_rows: searched needs always, which says what those rows are")
        return self

    @property
    def key_columns(self) -> tuple[str, ...]:
        """The columns of the key, in its order."""
        return (self.key,) if isinstance(self.key, str) else self.key

    @property
    def key_shown(self) -> str:
        """The key as messages name it."""
        return self.key if isinstance(self.key, str) else f"({', '.join(self.key)})"

    @property
    def key_types(self) -> tuple[str, ...]:
        """Types of a key's several columns, as a session has found them. Of a table that lacks one of the columns it
        is text: what is asked of such a table PostgreSQL refuses in any case."""
        return self._key_types or ("text",) * len(self.key_columns)

    def found_key_types(self, types: Sequence[str]) -> None:
        """What a session has found in the catalogue, for values of the key to be written with."""
        if len(types) == len(self.key_columns):
            self._key_types = tuple(types)

    @property
    def each_filter(self) -> tuple[Filter, ...]:
        """The filters, in the order of the search function's arguments."""
        return filters_of(self.filters)

    @property
    def filter_columns(self) -> list[str]:
        """The columns that are compared with a value."""
        return [f.column for f in self.each_filter if f.column is not None]


class Vector(Section):
    """The vector column."""

    column: NewColumn = Field("embedding", description="Its name, up to 40 bytes.")
    type: Literal["vector", "halfvec"] = Field("vector", description="pgvector type: 4 or 2 bytes a dimension.")
    dimension: int = Field(ge=1, le=MAX_DIMENSION, description="Dimensions of every vector.")
    distance: Literal["cosine", "l2", "inner_product"] = Field(
        "cosine", description="The distance the model was trained for."
    )
    layout: Literal["column", "side_table", "chunks"] = Field(
        "column",
        description="Store vectors in the table, in a side table with one row per key, or (embeddings.chunks) in one"
        " with a row per chunk.",
    )


class Chunks(Section):
    """Texts in parts, each with a vector of its own."""

    size: int = Field(ge=20, le=100_000, description="Largest chunk; cut at a paragraph, sentence or word.")
    overlap: int = Field(0, ge=0, description="How much of its end, at most, each chunk shares with the next.")
    by: Literal["characters", "tokens"] = Field("characters", description="Unit of both.")
    title: bool = Field(False, description="Start every chunk with the first text column; it adds to size.")

    @model_validator(mode="after")
    def overlap_is_a_part(self) -> Self:
        if 2 * self.overlap > self.size:
            raise ValueError(f"overlap: {self.overlap} is more than half of size: {self.size}")
        return self


class Embeddings(Section):
    """Where vectors come from."""

    source: Literal["wordllama", "callable", "http", "file", "table"] = Field(
        description="Packaged model, Python function, HTTP endpoint, file or table."
    )
    callable: str | None = Field(
        None, pattern=r"^[\w.]+:\w+$", description="Function from a list of texts to vectors, as module:function."
    )
    file: AnyPath | None = Field(
        None,
        description="File with the key's columns (same names) and `embedding`. Add `text_hash` (hex, first 16 bytes"
        " of the text's SHA-256) or `text` to reject vectors of texts that have changed since.",
    )
    format: Literal["parquet", "arrow", "npy", "jsonl", "csv"] | None = Field(
        None, description="File format, if the suffix does not tell."
    )
    ids_file: AnyPath | None = Field(
        None, description="Keys for an .npy file: another .npy file, or text with one key a line."
    )
    table: str | None = Field(
        None,
        pattern=r"^[^.]+\.[^.]+$",
        description="schema.table with the key's columns (indexed) and `embedding` (vector, halfvec or array);"
        " `text_hash` or `text` as in a file.",
    )
    url: str | None = Field(
        None, pattern=r"^https?://\S+$", description="OpenAI-compatible endpoint, …/v1/embeddings."
    )
    model: str | None = Field(None, description="The endpoint's model.")
    api_key_env: str | None = Field(
        None,
        pattern=r"^\w+$",
        description="Environment variable that holds the endpoint's key.",
    )
    send_dimensions: bool = Field(False, description="Ask the endpoint for vector.dimension dimensions.")
    request_texts: int = Field(64, ge=1, le=2048, description="Texts per request.")
    request_timeout_s: float = Field(60.0, gt=0, le=3600, description="Timeout of one request.")
    request_tries: int = Field(
        6, ge=1, le=100, description="Tries per request after 429, 5xx, a timeout or a lost connection."
    )
    parallel_requests: int = Field(4, ge=1, le=64, description="Concurrent requests.")
    batch_rows: int | None = Field(
        None,
        ge=1,
        le=50_000,
        description="Rows per COPY transaction; by default 1000 from a model (50 in chunks), 5000 from a file or"
        " table.",
    )
    chunks: Chunks | None = Field(None, description="Cut long texts into chunks, each with its own vector.")
    tokenizer: AnyPath | None = Field(
        None, description="The model's tokenizer.json (Hugging Face), for chunks by tokens; wordllama brings its own."
    )
    normalise: bool = Field(
        False,
        description="Scale all vectors, also of queries, to length 1; for l2 and inner_product when the model's"
        " lengths carry no meaning.",
    )
    accept_refused_rows: int = Field(
        0,
        ge=0,
        description="Rows of a file or table that may be rejected (unknown or duplicate key, older text, unsound"
        " vector), provided every row with text still gets a vector.",
    )
    accept_unread_percent: float = Field(
        5.0, ge=0, le=100, description="Share of the text that may lie beyond what the model reads of each row."
    )
    refresh_tries: int = Field(3, ge=1, le=100, description="Tries to embed a changed row before it is set aside.")

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
        if self.chunks and not self.has_model:
            raise ValueError(f"chunks: needs a model, since source: {self.source} has one vector a row")
        by_tokens = self.chunks is not None and self.chunks.by == "tokens" and self.source != "wordllama"
        if (self.tokenizer is not None) != by_tokens:
            raise ValueError("tokenizer: the model's tokenizer.json is needed for chunks by tokens, and only there")
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
        return self.batch_rows or (50 if self.chunks else 1000 if self.has_model else 5000)


class Masking(Section):
    """What is removed from a text before it leaves for the model."""

    rules: list[Literal["email", "phone", "card", "iban", "ip", "token"]] = Field(
        [], description="Patterns replaced by placeholders such as <email>."
    )
    patterns: dict[ShortName, str] = Field({}, description="Your own: placeholder name and regular expression.")
    named_entities: bool = Field(
        False, description="Also mask names of people and places; needs presidio-analyzer (extra `masking`)."
    )
    phone_region: str | None = Field(
        None,
        pattern=r"^[A-Z]{2}$",
        description="Country for phone numbers without +; unset, only numbers with + are masked.",
    )

    @field_validator("patterns")
    @classmethod
    def patterns_compile(cls, value: dict[str, str]) -> dict[str, str]:
        for name, pattern in value.items():
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name} is not a regular expression: {error}") from None
            if compiled.search(""):
                raise ValueError(f"{name} matches the empty string, so it would mask every position of a text")
        return value


class Legacy(Section):
    """Today's search."""

    query: str = Field(
        description="Today's statement, best answer first, returning the key's columns. :query and :k are the text"
        ' and row limit; :<filter> or :"<filter>" is a filter\'s value or NULL.'
    )

    @field_validator("query")
    @classmethod
    def has_placeholders(cls, value: str) -> str:
        names = {piece for is_name, piece in split(value, ("query", "k")) if is_name}
        missing = [f":{name}" for name in ("query", "k") if name not in names]
        if missing:
            raise ValueError(f"the statement does not mention {' and '.join(missing)}")
        return without_its_end(value)


class SeenAs(Section):
    """A caller from whom row level security hides rows."""

    role: Name = Field(description="The role; the runbook's role must be a member.")
    settings: dict[str, str] = Field({}, description="Settings that its policies read.")
    filters: dict[str, str] = Field({}, description="Filters it passes, with values.")

    def __str__(self) -> str:
        given = [f"{name} = {value}" for name, value in {**self.settings, **self.filters}.items()]
        return f"{self.role} ({', '.join(given)})" if given else self.role


class Hybrid(Section):
    """How the hybrid route combines words and vectors."""

    weights: Literal["learned", "equal"] = Field(
        "learned",
        description="Weights of words and vectors: learned by 70_tune from judged queries (if any), or equal.",
    )
    word_rows: int = Field(
        5000,
        ge=100,
        le=1_000_000,
        description="Rows that the rarest words of a query, or a code's parts, may contribute; bounds the latency.",
    )


class Search(Section):
    """The function that the application calls."""

    function: Name | None = Field(None, description="Its name; search_<target> by default.")
    grant_to: list[Name] = Field([], description="Roles that may call it.")
    returns: list[Name] = Field([], description="Columns that it returns as well; callers need SELECT on them.")
    smallest_similarity: float | None = Field(
        None,
        description="Default of min_similarity, which leaves out less similar rows. 80_shadow shows what thresholds"
        " keep and lose.",
    )
    seen_as: list[SeenAs] = Field(
        [],
        description="With row level security: callers to measure recall as. Roles in grant_to that are not listed are"
        " measured without settings or filters.",
    )
    fulltext_column: Name | None = Field(None, description="A tsvector column, for the hybrid route.")
    fulltext_expression: str | None = Field(
        None,
        description="Instead of a column: the tsvector expression of a GIN or GiST index, such as"
        " to_tsvector('english', body).",
    )
    fulltext_config: Name = Field("english", description="Its text search configuration.")
    hybrid_candidates: int = Field(
        100, ge=10, le=1000, description="Nearest rows that hybrid ranks, plus twice as many that match by words."
    )
    hybrid: Hybrid = Hybrid()
    words_query: str | None = Field(
        None,
        description="Instead of a tsvector: a statement over a BM25 index, with :query, :k and :<filter>, that"
        " returns key and score (higher is better).",
    )
    read_dsn_env: str | None = Field(
        None, description="Environment variable with the DSN of a streaming replica to measure on."
    )
    read_wait_s: float = Field(60.0, gt=0, le=86_400, description="Longest wait for that replica to catch up.")
    mode: Literal["function", "application"] = Field(
        "function", description="Where the new query is: in the search function, or in the application's own SQL."
    )
    application_query: str | None = Field(
        None,
        description="For mode application: its statement, with :query, :embedding, :k and :<filter>.",
    )

    @field_validator("read_dsn_env")
    @classmethod
    def is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.replace("_", "").isalnum():
            raise ValueError("takes the name of an environment variable; keep the DSN itself out of this file")
        return value

    @field_validator("fulltext_expression")
    @classmethod
    def is_one_expression(cls, value: str | None) -> str | None:
        if value is not None and not is_one_expression(value):
            raise ValueError("one expression is needed, its brackets and quotes closed, without a semicolon")
        return value

    @field_validator("words_query")
    @classmethod
    def mentions_the_words(cls, value: str | None) -> str | None:
        if value is not None and not any(is_name for is_name, _ in split(value, ("query",))):
            raise ValueError("the statement does not mention :query")
        value = value and value.strip().rstrip(";")
        # Its columns are listed with commas, which no expression has outside of brackets.
        if value and not is_one_expression(f"({value}\n)"):
            raise ValueError("one statement is needed, with closed brackets and quotes")
        return value

    @model_validator(mode="after")
    def words_are_searched_in_one_way(self) -> Self:
        ways = {name: getattr(self, name) for name in ("fulltext_column", "fulltext_expression", "words_query")}
        if len(given := [name for name, value in ways.items() if value is not None]) > 1:
            raise ValueError(f"give {' or '.join(given)}, not both")
        return self

    @property
    def has_tsvector(self) -> bool:
        """Are words found by a tsvector?"""
        return self.fulltext_column is not None or self.fulltext_expression is not None

    @property
    def has_fulltext(self) -> bool:
        """Are words found at all, without which there is no hybrid route?"""
        return self.has_tsvector or self.words_query is not None

    @model_validator(mode="after")
    def application_gives_its_query(self) -> Self:
        if self.mode == "application" and ":embedding" not in (self.application_query or ""):
            raise ValueError("mode: application needs application_query, a statement that mentions :embedding")
        return self


class Queries(Section):
    """Representative queries, and judgements if you have them."""

    file: AnyPath = Field(description='JSON lines: {"query_id": …, "text": …}; its own filters as "filters": {…}.')
    judgements: AnyPath | None = Field(None, description='JSON lines: {"query_id": …, "key": …, "relevance": …}.')
    embeddings: AnyPath | None = Field(
        None,
        description="Vectors of these queries, if the rows' vectors come from a file or table: Parquet, Arrow, JSON"
        " lines or CSV with `query_id` and `embedding`.",
    )
    k: int = Field(10, ge=1, le=100, description="Answers that the application shows.")
    sample: int = Field(200, ge=10, le=10_000, description="Queries to time and compare, picked by hash.")
    judged_sample: int = Field(
        1000, ge=10, le=100_000, description="Judged queries that measure relevance, picked likewise."
    )
    baseline_minutes: float = Field(
        10,
        gt=0,
        le=10_080,
        description="Time limit for asking the legacy search in 10_baseline, and again in 80_shadow; queries beyond"
        " it are left out of every comparison.",
    )
