"""Tampering with a record, one way at a time: each is found, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.core.gates import Gate
from runbook_lib.core.target import load_params
from runbook_lib.runner import manifest, verify
from tests.small_runs import FIRST, SECOND
from tests.small_runs import run as run  # a fixture

APART = "ALTER TABLE runbook.entry DISABLE TRIGGER ALL; "


@pytest.fixture
def sealed(run: Callable[..., Any], articles: psycopg.Connection[Any]) -> Path:
    """The folder of a run that passed."""
    assert articles is not None
    result, _ = run({f"p{FIRST}": "print(900 + 38, 'rows')"}, last=SECOND)
    assert result.status == "passed" and result.folder is not None
    return Path(result.folder)


def broken(folder: Path, head: str = "") -> list[Gate]:
    """The gates of verify that do not pass."""
    p = load_params(folder.parent.parent / "toy.yaml")
    return list(verify.check(p, folder.name, head).failed)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_record_as_it_was_written_is_whole(sealed: Path) -> None:
    assert broken(sealed) == []
    assert broken(sealed, manifest.read(sealed).head) == []


@pytest.mark.attack
@pytest.mark.parametrize(
    ("file", "old", "new", "found"),
    [
        (f"{FIRST}.ipynb", "938 rows", "939 rows", "changed: the outputs of cell 5"),
        (f"{FIRST}.ipynb", "900 + 38", "900 + 37", "changed: the source of cell 5"),
        (f"{FIRST}.ipynb", '"status": "passed"', '"status": "failed"', "changed: its metadata only"),
        (f"{FIRST}.html", "938 rows", "939 rows", "changed"),
        ("index.html", "every gate passed", "every gate surpassed", "changed"),
        ("manifest.json", '"status": "passed",\n  "exit_code"', '"status": "failed",\n  "exit_code"',
         "status failed, by the ledger passed"),
    ],
)  # fmt: skip
def test_a_changed_file_is_named(sealed: Path, file: str, old: str, new: str, found: str) -> None:
    edit(sealed / file, old, new)
    # A manifest that says something else does not fit the list of runs either.
    assert [(g.subject, g.found) for g in broken(sealed)][:1] == [(f"{sealed.name}/{file}", found)]


@pytest.mark.attack
def test_a_replaced_and_a_missing_file_are_named(sealed: Path) -> None:
    (sealed / f"{SECOND}.ipynb").write_bytes((sealed / f"{FIRST}.ipynb").read_bytes())
    (sealed / "index.html").unlink()
    notebook, page = broken(sealed)
    assert (notebook.subject, page.found) == (f"{sealed.name}/{SECOND}.ipynb", "missing")
    assert notebook.found.startswith("changed: the source of cell ")


@pytest.mark.attack
def test_a_changed_dropped_or_added_row_of_the_ledger_copy_is_named(sealed: Path) -> None:
    path = sealed / verify.LEDGER_COPY
    rows = json.loads(path.read_text())
    changed = [rows[0] | {"body": {}}, *rows[2:], rows[-1] | {"seq": 999}]
    path.write_text(json.dumps(changed))
    (gate,) = broken(sealed)
    assert gate.found == (
        f"changed: row {rows[1]['seq']} is missing, row 999 is not in the ledger,"
        f" row {rows[0]['seq']} differs from the ledger"
    )


@pytest.mark.attack
@pytest.mark.parametrize(
    ("tampering", "found"),
    [
        ("UPDATE runbook.entry SET body = '{}' WHERE seq = 2", "row 2 (gate of 00_preflight, run {run}) was changed"),
        ("DELETE FROM runbook.entry WHERE seq = 2", "row 2 is missing"),
        (
            "UPDATE runbook.entry SET seq = -2 WHERE seq = 2; UPDATE runbook.entry SET seq = 2 WHERE seq = 3;"
            "UPDATE runbook.entry SET seq = 3 WHERE seq = -2",
            "row 2 does not follow the row before it",
        ),
    ],
)
def test_a_tampered_ledger_is_found(
    sealed: Path, articles: psycopg.Connection[Any], tampering: str, found: str
) -> None:
    articles.execute(APART + tampering)
    chain = broken(sealed)[0]
    assert (chain.name, chain.found.split(" (")[0]) == ("ledger.chain_is_whole", found.split(" (")[0])


@pytest.mark.attack
def test_rows_cut_off_the_end_are_found_by_the_head(sealed: Path, articles: psycopg.Connection[Any]) -> None:
    head = manifest.read(sealed).head
    articles.execute(APART + "DELETE FROM runbook.entry WHERE kind = 'record'")
    gate, unsealed = broken(sealed)
    assert (gate.name, gate.found) == ("record.head_is_in_the_ledger", f"no row has the hash {head[:16]}")
    assert str(unsealed) == (
        f"UNKNOWN record.is_sealed   {sealed.name}\n"
        "  found   the ledger holds no hashes of this run's pages\n"
        "  needed  the row that a run writes last\n"
        "  danger  pages, ledger.json and manifest.json may have been changed, and nobody could tell\n"
        "  do      if the run was killed, start the next run of this target: it finishes the record; else read the"
        " notebooks, whose hashes are in the chain"
    )


@pytest.mark.attack
def test_a_forged_record_is_found_by_a_head_kept_elsewhere(sealed: Path, articles: psycopg.Connection[Any]) -> None:
    head = manifest.read(sealed).head
    articles.execute(APART + "DELETE FROM runbook.entry WHERE kind = 'record'")
    edit(sealed / "manifest.json", head, "")
    assert [g.name for g in broken(sealed)] == ["record.is_sealed"]
    assert [g.subject for g in broken(sealed, head)] == ["the head that was given", sealed.name]


@pytest.mark.attack
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exit_code", 1), ("host", "elsewhere"), ("started", "2020-01-01T00:00:00+00:00"), ("finished", ""),
        ("versions", {}), ("parameters", {}), ("params_file", "other.yaml"), ("notes", ["all is well"]),
        ("seconds", -1.0), ("way", "undo"), ("table", "public.other"), ("pid", 1),
    ],
)  # fmt: skip
def test_whatever_is_changed_in_the_manifest_is_named(sealed: Path, key: str, value: Any) -> None:
    path = sealed / manifest.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    found = {g.name: g.found for g in broken(sealed)}
    assert found["record.manifest_agrees"].startswith(f"{key} ")


@pytest.mark.attack
def test_planted_files_links_and_runs_are_named(sealed: Path) -> None:
    (sealed / "95_extra.html").write_text("all is well")
    (sealed / "notes").mkdir()
    (sealed / "notes" / "a.txt").write_text("x")
    (sealed / "link.html").symlink_to(sealed / "index.html")
    planted = sealed.parent / f"{sealed.name}-2"
    planted.mkdir()
    data = json.loads((sealed / manifest.FILE).read_text())
    (planted / manifest.FILE).write_text(json.dumps(data | {"run_id": planted.name}))
    (planted / "index.html").write_text("all is well")
    files, runs = broken(sealed)
    assert files.found == (
        "95_extra.html was not written by the run; notes/a.txt was not written by the run; link.html is a link"
    )
    assert runs.found == (
        f"{planted.name} is not in the ledger; index.html is not what the manifests of the runs make"
    )


def test_a_record_is_whole_while_another_run_is_under_way(sealed: Path) -> None:
    under_way = sealed.parent / f"{sealed.name}-2"
    under_way.mkdir()
    data = json.loads((sealed / manifest.FILE).read_text())
    changed = {"run_id": under_way.name, "status": "running", "phases": []}
    (under_way / manifest.FILE).write_text(json.dumps(data | changed))
    assert broken(sealed) == []


@pytest.mark.attack
def test_a_changed_list_of_runs_is_found(sealed: Path) -> None:
    edit(sealed.parent / "index.html", "passed", "surpassed")
    assert [g.found for g in broken(sealed)] == ["index.html is not what the manifests of the runs make"]


@pytest.mark.attack
@pytest.mark.parametrize("kind", ["gate", "notebook", "run", "record"])
def test_a_row_after_the_seal_is_named(sealed: Path, articles: psycopg.Connection[Any], kind: str) -> None:
    articles.execute(
        "INSERT INTO runbook.entry (target, run_id, phase, kind, body)"
        " SELECT target, run_id, phase, kind, body FROM runbook.entry WHERE kind = %s ORDER BY seq LIMIT 1",
        [kind],
    )
    (gate,) = broken(sealed)
    assert gate.name == "record.ends_with_its_seal"
    assert gate.found.startswith("after the seal: row ") and f", {kind} of " in gate.found
