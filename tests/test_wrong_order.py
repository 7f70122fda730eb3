"""Every notebook's cells in wrong orders: the library refuses, nothing changes, and one line says what is next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import comparison
from runbook_lib.core import db, predecessors
from runbook_lib.core.cell_order import CLOSE, OPEN, PLAN, PROVE, REQUIRE, OutOfOrder
from runbook_lib.core.gates import BadInput, GateFailed, RunbookError, collect, gate
from runbook_lib.core.registry import (
    MIGRATE,
    OPERATE,
    STEPS,
    UNDO,
    following,
    operation_of,
    relied_on,
)
from tests import toy
from tests.conftest import DSN_ENV, write_params
from tests.servers import dump
from tests.stepping import NOTEBOOKS, Stepped, in_another_kernel
from tests.test_serve_filters import TARGET
from tests.test_server_versions import SECTIONS

WAY: dict[str, Any] = {**SECTIONS, **TARGET, "tune": SECTIONS["tune"], "partitioning": {"column": "status"}}
PARAMETERS = "Parameters"
ALL = [f"{p.parent.name}/{p.stem}" for p in sorted(NOTEBOOKS.glob("*/*.ipynb"))]
# Where the first cell that changes anything is; of operate/monitor, which only looks, the one that writes it down.
ACTS = "Do it"
SECTIONS_OF = ("Parameters", OPEN, REQUIRE, PLAN, ACTS, PROVE, CLOSE)

# What a pg_dump would tell apart, and the values of every sequence. Of pg_class what VACUUM and ANALYZE leave alone.
CATALOGUE = """
    SELECT md5(string_agg(line, E'\\n' ORDER BY line)) FROM (
        SELECT concat_ws('|', 'class', oid, relname, relnamespace, relkind, relfilenode, relowner, relacl, reloptions,
                         relispartition, relnatts, relchecks, relhasrules, relrowsecurity) AS line FROM pg_class
        UNION ALL SELECT 'attribute|' || a::text FROM pg_attribute a
        UNION ALL SELECT 'proc|' || p::text FROM pg_proc p
        UNION ALL SELECT 'trigger|' || t::text FROM pg_trigger t
        UNION ALL SELECT 'constraint|' || c::text FROM pg_constraint c
        UNION ALL SELECT 'index|' || i::text FROM pg_index i
        UNION ALL SELECT 'inherits|' || i::text FROM pg_inherits i
        UNION ALL SELECT 'extension|' || e::text FROM pg_extension e
        UNION ALL SELECT 'namespace|' || n::text FROM pg_namespace n
        UNION ALL SELECT 'setting|' || s::text FROM pg_db_role_setting s
        UNION ALL SELECT 'sequence|' || s.oid || coalesce(pg_sequence_last_value(s.oid), 0)
        FROM pg_class s WHERE s.relkind = 'S'
    ) all_lines WHERE line !~ '^(attribute|class|index)\\|.*pg_toast_temp'
"""
TABLES = """
    SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_|^information_schema$' ORDER BY 1
