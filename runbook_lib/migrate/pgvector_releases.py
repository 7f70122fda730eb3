"""What is known about the releases of pgvector, with their fixes, and about the servers that they need."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.versions import at_least, order, readable
from runbook_lib.params import Params

# Older ones overflow a buffer in a parallel HNSW build.
OLDEST_PGVECTOR = "0.8.2"
# Vacuums of an HNSW index by older ones could lose links of its graph: CHANGELOG.md of pgvector, 0.8.3 and 0.8.4.
VACUUMS_HNSW_SAFELY = "0.8.4"
# pgvector 0.8.0 dropped PostgreSQL 12.
OLDEST_SERVER = 130000
# Release notes of PostgreSQL 14.4: concurrent builds before it can leave rows out of the new index.
CORRUPTING_SERVERS = range(140000, 140004)


@dataclass(frozen=True)
class Release:
    """A tagged release of pgvector: what it brought and what it fixed, as far as it matters to a migration."""

    version: str
    released: date
    brings: str
    fixes: tuple[str, ...] = ()


# Versions and dates: CHANGELOG.md and tags of pgvector/pgvector; CVE numbers: pgvector's security advisories.
RELEASES = (
    Release("0.5.0", date(2023, 8, 28), "HNSW"),
    Release("0.5.1", date(2023, 10, 10), "faster HNSW builds", ("index scans under a wrong kind of snapshot",)),
    Release(
        "0.6.0",
        date(2024, 1, 29),
        "parallel HNSW builds; vectors stored EXTERNAL",
        ("invalid memory alloc request size in HNSW builds", "errors under logical replication"),
    ),
    Release("0.6.1", date(2024, 3, 4), "", ("ANALYZE failing on mixed dimensions", "a crash when preloaded")),
    Release("0.6.2", date(2024, 3, 18), "less lock contention in parallel HNSW builds"),
    Release("0.7.0", date(2024, 4, 29), "halfvec, sparsevec, indexes on bit"),
    Release("0.7.1", date(2024, 6, 3), "faster on-disk HNSW builds"),
    Release("0.7.2", date(2024, 6, 11), "", ("indexes on unlogged tables after a crash",)),
    Release("0.7.3", date(2024, 7, 22), "", ("failed to add index item with sparsevec",)),
    Release("0.7.4", date(2024, 8, 5), "", ("locking in parallel HNSW builds",)),
    Release("0.8.0", date(2024, 10, 30), "iterative index scans; better cost estimates when filtering"),
    Release("0.8.1", date(2025, 9, 4), "PostgreSQL 18"),
    Release(
        "0.8.2",
        date(2026, 2, 25),
        "",
        ("CVE-2026-3172: buffer overflow in parallel HNSW builds, 0.6.0 to 0.8.1",),
    ),
    Release("0.8.3", date(2026, 6, 17), "", ("possible corruption of an HNSW index by vacuum",)),
    Release(
        "0.8.4",
        date(2026, 6, 30),
        "",
        (
            "vacuum failing with: hnsw graph not repaired",
            "possible error of an insert while an HNSW index is vacuumed",
            "IVFFlat builds using more than maintenance_work_mem",
        ),
    ),
    Release("0.8.5", date(2026, 7, 8), "less memory for IVFFlat builds on small tables"),
    Release(
        "0.8.6",
        date(2026, 7, 29),
        "",
        (
            "CVE-2026-18022: buffer overflow in IVFFlat builds on 32-bit systems",
            "memory of IVFFlat scans in nested loops",
        ),
    ),
)


def release(version: str) -> Release | None:
    """The release of that version; None where no tag known here carries it."""
    return next((r for r in RELEASES if r.version == version), None)


def between(older: str, newer: str) -> list[Release]:
    """The releases after ``older`` up to and with ``newer``, oldest first: what an update brings."""
    return [r for r in RELEASES if order(older) < order(r.version) <= order(newer)]


def faults_in_use(installed: str, method: str, *, is_32_bit: bool) -> tuple[list[str], list[str]]:
    """What later releases fix that concerns who uses this: security faults, for which a release is refused, and the
    others, which are told. Each with its release.

    method: of the index here; what concerns the other method alone, or 32-bit servers alone, is left out.
    """
    other = "IVFFlat" if method == "hnsw" else "HNSW"
    fixed = [(r.version, fix) for r in RELEASES if order(r.version) > order(installed) for fix in r.fixes]
    mine = [
        (version, fix)
        for version, fix in fixed
        if other.lower() not in fix.lower() and (is_32_bit or "32-bit" not in fix)
    ]
    refused = [f"{version}: {fix}" for version, fix in mine if fix.startswith("CVE-")]
    return refused, [f"{version}: {fix}" for version, fix in mine if not fix.startswith("CVE-")]


def check_wanted(params: Params) -> Gate:
    """Is ``extension.version``, where it is given, a release, and one without a known overflow?"""
    wanted = params.extension.version
    known = release(wanted) if wanted else None
    usable = wanted is None or (known is not None and at_least(wanted, OLDEST_PGVECTOR))
    if wanted is None:
        found = "not given: the server's default is taken"
    elif known is None:
        found = f"{wanted}: no tag of pgvector known to this runbook carries it"
    else:
        found = f"{wanted}, released {known.released:%Y-%m-%d}"
    faults = [f for r in between(known.version, OLDEST_PGVECTOR) for f in r.fixes] if known else []
    return gate(
        "versions.wanted_release_is_usable",
        usable,
        "extension.version",
        found=found,
        needed=f"a release from {OLDEST_PGVECTOR} to {RELEASES[-1].version}, or newer once it is in RELEASES",
        danger="known faults stay in: " + "; ".join(faults) if faults else "there is nothing to install by that name",
        do=f"set extension.version: {_nearest(wanted or '')}, or leave the key out",
    )


def _nearest(version: str) -> str:
    safe = [r.version for r in RELEASES if at_least(r.version, OLDEST_PGVECTOR)]
    wanted = order(version.lstrip("vV"))
    if wanted and wanted < order(safe[0]):
        return safe[0]
    return next((v for v in safe if order(v) >= wanted), safe[-1]) if wanted else safe[-1]


def check_server(server_version: int) -> Gate:
    """Is the server one that pgvector supports, and whose concurrent builds can be trusted?

    server_version: as ``server_version_num`` and libpq give it.
    """
    corrupting = server_version in CORRUPTING_SERVERS
    return gate(
        "versions.server_is_supported",
        server_version >= OLDEST_SERVER and not corrupting,
        "PostgreSQL",
        found=readable(server_version),
        needed="14.4 or newer 14" if corrupting else f"{OLDEST_SERVER // 10000} or newer",
        danger="CREATE INDEX CONCURRENTLY can leave rows out of the index without a word"
        if corrupting
        else f"pgvector {OLDEST_PGVECTOR} and newer do not build there",
        do="install the newest minor release of this server, and reindex what was built concurrently"
        if corrupting
        else "upgrade the server first",
        figures={"server_version_num": server_version},
    )
