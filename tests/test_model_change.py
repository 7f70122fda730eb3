"""Another model on the same table: both searchable, compared, swapped under load, and taken back to the letter."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import comparison
from runbook_lib.benchmark.prepared import vector_indexes
from runbook_lib.cli.main import main
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, GateFailed, RunbookError
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.core.target import load_params
from runbook_lib.operate import model_change, model_comparison, monitor, retire_model
from runbook_lib.runner import manifest
from runbook_lib.search import function_ownership, search_function
from tests import migrators, toy
from tests.conftest import DSN_ENV, write_params
from tests.opened import gates_passed
from tests.servers import dump
from tests.small_runs import ROOT
from tests.stepping import assert_planned, step, step_all, told_in_a_plan

SECTIONS: dict[str, Any] = {
    # The toy model is worse than LIKE on these queries, and 80_shadow would say so.
    "cut_over": {"calls_per_step": 20, "share_steps_percent": [100], "largest_relevance_loss": 1.0},
    "tune": {"ef_search": [20, 60], "target_recall": 0.9},
    # Calls while the function is swapped must not wait for a busy machine.
    "locks": {"timeout_ms": 1000, "tries": 10, "longest_wait_between_tries_s": 0.1},
}
FINER: dict[str, Any] = {
    "target": {"name": "articles_v2"},
    "vector": {"column": "embedding_v2", "dimension": toy.FINER},
    "embeddings": {"callable": "tests.toy:embed_finer"},
    "model_change": {"replaces_params": "../toy.yaml"},
}
OPERATION = "operate/change_model"
ROLE = "migrator_of_models"
CALL = "SELECT id, score, answered_by FROM search_articles(%s, %s::real[], 3)"


@pytest.fixture(scope="module", autouse=True)
def noise_is_no_slowness() -> Iterator[None]:
    """A busy machine makes any search of five milliseconds slow now and then; that gate has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "FAST_ENOUGH_MS", 1000.0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the params file of the first target, and that of the second in a folder of its own."""
    path = tmp_path_factory.mktemp("models")
    write_params(path, **SECTIONS)
    (path / "v2").mkdir()
    write_params(path / "v2", **SECTIONS | FINER)
    return path


@pytest.fixture(scope="module")
def both(server: str, folder: Path) -> Iterator[str]:
    """Name of a database in which the first target is cut over, and the second proved up to 80_shadow."""
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as patch:
        admin.execute("CREATE DATABASE t_models")
        with psycopg.connect(make_conninfo(server, dbname="t_models"), autocommit=True) as connection:
            connection.execute("CREATE ROLE app_of_models")
            toy.create_articles(connection)
            connection.execute("ALTER TABLE articles SET (autovacuum_enabled = off)")
            patch.setenv(DSN_ENV, migrators.create(connection, ROLE))
        step_all("migrate", MIGRATE, folder / "toy.yaml")
        step_all("migrate", MIGRATE[:9], folder / "v2" / "toy.yaml")
        yield "t_models"
        admin.execute("DROP DATABASE t_models WITH (FORCE)")
        admin.execute(f"DROP ROLE app_of_models; DROP ROLE {ROLE}")


@pytest.fixture
def copied(both: str, server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A superuser's DSN of a copy of that database, of its own for the test; the parameters find it as the role."""
    name = f"m_{abs(hash(request.node.nodeid)):x}"
    with psycopg.connect(server, autocommit=True) as admin:
        migrators.copied(admin, both, name, ROLE)
        dsn = make_conninfo(server, dbname=name)
        monkeypatch.setenv(DSN_ENV, make_conninfo(dsn, user=ROLE))
        yield dsn
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def articles(copied: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(copied, autocommit=True) as connection:
        yield connection


@pytest.fixture
def new(folder: Path) -> Path:
    """The params file of the second target."""
    return folder / "v2" / "toy.yaml"


@pytest.fixture
def opened(copied: str, new: Path) -> Iterator[Callable[..., Phase]]:
    """Opens the operation on the second target, or another phase on any params file."""
    phases: list[Phase] = []

    def make(name: str = "operate/change_model", path: Path = new, execute: bool = True) -> Phase:
        p = load_params(path)
        phase = gates_passed(
            Phase(name, "r", execute, p, db.connect(p, "t"), Ledger(db.connect(p, "t"), p, "r", name))
        )
        phases.append(phase)
        return phase

    yield make
    for phase in phases:
        close(phase)


def close(phase: Phase) -> None:
    """Ends its sessions, which hold the claim on both targets, as the end of a notebook does."""
    phase.end("was ended by the test", "nothing")


def old_vector(text: str) -> list[float]:
    return [float(x) for x in toy.embed([text])[0]]


def new_vector(text: str) -> list[float]:
    return [float(x) for x in toy.embed_finer([text])[0]]


def definition(connection: psycopg.Connection[Any]) -> str:
    row = connection.execute(
        "SELECT pg_get_functiondef('search_articles(text, real[], int, float8)'::regprocedure)"
    ).fetchone()
    assert row
    return str(row[0])


def test_both_are_searchable_and_two_targets_on_one_table_do_not_meet(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase], folder: Path
) -> None:
    text = "cookie leaks on logout"
    by_old = articles.execute(
        "SELECT id FROM search_articles(%s, %s::real[], 1)", [text, old_vector(text)]
    ).fetchall()
    articles.execute("UPDATE runbook.route SET route = 'vector', share_percent = 100 WHERE target = 'articles_v2'")
    by_new = articles.execute(
        "SELECT id FROM search_articles_v2(%s, %s::real[], 1)", [text, new_vector(text)]
    ).fetchall()
    assert len(by_old) == len(by_new) == 1
    assert by_old[0][0] in toy.nearest(text) and by_new[0][0] in toy.nearest(text, toy.embed_finer)
    triggers = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'articles'::regclass AND NOT tgisinternal ORDER BY 1"
    assert [t for (t,) in articles.execute(triggers)] == [
        f"runbook_{name}_{event}" for name in ("articles", "articles_v2") for event in ("insert", "update")
    ]
    articles.execute("UPDATE articles SET title = 'another title' WHERE id = 7")
    for name in ("articles", "articles_v2"):
        queue = sql.Identifier("runbook", f"{name}_queue")
        assert articles.execute(sql.SQL("SELECT key FROM {}").format(queue)).fetchall() == [(7,)]
    for path, index in ((folder / "toy.yaml", "articles_embedding_hnsw"), (None, "articles_embedding_v2_hnsw")):
        phase = opened("operate/monitor", path) if path else opened("operate/monitor")
        assert [row["name"] for row in vector_indexes(phase.connection, phase.params)] == [index]


