"""The page of a run: what it says, and that it needs nothing but itself."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from click.testing import CliRunner
from pydantic import BaseModel

from runbook_lib.backfill.progress import Progress
from runbook_lib.cli import main
from runbook_lib.core import db, pictures
from runbook_lib.core.display import Table
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.params import Params
from runbook_lib.runner import figures, history, manifest, questions, record, review
from runbook_lib.runner.manifest import PhaseRun
from tests.conftest import write_params
from tests.records import RUN_ID, entry, gate, make_entries, make_manifest, statement

VOID = {"meta", "br", "path", "use", "rect", "line", "circle", "img", "hr", "col", "input", "link"}


class WellFormed(HTMLParser):
    """Collects texts, ids and headings; fails where an element is closed that is not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [v for k, v in attrs if k == "id" and v]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [v for k, v in attrs if k == "id" and v]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)


def page_of(run: manifest.Manifest, entries: list[dict[str, Any]], **more: Any) -> tuple[str, str]:
    """The page, checked for its form, and its text with single spaces."""
    page = record.render(review.collect(run, entries, **more))
    parsed = WellFormed(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.headings[0] == "h1" and parsed.headings.count("h1") == 1
    return page, " ".join(" ".join(parsed.texts).split())


def needs_nothing_else(page: str) -> bool:
    addresses = re.findall(r"""(?:src|href)=["']([^"'#]+)|url\((?!#)([^)]+)\)|@import""", page)
    return "<script" not in page and not any(
        ":" in a for pair in addresses for a in pair if not a.startswith("data:")
    )


def answers(found: review.RecordPage) -> list[list[str]]:
    """What the ten questions are answered with, in their order."""
    assert len(found.questions) == 10
    return [list(q.answers) for q in found.questions]


def test_a_reviewer_reads_the_answers_to_ten_questions() -> None:
    run = make_manifest(user="ada", server="articles at db:5432")
    assert answers(review.collect(run, make_entries())) == [
        [
            "938 rows of public.articles got a vector in 920 ms.",
            "Reads now go to: hybrid, every call.",
            "4 statements changed something.",
        ],
        [
            "The strongest lock was ACCESS EXCLUSIVE (1 statement, the longest 312 ms),"
            " which blocks every read and write; 1 statement had to try again for its lock."
        ],
        [
            "OS user ada on host db-tools as role migrator, on articles at db:5432. It took 53.0 s.",
            "Versions: PostgreSQL 18.6, pgvector 0.8.6, runbook 0.1.0.",
        ],
        ["No step waits for a sign-off (approval.phases names none)."],
        [
            "10 gates passed; none failed.",
            "With hnsw.ef_search = 80 the index finds 97.4% of the exact 10 nearest rows in 1.04 ms at the median;"
            " exact search takes 4.4 ms (200 queries).",
        ],
        [
            "On 1,893 judged queries, hybrid answers best: nDCG@10 0.368; vectors, exact 0.312, vectors, by index"
            " 0.309, legacy search 0.221.",
            "Of these queries 1,203 are answered better, 301 worse, 389 alike.",
        ],
        [
            "Disk: 1.5 MB of index.",
            "Memory: the index answers fast while its 1.5 MB are cached; its build was to need 1.8 MB.",
            "Writes: how much slower they become was not measured; operate/rehearse measures it.",
        ],
        ["Nothing: no parameter lets a gate pass."],
        [
            "First reads (removes nothing: reads go back to legacy): one row, one transaction: milliseconds.",
            "Back to where it began: 5 steps, the last extension.",
        ],
        [
            f"The ledger ended with {'e' * 64} when this page was made; the run's own head is in manifest.json."
            " Keep it elsewhere, and check with --head."
        ],
    ]
    page, _ = page_of(run, make_entries())
    assert page.index("10. Is the record untampered?") < page.index('<h2 id="moved">')
    summary = page[page.index("<dl") : page.index("</dl>")]
    assert summary.count('<a href="#') == summary.count("<dd>") == 10, "each answer leads to its evidence"
    assert f"<code>runbook verify /srv/runbook/params/articles.yaml {RUN_ID}</code>" in page


def test_what_is_not_known_yet_is_said_in_words() -> None:
    run = make_manifest(
        phases=(PhaseRun("00_preflight", "passed"), PhaseRun("10_baseline", "waiting")),
        parameters={
            "approval": {"phases": ["10_baseline"]},
            "accept": {"triggers": ["touch", "audit"]},
            "cut_over": {"accept_unjudged": True, "largest_slowdown": 1.0},
        },
    )
    baseline = entry("10_baseline", "baseline", {"systems": {}, "left": ["q1"]})
    said = answers(review.collect(run, [baseline]))
    assert said[1] == ["None: no statement ran."]
    assert said[3] == ["10_baseline waits for approval, or for its hours."]
    assert said[4] == [
        "0 gates passed; none failed. Not proved: 10_baseline.",
        "No recall yet: 70_tune measured none.",
    ]
    assert said[5] == ["Not known yet: no comparison by 80_shadow."]
    assert said[6] == ["Not known yet: no figures of 50_backfill or 60_build_index."]
    assert said[7] == [
        "Accepted by accept.triggers: touch, audit.",
        "Accepted by cut_over.accept_unjudged: True.",
        f"Not in this run: {', '.join(MIGRATE[2:])}.",
        "1 query did not fit into queries.baseline_minutes and were left out.",
    ]


def test_nothing_is_answered_from_a_ledger_that_could_not_be_read() -> None:
    phases = (PhaseRun("00_preflight", "passed"), PhaseRun("10_baseline", "crashed", error="the server is gone"))
    said = answers(review.collect(make_manifest(phases=phases), [], notes=["The ledger could not be read"]))
    assert said[0] == [
        "The run stopped in 10_baseline. Rerun the same command to resume there.",
        questions.UNREAD,
    ]
    assert [said[n] for n in (1, 3, 4, 5, 6)] == [[questions.UNREAD]] * 5
    assert said[9][0].startswith("The ledger could not be read")


def test_every_parameter_that_accepts_something_is_told_where_it_does() -> None:
    accepting = {
        f"{section}.{name}": field.get_default()
        for section, model in Params.model_fields.items()
        if isinstance(model.annotation, type) and issubclass(model.annotation, BaseModel)
        for name, field in model.annotation.model_fields.items()
        if section == "accept" or name.startswith("accept_")
    }
    assert len(accepting) == 9
    assert accepting.items() <= questions.ACCEPTING.items()


def test_a_sign_off_that_the_parameters_ever_asked_for_still_waits() -> None:
    noted = entry("approval", "waits", {"phases": ["40_rebuild_index"]})
    assert answers(review.collect(make_manifest(), [noted]))[3] == [
        "Nothing in this run; operate/rebuild_index waits for a sign-off (approval.phases)."
    ]


def test_a_sign_off_is_told_with_who_gave_it() -> None:
    given = gate("approval.is_given", found="by eve at 2026-11-22 19:04: read it")
    found = review.collect(make_manifest(), [entry("90_cut_over", "gate", given)])
    assert answers(found)[3] == ["90_cut_over: by eve at 2026-11-22 19:04: read it."]


def test_gains_and_losses_show_the_right_answer_before_and_after() -> None:
    texts = review.Texts({"q1": "wing flutter"}, {"41": "On flutter of wings"})
    page, text = page_of(make_manifest(), make_entries(), texts=texts)
    gains, losses = review.collect(make_manifest(), make_entries(), texts=texts).moved
    assert gains.rows == [("wing flutter", "not found", "1", "On flutter of wings"), ("q2", "7", "2", "42")]
    assert losses.rows == [("q3", "1", "not found", "43")], "the key, where the row is gone"
    assert "Largest gains query before after right answer wing flutter not found 1 On flutter of wings" in text
    assert '<a href="#moved">' in page


def test_the_p99_of_too_few_queries_is_not_shown() -> None:
    entries = make_entries()
    shown = review.collect(make_manifest(), entries).comparison
    assert shown is not None and "p99" in shown.columns
    next(e["body"] for e in entries if e["kind"] == "shadow")["timed"] = 99
    shown = review.collect(make_manifest(), entries).comparison
    assert shown is not None and "p99" not in shown.columns and "p95" in shown.columns


def test_repetitions_of_a_statement_are_one_line() -> None:
    batch = statement("Write a batch.", "ROW EXCLUSIVE on the target", 0.25, rows=100)
    entries = [*make_entries(), *(entry("50_backfill", "statement", batch) for _ in range(3))]
    last = review.collect(make_manifest(), entries).statements[-1]
    assert (last["times"], last["seconds"], last["rows"]) == (3, 0.75, 300)
    assert "50_backfill · 3 times" in page_of(make_manifest(), entries)[1]


def test_the_record_of_an_operation_says_which_and_its_own_locks() -> None:
    run = make_manifest(way="operate", phases=(PhaseRun("operate/rebuild_index", "passed"),))
    held = statement("Build the index beside", "SHARE UPDATE EXCLUSIVE on public.articles", 7.5)
    page, text = page_of(run, [entry("operate/rebuild_index", "statement", held)])
    assert "<h1>operate/rebuild_index on public.articles</h1>" in page
    assert "The strongest lock was SHARE UPDATE EXCLUSIVE (1 statement, the longest 7.5 s)" in text


@pytest.mark.parametrize(
    ("lock", "level"),
    [
        ("SHARE UPDATE EXCLUSIVE on x", "SHARE UPDATE EXCLUSIVE"),
        ("SHARE ROW EXCLUSIVE on x", "SHARE ROW EXCLUSIVE"),
        ("SHARE on x", "SHARE"),
        ("ROW EXCLUSIVE on x", "ROW EXCLUSIVE"),
        ("one row of the route table", ""),
    ],
)
def test_a_lock_is_the_level_that_it_names(lock: str, level: str) -> None:
    assert db.lock_level(lock) == level


def test_the_page_stands_alone_and_shows_every_part() -> None:
    page, text = page_of(make_manifest(), make_entries(), pages=MIGRATE)
    assert needs_nothing_else(page)
    for heading in ("Summary", "Gains and losses", "Figures", "Phases", "Statements that changed something", "Gates",
                    "Forecast against actual", "How to roll back", "Versions, parameters and hashes"):  # fmt: skip
        assert f">{heading}</h2>" in page
    assert all(f'href="{name}.html"' in page for name in MIGRATE)
    assert page.count('role="img" aria-label="') == page.count("<svg") == 4
    assert "prefers-color-scheme: dark" in page and "@media print" in page and 'name="viewport"' in page
    assert "size of the index 1.5 MB 1.5 MB 0.95 ×" in text
    assert "--to reads --execute # nothing: reads go back to legacy" in text


@pytest.mark.attack
def test_what_a_database_says_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    entries = [*make_entries(), entry("50_backfill", "gate", gate("backfill.evil", "FAIL", found=evil))]
    page, text = page_of(make_manifest(notes=(evil,)), entries)
    assert evil not in page and text.count(evil) == 2
    assert '"query": "a < b & c = \'<i>\'"' in text


def test_the_gate_that_stopped_the_run_comes_first_and_open() -> None:
    phases = list(make_manifest().phases)
    phases[5] = dataclasses.replace(phases[5], status="failed", error="FAIL  backfill.no_row_is_missing")
    phases[6:] = [PhaseRun(p.name) for p in phases[6:]]
    entries = [e for e in make_entries() if e["phase"] < "50"]
    entries += [
        entry("50_backfill", "gate", gate("backfill.no_row_is_missing", "FAIL")),
        entry("50_backfill", "gate", gate("backfill.no_row_is_stale")),
    ]
    run = make_manifest(status="failed", exit_code=1, phases=tuple(phases))
    found = review.collect(run, entries)
    assert (found.gates[0]["phase"], found.gates[0]["stopping"][0]["name"]) == (
        "50_backfill", "backfill.no_row_is_missing",
    )  # fmt: skip
    assert answers(found)[0][0] == (
        "The run stopped in 50_backfill. Not begun: 60_build_index, 70_tune, 80_shadow, 90_cut_over."
        " Rerun the same command to resume there."
    )
    page, text = page_of(run, entries)
    assert "✘ failed a gate did not pass" in text
    assert page.index("FAIL · backfill.no_row_is_missing") < page.index("backfill.no_row_is_stale")
    assert page.count("backfill.no_row_is_missing") == 1 and "of 50_backfill is shown at the top" in page


def test_a_step_that_no_gate_has_stopped_shows_its_error() -> None:
    phases = (PhaseRun("00_preflight", "crashed", error="MemoryError: no more of it"),)
    run = make_manifest(status="crashed", exit_code=4, phases=phases)
    page, _ = page_of(run, [entry("00_preflight", "gate", gate("toy.fits", "FAIL"))])
    assert "MemoryError: no more of it" in page and page.count("FAIL · toy.fits") == 1


@pytest.mark.parametrize("kind", ["plan", "gate", "statement", "phase", "baseline", "load", "backfill", "index", "tuning", "shadow", "route"])  # fmt: skip # noqa: E501
def test_a_missing_kind_of_row_costs_only_its_part(kind: str) -> None:
    page_of(make_manifest(), [e for e in make_entries() if e["kind"] != kind])


def test_an_empty_ledger_still_makes_a_page() -> None:
    page_of(make_manifest(finished="", status="running", exit_code=None), [], notes=["The ledger could not be read"])


def test_a_plan_claims_no_change() -> None:
    phases = tuple(PhaseRun(name, "planned") for name in MIGRATE)
    seen = entry("00_preflight", "gate", gate("table.fits", "NOT RUN"))
    found = review.collect(make_manifest(execute=False, status="planned", phases=phases), [seen])
    assert found.questions[0].answers == ["No statement that changes anything, as far as it can be known now."]
    assert not found.rollback
    assert {p["gates"] for p in found.phases} == {"0 of 1", ""}


def test_figures_of_an_earlier_run_are_marked_and_those_undone_are_gone() -> None:
    later = make_manifest(run_id="20261123T000000Z-articles")
    tiles = {t.label: t for t in review.collect(later, make_entries()).tiles}
    assert (tiles["recall@10"].value, tiles["recall@10"].source) == ("0.974", RUN_ID)
    undone = entry("70_tune", "phase", {"verdict": "UNDONE"}, "20261122T235900Z-articles")
    assert "recall@10" not in {t.label for t in review.collect(later, [*make_entries(), undone]).tiles}


def test_searches_stand_in_one_order_whatever_the_database_makes_of_it() -> None:
    entries = make_entries()
    shadow = next(e["body"] for e in entries if e["kind"] == "shadow")
    shadow["systems"] = dict(sorted(shadow["systems"].items()))
    comparison = review.collect(make_manifest(), entries).comparison
    assert comparison is not None
    assert [row[0] for row in comparison.rows] == ["legacy search", "vectors, exact", "vectors, by index", "hybrid"]
    assert comparison.marked == 3


def test_no_setting_that_reaches_the_target_is_told() -> None:
    entries = make_entries()
    tuning = next(e["body"] for e in entries if e["kind"] == "tuning")
    tuning["chosen"] = None
    found = review.collect(make_manifest(), entries)
    assert "recall@10" not in {t.label for t in found.tiles}
    assert any("No setting met the target" in p.alt for p in found.pictures)


def notebook_with_error() -> nbformat.NotebookNode:
    code = nbformat.v4.new_code_cell("phase.close(gates)", execution_count=3)
    code.outputs = [
        nbformat.v4.new_output("stream", text="a line\n"),
        nbformat.v4.new_output("error", ename="GateFailed", evalue="x", traceback=["\x1b[31mGateFailed\x1b[0m: x"]),
    ]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Backfill\n\n$x$"), code])


def test_a_notebook_page_stands_alone_and_leads_back(tmp_path: Path) -> None:
    nbformat.write(notebook_with_error(), tmp_path / "50_backfill.ipynb")
    page = record.notebook_page(tmp_path / "50_backfill.ipynb", make_manifest())
    assert needs_nothing_else(page) and "https://cdn" not in page
    assert 'href="index.html"' in page and "ansi-red-fg" in page and "\x1b" not in page
    assert "In&nbsp;[" not in page and "In [" not in page


def test_every_table_of_a_notebook_scrolls_by_itself_and_can_be_reached_by_keyboard(tmp_path: Path) -> None:
    wide = Table("abcdef", [("</table>", *"bcdef")])
    tables = [wide._repr_html_(), Table(("a",), [(1,)])._repr_html_(), wide.to_frame()._repr_html_()]
    shown = [nbformat.v4.new_output("display_data", {"text/html": html}) for html in tables]
    cells = [nbformat.v4.new_markdown_cell("| what | lock |\n|---|---|\n| it | none |")]
    cells.append(nbformat.v4.new_code_cell("tables", outputs=shown))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "50_backfill.ipynb")
    page = record.notebook_page(tmp_path / "50_backfill.ipynb", make_manifest())
    assert page.count("<table") == page.count("</table></div>") == 4
    assert page.count('<div class="scroll" tabindex="0" role="region" aria-label="Table"') == 4


