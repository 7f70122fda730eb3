"""Recall on a table with row level security, as the callers see it on whom its policies hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from runbook_lib.core.gates import Verdict
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import build_index, inputs, policies, row_security_recall
from runbook_lib.params import Params
from runbook_lib.search import search_function
from tests.opened import write

Connection = psycopg.Connection[Any]

ROLE = "one_tenant"
# A table of 200 rows is read faster than its index: these have the planner take the index all the same.
BY_INDEX = {"enable_seqscan": "off", "enable_sort": "off"}


@pytest.fixture
def tenants(articles: Connection) -> Iterator[Connection]:
    """Forty tenants of five rows; a role sees those of the tenant that it says it is."""
    articles.execute(
        f"""UPDATE articles SET views = id % 40;
        CREATE ROLE {ROLE} LOGIN; CREATE ROLE {ROLE}_other; GRANT SELECT ON articles TO {ROLE};
        CREATE POLICY of_tenant ON articles USING (views = current_setting('app.tenant')::int);
        ALTER TABLE articles ENABLE ROW LEVEL SECURITY"""
    )
    try:
        yield articles
    finally:
        articles.execute(f"DROP OWNED BY {ROLE}, {ROLE}_other CASCADE; DROP ROLE {ROLE}, {ROLE}_other")


@pytest.fixture
def indexed(filled: Callable[..., Phase], tenants: Connection) -> Callable[..., Phase]:
    """The table with its index and a function that ends after one pass over it, which a role may call."""

    def make(*callers: dict[str, Any], grant_to: tuple[str, ...] = (ROLE,)) -> Phase:
        phase = filled(search={"grant_to": list(grant_to), "seen_as": list(callers)})
        build_index.apply(phase)
        search_function.apply(phase)
        for name, value in (("hnsw.ef_search", "10"), ("hnsw.iterative_scan", "off")):
            write(phase, f"ALTER FUNCTION search_articles(text, real[], integer, float8) SET {name} = {value}")
        return phase

    return make


@pytest.mark.attack
def test_answers_that_a_caller_misses_under_the_policies_fail(indexed: Callable[..., Phase]) -> None:
    """To the runbook's own role the same function misses little; to one that sees a fortieth, most."""
    phase = indexed({"role": ROLE, "settings": {"app.tenant": "7"} | BY_INDEX})
    (gate,) = row_security_recall.gates(phase.connection, phase.params, 0.9)
    assert gate.verdict is Verdict.FAIL and gate.figures["recall"] < 0.5 and gate.figures["short"] > 0
    assert gate.subject == "one_tenant (app.tenant = 7, enable_seqscan = off, enable_sort = off)"
    signature = "search_articles(text, real[], integer, float8)"
    write(phase, f"ALTER FUNCTION {signature} SET hnsw.iterative_scan = strict_order")
    (gate,) = row_security_recall.gates(phase.connection, phase.params, 0.9)
    assert gate.verdict is Verdict.PASS and gate.figures["recall"] == 1.0


def test_what_cannot_be_measured_as_a_caller_is_unknown_with_its_reason(
    indexed: Callable[..., Phase], tenants: Connection
) -> None:
    phase = indexed()
    (gate,) = row_security_recall.gates(phase.connection, phase.params, 0.9)
    assert str(gate) == (
        "UNKNOWN policies.recall_holds_for_callers   one_tenant\n"
        '  found   not measured: PostgreSQL says: unrecognized configuration parameter "app.tenant"\n'
        "  needed  0.900, measured as a role on which the table's policies hold\n"
        "  danger  whoever sees few rows would miss answers that an exact search of those rows finds\n"
        "  do      name in search.seen_as the settings that the policies read, as the application sets them"
    )
    tenants.execute("ALTER POLICY of_tenant ON articles USING (views = current_setting('app.tenant', true)::int)")
    (gate,) = row_security_recall.gates(phase.connection, phase.params, 0.9)
    assert (gate.verdict, gate.found) == (Verdict.UNKNOWN, "not measured: this role sees no row with a vector")
    tenants.execute(f"REVOKE SELECT ON articles FROM {ROLE}")
    (gate,) = row_security_recall.gates(phase.connection, phase.params, 0.9)
    assert gate.found == "not measured: PostgreSQL says: permission denied for table articles"
    assert gate.do.endswith('where the runbook may not act as that role: GRANT "one_tenant" TO "postgres";')


def test_without_a_role_it_is_unknown_and_without_policies_there_is_no_gate(
    indexed: Callable[..., Phase], tenants: Connection
) -> None:
    phase = indexed(grant_to=())
    (gate,) = row_security_recall.gates(phase.connection, phase.params, 0.9)
    assert (gate.verdict, gate.do) == (Verdict.UNKNOWN, "name the application's role in search.grant_to")
    tenants.execute("ALTER TABLE articles DISABLE ROW LEVEL SECURITY")
    assert list(row_security_recall.gates(phase.connection, phase.params, 0.9)) == []


