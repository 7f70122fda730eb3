"""What is migrated: the server, the table, its vectors and where they come from, the search of today."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from runbook_lib.params.placeholders import is_one_expression, split
from runbook_lib.params.section import AnyPath, Name, NewColumn, Section, ShortName

# pgvector's limits for a column, and for what an index holds; README of pgvector, "Indexing".
MAX_DIMENSION = 16_000
MAX_INDEXED_DIMENSION = {"vector": 2000, "halfvec": 4000, "bit": 64_000}
# Arguments and results of the search function beside the key and the filters.
NAMES_IN_THE_FUNCTION = frozenset({"query_text", "query_embedding", "k", "score", "answered_by"})
# What :name may stand for in legacy.query and search.application_query, beside the filters.
PLACEHOLDERS = frozenset({"query", "embedding", "k"})
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
    key_from_one_source: bool = Field(
        False,
        description="Of a partitioned table whose key PostgreSQL cannot keep unique: no key is ever given twice.",
    )
    distributed: Literal["accept_untested"] | None = Field(
        None, description="Of a table that Citus has distributed: go on with statements that have run on no cluster."
    )
    text_columns: list[Name] = Field(min_length=1, description="Columns whose text is embedded, in this order.")
    filters: list[Name] = Field([], description="Columns that the application filters by, with equality.")

    @field_validator("key")
    @classmethod
    def key_is_no_other_column_of_the_function(cls, value: str) -> str:
        if value in NAMES_IN_THE_FUNCTION:
            raise ValueError(
                f"the search function has an argument or a result named {value}; use a generated column"
                " of another name, with a UNIQUE index"
            )
        return value

    @field_validator("filters")
    @classmethod
    def filters_are_no_other_placeholders(cls, value: list[str]) -> list[str]:
        # psycopg's own placeholders end at the first closing bracket.
        if bracketed := [name for name in value if ")" in name]:
            raise ValueError(
                f"{bracketed[0]} holds a closing bracket, which no placeholder can; use a generated column of another"
                " name"
            )
        if taken := sorted(PLACEHOLDERS.intersection(value)):
            raise ValueError(
                f":{taken[0]} already stands for something else in the statements;"
                " use a generated column of another name"
            )
        if len(set(value)) < len(value):
            raise ValueError("a column is named twice")
        return value


class Vector(Section):
    """The column to add."""

    column: NewColumn = Field("embedding", description="Name of the new column, 40 bytes at most.")
    type: Literal["vector", "halfvec"] = Field("vector", description="pgvector type: 4 or 2 bytes a dimension.")
    dimension: int = Field(ge=1, le=MAX_DIMENSION, description="Dimensions of every vector.")
    distance: Literal["cosine", "l2", "inner_product"] = Field("cosine", description="What the model was made for.")
    layout: Literal["column", "side_table"] = Field(
        "column", description="A column of the table, or a table of its own with one row a key, beside it."
    )


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
    normalise: bool = Field(
        False,
        description="Bring every vector, of rows and of queries, to length 1: for inner_product and l2 with a model"
        " whose lengths mean nothing. Cosine leaves lengths out by itself.",
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
        ' of rows wanted, :<filter> or :"<filter>" for the value of a filter or NULL. It must return the key column.'
    )

    @field_validator("query")
    @classmethod
    def has_placeholders(cls, value: str) -> str:
        names = {piece for is_name, piece in split(value, ("query", "k")) if is_name}
        missing = [f":{name}" for name in ("query", "k") if name not in names]
        if missing:
            raise ValueError(f"the statement does not mention {' and '.join(missing)}")
        return value.strip().rstrip(";")


class SeenAs(Section):
    """A caller from whom the table's row level security keeps rows."""

    role: Name = Field(description="The role; the runbook's own must be a member of it.")
    settings: dict[str, str] = Field({}, description="Settings that the policies read, as the application sets them.")
    filters: dict[str, str] = Field({}, description="Filters that it passes, with their values.")

    def __str__(self) -> str:
        given = [f"{name} = {value}" for name, value in {**self.settings, **self.filters}.items()]
        return f"{self.role} ({', '.join(given)})" if given else self.role


class Search(Section):
    """The function that the application calls."""

    function: Name | None = Field(None, description="Its name, in the table's schema; search_<target> if not given.")
    grant_to: list[Name] = Field([], description="Roles that may call the function.")
    seen_as: list[SeenAs] = Field(
        [],
        description="Callers as whom recall is measured where the table has row level security: role, settings that"
        " its policies read, filters. Roles of grant_to that are not named here are measured without either.",
    )
    fulltext_column: Name | None = Field(
        None, description="A tsvector column; the hybrid route needs one, or fulltext_expression."
    )
    fulltext_expression: str | None = Field(
        None,
        description="In place of a column: the tsvector as an expression over the row, as a GIN or GiST index on the"
        " table has it, such as to_tsvector('english', body).",
    )
    fulltext_config: Name = Field("english", description="Text search configuration of that column or expression.")
    hybrid_candidates: int = Field(100, ge=10, le=1000, description="Rows that each half of hybrid contributes.")
    read_dsn_env: str | None = Field(
        None, description="Environment variable with the DSN of a streaming replica, where searches are measured."
    )
    read_wait_s: float = Field(
        60.0, gt=0, le=86_400, description="Longest wait until that replica has replayed what the primary wrote."
    )
    mode: Literal["function", "application"] = Field(
        "function", description="Who holds the new query: the search function, or the application in its own SQL."
    )
    application_query: str | None = Field(
        None,
        description="mode application: the statement that the application will send, whose plan is proved; :query,"
        " :embedding, :k and :<filter> stand for its values.",
    )

    @field_validator("read_dsn_env")
    @classmethod
    def is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.replace("_", "").isalnum():
            raise ValueError("names an environment variable; the DSN itself must not stand in this file")
        return value

    @field_validator("fulltext_expression")
    @classmethod
    def is_one_expression(cls, value: str | None) -> str | None:
        if value is not None and not is_one_expression(value):
            raise ValueError("one expression is needed, its brackets and quotes closed, without a semicolon")
        return value

    @model_validator(mode="after")
    def fulltext_is_a_column_or_an_expression(self) -> Self:
        if self.fulltext_column is not None and self.fulltext_expression is not None:
            raise ValueError("give fulltext_column or fulltext_expression, not both")
        return self

    @property
    def has_fulltext(self) -> bool:
        """Is there a tsvector, without which there is no hybrid route?"""
        return self.fulltext_column is not None or self.fulltext_expression is not None

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
    baseline_minutes: float = Field(
        10,
        gt=0,
        le=10_080,
        description="Time that the legacy search may be asked for in 10_baseline, and again in 80_shadow; queries"
        " that do not fit into it are left out of every comparison.",
    )
