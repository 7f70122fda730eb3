"""The legacy search retired: what nobody reads goes, reads cannot go back by mistake, and all of it comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import comparison
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, GateFailed
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.core.target import load_params
from runbook_lib.indexes import building
from runbook_lib.operate import legacy_usage, monitor, reads_to_legacy, retirable, retire_legacy
from runbook_lib.params import Params
from runbook_lib.search import search_function
from tests import migrators, toy
from tests.conftest import DSN_ENV, write_params
from tests.opened import gates_passed
from tests.servers import dump
from tests.stepping import assert_planned, step, step_all, told_in_a_plan
from tests.test_server_versions import SECTIONS

NOTEBOOK = "operate/retire_legacy"
UNDO_NOTEBOOK = "undo/retire_legacy"
ROLE = "migrator_of_legacy"
DAY_S = 86_400
# Statistics of a test are younger than any number of days: what nobody read since they began is unused for 0 days.
NOW: dict[str, Any] = {"unused_days": 0}
LEGACY = "SELECT id FROM articles WHERE title ILIKE '%cookie%' ORDER BY id LIMIT 3"


@pytest.fixture(scope="module")
def moved(server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A database whose reads a role with the least rights has moved, to be copied; its schema from before that."""
    folder = tmp_path_factory.mktemp("moved")
    dsn = make_conninfo(server, dbname="moved")
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as patch:
        admin.execute("CREATE DATABASE moved")
        with psycopg.connect(dsn, autocommit=True) as connection:
            toy.create_articles(connection)
            connection.execute("CREATE EXTENSION pg_stat_statements")
            # All tests of a session share its counts; where these are full, statements are thrown out.
            connection.execute("SELECT pg_stat_statements_reset()")
            connection.execute(
                "CREATE INDEX articles_prefix ON articles (title text_pattern_ops) WHERE title <> '100 %'"
            )
            connection.execute("CREATE UNIQUE INDEX articles_only ON articles (id, status text_pattern_ops)")
            connection.execute("COMMENT ON INDEX articles_prefix IS 'for the 10 % of prefix searches'")
            patch.setenv(DSN_ENV, migrators.create(connection, ROLE))
        start = dump(dsn)
        # A busy machine says nothing of the search: differences below this count as noise.
        patch.setattr(comparison, "FAST_ENOUGH_MS", 1000.0)
        step_all("migrate", MIGRATE, write_params(folder, **SECTIONS))
    return "moved", start