def test_a_caller_that_cannot_be_asked_is_named_before_the_start(
    tenants: Connection, make_params: Callable[..., Params]
) -> None:
    def refused(**search: Any) -> list[tuple[str, str, str]]:
        found = inputs.input_problems(make_params(search=search)).failed
        return [(g.subject, g.found, g.do) for g in found if g.name == "inputs.callers_under_policies_can_be_asked"]

    nobody = "row level security is on, and no role is named"
    assert refused() == [('"public"."articles"', nobody, "name the application's role in search.grant_to")]
    ((_, found, do),) = refused(grant_to=[ROLE])
    assert found == 'PostgreSQL says: unrecognized configuration parameter "app.tenant"'
    assert do.startswith("name in search.seen_as the settings")
    seven, nothing = ([{"role": ROLE, "settings": {"app.tenant": n}}] for n in ("7", "7000"))
    assert refused(seen_as=seven) == []
    assert [found for _, found, _ in refused(seen_as=nothing)] == ["this role sees no row"]
    tenants.execute(f"REVOKE SELECT ON articles FROM {ROLE}")
    assert [found for _, found, _ in refused(seen_as=seven)] == [
        "PostgreSQL says: permission denied for table articles"
    ]
    tenants.execute("ALTER TABLE articles DISABLE ROW LEVEL SECURITY")
    assert refused() == []


def test_a_role_that_is_not_there_is_unknown_and_named_before_the_start(indexed: Callable[..., Phase]) -> None:
    phase = indexed({"role": "gone", "settings": {"app.tenant": "7"}}, grant_to=())
    (gate,) = row_security_recall.gates(phase.connection, phase.params, 0.9)
    assert str(gate) == (
        "UNKNOWN policies.recall_holds_for_callers   gone (app.tenant = 7)\n"
        "  found   not measured: there is no such role\n"
        "  needed  0.900, measured as a role on which the table's policies hold\n"
        "  danger  whoever sees few rows would miss answers that an exact search of those rows finds\n"
        "  do      correct its name in search.grant_to or search.seen_as, or CREATE ROLE first"
    )
    (gate,) = (g for g in inputs.check(phase.connection, phase.params).failed if "roles_exist" in g.name)
    assert str(gate) == (
        "FAIL    inputs.granted_roles_exist   search.grant_to and search.seen_as\n"
        "  found   no such role: gone\n"
        "  needed  roles of this server\n"
        "  danger  the application could not call the function, nor could recall be measured as it sees the table\n"
        "  do      correct their names, or CREATE ROLE first"
    )


def keep_former_table(tenants: Connection) -> None:
    """As the swap to the partitioned table leaves it: as closed as the one that serves."""
    tenants.execute(
        f"""CREATE TABLE runbook.articles_move (); CREATE TABLE articles_whole (LIKE articles);
        GRANT SELECT ON articles_whole TO {ROLE}; ALTER TABLE articles_whole ENABLE ROW LEVEL SECURITY;
        CREATE POLICY of_tenant ON articles_whole USING (views = current_setting('app.tenant')::int)"""
    )


@pytest.mark.attack
def test_the_table_kept_after_a_swap_must_be_as_closed_as_the_one_that_serves(
    open_phase: Callable[..., Phase], tenants: Connection
) -> None:
    phase = open_phase()
    keep_former_table(tenants)
    assert list(policies.check(phase.connection, phase.params)) == [], "as the swap leaves them"
    tenants.execute(
        f"""REVOKE SELECT ON articles FROM {ROLE}; GRANT SELECT (id) ON articles TO {ROLE};
        ALTER POLICY of_tenant ON articles USING (views = 0)"""
    )
    (gate,) = policies.check(phase.connection, phase.params)
    assert gate.name == "partitioning.kept_table_is_as_open"
    assert gate.found == (
        "articles alone: SELECT (id) to one_tenant; articles alone: policy of_tenant TO PUBLIC USING (views = 0);"
        " articles_whole alone: SELECT to one_tenant; articles_whole alone: policy of_tenant TO PUBLIC USING"
        " (views = (current_setting('app.tenant'::text))::integer)"
    )


@pytest.mark.attack
def test_what_two_grantors_gave_on_one_table_alone_is_found_and_so_is_the_right_to_grant_a_column(
    open_phase: Callable[..., Phase], tenants: Connection
) -> None:
    phase = open_phase()
    keep_former_table(tenants)
    tenants.execute(
        f"""GRANT INSERT ON articles TO {ROLE}_other WITH GRANT OPTION; GRANT INSERT ON articles TO {ROLE};
        SET ROLE {ROLE}_other; GRANT INSERT ON articles TO {ROLE}; RESET ROLE;
        GRANT UPDATE (id) ON articles, articles_whole TO {ROLE};
        GRANT UPDATE (id) ON articles TO {ROLE} WITH GRANT OPTION"""
    )
    (gate,) = policies.check(phase.connection, phase.params)
    assert gate.found == (
        "articles alone: INSERT to one_tenant; articles alone: INSERT to one_tenant_other WITH GRANT OPTION;"
        " articles alone: UPDATE (id) to one_tenant WITH GRANT OPTION;"
        " articles_whole alone: UPDATE (id) to one_tenant"
    )


@pytest.mark.attack
def test_policies_that_came_after_the_vectors_beside_are_named(
    open_phase: Callable[..., Phase], tenants: Connection
) -> None:
    phase = open_phase(vector={"layout": "side_table"})
    (gate,) = policies.check(phase.connection, phase.params)
    assert gate.name == "inputs.policies_hold_for_vectors" and gate.verdict is Verdict.FAIL
