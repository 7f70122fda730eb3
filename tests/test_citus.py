"""A distributed target: found by a catalogue that looks like that of Citus, refused, planned for, and tried on
stand-ins for its functions. This is one server; tests/drills/test_citus.py does the same on a cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import batch_ranges, batch_strategy, change_queue, health, vector_store
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, RunbookError
from runbook_lib.core.phase import Phase
from runbook_lib.indexes import building, index_proof
from runbook_lib.migrate import backfill, build_index, citus, expand_schema, extension, inputs, load_embeddings
from runbook_lib.operate import refresh
from runbook_lib.params import Params
from tests import citus_refuses, toy
from tests.evidence import assert_every_row_has_the_vector_of_its_text

MakeParams = Callable[..., Params]
ACCEPTED = {"distributed": "citus"}
NO_HYBRID: dict[str, Any] = {"fulltext_column": None}

VALUES = {"key": 1, "text_hash": b"", "embedding": "[1]"}

# The tables, functions and the setting of Citus that the runbook asks; distributing only writes down that it was.
CATALOGUE = """
    INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
        VALUES (99001, 'citus', 10, 11, false, '13.0-1');
    CREATE TABLE pg_dist_partition (logicalrelid regclass PRIMARY KEY, partmethod "char", partkey text,
        colocationid int, repmodel "char");
    CREATE TABLE pg_dist_shard (logicalrelid regclass, shardid bigint);
    CREATE FUNCTION column_to_column_name(regclass, text) RETURNS text LANGUAGE sql AS 'SELECT $2';
    CREATE TABLE workers (nodename text, nodeport int, success boolean, result text);
    INSERT INTO workers VALUES ('one', 5432, true, '0.8.6 268435456'), ('two', 5432, true, '0.8.6 268435456');
    CREATE FUNCTION run_command_on_workers(text) RETURNS SETOF workers LANGUAGE sql AS 'SELECT * FROM workers';
    CREATE FUNCTION create_distributed_table(t regclass, c text, colocate_with text) RETURNS void LANGUAGE sql AS $$
        INSERT INTO pg_dist_partition
        SELECT t, 'h', c, (SELECT colocationid FROM pg_dist_partition WHERE logicalrelid = colocate_with::regclass),
            's'
    $$;
    CREATE FUNCTION run_command_on_all_nodes(command text, OUT nodeid int, OUT success boolean, OUT result text)
        RETURNS SETOF record LANGUAGE plpgsql AS $$
        BEGIN
            FOR nodeid, success IN SELECT n.nodeid, n.nodeport <> 1 FROM pg_dist_node n LOOP
                result := 'failed to connect to two:1';
                IF success THEN
                    EXECUTE command INTO result;
                END IF;
                RETURN NEXT;
            END LOOP;
        END $$;
    CREATE TABLE pg_dist_node (nodeid int, groupid int, nodename text, nodeport int, noderole text);
    INSERT INTO pg_dist_node VALUES (2, 1, 'one', 5432, 'primary');
    CREATE TABLE pg_dist_placement (shardid bigint, groupid int);
    CREATE TABLE pg_dist_local_group (groupid int);
    INSERT INTO pg_dist_local_group VALUES (1);
    CREATE FUNCTION citus_pid_for_gpid(bigint) RETURNS int LANGUAGE sql AS 'SELECT ($1 % 10000000000)::int';
    -- A shard that has no table of its own is the table itself.
    CREATE FUNCTION shard_name(regclass, bigint) RETURNS text LANGUAGE sql AS $$
        SELECT quote_ident(c.relname || CASE WHEN s.own IS NULL THEN '' ELSE '_' || $2 END)
        FROM pg_class c, to_regclass('public.articles_' || $2) AS s (own) WHERE c.oid = $1
    $$;
    CREATE FUNCTION master_run_on_worker(nodes text[], ports int[], commands text[], parallel boolean,
        OUT node_name text, OUT node_port int, OUT success boolean, OUT result text)
        RETURNS SETOF record LANGUAGE plpgsql AS $$
        BEGIN
            FOR i IN 1 .. cardinality(nodes) LOOP
                node_name := nodes[i]; node_port := ports[i]; success := true;
                BEGIN
                    -- No function may build concurrently; a worker does, by a session of its own.
                    IF commands[i] LIKE '%CONCURRENTLY%' THEN
                        EXECUTE replace(commands[i], 'CONCURRENTLY', '');
                    ELSE
                        EXECUTE commands[i] INTO result;
                    END IF;
                EXCEPTION WHEN others THEN
                    success := false; result := SQLERRM;
                END;
                RETURN NEXT;
            END LOOP;
        END $$;
    CREATE FUNCTION run_command_on_shards(t regclass, command text, OUT shardid bigint, OUT success boolean,
        OUT result text) LANGUAGE plpgsql AS $$
        BEGIN
            shardid := 102008; success := true;
            EXECUTE replace(command, '%s', t::text) INTO result;
        END $$;
    CREATE FUNCTION citus_table_size(regclass) RETURNS bigint LANGUAGE sql AS 'SELECT pg_table_size($1)';
    CREATE FUNCTION get_shard_id_for_distribution_column(regclass, anyelement) RETURNS bigint LANGUAGE sql
        AS 'SELECT 102008 + $2 % 4';
    CREATE FUNCTION create_reference_table(t regclass) RETURNS void LANGUAGE sql
        AS $$ INSERT INTO pg_dist_partition VALUES (t, 'n', NULL, 9, 't') $$;
    INSERT INTO pg_dist_partition VALUES ('articles', 'h', 'id', 7, 's');
    INSERT INTO pg_dist_shard SELECT 'articles', 102008 + i FROM generate_series(0, 31) i;
    INSERT INTO pg_dist_placement SELECT shardid, 1 FROM pg_dist_shard;
