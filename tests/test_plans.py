"""A plan: what it looks at and says of it, what it leaves open, and its page for whoever approves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core import db, plans
from runbook_lib.core.cell_order import OutOfOrder
from runbook_lib.core.gates import Gate, GateFailed, Gates, Verdict, gate
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings, tune
from runbook_lib.operate import refresh
from runbook_lib.runner import review
from runbook_lib.runner.manifest import PhaseRun
from runbook_lib.runner.review import RecordPage
from tests import records

Opens = Callable[..., Phase]
HOLDS = gate("toy.holds", True, "toy", found="it does", needed="that it does")
DOES_NOT = gate("toy.does_not", False, "toy", found="it does not", needed="that it does", danger="no", do="do it")


def verdicts(gates: Gates) -> dict[str, str]:
    return {g.name: str(g.verdict) for g in gates}


def close(open_phase: Opens, *names: str) -> None:
    """Says of these steps that they have passed."""
    for name in names:
        phase = open_phase(name)
        phase.ledger.append("phase", {"verdict": "PASS"})


def test_would_pass_opens_nothing_and_stops_nothing(open_phase: Opens) -> None:
    seen = Gates((HOLDS, DOES_NOT)).in_a_plan()
    assert verdicts(seen) == {"toy.holds": "WOULD PASS", "toy.does_not": "FAIL"}
    would = Gates((HOLDS,)).in_a_plan()
    assert not would.passed and not would.failed
    phase = open_phase("20_extension", execute=False)
    phase.order.required = False
    assert phase.require(lambda _: Gates((HOLDS,))).gates[-1].verdict is Verdict.WOULD_PASS
    with pytest.raises(OutOfOrder):
        phase.ask()


def test_a_gate_that_holds_in_a_plan_speaks_of_no_danger() -> None:
    told = Gate("toy.holds", Verdict.WOULD_PASS, "toy", "it does", "that it does", "ruin", "run")
    assert str(told) == "WOULD PASS toy.holds   toy\n  found   it does\n  needed  that it does"
    assert "ruin" not in Gates((told,))._repr_html_()


def test_what_was_looked_at_and_does_not_hold_stops_a_plan(open_phase: Opens) -> None:
    phase = open_phase("20_extension", execute=False)
    with pytest.raises(GateFailed):
        phase.require(lambda _: Gates((DOES_NOT,)))
    with pytest.raises(GateFailed):
        phase.prove(lambda _: Gates((DOES_NOT,)), ahead=True)


def test_an_earlier_phase_may_be_in_the_same_plan_and_that_of_an_operation_is_not(open_phase: Opens) -> None:
    order = open_phase("60_build_index", execute=False).require()
    assert verdicts(order) == {"phase.predecessor_passed": "NOT RUN"}
    assert order.gates[0].found == "NOT RUN in this database; known only after the steps before it"
    with pytest.raises(GateFailed) as failed:
        open_phase("operate/refresh", execute=False).require()
    assert [g.name for g in failed.value.gates.failed] == ["phase.predecessor_passed"]
    close(open_phase, "50_backfill")
    for name in ("60_build_index", "operate/refresh"):
        assert verdicts(open_phase(name, execute=False).require())["phase.predecessor_passed"] == "WOULD PASS"


def test_a_rollback_in_a_plan_waits_for_those_before_it(open_phase: Opens) -> None:
    close(open_phase, "60_build_index")
    first, second = (open_phase(name, execute=False) for name in ("undo/index", "undo/schema"))
    assert verdicts(first.require()) == {"phase.nothing_stands_on_it": "WOULD PASS"}
    assert verdicts(second.require()) == {"phase.nothing_stands_on_it": "NOT RUN"}
    # Nothing is left to drop, but the index may yet be found to be there by the rollback before.
    assert verdicts(second.prove(expand_schema.verify_undone)) == {"expand_schema.verify_undone": "NOT RUN"}


@pytest.mark.parametrize("name", ["20_extension", "10_baseline", "operate/rebuild_index"])
def test_what_a_step_has_yet_to_make_is_not_looked_at(name: str, open_phase: Opens) -> None:
    def look(_: Phase) -> Gates:
        """It is made.

        More than a plan says."""
        raise AssertionError("looked at")

    phase = open_phase(name, execute=False)
    seen = phase.prove(look).gates[0]
    n = len(phase.planned())
    left = f", which has {n} statement{'s' if n != 1 else ''} to run" if n else ""
    assert (str(seen.verdict), seen.found) == ("NOT RUN", f"known only after {name}{left}")
    assert (seen.name, seen.subject, seen.needed) == ("test_plans.look", name, "It is made.")


def test_what_is_there_is_looked_at(filled: Opens, open_phase: Opens, articles: psycopg.Connection[Any]) -> None:
    build_index.apply(filled())
    close(open_phase, *MIGRATE[:8])
    looks = {
        "20_extension": extension.verify,
        "40_load_embeddings": load_embeddings.verify,
        "50_backfill": backfill.verify,
        "60_build_index": build_index.verify,
        "operate/refresh": refresh.verify,
    }
    for name, look in looks.items():
        seen = open_phase(name, execute=False).prove(look)
        assert {str(g.verdict) for g in seen} == {"WOULD PASS"} and len(seen) > 1, name
    # What it measures it would measure again.
    assert verdicts(open_phase("70_tune", execute=False).prove(tune.verify)) == {"tune.verify": "NOT RUN"}

    articles.execute("UPDATE articles SET embedding = NULL, embedding_hash = NULL WHERE id = 3")
    seen = open_phase("50_backfill", execute=False).prove(backfill.verify)
    missing = next(g for g in seen if g.name == "backfill.nothing_is_missing")
    assert str(missing.verdict) == "NOT RUN"
    assert missing.found.startswith("1 of ") and missing.found.endswith("; known only after 50_backfill")
    assert verdicts(seen)["backfill.nothing_is_stale"] == "WOULD PASS"

    articles.execute("UPDATE articles SET title = 'changed since' WHERE id = 4")
    assert verdicts(open_phase("operate/refresh", execute=False).prove(refresh.verify)) == {
        "refresh.verify": "NOT RUN"
    }, "the next drain has a row to embed"


@pytest.mark.parametrize("further", [False, True])
def test_a_look_that_takes_too_long_claims_nothing(
    further: bool, open_phase: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "LONGEST_LOOK", "50 ms")

    def look(phase: Phase) -> Gates:
        with db.beside(phase.connection, phase.params, "looks") as another:
            (another if further else phase.connection).execute("SELECT pg_sleep(60)")
        return Gates((HOLDS,))

    close(open_phase, "60_build_index")
    phase = open_phase("60_build_index", execute=False)
    phase.connection.execute("SET statement_timeout = '7min'")
    (seen,) = phase.prove(look)
    assert (seen.name, str(seen.verdict)) == ("test_plans.look", "NOT RUN")
    assert seen.found.startswith("a check took longer than 50 ms; known only after 60_build_index")
    assert phase.connection.execute("SHOW statement_timeout").fetchone() == {"statement_timeout": "7min"}


def test_the_page_of_a_plan_names_the_role_that_looked(open_phase: Opens) -> None:
    phase = open_phase("20_extension", execute=False)
    folder = phase.params.record.runs_dir / phase.run_id
    folder.mkdir(parents=True)
    phase.require(lambda _: Gates((HOLDS,)))
    me = (phase.connection.execute("SELECT session_user AS name").fetchone() or {})["name"]
    run = records.make_manifest(
        execute=False,
        run_id=phase.run_id,
        status="planned",
        user="ann",
        server="articles at db:5432",
        phases=tuple(PhaseRun(n, "planned") for n in MIGRATE),
    )
    page = review.collect(run, plans.read(folder))
    said = answers(page)["Who made this plan, where?"]
    assert said.startswith(f"OS user ann on host db-tools as role {me}, on ")
    assert page.questions[-1].answers[0] == (
        f"Steps run as the role that $ARTICLES_DSN names: for this plan {me} on articles at db:5432."
    )


TRIED = {"seconds": 0.012, "lock": "ACCESS EXCLUSIVE", "held_s": 0.3}
FORECAST = {
    "index_bytes": 3 << 30, "build_memory_bytes": 4 << 30, "table_growth_bytes": 2 << 30, "staging_bytes": 1 << 30,
    "wal_bytes": 8 << 30, "load_seconds": 60.0, "build_seconds": 3600.0, "backfill_seconds": 600.0,
}  # fmt: skip


def seen(step: str, name: str, verdict: str, **more: Any) -> dict[str, Any]:
    return records.entry(step, "gate", records.gate(name, verdict, **more))


def planned_page(
    names: tuple[str, ...] = MIGRATE, way: str = "migrate", more: tuple[dict[str, Any], ...] = (), **changes: Any
) -> RecordPage:
    run = records.make_manifest(
        execute=False, way=way, phases=tuple(PhaseRun(n, "planned") for n in names), **{"status": "planned"} | changes
    )
    plan = {"table_rows": 10_000_000, "rows_with_text": 9_000_000, "table_bytes": 5 << 30, "forecast": FORECAST}
    build_lock = "SHARE UPDATE EXCLUSIVE on public.articles, for the whole build"
    add = records.statement("Add columns.", "ACCESS EXCLUSIVE on public.articles, for milliseconds", 0.0)
    built = records.statement("Build.", build_lock, 0.0, blocks="vacuum and other DDL")
    memory = {"allowed_bytes": 5 << 30}
    entries = [
        records.entry("00_preflight", "plan", plan),
        seen("00_preflight", "trial.columns_can_be_added", "WOULD PASS", figures=TRIED),
        seen("00_preflight", "preflight.memory_fits_index", "WOULD PASS", figures=memory),
        seen("30_expand_schema", "phase.predecessor_passed", "NOT RUN", found="x", subject="20_extension"),
        seen("70_tune", "tune.verify", "NOT RUN", found="known only after 70_tune", needed="Recall."),
        records.entry("30_expand_schema", "planned", add),
        records.entry("60_build_index", "planned", built),
        *more,
    ]
    order = "phase.predecessor_passed"
    return review.collect(run, [e for e in entries if e["body"].get("name") != order or e["phase"] in names])


def answers(page: RecordPage) -> dict[str, str]:
    return {q.asked: " ".join(q.answers) for q in page.questions}


def test_an_approver_sees_lock_size_time_and_what_to_type_first() -> None:
    page = planned_page()
    assert [(t.label, t.value) for t in page.tiles] == [
        ("strongest lock, ACCESS EXCLUSIVE", "12 ms"),
        ("rows to migrate", "9,000,000"),
        ("disk", "6.0 GB"),
        ("WAL", "8.0 GB"),
        ("memory of the build", "4.0 GB"),
        ("time", "71 min 0 s"),
    ]
    said = answers(page)
    assert said["Which is the strongest lock, for how long?"] == (
        "Statement 1 takes ACCESS EXCLUSIVE on public.articles, for milliseconds. It blocks every read and write."
        " Tried on this table and rolled back, it took 12 ms (the trial held it for 300 ms, with all that it tried)."
        " Held longest, for the whole build, about 60 min 0 s: SHARE UPDATE EXCLUSIVE, which blocks vacuum and other"
        " DDL."
    )
    assert said["What was checked, and what cannot be known yet?"] == (
        "2 gates would pass, by what the database says today, 1 of them tried and rolled back."
        " Not known yet: what 70_tune has to prove when carried out, such as recall."
    )
    assert page.questions[-1].code == "runbook run /srv/runbook/params/articles.yaml --execute"
    assert page.later is not None and page.later.rows == [("70_tune", "Recall.")]
    assert [s["undone_by"] for s in page.planned] == ["undo/schema", "undo/index"]
    assert {p["name"]: p["gates"] for p in page.phases if p["gates"]} == {
        "00_preflight": "2 of 2", "30_expand_schema": "0 of 1", "70_tune": "0 of 1",
    }  # fmt: skip
    assert not page.rollback and "Nothing was carried out." in page.questions[-1].answers[-1]


def test_a_rehearsal_of_this_table_goes_before_times_of_another_machine() -> None:
    whole = {"build_seconds": {"low": 5000.0, "high": 7000.0}}
    page = planned_page(more=(records.entry("operate/rehearse", "rehearsal", {"whole": whole}, "an-earlier-run"),))
    said = answers(page)["How long does it take?"]
    assert "building the index 83 min 20 s to 116 min 40 s" in said
    assert "By the rehearsal of run an-earlier-run." in said and "another machine" not in said


def test_a_plan_names_what_waits_for_a_sign_off_and_what_was_agreed_to() -> None:
    parameters = {"approval": {"phases": ["90_cut_over"]}, "accept": {"triggers": ["audit"]}}
    asked = "What was accepted, and what needs a sign-off?"
    said = answers(planned_page(parameters=parameters))[asked]
    assert said == (
        "Accepted by accept.triggers: audit. 90_cut_over waits for it: `runbook approve"
        " /srv/runbook/params/articles.yaml 90_cut_over`, by another database user."
    )
    given = seen("90_cut_over", "approval.is_given", "WOULD PASS", found="by ann")
    said = answers(planned_page(parameters=parameters, more=(given,)))[asked]
    assert said.endswith("Sign-off of 90_cut_over: by ann.")


@pytest.mark.parametrize(
    ("names", "way", "command"),
    [
        (MIGRATE[2:5], "migrate", "run {} --from 20_extension --to 40_load_embeddings --execute"),
        (("operate/rebuild_index",), "operate", "operate {} rebuild_index --execute"),
        (("undo/rebuild_index",), "undo", "operate {} rebuild_index --undo --execute"),
        (UNDO[:2], "undo", "undo {} --to index --execute"),
        (UNDO, "undo", "undo {} --execute"),
    ],
)
def test_the_command_carries_out_what_was_planned_and_no_more(names: tuple[str, ...], way: str, command: str) -> None:
    page = planned_page(names, way)
    assert page.questions[-1].code == "runbook " + command.format("/srv/runbook/params/articles.yaml")


def test_a_plan_that_stopped_is_not_to_be_typed() -> None:
    phases = (PhaseRun("00_preflight", "failed", error="FAIL  x"), *(PhaseRun(n) for n in MIGRATE[1:]))
    run = records.make_manifest(execute=False, status="failed", phases=phases)
    page = review.collect(run, [])
    assert page.questions[-1].code == "" and "Nothing yet" in page.questions[-1].answers[0]


def test_a_part_of_the_migration_whose_turn_has_not_come_is_not_to_be_typed() -> None:
    page = planned_page(MIGRATE[3:])
    assert page.questions[-1].answers == ["Nothing yet: 20_extension has to pass first, and is not in this plan."]
    assert page.questions[-1].code == ""


def test_only_trials_that_hold_count_as_tried() -> None:
    failed = seen("00_preflight", "trial.index_can_be_built", "FAIL")
    said = answers(planned_page(more=(failed,)))["What was checked, and what cannot be known yet?"]
    assert said.startswith("2 gates would pass, by what the database says today, 1 of them tried and rolled back.")
    assert "Not passed: trial.index_can_be_built." in said


def test_the_plan_says_what_a_write_costs_afterwards_where_it_was_rehearsed() -> None:
    assert answers(planned_page())["What does it cost afterwards?"] == (
        "Writes: how much slower they become was not measured; operate/rehearse measures it."
    )
    sample = {"vectors": 100_000, "write_ms": 2.51, "bare_write_ms": 1.05}
    rehearsal = {"whole": {}, "samples": [sample | {"write_ms": None}, sample]}
    page = planned_page(more=(records.entry("operate/rehearse", "rehearsal", rehearsal, "an-earlier-run"),))
    assert answers(page)["What does it cost afterwards?"] == (
        "Writes: an update of a text took 2.51 ms in the server, 1.05 ms without vector index and capture, on a"
        " sample of 100,000 rows. Measured in run an-earlier-run."
    )


def test_a_failed_gate_that_is_shown_above_is_not_repeated(open_phase: Opens) -> None:
    phase = open_phase("20_extension", execute=False)
    with pytest.raises(GateFailed) as failed:
        phase.require(lambda _: Gates((DOES_NOT,)))
    assert failed.value._render_traceback_() == [
        "GateFailed: the notebook stops here.",
        "FAIL    toy.does_not   toy",
        "  do      do it",
    ]
    assert str(failed.value).startswith("\nFAIL    toy.does_not   toy\n  found   it does not")
    assert len(GateFailed(Gates((DOES_NOT,)))._render_traceback_()) == 6
