"""`runbook status`: one screen that says where a target stands and what is next, however large the table is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.cli.main import main
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.params import Params
from runbook_lib.runner import status_rows, status_screen, target_status
from tests.conftest import DSN_ENV, write_params

Articles = psycopg.Connection[Any]


def passed(phase: Phase, *names: str, verdict: str = "PASS") -> None:
    for name in names:
        replace(phase.ledger, phase=name).append("phase", {"verdict": verdict})


def screen(params: Params, rows: dict[str, Any] | None = None) -> list[str]:
    return status_screen.of(target_status.where_it_stands(params), rows or {}, "params/a b.yaml").splitlines()


@pytest.fixture
def reader(database: str) -> Iterator[str]:
    """A role that has no right on anything yet."""
    name = f"an odd-reader_{abs(hash(database)):x}"
    role = sql.Identifier(name)
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        yield name
        admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
        admin.execute(sql.SQL("DROP ROLE {}").format(role))


@pytest.mark.usefixtures("articles")
def test_where_nothing_has_begun_it_is_one_line(make_params: Callable[..., Params]) -> None:
    assert screen(make_params()) == ["public.articles: nothing has begun here; next: runbook check 'params/a b.yaml'"]


def test_a_server_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DSN_ENV, "host=127.0.0.1,127.0.0.2 port=1 dbname=app password=dromedary-9")
    result = CliRunner().invoke(main, ["status", str(write_params(tmp_path))])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("public.articles: ") and "Connection refused;" in result.stderr
    assert "dromedary" not in result.output


def test_each_phase_says_its_state_when_and_by_whom(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase("60_build_index")
    passed(phase, *MIGRATE[:6])
    phase.ledger.append("gate", {"name": "index.is_valid", "verdict": "FAIL", "found": "invalid\nsince noon"})
    phase.ledger.append("gate", {"name": "index.follows", "verdict": "UNKNOWN", "found": "could not be asked"})
    passed(phase, "60_build_index", verdict="FAIL")
    lines = screen(phase.params, {"rows": 20, "missing": 2, "stale": 0, "whole": True, "looked_at": 20})
    assert lines[2].split() == ["phase", "state", "when", "(UTC)", "by"]
    assert [line.split()[:2] for line in lines[3:10]] == [
        *([name, "PASS"] for name in MIGRATE[:6]),
        ["60_build_index", "FAIL"],
    ]
    assert lines[3].endswith("postgres") and "NOT RUN" in lines[10]
    assert lines[14:] == [
        "stopped   60_build_index: index.is_valid: invalid\\nsince noon",
        "reads     legacy",
        "rows      2 missing, 0 stale, in all",
        "next      runbook run 'params/a b.yaml' --execute",
    ]


def test_what_was_begun_is_told_from_what_was_never_run_and_what_was_rolled_back(
    open_phase: Callable[..., Phase],
) -> None:
    phase = open_phase("50_backfill")
    passed(phase, *MIGRATE[:5])
    phase.ledger.append("statement", {"name": "backfill.update"})

    def state() -> str:
        return str(target_status.where_it_stands(phase.params)["phases"][5]["verdict"])

    assert state() == "BEGUN"
    passed(phase, "50_backfill", verdict="UNDONE")
    assert state() == "UNDONE"
    phase.ledger.append("statement", {"name": "backfill.update"})
    assert state() == "BEGUN"
    passed(phase, "50_backfill")
    phase.ledger.append("statement", {"name": "backfill.update"})
    assert state() == "PASS", "as for the phases after it, which a rerun does not close"


def test_what_waits_for_approval_is_named_until_it_is_given_or_done(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase("90_cut_over", approval={"phases": ["90_cut_over"]})
    passed(phase, *MIGRATE[:-1])
    phase.ledger.append("request", {"plan": []})
    lines = screen(phase.params)
    assert "approval  90_cut_over, asked for by postgres" in lines
    assert lines[-1] == "next      runbook approve 'params/a b.yaml' 90_cut_over   (as another database user)"
    phase.ledger.append("approval", {})
    assert screen(phase.params)[-1] == "next      runbook run 'params/a b.yaml' --execute"
    phase.ledger.append("request", {"plan": []})
    passed(phase, "90_cut_over")
    assert screen(phase.params)[-1] == "next      runbook check 'params/a b.yaml'"


def test_the_fullest_screen_is_24_lines_of_80_characters(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase("90_cut_over", approval={"phases": ["90_cut_over", "60_build_index"]})
    passed(phase, *MIGRATE, "operate/serve_filters", "operate/rebuild_index")
    for name in ("60_build_index", "90_cut_over"):
        ledger = replace(phase.ledger, phase=name)
        ledger.append("gate", {"name": "x.y", "verdict": "FAIL", "found": "\x1b[31m" + "long " * 90})
        ledger.append("request", {"plan": []})
        passed(phase, name, verdict="FAIL")
    phase.ledger.append("route", {"route": "vector", "share_percent": 10})
    stands = target_status.where_it_stands(phase.params) | {
        "table": "x" * 63,
        "record": {"status": "passed", "path": "runs/" + "x" * 90, "run_id": "x"},
        "running": {"application_name": "runbook-runner x", "usename": "x" * 63, "since": datetime(2026, 1, 2)},
    }
    rows = {"rows": 123_456_789, "missing": 7, "stale": 9, "whole": False, "looked_at": 1900}
    rows |= {"changes": status_rows.MOST_CHANGES_COUNTED + 1, "oldest_s": 90.0}
    lines = status_screen.of(stands, rows, "params/articles.yaml").splitlines()
    assert len(lines) <= status_screen.MOST_LINES and max(map(len, lines)) <= status_screen.WIDTH
    assert "\x1b" not in "".join(lines)
    assert "reads     vector, 10 % of the calls" in lines
    assert "rows      7 missing, 9 stale besides the queued, in 1,900 sampled of 123,456,789" in lines
    assert "queue     over 10,000 changes wait for a vector, the oldest for 90.0 s" in lines
    assert "also done rebuild_index, serve_filters" in lines
    assert lines[-1] == "next      nothing while this run is active"


def test_a_run_at_work_is_seen(open_phase: Callable[..., Phase], make_params: Callable[..., Params]) -> None:
    from runbook_lib.core import claim

    phase = open_phase("20_extension")
    with claim.held_by_runner(phase.params, "20260102T030405Z-articles"):
        lines = screen(phase.params)
    assert any(line.startswith("running   20260102T030405Z-articles, by postgres, since ") for line in lines)
    assert lines[-1] == "next      nothing while this run is active"
    assert target_status.where_it_stands(phase.params)["running"] is None


def test_reads_are_where_the_search_function_looks_not_where_the_ledger_says(
    open_phase: Callable[..., Phase], articles: Articles
) -> None:
    from runbook_lib.search import search_function

    phase = open_phase("10_baseline")
    search_function.apply(phase)
    phase.ledger.append("route", {"route": "vector", "share_percent": 100})
    assert target_status.where_it_stands(phase.params)["route"] == "legacy"


@pytest.mark.parametrize("layout", ["column", "side_table"])
def test_missing_and_stale_rows_are_counted_as_by_the_monitor(
    filled: Callable[..., Phase], articles: Articles, layout: str
) -> None:
    phase = filled(vector={"layout": layout})
    assert status_rows.look(phase.params).items() >= {"missing": 0, "stale": 0, "whole": True, "changes": 0}.items()
    vectors = "articles" if layout == "column" else "articles_embedding"
    articles.execute("UPDATE articles SET title = 'of another text' WHERE id = 1")
    queued = status_rows.look(phase.params)
    assert (queued["stale"], queued["changes"]) == (0, 1), "it waits in the queue, so it is not lost"
    articles.execute("TRUNCATE runbook.articles_queue")
    articles.execute(f"UPDATE {vectors} SET embedding = NULL WHERE id = 2") if layout == "column" else (
        articles.execute(f"DELETE FROM {vectors} WHERE id = 2")
    )
    articles.execute("TRUNCATE runbook.articles_queue")
    seen = status_rows.look(phase.params)
    assert (seen["missing"], seen["stale"], seen["changes"]) == (1, 1, 0)
    articles.execute("DROP TABLE runbook.articles_queue CASCADE")
    seen = status_rows.look(phase.params)
    assert (seen["missing"], seen["stale"], "changes" in seen) == (1, 1, False), "capture was retired"


def test_of_a_large_table_only_some_pages_are_read(
    filled: Callable[..., Phase], articles: Articles, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = filled()
    articles.execute(
        "INSERT INTO articles (title, body) SELECT 'many', repeat('x', 500) FROM generate_series(1, 4000)"
    )
    monkeypatch.setattr(status_rows, "PAGES_READ_WHOLE", 10)
    monkeypatch.setattr(status_rows, "PAGES_READ", 20)
    seen = status_rows.look(phase.params)
    assert not seen["whole"] and seen["pages"] > 200
    assert 0 < seen["looked_at"] < 2000


def test_a_table_that_somebody_has_locked_costs_a_line_and_no_wait(
    filled: Callable[..., Phase], articles: Articles
) -> None:
    phase = filled()
    with articles.transaction():
        articles.execute("LOCK TABLE articles")
        assert status_rows.look(phase.params) == {"why_not": "canceling statement due to lock timeout"}
    assert "rows      not checked: no reason" in screen(phase.params, {"why_not": "no reason"})


def test_whoever_may_read_the_ledger_alone_sees_all_but_the_rows(
    filled: Callable[..., Phase], articles: Articles, reader: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = filled()
    passed(phase, "30_expand_schema")
    monkeypatch.setenv(DSN_ENV, make_conninfo(database, user=reader))
    with pytest.raises(BadInput) as refused:
        target_status.where_it_stands(phase.params)
    assert refused.value.found == f"{reader}: permission denied for schema runbook"
    grants = f'GRANT USAGE ON SCHEMA "runbook" TO "{reader}"; GRANT SELECT ON "runbook"."entry" TO "{reader}"'
    assert refused.value.do == f"let the ledger's owner run: {grants}"
    articles.execute(grants)
    lines = screen(phase.params, status_rows.look(phase.params))
    assert "rows      not checked: permission denied for table articles_queue" in lines
    assert lines[-1] == "next      runbook run 'params/a b.yaml' --execute"


def test_for_programs_it_is_json(filled: Callable[..., Phase], tmp_path: Path) -> None:
    phase = filled()
    passed(phase, *MIGRATE[:6])
    result = CliRunner().invoke(main, ["status", str(tmp_path / "toy.yaml"), "--json"])
    found = json.loads(result.stdout)
    assert (found["next"], found["rows"]["missing"], found["running"]) == ("60_build_index", 0, None)
    assert found["phases"][5]["by"] == "postgres"


def test_rows_of_a_partitioned_table_with_odd_names_and_uuid_keys_are_looked_at(
    make_params: Callable[..., Params], articles: Articles
) -> None:
    articles.execute(
        """
        CREATE EXTENSION vector;
        CREATE TABLE "Odd "" Table" ("Key %" uuid PRIMARY KEY DEFAULT gen_random_uuid(), "ti tle" text,
            embedding vector(8), embedding_hash bytea, embedding_updated_at timestamptz) PARTITION BY HASH ("Key %");
        CREATE TABLE odd_0 PARTITION OF "Odd "" Table" FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE odd_1 PARTITION OF "Odd "" Table" FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        INSERT INTO "Odd "" Table" ("ti tle") SELECT 'the same' FROM generate_series(1, 40);
        INSERT INTO "Odd "" Table" ("ti tle") VALUES (NULL), ('  '), ('');
        UPDATE "Odd "" Table" SET embedding = '[1,2,3,4,5,6,7,8]', embedding_hash = 'of another text'
            WHERE "Key %" IN (SELECT "Key %" FROM "Odd "" Table" WHERE "ti tle" = 'the same' LIMIT 4)
        """
    )
    names = {"table": 'Odd " Table', "key": "Key %", "text_columns": ["ti tle"], "filters": []}
    seen = status_rows.look(make_params(target=names))
    assert {k: seen[k] for k in ("looked_at", "with_text", "missing", "stale", "whole")} == {
        "looked_at": 43, "with_text": 40, "missing": 36, "stale": 4, "whole": True,
    }  # fmt: skip
