"""Phase 30: after apply, applied twice, interrupted half-way, and after undo."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import expand_schema, extension
from tests.opened import gates_passed

Open = Callable[..., Phase]
COUNTED = "a made-up row was queued 1 × when inserted, 1 × when its text changed, 0 × else"


@pytest.fixture
def expanded(open_phase: Open) -> Phase:
    phase = open_phase("30_expand_schema")
    expand_schema.record_start(phase)
    extension.apply(phase)
    expand_schema.apply(phase)
    return phase


def queued(phase: Phase) -> list[int]:
    rows = phase.connection.execute("SELECT key FROM runbook.articles_queue ORDER BY id").fetchall()
    return [row["key"] for row in rows]


def test_the_column_has_type_and_dimension_and_changes_arrive(expanded: Phase) -> None:
    gates = expand_schema.verify(expanded)
    assert [(g.name, g.verdict, g.found) for g in gates] == [
        ("schema.column_has_right_type", "PASS", "vector(8)"),
        ("schema.only_the_runbooks_objects_were_added", "PASS", "6 objects added, 0 gone"),
        ("schema.changes_are_captured", "PASS", f"both triggers as made; {COUNTED}"),
    ]
    assert queued(expanded) == [], "the probe is rolled back"


def test_applied_twice_it_does_nothing(expanded: Phase) -> None:
    assert expand_schema.plan(expanded).statements == ()


@pytest.mark.parametrize("gone", ["add_columns", "create_staging", "create_queue", "create_triggers"])
def test_interrupted_before_any_statement_it_carries_on(open_phase: Open, gone: str) -> None:
    phase = open_phase("30_expand_schema")
    expand_schema.record_start(phase)
    extension.apply(phase)
    for statement in expand_schema.plan(phase):
        if statement.name == f"schema.{gone}":
            break
        phase.do(statement)
    expand_schema.apply(phase)
    assert expand_schema.verify(phase).passed


def test_undo_leads_back_to_the_catalogue_of_the_start(expanded: Phase) -> None:
    expand_schema.undo(expanded)
    extension.undo(expanded)
    assert expand_schema.verify_undone(expanded).passed
    assert expand_schema.verify_as_at_start(expanded).passed
    assert expand_schema.undo_plan(expanded).statements == ()


def test_undo_keeps_a_column_that_stood_there_at_the_start(open_phase: Open) -> None:
    phase = open_phase("30_expand_schema")
    with phase.opened():
        phase.connection.execute("ALTER TABLE articles ADD COLUMN embedding text")
    expand_schema.record_start(phase)
    assert "schema.drop_columns" not in [s.name for s in expand_schema.undo_plan(phase)]


def test_only_a_change_of_text_is_queued(expanded: Phase, articles: psycopg.Connection[Any]) -> None:
    articles.execute("UPDATE articles SET views = views + 1 WHERE id = 1")
    articles.execute("UPDATE articles SET title = title, body = body WHERE id = 2")
    articles.execute("UPDATE articles SET body = 'new words' WHERE id = 3")
    articles.execute("UPDATE articles SET title = NULL WHERE id = 4")
    articles.execute("INSERT INTO articles (id, title) VALUES (9001, 'a new row')")
    articles.execute("DELETE FROM articles WHERE id = 5")
    assert queued(expanded) == [3, 4, 9001]


def test_a_change_by_another_trigger_is_queued_too(expanded: Phase, articles: psycopg.Connection[Any]) -> None:
    articles.execute(
        "CREATE FUNCTION tidy() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN NEW.body := 'tidied'; RETURN NEW; END $$;"
        "CREATE TRIGGER tidy BEFORE UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION tidy();"
    )
    articles.execute("UPDATE articles SET views = 1 WHERE id = 7")
    assert queued(expanded) == [7]


def test_a_writer_without_rights_on_the_ledger_still_writes(
    expanded: Phase, articles: psycopg.Connection[Any]
) -> None:
    articles.execute("DROP ROLE IF EXISTS plain_writer")
    articles.execute("CREATE ROLE plain_writer; GRANT SELECT, INSERT, UPDATE ON articles TO plain_writer")
    articles.execute("SET ROLE plain_writer")
    articles.execute("UPDATE articles SET body = 'by a plain writer' WHERE id = 8")
    articles.execute("RESET ROLE; DROP OWNED BY plain_writer; DROP ROLE plain_writer")
    assert queued(expanded) == [8]


REPLACED = """CREATE OR REPLACE FUNCTION runbook.articles_capture() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$ BEGIN RETURN NULL; END $$"""


@pytest.mark.parametrize(
    ("harm", "verdict", "found"),
    [
        ("ALTER TABLE articles DISABLE TRIGGER runbook_articles_update", "FAIL",
         "trigger runbook_articles_update fires never"),
        ("ALTER TABLE articles ENABLE TRIGGER USER", "FAIL",
         "trigger runbook_articles_insert fires not for rows that replication brings; trigger runbook_articles_update"
         " fires not for rows that replication brings"),
        ("DROP TRIGGER runbook_articles_insert ON articles", "FAIL", "no trigger runbook_articles_insert"),
        ("DROP TRIGGER runbook_articles_insert ON articles; CREATE TRIGGER runbook_articles_insert AFTER INSERT ON"
         " articles FOR EACH ROW WHEN (NEW.id > 0) EXECUTE FUNCTION runbook.articles_capture();"
         " ALTER TABLE articles ENABLE ALWAYS TRIGGER runbook_articles_insert", "FAIL",
         "trigger runbook_articles_insert is not as made: CREATE TRIGGER runbook_articles_insert AFTER INSERT ON ..."
         " FOR EACH ROW WHEN ((new.id > 0)) EXECUTE FUNCTION runbook.articles_capture()"),
        (REPLACED, "FAIL", 'function "runbook"."articles_capture" is not as made; a made-up row was queued 0 × when'
         " inserted, 0 × when its text changed, 0 × else"),
        ("CREATE RULE quiet AS ON INSERT TO runbook.articles_queue DO INSTEAD NOTHING", "FAIL",
         "a made-up row was queued 0 × when inserted, 0 × when its text changed, 0 × else"),
        ("ALTER TABLE runbook.articles_queue ADD CHECK (key > 0) NOT VALID", "UNKNOWN",
         'could not be tried: new row for relation "articles_queue" violates check constraint'
         ' "articles_queue_key_check"'),
    ],
)  # fmt: skip
def test_capture_that_does_not_work_is_found(
    expanded: Phase, articles: psycopg.Connection[Any], harm: str, verdict: str, found: str
) -> None:
    articles.execute(harm)
    gate = expand_schema.verify(expanded).failed[0]
    assert str(gate) == (
        f'{verdict:<7} schema.changes_are_captured   "public"."articles"\n'
        f"  found   {found}\n"
        "  needed  both triggers and their function as made, firing always; a made-up row queued once when inserted,"
        " once when its text changed, and not when written again\n"
        "  danger  rows that are written from now on would keep no vector or an old one\n"
        "  do      run 30_expand_schema again with execute: true, which makes triggers that are missing or switched"
        " off again; where a definition differs, run undo/schema first"
    )
    if "runbook_articles" in harm or "TRIGGER USER" in harm:
        articles.execute("DROP RULE IF EXISTS quiet ON runbook.articles_queue")
        expand_schema.apply(expanded)
        assert expand_schema.verify(expanded).passed == ("WHEN (NEW.id > 0)" not in harm)


HOSTILE = """CREATE EXTENSION citext;
    CREATE DOMAIN short AS varchar(20) NOT NULL CHECK (VALUE ~ '^[A-Z]' AND length(VALUE) > 2);
    CREATE TABLE hostile (id {key} PRIMARY KEY, a short UNIQUE, b varchar(5) NOT NULL, c citext,
        d text COLLATE "POSIX", e char(9), f text GENERATED ALWAYS AS (a || b) STORED, n int,
        g text GENERATED ALWAYS AS (upper(b)) VIRTUAL);
    INSERT INTO hostile (a, b, c, d, e) VALUES ('Apple', '12345', NULL, NULL, 'x'), ('Berry', '12345', 'c', 'd', 'y');
    CREATE FUNCTION never() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;"""


@pytest.mark.parametrize(
    "key",
    [
        "bigint GENERATED ALWAYS AS IDENTITY",
        "uuid DEFAULT gen_random_uuid()",
        "varchar(4) DEFAULT substr(gen_random_uuid()::text, 1, 4)",
    ],
)
def test_columns_that_refuse_a_write_are_captured_all_the_same(
    open_phase: Open, articles: psycopg.Connection[Any], key: str
) -> None:
    articles.execute(HOSTILE.format(key=key))
    target = {"name": "articles", "table": "hostile", "text_columns": list("abcdefg")}
    phase = open_phase("30_expand_schema", target=target)
    expand_schema.record_start(phase)
    extension.apply(phase)
    expand_schema.apply(phase)
    articles.execute("CREATE TRIGGER never BEFORE UPDATE ON hostile FOR EACH ROW EXECUTE FUNCTION never()")
    gate = next(g for g in expand_schema.verify(phase) if g.name == "schema.changes_are_captured")
    assert (gate.verdict, gate.found) == ("PASS", f"both triggers as made; {COUNTED}")
    articles.execute("DROP TRIGGER never ON hostile")

    def changes(statement: str) -> int:
        before = len(queued(phase))
        articles.execute(statement)
        return len(queued(phase)) - before

    assert changes("UPDATE hostile SET c = 'C' WHERE a = 'Berry'") == 1, "equal to citext, not in its bytes"
    assert changes("UPDATE hostile SET b = '54321' WHERE a = 'Apple'") == 1
    assert changes("UPDATE hostile SET n = 1, a = a, c = c, e = 'x  '") == 1, "only Berry's e was another"
    assert changes("UPDATE hostile SET n = 2, e = 'x'") == 0, "blanks that char(n) pads with are no text"


def test_however_rows_are_written_they_are_queued(expanded: Phase, articles: psycopg.Connection[Any]) -> None:
    articles.execute("UPDATE articles SET id = 9100 WHERE id = 10")
    with articles.cursor().copy("COPY articles (id, title) FROM STDIN") as copy:
        copy.write("9101\tcopied\n")
    articles.execute("INSERT INTO articles (id, title) VALUES (9101, 'again') ON CONFLICT (id) DO UPDATE"
                     " SET title = excluded.title")  # fmt: skip
    articles.execute("MERGE INTO articles t USING (VALUES (9102, 'm'), (11, 'merged')) s (id, title) ON t.id = s.id"
                     " WHEN MATCHED THEN UPDATE SET title = s.title WHEN NOT MATCHED THEN INSERT (id, title) VALUES"
                     " (s.id, s.title)")  # fmt: skip
    articles.execute("SET session_replication_role = replica")
    articles.execute("INSERT INTO articles (id, title) VALUES (9103, 'applied')")
    articles.execute("SET session_replication_role = origin")
    articles.execute("UPDATE articles SET id = id WHERE id = 12; DELETE FROM articles WHERE id = 13")
    assert sorted(queued(expanded)) == [11, 9100, 9101, 9101, 9102, 9103]
    articles.execute("TRUNCATE articles")
    assert len(queued(expanded)) == 6


def test_a_table_with_one_column_is_captured(open_phase: Open, articles: psycopg.Connection[Any]) -> None:
    articles.execute("CREATE TABLE words (word text PRIMARY KEY); INSERT INTO words VALUES ('one')")
    target = {"table": "words", "key": "word", "text_columns": ["word"]}
    phase = open_phase("30_expand_schema", target=target)
    expand_schema.record_start(phase)
    extension.apply(phase)
    expand_schema.apply(phase)
    assert expand_schema.verify(phase).passed
    articles.execute("UPDATE words SET word = 'two'")
    assert queued(phase) == ["two"]


def test_somebody_elses_change_is_named(expanded: Phase, articles: psycopg.Connection[Any]) -> None:
    articles.execute("ALTER TABLE articles ADD COLUMN surprise int")
    found = next(g for g in expand_schema.verify(expanded) if g.name == "schema.only_the_runbooks_objects_were_added")
    assert (found.verdict, "column surprise integer" in found.found) == ("FAIL", True)


def test_names_that_need_quotes(database: str, make_params: Callable[..., Any]) -> None:
    from runbook_lib.core import db
    from runbook_lib.core.ledger import Ledger

    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(
            'CREATE SCHEMA "Big Shop"; CREATE TABLE "Big Shop"."Old ""Articles""" ('
            ' "Key %" uuid PRIMARY KEY DEFAULT gen_random_uuid(), "Text {x}" varchar(99));'
            ' INSERT INTO "Big Shop"."Old ""Articles""" ("Text {x}") VALUES (\'some words\')'
        )
    target = {"schema": "Big Shop", "table": 'Old "Articles"', "key": "Key %", "text_columns": ["Text {x}"]}
    p = make_params(target=target, vector={"column": "Vec %"})
    ledger = Ledger(db.connect(p, "t ledger"), p, "r", "30_expand_schema")
    ledger.create()
    phase = gates_passed(Phase("30_expand_schema", "r", True, p, db.connect(p, "t"), ledger))
    expand_schema.record_start(phase)
    extension.apply(phase)
    expand_schema.apply(phase)
    assert expand_schema.verify(phase).passed
    expand_schema.undo(phase)
    extension.undo(phase)
    assert expand_schema.verify_as_at_start(phase).passed
    phase.connection.close()
    ledger.connection.close()


@pytest.mark.attack
def test_two_targets_on_one_table_do_not_share_columns(open_phase: Callable[..., Phase]) -> None:
    """Both were looked at before either made its columns; undo of one would drop the other's vectors."""
    first = open_phase("30_expand_schema")
    extension.apply(first)
    second = open_phase("30_expand_schema", target={"name": "second"}, search={"function": "search_second"})
    expand_schema.apply(first)
    with pytest.raises(BadInput) as error:
        expand_schema.apply(second)
    assert str(error.value.problems) == (
        'FAIL    inputs.new_columns_are_free   "public"."articles"\n'
        "  found   embedding, embedding_updated_at, embedding_hash there, not made by this runbook\n"
        "  needed  embedding, embedding_updated_at and embedding_hash free, or made by this runbook\n"
        "  danger  the backfill would overwrite, and undo would drop, what somebody else keeps there\n"
        "  do      name another column in vector.column"
    )
    expand_schema.apply(first)
    own = {"dimension": 8, "column": "other"}
    expand_schema.apply(open_phase("30_expand_schema", target={"name": "second"}, vector=own))