"""


def fingerprint(dsn: str, *, but: str = "") -> dict[str, str]:
    """Of schema and data: a hash for the catalogue and for each table. but: a table that is left out.

    Left out always: who is at work, which every opening of a notebook writes down.
    """
    with psycopg.connect(dsn) as connection:
        found = {"catalogue": connection.execute(CATALOGUE).fetchone()}
        for (table,) in connection.execute(TABLES).fetchall():
            if table not in (but, "runbook.claims"):
                rows = sql.SQL("SELECT md5(string_agg(t::text, E'\\n' ORDER BY t::text)) FROM {} t")
                found[table] = connection.execute(rows.format(sql.SQL(table))).fetchone()
    return {name: str(row[0]) if row else "" for name, row in found.items()}


class Points:
    """Databases of the migration: migrated to its end by notebooks of which every cell was run twice."""

    def __init__(self, server: str, folder: Path) -> None:
        self.server, self.path = server, write_params(folder, **WAY)
        self.home = ""

    def copied(self, name: str, source: str = "order_way") -> str:
        """DSN of a copy. It goes with the server: each DROP would wait for a checkpoint."""
        with psycopg.connect(self.server, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [source])
            make = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
            admin.execute(make.format(sql.Identifier(name), sql.Identifier(source)))
        return make_conninfo(self.server, dbname=name)


def every_cell_twice(notebook: str, path: Path) -> None:
    """A step that passes so all the same; what comes after its end changes nothing, and says what is next."""
    stepped = Stepped(notebook, path)
    for each in stepped.cells[:-1]:
        stepped.run(each)
        stepped.run(each)
    stepped.run(stepped.cells[-1])
    before = fingerprint(os.environ[DSN_ENV])
    assert_refused(stepped, closed(name_of(notebook)))
    assert fingerprint(os.environ[DSN_ENV]) == before


def closed(name: str) -> str:
    after = following(name)
    again = f"{cell(OPEN)} opens it again"
    then = again if after.startswith("nothing") else f"the notebook {after}; {again}"
    return f"{name} is closed; nothing was changed. Next: {then}."


@pytest.fixture(scope="module")
def points(server: str, tmp_path_factory: pytest.TempPathFactory) -> Points:
    found = Points(server, tmp_path_factory.mktemp("order"))
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as patch:
        admin.execute("CREATE DATABASE order_way")
        dsn = make_conninfo(server, dbname="order_way")
        with psycopg.connect(dsn, autocommit=True) as connection:
            toy.create_articles(connection)
        found.home = dump(dsn)
        patch.setenv(DSN_ENV, dsn)
        # A busy machine says nothing of the search: differences below this count as noise.
        patch.setattr(comparison, "FAST_ENOUGH_MS", 1000.0)
        for name in MIGRATE:
            every_cell_twice(f"migrate/{name}", found.path)
    return found


@pytest.fixture(scope="module")
def shared(points: Points) -> str:
    """DSN of the migrated database that all notebooks share, since none of them may change it."""
    return points.copied("order_shared")


@pytest.fixture
def there(shared: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(DSN_ENV, shared)
    return shared


@pytest.fixture
def opened(there: str, points: Points) -> Iterator[Callable[..., Stepped]]:
    """Opens a notebook: its cells up to the one that says where one is."""
    made: list[Stepped] = []

    def make(notebook: str, **how: Any) -> Stepped:
        stepped = Stepped(notebook, points.path, **how)
        made.append(stepped)
        stepped.section(PARAMETERS)
        stepped.section(OPEN)
        return stepped

    yield make
    for stepped in made:
        stepped.end()


def outcomes(stepped: Stepped) -> dict[str, list[str]]:
    """Runs every cell below the gates of the way here, whatever those above it raised; the lines by section."""
    sections = list(dict.fromkeys(c.section for c in stepped.cells))
    said: dict[str, list[str]] = {}
    for each in stepped.cells:
        if sections.index(each.section) > sections.index(REQUIRE) and not each.source.startswith("%%sql"):
            try:
                stepped.run(each)
            except OutOfOrder as error:
                assert error._render_traceback_() == [str(error)] and "\n" not in str(error)
                said.setdefault(each.section, []).append(str(error))
            except RunbookError as error:
                # A plan may say why there is nothing to plan; it changes nothing.
                assert each.section.startswith(PLAN), error
    return said


def assert_refused(stepped: Stepped, line: str) -> None:
    """Every section that does or ends something says this line."""
    said = outcomes(stepped)
    acting = [s for s in dict.fromkeys(c.section for c in stepped.cells) if s in (ACTS, PROVE, CLOSE)]
    assert {s: set(said.get(s, [])) for s in acting} == {section: {line} for section in acting}


def name_of(notebook: str) -> str:
    return notebook.removeprefix("migrate/")


def cell(title: str) -> str:
    return f"the cell below “{title}”"


every_notebook = pytest.mark.parametrize("notebook", ALL)


@every_notebook
def test_without_its_gates_nothing_is_done(opened: Callable[..., Stepped], there: str, notebook: str) -> None:
    before = fingerprint(there)
    stepped = opened(notebook)
    line = f"{name_of(notebook)} is open, and its gates have not passed in this session; nothing was changed."
    assert_refused(stepped, f"{line} Next: {cell(REQUIRE)}.")
    for look in (True, False):
        with pytest.raises(OutOfOrder):
            stepped.phase.note("toy", {}) if look else stepped.phase.close()
    assert fingerprint(there) == before


@every_notebook
def test_a_gate_that_failed_stops_everything_after_it_until_it_passes(
    opened: Callable[..., Stepped], there: str, notebook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, stepped = name_of(notebook), opened(notebook)
    before = fingerprint(there, but="runbook.entry")

    def judged(holds: bool) -> None:
        found = [gate("toy.fact_holds", holds, name, found="this", needed="that")]
        monkeypatch.setattr(predecessors, "gates", lambda *_: found)

    judged(False)
    with pytest.raises(GateFailed, match="toy"):
        stepped.section(REQUIRE)
    told = fingerprint(there)
    assert_refused(
        stepped,
        f"{name} is open, and toy.fact_holds did not pass; nothing was changed."
        f" Next: put that right, then run {cell(REQUIRE)}.",
    )
    assert fingerprint(there) == told, "nor was anything written into the ledger"
    judged(True)
    stepped.phase.require()
    stepped.phase.ask()
    judged(False)
    with pytest.raises(OutOfOrder, match=f"{name} is open, and since its gates passed {name}: this"):
        stepped.phase.ask()
    assert fingerprint(there, but="runbook.entry") == before


def says(phase: Any, name: str, verdict: str, **body: str) -> None:
    """Another session's word in the ledger."""
    replace(phase.ledger, phase=name).append("phase", {"verdict": verdict} | body)


