"""How much memory a batch of a file's rows may take: a file of 1 KB can hold rows that unpack to any size, and where
memory runs out, the kernel of the system ends what it likes, be it a database server."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Far beyond any batch that a writer makes by default: 65,536 rows of 3,072 dimensions, compressed, take 0.8 GiB.
MOST_BYTES_A_BATCH = min(4 * 1024**3, PAGE_BYTES * os.sysconf("SC_PHYS_PAGES") // 2)
# Sizes of this process in pages; the sixth is that of its data.
SIZES = Path("/proc/self/statm")


def bounded(batches: Iterator[T]) -> Iterator[T]:
    """The same batches. Raises MemoryError where making one takes more than MOST_BYTES_A_BATCH; on Linux alone, since
    other systems count what a process allocates against no limit.
    """
    while True:
        with _at_most(MOST_BYTES_A_BATCH):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


@contextmanager
def _at_most(more: int) -> Iterator[None]:
    """In the block this process may take so many bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if SIZES.exists():
        limit = int(SIZES.read_text().split()[5]) * PAGE_BYTES + more
        lowest = min(each for each in (soft, hard, limit) if each != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