def test_the_notebook_swaps_and_both_models_are_answered_by_their_own_column(
    articles: psycopg.Connection[Any], new: Path, folder: Path, opened: Callable[..., Phase]
) -> None:
    before = definition(articles)
    step(OPERATION, new, execute=False)
    assert definition(articles) == before
    step(OPERATION, new, times=2)
    text = "cookie leaks on logout"
    for vector, function in (
        (old_vector(text), "search_articles_before"),
        (new_vector(text), "search_articles_v2"),
        (None, "search_articles_before"),
    ):
        direct = sql.SQL("SELECT id, score, answered_by FROM {}(%s, %s::real[], 3)").format(sql.Identifier(function))
        got = articles.execute(CALL, [text, vector]).fetchall()
        assert got == articles.execute(direct, [text, vector]).fetchall()
        assert {route for _, _, route in got} <= {"vector" if vector else "legacy"}
    row = articles.execute(
        "SELECT body->'paired'->>'p_value', body->'models'->'new'->>'nDCG@10' FROM runbook.entry"
        " WHERE kind = 'model_comparison' AND target = 'articles_v2'"
    ).fetchone()
    assert row and 0 < float(row[0]) <= 1 and 0 < float(row[1]) <= 1
    # The canary of the new target goes on from here; the check that stays finds both functions as they are meant.
    step("migrate/90_cut_over", new)
    step(OPERATION, new)
    for path in (folder / "toy.yaml", new):
        seen = {g.name: str(g.verdict) for g in monitor.look(opened("operate/monitor", path))}
        wanted = ("watch.settings_hold", "watch.route_is_as_set", "explain.function_searches_by_the_index")
        assert [seen[name] for name in wanted] == ["PASS"] * 3, path
    verdicts = articles.execute(
        "SELECT body->>'verdict' FROM runbook.entry"
        " WHERE kind = 'phase' AND phase = 'operate/change_model' ORDER BY seq"
    ).fetchall()
    assert verdicts == [("PASS",), ("PASS",)]


