"""What the backfill's UPDATE does to a table besides is found by trying, told with names, and agreed to by name."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import update_effects
from runbook_lib.core.gates import Gate
from runbook_lib.migrate import inputs
from runbook_lib.params import Params

Connection = psycopg.Connection[Any]
MakeParams = Callable[..., Params]

FUNCTION = "CREATE FUNCTION {} RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} END $$;"
TOUCH = (
    FUNCTION.format("touch()", "NEW.views := OLD.views + 1; NEW.status := 'seen'; RETURN NEW;")
    + "CREATE TRIGGER articles_touch BEFORE UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION touch();"
)
AUDIT = (
    "CREATE TABLE audit (id bigserial, title text);"
    + FUNCTION.format("audited()", "INSERT INTO audit (title) VALUES (OLD.title); RETURN NULL;")
    + "CREATE TRIGGER articles_audit AFTER UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION audited();"
)
KEEP = (
    FUNCTION.format("keep()", "IF OLD.id % 50 = 0 THEN RETURN NULL; END IF; RETURN NEW;")
    + "CREATE TRIGGER articles_keep BEFORE UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION keep();"
)


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the toy table is tried, however busy the machine is."""
    monkeypatch.setattr(update_effects, "BUDGET_S", 60.0)


def _gates(params: Params) -> dict[str, Gate]:
    return {g.name: g for g in inputs.input_problems(params) if g.name.startswith("trial.")}


def _touches(params: Params) -> Gate:
    return _gates(params)["trial.update_touches_nothing_else"]


def _takes(params: Params) -> Gate:
    return _gates(params)["trial.update_takes_every_row"]


def test_what_triggers_do_is_told_with_column_table_and_count(articles: Connection, make_params: MakeParams) -> None:
    articles.execute(TOUCH + AUDIT)
    assert str(_touches(make_params())) == (
        """FAIL    trial.update_touches_nothing_else   "public"."articles"
  found   200 rows tried, rolled back: trigger articles_audit inserted 5 rows in public.audit; trigger articles_touch changed status in 5, views in 5 of 5 rows; sequence public.audit_id_seq: opened for writing
  needed  no other column changed and nothing else written, or agreed to by name
  danger  the backfill would do this for every row that has text
  do      set vector.layout: side_table, which updates no row of this table; or agree to it: accept.triggers: [articles_audit, articles_touch]"""  # noqa: E501
    )
    untouched = "SELECT max(views), max(status), (SELECT count(*) FROM audit) FROM articles"
    assert articles.execute(untouched).fetchone() == (0, "Stable", 0), "the trial was rolled back"


def test_consent_covers_only_what_it_names(articles: Connection, make_params: MakeParams) -> None:
    articles.execute(TOUCH + AUDIT)
    g = _touches(make_params(accept={"triggers": ["articles_touch"]}))
    assert (g.verdict, g.do.rsplit("; ", 1)[1]) == ("FAIL", "or agree to it: accept.triggers: [articles_audit]")
    g = _touches(make_params(accept={"triggers": ["articles_touch", "articles_audit"]}))
    assert (g.verdict, g.figures["agreed_to"]) == ("PASS", ["trigger articles_audit", "trigger articles_touch"])
    assert g.found == (
        "200 rows tried, rolled back: trigger articles_audit inserted 5 rows in public.audit (agreed to); trigger"
        " articles_touch changed status in 5, views in 5 of 5 rows (agreed to); sequence public.audit_id_seq: opened"
        " for writing"
    )


def test_vectors_beside_the_table_need_no_consent(articles: Connection, make_params: MakeParams) -> None:
    articles.execute(TOUCH + AUDIT + KEEP)
    gates = inputs.input_problems(make_params(vector={"layout": "side_table"}))
    assert gates.passed, str(gates)
    assert "trial.side_table_can_be_made" in [g.name for g in gates]


QUIET = {
    "of other columns": "BEFORE UPDATE OF title ON articles FOR EACH ROW",
    "of changed texts": "BEFORE UPDATE ON articles FOR EACH ROW WHEN (OLD.title IS DISTINCT FROM NEW.title)",
    "on insert": "BEFORE INSERT ON articles FOR EACH ROW",
}


@pytest.mark.parametrize("when", QUIET.values(), ids=QUIET)
def test_a_trigger_that_does_not_fire_is_no_danger(articles: Connection, make_params: MakeParams, when: str) -> None:
    articles.execute(TOUCH + "DROP TRIGGER articles_touch ON articles;")
    articles.execute(f"CREATE TRIGGER t {when} EXECUTE FUNCTION touch()")
    g = _touches(make_params())
    assert g.verdict == "PASS"
    assert g.found == "200 rows tried, rolled back: no other column changed, nothing else was written"


