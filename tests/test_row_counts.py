"""One notion of the rows that count, in every phase and every message."""

from collections.abc import Callable
from typing import Any

import psycopg

from runbook_lib.core import db, row_counts
from runbook_lib.core.phase import Phase
from runbook_lib.core.row_counts import Rows
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings, preflight
from runbook_lib.operate import monitor
from runbook_lib.params import Params
from tests import partitioned


def test_what_was_never_analyzed_is_counted(
    articles: psycopg.Connection[Any], open_phase: Callable[..., Phase], make_params: Callable[..., Params]
) -> None:
    phase = open_phase()
    assert row_counts.of(phase.connection, phase.params) == Rows(201, counted=False)
    articles.execute(
        "ALTER TABLE articles RENAME TO old; CREATE TABLE articles (LIKE old INCLUDING ALL);"
        " INSERT INTO articles (id) SELECT id FROM old"
    )
    assert row_counts.of(phase.connection, phase.params) == Rows(201, counted=True)
    beside = make_params(vector={"layout": "side_table"})
    assert row_counts.of(phase.connection, beside, "vectors") == Rows(0, counted=False), "it is not there yet"
    assert row_counts.estimated(phase.connection, phase.params, "articles") == 0, "nothing was estimated, never -1"


def test_only_the_partition_that_was_emptied_or_never_analyzed_is_counted(
    database: str, make_params: Callable[..., Params]
) -> None:
    p = make_params(target={"key_from_one_source": True})
    with psycopg.connect(database, autocommit=True) as connection, db.connect(p, "test") as own:
        partitioned.create_articles(connection, "range", trigram=False)
        connection.execute("ANALYZE articles")
        scans = "SELECT pg_stat_get_xact_numscans('articles_low'::regclass)"
        for emptied in (
            "DELETE FROM {t}; ANALYZE {t}",
            "TRUNCATE {t}; INSERT INTO {t} (id, tenant) VALUES (102, 'acme')",
        ):
            before = connection.execute('SELECT count(*) FROM "Articles High %"').fetchone()
            assert before is not None and before[0] > 0
            connection.execute(emptied.format(t='"Articles High %"'))
            there = connection.execute("SELECT count(*) FROM articles").fetchone()
            with own.transaction():
                assert there == (row_counts.of(own, p).n,)
                assert own.execute(scans).fetchone() == {"pg_stat_get_xact_numscans": 0}, "what is known is not read"
            connection.execute("INSERT INTO \"Articles High %\" (id, tenant) VALUES (103, 'acme')")


def test_rows_without_text_count_nowhere(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase("50_backfill")
    facts = dict(preflight.facts(phase).table().rows)
    assert facts["rows"] == "201, estimated by the last ANALYZE"
    assert facts["rows with text"] == "200, by 201 rows sampled; they get a vector"
    assert preflight.plan_body(phase)["rows_with_text"] == 200
    for module in (extension, expand_schema, load_embeddings, backfill):
        module.apply(phase)
    assert [next(iter(gates)).found for gates in (load_embeddings.verify(phase), backfill.verify(phase))] == [
        "200 of 200 rows with text have its vector, 0 changed since and are queued, 0 have none",
        "0 of 200 rows with text lack a vector",
    ]
    assert [gate.found for gate in monitor._rows_are_fresh(phase.connection, phase.params, captured=True)] == [
        "0 of 200 rows with text lack a vector and are not queued",
        "0 of 200 rows with a vector have that of an older text and are not queued",
    ]