def test_a_third_dimension_gets_an_error_that_names_both(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase]
) -> None:
    model_change.apply(opened())
    for vector in ([1.0] * 9, []):
        with pytest.raises(psycopg.errors.DataException) as raised:
            articles.execute(CALL, ["cookie", vector])
        assert raised.value.diag.message_primary == f"the query vector has {len(vector)} dimensions"
        assert raised.value.diag.message_hint == (
            "search_articles takes vectors of dimension 8 (articles) or 16 (articles_v2)."
        )


def test_no_call_fails_while_the_function_is_swapped_and_swapped_back(
    copied: str, articles: psycopg.Connection[Any], opened: Callable[..., Phase]
) -> None:
    phase, stop, problems = opened(), threading.Event(), list[str]()
    calls: dict[str, int] = {"old": 0, "new": 0}
    swapped, rounds = threading.Event(), [0]

    def call(which: str, prepared: bool) -> None:
        with psycopg.connect(copied, autocommit=True) as connection:
            while not stop.is_set():
                began = rounds[0]
                if which == "new" and not swapped.is_set():
                    time.sleep(0.001)
                    continue
                vector = old_vector("cookie leaks") if which == "old" else new_vector("cookie leaks")
                try:
                    got = connection.execute(CALL, ["cookie leaks", vector], prepare=prepared).fetchall()
                    if len(got) != 3 or {r[2] for r in got} != {"vector"}:
                        problems.append(f"{which}: {got}")
                except psycopg.Error as error:
                    # Vectors of the new model are refused by the former function: the servers go back first.
                    if which == "old" or (swapped.is_set() and began == rounds[0]):
                        problems.append(f"{which}: {error}")
                calls[which] += 1

    threads = [threading.Thread(target=call, args=args) for args in (("old", True), ("old", False), ("new", True))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            model_change.apply(phase)
            swapped.set()
            time.sleep(0.15)
            swapped.clear()
            rounds[0] += 1
            time.sleep(0.05)  # a call of the new vectors that is under way ends
            model_change.undo(phase)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert calls["old"] > 200 and calls["new"] > 50, calls


def test_the_copy_is_dropped_only_after_the_calls_that_began_before(
    copied: str, opened: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = opened()
    with psycopg.connect(copied, autocommit=True) as connection:
        thread = threading.Thread(target=connection.execute, args=["SELECT pg_sleep(1.5)"])
        thread.start()
        time.sleep(0.3)
        with monkeypatch.context() as patch:
            patch.setattr(model_change, "LONGEST_WAIT_FOR_CALLS_S", 0.2)
            with pytest.raises(RunbookError, match="1 statements older than"):
                model_change.let_calls_end(phase.connection, phase.params)
        assert thread.is_alive()
        model_change.let_calls_end(phase.connection, phase.params)
        thread.join(timeout=0.3)
        assert not thread.is_alive()


def test_undo_leads_back_to_the_letter_and_twice_does_nothing(
    copied: str, articles: psycopg.Connection[Any], opened: Callable[..., Phase]
) -> None:
    both = "search_articles(text, real[], int, float8), search_articles_v2(text, real[], int, float8)"
    articles.execute(f"GRANT EXECUTE ON FUNCTION {both} TO app_of_models")
    before, text = definition(articles), dump(copied)
    phase = opened()
    model_change.apply(phase)
    assert articles.execute(
        "SELECT has_function_privilege('app_of_models', 'search_articles_before(text, real[], int, float8)',"
        " 'EXECUTE')"
    ).fetchone() == (True,)
    assert [s.name for s in model_change.plan(phase)] == []
    model_change.apply(phase)
    assert [s.name for s in model_change.undo_plan(phase)] == ["model_change.swap_back", "model_change.drop_before"]
    model_change.undo(phase)
    assert definition(articles) == before
    assert dump(copied) == text
    assert model_change.verify_undone(phase).passed
    assert model_change.undo_plan(phase).statements == ()
    model_change.apply(phase)
    assert model_comparison.verify_swapped(phase).passed, "and it can take over again"


def test_without_a_swap_on_record_the_way_back_is_judged_by_the_function_that_is_there(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase]
) -> None:
    phase = opened()

    def judged() -> str:
        (one,) = model_change.verify_undone(phase)
        return str(one)

    passed = (
        "PASS    model_change.function_is_as_before   search_articles\n"
        "  found   no swap on record; it answers for articles alone\n"
        "  needed  the definition from before the swap, and no copy"
    )
    assert judged() == passed
    articles.execute("CREATE FUNCTION search_articles_before(a text, b real[], c int) RETURNS int RETURN 1")
    assert judged() == passed, "somebody's own function is no copy"
    articles.execute("DROP FUNCTION search_articles_before")
    # As after a swap whose ledger was lost.
    for statement in model_change.plan(phase):
        phase.do(statement)
    told, _, way_out = judged().rpartition("\n")
    assert told == (
        "FAIL    model_change.function_is_as_before   search_articles\n"
        "  found   no swap on record; both answer; search_articles_before is left\n"
        "  needed  the definition from before the swap, and no copy\n"
        "  danger  the application calls a function that was never judged"
    )
    assert way_out.startswith("  do      run ") and way_out.endswith(
        "the definition in the ledger, kind model_change"
    )
    model_change.undo(phase)
    assert judged() == passed
    articles.execute("DROP FUNCTION search_articles(text, real[], int, float8)")
    assert judged().splitlines()[:2] == [
        "FAIL    model_change.function_is_as_before   search_articles",
        "  found   no such function",
    ]


def test_the_command_takes_it_back_with_a_record_and_not_after_the_retirement(
    copied: str, articles: psycopg.Connection[Any], folder: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before, text = definition(articles), dump(copied)

    def operate(*arguments: str, path: Path = new) -> Result:
        return CliRunner().invoke(main, ["operate", str(path), "operate/change_model", *arguments])

    # Not by the command: its kernel would take a busy machine's milliseconds for a slower model.
    assert step(OPERATION, new)["gates"].passed
    assert definition(articles) != before
    swapped = dump(copied)
    assert_planned("undo/change_model", new)
    assert dump(copied) == swapped, "a plan"
    undone = operate("--undo", "--execute")
    assert undone.exit_code == 0, undone.output
    assert (definition(articles), dump(copied)) == (before, text)
    (record,) = [
        r for _, r in manifest.all_runs(folder / "v2" / "runs") if r.operation and r.way == "undo" and r.execute
    ]
    assert [(p.name, p.status) for p in record.phases] == [("undo/change_model", "passed")]
    assert {verdict for verdict, _ in told_in_a_plan("undo/change_model", new)[1]} == {"WOULD PASS"}
    again = operate("--undo", "--execute")
    assert (again.exit_code, f"(run {record.run_id})" in again.output) == (0, True)

    step(OPERATION, new)
    step("operate/retire_model", retire(folder, 0))
    with pytest.raises(GateFailed) as refused:
        step("undo/change_model", new)
    assert str(refused.value.gates.failed[0]) == (
        "FAIL    model_change.former_function_is_kept   search_articles\n"
        "  found   it answers by articles_v2, and search_articles_before is gone\n"
        "  needed  the function of articles, kept under that name\n"
        "  danger  nothing is left to go back to: nothing was changed\n"
        "  do      make articles again by its own phases, with this target as the one that it replaces"
    )


@pytest.mark.parametrize("left", ["route moved", "copy left"])
def test_killed_between_a_rerun_goes_on(
    copied: str, articles: psycopg.Connection[Any], opened: Callable[..., Phase], left: str
) -> None:
    phase = opened()
    text = dump(copied)
    if left == "route moved":
        search_function.move_route(phase, "vector", 100, "as the process ended")
        names = ["model_change.swap"]
    else:
        model_change.apply(phase)
        phase.do(model_change.undo_plan(phase).statements[0])
        assert not model_change.verify_undone(phase).passed
        names = ["model_change.drop_before"]
        assert [s.name for s in model_change.undo_plan(phase)] == names
        assert model_change.check(phase).passed, "the copy is the runbook's own"
        names = ["model_change.swap"]
    assert [s.name for s in model_change.plan(phase)] == names
    model_change.apply(phase)
    assert model_comparison.verify_swapped(phase).passed
    model_change.undo(phase)
    assert dump(copied) == text


def test_a_swap_that_fails_half_way_changes_nothing(
    copied: str, opened: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, block = dump(copied), model_change.SQL["swap"]
    monkeypatch.setitem(model_change.SQL, "swap", replace(block, text=block.text + ";\nSELECT 1/0"))
    with pytest.raises(psycopg.errors.DivisionByZero):
        model_change.apply(opened())
    assert dump(copied) == text


def test_a_model_that_finds_less_is_not_swapped_in(
    articles: psycopg.Connection[Any], folder: Path, opened: Callable[..., Phase]
) -> None:
    strict = folder / "strict"
    strict.mkdir(exist_ok=True)
    (strict / "v2").mkdir(exist_ok=True)
    loss = {"cut_over": SECTIONS["cut_over"] | {"largest_relevance_loss": 0.0}}
    path = write_params(strict, **SECTIONS | FINER | loss | {"model_change": {"replaces_params": "../toy.yaml"}})
    articles.execute(  # every row has the vector of another one
        "UPDATE articles a SET embedding_v2 = b.embedding_v2 FROM articles b WHERE b.id = (a.id * 7) % 200 + 1"
    )
    before = definition(articles)
    phase = opened(path=path)
    model_comparison.measure(phase)
    (failed,) = model_comparison.verify(phase).failed
    figures = failed.figures
    assert figures["new"] < figures["replaced"] and figures["high"] < 0 and figures["p_value"] < 0.05
    assert str(failed) == (
        "FAIL    models.relevance_is_kept   articles_v2\n"
        f"  found   nDCG@10 {figures['new']:.3f} on 40 judged queries, replaced {figures['replaced']:.3f} (difference"
        f" {figures['low']:+.3f} to {figures['high']:+.3f}, p = {figures['p_value']:.2g})\n"
        f"  needed  at least {figures['replaced']:.3f}\n"
        "  danger  users find less than they do today\n"
        "  do      choose another model, or another route in cut_over.route"
    )
    with pytest.raises(GateFailed):
        step(OPERATION, path)
    assert definition(articles) == before


def test_without_judgements_it_wants_to_be_told(opened: Callable[..., Phase], folder: Path) -> None:
    for accepted in (False, True):
        bare = folder / f"bare_{accepted}"
        bare.mkdir(exist_ok=True)
        own = {"cut_over": SECTIONS["cut_over"] | {"accept_unjudged": accepted}, "queries": {"judgements": None}}
        phase = opened(path=write_params(bare, **SECTIONS | FINER | own))
        model_comparison.measure(phase)
        kept = model_comparison.verify(phase).gates[0]
        assert str(kept.verdict) == ("PASS" if accepted else "UNKNOWN")
        assert kept.found.startswith("no judgements; ") and "of the answers in common" in kept.found
        assert kept.found.endswith(", accepted by cut_over.accept_unjudged") == accepted


@pytest.mark.parametrize("name", ["10_baseline", "70_tune", "undo/index"])
def test_the_replaced_target_does_not_break_the_function_while_both_answer(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase], folder: Path, new: Path, name: str
) -> None:
    phase = opened()
    model_change.apply(phase)
    close(phase)
    swapped = definition(articles)
    notebook = f"migrate/{name}" if name in MIGRATE else name
    if notebook == name:
        step("undo/reads", folder / "toy.yaml")
    with pytest.raises(GateFailed) as raised:
        step(notebook, folder / "toy.yaml")
    assert str(raised.value.gates.failed[0]) == (
        "FAIL    handover.no_other_target_relies_on_it   search_articles\n"
        "  found   search_articles was handed over from articles to articles_v2; both answer\n"
        "  needed  no function handed over from or to this target\n"
        "  danger  calls of the application would fail, or be answered by the other model's vectors\n"
        "  do      take it back first: `runbook operate PARAMS change_model --undo --execute`"
        " with articles_v2's PARAMS;"
        " or run operate/retire_model there"
    )
    with pytest.raises(GateFailed):
        search_function.plan(opened("10_baseline", folder / "toy.yaml"))
    for later in ("undo/schema", "undo/search_function"):
        assert function_ownership.check(opened(later, folder / "toy.yaml")).failed
    assert definition(articles) == swapped


def test_the_whole_way_back_of_the_new_target_leaves_the_old_one_as_it_was(
    copied: str, articles: psycopg.Connection[Any], opened: Callable[..., Phase], new: Path, folder: Path
) -> None:
    phase = opened()
    model_change.apply(phase)
    close(phase)
    step("undo/reads", new)
    text = "cookie leaks on logout"
    assert {r[2] for r in articles.execute(CALL, ["cookie leaks", new_vector(text)])} == {"legacy"}
    with pytest.raises(GateFailed) as raised:
        step("undo/index", new)
    assert "change_model --undo --execute` with articles_v2's PARAMS" in str(raised.value)
    phase = opened()
    model_change.undo(phase)
    close(phase)
    step_all("undo", list(UNDO)[1:], new)
    left = dump(copied)
    assert "v2" not in left and "runbook_articles_insert" in left and "articles_embedding_hnsw" in left
    assert {r[2] for r in articles.execute(CALL, [text, old_vector(text)])} == {"vector"}
    step_all("undo", UNDO, folder / "toy.yaml")
    assert "embedding" not in dump(copied)


def test_one_dimension_is_told_apart_by_a_setting(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase], folder: Path
) -> None:
    same = folder / "same"
    same.mkdir(exist_ok=True)
    own = {
        "target": {"name": "articles_v3"},
        "vector": {"column": "embedding_v3", "dimension": toy.DIMENSION},
        "embeddings": {"callable": "tests.toy:embed_otherwise"},
    }
    untold = write_params(same, **SECTIONS | FINER | own)
    step_all("migrate", MIGRATE[:9], untold)
    (failed,) = model_change.check(opened(path=untold)).failed
    assert str(failed) == (
        "FAIL    model_change.calls_can_be_told_apart   search_articles\n"
        "  found   dimensions 8 and 8\n"
        "  needed  different dimensions, or model_change.tell_apart: setting\n"
        "  danger  vectors of one model would be compared with those of the other: answers without meaning,"
        " no error\n"
        "  do      set model_change.tell_apart: setting, and let servers with the new model SET runbook.articles ="
        " 'articles_v3' in each session, or call search_articles_v3 by its own name"
    )
    told = {"model_change": FINER["model_change"] | {"tell_apart": "setting"}}
    step(OPERATION, write_params(same, **SECTIONS | FINER | own | told))
    text = "cookie leaks on logout"
    vector = [float(x) for x in toy.embed_otherwise([text])[0]]
    old_answer = articles.execute(CALL, [text, old_vector(text)]).fetchall()
    assert old_answer[0][0] in toy.nearest(text)
    articles.execute("SET runbook.articles = 'articles_v3'")
    answer = articles.execute(CALL, [text, vector]).fetchall()
    assert (
        answer[0][0] in toy.nearest(text, toy.embed_otherwise)
        and answer
        == articles.execute(
            "SELECT id, score, answered_by FROM search_articles_v3(%s, %s::real[], 3)", [text, vector]
        ).fetchall()
    )
    articles.execute("SET runbook.articles = 'articles'")
    assert articles.execute(CALL, [text, old_vector(text)]).fetchall() == old_answer
    articles.execute("SET runbook.articles = 'artcles_v3'")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"runbook\.articles names no model: artcles_v3"):
        articles.execute(CALL, [text, vector])