@pytest.mark.parametrize("notebook", [n for n in ALL if name_of(n) not in (MIGRATE[0], UNDO[0])])
def test_what_it_rests_on_was_undone_meanwhile(opened: Callable[..., Stepped], there: str, notebook: str) -> None:
    name, stepped = name_of(notebook), opened(notebook)
    phase = stepped.phase
    later = [p for way in UNDO[: UNDO.index(name)] for p in STEPS[way].rolls_back] if name in UNDO else []
    for other in MIGRATE:
        says(phase, other, "UNDONE" if other in later else "PASS")
    phase.require()
    before = fingerprint(there, but="runbook.entry")
    if later:
        says(phase, later[-1], "PASS")
        why = f"{name}: {later[-1]} still proved"
    else:
        rests = [n for n in relied_on(operation_of(name)) if n in MIGRATE][-1]
        says(phase, rests, "UNDONE", by="the undo of another")
        why = f"{rests} was undone by the undo of another"
    told = fingerprint(there)
    line = f"{name} is open, and since its gates passed {why}; nothing was changed. Next: {cell(REQUIRE)}."
    assert_refused(stepped, line)
    assert fingerprint(there) == told
    says(phase, later[-1], "UNDONE") if later else says(phase, rests, "PASS")
    phase.require()
    phase.ask()
    assert fingerprint(there, but="runbook.entry") == before


@pytest.mark.parametrize("execute", [False, True])
def test_the_server_refuses_what_forgot_to_ask(opened: Callable[..., Stepped], there: str, execute: bool) -> None:
    stepped, before = opened("migrate/60_build_index", execute=execute), fingerprint(there, but="runbook.entry")

    def is_fenced() -> None:
        with db.beside(stepped.phase.connection, stepped.phase.params, "toy") as second:
            for connection in (stepped.phase.connection, second):
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                    connection.execute("UPDATE articles SET views = views + 1")

    is_fenced()
    stepped.section(REQUIRE)
    is_fenced()
    with stepped.phase.opened(), db.beside(stepped.phase.connection, stepped.phase.params, "toy") as second:
        for connection in (stepped.phase.connection, second) if execute else ():
            with connection.transaction(force_rollback=True):
                connection.execute("UPDATE articles SET views = views + 1")
        if not execute:
            is_fenced()
    is_fenced()
    with stepped.phase.opened(), pytest.raises(ZeroDivisionError), stepped.phase.opened():
        raise ZeroDivisionError
    is_fenced()
    with db.rolled_back(stepped.phase.connection):
        stepped.phase.connection.execute("UPDATE articles SET views = views + 1")
    assert fingerprint(there, but="runbook.entry") == before


def holds(phase: Any) -> Any:
    return collect([gate("toy.fact_holds", True, phase.name, found="this", needed="this")])


def holds_no_more(phase: Any) -> Any:
    return collect([gate("toy.fact_holds", False, phase.name, found="this", needed="that")])


def looks_in_vain(_: Any) -> Any:
    raise KeyboardInterrupt


def test_only_what_is_proved_since_its_last_change_is_closed(opened: Callable[..., Stepped], there: str) -> None:
    phase = opened("operate/rebuild_index").phase
    for name in MIGRATE:
        says(phase, name, "PASS")
    phase.require()
    name = "operate/rebuild_index"
    not_proved = f"{name} is open, and what it did is not proved; nothing was changed. Next: {cell(PROVE)}."

    def is_not_closed(line: str = not_proved) -> None:
        told = fingerprint(there)
        with pytest.raises(OutOfOrder) as refused:
            phase.close()
        assert str(refused.value) == line
        assert fingerprint(there) == told

    is_not_closed()
    phase.prove(holds, midway=True)
    is_not_closed()
    phase.prove(holds)
    with phase.opened():
        pass
    is_not_closed()
    for look, error, why in (
        (holds_no_more, GateFailed, "toy.fact_holds did not pass"),
        (looks_in_vain, KeyboardInterrupt, "test_wrong_order.looks_in_vain has not come to its end"),
    ):
        phase.prove(holds)
        with pytest.raises(error):
            phase.prove(look)
        line = f"operate/rebuild_index is open, and {why}; nothing was changed. Next: put that right, then run"
        is_not_closed(f"{line} {cell(REQUIRE)}.")
        with pytest.raises(OutOfOrder, match=why):
            phase.ask()
        phase.require()
    with pytest.raises(GateFailed):
        phase.require(holds, holds_no_more)
    is_not_closed(
        "operate/rebuild_index is open, and toy.fact_holds did not pass; nothing was changed."
        f" Next: put that right, then run {cell(REQUIRE)}."
    )
    with pytest.raises(KeyboardInterrupt):
        phase.require(looks_in_vain)
    with pytest.raises(OutOfOrder):
        phase.ask()
    phase.require(holds)
    phase.prove(holds)
    with pytest.raises(GateFailed):
        phase.close(holds_no_more(phase))
    assert "PASS" in str(phase.close(holds(phase)))


