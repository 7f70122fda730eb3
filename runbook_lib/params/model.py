"""The whole of a params file."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

from pydantic import ValidationInfo, model_validator

from runbook_lib.params.consent import Accept
from runbook_lib.params.data import (
    MAX_INDEXED_DIMENSION,
    NAMES_IN_THE_FUNCTION,
    Connection,
    Embeddings,
    Legacy,
    Masking,
    Queries,
    Search,
    Target,
    Vector,
)
from runbook_lib.params.filters import has_subquery
from runbook_lib.params.run import Approval, LedgerSection, Notify, RecordSection, Run
from runbook_lib.params.section import Section
from runbook_lib.params.work import (
    Backfill,
    CutOver,
    Extension,
    Filters,
    Health,
    Index,
    Locks,
    ModelChange,
    Partitioning,
    Preflight,
    Rehearse,
    Retire,
    Shadow,
    Storage,
    Tune,
    Watch,
)

# What changes how vectors are fetched, but not which vectors they are.
NOT_OF_THE_MODEL = {
    "batch_rows",
    "request_texts",
    "request_timeout_s",
    "request_tries",
    "parallel_requests",
    "api_key_env",
    "accept_refused_rows",
    "accept_unread_percent",
    "refresh_tries",
}

# hnsw.max_scan_tuples where nothing else is said.
MOST_RERANKED_ROWS = 20_000


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
    accept: Accept = Accept()
    preflight: Preflight = Preflight()
    rehearse: Rehearse = Rehearse()
    extension: Extension = Extension()
    index: Index = Index()
    storage: Storage = Storage()
    locks: Locks = Locks()
    backfill: Backfill = Backfill()
    health: Health = Health()
    tune: Tune = Tune()
    filters: Filters = Filters()
    partitioning: Partitioning = Partitioning()
    shadow: Shadow = Shadow()
    cut_over: CutOver = CutOver()
    model_change: ModelChange = ModelChange()
    watch: Watch = Watch()
    retire: Retire = Retire()
    approval: Approval = Approval()
    run: Run = Run()
    notify: Notify = Notify()
    record: RecordSection = RecordSection()
    ledger: LedgerSection = LedgerSection()

    @model_validator(mode="before")
    @classmethod
    def chunks_have_a_table(cls, data: Any) -> Any:
        """embeddings.chunks is enough to say where the vectors go."""
        vector, embeddings = (data.get(s) if isinstance(data, dict) else None for s in ("vector", "embeddings"))
        if isinstance(vector, dict) and isinstance(embeddings, dict) and embeddings.get("chunks") is not None:
            return data | {"vector": {"layout": "chunks"} | vector}
        return data

    @model_validator(mode="after")
    def fits_together(self, info: ValidationInfo) -> Self:
        if self.cut_over.route == "hybrid" and not self.search.has_fulltext:
            raise ValueError(
                "cut_over.route: hybrid needs search.fulltext_column, fulltext_expression or words_query"
            )
        if self.index.rows == "always":
            if self.target.always is None or has_subquery(self.target.always):
                raise ValueError("index.rows: always needs target.always, without a subquery, which no index can use")
            if self.vector.layout != "column":
                raise ValueError(
                    "index.rows: always needs vector.layout: column; a side table lacks what target.always compares"
                )
        if (self.vector.layout == "chunks") != (self.embeddings.chunks is not None):
            raise ValueError(
                f"vector.layout: {self.vector.layout} and embeddings.chunks:"
                f" {'given' if self.embeddings.chunks else 'missing'} do not fit"
            )
        if len(set(self.target.text_columns)) < len(self.target.text_columns):
            raise ValueError("target.text_columns names a column twice")
        columns = "" if len(self.target.filter_columns) == len(self.target.filters) else " as a column"
        if unknown := set(self.filters.partial_indexes) - set(self.target.filter_columns):
            raise ValueError(f"filters.partial_indexes: {min(unknown)} is not among target.filters{columns}")
        if unknown := {c for caller in self.search.seen_as for c in caller.filters} - set(self.target.filters):
            raise ValueError(f"search.seen_as: {min(unknown)} is not among target.filters")
        if self.partitioning.column and self.partitioning.column not in self.target.filter_columns:
            raise ValueError(f"partitioning.column: {self.partitioning.column} is not among target.filters{columns}")
        taken = {*NAMES_IN_THE_FUNCTION, *self.target.key_columns, *(f"filter_{c}" for c in self.target.filters)}
        if clash := [c for i, c in enumerate(self.search.returns) if c in taken or c in self.search.returns[:i]]:
            raise ValueError(
                f"search.returns: the search function has an argument or a result named {clash[0]} already"
            )
        self._index_can_hold_the_vectors()
        return self

    def _index_can_hold_the_vectors(self) -> None:
        column, storage, dimension = self.vector.type, self.index.storage, self.vector.dimension
        if column == storage == "halfvec":
            raise ValueError("index.storage: halfvec is what the column holds already; leave index.storage out")
        limit = MAX_INDEXED_DIMENSION[self.indexed_type]
        if dimension > limit:
            wider = [f"{s} allows {n}" for s, n in MAX_INDEXED_DIMENSION.items() if n >= dimension]
            raise ValueError(
                f"vector.dimension: {dimension} cannot be indexed as {self.indexed_type}, which allows {limit};"
                f" index.storage: {', '.join(wider)}"
            )
        deepest = self.index.rerank * self.queries.k
        if storage == "bit" and deepest > MOST_RERANKED_ROWS:
            raise ValueError(
                f"index.rerank × queries.k = {deepest} rows to sort again a query; an index scan ends after"
                f" {MOST_RERANKED_ROWS}"
            )

    @property
    def indexed_type(self) -> str:
        """What the index holds: vector, halfvec or bit."""
        return self.vector.type if self.index.storage == "vector" else self.index.storage

    @property
    def function_name(self) -> str:
        return self.search.function or f"search_{self.target.name}"

    @property
    def lowest_recall(self) -> float:
        """The recall down to which a search that was proved still counts as good."""
        return max(0.0, self.tune.target_recall - self.watch.largest_recall_loss)

    def for_record(self) -> dict[str, Any]:
        """The parameters as plain data; they hold no secrets, so they can be shown whole."""
        return self.model_dump(mode="json", by_alias=True)

    def fingerprint(self) -> str:
        """SHA-256 of what must not change between two phases: target, vector, model, ledger.

        Without what is left at its default: a key that a later release knows must not look like somebody's change.
        """
        included = {"target", "vector", "embeddings", "masking", "ledger"}
        parts = self.model_dump(mode="json", include=included, exclude_defaults=True)
        parts["embeddings"] = {k: v for k, v in parts["embeddings"].items() if k not in NOT_OF_THE_MODEL}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
