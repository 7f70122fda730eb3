"""Ways to search by the vectors: how the rows are found, and pgvector's settings that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runbook_lib.params import Params

# How the nearest rows are found. index: in the order in which the index gives them. relaxed: the same, sorted
# afterwards, as an index that holds less than the vectors always needs. exact: by the full vectors, among all rows
# that the filters let through, the vector index unused.
Scan = Literal["index", "relaxed", "exact"]
SETTING = {"hnsw": "hnsw.ef_search", "ivfflat": "ivfflat.probes"}
MOST_SCANNED = {"hnsw": "hnsw.max_scan_tuples", "ivfflat": "ivfflat.max_probes"}
# What pgvector scans at most where nothing else is said: rows of an HNSW index, lists of an IVFFlat index.
MOST_SCANNED_DEFAULT = {"hnsw": 20_000, "ivfflat": 32_768}
# Keeps a page full where a filter or dead rows take answers away; strict order needs no second sort.
ITERATIVE = {"hnsw": ("hnsw.iterative_scan", "strict_order"), "ivfflat": ("ivfflat.iterative_scan", "relaxed_order")}


@dataclass(frozen=True)
class Way:
    """How to search. candidates: ef_search or probes. most_scanned: max_scan_tuples or max_probes."""

    scan: Scan
    candidates: int
    iterative_scan: str
    most_scanned: int

    def settings(self, method: str) -> dict[str, str]:
        """The settings of pgvector, by name."""
        return {
            SETTING[method]: str(self.candidates),
            ITERATIVE[method][0]: self.iterative_scan,
            MOST_SCANNED[method]: str(self.most_scanned),
        }

    def __str__(self) -> str:
        if self.scan == "exact":
            return "exact"
        return f"{self.candidates}, {self.iterative_scan.removesuffix('_order')}, {self.most_scanned:,}"


def candidates(params: Params) -> list[int]:
    """ef_search or probes, from the parameters, cheapest first."""
    return sorted(set(params.tune.ef_search if params.index.method == "hnsw" else params.tune.probes))


def through_the_index(params: Params, n: int, scan: Scan = "index") -> Way:
    """As the search function does without a filter. n: ef_search or probes."""
    method = params.index.method
    return Way(scan, n, ITERATIVE[method][1], MOST_SCANNED_DEFAULT[method])


def exact(params: Params) -> Way:
    """Every row that the filters let through; the settings of the index do not matter."""
    return Way("exact", candidates(params)[0], "off", MOST_SCANNED_DEFAULT[params.index.method])
