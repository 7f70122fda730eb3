"""An endpoint that limits, fails, dawdles and talks nonsense; and the key, which is never written anywhere."""

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from runbook_lib.backfill import change_queue
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.embeddings import embedding, endpoint
from runbook_lib.migrate import expand_schema, load_embeddings
from runbook_lib.migrate import extension as extension_module
from runbook_lib.params import Params
from tests import toy
from tests.endpoints import Answer, Endpoint, embeddings, serving
from tests.opened import write

MakeParams = Callable[..., Params]
KEY = "sk-the-secret-of-this-test"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("TEST_EMBEDDINGS_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    with serving() as found:
        yield found


def section(served: Endpoint, **more: Any) -> dict[str, Any]:
    """The section ``embeddings`` for this endpoint."""
    given = {"source": "http", "callable": None, "url": served.url, "model": "toy", "request_tries": 3}
    return given | {"api_key_env": "TEST_EMBEDDINGS_KEY"} | more


def test_texts_go_out_in_batches_and_come_back_in_order(make_params: MakeParams, served: Endpoint) -> None:
    texts = [f"cookie number {i}" for i in range(50)]
    model = embedding.model(make_params(embeddings=section(served, request_texts=8)))
    assert np.allclose(model(texts), toy.embed(texts), atol=1e-6)
    assert sorted(len(body["input"]) for body in served.asked) == [2, 8, 8, 8, 8, 8, 8]
    assert {k for body in served.asked for k in body} == {"model", "encoding_format", "input"}
    assert set(served.keys) == {f"Bearer {KEY}"}


def test_dimensions_are_asked_for_where_wanted(make_params: MakeParams, served: Endpoint) -> None:
    embedding.model(make_params(embeddings=section(served, send_dimensions=True)))(["cookie"])
    assert served.asked[0]["dimensions"] == toy.DIMENSION


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (Answer(429), "status 429"),
        (Answer(500), "status 500"),
        (Answer(503), "status 503"),
        (Answer(after_s=0.6), "no answer within 0.3 s"),
    ],
    ids=["429", "500", "503", "timeout"],
)
def test_what_may_pass_is_tried_again(
    make_params: MakeParams,
    served: Endpoint,
    trouble: Answer,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served.script = [trouble]
    vectors = embedding.model(make_params(embeddings=section(served, request_timeout_s=0.3)))(["cookie"])
    assert np.allclose(vectors, toy.embed(["cookie"]))
    assert len(served.asked) == 2
    assert f"  endpoint: {said}; try 2 of 3 in " in capsys.readouterr().out


def test_the_server_s_wish_for_patience_is_kept(make_params: MakeParams, served: Endpoint) -> None:
    served.script = [Answer(429, headers={"Retry-After": "0.4"})]
    embedding.model(make_params(embeddings=section(served)))(["cookie"])
    assert served.at[1] - served.at[0] >= 0.4


def test_an_endpoint_that_stays_away_ends_the_load_in_plain_words(make_params: MakeParams, served: Endpoint) -> None:
    served.script = [Answer(502)] * 3
    with pytest.raises(endpoint.EndpointAway) as error:
        embedding.model(make_params(embeddings=section(served)))(["cookie"])
    assert str(error.value) == (
        f"\n  found   status 502, after 3 tries at {served.url}\n"
        "  needed  an answer\n"
        "  danger  the rows of this batch have no vectors yet; what was done before them is kept\n"
        "  do      look at the endpoint's limits and state, and run this phase again: it resumes where it stopped"
    )
    assert len(served.asked) == 3


def test_a_port_where_nobody_listens(make_params: MakeParams, served: Endpoint) -> None:
    p = make_params(embeddings=section(served) | {"url": "http://127.0.0.1:9/v1/embeddings", "request_tries": 2})
    with pytest.raises(endpoint.EndpointAway, match="ConnectError"):
        embedding.model(p)(["cookie"])


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"<html>", "JSONDecodeError while reading the answer"),
        ({"vectors": []}, "KeyError while reading the answer"),
        ({"data": [{"index": 0, "embedding": ["a"]}]}, "ValueError while reading the answer"),
        ({"data": [{"index": 0, "embedding": [1, 2]}]}, "1 vectors for 2 texts"),
        ({"data": [{"index": 1, "embedding": [1, 2]}, {"index": 1, "embedding": [1, 2]}]}, "2 vectors for 2 texts"),
    ],
)
def test_nonsense_is_never_taken_for_vectors(
    make_params: MakeParams, served: Endpoint, body: Any, found: str
) -> None:
    served.script = [Answer(body=body)]
    with pytest.raises(endpoint.EndpointAway) as error:
        embedding.model(make_params(embeddings=section(served)))(["a cookie", "a buffer"])
    assert error.value.found == f"{found}, from {served.url}"


