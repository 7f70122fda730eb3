"""%sql and %%sql read on a connection of the phase's own, and on no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from runbook_lib.core import display, sqlmagic
from runbook_lib.core.phase import Phase
from runbook_lib.core.sqlmagic import MOST_ERROR_LINES, ReadFailed
from tests.small_runs import wait_until

DISPLAYS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'runbook test-run display'"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    monkeypatch.setattr(sqlmagic, "get_ipython", lambda: shell)
    yield shell
    sqlmagic.let_go()
    shell.restore_sys_module_state()


@pytest.fixture
def ready(shell: InteractiveShell, open_phase: Callable[..., Phase]) -> InteractiveShell:
    """A shell in which a phase is open."""
    phase = open_phase()
    sqlmagic.connect(phase.params, phase.run_id, lambda: phase.connection)
    return shell


def frame_of(shell: InteractiveShell, query: str, line: str = "") -> Any:
    """What a cell gives."""
    return shell.run_cell_magic("sql", line, query)  # type: ignore[no-untyped-call]


def read(shell: InteractiveShell, query: str) -> Any:
    """The one value that a cell shows."""
    return frame_of(shell, query).iloc[0, 0]


def refused(shell: InteractiveShell, query: str) -> list[str]:
    """The lines that a cell ends with."""
    with pytest.raises(ReadFailed) as failed:
        frame_of(shell, query)
    lines = failed.value._render_traceback_()
    assert 1 <= len(lines) <= MOST_ERROR_LINES
    return lines


def test_a_wide_frame_scrolls_and_says_so_and_a_narrow_one_is_left_alone(
    shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "get_ipython", lambda: shell)
    wide, narrow = (display.frame(columns, [[1] * len(columns)]) for columns in ("abcde", "ab"))
    said = [shell.display_formatter.format(f)[0]["text/html"] for f in (wide, narrow)]  # type: ignore[union-attr]
    assert said[0].startswith('<div class="scroll" tabindex="0" role="region" aria-label="DataFrame"')
    assert said[1] == narrow._repr_html_()  # type: ignore[operator]


def test_a_connection_of_another_role_is_refused_each_time_and_let_go(
    shell: InteractiveShell, open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = open_phase()
    phase.connection.execute("SET ROLE pg_monitor")
    sqlmagic.connect(phase.params, phase.run_id, lambda: phase.connection)
    for _ in range(2):
        with pytest.raises(ReadFailed, match=r"the display connection is on .*, the phase on .*'pg_monitor'"):
            read(shell, "SELECT 1 AS one")
        wait_until(lambda: articles.execute(DISPLAYS).fetchall() == [], 10)
    phase.connection.execute("RESET ROLE")
    assert read(shell, "SELECT 1 AS one") == 1


def test_the_next_phase_of_a_kernel_reads_by_its_own_connection(
    shell: InteractiveShell, open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    seen = []
    for column in ("embedding", "other"):
        phase = open_phase(vector={"column": column})
        sqlmagic.connect(phase.params, phase.run_id, lambda phase=phase: phase.connection)
        pid = read(shell, "SELECT pg_backend_pid()")
        assert pid == read(shell, "SELECT pg_backend_pid()")
        wait_until(lambda pid=pid: articles.execute(DISPLAYS).fetchall() == [(pid,)], 10)  # that before has ended
        seen.append((pid, read(shell, "SELECT current_setting('runbook.index')")))
    assert len(set(seen)) == 2 and ["other" in index for _, index in seen] == [False, True]


def test_a_result_is_a_frame_with_types_and_the_line_above_says_read_only(
    ready: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    found = frame_of(ready, "SELECT id, 1.5 AS cost, now() AS at, title FROM articles ORDER BY id LIMIT 2")
    assert [found[c].dtype.kind for c in ("id", "cost", "at")] == ["i", "f", "M"]
    said = capsys.readouterr().out
    assert said.startswith("Read only, database ") and said.endswith(": 2 rows\n")
    empty = frame_of(ready, "SELECT id, title FROM articles WHERE title LIKE '100%:none' -- ;\n;")
    assert (len(empty), list(empty.columns)) == (0, ["id", "title"]), "an empty result has its columns"
    twice = frame_of(ready, "SELECT 1 AS n, 2 AS n")
    assert twice.iloc[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("SELECT 'a:b 12:30 ::x %s 50% {run} $run :name'", "a:b 12:30 ::x %s 50% {run} $run :name"),
        ("""SELECT '{"a": 1, "b":2}'::jsonb ->> 'b'""", "2"),
        ("SELECT '{1,2}'::int[]", [1, 2]),
        (r"SELECT E'it\'s :name' || '\:x'", r"it's :name\:x"),
        ("SELECT $body$:name 'x' ::$body$ -- :name\n /* :name\n */", ":name 'x' ::"),
        ('SELECT "a:name"::text FROM (SELECT 7 AS "a:name") AS t', "7"),
        ("SELECT (ARRAY[1,2,3])[1:n] FROM (SELECT 2 AS n) AS t", [1, 2]),
        ("SELECT 10 % 4 WHERE 'x' LIKE '%'", 2),
        ("SELECT :name::text || :count", "it's % :here7"),
        ("SELECT :count = ANY (:several)", True),
        ("SELECT '{\"a\": 1}'::jsonb ? 'a'", True),
        ("SELECT 1; SELECT 2; -- done: :name", 2),
        ("-- a table\n(TABLE articles ORDER BY id LIMIT 1)", 1),
        ("SHOW transaction_read_only", "on"),
        ("SET work_mem = '5MB'; SHOW work_mem", "5MB"),
    ],
)
def test_what_is_no_variable_reaches_the_server_as_it_is_and_variables_are_bound(
    ready: InteractiveShell, query: str, value: Any
) -> None:
    ready.user_ns |= {"name": "it's % :here", "count": np.int64(7), "several": [5, 7], "run": "replaced"}
    assert read(ready, query) == value


def test_a_line_is_read_as_it_is_and_a_result_goes_to_a_variable(ready: InteractiveShell) -> None:
    ready.run_line_magic("sql", "kept << SELECT '{1,2}'::int[] AS a, '$x' AS x")  # type: ignore[no-untyped-call]
    assert ready.user_ns["kept"].values.tolist() == [[[1, 2], "$x"]]
    assert frame_of(ready, "SELECT 3 AS n", "in_cell <<") is None and ready.user_ns["in_cell"]["n"][0] == 3


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM articles",
        "WITH gone AS (DELETE FROM articles RETURNING id) SELECT * FROM gone",
        "SET default_transaction_read_only = off; DELETE FROM articles",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE; DELETE FROM articles",
        "SELECT nextval('counted')",
        "DO 'BEGIN DELETE FROM articles; END'",
        "CREATE TABLE kept AS SELECT 1",
    ],
)
def test_nothing_is_written_and_the_refusal_says_what_to_do_instead(
    ready: InteractiveShell, articles: psycopg.Connection[Any], query: str
) -> None:
    articles.execute("CREATE SEQUENCE counted")
    before = articles.execute("SELECT count(*) FROM articles").fetchone()
    lines = refused(ready, query)
    assert lines[0].startswith("ERROR:  cannot execute ") and lines[0].endswith("in a read-only transaction")
    assert lines[1:] == [
        "%sql only reads, with execute = True as well; nothing was changed.",
        "To carry out this step, set execute = True and run its cells, which record what they do.",
        "For anything else use psql; the runbook neither records nor rolls back what you change there.",
    ]
    assert articles.execute("SELECT count(*) FROM articles").fetchone() == before
    assert read(ready, "SELECT 1") == 1, "the next cell reads"


def test_an_error_is_the_servers_own_words_in_a_few_lines(ready: InteractiveShell) -> None:
    ready.user_ns["secret"] = "not to be shown"
    assert refused(ready, "SELECT no_such, :secret FROM articles") == [
        'ERROR:  column "no_such" does not exist',
        "LINE 1: SELECT no_such, $1 FROM articles",
        "               ^",
    ]
    assert refused(ready, "SELECT 1 +")[0] == "ERROR:  syntax error at end of input"
    raised = "DO $$ BEGIN RAISE 'a' USING DETAIL = E'1\\n2\\n3\\n4\\n5\\n6', HINT = 'h'; END $$"
    assert refused(ready, raised)[0] == "ERROR:  a"
    assert refused(ready, "SELECT 'infinity'::timestamptz")[1:] == [
        "Python has no such value. Cast the column to read it: ::text"
    ]
    assert refused(ready, "SELECT 1 / 0") == ["ERROR:  division by zero"], "the server's own, without advice"
    ready.user_ns["thing"] = object()
    assert "cannot adapt type 'object'" in refused(ready, "SELECT :thing")[0]
    assert refused(ready, "SELECT :absent, :secret") == [
        "no variable absent in this notebook. Write a literal colon as \\:"
    ]
    assert read(ready, "SELECT 1") == 1


@pytest.mark.parametrize(
    "query", ["BEGIN", "COMMIT; DELETE FROM articles", "rollback", r"\d articles", "COPY articles TO STDOUT"]
)
def test_a_cell_neither_begins_nor_ends_a_transaction(ready: InteractiveShell, query: str) -> None:
    assert refused(ready, query)[0].startswith("each %sql runs in its own read-only transaction")


@pytest.mark.parametrize("query", ["postgresql://elsewhere/ SELECT 1", "me@there", "--connections", " ", " ; "])
def test_no_other_connection_can_be_named(ready: InteractiveShell, query: str) -> None:
    assert refused(ready, query) == ["%sql takes only SQL: no options, and no connection other than this step's"]


def test_a_plan_is_printed_whole_and_can_be_kept(ready: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    query = "EXPLAIN (COSTS off) SELECT * FROM articles ORDER BY title LIMIT 3"
    assert frame_of(ready, query) is None
    said = capsys.readouterr().out.splitlines()
    assert said[1:3] == ["Limit", "  ->  Sort"]
    assert frame_of(ready, query, "kept <<") is None and ready.user_ns["kept"]["QUERY PLAN"][0] == "Limit"
    as_json = frame_of(ready, "EXPLAIN (FORMAT json) SELECT 1")
    assert as_json["QUERY PLAN"][0][0]["Plan"]["Node Type"] == "Result"


def test_notices_are_shown(ready: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
    frame_of(ready, "DO $$ BEGIN RAISE NOTICE 'half way'; RAISE WARNING 'odd'; END $$")
    assert capsys.readouterr().out == "NOTICE:  half way\nWARNING:  odd\n"


def test_a_long_result_ends_after_its_first_rows_with_a_word(
    ready: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    found = frame_of(
        ready, "SELECT g, repeat('x', 1000) FROM generate_series(1, 50000) AS g, generate_series(1, 50000)"
    )
    assert len(found) == 1000
    said = capsys.readouterr().out
    assert said.endswith("the first 1,000 rows of more; narrow it down, or %config SqlMagic.autolimit = 0 for all\n")
    ready.run_line_magic("config", "SqlMagic.autolimit = 0")  # type: ignore[no-untyped-call]
    assert len(frame_of(ready, "SELECT g FROM generate_series(1, 1234) AS g")) == 1234
    assert capsys.readouterr().out.endswith(": 1,234 rows\n")


def test_after_the_server_has_ended_the_session_the_next_cell_opens_another(
    ready: InteractiveShell, articles: psycopg.Connection[Any]
) -> None:
    pid = read(ready, "SELECT pg_backend_pid()")
    articles.execute("SELECT pg_terminate_backend(%s::int, 5000)", [pid])
    assert refused(ready, "SELECT 1")[1] == "The session has ended. Run the cell again to open another."
    assert read(ready, "SELECT pg_backend_pid()") != pid