@pytest.fixture
def database(server: str, moved: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A superuser's DSN of a copy of it; the parameters find it as the role that migrated. It goes with the server:
    each DROP would wait for a checkpoint.
    """
    name = f"moved_{time.monotonic_ns()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [moved[0]])
        migrators.copied(admin, moved[0], name, ROLE)
    monkeypatch.setenv(DSN_ENV, make_conninfo(server, dbname=name, user=ROLE))
    return make_conninfo(server, dbname=name)


@pytest.fixture
def articles(database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


Open = Callable[..., Phase]


@pytest.fixture
def opened(database: str, tmp_path: Path) -> Iterator[Open]:
    """Opens the operation; keyword arguments are keys of ``retire``."""
    made: list[Phase] = []

    def make(execute: bool = True, hybrid: bool = False, search: Any = None, **keys: Any) -> Phase:
        p = load_params(params_file(tmp_path, hybrid=hybrid, search=search, **keys))
        connection = db.connect(p, "test retire")
        ledger = Ledger(db.connect(p, "test ledger"), p, "test-run", "operate/retire_legacy")
        made.append(gates_passed(Phase("operate/retire_legacy", "test-run", execute, p, connection, ledger)))
        return made[-1]

    yield make
    for phase in made:
        phase.end("was ended by the test", "nothing")


def params_file(folder: Path, *, hybrid: bool = False, search: Any = None, **keys: Any) -> Path:
    cut_over = SECTIONS["cut_over"] | ({"route": "hybrid"} if hybrid else {})
    sections = SECTIONS | {"cut_over": cut_over, "retire": NOW | keys} | ({"search": search} if search else {})
    return write_params(folder, **sections)


def indexes(connection: psycopg.Connection[Any]) -> dict[str, bool]:
    found = connection.execute(
        "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " WHERE i.indrelid = 'articles'::regclass ORDER BY 1"
    ).fetchall()
    return dict(found)


LEFT = {"articles_embedding_hnsw": True, "articles_only": True, "articles_pkey": True}
ALL = LEFT | {"articles_prefix": True, "articles_trgm": True, "articles_tsv": True}


def by_name(gates: Any) -> dict[str, Gate]:
    return {f"{g.name} {g.subject}" if g.name.endswith("unread") else g.name: g for g in gates}


def test_there_and_back_through_the_notebook(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path
) -> None:
    before, path = dump(database), params_file(tmp_path)
    step(NOTEBOOK, path, execute=False)
    assert (indexes(articles), dump(database)) == (ALL, before)
    step(NOTEBOOK, path, times=2)
    assert indexes(articles) == LEFT
    with pytest.raises(psycopg.errors.CheckViolation, match="articles_legacy_is_retired"):
        articles.execute("UPDATE runbook.route SET route = 'legacy', share_percent = 0")
    with pytest.raises(
        psycopg.errors.FeatureNotSupported, match="the legacy search behind search_articles was retired"
    ):
        articles.execute("SELECT * FROM search_articles('cookie')")
    vector = "(SELECT embedding FROM articles WHERE id = 3)::real[]"
    answer = articles.execute(f"SELECT id, answered_by FROM search_articles('cookie leaks', {vector}, 3)").fetchall()
    assert toy.as_near_as_row_3(answer[0])
    step(NOTEBOOK, path)
    assert indexes(articles) == LEFT, "applied twice"
    retired = dump(database)
    assert_planned(UNDO_NOTEBOOK, path)
    assert dump(database) == retired, "a plan"
    step(UNDO_NOTEBOOK, path, times=2)
    assert dump(database) == before
    assert {verdict for verdict, _ in told_in_a_plan(UNDO_NOTEBOOK, path)[1]} == {"WOULD PASS"}, "nothing is left"
    assert retire_legacy.undo_plan(_open(path)).statements == (), "undone twice"
    articles.execute("DROP INDEX articles_prefix")
    step(UNDO_NOTEBOOK, path)
    assert "articles_prefix" not in indexes(articles), "what somebody dropped since is theirs"
    assert articles.execute("SELECT answered_by FROM search_articles('cookie') LIMIT 1").fetchone() == ("legacy",)


def _open(path: Path) -> Phase:
    p = load_params(path)
    ledger = Ledger(db.connect(p, "test ledger"), p, "test-run", "operate/retire_legacy")
    return gates_passed(Phase("operate/retire_legacy", "test-run", True, p, db.connect(p, "test"), ledger))


def test_the_way_back_from_the_start_brings_legacy_back_first(
    articles: psycopg.Connection[Any], database: str, tmp_path: Path, moved: tuple[str, str]
) -> None:
    path = params_file(tmp_path, remove_capture=True, drop_fulltext_column=True)
    step(NOTEBOOK, path)
    columns = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'articles'::regclass AND attname = 'tsv'"
    assert articles.execute(columns).fetchone() == (0,)
    assert articles.execute("SELECT to_regclass('runbook.articles_queue')").fetchone() == (None,)
    phase = _open(path)
    freshness = {g.name: str(g.verdict) for g in monitor._rows_are_fresh(phase.connection, phase.params, False)}
    assert freshness == {"watch.nothing_is_missing": "PASS", "watch.nothing_is_stale": "PASS"}
    assert not monitor._changes_are_captured(phase.connection, phase.params), "the watch goes on without a queue"
    (first, *_) = reads_to_legacy.undo_plan(_open(path)).statements
    assert first.name == "retire.add_column" and "locks the whole table" in first.purpose
    step("undo/reads", path)
    assert indexes(articles) == ALL
    assert articles.execute("SELECT route, share_percent FROM runbook.route").fetchone() == ("legacy", 0)
    step_all("undo", list(UNDO)[1:], path)
    assert dump(database) == moved[1]


def test_what_is_made_again_is_named_with_its_size_before_it_is_done(opened: Open) -> None:
    phase = opened()
    retire_legacy.apply(phase)
    plan = retire_legacy.undo_plan(phase)
    assert [s.name for s in plan] == [
        "retire.create_index",
        "retire.comment_on_index",
        "retire.create_index",
        "retire.create_index",
        "search.create_function",
        "retire.let_reads_back",
    ]
    assert plan.statements[0].purpose.startswith(
        "Rebuild a retired index from its definition in the ledger: articles_prefix, 16"
    )
    text = plan.statements[0].text(phase.connection)
    assert text.startswith("CREATE INDEX CONCURRENTLY articles_prefix ON public.articles USING btree (title")
    assert "'100 %'" in text


def test_the_time_to_build_an_index_again_is_measured_on_a_sample(
    opened: Open, articles: psycopg.Connection[Any]
) -> None:
    phase = opened()
    shown = retire_legacy.shown(phase)
    assert [row[0] for row in shown.rows] == ["articles_prefix", "articles_trgm", "articles_tsv"]
    assert all(row[3].startswith("about ") for row in shown.rows)
    trigram = next(
        f for f in retirable.chosen(phase.connection, phase.ledger, phase.params) if f.name == "articles_trgm"
    )
    few, many = (
        retirable.rebuild_seconds(phase.connection, phase.params, trigram, 200),
        retirable.rebuild_seconds(phase.connection, phase.params, trigram, 2_000_000),
    )
    assert many > 100 * few
    assert indexes(articles) == ALL
    assert articles.execute("SELECT count(*) FROM pg_class WHERE relname = 'runbook_sample'").fetchone() == (0,)


def test_a_drop_that_was_cut_off_is_finished_and_its_definition_kept(
    opened: Open, articles: psycopg.Connection[Any], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of an older snapshot holds the drop up; it is cancelled, which leaves an invalid index."""
    phase, before = opened(), dump(database)
    real = building.SQL["settings"]
    text = real.text.replace("('statement_timeout', '0', false)", "('statement_timeout', '300', false)")
    assert text != real.text
    with psycopg.connect(database) as reader, monkeypatch.context() as patch:
        reader.execute("SELECT count(*) FROM articles WHERE title LIKE 'x%'")
        patch.setitem(building.SQL, "settings", replace(real, text=text))
        with pytest.raises(psycopg.errors.QueryCanceled):
            retire_legacy.apply(phase)
        reader.rollback()
    assert indexes(articles)["articles_prefix"] is False
    left = retire_legacy.verify(phase)
    assert str(left.gates[0]) == (
        "FAIL    retire.indexes_are_gone   public.articles\n"
        "  found   articles_prefix (invalid), articles_trgm, articles_tsv still there\n"
        "  needed  none of what was retired\n"
        "  danger  every write still pays for it; a drop that timed out leaves an index that no search can use\n"
        "  do      run operate/retire_legacy again with execute: true"
    )
    assert {str(g.verdict) for g in left.gates[1:]} == {"PASS"}, "reads were kept from it before the first index went"
    retire_legacy.undo(phase)
    assert (indexes(articles), dump(database)) == (ALL, before), "back from the middle"
    retire_legacy.apply(phase)
    assert indexes(articles) == LEFT
    assert retire_legacy.verify(phase).passed


def test_hybrid_keeps_its_full_text_index_and_its_column(opened: Open, articles: psycopg.Connection[Any]) -> None:
    articles.execute("UPDATE runbook.route SET route = 'hybrid'")
    phase = opened(hybrid=True)
    assert [f.name for f in retirable.chosen(phase.connection, phase.ledger, phase.params)] == [
        "articles_prefix",
        "articles_trgm",
    ]
    named = opened(hybrid=True, indexes=["articles_tsv"], drop_fulltext_column=True)
    assert str(by_name(retire_legacy.check(named))["retire.new_route_does_without_them"]) == (
        "FAIL    retire.new_route_does_without_them   search_articles, route hybrid\n"
        "  found   it needs articles_tsv, tsv\n"
        "  needed  none of what is to go\n"
        "  danger  every search would read the whole table\n"
        "  do      take them out of retire.indexes"
    )
    retire_legacy.apply(phase)
    assert indexes(articles) == LEFT | {"articles_tsv": True}
    expression = {"fulltext_column": None, "fulltext_expression": "to_tsvector('english', body)"}
    articles.execute("CREATE INDEX articles_words ON articles USING gin (to_tsvector('english', body))")
    by_it = opened(hybrid=True, search=expression, indexes=["articles_words"], drop_fulltext_column=True)
    needed = by_name(retire_legacy.check(by_it))["retire.new_route_does_without_them"]
    assert (str(needed.verdict), needed.found) == ("FAIL", "it needs articles_words")


def test_an_index_that_is_more_than_a_search_is_refused(opened: Open) -> None:
    phase = opened(indexes=["articles_pkey", "articles_only", "articles_trgm", "nothing"])
    assert str(by_name(retire_legacy.check(phase))["retire.indexes_can_go"]) == (
        "FAIL    retire.indexes_can_go   public.articles\n"
        "  found   nothing is no index of this table; articles_only keeps values unique; articles_pkey keeps values"
        " unique, carries a constraint\n"
        "  needed  indexes of this table that carry no constraint, and that their definition alone brings back\n"
        "  danger  more would go than a search, or a rollback would not restore what is there now\n"
        "  do      fix retire.indexes; with an empty list the runbook looks for them itself"
    )


class _InAYear(datetime):
    """A machine whose clock is a year ahead."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(days=365)


@pytest.mark.attack
def test_reads_that_moved_a_moment_ago_are_too_young(
    opened: Open, articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = by_name(retire_legacy.check(opened(unused_days=30)))["retire.reads_have_left_legacy"]
    assert (str(gate.verdict), gate.needed) == ("FAIL", "vector or hybrid at 100 % for 30 days")
    assert gate.do.startswith("run this again from ")
    monkeypatch.setattr(retirable, "datetime", _InAYear)
    ahead = by_name(retire_legacy.check(opened(unused_days=30)))["retire.reads_have_left_legacy"]
    assert ahead.verdict == "FAIL", "the days are the server's, whatever this machine's clock says"
    articles.execute("UPDATE runbook.route SET changed_at = now() - interval '31 days'")
    assert by_name(retire_legacy.check(opened(unused_days=30)))["retire.reads_have_left_legacy"].verdict == "PASS"


def test_a_search_by_like_between_two_looks_is_found(opened: Open, articles: psycopg.Connection[Any]) -> None:
    phase = opened()
    retire_legacy.check(phase)
    articles.execute(LEGACY)
    gate = by_name(retire_legacy.check(phase))["retire.legacy_is_not_called"]
    assert str(gate.verdict) == "FAIL"
    assert gate.found.startswith(
        "1 calls of: SELECT id FROM articles WHERE title ILIKE $1 ORDER BY id LIMIT $2 since"
    )
    assert by_name(retire_legacy.check(phase))["retire.legacy_is_not_called"].verdict == "PASS", "not since that look"


def test_statistics_that_are_younger_than_the_time_asked_for_never_pass(
    opened: Open, articles: psycopg.Connection[Any]
) -> None:
    phase = opened(unused_days=1)
    young = by_name(retire_legacy.check(phase))["retire.index_is_unread articles_prefix"]
    assert (str(young.verdict), young.found[:27]) == ("UNKNOWN", "no scan, but counted since ")
    assert young.do.startswith("run this again from ")
    articles.execute("SET enable_seqscan = off; SET enable_indexscan = on")
    articles.execute("SELECT id FROM articles WHERE title LIKE 'cookie%' AND title <> '100 %'")
    articles.execute("SELECT pg_stat_force_next_flush()")
    read = by_name(retire_legacy.check(phase))
    assert read["retire.index_is_unread articles_prefix"].found.startswith("1 scans; counted since ")
    assert str(read["retire.index_is_unread articles_prefix"].verdict) == "FAIL"
    assert str(read["retire.legacy_is_not_called"].verdict) == "FAIL"


def test_the_notebook_stops_ahead_of_any_change(articles: psycopg.Connection[Any], tmp_path: Path) -> None:
    with pytest.raises(GateFailed) as raised:
        step(NOTEBOOK, params_file(tmp_path, unused_days=30))
    failed = {g.name: str(g.verdict) for g in raised.value.gates.failed}
    assert failed["retire.reads_have_left_legacy"] == "FAIL"
    assert indexes(articles) == ALL
    looks = articles.execute("SELECT count(*) FROM runbook.entry WHERE kind = 'retire_look'").fetchone()
    assert looks == (1,), "what it saw is written down for the next time"


def judging(folder: Path) -> Params:
    """The judgement asks no server."""
    return load_params(params_file(folder, unused_days=30))


LOOK = legacy_usage.Look(
    at_s=100 * DAY_S,
    reset_s=10 * DAY_S,
    scans={"trgm": 7},
    last_s=None,
    calls={"1": 5},
    calls_reset_s=10 * DAY_S,
    thrown_out=0,
    texts={"1": "SELECT … LIKE …"},
)
EARLIER = replace(LOOK, at_s=60 * DAY_S)
# As pg_stat_statements before 1.9 has it.
NO_AGE = replace(LOOK, calls={}, calls_reset_s=None, all_calls=(100,))
AGELESS = "no call, but since when it is counted this release of pg_stat_statements does not say, and there is "


@pytest.mark.parametrize(
    ("now", "before", "verdict", "found"),
    [
        (LOOK, EARLIER, "PASS", "no call since the look of 1970-03-02 00:00 UTC"),
        (replace(LOOK, calls={"1": 6}), EARLIER, "FAIL", "1 calls of: SELECT … LIKE … since the look of 1970-03-02"),
        (LOOK, None, "UNKNOWN", "5 calls of: SELECT … LIKE … since 1970-01-11 00:00 UTC; when, one look does not"),
        (replace(LOOK, calls={}), None, "PASS", "no call since 1970-01-11 00:00 UTC, when counting began"),
        (replace(LOOK, calls={}, calls_reset_s=90 * DAY_S), None, "UNKNOWN", "no call, but counted since 1970-04-01"),
        (
            replace(LOOK, calls={}, calls_reset_s=90 * DAY_S),
            EARLIER,
            "UNKNOWN",
            "no call, but counted since 1970-04-",
        ),
        (
            replace(LOOK, calls_reset_s=90 * DAY_S),
            EARLIER,
            "FAIL",
            "5 calls of: SELECT … LIKE …; counted since 1970-",
        ),
        (
            replace(LOOK, calls={}, thrown_out=3),
            None,
            "UNKNOWN",
            "no call, but 3 statements were thrown out for want",
        ),
        (replace(LOOK, calls={}, thrown_out=3), EARLIER, "UNKNOWN", "no call, but 3 statements were thrown out for "),
        (replace(LOOK, thrown_out=3), replace(EARLIER, thrown_out=3), "PASS", "no call since the look of 1970-03-02"),
        (NO_AGE, None, "UNKNOWN", f"{AGELESS}nothing to compare with"),
        (
            NO_AGE,
            replace(NO_AGE, at_s=60 * DAY_S, all_calls=(90,)),
            "PASS",
            "no call since the look of 1970-03-02",
        ),
        (
            NO_AGE,
            replace(NO_AGE, all_calls=(190,)),
            "UNKNOWN",
            f"{AGELESS}counters were set back since the last",
        ),
        (NO_AGE, replace(NO_AGE, calls={"7": 1}), "UNKNOWN", f"{AGELESS}counters were set back since the last"),
        (replace(NO_AGE, crowded=True), NO_AGE, "UNKNOWN", f"{AGELESS}so many statements that some may have been"),
        (
            replace(NO_AGE, calls={"1": 5}),
            replace(NO_AGE, calls={"1": 3}),
            "FAIL",
            "2 calls of: SELECT … LIKE … ",
        ),
        (replace(LOOK, calls=None, why="hidden"), EARLIER, "UNKNOWN", "hidden"),
        (LOOK, replace(EARLIER, calls_reset_s=5 * DAY_S), "UNKNOWN", "5 calls of: SELECT … LIKE … since 1970-01-11"),
    ],
)
def test_only_what_two_looks_or_old_statistics_show_counts_as_silence(
    tmp_path: Path, now: legacy_usage.Look, before: legacy_usage.Look | None, verdict: str, found: str
) -> None:
    gate = next(iter(legacy_usage.gates(judging(tmp_path), now, before, [])))
    assert (str(gate.verdict), gate.found[: len(found)]) == (verdict, found)
    assert bool(gate.do) is (verdict != "PASS")


@pytest.mark.parametrize(
    ("now", "before", "verdict", "found"),
    [
        (replace(LOOK, last_s={"trgm": 65 * DAY_S}), None, "PASS", "last read 1970-03-07 00:00 UTC"),
        (replace(LOOK, last_s={"trgm": None}), None, "PASS", "not read since 1970-01-11 00:00 UTC"),
        (replace(LOOK, last_s={"trgm": 99 * DAY_S}), EARLIER, "FAIL", "last read 24 h 0 min ago, on 1970-04-10"),
        (replace(LOOK, last_s={"trgm": None}, reset_s=90 * DAY_S), None, "FAIL", "7 scans; counted since 1970-04-01"),
        (replace(LOOK, scans={}, reset_s=90 * DAY_S), EARLIER, "UNKNOWN", "no scan, but counted since 1970-04-01"),
        (LOOK, EARLIER, "PASS", "0 scans since the look of 1970-03-02 00:00 UTC"),
        (replace(LOOK, scans={"trgm": 9}), EARLIER, "FAIL", "2 scans since the look of 1970-03-02 00:00 UTC"),
        (LOOK, None, "UNKNOWN", "7 scans since 1970-01-11 00:00 UTC; when, one look does not tell"),
        (replace(LOOK, scans={}), None, "PASS", "not read since 1970-01-11 00:00 UTC"),
        (LOOK, replace(EARLIER, reset_s=5 * DAY_S), "UNKNOWN", "7 scans since 1970-01-11 00:00 UTC; when, one look"),
    ],
)
def test_an_index_is_unread_only_where_the_counters_can_say_so(
    tmp_path: Path, now: legacy_usage.Look, before: legacy_usage.Look | None, verdict: str, found: str
) -> None:
    gate = list(legacy_usage.gates(judging(tmp_path), now, before, ["trgm"]))[1]
    assert (str(gate.verdict), gate.found[: len(found)]) == (verdict, found)


def test_the_look_to_compare_with_is_the_newest_that_is_old_enough(opened: Open) -> None:
    phase = opened(unused_days=30)
    now = legacy_usage.look(phase.connection, phase.params)
    for age in (50, 40, 10):
        phase.note(legacy_usage.KIND, asdict(replace(now, at_s=now.at_s - age * DAY_S, thrown_out=age)))
    found = legacy_usage.earlier(phase.ledger, phase.params, now)
    assert found and found.thrown_out == 40


def test_two_servers_are_silent_only_together() -> None:
    both = legacy_usage._together(
        [
            replace(LOOK, last_s={"trgm": None, "tsv": 5.0}),
            replace(LOOK, last_s={"trgm": 9.0, "tsv": 3.0}, calls={"1": 2, "2": 1}, reset_s=20 * DAY_S),
        ]
    )
    assert (both.last_s, both.calls) == ({"trgm": 9.0, "tsv": 5.0}, {"1": 7, "2": 1})
    assert (both.scans, both.reset_s) == ({"trgm": 14}, 20 * DAY_S)
    assert legacy_usage._together([LOOK, replace(LOOK, calls=None, why="not installed")]).calls is None


def test_without_pg_stat_statements_nobody_can_tell(opened: Open, articles: psycopg.Connection[Any]) -> None:
    articles.execute("DROP EXTENSION pg_stat_statements")
    gate = by_name(retire_legacy.check(opened()))["retire.legacy_is_not_called"]
    assert (str(gate.verdict), gate.found) == ("UNKNOWN", "pg_stat_statements is not installed in this database")


def test_a_standby_that_nobody_looked_at_keeps_the_verdict_open(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = replace(retirable.SQL["standbys"], text="SELECT 2 AS standbys")
    monkeypatch.setitem(retirable.SQL, "standbys", two)
    gate = by_name(retire_legacy.check(opened()))["retire.every_server_was_looked_at"]
    assert (str(gate.verdict), gate.found) == ("UNKNOWN", "2 connected, 2 of them not looked at")
    accepted = by_name(retire_legacy.check(opened(accept_unseen_standbys=True)))["retire.every_server_was_looked_at"]
    assert str(accepted.verdict) == "PASS" and "accepted by retire.accept_unseen_standbys" in accepted.found


def test_made_anew_the_function_stays_without_legacy(opened: Open, articles: psycopg.Connection[Any]) -> None:
    phase = opened()
    retire_legacy.apply(phase)
    search_function.apply(phase)
    assert retire_legacy.verify(phase).passed