def test_half_a_notebook_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "50_backfill.ipynb").write_text('{"cells": [')
    assert record.notebook_page(tmp_path / "50_backfill.ipynb", make_manifest()) == ""


def test_the_list_of_runs_is_newest_first_and_a_section_a_target(tmp_path: Path) -> None:
    for i, table in enumerate(["public.b", "public.a", "public.b"]):
        run = make_manifest(run_id=f"run-{i}", table=table, started=f"2026-11-22T1{i}:00:00+00:00")
        (tmp_path / run.run_id).mkdir()
        manifest.write(tmp_path / run.run_id, run)
        (tmp_path / run.run_id / "index.html").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / manifest.FILE).write_text("{")
    record.write_list(tmp_path)
    page = (tmp_path / "index.html").read_text()
    WellFormed(page)
    order = ["public.a", "run-1/index.html", "public.b", "run-2/index.html", "run-0/index.html"]
    assert sorted(order, key=page.index) == order
    assert "articles/index.html" not in page
    (tmp_path / "articles").mkdir()
    (tmp_path / "articles" / "index.html").touch()
    record.write_list(tmp_path)
    assert 'href="articles/index.html"' in (tmp_path / "index.html").read_text()


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    run = make_manifest(notes=("a note",))
    manifest.write(tmp_path, run)
    assert manifest.read(tmp_path) == run
    assert json.loads((tmp_path / manifest.FILE).read_text())["seconds"] == 53.0


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    manifest.write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        manifest.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_record_keeps_the_ledger_of_its_run_beside_it(open_phase: Callable[..., Phase], tmp_path: Path) -> None:
    phase = open_phase()
    phase.ledger.append("note", {"figure": 1})
    record.write(tmp_path, phase.params, make_manifest(run_id="test-run"))
    rows = json.loads((tmp_path / "ledger.json").read_text())
    assert [(r["kind"], r["body"], len(r["hash"])) for r in rows] == [("note", {"figure": 1}, 64)]