@pytest.mark.parametrize(
    ("enabled", "verdict"), [("DISABLE", "PASS"), ("ENABLE REPLICA", "PASS"), ("ENABLE ALWAYS", "FAIL")]
)
def test_only_an_enabled_trigger_counts(
    articles: Connection, make_params: MakeParams, enabled: str, verdict: str
) -> None:
    articles.execute(TOUCH)
    articles.execute(f"ALTER TABLE articles {enabled} TRIGGER articles_touch")
    assert _touches(make_params()).verdict == verdict


def test_a_trigger_that_fires_without_effect_passes_and_is_named(
    articles: Connection, make_params: MakeParams
) -> None:
    articles.execute(TOUCH.replace("OLD.views + 1", "OLD.views").replace("'seen'", "OLD.status"))
    g = _touches(make_params())
    assert g.verdict == "PASS"
    assert g.found.endswith("nothing else was written; fired without such an effect: articles_touch")


WRITERS = {
    "a statement trigger with a transition table": (
        FUNCTION.format("f()", "INSERT INTO log SELECT count(*) FROM new_rows; RETURN NULL;")
        + "CREATE TRIGGER x AFTER UPDATE ON articles REFERENCING NEW TABLE AS new_rows"
        " FOR EACH STATEMENT EXECUTE FUNCTION f()",
        "trigger x inserted 1 row in public.log",
    ),
    "an ALSO rule": (
        "CREATE RULE x AS ON UPDATE TO articles DO ALSO INSERT INTO log VALUES (OLD.id)",
        "rule x inserted 5 rows in public.log",
    ),
    "an update of the same row": (
        FUNCTION.format(
            "f()",
            "IF pg_trigger_depth() = 1 THEN UPDATE articles SET views = 1 WHERE id = NEW.id; END IF; RETURN NULL;",
        )
        + "CREATE TRIGGER x AFTER UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION f()",
        "trigger x changed views in 5 of 5 rows; updated 5 rows once more",
    ),
    "a deferred trigger": (
        FUNCTION.format("f()", "INSERT INTO log VALUES (1); RETURN NULL;")
        + "CREATE CONSTRAINT TRIGGER x AFTER UPDATE ON articles DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION f()",
        "trigger x inserted 5 rows in public.log",
    ),
    "a comparison of whole rows": (
        "ALTER TABLE articles DROP COLUMN tsv;"
        + FUNCTION.format("f()", "NEW.views := 7; RETURN NEW;")
        + "CREATE TRIGGER x BEFORE UPDATE ON articles FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)"
        " EXECUTE FUNCTION f()",
        "trigger x changed views in 5 of 5 rows",
    ),
    "a message to listeners": (
        FUNCTION.format("f()", "PERFORM pg_notify('changed', NEW.id::text); RETURN NULL;")
        + "CREATE TRIGGER x AFTER UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION f()",
        "trigger x sends NOTIFY, by its source",
    ),
}


@pytest.mark.parametrize(("ddl", "what"), WRITERS.values(), ids=WRITERS)
def test_each_way_to_write_more_is_found(articles: Connection, make_params: MakeParams, ddl: str, what: str) -> None:
    articles.execute("CREATE TABLE log (n bigint);" + ddl)
    search = {"fulltext_column": None} if "DROP COLUMN tsv" in ddl else {}
    g = _touches(make_params(search=search))
    assert g.verdict == "FAIL"
    assert g.found == f"200 rows tried, rolled back: {what}"


def test_a_trigger_that_acts_outside_of_the_database_is_recognised_and_not_called(
    articles: Connection, make_params: MakeParams
) -> None:
    # Called, it would write a row that no rollback takes back: through a connection of its own.
    articles.execute("CREATE EXTENSION dblink; CREATE TABLE told (n bigint)")
    port, folder = articles.info.port, articles.info.host
    articles.execute(
        "CREATE FUNCTION tell(n bigint) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM dblink_exec("
        f"'host={folder} port={port} user=postgres dbname={articles.info.dbname}', 'INSERT INTO told VALUES (1)');"
        " END $$;"
        + FUNCTION.format("f()", "PERFORM tell(NEW.id); RETURN NULL;")
        + "CREATE TRIGGER x AFTER UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION f();"
        "CREATE TRIGGER y AFTER UPDATE ON articles FOR EACH ROW WHEN (OLD.title <> NEW.title) EXECUTE FUNCTION f();"
    )
    g = _touches(make_params())
    assert (g.verdict, g.found) == ("FAIL", "200 rows tried, rolled back: trigger x calls dblink_exec")
    assert _touches(make_params(accept={"triggers": ["x"]})).verdict == "PASS"
    articles.execute("UPDATE articles SET title = title WHERE id = 1")
    assert articles.execute("SELECT count(*) FROM told").fetchone() == (1,), "the trigger does what it says"


