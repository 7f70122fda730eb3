"""Who may do what: nothing that the runbook makes is open to others, whatever default privileges give away."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import partitioned_twin
from runbook_lib.benchmark import comparison
from runbook_lib.core.gates import Gate, Verdict
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.migrate import expand_schema, extension, preflight, privileges
from runbook_lib.operate import compare_storage, partition_by_filter, rehearsal_schema
from runbook_lib.search import search_function
from tests.conftest import write_params
from tests.stepping import step_all
from tests.test_server_versions import SECTIONS

Connection = psycopg.Connection[Any]
Open = Callable[..., Phase]

APPLICATION, APPROVER = "shop_app", "shop_approver"
GENEROUS = "".join(
    f"ALTER DEFAULT PRIVILEGES {place} GRANT ALL ON {kind} TO {role};"
    for role in (APPLICATION, APPROVER, "PUBLIC")
    for kind in ("TABLES", "SEQUENCES", "FUNCTIONS", "SCHEMAS")
    for place in ("", "IN SCHEMA public")
    if place == "" or kind != "SCHEMAS"
)
# As docs/security.md asks for.
APPROVERS = """
    GRANT USAGE ON SCHEMA runbook TO shop_approver;
    GRANT SELECT ON runbook.entry TO shop_approver;
    GRANT EXECUTE ON FUNCTION runbook.sign_off TO shop_approver;
