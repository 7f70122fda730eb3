"""Keys of several columns: the whole way there and back, with writers beside it, and what is refused."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.backfill import change_queue
from runbook_lib.benchmark import comparison, query_set
from runbook_lib.cli import init, search
from runbook_lib.core import db, query_plan
from runbook_lib.core.gates import BadInput
from runbook_lib.core.names import key_of, names
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, inputs, load_embeddings
from runbook_lib.operate import partition_by_filter
from runbook_lib.search import search_function
from runbook_lib.sql import Block
from runbook_lib.sql.key import text_of, values_of
from tests import citus_refuses, composite, migrators, servers, toy
from tests.composite import SHAPES, Shape
from tests.conftest import DSN_ENV
from tests.opened import opened
from tests.servers import dump
from tests.stepping import step, step_all
from tests.test_citus import CATALOGUE

ONE = uuid.UUID(int=1)
COLUMNS = (
    "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::text::regclass AND attnum > 0 AND NOT attisdropped"
)


@pytest.fixture
def empty(database: str) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to a database without tables."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture(params=[name for name in SHAPES if name != "tenants"])
def shape(request: pytest.FixtureRequest, empty: psycopg.Connection[Any]) -> Shape:
    """A table, made."""
    composite.create(empty, SHAPES[request.param])
    return SHAPES[request.param]


def test_there_and_back(
    empty: psycopg.Connection[Any], database: str, tmp_path: Path, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two hundred rows are searched within milliseconds by any way: what is faster is chance here.
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    before, own_rows = dump(database), composite.own_rows(empty, shape)
    path = composite.params_file(tmp_path, shape)

    step_all("migrate", MIGRATE, path)
    assert composite.assert_every_row_has_the_vector_of_its_text(empty, shape) == toy.ROWS
    assert composite.own_rows(empty, shape) == own_rows
    _changes_are_followed(empty, shape, path)
    _calls_find_the_nearest(empty, shape)

    own_rows = composite.own_rows(empty, shape)
    step_all("undo", UNDO, path)
    assert dump(database) == before
    assert composite.own_rows(empty, shape) == own_rows


@pytest.mark.parametrize("release", ["16.14 with 0.8.5", "17.9 with 0.8.2"])
def test_there_and_back_on_older_servers(release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    shape = SHAPES["text and bigint"]
    with servers.reached(release) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        monkeypatch.setenv(DSN_ENV, dsn)
        composite.create(connection, shape)
        before = dump(dsn)
        path = composite.params_file(tmp_path, shape)
        step_all("migrate", MIGRATE, path)
        _changes_are_followed(connection, shape, path)
        _calls_find_the_nearest(connection, shape)
        step_all("undo", UNDO, path)
        assert dump(dsn) == before


def _changes_are_followed(connection: psycopg.Connection[Any], shape: Shape, path: Path) -> None:
    """A new text, a changed key and a deleted row reach the vectors by a refresh."""
    first, second, third = (shape.value(i) for i in range(3))
    moved = (*first[:-1], first[-1] + 30_000)
    last = sql.Identifier(shape.key[-1])
    change = sql.SQL("UPDATE {} SET {} WHERE {}")
    connection.execute(
        change.format(shape.name, sql.SQL("{} = %s").format(last), shape.one_row()), [moved[-1], *first]
    )
    new_text = sql.SQL("body = 'the thread returns at midnight'")
    connection.execute(change.format(shape.name, new_text, shape.one_row()), second)
    connection.execute(sql.SQL("DELETE FROM {} WHERE {}").format(shape.name, shape.one_row()), third)
    step("operate/refresh", path)
    assert composite.assert_every_row_has_the_vector_of_its_text(connection, shape) == toy.ROWS - 1
    assert connection.execute("SELECT count(*) FROM runbook.composite_queue").fetchall() == [(0,)]
    step("operate/monitor", path)


def _calls_find_the_nearest(connection: psycopg.Connection[Any], shape: Shape) -> None:
    """What the function answers, against numpy on the vectors that the table has."""
    found, n = composite.rows(connection, shape), len(shape.key)
    for query in ("cookie leaks", "buffer overflows under load", "the socket blocks at midnight"):
        answers = composite.call(connection, query, 10)
        least, near = composite.nearest(found, query, 10)
        assert {a[n + 1] for a in answers} == {"vector"}
        assert {a[:n] for a in answers} <= near
        assert [a[n + 3] for a in answers] == list(range(1, 11))
        assert min(a[n + 2] for a in answers) >= least - 1e-5


# -- parts of the way, on one table


@pytest.fixture
def opened_on(tmp_path: Path, empty: psycopg.Connection[Any]) -> Iterator[Callable[..., Phase]]:
    """Opens a phase on a table of one of the shapes, made first; it is ended after the test."""
    phases: list[Phase] = []

    def make(name: str = "text and bigint", **sections: dict[str, Any]) -> Phase:
        composite.create(empty, SHAPES[name])
        phases.append(opened(load_params(composite.params_file(tmp_path, SHAPES[name], **sections))))
        return phases[-1]

    yield make
    for phase in phases:
        phase.end("was ended by the test", "nothing")


def _up_to(phase: Phase, *modules: Any) -> None:
    expand_schema.record_start(phase)
    for module in (extension, expand_schema, *modules):
        module.apply(phase)


@pytest.mark.parametrize("kind", ["column", "side_table"])
@pytest.mark.parametrize("name", ["text and bigint", "uuid and integer"])
def test_rows_and_keys_that_writers_change_meanwhile_have_the_vectors_of_their_texts(
    opened_on: Callable[..., Phase], database: str, empty: psycopg.Connection[Any], kind: str, name: str
) -> None:
    slow = {"batch_rows": 10, "most_batch_rows": 10, "pause_between_batches_ms": 5}
    patient = {"timeout_ms": 500, "tries": 50}
    phase = opened_on(name, vector={"layout": kind}, embeddings={"batch_rows": 20}, backfill=slow, locks=patient)
    shape, beside = SHAPES[name], f"{SHAPES[name].table}_embedding" if kind == "side_table" else ""
    _up_to(phase)
    with composite.writers(database, shape) as written:
        load_embeddings.apply(phase)
        backfill.apply(phase)
        assert written, "nobody wrote meanwhile"
    change_queue.drain(phase)
    assert load_embeddings.verify(phase).passed
    assert backfill.verify(phase).passed
    assert composite.assert_every_row_has_the_vector_of_its_text(empty, shape, beside) > 0
    if beside:
        orphans = sql.SQL("SELECT count(*) FROM {} e WHERE NOT EXISTS (SELECT FROM {} t WHERE ({}) = ({}))").format(
            sql.Identifier(beside), shape.name, *(composite.of_alias(shape, alias) for alias in "te")
        )
        assert empty.execute(orphans, []).fetchall() == [(0,)]


def test_a_side_table_is_promoted_and_goes_without_a_trace(
    opened_on: Callable[..., Phase], database: str, empty: psycopg.Connection[Any]
) -> None:
    phase, shape = (
        opened_on("partitioned by tenant", vector={"layout": "side_table"}),
        SHAPES["partitioned by tenant"],
    )
    empty.execute("CREATE EXTENSION vector")
    before = dump(database)
    _up_to(phase, load_embeddings, backfill)
    done = [entry["body"]["name"] for entry in phase.ledger.all_entries() if entry["kind"] == "statement"]
    assert "sidetable.promote" in done
    assert {c for (c,) in empty.execute(COLUMNS, ["docs_embedding"])} == {
        *shape.key,
        *("embedding", "embedding_hash", "embedding_updated_at"),
    }
    assert composite.assert_every_row_has_the_vector_of_its_text(empty, shape, "docs_embedding") == toy.ROWS
    build_index.apply(phase)
    assert build_index.verify(phase).passed
    for module in (build_index, expand_schema):
        module.undo(phase)
        assert module.verify_undone(phase).passed
    assert dump(database) == before


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "csv", "npy", "table"])
@pytest.mark.parametrize("name", ["text and bigint", "uuid and integer"])
def test_vectors_made_elsewhere_name_every_column_of_the_key(
    opened_on: Callable[..., Phase], tmp_path: Path, empty: psycopg.Connection[Any], kind: str, name: str
) -> None:
    shape = SHAPES[name]
    given: dict[str, Any] = {"source": "file", "callable": None, "file": f"vectors.{kind}", "batch_rows": 30}
    if kind == "npy":
        given["ids_file"] = "ids.txt"
    if kind == "table":
        given = {"source": "table", "callable": None, "table": "public.vectors", "batch_rows": 30}
    phase = opened_on(name, embeddings=given)
    _up_to(phase)
    texts = [r for r in composite.rows_before(empty, shape) if r[-1].strip()]
    composite.write_vectors(tmp_path, empty, kind, shape, texts)
    load_embeddings.apply(phase)
    assert load_embeddings.verify(phase).passed
    backfill.apply(phase)
    assert composite.assert_every_row_has_the_vector_of_its_text(empty, shape) == toy.ROWS


def test_a_row_of_a_file_whose_key_is_none_is_refused_by_name(
    opened_on: Callable[..., Phase], tmp_path: Path, empty: psycopg.Connection[Any]
) -> None:
    shape = SHAPES["uuid and integer"]
    given = {"source": "file", "callable": None, "file": "vectors.jsonl"}
    phase = opened_on("uuid and integer", embeddings=given)
    _up_to(phase)
    texts = [r for r in composite.rows_before(empty, shape) if r[-1].strip()]
    composite.write_vectors(tmp_path, empty, "jsonl", shape, texts)
    known = str(texts[0][0])
    with (tmp_path / "vectors.jsonl").open("a") as lines:
        for key in ({"Order %": known}, {"Order %": "no uuid", "line no": 1}, {"Order %": known, "line no": 99}):
            lines.write(json.dumps({**key, "embedding": [1.0] * toy.DIMENSION}) + "\n")
    load_embeddings.apply(phase)
    refused = empty.execute("SELECT key_1, key_2, key_text, reason FROM runbook.composite_rejected ORDER BY id")
    assert refused.fetchall() == [
        (None, None, f'["{known}", null]', "its key is no uuid, integer"),
        (None, None, '["no uuid", 1]', "its key is no uuid, integer"),
        (texts[0][0], 99, f'["{known}", 99]', "no row of the table has its key"),
    ]


def test_a_file_that_lacks_a_column_of_the_key_is_refused(opened_on: Callable[..., Phase], tmp_path: Path) -> None:
    (tmp_path / "vectors.csv").write_text('id,embedding\n1,"[1,2]"\n')
    phase = opened_on(embeddings={"source": "file", "callable": None, "file": "vectors.csv"})
    _up_to(phase)
    with pytest.raises(BadInput, match=r"columns id, embedding\n.*needed  columns Label, id and embedding"):
        load_embeddings.apply(phase)


def test_texts_in_chunks_are_found_by_the_key_of_their_row(
    opened_on: Callable[..., Phase], empty: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES["text and bigint"]
    phase = opened_on(vector={"layout": "chunks"}, embeddings={"chunks": {"size": 20}})
    search_function.apply(phase)
    _up_to(phase, load_embeddings, backfill, build_index, search_function)
    assert backfill.verify(phase).passed and build_index.verify(phase).passed
    search_function.move_route(phase, "vector", 100, "the test")
    owners = sql.SQL("SELECT {} FROM notes_embedding ORDER BY embedding <=> %s::real[]::vector LIMIT 1")
    vector = toy.embed(["cookie leaks"])[0].tolist()
    nearest = empty.execute(owners.format(shape.columns), [vector]).fetchone()
    answers = composite.call(empty, "cookie leaks", 10)
    assert nearest is not None and len({a[:2] for a in answers}) == 10
    assert max(a[4] for a in answers) == pytest.approx(answers[0][4])
    change = sql.SQL("UPDATE notes SET body = 'socket' WHERE {}").format(shape.one_row())
    empty.execute(change, answers[0][:2])
    change_queue.drain(phase)
    assert backfill.verify(phase).passed


@pytest.mark.parametrize(
    ("change", "key", "name", "found", "do"),
    [
        (
            "SELECT 1",
            ["id", "Label"],
            "inputs.key_identifies_rows",
            "no valid unique index on these columns alone, in this order, NOT NULL",
            'CREATE UNIQUE INDEX CONCURRENTLY ON "public"."notes" ("id", "Label"); or name the columns in target.key'
            " in the order in which their index has them",
        ),
        (
            'ALTER TABLE notes DROP CONSTRAINT notes_pkey, ADD UNIQUE ("Label", id);'
            " ALTER TABLE notes ALTER id DROP NOT NULL",
            ["Label", "id"],
            "inputs.key_identifies_rows",
            'unique by "notes_Label_id_key", NULL allowed',
            'ALTER TABLE "public"."notes" ALTER COLUMN "id" SET NOT NULL;',
        ),
        ("SELECT 1", ["Label", "no"], "inputs.key_is_supported", "no such column", "the table has:"),
        (
            "ALTER TABLE notes ALTER id TYPE numeric",
            ["Label", "id"],
            "inputs.key_is_supported",
            "numeric",
            "name another unique column in target.key",
        ),
    ],
)
def test_a_key_that_tells_no_rows_apart_is_refused(
    empty: psycopg.Connection[Any], tmp_path: Path, change: str, key: list[str], name: str, found: str, do: str
) -> None:
    composite.create(empty, SHAPES["text and bigint"])
    empty.execute(change)  # type: ignore[call-overload]
    path = composite.params_file(tmp_path, SHAPES["text and bigint"], target={"key": key})
    failed = [g for g in inputs.input_problems(load_params(path)) if g.verdict != "PASS" and g.name == name]
    assert [g.found for g in failed] == [found]
    assert failed[0].do.startswith(do)


def test_judgements_name_a_key_as_a_list_and_unknown_ones_are_found(
    empty: psycopg.Connection[Any], tmp_path: Path
) -> None:
    composite.create(empty, SHAPES["text and bigint"])
    params = load_params(composite.params_file(tmp_path, SHAPES["text and bigint"]))
    judged = query_set.read_judgements(params)
    assert '["a,b", 0]' in judged["q00"] and r'["say \"so\"", 0]' in judged["q00"]
    with db.connect(params, "test") as connection:
        assert query_set.unknown_keys(connection, params) == []
        odd = {"q00": {'["a,b", 999]': 1, '["a,b", "0"]': 1, '["a,b"]': 1, "7": 1, '["a,b", 1e9]': 1}}
        assert query_set.unknown_keys(connection, params, odd) == list(odd["q00"])


def test_init_proposes_the_primary_key_and_its_file_passes_the_checks(
    empty: psycopg.Connection[Any], tmp_path: Path
) -> None:
    composite.create(empty, SHAPES["text and bigint"])
    output = tmp_path / "notes.yaml"
    wishes = init.Wishes(dsn_env=DSN_ENV, table="notes")
    init.write(wishes, output, force=False, ask=lambda _, suggested: suggested, say=lambda _: None)
    text = output.read_text()
    assert "key: [Label, id]" in text and 'SELECT t."Label", t."id"' in text
    assert "# text, bigint, NOT NULL and unique together, in the order of their index" in text
    failed = [g.name for g in inputs.input_problems(load_params(output)) if g.verdict != "PASS"]
    assert failed == []


def test_the_search_command_shows_keys_and_texts(
    opened_on: Callable[..., Phase], empty: psycopg.Connection[Any]
) -> None:
    phase = opened_on()
    search_function.apply(phase)
    _up_to(phase, load_embeddings, backfill, build_index, search_function)
    _, answers = search.ask(phase.connection, phase.params, "cookie leaks", 3, {})
    assert [(a.route, a.problem, len(a.rows)) for a in answers] == [("legacy", "", 3), ("vector", "", 3)]
    texts = search._texts(phase.connection, phase.params, answers)
    shown = search.shown(answers, texts, 200)
    assert '["a,b", 0] cookie leaks' in shown


def test_words_and_vectors_are_combined_by_both_columns(
    opened_on: Callable[..., Phase], empty: psycopg.Connection[Any]
) -> None:
    words = (
        "SELECT \"Label\", id, 1.0 FROM notes WHERE title ILIKE '%' || :query || '%' ORDER BY \"Label\", id LIMIT :k"
    )
    phase = opened_on(search={"fulltext_column": None, "words_query": words}, cut_over={"route": "hybrid"})
    search_function.apply(phase)
    _up_to(phase, load_embeddings, backfill, build_index, search_function)
    search_function.move_route(phase, "hybrid", 100, "the test")
    answers = composite.call(empty, "cookie leaks", 10)
    assert {a[3] for a in answers} == {"hybrid"} and len({a[:2] for a in answers}) == 10
    titled = {r[:2] for r in composite.rows(empty, SHAPES["text and bigint"]) if r[2].startswith("cookie leaks\n")}
    assert titled <= {a[:2] for a in answers}


def test_what_cannot_be_done_with_several_columns_is_refused_in_words(opened_on: Callable[..., Phase]) -> None:
    phase = opened_on(target={"filters": ["title"]}, partitioning={"column": "title"})
    (refused,) = [g for g in partition_by_filter.check(phase) if g.name == "partitioning.key_is_one_column"]
    assert str(refused) == (
        "FAIL    partitioning.key_is_one_column   public.notes\n"
        "  found   target.key: (Label, id)\n"
        "  needed  a key of one column\n"
        "  danger  the copy of the table is followed by a queue of keys, which holds one column\n"
        "  do      leave it out; operate/serve_filters serves filter values without partitions"
    )


def test_batches_ranges_and_single_rows_are_found_through_the_index_of_the_key(
    opened_on: Callable[..., Phase], empty: psycopg.Connection[Any]
) -> None:
    phase = opened_on()
    more = "INSERT INTO notes SELECT i, 'title ' || i, 'body', 'label ' || i % 500 FROM generate_series(1, 20000) i"
    empty.execute(more)
    empty.execute("ANALYZE notes")
    keys = [text_of((f"label {i % 500}", i)) for i in range(1, 1001)]
    key = key_of(phase.params)
    of_a_page = "SELECT {one t.key AS key} FROM {table} t WHERE {t.key > %last} ORDER BY {t.key} LIMIT 100"
    page = Block("page", "", "", "", of_a_page).compose(names(phase.params))
    asked = [
        (db.statement(change_queue.SQL["lock_rows"], phase.params).query, {"keys": keys}),
        (sql.SQL("UPDATE notes t SET title = title WHERE {}").format(key.written("t.key = %key")), {"key": keys[0]}),
        (page, {"last": keys[0]}),
    ]
    for query, values in asked:
        plan = query_plan.explain(phase.connection, query, values)
        assert plan.indexes == ["notes_pkey"] and not plan.has("Seq Scan") and not plan.has("Sort"), query


def test_a_key_is_spelt_alike_by_postgresql_and_python(empty: psycopg.Connection[Any]) -> None:
    odd = ["", " ", "\x01\x1f\x7f", "\b\f\n\r\t", "\u2028é𝄞", '"\\/', *composite.ODD]
    for text in odd:
        row = empty.execute("SELECT jsonb_build_array(%s::text, %s::bigint, %s::uuid)::text", [text, -(2**63), ONE])
        assert row.fetchone() == (text_of((text, -(2**63), ONE)),)
        assert values_of(text_of((text, 1))) == [text, 1]


def test_a_table_distributed_by_the_first_column_is_joined_on_all_of_them(
    empty: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stand-ins for the functions of Citus, which refuse what it refuses."""
    shape = SHAPES["tenants"]
    composite.create(empty, shape)
    empty.execute(CATALOGUE.replace("'h', 'id', 7", "'h', 'tenant_id', 7"))  # type: ignore[call-overload]
    path = composite.params_file(tmp_path, shape, target={"name": "articles", "distributed": "citus"})
    params = load_params(path)
    assert [g.name for g in inputs.input_problems(params) if g.verdict != "PASS"] == []
    citus_refuses.refuse(monkeypatch)
    phase = opened(params)
    try:
        _up_to(phase, load_embeddings)
        by = "SELECT logicalrelid::text, partkey, colocationid FROM pg_dist_partition WHERE partkey > '' ORDER BY 1"
        assert empty.execute(by).fetchall() == [
            ("articles", "tenant_id", 7),
            ("runbook.articles_queue", "key_1", 7),
            ("runbook.articles_staging", "key_1", 7),
        ]
        backfill.apply(phase)
        assert composite.assert_every_row_has_the_vector_of_its_text(empty, shape) == toy.ROWS
        empty.execute("UPDATE articles SET title = 'changed' WHERE tenant_id = 3")
        change_queue.drain(phase)
        assert backfill.verify(phase).passed
        assert composite.assert_every_row_has_the_vector_of_its_text(empty, shape) == toy.ROWS
        expand_schema.undo(phase)
        assert expand_schema.verify_undone(phase).passed
        left = empty.execute("SELECT proname FROM pg_proc WHERE pronamespace = 'runbook'::regnamespace ORDER BY 1")
        assert left.fetchall() == [("chain_entry",), ("sign_off",)]
    finally:
        phase.end("was ended by the test", "nothing")


