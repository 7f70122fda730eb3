"""What differs between two runs: figures, gates and statements decide, times are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from click.testing import CliRunner, Result

from runbook_lib.cli.main import main
from runbook_lib.core.gates import BadInput
from runbook_lib.runner import manifest, rundiff
from tests.records import RUN_ID, make_entries, make_manifest


def write(folder: Path, entries: list[dict[str, Any]], text: str = "938 rows", **changes: Any) -> Path:
    folder.mkdir()
    manifest.write(folder, make_manifest(run_id=folder.name, **changes))
    (folder / "ledger.json").write_text(json.dumps(entries))
    cell = nbformat.v4.new_code_cell(f"run_id = '{folder.name}'", id="a")
    cell.outputs = [nbformat.v4.new_output("stream", text=f"{text}\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "50_backfill.ipynb")
    return folder


def diff(a: Path, b: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["diff", str(a), str(b), *options])


def test_a_run_is_the_same_as_itself_but_for_its_id(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, make_entries()) for name in ("run-a", "run-b"))
    result = diff(a, b)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "A  run-a  passed\nB  run-b  passed\n\nFigures: none\n\nGates whose verdict changed: none\n\n"
        "Statements of one run alone: none\n\n"
    )


def test_times_are_shown_and_do_not_count(tmp_path: Path) -> None:
    later = make_entries()
    next(e for e in later if e["kind"] == "backfill")["body"]["seconds"] = 1.84
    result = diff(write(tmp_path / "run-a", make_entries()), write(tmp_path / "run-b", later))
    assert result.exit_code == 0
    assert "backfill.seconds  0.92  1.84  2 ×" in result.stdout


def test_figures_gates_and_statements_come_before_the_notebooks(tmp_path: Path) -> None:
    later = make_entries()
    for e in later:
        if e["kind"] == "tuning":
            e["body"]["points"][2]["recall"] = 0.951
        elif e["kind"] == "index":
            e["body"]["bytes"] *= 2
        elif e["kind"] == "gate" and e["body"]["name"] == "index.is_valid":
            e["body"]["verdict"] = "FAIL"
        elif e["kind"] == "statement" and e["phase"] == "60_build_index":
            e["body"]["sql"] = "CREATE INDEX …;"
    result = diff(write(tmp_path / "run-a", make_entries()), write(tmp_path / "run-b", later, "939 rows"))
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    order = ["recall.points.80.recall 0.974 0.951", "index.bytes 1,523,712 3,047,424 2 ×",
             "60_build_index index.is_valid public.articles PASS FAIL",
             "A 60_build_index SHARE UPDATE EXCLUSIVE on the target CREATE INDEX CONCURRENTLY …;",
             "50_backfill.ipynb", "939 rows"]  # fmt: skip
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "RUN-ID" not in text
    assert "939 rows" not in diff(tmp_path / "run-a", tmp_path / "run-b", "--no-notebooks").stdout


def test_a_run_is_found_by_its_id_and_a_missing_one_is_named(tmp_path: Path) -> None:
    write(tmp_path / RUN_ID, [])
    assert rundiff.find(RUN_ID, tmp_path).run.run_id == RUN_ID
    with pytest.raises(BadInput) as error:
        rundiff.find("nothing", tmp_path)
    assert error.value.found == f"no manifest.json there, nor in {tmp_path / 'nothing'}"
    assert diff(tmp_path / "x", tmp_path / "y").exit_code == 2
