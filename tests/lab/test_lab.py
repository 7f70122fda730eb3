"""Stepping through in JupyterLab, driven in headless Chromium: gates fail and pass, an interrupt ends cleanly."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import NOTEBOOKS_ENV
from runbook_lib.migrate import expand_schema, extension, load_embeddings
from tests.conftest import write_params
from tests.lab.browser import browser, program
from tests.lab.lab import Lab, configure, jupyterlab, ready

pytestmark = pytest.mark.skipif(program() is None, reason="no chromium on this machine: apt-get install chromium")

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"
GONE_WITHIN_S = 2.0
# Tables of outputs that are wider than their place, and cannot have the focus.
UNREACHABLE = """Array.from(document.querySelectorAll('.jp-OutputArea-output, .jp-OutputArea-output *'))
    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX === 'auto' && e.tabIndex < 0)
    .map(e => e.innerText.slice(0, 80))"""
# What JupyterLab itself says in the console when a kernel is restarted while its debugger asks for its state.
OF_A_RESTART = "Could not restore the debugger state"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def lab(tmp_path: Path, articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """JupyterLab on the notebooks, which name the toy target and carry things out."""
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    params_file = write_params(tmp_path, index={"maintenance_work_mem_mb": 64, "parallel_workers": 0})
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    for path in (tmp_path / "notebooks").glob("*/*.ipynb"):
        text = path.read_text().replace("../../params/demo.yaml", str(params_file))
        path.write_text(text.replace("execute = False", "execute = True"))
    with (
        jupyterlab(tmp_path / "notebooks", tmp_path, free_port()) as url,
        browser(tmp_path / "chromium") as page,
    ):
        yield Lab(page, url)
        assert [p for p in page.problems if not p.startswith(OF_A_RESTART)] == []


def running(connection: psycopg.Connection[Any], what: str) -> bool:
    """Does another session of this database carry out a statement with these words?"""
    query = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
        " AND pid <> pg_backend_pid() AND query ILIKE '%%' || %s || '%%'"
    )
    return connection.execute(query, [what]).fetchone() is not None


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"did not hold within {seconds} s"
        time.sleep(0.05)


def test_a_gate_fails_and_then_passes(lab: Lab) -> None:
    lab.open("migrate/10_baseline.ipynb")
    cells = lab.run_all()
    stopped = lab.code("phase.require(")
    assert [c.error for c in cells if c.error] == ["GateFailed"]
    assert "FAIL    phase.predecessor_passed   00_preflight" in stopped.text, "the table"
    said = stopped.outputs[-1]["traceback"]
    assert said[0] == "GateFailed: the notebook stops here." and len(said) == 3, "what to do, and no traceback"
    assert lab.code("phase.close(").count is None, "no cell after the gate was run"

    lab.open("migrate/00_preflight.ipynb")
    cells = lab.run_all()
    taken = next(c for c in cells if c.error)
    assert (taken.error, "phase.target_is_free" in taken.text) == ("BadInput", True), "10_baseline is still open"
    assert "10_baseline" in taken.text and "close its notebook's kernel" in taken.text

    lab.select("10_baseline")
    lab.command("kernelmenu:restart", wait=False)
    lab.page.wait("document.querySelector('.jp-Dialog .jp-mod-accept') !== null")
    lab.page.run("document.querySelector('.jp-Dialog .jp-mod-accept').click()")
    lab.rest()
    lab.select("00_preflight")
    assert [c.error for c in lab.run_all() if c.error] == [], "a restarted kernel has let go of the target"
    assert "00_preflight  PASS     10_baseline" in lab.code("phase.close(").text
    assert "PASS    preflight.no_old_snapshot" in lab.code("phase.prove(").text

    lab.select("10_baseline")
    for _ in ("once", "again in the same kernel"):
        assert [c.error for c in lab.run_all() if c.error] == []


def test_a_sql_cell_shows_a_frame_and_notices_and_refuses_a_write_in_a_few_lines(
    lab: Lab, articles: psycopg.Connection[Any]
) -> None:
    lab.page.send("Emulation.setDeviceMetricsOverride", width=1280, height=4000, deviceScaleFactor=1, mobile=False)
    lab.open("migrate/00_preflight.ipynb")
    cell = lab.code("%%sql").source
    noisy = "%%sql\nDO $$ BEGIN RAISE NOTICE 'half way'; END $$;\nSELECT id, title FROM articles WHERE id = :id"
    lab.edit(cell, noisy)
    lab.edit('run_id = ""', 'run_id = ""\nid = 7')
    assert [c.error for c in lab.run_all() if c.error] == []
    shown = lab.code("%%sql")
    assert "NOTICE:  half way" in shown.text and "Read only, database" in shown.text and "1 row\n" in shown.text
    assert 'class="dataframe' in str(shown.outputs[-1]["data"]["text/html"])
    assert lab.page.run(UNREACHABLE) == [], "what scrolls to the side can be reached by keyboard"

    lab.edit(noisy, "%%sql\nDELETE FROM articles")
    lab.run_all()
    refused = lab.code("%%sql").outputs[-1]
    assert (refused["ename"], len(refused["traceback"])) == ("ReadFailed", 4)
    assert refused["traceback"][0] == "ERROR:  cannot execute DELETE in a read-only transaction"
    assert articles.execute("SELECT count(*) FROM articles").fetchone() != (0,)


def test_an_interrupted_backfill_or_build_ends_cleanly_and_goes_on(
    lab: Lab, articles: psycopg.Connection[Any], open_phase: Callable[..., Phase]
) -> None:
    up_to_staging(open_phase)
    slow_down(articles)
    interrupt(lab, articles, "migrate/50_backfill.ipynb", "UPDATE")
    articles.execute("DROP TRIGGER slow ON articles")
    assert [c.error for c in lab.run_all() if c.error] == []
    assert "50_backfill  PASS     60_build_index" in lab.code("phase.close(").text
    lab.close()

    with psycopg.connect(articles.info.dsn) as reader:
        # An open snapshot holds the concurrent build back for as long as it takes to interrupt it.
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM articles")
        interrupt(lab, articles, "migrate/60_build_index.ipynb", "CREATE INDEX CONCURRENTLY")
    assert [c.error for c in lab.run_all() if c.error] == []
    assert "PASS    index.is_valid" in lab.code("phase.prove(").text


def up_to_staging(open_phase: Callable[..., Phase]) -> None:
    """The phases before the backfill, without their notebooks."""
    expand_schema.record_start(open_phase("00_preflight"))
    for name, work in (
        ("20_extension", extension),
        ("30_expand_schema", expand_schema),
        ("40_load_embeddings", load_embeddings),
    ):
        phase = open_phase(name)
        work.apply(phase)
        phase.close(phase.prove(work.verify))


def slow_down(connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        """
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NEW; END $$;
        CREATE TRIGGER slow BEFORE UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION slow();
        """
    )


def interrupt(lab: Lab, connection: psycopg.Connection[Any], notebook: str, statement: str) -> None:
    """Runs all of a notebook and interrupts the kernel while the statement is under way."""
    lab.open(notebook)
    lab.start_all()
    wait_until(lambda: running(connection, statement), 20)
    lab.command("kernelmenu:interrupt")
    wait_until(lambda: not running(connection, statement), GONE_WITHIN_S)
    lab.rest()
    stopped = next(c for c in lab.cells() if c.error)
    assert stopped.error == "KeyboardInterrupt" and "apply(" in stopped.source
    said = "".join(stopped.outputs[-1]["traceback"])
    assert said.startswith("Interrupted.") and len(said.splitlines()) == 2


def test_make_lab_serves_the_notebooks_until_ctrl_c(tmp_path: Path) -> None:
    for folder in ("notebooks", "params"):
        shutil.copytree(NOTEBOOKS.parent / folder, tmp_path / folder)
    port = free_port()
    env = configure(tmp_path / "jupyter", port) | {NOTEBOOKS_ENV: str(tmp_path / "notebooks")}
    # A shell starts what runs in its background with SIGINT ignored, these tests too, and a child inherits that.
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    begin += "from runbook_lib.cli.main import main; main()"
    command = [sys.executable, "-c", begin, "demo", "--lab"]
    log = tmp_path / "lab.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=stderr)
    url = ready(f"http://localhost:{port}", process, 120)
    (folder,) = (tmp_path / "runs").glob("*-by-hand")
    with urllib.request.urlopen(f"{url}/api/contents/runs/{folder.name}/migrate", timeout=10) as answer:
        assert "00_preflight.ipynb" in [item["name"] for item in json.load(answer)["content"]]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "stopping JupyterLab" in log.read_text() and not folder.exists(), "nothing was carried out"
    assert not (tmp_path / "runs" / ".server" / "data" / "postmaster.pid").exists()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/api/status", timeout=2)
