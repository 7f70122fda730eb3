"""The whole way there and the whole rollback, through papermill, on the toy table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import comparison
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.runner import runner
from runbook_lib.runner.runner import RunResult
from tests import toy
from tests.conftest import write_params
from tests.servers import dump
from tests.stepping import step_all
from tests.test_serve_filters import TARGET
from tests.test_server_versions import SECTIONS

ROOT = Path(__file__).parent.parent


def rows(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    """The application's own columns."""
    return connection.execute("SELECT id, title, body, status, views, tsv FROM articles ORDER BY id").fetchall()


def empty_displays(folder: Path) -> list[str]:
    """The %%sql cells of executed notebooks that showed no row."""
    cells = [
        (path.stem, cell)
        for path in sorted(folder.glob("*.ipynb"))
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code" and "".join(cell["source"]).startswith("%%sql")
    ]
    assert cells
    return [
        name
        for name, cell in cells
        if not any("<td>" in "".join(o.get("data", {}).get("text/html", "")) for o in cell["outputs"])
    ]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunResult]:
    """Runs the notebooks on the toy table; keyword arguments are the runner's."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = write_params(
        tmp_path,
        record={"runs_dir": "runs"},
        # The toy model is worse than LIKE on these queries, and 80_shadow would say so.
        cut_over={
            "route": "vector",
            "calls_per_step": 20,
            "share_steps_percent": [50, 100],
            "largest_relevance_loss": 1.0,
        },
        tune={"ef_search": [20, 60], "target_recall": 0.9},
    )
    return lambda **how: runner.run(path, say=print, **how)


def test_there_and_back(articles: psycopg.Connection[Any], database: str, go: Callable[..., RunResult]) -> None:
    before, own_rows = dump(database), rows(articles)

    there = go(execute=True)
    assert (there.status, there.exit_code) == ("passed", 0)
    manifest = json.loads((there.folder / "manifest.json").read_text())
    assert [p["name"] for p in manifest["phases"]] == list(MIGRATE)
    assert empty_displays(there.folder) == []
    assert articles.execute("SELECT route, share_percent FROM runbook.route").fetchall() == [("vector", 100)]
    answer = articles.execute(
        "SELECT id, answered_by"
        " FROM search_articles('cookie leaks', (SELECT embedding FROM articles WHERE id = 3), 3)"
    ).fetchall()
    assert toy.as_near_as_row_3(answer[0])
    assert dump(database) != before

    back = go(execute=True, way="undo")
    assert (back.status, back.exit_code) == ("passed", 0)
    assert [p["name"] for p in json.loads((back.folder / "manifest.json").read_text())["phases"]] == list(UNDO)
    assert dump(database) == before
    assert rows(articles) == own_rows

    verdicts = articles.execute(
        "SELECT DISTINCT ON (phase) phase, body->>'verdict' FROM runbook.entry WHERE kind = 'phase'"
        " ORDER BY phase, seq DESC"
    ).fetchall()
    assert {verdict for phase, verdict in verdicts if phase in MIGRATE} == {"UNDONE"}


def test_a_plan_changes_nothing_at_all(
    articles: psycopg.Connection[Any], database: str, go: Callable[..., RunResult]
) -> None:
    before = dump(database)
    planned = go(execute=False)
    assert (planned.status, planned.exit_code) == ("planned", 0)
    assert dump(database) == before
    assert articles.execute("SELECT to_regnamespace('runbook')").fetchone() == (None,)
    page = (planned.folder / "index.html").read_text()
    assert "NOT RUN" in page and "WOULD PASS" in page and "✔ PASS" not in page
    assert "runbook run" in page and "strongest lock, ACCESS EXCLUSIVE" in page


def test_a_handful_of_rows_that_legacy_never_finds_go_there_and_back(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine says nothing of the search: differences below this count as noise.
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000.0)
    articles.execute("DELETE FROM articles WHERE id > 3")
    articles.execute("UPDATE articles SET title = 'zebra ' || id, body = 'a horse with stripes', status = id::text")
    articles.execute(f"ALTER DATABASE {articles.info.dbname} SET random_page_cost = 4")
    before = dump(database)
    unjudged = {"queries": {"judgements": None}, "cut_over": {**SECTIONS["cut_over"], "accept_unjudged": True}}
    path = write_params(tmp_path, **SECTIONS | TARGET | unjudged)
    step_all("migrate", MIGRATE, path)
    assert articles.execute("SELECT route, share_percent FROM runbook.route").fetchall() == [("vector", 100)]
    step_all("undo", UNDO, path)
    assert dump(database) == before