def test_a_wrong_dimension_is_told_before_anything_starts(make_params: MakeParams, served: Endpoint) -> None:
    gate = embedding.check_dimension(make_params(embeddings=section(served), vector={"dimension": 16}))
    assert (gate.verdict, gate.found) == ("FAIL", "8 dimensions")


@pytest.mark.attack
def test_the_key_is_never_said(make_params: MakeParams, served: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    served.script = [Answer(429), Answer(401, {"error": {"message": f"no such key: {KEY}"}})]
    p = make_params(embeddings=section(served))
    with pytest.raises(BadInput) as error:
        embedding.model(p)(["cookie"])
    assert str(error.value) == (
        f"\nFAIL    embed.model_can_be_loaded   {served.url}\n"
        "  found   status 401: no such key: ***\n"
        "  needed  status 200\n"
        "  danger  no text could be embedded; nothing was started\n"
        "  do      check embeddings.url, embeddings.model and the key in the variable that embeddings.api_key_env"
        " names"
    )
    assert KEY not in capsys.readouterr().out + repr(p) + str(p.for_record())


@pytest.mark.attack
def test_a_line_end_behind_the_key_is_not_sent(
    make_params: MakeParams, served: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_EMBEDDINGS_KEY", f" {KEY}\r\n")
    embedding.model(make_params(embeddings=section(served)))(["cookie"])
    assert served.keys == [f"Bearer {KEY}"]


@pytest.mark.attack
@pytest.mark.parametrize("odd", ["\nX-Other: 1", "\x1b[2J", "\x7f", "ü", "\u2028"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_said(
    make_params: MakeParams, served: Endpoint, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    monkeypatch.setenv("TEST_EMBEDDINGS_KEY", f"{KEY}{odd}x")
    with pytest.raises(BadInput) as error:
        embedding.model(make_params(embeddings=section(served)))
    assert error.value.found == "a character that no header of HTTP may hold"
    assert KEY not in "".join(traceback.format_exception(error.value)) and not served.asked


def test_without_the_key_nothing_is_asked(
    make_params: MakeParams, served: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_EMBEDDINGS_KEY")
    with pytest.raises(BadInput, match="environment variable TEST_EMBEDDINGS_KEY"):
        embedding.model(make_params(embeddings=section(served)))
    assert not served.asked


def test_an_error_that_quotes_the_text_is_not_repeated(make_params: MakeParams, served: Endpoint) -> None:
    served.script = [Answer(400, {"error": {"message": "cannot take 'the patient is Ann'"}})]
    with pytest.raises(endpoint.TextRefused) as error:
        embedding.model(make_params(embeddings=section(served)))(["the patient is Ann"])
    assert error.value.found == "status 400, with a message that repeats the text"


@pytest.fixture
def ready(open_phase: Callable[..., Phase], served: Endpoint) -> Callable[..., Phase]:
    """Opens phase 40 with the endpoint as the source."""

    def make(masked: dict[str, Any] | None = None, **more: Any) -> Phase:
        phase = open_phase(
            "40_load_embeddings",
            embeddings=section(served, batch_rows=50, request_texts=20, **more),
            masking=masked or {},
        )
        extension_module.apply(phase)
        expand_schema.apply(phase)
        return phase

    return make


def test_a_load_that_the_endpoint_ends_goes_on_and_asks_for_no_text_twice(
    ready: Callable[..., Phase], served: Endpoint
) -> None:
    phase = ready(parallel_requests=1)
    served.judge = lambda texts: Answer(503) if len(served.asked) > 4 else None
    with pytest.raises(endpoint.EndpointAway):
        load_embeddings.apply(phase)
    kept = phase.connection.execute("SELECT count(*) AS n FROM runbook.articles_staging").fetchone()
    assert kept == {"n": 50}
    served.judge = lambda texts: None
    served.asked.clear()
    load_embeddings.apply(phase)
    assert load_embeddings.verify(phase).passed
    assert len(served.texts) == toy.ROWS - 50


def too_long(texts: list[str]) -> Answer | None:
    bad = any("midnight" in t and "socket" in t for t in texts)
    return Answer(400, {"error": {"message": "too many tokens"}}) if bad else None


def test_texts_that_the_endpoint_refuses_do_not_block_the_others(
    ready: Callable[..., Phase], served: Endpoint
) -> None:
    phase = ready()
    served.judge = too_long
    load_embeddings.apply(phase)
    gate = load_embeddings.verify(phase).failed[-1]
    assert str(gate) == (
        'FAIL    staging.no_vector_was_refused   "runbook"."articles_rejected"\n'
        "  found   5 × the model failed on its text: TextRefused (for instance key 155)\n"
        "  needed  none\n"
        "  danger  these rows would have no vector, or that of another row's text\n"
        "  do      fix the source of these embeddings and run this phase again; it tries them again"
    )


@pytest.mark.attack
def test_text_is_masked_before_it_leaves_and_the_hash_is_that_of_the_text(
    ready: Callable[..., Phase], served: Endpoint
) -> None:
    phase = ready({"rules": ["email"], "patterns": {"ticket": r"T-\d+"}})
    write(phase, "UPDATE articles SET body = 'ask ann@example.org about T-77 or T-78' WHERE id = 1")
    load_embeddings.apply(phase)
    assert "cookie leaks\nask <email> about <ticket> or <ticket>" in served.texts
    assert not [t for t in served.texts if "ann@" in t]
    assert load_embeddings.verify(phase).passed, "the hash is that of the text as it stands in the table"
    assert phase.ledger.latest("masking") == {"texts": 200, "values": {"email": 1, "ticket": 2}}
    assert "ann@" not in str(phase.ledger.entries())


def test_query_texts_are_masked_too(make_params: MakeParams, served: Endpoint) -> None:
    from runbook_lib.benchmark.query_set import Query

    p = make_params(embeddings=section(served), masking={"rules": ["email"]})
    embedding.query_vectors(p, [Query("q1", "mail of ann@example.org")])
    assert served.texts == ["mail of <email>"]


def test_no_lock_is_held_on_the_table_or_the_queue_while_the_endpoint_is_asked(
    ready: Callable[..., Phase], served: Endpoint
) -> None:
    phase = ready()
    write(phase, "DELETE FROM runbook.articles_queue; UPDATE articles SET body = 'new' WHERE id <= 3")
    held: list[int] = []

    def look(texts: list[str]) -> Answer | None:
        rows = phase.ledger.connection.execute(
            "SELECT count(*) AS n FROM pg_locks WHERE locktype IN ('relation', 'transactionid') AND pid = %s",
            [phase.connection.info.backend_pid],
        ).fetchone()
        assert rows is not None
        held.append(rows["n"])
        return None

    served.judge = look
    assert change_queue.drain(phase) == change_queue.Drained(changes=3, updated=3, refused=0)
    assert held == [0]


def test_embeddings_answer_is_out_of_order_in_these_tests() -> None:
    assert [item["index"] for item in embeddings(["a", "b"])["data"]] == [1, 0]