def test_targets_that_do_not_fit_are_refused_with_every_reason(opened: Callable[..., Phase], folder: Path) -> None:
    odd = folder / "odd"
    odd.mkdir(exist_ok=True)
    own = {"target": {"name": "other", "key": "views", "filters": ["status"]}, "vector": {"dimension": 16}}
    (failed,) = model_change.check(opened(path=write_params(odd, **SECTIONS | FINER | own))).failed
    assert failed.found == (
        "target.key differs; target.filters differs; vector.column is the same; no function search_other"
    )
    with pytest.raises(BadInput) as raised:
        model_change.check(opened(path=folder / "toy.yaml"))
    assert [g.name for g in raised.value.problems] == ["model_change.replaced_target_is_named"]


def test_a_caller_without_rights_on_the_new_is_named(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase]
) -> None:
    articles.execute("GRANT EXECUTE ON FUNCTION search_articles(text, real[], int, float8) TO app_of_models")
    (failed,) = model_change.check(opened()).failed
    assert (failed.name, failed.found) == (
        "model_change.callers_may_call_the_new",
        "app_of_models may not call it, or not read embedding_v2",
    )
    articles.execute("GRANT EXECUTE ON FUNCTION search_articles_v2(text, real[], int, float8) TO app_of_models")
    articles.execute("GRANT SELECT ON articles TO app_of_models")
    assert model_change.check(opened()).passed