def test_operations_and_filters_by_the_first_column_as_a_role_with_the_least_rights(
    empty: psycopg.Connection[Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    shape = SHAPES["tenants"]
    composite.create(empty, shape)
    monkeypatch.setenv(DSN_ENV, migrators.create(empty, "migrator_of_tenants"))
    before = dump(database)
    path = composite.params_file(
        tmp_path,
        shape,
        target={"filters": ["tenant_id"]},
        legacy={"query": composite.OF_TENANTS},
        search={"fulltext_column": None, "returns": ["title"]},
        shadow={"sample_percent": 100},
        storage={"sample_rows": 150},
        filters={"partial_indexes": {"tenant_id": ["3"]}, "smallest_gain": 0.001},
    )
    step_all("migrate", MIGRATE, path)
    called = "SELECT tenant_id, id, title FROM search_composite(%s, %s::real[], 5, filter_tenant_id => 3)"
    answers = empty.execute(called, ["cookie leaks", toy.embed(["cookie leaks"])[0].tolist()]).fetchall()
    assert len(answers) == 5 and {a[0] for a in answers} == {3} and all(a[2] for a in answers)
    shadowed = "SELECT count(*) FROM search_composite_shadow('cookie leaks', %s::real[], 5)"
    assert empty.execute(shadowed, [toy.embed(["cookie leaks"])[0].tolist()]).fetchall() == [(5,)]
    logged = empty.execute("SELECT live_keys, problem FROM runbook.composite_shadow_log ORDER BY id DESC LIMIT 1")
    (live_keys, problem) = logged.fetchone() or ([], "none")
    assert problem is None and all(len(values_of(k)) == 2 for k in live_keys)
    operations = ("rehearse", "compare_storage", "rebuild_index", "serve_filters", "monitor", "refresh")
    for operation in operations:
        step(f"operate/{operation}", path)
    assert composite.assert_every_row_has_the_vector_of_its_text(empty, shape) == toy.ROWS
    step("undo/serve_filters", path)
    step_all("undo", UNDO, path)
    assert dump(database) == before


def test_another_model_takes_over_and_the_first_is_retired(
    empty: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    shape = SHAPES["text and bigint"]
    composite.create(empty, shape)
    first = composite.params_file(tmp_path, shape)
    (tmp_path / "v2").mkdir()
    second = composite.params_file(
        tmp_path / "v2",
        shape,
        target={"name": "composite_v2"},
        vector={"column": "embedding_v2", "dimension": toy.FINER},
        embeddings={"callable": "tests.toy:embed_finer"},
        model_change={"replaces_params": "../toy.yaml", "quiet_hours": 0.0},
    )
    step_all("migrate", MIGRATE, first)
    step_all("migrate", MIGRATE[: MIGRATE.index("90_cut_over")], second)
    step("operate/change_model", second)
    own = "SELECT * FROM search_composite('cookie leaks', %s::real[], 5)"
    answers = empty.execute(own, [toy.embed_finer(["cookie leaks"])[0].tolist()]).fetchall()
    assert len({a[:2] for a in answers}) == 5
    step("operate/retire_model", second)
    assert empty.execute(own, [toy.embed_finer(["cookie leaks"])[0].tolist()]).fetchall() == answers
    assert "embedding" not in {c for (c,) in empty.execute(COLUMNS, ["notes"])}
