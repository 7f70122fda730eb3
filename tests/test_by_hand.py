"""A run that somebody steps through: copies to work on, and a record of what was carried out with them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nbformat
import psycopg
import pytest
from nbclient import NotebookClient

from runbook_lib.cli import lab
from runbook_lib.core.gates import BadInput
from runbook_lib.core.registry import NOTEBOOKS_ENV, UNDO, UNDO_OPERATION, notebooks
from runbook_lib.core.target import load_params
from runbook_lib.runner import by_hand, finishing, manifest, runner, selection, target_status, verify
from tests import small_notebooks
from tests.conftest import write_params
from tests.small_runs import ROOT

pytestmark = pytest.mark.usefixtures("articles")
DEAD = 2**22 + 1


@pytest.fixture(autouse=True)
def model_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def execute(folder: Path, notebook: str) -> None:
    """Sets execute to True, runs every cell and saves, as a person in JupyterLab does."""
    path = folder / f"{notebook}.ipynb"
    opened = nbformat.read(path, as_version=4)
    cell = selection.parameters_cell(opened)
    cell.source = cell.source.replace("execute = False", "execute = True")
    NotebookClient(opened, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(opened, path)


def source(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(selection.parameters_cell(nbformat.read(path, as_version=4)).source, found)
    return {name: found[name] for name in ("params_file", "run_id", "execute") if name in found}


def test_every_notebook_has_a_copy_that_knows_its_run_and_only_plans(tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in notebooks().rglob("*.ipynb")}
    path = write_params(tmp_path)
    folder = by_hand.begin(path)
    copies = sorted(p.relative_to(folder) for p in folder.rglob("*.ipynb"))
    assert copies == sorted(p.relative_to(notebooks()) for p in before)
    for copy in copies:
        run = {} if copy.name == "00_start.ipynb" else {"run_id": folder.name, "execute": False}
        assert source(folder / copy) == {"params_file": str(path.resolve())} | run
    assert {p: p.read_bytes() for p in before} == before
    assert manifest.read(folder).way == "by hand"
    assert by_hand.finish(folder, load_params(path), manifest.read(folder)) is None and not folder.exists()


def test_where_nothing_was_carried_out_only_its_own_copies_are_removed(tmp_path: Path) -> None:
    path = write_params(tmp_path)
    folder = by_hand.begin(path)
    by_hand.environment(folder)
    (folder / "migrate" / ".ipynb_checkpoints").mkdir()
    (folder / "undo").rename(tmp_path / "elsewhere")
    (folder / "undo").symlink_to(tmp_path / "elsewhere")
    kept = [folder / "notes.txt", folder / "migrate" / "my_own.ipynb"]
    for file in kept:
        file.write_text("mine")
    assert by_hand.finish(folder, load_params(path), manifest.read(folder)) is None
    assert sorted(p for p in folder.rglob("*") if p.is_file()) == sorted(kept)
    assert len(list((tmp_path / "elsewhere").iterdir())) == len({*UNDO, *UNDO_OPERATION})


def test_what_was_carried_out_becomes_a_record_that_verifies(tmp_path: Path) -> None:
    path = write_params(tmp_path)
    p, folder = load_params(path), by_hand.begin(path)
    by_hand.environment(folder)
    execute(folder, "migrate/00_preflight")
    (folder / ".ipynb_checkpoints").mkdir()
    run = by_hand.finish(folder, p, manifest.read(folder))
    assert run is not None and (run.status, run.exit_code) == ("passed", 0)
    assert [(phase.name, phase.status) for phase in run.phases] == [("00_preflight", "passed")]
    assert {f.name for f in folder.iterdir()} == {
        "00_preflight.html", "00_preflight.ipynb", "index.html", "ledger.json", "manifest.json"
    }  # fmt: skip
    assert "Work by hand on" in (folder / "index.html").read_text()
    assert verify.check(p, folder.name).passed
    saved = nbformat.read(folder / "00_preflight.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in saved.cells)


def test_a_killed_lab_is_recorded_by_the_next_unless_the_ledger_knows_better(
    tmp_path: Path, database: str, articles: psycopg.Connection[Any]
) -> None:
    path = write_params(tmp_path)
    p, folder = load_params(path), by_hand.begin(path)
    execute(folder, "migrate/00_preflight")
    as_killed = json.loads((folder / "manifest.json").read_text()) | {"pid": DEAD}
    (folder / "manifest.json").write_text(json.dumps(as_killed))
    with psycopg.connect(database, application_name=f"runbook {folder.name} 10_baseline"):
        assert by_hand.settle(p) == [], "its kernel is still at work"
    finishing.settle_abandoned(p, True)
    assert manifest.read(folder).status == "running", "the runner leaves it to the lab"
    assert by_hand.settle(p) == [folder.name]
    assert "killed" in manifest.read(folder).notes[-1] and verify.check(p, folder.name).passed
    planted = as_killed | {"run_id": folder.name}
    (folder / "manifest.json").write_text(json.dumps(planted))
    assert by_hand.settle(p) == [], "a record is made once"
    assert not verify.check(p, folder.name).passed


def test_a_notebook_that_is_stored_ready_to_execute_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_notebooks.write(tmp_path / "notebooks")
    monkeypatch.setenv(NOTEBOOKS_ENV, str(folder))
    first = next((folder / "migrate").glob("00_*.ipynb"))
    first.write_text(first.read_text().replace("execute = False", "execute = True"))
    with pytest.raises(BadInput) as refused:
        runner.run(write_params(tmp_path), execute=False)
    (gate,) = refused.value.problems
    assert (gate.name, gate.subject) == ("runner.notebook_only_plans_by_default", "migrate/00_preflight.ipynb")


def test_the_start_says_what_is_next_and_links_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_params(tmp_path)
    folder = by_hand.begin(path)
    monkeypatch.chdir(folder)
    text = target_status.overview(path).data
    assert "**public.articles**" in text and "next is 00_preflight; reads go to legacy" in text
    assert "**[00_preflight](migrate/00_preflight.ipynb)** ← next | – NOT RUN" in text
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(links) > 30 and not [link for link in links if not Path(folder, link).exists()]
    shutil.rmtree(folder)


def test_jupyterlab_opens_the_start_with_documents_and_parameters_in_reach(tmp_path: Path) -> None:
    project = notebooks().parent
    folder = project / "runs" / "x-by-hand"
    assert by_hand.root(folder) == project.resolve() and by_hand.root(tmp_path / "x") == tmp_path
    command = lab._command(folder, True, 8890)
    assert f"--ServerApp.root_dir={project}" in command and "--port=8890" in command
    assert "--LabApp.default_url=/lab/tree/runs/x-by-hand/00_start.ipynb" in command
    environment = by_hand.environment(tmp_path)
    config = Path(environment["JUPYTER_CONFIG_PATH"].split(os.pathsep)[0], "labconfig")
    assert "autosaveInterval" in (config / "default_setting_overrides.json").read_text()
    assert Path(environment["JUPYTERLAB_WORKSPACES_DIR"]).is_relative_to(tmp_path), "its tabs end with it"