def test_a_function_of_somebody_else_is_not_overwritten(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase]
) -> None:
    articles.execute("CREATE FUNCTION search_articles_before() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    (failed,) = model_change.check(opened()).failed
    assert failed.found == "a function search_articles_before already exists"
    assert model_change.undo_plan(opened()).statements == ()


def retire(folder: Path, hours: float) -> Path:
    """A params file of the second target that wants so many quiet hours."""
    own = {"model_change": FINER["model_change"] | {"quiet_hours": hours}}
    path = folder / f"quiet_{hours:g}"
    path.mkdir(exist_ok=True)
    return write_params(path, **SECTIONS | FINER | own)


def test_retired_the_name_answers_by_the_new_model_and_nothing_of_the_old_is_left(
    copied: str, articles: psycopg.Connection[Any], new: Path, folder: Path, opened: Callable[..., Phase]
) -> None:
    with pytest.raises(GateFailed) as raised:
        step("operate/retire_model", retire(folder, 0))
    assert [g.name for g in raised.value.gates.failed] == ["retire_model.new_target_answers"]
    step(OPERATION, new)
    swapped = dump(copied)
    step("operate/retire_model", retire(folder, 0), execute=False)
    assert dump(copied) == swapped
    step("operate/retire_model", retire(folder, 0), times=2)
    left = dump(copied)
    for gone in ("search_articles_before", "runbook_articles_insert", "articles_embedding_hnsw", " embedding "):
        assert gone not in left
    text = "cookie leaks on logout"
    assert articles.execute(CALL, [text, new_vector(text)]).fetchall()[0][0] in toy.nearest(text, toy.embed_finer)
    assert {r[2] for r in articles.execute(CALL, ["cookie leaks", None])} == {"legacy"}
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="has 8 dimensions, the vectors searched have 16"):
        articles.execute(CALL, [text, old_vector(text)])
    step("operate/retire_model", retire(folder, 0))
    assert dump(copied) == left, "twice does nothing"
    # The old target's own rollbacks find nothing to do, and leave the function that is the new one's now.
    with pytest.raises(RunbookError, match="search_articles_before is gone"):
        model_change.undo(opened())
    with pytest.raises(GateFailed, match="nothing is left to do here: the function is part of articles_v2"):
        step("undo/search_function", folder / "toy.yaml")
    assert dump(copied) == left


