"""Each kind of statement of a later phase is tried before anything is changed, and nothing of it stays."""

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core import db
from runbook_lib.core.gates import Gate, Gates
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import expand_schema, extension, inputs, preflight, trials
from runbook_lib.params import Params

Connection = psycopg.Connection[Any]
MakeParams = Callable[..., Params]
OpenPhase = Callable[..., Phase]

EVERY_TRIAL = [
    "trial.ledger_can_be_made",
    "trial.search_function_can_be_made",
    "trial.extension_can_be_made",
    "trial.tables_can_be_made",
    "trial.index_can_be_made",
    "trial.capture_can_be_made",
    "trial.columns_can_be_added",
    "trial.fillfactor_can_be_set",
    "trial.update_takes_every_row",
    "trial.update_touches_nothing_else",
]
SIDE_TABLE = [
    *EVERY_TRIAL[:5],
    "trial.side_table_can_be_made",
    "trial.capture_can_be_made",
]


def _trials(gates: Gates) -> list[Gate]:
    return [g for g in gates if g.name.startswith("trial.")]


def _forbid(c: Connection, tag: str, words: str, when: str = "ddl_command_start") -> None:
    c.execute(
        "CREATE FUNCTION no_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF tg_tag = '{tag}' THEN RAISE EXCEPTION '{words}'; END IF; END $$;"
        f"CREATE EVENT TRIGGER frozen ON {when} EXECUTE FUNCTION no_ddl()"
    )


@pytest.mark.parametrize(("layout", "names"), [("column", EVERY_TRIAL), ("side_table", SIDE_TABLE)])
def test_every_kind_is_tried_and_nothing_stays(
    articles: Connection, make_params: MakeParams, open_phase: OpenPhase, layout: str, names: list[str]
) -> None:
    everything = """SELECT
        (SELECT array_agg(oid ORDER BY oid) FROM pg_class WHERE relnamespace <> 'pg_toast'::regnamespace),
        (SELECT array_agg(oid ORDER BY oid) FROM pg_proc), (SELECT array_agg(oid ORDER BY oid) FROM pg_trigger),
        (SELECT count(*) FROM pg_attribute WHERE attrelid = 'articles'::regclass),
        (SELECT count(*) FROM pg_extension), (SELECT reloptions FROM pg_class WHERE oid = 'articles'::regclass),
        (SELECT array_agg(nspname) FROM pg_namespace WHERE nspname !~ 'temp')"""
    before = articles.execute(everything).fetchone()
    gates = _trials(inputs.input_problems(make_params(vector={"layout": layout})))
    assert [g.name for g in gates] == names
    assert {str(g.verdict) for g in gates} == {"PASS"}
    assert articles.execute(everything).fetchone() == before


@pytest.mark.parametrize(
    ("tag", "gate", "block", "phase"),
    [
        ("CREATE SCHEMA", "ledger_can_be_made", "ledger.create_schema", "00_preflight"),
        ("CREATE FUNCTION", "ledger_can_be_made", "ledger.create_chain_function", "00_preflight"),
        ("CREATE EXTENSION", "extension_can_be_made", "extension.create", "20_extension"),
        ("CREATE TABLE AS", "tables_can_be_made", "schema.create_staging", "30_expand_schema"),
        ("ALTER TABLE", "ledger_can_be_made", "ledger.add_by_owner", "00_preflight"),
    ],
)
def test_ddl_that_an_event_trigger_forbids_is_told_in_its_words(
    articles: Connection, make_params: MakeParams, tag: str, gate: str, block: str, phase: str
) -> None:
    _forbid(articles, tag, "DDL is frozen, open a change ticket")
    (g,) = inputs.input_problems(make_params()).failed
    assert str(g) == (
        f"""FAIL    trial.{gate}   "public"."articles"
  found   PostgreSQL says to {block}: DDL is frozen, open a change ticket
  needed  the server takes what {phase} will run
  danger  {phase} would be refused, after the phases before it have done their work
  do      settle it with whoever set this rule for the database, then run the same command again"""
    )