"""
OBJECTS = """
    SELECT 'schema' AS kind, n.oid, n.nspname::text AS name FROM pg_namespace n
    UNION ALL SELECT CASE relkind WHEN 'S' THEN 'sequence' ELSE 'table' END, c.oid, n.nspname || '.' || c.relname
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'S')
    UNION ALL SELECT 'function', p.oid, n.nspname || '.' || p.proname
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
"""
PRIVILEGES = {
    "schema": ("USAGE", "CREATE"),
    "table": ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"),
    "sequence": ("USAGE", "SELECT", "UPDATE"),
    "function": ("EXECUTE",),
}


@pytest.fixture
def generous(articles: Connection) -> Iterator[Connection]:
    """A database whose default privileges give every new object to the application, the approver and PUBLIC."""
    articles.execute(f"CREATE ROLE {APPLICATION} LOGIN; CREATE ROLE {APPROVER} LOGIN; {GENEROUS}")
    try:
        yield articles
    finally:
        articles.execute(f"DROP OWNED BY {APPLICATION}, {APPROVER}; DROP ROLE {APPLICATION}, {APPROVER}")


def standing(connection: Connection, known: set[int]) -> dict[str, dict[str, set[str]]]:
    """By object that was not known and by role, what it may do by ``has_*_privilege``; roles without any left out."""
    found: dict[str, dict[str, set[str]]] = {}
    for kind, oid, name in connection.execute(OBJECTS).fetchall():
        if oid in known or name.startswith(("pg_temp", "pg_toast")):
            continue
        for role in (APPLICATION, APPROVER, "public"):
            for privilege in PRIVILEGES[kind]:
                if _has(connection, f"has_{kind}_privilege", role, oid, privilege):
                    found.setdefault(name, {}).setdefault(role, set()).add(privilege)
            for (column,) in (
                connection.execute(
                    "SELECT attname FROM pg_attribute WHERE attrelid = %s AND attacl IS NOT NULL", [oid]
                ).fetchall()
                if kind == "table"
                else ()
            ):
                for privilege in ("SELECT", "INSERT", "UPDATE"):
                    has = _has(connection, "has_column_privilege", role, oid, column, privilege)
                    if has and privilege not in found.get(name, {}).get(role, ()):
                        found.setdefault(name, {}).setdefault(role, set()).add(f"{privilege} ({column})")
    return found


def _has(connection: Connection, function: str, role: str, oid: int, *what: str) -> bool:
    row = connection.execute(f"SELECT {function}(%s, %s::oid, {', '.join(['%s'] * len(what))})", [role, oid, *what])  # type: ignore[arg-type]
    return bool(row.fetchone()[0])  # type: ignore[index]


def known(connection: Connection) -> set[int]:
    return {row[1] for row in connection.execute(OBJECTS).fetchall()}


def documented() -> dict[str, dict[str, set[str]]]:
    """The table of docs/security.md, for the target of these tests."""
    text = (Path(__file__).parent.parent / "docs" / "security.md").read_text()
    found = {}
    for line in text.split("## Privileges")[1].split("\n## ")[0].splitlines():
        if row := re.match(r"\| ((?:schema )?`.*?`) \|(.*)\|$", line):
            cells = [{p.strip() for p in cell.split(",")} - {"–"} for cell in row[2].split("|")]
            granted = {r: c for r, c in zip((APPLICATION, APPROVER, "public"), cells, strict=True) if c}
            for name in re.findall(r"`([^`]+)`", row[1].replace("<target>", "articles")):
                name = name.removesuffix("()")
                found[f"public.{name}" if name.startswith("search_") else name] = granted
    return found


@pytest.mark.attack
def test_after_a_migration_under_generous_defaults_each_role_has_what_the_documents_say(
    generous: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    before = known(generous)
    generous.execute(
        """GRANT SELECT ON articles TO shop_app; ALTER TABLE articles ENABLE ROW LEVEL SECURITY;
        CREATE POLICY even ON articles USING (id % 2 = 0)"""
    )
    own = {"search": {"grant_to": [APPLICATION]}, "shadow": {"sample_percent": 100}}
    path = write_params(tmp_path, **SECTIONS | own)
    step_all("migrate", MIGRATE[:1], path)
    generous.execute(APPROVERS)
    step_all("migrate", MIGRATE[1:], path)
    assert standing(generous, before) == documented()
    as_the_application = generous.execute(
        "SELECT body ->> 'subject', body ->> 'verdict' FROM runbook.entry"
        " WHERE phase = '70_tune' AND body ->> 'name' = 'policies.recall_holds_for_callers'"
    ).fetchall()
    assert as_the_application == [(APPLICATION, "PASS")]


@pytest.mark.attack
def test_what_operations_make_is_closed_too(open_phase: Open, generous: Connection) -> None:
    """The copies of rows and the side table, each as soon as it is made."""
    generous.execute("ALTER TABLE articles ADD COLUMN kind text NOT NULL DEFAULT 'a'")
    sections = {
        "target": {"filters": ["kind"]},
        "partitioning": {"column": "kind", "method": "hash", "hash_partitions": 2, "accept_wider_key": True},
        "vector": {"layout": "side_table"},
    }
    phase = open_phase(**sections)
    extension.apply(phase)
    before = known(generous) - {
        row[0] for row in generous.execute("SELECT oid FROM pg_class WHERE relname = 'entry'")
    }
    expand_schema.apply(phase)
    for statement in [
        *partition_by_filter._begin(phase.connection, phase.params),
        *compare_storage._making(phase.connection, phase.ledger, phase.params),
    ]:
        phase.do(statement)
    for statement in rehearsal_schema.making(phase.connection, phase.params, preflight.facts(phase), 10):
        phase.do(statement)
    made = known(generous) - before
    assert len(made) > 12 and partitioned_twin.standing(phase.connection, phase.params).parts
    assert standing(generous, before) == {}


@pytest.mark.attack
def test_a_replaced_function_and_a_table_that_is_there_keep_their_grants(
    open_phase: Open, generous: Connection
) -> None:
    """Made again for a second target or by a later step, it must not take the application's rights away."""
    phase = open_phase("10_baseline", search={"grant_to": [APPLICATION]})
    search_function.apply(phase)
    generous.execute(
        "GRANT EXECUTE ON FUNCTION search_articles(text, real[], int, float8) TO shop_approver;"
        " GRANT SELECT ON runbook.route TO PUBLIC"
    )
    phase.do(search_function.create_statement(phase.connection, phase.params))
    phase.do(search_function.plan(phase).statements[0])
    had = standing(generous, set())
    assert had["public.search_articles"] == {APPLICATION: {"EXECUTE"}, APPROVER: {"EXECUTE"}}
    assert had["runbook.route"]["public"] == {"SELECT"}