@pytest.mark.parametrize("name", OPERATE)
def test_proving_before_doing_changes_nothing_and_fails_by_gates_or_not_at_all(
    opened: Callable[..., Stepped], there: str, name: str
) -> None:
    stepped = opened(name)
    stepped.phase.order.required = True
    before = fingerprint(there, but="runbook.entry")
    try:
        stepped.section(PROVE)
    except RunbookError as failed:
        assert "None" not in str(failed)
    assert fingerprint(there, but="runbook.entry") == before


def test_a_second_notebook_in_a_kernel_ends_the_first(
    opened: Callable[..., Stepped], there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened("migrate/60_build_index")
    before = fingerprint(there)
    capsys.readouterr()
    second = opened("migrate/70_tune")
    assert capsys.readouterr().out == (
        "60_build_index was open in this kernel and has been let go; 70_tune is open. Next: the cell below “Must be"
        " true first”.\n"
    )
    assert_refused(
        first,
        "60_build_index was let go when 70_tune was opened in this kernel; nothing was changed."
        " Next: the cell below “Where am I” of its own notebook.",
    )
    missing = Stepped("migrate/70_tune", Path("nowhere.yaml"))
    missing.section(PARAMETERS)
    with pytest.raises(BadInput):
        missing.section(OPEN)
    with pytest.raises(OutOfOrder, match="70_tune was let go when 70_tune was opened"):
        second.section(REQUIRE)
    assert fingerprint(there) == before


def test_a_kernel_that_was_restarted_goes_on(opened: Callable[..., Stepped], there: str) -> None:
    with in_another_kernel():
        gone = opened("operate/rebuild_index")
        gone.phase.ledger.connection.close()
        gone.phase.order.end("", "")
    again = opened("operate/rebuild_index")
    again.phase.require()
    again.phase.ask()


@pytest.mark.parametrize("which", ["work", "ledger"])
def test_a_session_that_the_server_ended_is_told_of_in_one_line(
    opened: Callable[..., Stepped], there: str, which: str
) -> None:
    stepped = opened("operate/rebuild_index")
    stepped.phase.require()
    lost = stepped.phase.connection if which == "work" else stepped.phase.ledger.connection
    with psycopg.connect(there, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(%s, 5000)", [lost.info.backend_pid])
    before = fingerprint(there)
    with suppress(OutOfOrder, psycopg.OperationalError):
        stepped.section(ACTS)
    assert_refused(
        stepped,
        "operate/rebuild_index has lost its connection to the server; what was committed before stays."
        " Next: the cell below “Where am I”.",
    )
    assert fingerprint(there) == before


@pytest.mark.parametrize("notebook", ALL)
def test_its_sections_are_those_that_the_lines_name(notebook: str) -> None:
    titles = [t for t in dict.fromkeys(c.section for c in Stepped(notebook, Path()).cells) if t != "What is there"]
    wanted = [PARAMETERS, OPEN, REQUIRE, PLAN, ACTS, PROVE, CLOSE]
    acts = [w for w in wanted if w != ACTS or name_of(notebook) not in ("00_preflight", "operate/monitor")]
    assert [title[: len(w)] for title, w in zip(titles, acts, strict=True)] == acts


OPERATIONS: dict[str, dict[str, Any]] = {
    "operate/refresh": {},
    "operate/monitor": {},
    "operate/update_extension": {},
    "operate/rebuild_index": {"index": {"m": 24, "ef_construction": 96}},
}


def test_every_cell_twice(points: Points, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DSN_ENV, points.copied("order_twice"))
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000.0)
    for name, sections in OPERATIONS.items():
        every_cell_twice(name, write_params(tmp_path, **WAY | sections))
    every_cell_twice("undo/rebuild_index", tmp_path / "toy.yaml")
    for name in UNDO:
        every_cell_twice(name, points.path)
    assert dump(os.environ[DSN_ENV]) == points.home