def test_old_vectors_that_are_searched_are_not_retired(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase], folder: Path
) -> None:
    phase = opened(path=retire(folder, 24))
    model_change.apply(phase)
    articles.execute("SET enable_seqscan = off; SET enable_sort = off")
    found = []
    for look in range(3):
        if look == 2:
            for _ in range(5):
                articles.execute(CALL, ["cookie leaks", old_vector("cookie leaks")])
            articles.execute("SELECT pg_stat_force_next_flush()")
        quiet = retire_model.check(phase).gates[-1]
        found.append((str(quiet.verdict), quiet.found.split(" searches since ")[0]))
    assert found == [("FAIL", "not counted yet; from now on they are"), ("FAIL", "0"), ("FAIL", "5")]
    noted = {"scans": quiet.figures["scans"], "at_s": time.time() - 25 * 3600, "at": "2026-01-01 00:00:00"}
    phase.note(retire_model.KIND, noted)
    assert retire_model.check(phase).passed, "a day and an hour without a search"


@pytest.mark.parametrize("so_far", [1, 2, 3])
def test_a_retirement_killed_anywhere_goes_on(
    articles: psycopg.Connection[Any], opened: Callable[..., Phase], folder: Path, so_far: int
) -> None:
    phase = opened(path=retire(folder, 0))
    before = definition(articles)
    model_change.apply(phase)
    for statement in list(retire_model.plan(phase))[:so_far]:
        with phase.opened():
            phase.connection.execute(statement.query)
    if so_far == 1:
        model_change.undo(phase)
        assert definition(articles) == before and model_change.verify_undone(phase).passed, "there is a rollback yet"
        model_change.apply(phase)
    retire_model.apply(phase)
    assert retire_model.verify(phase).passed
    assert retire_model.plan(phase).statements == ()


def test_handovers_are_read_from_the_source_that_runs(opened: Callable[..., Phase]) -> None:
    phase = opened()
    assert function_ownership.standing(phase.connection, phase.params) == []
    model_change.apply(phase)
    assert function_ownership.standing(phase.connection, phase.params) == [
        function_ownership.Handover("search_articles", "articles", "articles_v2", function_ownership.BOTH)
    ]