"""


@pytest.fixture
def distribute(articles: psycopg.Connection[Any]) -> Callable[[], None]:
    """Lets the toy table look as if Citus had distributed it by hash of its key."""

    def make() -> None:
        articles.execute(CATALOGUE)

    return make


def _gates(params: Params) -> dict[str, Gate]:
    return {g.name: g for g in inputs.input_problems(params)}


def _failed(params: Params) -> list[str]:
    return [name for name, g in _gates(params).items() if g.verdict != "PASS"]


def test_an_ordinary_table_is_asked_nothing_more_and_must_not_be_called_distributed(
    articles: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    assert not any("distributed" in name for name in _gates(make_params()))
    wrong = _gates(make_params(target=ACCEPTED))["inputs.table_is_distributed"]
    assert (wrong.verdict, wrong.do) == ("FAIL", "take target.distributed out of the parameters")


def test_a_distributed_table_is_found_and_not_gone_on_with_silently(
    distribute: Callable[[], None],
    articles: psycopg.Connection[Any],
    make_params: MakeParams,
    open_phase: Callable[..., Phase],
) -> None:
    phase = open_phase()
    assert "no: an ordinary table" in str(citus.plan_table(phase.connection, phase.params))
    distribute()
    found = citus.look(phase.connection, phase.params)
    assert found == citus.Distribution("13.0-1", "h", "s", 7, "id", 32)
    assert _failed(make_params(search=NO_HYBRID)) == ["inputs.distributed_is_named"]
    assert str(_gates(make_params())["inputs.distributed_is_named"]) == (
        'FAIL    inputs.distributed_is_named   "public"."articles"\n'
        "  found   distributed by hash; target.distributed is not set\n"
        "  needed  target.distributed: citus\n"
        "  danger  statements for an ordinary table stop half-way on Citus, and settings do not reach its workers\n"
        "  do      set target.distributed: citus"
    )
    assert _failed(make_params(target=ACCEPTED, search=NO_HYBRID)) == []
    articles.execute("UPDATE pg_dist_partition SET partkey = 'status'")
    assert str(_gates(make_params(target=ACCEPTED))["inputs.distributed_by_its_key"]) == (
        'FAIL    inputs.distributed_by_its_key   "public"."articles"\n'
        "  found   distributed by hash of status, in 32 shards\n"
        "  needed  by hash of target.key, id\n"
        "  danger  Citus updates from a join only where both sides are distributed by the column they are joined on\n"
        "  do      name status in target.key, first of its columns, if it is unique or the others make it so, or"
        " SELECT alter_distributed_table('\"public\".\"articles\"', distribution_column := 'id')"
    )


OTHERS: list[tuple[str, dict[str, dict[str, Any]], str, str]] = [
    (
        "UPDATE pg_dist_partition SET partmethod = 'n', partkey = NULL",
        {},
        "inputs.distributed_by_its_key",
        "distributed as a local table of Citus, or in a single shard, in 32 shards",
    ),
    (
        "UPDATE pg_dist_partition SET partmethod = 'n', partkey = NULL, repmodel = 't'",
        {},
        "inputs.distributed_by_its_key",
        "distributed as a reference table, with a copy on every node, in 32 shards",
    ),
    (
        "UPDATE pg_dist_partition SET partmethod = 'a'",
        {},
        "inputs.distributed_by_its_key",
        "distributed by append of id, in 32 shards",
    ),
    (
        "UPDATE pg_extension SET extversion = '11.3-1' WHERE extname = 'citus'",
        {},
        "inputs.distributed_table_is_supported",
        "Citus 11.3-1",
    ),
    ("", {"vector": {"layout": "side_table"}}, "inputs.distributed_table_is_supported", "vector.layout: side_table"),
    (
        "",
        {"backfill": {"strategy": "page_interleaved"}},
        "inputs.distributed_table_is_supported",
        "backfill.strategy: page_interleaved",
    ),
    (
        "",
        {"search": {"fulltext_column": "tsv"}},
        "inputs.distributed_table_is_supported",
        "search.fulltext_column, for hybrid",
    ),
    (
        "",
        {"target": ACCEPTED | {"filters": {"most": {"type": "integer", "where": "t.views <= :most"}}}},
        "inputs.distributed_table_is_supported",
        "target.filters most: conditions",
    ),
    (
        "UPDATE workers SET result = '0.8.2 268435456' WHERE nodename = 'two'",
        {},
        "inputs.workers_have_pgvector",
        "they offer 0.8.2, 0.8.6",
    ),
    ("UPDATE workers SET result = 'none 268435456'", {}, "inputs.workers_have_pgvector", "they offer none"),
    (
        "UPDATE workers SET result = '0.8.6 67108864' WHERE nodename = 'two'",
        {},
        "inputs.workers_have_the_build_memory",
        "maintenance_work_mem 64 MB on two:5432",
    ),
]


def test_what_is_not_supported_is_refused_and_named(
    distribute: Callable[[], None], articles: psycopg.Connection[Any], make_params: MakeParams
) -> None:
    distribute()
    for spoiler, sections, name, found in OTHERS:
        p = make_params(**{"target": ACCEPTED, "search": NO_HYBRID, **sections})
        with db.connect(p, "test") as connection, connection.transaction(force_rollback=True):
            if spoiler:
                connection.execute(spoiler)  # type: ignore[arg-type]
            refused = [g for g in citus.check(connection, p) if g.verdict != "PASS"]
        assert [(g.name, g.found) for g in refused] == [(name, found)]


def test_the_plan_says_what_is_done_otherwise(
    distribute: Callable[[], None], open_phase: Callable[..., Phase]
) -> None:
    distribute()
    phase = open_phase(target=ACCEPTED)
    text = str(citus.plan_table(phase.connection, phase.params))
    assert "schema.create_staging" in text and "search.create_route" in text and "20_extension" in text
    plan = str(expand_schema.plan(phase))
    table = 'colocate_with => \'"public"."articles"\''
    assert f"""SELECT create_distributed_table('"runbook"."articles_staging"', 'key', {table})""" in plan
    assert f"""SELECT create_distributed_table('"runbook"."articles_queue"', 'key', {table})""" in plan
    assert """SELECT create_reference_table('"runbook"."articles_rejected"')""" in plan


def test_no_statement_that_changes_a_distributed_table_calls_a_stable_function_on_a_column(
    open_phase: Callable[..., Phase],
) -> None:
    phase = open_phase(target=ACCEPTED)
    of_refresh = [db.statement(refresh.SQL[n], phase.params, **VALUES) for n in ("update", "clear")]
    cleared = db.statement(backfill.SQL["clear_textless"], phase.params, keys=[1])
    changing = [vector_store.of(phase.params).write(phase.params, [1], None), cleared, *of_refresh]
    for statement in changing:
        text = statement.text(phase.connection)
        assert "concat_ws" not in text and "convert_to" not in text, statement.name
        assert "FOR UPDATE" not in text and "SKIP LOCKED" not in text and "ctid" not in text
        assert re.search(r'"articles_text(_hash)?"\("t"\."title"::text, "t"\."body"::text\)', text), statement.name


def test_the_statements_for_an_ordinary_table_are_among_those_that_citus_refuses(
    open_phase: Callable[..., Phase],
) -> None:
    phase = open_phase()
    keys: dict[str, Any] = {"keys": [1]}
    asked = {
        "cannot insert multiple commands into a prepared statement": db.statement(
            expand_schema.SQL["create_triggers"], phase.params
        ),
        "STABLE functions used in UPDATE queries cannot be called with column references": vector_store.of(
            phase.params
        ).write(phase.params, [1], None),
        "could not run distributed query with FOR UPDATE/SHARE commands": db.statement(
            refresh.SQL["lock_rows"], phase.params, **keys
        ),
    }
    for said, statement in asked.items():
        assert citus_refuses.words(statement.text(phase.connection)) == said


def test_the_replaced_statements_do_what_the_ordinary_ones_do(
    distribute: Callable[[], None],
    articles: psycopg.Connection[Any],
    open_phase: Callable[..., Phase],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phase = open_phase("60_build_index", target=ACCEPTED, search=NO_HYBRID)
    distribute()
    citus_refuses.refuse(monkeypatch)
    expand_schema.record_start(phase)
    for module in (extension, expand_schema, load_embeddings):
        module.apply(phase)
    assert expand_schema.verify(phase).passed and expand_schema.plan(phase).statements == ()
    standing = dict(articles.execute("SELECT logicalrelid::text, colocationid FROM pg_dist_partition").fetchall())
    assert standing == {
        "articles": 7,
        "runbook.articles_staging": 7,
        "runbook.articles_queue": 7,
        "runbook.articles_rejected": 9,
    }
    assert batch_strategy.choose(phase.connection, phase.params).strategy == "key_ranges"
    articles.execute("UPDATE articles SET body = NULL WHERE id = 3; UPDATE articles SET title = 'new' WHERE id = 4")
    articles.execute("UPDATE articles SET title = NULL, body = '' WHERE id = 5")
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS - 1
    articles.execute("UPDATE articles SET title = 'changed again' WHERE id IN (6, 7)")
    # What is queued after a drain began is left to the next: a drain under constant writes must come to an end.
    hour_ago = replace(refresh.SQL["clock"], text="SELECT now() - interval '1 hour' AS now")
    with monkeypatch.context() as patch:
        patch.setitem(refresh.SQL, "clock", hour_ago)
        change_queue.drain(phase)
    assert articles.execute("SELECT key FROM runbook.articles_queue ORDER BY key").fetchall() == [(6,), (7,)]
    change_queue.drain(phase)
    assert articles.execute("SELECT key FROM runbook.articles_queue").fetchall() == []
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS - 1
    build_index.apply(phase)
    assert build_index.verify(phase).passed
    for module in (build_index, expand_schema):
        module.undo(phase)
        assert module.verify_undone(phase).passed
    left = articles.execute("SELECT proname FROM pg_proc WHERE pronamespace = 'runbook'::regnamespace ORDER BY 1")
    assert left.fetchall() == [("chain_entry",), ("sign_off",)], "the ledger's own"


def _indexed(open_phase: Callable[..., Phase], distribute: Callable[[], None]) -> Phase:
    phase = open_phase("60_build_index", target=ACCEPTED, search=NO_HYBRID)
    distribute()
    for module in (extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    return phase


def test_the_index_of_a_shard_that_lacks_it_is_found_named_and_built_there_alone(
    distribute: Callable[[], None], articles: psycopg.Connection[Any], open_phase: Callable[..., Phase]
) -> None:
    phase = _indexed(open_phase, distribute)
    assert build_index.verify(phase).passed and build_index.plan(phase).statements == ()
    articles.execute("CREATE TABLE articles_102010 (LIKE articles)")
    articles.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'articles_embedding_hnsw'::regclass")
    # As Citus leaves it: the coordinator's invalid, and that of one shard; here the other shards are its own.
    found = build_index.index(phase.connection, phase.params)
    only = replace(found, shards=tuple(replace(s, state="valid") if s.shard != 102010 else s for s in found.shards))
    steps = building.build_steps(phase.connection, only)
    assert [s.statement.name for s in steps] == ["citus.build_on_shard", "citus.index_is_whole"]
    assert steps[0].statement.lock.startswith("SHARE UPDATE EXCLUSIVE on public.articles_102010 on one:5432, for")
    assert (
        index_proof.validity(only) == "invalid: that of public.articles_102010 on one:5432 is missing; of 32 shards"
    )
    silent = tuple(replace(s, state="unknown", said="no answer") for s in found.shards)
    assert building.build_steps(phase.connection, replace(found, shards=silent)) == [], "nothing is dropped unseen"
    some = replace(only, shards=(replace(only.shards[0], state="unknown"), *only.shards[1:]))
    names = [s.statement.name for s in building.build_steps(phase.connection, some)]
    assert names == ["citus.build_on_shard"], "nor called whole"
    building.carry_out(phase, steps)
    assert build_index.verify(phase).passed
    of_shard = "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'articles_102010'::regclass"
    assert articles.execute(of_shard).fetchall() == [("articles_embedding_hnsw_102010",)]


def test_a_node_says_why_it_cannot_build(
    distribute: Callable[[], None], articles: psycopg.Connection[Any], open_phase: Callable[..., Phase]
) -> None:
    phase = _indexed(open_phase, distribute)
    articles.execute("CREATE TABLE articles_102010 (LIKE articles); CREATE TABLE articles_embedding_hnsw_102010 ()")
    with pytest.raises(RunbookError) as refused:
        build_index.apply(phase)
    assert refused.value.found == (
        'public.articles_102010 on one:5432: relation "articles_embedding_hnsw_102010" already exists'
    )


def test_the_health_of_every_node_counts_and_one_that_is_away_is_waited_for(
    distribute: Callable[[], None], articles: psycopg.Connection[Any], open_phase: Callable[..., Phase]
) -> None:
    phase = open_phase(target=ACCEPTED, health={"wal_since_checkpoint_percent": 1000})
    distribute()
    batch_ranges.create(phase)
    watch = health.LastLook()
    found = {a.indicator: a for a in health.look(phase.connection, phase.params, watch)}
    assert {a.state for a in found.values()} == {health.State.NORMAL}
    assert found["replica lag"].reason == "on one:5432 no standby is connected" and list(watch.wal) == ["one:5432"]
    articles.execute("INSERT INTO pg_dist_node VALUES (3, 2, 'two', 1, 'primary')")
    stops = health.stops(health.look(phase.connection, phase.params, watch))
    assert [str(a) for a in stops] == ["nodes: two:1: failed to connect to two:1"]
