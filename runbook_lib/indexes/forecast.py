"""What the vectors will cost in bytes, worked out before anything is written. Pure arithmetic; upper bounds where
the data decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runbook_lib.core.display import Table, duration, number, size
from runbook_lib.core.names import has_side_table
from runbook_lib.params import Params

if TYPE_CHECKING:
    import pandas

PAGE = 8192
PAGE_HEADER = 24
LINE_POINTER = 4
# pgvector's HNSW and IVFFlat pages carry eight bytes of their own at the end.
PAGE_TRAILER = 8
PAGE_ROOM = PAGE - PAGE_HEADER - PAGE_TRAILER
TUPLE_HEADER = 24
MB = 1024 * 1024

BYTES_A_DIMENSION = {"vector": 4.0, "halfvec": 2.0, "bit": 1 / 8}
VECTOR_HEADER = 8

# pgvector's hnsw.h: HnswElementTupleData before its vector, HnswNeighborTupleData before its six-byte pointers.
HNSW_ELEMENT_HEADER = 72
HNSW_NEIGHBOR_HEADER = 4
HNSW_POINTER = 6
# hnsw.h, HnswGetMaxLevel.
HNSW_HIGHEST_LEVEL = 63
# hnswbuild.c: a parallel build leaves 3 MB for others and stops 1 MB before the end.
HNSW_PARALLEL_RESERVE = 4 * MB
# hnswbuild.c: a serial build takes its memory in blocks of this size, and runs out when it would take one too many.
HNSW_BLOCK = MB

# ivfflat.h and ivfbuild.c: list header, index tuple header, rows sampled for k-means.
IVFFLAT_LIST_HEADER = 8
INDEX_TUPLE_HEADER = 8
IVFFLAT_SMALLEST_SAMPLE = 10_000
IVFFLAT_SAMPLE_A_LIST = 50
LARGEST_LISTS = 32768
ROWS_A_LIST = 1000
LISTS_BY_ROOT_FROM_ROWS = 1_000_000

# PostgreSQL's TOAST_TUPLE_THRESHOLD and TOAST_MAX_CHUNK_SIZE with pages of eight kilobytes.
TOAST_THRESHOLD = 2032
TOAST_CHUNK = 1996
CHUNKS_A_PAGE = 4
# A WAL record's own header and block reference with its index entry beside it; measured: 4.7 kB a row at
# 1024 dimensions, 1.6 kB a staged row at 384.
WAL_A_RECORD = 100
STAGING_WAL_A_ROW = 60
TIMESTAMP_AND_HASH = 8 + 17

# Measured: 100 k rows of 1 kB, 384 dimensions, PostgreSQL 18.6, pgvector 0.8.6, 2 cores, all in shared_buffers. Times
# of another machine and table differ; operate/rehearse measures them there.
LOAD_US_A_ROW, LOAD_NS_A_BYTE = 4, 2
BACKFILL_US_A_ROW = 33
# Of one entry into a trigram index, by the bytes of the text: it has about a trigram for each.
TRIGRAM_NS_A_BYTE = 450
TRIGRAM_WAL_A_BYTE = 26
# An inverted index of words has about so many entries for one of trigrams.
WORDS_FOR_TRIGRAMS = 0.15
PROMOTE_US_A_ROW = 0.3
# What the forecast of the backfill rests on.
NO_HOT = "if every update enters every index"
HNSW_US = 24
HNSW_EF_CONSTRUCTION = 64
HNSW_DIMENSION = 384
HNSW_SPEED_UP_A_WORKER = 0.76
IVFFLAT_US_A_ROW, IVFFLAT_US_A_LIST = 9.4, 0.056

# PostgreSQL, plan_create_index_workers and compute_parallel_worker: no worker below the first, one more whenever the
# table is three times as large, and none that would have less memory than the last.
PARALLEL_FROM_BYTES = 8 * MB
MEMORY_A_PARTICIPANT_MB = 32


def _align(n: int) -> int:
    return -(-n // 8) * 8


def vector_bytes(dimension: int, kind: str) -> int:
    """Bytes of one value of type ``kind``: vector, halfvec, or PostgreSQL's bit.

    Source: README of pgvector, "Reference"; for bit, VarBit in PostgreSQL's varbit.h, whose header is as long.
    """
    return VECTOR_HEADER + math.ceil(BYTES_A_DIMENSION[kind] * dimension)


def hnsw_build_bytes_per_row(m: int, dimension: int, kind: str = "vector") -> float:
    """Memory that one row takes in the graph while an HNSW index is built.

    Derived from HnswElementData and its neighbour arrays in pgvector's hnsw.h; a node reaches each further layer
    with probability 1/m, so it is on 1/(m - 1) layers beyond the ground on average.
    """
    upper_layers = 1 / (m - 1)
    ground, upper = 8 + 32 * m, 8 + 16 * m
    return 128 + 8 * (1 + upper_layers) + ground + upper * upper_layers + _align(vector_bytes(dimension, kind))


def hnsw_build_budget_bytes(maintenance_work_mem_mb: int, workers: int) -> int:
    """How much of ``maintenance_work_mem`` the graph may fill before pgvector writes it out and slows down."""
    return maintenance_work_mem_mb * MB - (HNSW_PARALLEL_RESERVE if workers else 0)


def hnsw_index_bytes_per_row(m: int, dimension: int, kind: str = "vector") -> float:
    """Bytes that one row takes in a freshly built HNSW index.

    From the page layout in pgvector's hnswbuild.c: element and neighbours are put on the same page if both fit an
    empty one, so the rest of a page is lost. How many rows a page takes depends on how many layers each is on.
    """
    element = _align(HNSW_ELEMENT_HEADER + vector_bytes(dimension, kind))
    pairs = _pair_sizes(m, element)
    if 2 * min(pairs) > PAGE_ROOM:
        # No two rows share a page, and neighbours that do not fit beside their element take one of their own.
        return PAGE * (1 + sum(p for room, p in pairs.items() if room > PAGE_ROOM))
    # P(n rows fit) summed over n is the expected number of rows on a page.
    rows, filled = 0.0, {0: 1.0}
    while filled:
        following: dict[int, float] = {}
        for used, p in filled.items():
            for room, q in pairs.items():
                if used + room <= PAGE_ROOM:
                    following[used + room] = following.get(used + room, 0.0) + p * q
        rows, filled = rows + sum(following.values()), following
    return PAGE / rows


def _pair_sizes(m: int, element: int) -> dict[int, float]:
    """Room of an element with its neighbours, line pointers included, and how probable each size is."""
    most = (PAGE_ROOM - HNSW_NEIGHBOR_HEADER - LINE_POINTER) // HNSW_POINTER // m - 2
    highest = min(most, HNSW_HIGHEST_LEVEL)
    sizes: dict[int, float] = {}
    for level in range(highest + 1):
        neighbours = _align(HNSW_NEIGHBOR_HEADER + HNSW_POINTER * (level + 2) * m)
        room = element + neighbours + 2 * LINE_POINTER
        probability = m**-level if level == highest else (1 - 1 / m) * m**-level
        sizes[room] = sizes.get(room, 0.0) + probability
    return sizes


def lists_rule(rows: int) -> int:
    """IVFFlat lists to start with. Source: README of pgvector, "IVFFlat"."""
    lists = rows // ROWS_A_LIST if rows <= LISTS_BY_ROOT_FROM_ROWS else round(math.sqrt(rows))
    return max(1, min(lists, LARGEST_LISTS))


def probes_rule(lists: int) -> int:
    """IVFFlat probes to start with. Source: README of pgvector, "IVFFlat"."""
    return max(1, round(math.sqrt(lists)))


def ivfflat_index_bytes(rows: int, dimension: int, kind: str, lists: int) -> int:
    """Bytes of a freshly built IVFFlat index: meta page, centres, and per list its pages, the last half full."""
    value = vector_bytes(dimension, kind)
    a_page = PAGE_ROOM // (_align(INDEX_TUPLE_HEADER + value) + LINE_POINTER)
    centres_a_page = PAGE_ROOM // (_align(IVFFLAT_LIST_HEADER + value) + LINE_POINTER)
    return PAGE * (1 + math.ceil(lists / centres_a_page) + math.ceil(rows / a_page + lists / 2))


def ivfflat_build_bytes(rows: int, dimension: int, kind: str, lists: int) -> int:
    """Memory of IVFFlat's k-means: samples, two sets of centres, and the bounds of Elkan's algorithm.

    Source: pgvector's ivfkmeans.c, ElkanKmeans.
    """
    samples = min(rows, max(IVFFLAT_SMALLEST_SAMPLE, IVFFLAT_SAMPLE_A_LIST * lists))
    value = _align(vector_bytes(dimension, kind))
    centres = 2 * lists * value + 4 * lists * dimension + 4 * lists
    bounds = 4 * (samples * lists + 2 * samples + lists * lists + 2 * lists)
    return samples * value + centres + bounds


def stored_bytes_per_row(dimension: int, kind: str, row_bytes: int) -> int:
    """Room of one vector in the table: inside the row, or in TOAST where the row would pass PostgreSQL's threshold.

    row_bytes: average width of the row without it.
    """
    value = vector_bytes(dimension, kind)
    if TUPLE_HEADER + row_bytes + value + TIMESTAMP_AND_HASH <= TOAST_THRESHOLD:
        return value
    return math.ceil(value * PAGE / (CHUNKS_A_PAGE * TOAST_CHUNK))


def table_growth_bytes(rows: int, dimension: int, kind: str, row_bytes: int) -> int:
    """How much the table grows while the vectors arrive, at most.

    Each row is rewritten with its vector; the old version's room comes back with the next vacuum, not before.
    """
    new_version = TUPLE_HEADER + LINE_POINTER + row_bytes + TIMESTAMP_AND_HASH
    return rows * (new_version + stored_bytes_per_row(dimension, kind, row_bytes))


def staging_bytes(rows: int, dimension: int, kind: str) -> int:
    """Room of the staging table: key, hash and vector of every row."""
    return rows * (TUPLE_HEADER + LINE_POINTER + 8 + TIMESTAMP_AND_HASH + stored_bytes_per_row(dimension, kind, 0))


def backfill_wal_bytes(
    rows: int,
    dimension: int,
    kind: str,
    row_bytes: int,
    indexes: int,
    table_bytes: int,
    trigram_bytes: float = 0.0,
) -> int:
    """WAL of the backfill's UPDATE: each row's new version with its vector, an entry in each index, and one full
    image of every page of the table and of what it grows by.

    Updates that stay on their page (HOT) write to no index; how many do shows only during the backfill, so none is
    counted on. trigram_bytes: text of a row that inverted indexes hold, as of trigrams.

    Checkpoints during the backfill repeat the full images, and how many entries a text makes is the text's own: the
    record shows what it came to.
    """
    value = vector_bytes(dimension, kind)
    toasted = stored_bytes_per_row(dimension, kind, row_bytes) != value
    chunks = math.ceil(value / TOAST_CHUNK) if toasted else 0
    records = 1 + chunks + indexes
    inverted = TRIGRAM_WAL_A_BYTE * trigram_bytes
    return round(rows * (value + row_bytes + TIMESTAMP_AND_HASH + WAL_A_RECORD * records + inverted)) + table_bytes


def build_workers(table_bytes: int, maintenance_work_mem_mb: int, most: int) -> int:
    """Parallel workers that PostgreSQL gives the build, by the size of the heap: vectors in TOAST do not count."""
    by_memory = maintenance_work_mem_mb // MEMORY_A_PARTICIPANT_MB - 1
    by_size = 0 if table_bytes < PARALLEL_FROM_BYTES else 1 + int(math.log(table_bytes / PARALLEL_FROM_BYTES, 3))
    return max(0, min(most, by_memory, by_size))


def build_seconds(rows: int, params: Params, workers: int, lists: int | None) -> float:
    """Time of the build on the machine of the measurements, while it fits into memory."""
    dimension = params.vector.dimension / HNSW_DIMENSION
    if lists is not None:
        return rows * (IVFFLAT_US_A_ROW + IVFFLAT_US_A_LIST * lists) * dimension / 1e6
    effort = params.index.ef_construction / HNSW_EF_CONSTRUCTION * (1 + dimension) / 2
    return HNSW_US / 1e6 * rows * math.log(max(rows, 2)) * effort / (1 + HNSW_SPEED_UP_A_WORKER * workers)


def ways_out(rows: int, params: Params, *, wanted_bytes: int) -> str:
    """What to change where a build does not fit into its memory, each way with its figures."""
    ix = params.index
    reserve = ix.maintenance_work_mem_mb * MB - _build_of(rows, params)[2]
    ways = [
        f"set index.maintenance_work_mem_mb: {-(-(wanted_bytes + reserve) // MB)}, if the server has that to spare"
    ]
    if params.indexed_type == "vector":
        ways.append(_way(rows, params, "storage", "halfvec"))
    if ix.method == "hnsw":
        ways.append(_way(rows, params, "method", "ivfflat"))
    return "; or ".join(ways)


def _way(rows: int, params: Params, key: str, value: str) -> str:
    other = params.model_copy(update={"index": params.index.model_copy(update={key: value})})
    index_bytes, memory, _, lists = _build_of(rows, other)
    of = "" if lists is None else f"{lists} lists, {probes_rule(lists)} probes to start with, "
    return f"index.{key}: {value} ({of}{size(memory)} while it is built, {size(index_bytes)} after)"


def _build_of(rows: int, params: Params) -> tuple[int, int, int, int | None]:
    """Bytes of the index, of its build, and of the memory that the build may take; lists of an IVFFlat index."""
    ix, dimension, kind = params.index, params.vector.dimension, params.indexed_type
    if ix.method == "ivfflat":
        lists = ix.lists or lists_rule(rows)
        memory = ivfflat_build_bytes(rows, dimension, kind, lists)
        return ivfflat_index_bytes(rows, dimension, kind, lists), memory, ix.maintenance_work_mem_mb * MB, lists
    index_bytes = 2 * PAGE + round(rows * hnsw_index_bytes_per_row(ix.m, dimension, kind))
    memory = round(rows * hnsw_build_bytes_per_row(ix.m, dimension, kind))
    return index_bytes, memory, hnsw_build_budget_bytes(ix.maintenance_work_mem_mb, ix.parallel_workers), None


@dataclass(frozen=True)
class Forecast:
    """What this migration will take, in bytes and seconds; ``lists`` and ``probes`` are None for HNSW.

    build_memory_bytes: what the build wants; build_budget_bytes: what the parameters allow it. wal_bytes: of load,
    backfill and build; backfill_wal_bytes: the backfill's part. workers: of the build.
    Times are those of another machine, which the measurements were made on.
    """

    rows: int
    index_bytes: int
    build_memory_bytes: int
    build_budget_bytes: int
    table_growth_bytes: int
    staging_bytes: int
    wal_bytes: int
    backfill_wal_bytes: int
    load_seconds: float
    backfill_seconds: float
    build_seconds: float
    workers: int
    lists: int | None = None
    probes: int | None = None
    max_wal_bytes: int | None = None

    @property
    def disk_bytes(self) -> int:
        """Free disk wanted for data when all of it is there; WAL is apart, since it may lie elsewhere."""
        return self.index_bytes + self.table_growth_bytes + self.staging_bytes

    def table(self) -> Table:
        """The figures as a reviewer reads them."""
        rows = [
            ("rows, if each gets a vector", number(self.rows)),
            ("index", size(self.index_bytes)),
            ("memory that its build wants", size(self.build_memory_bytes)),
            ("memory that the parameters allow it", size(self.build_budget_bytes)),
            ("growth of the table until the next vacuum, at most", size(self.table_growth_bytes)),
            ("staging table", size(self.staging_bytes)),
            ("free disk for all of these", size(self.disk_bytes)),
            (f"WAL {NO_HOT}; checkpoints add to it", size(self.wal_bytes)),
            (f"loading, without the model; backfill {NO_HOT}; build: as measured elsewhere", self._times()),
            ("parallel workers of the build", number(self.workers)),
        ]
        if self.max_wal_bytes:
            forced = f"{number(self.wal_bytes // self.max_wal_bytes)}, by max_wal_size {size(self.max_wal_bytes)}"
            rows.append(("checkpoints that the WAL forces; each lets pages be logged whole again", forced))
        if self.lists is not None:
            rows += [("lists", number(self.lists)), ("probes to start with", number(self.probes or 1))]
        return Table(("forecast", "figure"), rows)

    def _times(self) -> str:
        return "; ".join(duration(s) for s in (self.load_seconds, self.backfill_seconds, self.build_seconds))

    def to_frame(self) -> pandas.DataFrame:
        """The table as a DataFrame."""
        return self.table().to_frame()

    def __str__(self) -> str:
        return str(self.table())

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def forecast(
    rows: int,
    params: Params,
    *,
    row_bytes: int = 0,
    table_bytes: int = 0,
    indexes: int = 1,
    trigram_bytes: float = 0.0,
    max_wal_bytes: int | None = None,
    largest_partition: float = 1.0,
) -> Forecast:
    """The forecast for this many rows under these parameters.

    row_bytes: average width of a row today. table_bytes: size of the table today. indexes: how many it has;
    trigram_bytes: text of a row that inverted ones hold, as of trigrams. max_wal_bytes: the server's max_wal_size.
    largest_partition: share of the rows in the largest partition, 0 to 1. Vectors in a side table move by a rename:
    no row is written again.
    """
    v, ix = params.vector, params.index
    index_bytes, _, budget, _ = _build_of(rows, params)
    # Partitions are indexed one after the other, so the largest decides what memory a build wants.
    _, memory, _, lists = _build_of(round(rows * largest_partition), params)
    staged = rows * (vector_bytes(v.dimension, v.type) + STAGING_WAL_A_ROW)
    beside = has_side_table(params)
    if beside:
        # The staging table becomes the side table, and its bytes are counted there.
        growth, staging, moved = staging_bytes(rows, v.dimension, v.type), 0, 0
        moving = rows * PROMOTE_US_A_ROW / 1e6
    else:
        growth = table_growth_bytes(rows, v.dimension, v.type, row_bytes)
        staging = staging_bytes(rows, v.dimension, v.type)
        moved = backfill_wal_bytes(rows, v.dimension, v.type, row_bytes, indexes, table_bytes, trigram_bytes)
        moving = rows * (BACKFILL_US_A_ROW + TRIGRAM_NS_A_BYTE / 1e3 * trigram_bytes) / 1e6
    inline = stored_bytes_per_row(v.dimension, v.type, row_bytes) == vector_bytes(v.dimension, v.type)
    heap = growth if beside else table_bytes + (growth if inline else 0)
    workers = build_workers(round(heap * largest_partition), ix.maintenance_work_mem_mb, ix.parallel_workers)
    return Forecast(
        rows=rows,
        index_bytes=index_bytes,
        build_memory_bytes=memory,
        build_budget_bytes=budget,
        table_growth_bytes=growth,
        staging_bytes=staging,
        # An index build logs each of its pages once, whole.
        wal_bytes=staged + moved + index_bytes,
        backfill_wal_bytes=moved,
        load_seconds=rows * (LOAD_US_A_ROW * 1e3 + vector_bytes(v.dimension, v.type) * LOAD_NS_A_BYTE) / 1e9,
        backfill_seconds=moving,
        build_seconds=build_seconds(rows, params, workers, lists),
        workers=workers,
        lists=lists,
        probes=probes_rule(lists) if lists else None,
        max_wal_bytes=max_wal_bytes,
    )