def test_rows_that_a_trigger_keeps_are_named(articles: Connection, make_params: MakeParams) -> None:
    articles.execute(KEEP)
    g = _takes(make_params(accept={"triggers": ["articles_keep"]}))
    kept = g.found.split("vector: id ")[1].split(";")[0]
    assert str(g) == (
        f"""FAIL    trial.update_takes_every_row   "public"."articles"
  found   {g.figures["kept"]} of {g.figures["rows"]} rows tried did not take the vector: id {kept}; trigger articles_keep keeps them
  needed  the UPDATE of the backfill gives each row its vector
  danger  the backfill would stop at such a row, or never give it its vector
  do      set vector.layout: side_table, which updates no row of this table; or settle with the owner of the trigger, rule or constraint that it takes such an UPDATE"""  # noqa: E501
    )
    assert {int(k) % 50 for k in kept.split(", ")} == {0}


REFUSED = {
    "raises": (
        FUNCTION.format("f()", "IF OLD.id = 77 THEN RAISE 'article % is sealed', OLD.id; END IF; RETURN NEW;")
        + "CREATE TRIGGER x BEFORE UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION f()",
        "article 77 is sealed (for instance id 77)",
    ),
    "raises when deferred": (
        FUNCTION.format("f()", "IF OLD.id = 77 THEN RAISE 'does not balance'; END IF; RETURN NULL;")
        + "CREATE CONSTRAINT TRIGGER x AFTER UPDATE ON articles DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION f()",
        "does not balance (for instance id 77)",
    ),
    "an expression of an index fails": (
        FUNCTION.format("n(t text)", "RETURN 1;").replace("trigger", "int IMMUTABLE")
        + "CREATE INDEX ON articles (n(title));"
        + FUNCTION.format("n(t text)", "IF t = 'cookie leaks' THEN RAISE 'no leaks'; END IF; RETURN 1;")
        .replace("trigger", "int IMMUTABLE")
        .replace("CREATE", "CREATE OR REPLACE"),
        "no leaks (for instance id",
    ),
    "published without identity": (
        "ALTER TABLE articles DROP CONSTRAINT articles_pkey, ADD UNIQUE (id), ALTER COLUMN id SET NOT NULL;"
        "CREATE PUBLICATION told FOR TABLE articles",
        'cannot update table "articles" because it does not have a replica identity and publishes updates',
    ),
}


@pytest.mark.parametrize(("ddl", "words"), REFUSED.values(), ids=REFUSED)
def test_a_row_that_the_server_refuses_is_told_in_its_words(
    articles: Connection, make_params: MakeParams, ddl: str, words: str
) -> None:
    articles.execute(ddl)
    # Agreeing to the publication does not make the table take an UPDATE.
    g = _takes(make_params(accept={"publications": ["told"]} if "PUBLICATION" in ddl else {}))
    assert g.verdict == "FAIL"
    assert g.found.startswith(f"PostgreSQL says: {words}")


def test_rows_that_an_unchecked_constraint_refuses_are_counted(articles: Connection, make_params: MakeParams) -> None:
    articles.execute("ALTER TABLE articles ADD CONSTRAINT \"Short, 50 %\" CHECK (title <> 'cookie leaks') NOT VALID")
    gates = _gates(make_params())
    assert str(gates["trial.rows_meet_unchecked_constraints"]) == (
        """FAIL    trial.rows_meet_unchecked_constraints   Short, 50 % of public.articles
  found   NOT VALID; 5 rows do not meet it
  needed  every row meets it
  danger  an UPDATE of such a row fails, so the backfill would stop there
  do      correct these rows, then ALTER TABLE public.articles VALIDATE CONSTRAINT "Short, 50 %", which blocks no write; or set vector.layout: side_table, which updates no row of this table"""  # noqa: E501
    )
    articles.execute("DELETE FROM articles WHERE title = 'cookie leaks'")
    assert _gates(make_params())["trial.rows_meet_unchecked_constraints"].found == "NOT VALID; 0 rows do not meet it"


def test_a_partitioned_tables_triggers_count_too(database: str, make_params: MakeParams) -> None:
    with psycopg.connect(database, autocommit=True) as c:
        c.execute(
            """CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text, views int DEFAULT 0)
                   PARTITION BY RANGE (id);
               CREATE TABLE articles_1 PARTITION OF articles FOR VALUES FROM (1) TO (100);
               CREATE TABLE articles_2 PARTITION OF articles FOR VALUES FROM (100) TO (300);
               INSERT INTO articles SELECT i, 'cookie ' || i, 'leaks' FROM generate_series(1, 201) i;
               ANALYZE articles"""
        )
        c.execute(TOUCH.replace("NEW.status := 'seen';", ""))
        c.execute("CREATE TRIGGER of_leaf BEFORE UPDATE ON articles_2 FOR EACH ROW EXECUTE FUNCTION touch()")
        accept = {"triggers": ["articles_touch"]}
        g = _touches(make_params(search={"fulltext_column": None}, queries={"judgements": None}, accept=accept))
        assert g.verdict == "FAIL"
        assert "trigger of_leaf changed views in" in g.found
        assert g.do.endswith("or agree to it: accept.triggers: [of_leaf]")
