"""Versions that compare, and what servers of each age can and cannot do."""

from __future__ import annotations


def order(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: ``order("0.10.0") > order("0.9.1")``. What is no number ends it."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def at_least(version: str, needed: str) -> bool:
    """Is this version the needed one, or newer?"""
    return order(version) >= order(needed)


def readable(server_version: int) -> str:
    """PostgreSQL's number as people write it: 180006 is 18.6."""
    return f"{server_version // 10000}.{server_version % 10000}"


def ends_statements_of_gone_clients(server_version: int) -> bool:
    """client_connection_check_interval: PostgreSQL 14."""
    return server_version >= 140000


def scans_ranges_of_blocks(server_version: int) -> bool:
    """TID range scans, which read a range of heap blocks and nothing else: PostgreSQL 14."""
    return server_version >= 140000


def has_checkpointer_view(server_version: int) -> bool:
    """pg_stat_checkpointer: PostgreSQL 17; before it, the same figures stand in pg_stat_bgwriter."""
    return server_version >= 170000


def names_loaded_libraries(server_version: int) -> bool:
    """pg_get_loaded_modules(), with the release that a library says it is: PostgreSQL 18."""
    return server_version >= 180000


def publishes_schemas(server_version: int) -> bool:
    """CREATE PUBLICATION … FOR TABLES IN SCHEMA: PostgreSQL 15."""
    return server_version >= 150000


def dates_index_scans(server_version: int) -> bool:
    """last_idx_scan of pg_stat_user_indexes: PostgreSQL 16."""
    return server_version >= 160000


def spares_execute_of_generic_plans(server_version: int) -> bool:
    """plan_cache_mode = force_generic_plan ends at EXECUTE inside a function: PostgreSQL 14."""
    return server_version >= 140000


def hnsw_blocks_held_back(server_version: int) -> int:
    """Blocks of memory that a serial HNSW build asks for and does not fill: one before PostgreSQL 15, measured there
    (with 1, 2 and 3 MB it ran out after 1, 583 and 1163 rows; on 15 after 584, 1164 and 1745).
    """
    return 0 if server_version >= 150000 else 1
