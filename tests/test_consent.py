"""Consents by name: each name is something that exists, and the record shows what was agreed to."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core.gates import BadInput, Gates, collect
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import consent, preflight
from runbook_lib.params import Params

Connection = psycopg.Connection[Any]


def _look(phase: Phase) -> Gates:
    return collect(consent.check(phase.connection, phase.params))


@pytest.fixture
def with_triggers(articles: Connection) -> Connection:
    articles.execute(
        """CREATE FUNCTION "Keep"() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
           CREATE TRIGGER "Touch it" BEFORE UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION "Keep"();
           CREATE RULE noted AS ON UPDATE TO articles DO ALSO NOTHING; CREATE PUBLICATION told FOR TABLE articles"""
    )
    return articles


def test_nothing_is_agreed_to_by_default(with_triggers: Connection, open_phase: Callable[..., Phase]) -> None:
    assert not _look(open_phase())


def test_consents_are_shown_by_name_and_stand_in_the_plan(
    with_triggers: Connection, open_phase: Callable[..., Phase]
) -> None:
    accept = {"triggers": ["Touch it"], "rules": ["noted"], "publications": ["told"]}
    phase = open_phase(accept=accept)
    gates = _look(phase)
    assert gates.passed
    assert [(g.subject, g.found) for g in gates] == [
        ("accept.triggers", "Touch it: agreed to"),
        ("accept.rules", "noted: agreed to"),
        ("accept.publications", "told: agreed to"),
    ]
    assert preflight.plan_body(phase)["params"]["accept"] == accept | {"open_schemas": []}


def test_a_consent_that_names_nothing_is_refused(with_triggers: Connection, open_phase: Callable[..., Phase]) -> None:
    gates = _look(open_phase(accept={"triggers": ["Touch it", "Touchit", "zzz"], "rules": [], "publications": ["t"]}))
    assert [str(g) for g in gates] == [
        """FAIL    inputs.accepted_names_exist   accept.triggers
  found   not a trigger of "public"."articles": Touchit, zzz
  needed  each name a trigger of "public"."articles"
  danger  a consent that names nothing covers nothing, and what it was meant for is not agreed to
  do      did you mean Touch it?; take zzz out of accept.triggers""",
        """FAIL    inputs.accepted_names_exist   accept.publications
  found   not a publication of this database: t
  needed  each name a publication of this database
  danger  a consent that names nothing covers nothing, and what it was meant for is not agreed to
  do      take t out of accept.publications""",
    ]


def test_a_trigger_of_a_partition_or_of_a_child_can_be_named(
    with_triggers: Connection, open_phase: Callable[..., Phase]
) -> None:
    with_triggers.execute(
        """CREATE TABLE old_articles () INHERITS (articles);
           CREATE TRIGGER of_child BEFORE UPDATE ON old_articles FOR EACH ROW EXECUTE FUNCTION "Keep"()"""
    )
    assert _look(open_phase(accept={"triggers": ["of_child"]})).passed


def test_a_name_is_given_once(make_params: Callable[..., Params]) -> None:
    with pytest.raises(BadInput, match="rules: a name is given twice"):
        make_params(accept={"rules": ["a", "a"]})