def test_a_rule_about_indexes_is_found_before_the_backfill(articles: Connection, make_params: MakeParams) -> None:
    articles.execute(
        "CREATE FUNCTION no_hnsw() RETURNS event_trigger LANGUAGE plpgsql AS $$ DECLARE o record; BEGIN"
        " FOR o IN SELECT * FROM pg_event_trigger_ddl_commands() WHERE object_type = 'index' LOOP"
        "  IF pg_get_indexdef(o.objid) LIKE '%hnsw%' THEN RAISE 'no hnsw here'; END IF; END LOOP; END $$;"
        "CREATE EVENT TRIGGER frozen ON ddl_command_end EXECUTE FUNCTION no_hnsw()"
    )
    (g,) = inputs.input_problems(make_params()).failed
    assert (g.name, g.found) == ("trial.index_can_be_made", "PostgreSQL says to trials.create_hnsw: no hnsw here")


def test_a_held_table_is_unknown_with_its_holder_and_never_waited_for_long(
    articles: Connection, make_params: MakeParams, database: str
) -> None:
    with psycopg.connect(database, application_name="report") as other:
        other.execute("SELECT FROM articles LIMIT 1")
        pid = other.info.backend_pid
        started = time.monotonic()
        (g,) = inputs.input_problems(make_params()).failed
        seconds = time.monotonic() - started
    assert str(g).replace(f"pid {pid}", "pid N").split(" for ")[0] == (
        """UNKNOWN trial.columns_can_be_added   "public"."articles"
  found   schema.add_columns waited 100 ms: canceling statement due to lock timeout; pid N (postgres, report, idle in transaction"""  # noqa: E501
    )
    assert g.do == "end that session, or run the same command again at a quieter time; nothing was changed"
    assert seconds < 5


def test_a_writer_beside_the_trials_waits_only_briefly(
    articles: Connection, make_params: MakeParams, database: str
) -> None:
    longest, stop = [0.0], threading.Event()

    def write() -> None:
        with psycopg.connect(database, autocommit=True) as c:
            while not stop.is_set():
                started = time.monotonic()
                c.execute("UPDATE articles SET views = views + 1 WHERE id = 1")
                longest[0] = max(longest[0], time.monotonic() - started)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        gates = inputs.input_problems(make_params())
    finally:
        stop.set()
        thread.join()
    assert gates.passed, str(gates)
    # A bound that a table held through a whole check would break; how long it really is stands in the record.
    assert longest[0] < 2.0


def test_what_is_made_already_is_not_tried_again(articles: Connection, filled: Callable[..., Phase]) -> None:
    phase = filled()
    names = [g.name for g in trials.gates(phase.connection, phase.params)]
    assert names == ["trial.search_function_can_be_made", "trial.index_can_be_made", "trial.fillfactor_can_be_set"]
    assert phase.connection.prepare_threshold == 5, "the session's own way of preparing is back"


def test_after_the_columns_only_rows_without_a_vector_are_tried(articles: Connection, open_phase: OpenPhase) -> None:
    phase = open_phase("30_expand_schema")
    extension.apply(phase)
    db.use_search_path(phase.connection)
    expand_schema.apply(phase)
    articles.execute("UPDATE articles SET embedding = '[1,1,1,1,1,1,1,1]', embedding_hash = 'x' WHERE id > 3")
    # Their page has room again, for a new version of each.
    articles.execute("VACUUM articles")
    gates = {g.name: g for g in trials.gates(phase.connection, phase.params)}
    assert gates["trial.update_takes_every_row"].found == (
        "3 rows tried, each took it, 3 of them without leaving their page (HOT), as the pages are now; rolled back"
    )
    assert "trial.columns_can_be_added" not in gates


def test_nothing_is_tried_on_a_distributed_table_and_no_gate_passes(
    articles: Connection, make_params: MakeParams
) -> None:
    p = make_params(target={"distributed": "citus"})
    with db.connect(p, "test") as connection:
        assert list(trials.gates(connection, p)) == [], "no gate passes what was not tried"


def test_preflight_shows_the_trials_and_how_long_the_table_was_held(
    articles: Connection, open_phase: OpenPhase
) -> None:
    gates = {g.name: g for g in preflight.look(open_phase())}
    g = gates["trial.columns_can_be_added"]
    assert g.found.startswith("add_columns: tried and rolled back in ")
    assert "; ACCESS EXCLUSIVE on the table; all its locks held for " in g.found
    assert 0 < g.figures["held_s"] < 10


def test_a_session_that_ends_in_a_trial_is_no_answer_to_what_was_tried(
    articles: psycopg.Connection[Any], make_params: Callable[..., Any]
) -> None:
    articles.execute(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END';"
        "CREATE TRIGGER die BEFORE UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION die()"
    )
    with pytest.raises(psycopg.OperationalError):
        inputs.input_problems(make_params())
