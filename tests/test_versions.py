"""Releases: known, compared, and refused where they are unsafe."""

from collections.abc import Callable

import pytest

from runbook_lib.core import versions
from runbook_lib.migrate import pgvector_releases
from runbook_lib.params import Params


def test_the_table_is_in_order_and_ends_where_the_documents_say() -> None:
    assert [r.version for r in pgvector_releases.RELEASES] == sorted(
        (r.version for r in pgvector_releases.RELEASES), key=versions.order
    )
    assert [r.released for r in pgvector_releases.RELEASES] == sorted(r.released for r in pgvector_releases.RELEASES)
    first, last = pgvector_releases.release("0.8.2"), pgvector_releases.release("0.8.6")
    assert first is not None and (str(first.released), "CVE-2026-3172" in first.fixes[0]) == ("2026-02-25", True)
    assert last is not None and (str(last.released), "CVE-2026-18022" in last.fixes[0]) == ("2026-07-29", True)


@pytest.mark.parametrize(
    ("older", "newer"), [("0.8.2", "0.8.10"), ("0.9.9", "0.10.0"), ("0.8", "0.8.0"), ("x", "0.1")]
)
def test_versions_compare_as_numbers(older: str, newer: str) -> None:
    assert versions.at_least(newer, older) and not versions.at_least(older, newer)


def test_an_update_lists_what_it_brings() -> None:
    assert [r.version for r in pgvector_releases.between("0.8.2", "0.8.4")] == ["0.8.3", "0.8.4"]
    assert pgvector_releases.between("0.8.6", "0.8.2") == []


def test_no_wanted_version_is_fine(make_params: Callable[..., Params]) -> None:
    g = pgvector_releases.check_wanted(make_params())
    assert (g.verdict, g.found) == ("PASS", "not given: the server's default is taken")


@pytest.mark.parametrize("wanted", ["0.8.2", "0.8.6"])
def test_a_safe_release_passes(make_params: Callable[..., Params], wanted: str) -> None:
    assert pgvector_releases.check_wanted(make_params(extension={"version": wanted})).verdict == "PASS"


@pytest.mark.parametrize(
    ("wanted", "nearest"), [("0.8.7", "0.8.6"), ("0.9.0", "0.8.6"), ("v0.8.3", "0.8.3"), ("latest", "0.8.6")]
)
def test_a_version_without_a_tag_is_refused_and_the_nearest_named(
    make_params: Callable[..., Params], wanted: str, nearest: str
) -> None:
    g = pgvector_releases.check_wanted(make_params(extension={"version": wanted}))
    assert str(g) == (
        "FAIL    versions.wanted_release_is_usable   extension.version\n"
        f"  found   {wanted}: no tag of pgvector known to this runbook carries it\n"
        "  needed  a release from 0.8.2 to 0.8.6, or newer once it is in RELEASES\n"
        "  danger  there is nothing to install by that name\n"
        f"  do      set extension.version: {nearest}, or leave the key out"
    )


def test_a_release_with_a_known_overflow_is_refused(make_params: Callable[..., Params]) -> None:
    g = pgvector_releases.check_wanted(make_params(extension={"version": "0.8.1"}))
    assert str(g) == (
        "FAIL    versions.wanted_release_is_usable   extension.version\n"
        "  found   0.8.1, released 2025-09-04\n"
        "  needed  a release from 0.8.2 to 0.8.6, or newer once it is in RELEASES\n"
        "  danger  known faults stay in: CVE-2026-3172: buffer overflow in parallel HNSW builds, 0.6.0 to 0.8.1\n"
        "  do      set extension.version: 0.8.2, or leave the key out"
    )


@pytest.mark.parametrize("number", [130000, 140004, 150000, 180006])
def test_supported_servers_pass(number: int) -> None:
    assert pgvector_releases.check_server(number).verdict == "PASS"


@pytest.mark.parametrize("number", [140000, 140003])
def test_servers_whose_concurrent_builds_corrupt_are_refused(number: int) -> None:
    assert str(pgvector_releases.check_server(number)) == (
        "FAIL    versions.server_is_supported   PostgreSQL\n"
        f"  found   14.{number % 10}\n"
        "  needed  14.4 or newer 14\n"
        "  danger  CREATE INDEX CONCURRENTLY can leave rows out of the index without a word\n"
        "  do      install the newest minor release of this server, and reindex what was built concurrently"
    )


def test_a_server_that_pgvector_left_behind_is_refused() -> None:
    assert str(pgvector_releases.check_server(120022)) == (
        "FAIL    versions.server_is_supported   PostgreSQL\n"
        "  found   12.22\n"
        "  needed  13 or newer\n"
        "  danger  pgvector 0.8.2 and newer do not build there\n"
        "  do      upgrade the server first"
    )


def test_what_older_servers_lack() -> None:
    assert not versions.ends_statements_of_gone_clients(130022) and versions.ends_statements_of_gone_clients(140004)


@pytest.mark.parametrize(
    ("installed", "method", "is_32_bit", "refused", "told"),
    [
        ("0.8.6", "hnsw", False, [], []),
        ("0.8.5", "hnsw", False, [], []),
        ("0.8.5", "hnsw", True, [], []),
        ("0.8.5", "ivfflat", False, [], ["0.8.6: memory of IVFFlat scans in nested loops"]),
        (
            "0.8.5",
            "ivfflat",
            True,
            ["0.8.6: CVE-2026-18022: buffer overflow in IVFFlat builds on 32-bit systems"],
            ["0.8.6: memory of IVFFlat scans in nested loops"],
        ),
        (
            "0.8.2",
            "hnsw",
            False,
            [],
            [
                "0.8.3: possible corruption of an HNSW index by vacuum",
                "0.8.4: vacuum failing with: hnsw graph not repaired",
                "0.8.4: possible error of an insert while an HNSW index is vacuumed",
            ],
        ),
    ],
)
def test_a_release_is_judged_by_what_is_in_use(
    installed: str, method: str, is_32_bit: bool, refused: list[str], told: list[str]
) -> None:
    assert pgvector_releases.faults_in_use(installed, method, is_32_bit=is_32_bit) == (refused, told)
    if installed == "0.8.2":
        older = pgvector_releases.faults_in_use("0.8.1", method, is_32_bit=is_32_bit)[0]
        assert older == ["0.8.2: CVE-2026-3172: buffer overflow in parallel HNSW builds, 0.6.0 to 0.8.1"]


def test_before_15_a_serial_build_leaves_one_block_unused() -> None:
    assert [versions.hnsw_blocks_held_back(n) for n in (130022, 140022, 150018, 180006)] == [1, 1, 0, 0]
    assert not versions.spares_execute_of_generic_plans(130022) and versions.spares_execute_of_generic_plans(140004)