def test_a_lost_server_costs_the_ledger_but_not_the_page(
    make_params: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNBOOK_TEST_DSN", "host=/nowhere dbname=x password=planted-secret")
    (tmp_path / "run").mkdir()
    record.write(tmp_path / "run", make_params(), make_manifest())
    page = (tmp_path / "run" / "index.html").read_text()
    assert "The ledger could not be read" in page and "planted-secret" not in page


def test_filters_classes_and_backfill_have_tables_of_their_own() -> None:
    point = {"scan": "relaxed", "candidates": 80, "recall": 0.98, "low": 0.96, "p50_ms": 0.5}
    tuning = {"classes": [
        {"column": None, "bucket": "all", "chosen": point},
        {"column": "status", "bucket": "1 to 10 %", "chosen": point, "practice": {"recall": 0.7, "p50_ms": 2.0}},
    ]}  # fmt: skip
    found = figures._filters(tuning)
    assert found is not None and found[2] == [
        (
            "status, 1 to 10 % of the rows",
            "relaxed, 80 candidates",
            "0.980 (from 0.960)",
            "0.50 ms",
            "0.700 in 2.00 ms",
        )
    ]
    lost = {"slice": "short", "queries": 9, "legacy": 0.5, "route": 0.4, "low": -0.2, "high": 0.1, "p_value": 0.3,
            "difference": -0.1, "blame": "model"}  # fmt: skip
    classes = figures._slices({"slices": [lost]})
    assert classes is not None and classes[2] == [
        ("short", 9, "0.500", "0.400", "-0.200 to +0.100, p = 0.3", "the model")
    ]
    won = figures._slices({"slices": [lost | {"difference": 0.1}]})
    assert won is not None and "what loses" not in won[1] and len(won[2][0]) == len(won[1]), "no empty column"
    assert figures._filters({}) is figures._slices({}) is figures._backfill({}) is None, (
        "older records are shown without"
    )


def test_the_time_of_a_model_is_not_held_against_the_forecast_of_loading() -> None:
    def told(embeddings: dict[str, str]) -> tuple[str, ...]:
        plan = {"forecast": {"load_seconds": 0.7}, "params": {"embeddings": embeddings}}
        load = {"rows": 938, "seconds": 1.4}
        entries = [entry("00_preflight", "plan", plan), entry("40_load_embeddings", "load", load)]
        return figures.forecast(figures.Newest("another", entries))[0][2:]

    assert told({"source": "wordllama"}) == ("1.4 s with the model", "")
    assert told({"file": "vectors.npy"}) == ("1.4 s", "2.00 ×")


def test_a_backfill_in_several_attempts_is_told_as_one() -> None:
    entries = make_entries()
    first = next(e for e in entries if e["kind"] == "backfill")
    nothing_left = entry("50_backfill", "backfill", {**first["body"], "rows": 0, "seconds": 0.0, "samples": []})
    again = review.collect(make_manifest(), [*entries, nothing_left])
    (tile,) = [t for t in again.tiles if t.label == "rows migrated"]
    (alone,) = [t for t in review.collect(make_manifest(), entries).tiles if t.label == "rows migrated"]
    assert tile.value == alone.value and tile.detail == f"{alone.detail}, 2 attempts"


def test_the_rollback_shown_is_that_of_the_state_reached_and_says_what_it_removes() -> None:
    _, text = page_of(make_manifest(), make_entries())
    assert "--to reads --execute # nothing: reads go back to legacy" in text
    phases = [p if p.name < "60" else dataclasses.replace(p, status="pending") for p in make_manifest().phases]
    half = dataclasses.replace(make_manifest(), phases=tuple(phases))
    _, text = page_of(half, make_entries())
    removes = "the vectors: columns or side table, staging, queue and triggers"
    assert f"--to schema --execute # {removes}" in text
    assert "reads only" not in text and "backfilling again took" in text


def test_a_batch_is_drawn_when_it_was_committed_not_when_it_was_counted() -> None:
    with Progress("backfilled", 30) as progress:
        started = progress._started
        for n in (1, 2, 3):
            progress.add(10, at=started + n)
    assert progress.samples == [[0.0, 0], [1.0, 10], [2.0, 20], [3.0, 30]]


def test_recall_ends_at_one() -> None:
    tuning = next(e["body"] for e in make_entries() if e["kind"] == "tuning")
    shown = re.findall(r">([01]\.\d{3})<", pictures.recall_against_latency(tuning))
    assert shown and max(map(float, shown)) <= 1.0


def row(
    phase: str, kind: str, body: dict[str, Any], run_id: str, second: int, by: str = "migrator"
) -> dict[str, Any]:
    at = datetime(2026, 11, 22, 19, 0, second, tzinfo=UTC)
    return entry(phase, kind, body, run_id) | {"written_by": by, "written_at": at, "hash": "e" * 64}


def rows_of_two_runs_and_one_by_hand() -> list[dict[str, Any]]:
    """A run that built the index; work by hand that rolled it back; a run that built it again, and was killed."""
    first, by_hand, last = (
        "20261122T190000Z-articles",
        "20261122T190010Z-articles-by-hand",
        "20261122T190020Z-articles",
    )
    index = {"name": "i", "method": "hnsw", "seconds": 60.0, "bytes": 1_048_576}
    return [
        row("migrate", "run", {"status": "started", "host": "db-tools", "user": "ada"}, first, 0),
        row(
            "60_build_index",
            "statement",
            statement("Build the index.", "SHARE UPDATE EXCLUSIVE on x", 60.0),
            first,
            1,
        ),
        row("60_build_index", "index", index, first, 2),
        row("60_build_index", "phase", {"verdict": "PASS"}, first, 3),
        row("migrate", "record", {"manifest": {"status": "passed", "host": "db-tools", "user": "ada"}}, first, 4),
        row("60_build_index", "approval", {"reason": "read <it>"}, "approval-of-row-1", 5, "eve"),
        row(
            "undo/index", "statement", statement("Drop the index.", "SHARE UPDATE EXCLUSIVE on x", 0.25), by_hand, 10
        ),
        row("undo/index", "phase", {"verdict": "PASS"}, by_hand, 11),
        row("60_build_index", "phase", {"verdict": "UNDONE", "by": "undo/index"}, by_hand, 12),
        row("by hand", "run", {"status": "passed", "host": "laptop", "user": "bob"}, by_hand, 13),
        row("migrate", "run", {"status": "started", "host": "db-tools", "user": "ada"}, last, 20),
        row("60_build_index", "index", index | {"seconds": 65.0}, last, 21),
        row("60_build_index", "phase", {"verdict": "PASS"}, last, 22),
        row("70_tune", "gate", gate("tune.x"), last, 23),
    ]


def test_the_page_of_a_target_tells_its_migration_across_runs() -> None:
    entries = rows_of_two_runs_and_one_by_hand()
    first, by_hand, last = dict.fromkeys(e["run_id"] for e in entries if e["kind"] != "approval")
    told = history.collect("articles", "public.articles", "/srv/a.yaml", entries, {first})
    built = next(s for s in told.steps if s.name == "60_build_index")
    assert (built.verdict, built.by, built.run_id) == ("PASS", "migrator", last)
    assert [s.name for s in told.steps] == list(MIGRATE)
    assert [(r.run_id, r.status, r.by, r.steps, r.statements, r.by_hand) for r in told.runs] == [
        (last, "", "migrator (ada@db-tools)", ["PASS: 60_build_index", "not closed: 70_tune"], 0, False),
        (by_hand, "passed", "migrator (bob@laptop)", ["PASS: undo/index", "rolled back: 60_build_index"], 1, True),
        (first, "passed", "migrator (ada@db-tools)", ["PASS: 60_build_index"], 1, False),
    ]
    assert told.sign_offs == [("60_build_index", "eve", "2026-11-22T19:00:05+00:00", "read <it>")]
    assert [(t.value, t.source) for t in told.tiles] == [("1.0 MB", last)]
    (back,) = told.rollback
    assert back.takes == f"250 ms, measured in run {by_hand}; building it again took 65.0 s"
    page = record.target_page(told)
    text = " ".join(" ".join(WellFormed(page).texts).split())
    assert needs_nothing_else(page) and page.count("../index.html") == 1
    assert f'href="../{first}/index.html"' in page and f'href="../{last}/' not in page and last in page
    assert "read &lt;it&gt;" in page and "no end noted" in text and "Derived from the ledger" in text
    assert "runbook undo /srv/a.yaml --to index --execute" in text


def test_a_target_that_never_ran_has_a_page_that_says_so() -> None:
    page = record.target_page(history.collect("articles", "public.articles", "/srv/a.yaml", []))
    text = " ".join(" ".join(WellFormed(page).texts).split())
    assert "None has left a row in the ledger." in text and "Nothing has passed" in text


def test_the_page_of_a_target_is_made_from_the_ledger_alone(
    open_phase: Callable[..., Phase], tmp_path: Path, articles: Any
) -> None:
    path = write_params(tmp_path)
    phase = open_phase("60_build_index")
    phase.ledger.append("phase", {"verdict": "PASS"})
    key = articles.execute("SELECT id::text FROM articles ORDER BY id LIMIT 1").fetchone()[0]
    moved = {"gains": [{"query_id": "1", "difference": 1.0, "before": None, "after": [1, key]}]}
    phase.ledger.append("shadow", {"moved": moved})
    for _ in range(2):
        told = CliRunner().invoke(main.main, ["record", str(path)])
        assert told.exit_code == 0, told.output
    page = tmp_path / "runs" / "articles" / "index.html"
    assert told.output.strip() == str(page.resolve())
    assert phase.run_id in page.read_text() and f"../{phase.run_id}/" not in page.read_text()
    texts = record._texts(phase.connection, phase.params, phase.ledger.entries())
    assert texts.queries and texts.rows.keys() == {key} and texts.rows[key]
    folder = tmp_path / "runs" / "elsewhere"
    page.parent.rename(folder)
    page.parent.symlink_to(folder)
    assert "where a link leads" in CliRunner().invoke(main.main, ["record", str(path)]).output