def opened(open_phase: Open, connection: Connection, grant: str) -> Gate:
    """The gate after somebody has granted this, and again once what it says to do was done: then it passes."""
    phase = open_phase("10_baseline", search={"grant_to": [APPLICATION]})
    search_function.apply(phase)
    before = privileges.check(phase.connection, phase.params)
    assert before.verdict is Verdict.PASS, before
    connection.execute(grant)  # type: ignore[call-overload]
    found = privileges.check(phase.connection, phase.params)
    connection.execute(found.do)  # type: ignore[call-overload]
    assert privileges.check(phase.connection, phase.params).verdict is Verdict.PASS
    return found


@pytest.mark.attack
@pytest.mark.parametrize(
    ("grant", "found"),
    [
        ("GRANT UPDATE ON runbook.route TO shop_app", "shop_app has UPDATE on table runbook.route"),
        ("GRANT UPDATE (route) ON runbook.route TO PUBLIC", "PUBLIC has UPDATE (route) on table runbook.route"),
        ("GRANT SELECT ON runbook.entry TO shop_app", "shop_app has SELECT on table runbook.entry"),
        ("GRANT CREATE ON SCHEMA runbook TO PUBLIC", "PUBLIC has CREATE on schema runbook"),
        ("GRANT EXECUTE ON FUNCTION runbook.sign_off TO shop_app",
         "shop_app has EXECUTE on function runbook.sign_off(bigint, jsonb, text)"),
        ("GRANT USAGE ON SEQUENCE runbook.strategy_id_seq TO shop_approver",
         "shop_approver has USAGE on sequence runbook.strategy_id_seq"),
        ("GRANT pg_write_all_data TO shop_app", "shop_app is a member of pg_write_all_data"),
    ],
)  # fmt: skip
def test_what_somebody_granted_since_is_named_with_its_revoke(
    open_phase: Open, generous: Connection, grant: str, found: str
) -> None:
    assert opened(open_phase, generous, grant).found == found


def test_in_a_schema_of_the_application_its_own_tables_are_its_own(open_phase: Open, generous: Connection) -> None:
    generous.execute("CREATE SCHEMA shop; CREATE TABLE shop.orders (id int); REVOKE ALL ON SCHEMA shop FROM PUBLIC")
    generous.execute(
        "REVOKE CREATE ON SCHEMA shop FROM shop_app, shop_approver; GRANT ALL ON shop.orders TO shop_app"
    )
    phase = open_phase("10_baseline", ledger={"schema": "shop"}, search={"grant_to": [APPLICATION]})
    search_function.apply(phase)
    assert privileges.check(phase.connection, phase.params).verdict is Verdict.PASS
    generous.execute("GRANT UPDATE ON shop.route TO shop_app")
    found = privileges.check(phase.connection, phase.params)
    assert found.do == "REVOKE UPDATE ON TABLE shop.route FROM shop_app;"


def test_the_message_says_what_default_privileges_would_give(open_phase: Open, generous: Connection) -> None:
    phase = open_phase("10_baseline", search={"grant_to": [APPLICATION]})
    passed = privileges.check(phase.connection, phase.params)
    assert passed.verdict is Verdict.PASS
    everything = "functions, schemas, sequences, tables"
    assert passed.found == (
        f"no other role may write or read them; ALTER DEFAULT PRIVILEGES gives rights to PUBLIC on {everything};"
        f" shop_app on {everything}; shop_approver on {everything}, which each object loses as it is made"
    )
