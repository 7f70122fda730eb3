"""How much of a text a model reads is measured; what it never reads is told before anything starts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib.core.phase import Phase
from runbook_lib.embeddings import reading
from runbook_lib.embeddings.endpoint import EndpointAway, TextRefused
from runbook_lib.migrate import preflight, text_lengths
from tests import toy

CUT = 1000


def first_thousand(texts: list[str]) -> np.ndarray:
    """A model that drops what stands behind its first thousand characters, as most do."""
    return toy.embed([text[:CUT] for text in texts])


def refusing(texts: list[str]) -> np.ndarray:
    """A model that takes no text longer than that, as some endpoints do."""
    if any(len(text) > CUT for text in texts):
        raise TextRefused("400", "a shorter text", "", "")
    return toy.embed(texts)


def away(texts: list[str]) -> np.ndarray:
    raise EndpointAway("503", "", "", "")


@pytest.mark.parametrize("longest", [1200, 5000, 400_000])
@pytest.mark.parametrize("model", [first_thousand, refusing])
def test_the_limit_is_found_to_a_hundredth(model: Callable[[list[str]], np.ndarray], longest: int) -> None:
    found = reading.measured(model, longest)
    assert found.characters is not None and abs(found.characters - CUT) <= 0.03 * CUT
    assert found.refuses == (model is refusing)
    assert found.unread(CUT // 2) == 0 and found.unread(2 * CUT) == 2 * CUT - found.characters


@pytest.mark.parametrize(
    ("model", "longest"), [(toy.embed, 50_000), (toy.embed, 0), (first_thousand, 900), (away, 300)]
)
def test_what_reads_everything_has_no_limit(model: Callable[[list[str]], np.ndarray], longest: int) -> None:
    assert reading.measured(model, longest) == reading.Read(None)


def test_a_model_that_is_away_is_not_taken_for_one_with_a_limit() -> None:
    with pytest.raises(EndpointAway):
        reading.measured(away, 5000)


def test_the_share_that_is_never_read_is_told_and_agreed_to(
    articles: psycopg.Connection[Any], open_phase: Callable[..., Phase]
) -> None:
    # A quarter of the rows has 4,000 characters, of which the model reads a thousand.
    articles.execute("UPDATE articles SET title = NULL, body = rpad(body, 400, ' word')")
    articles.execute("UPDATE articles SET body = rpad(body, 4000, ' word') WHERE id % 4 = 0")
    model = {"source": "callable", "callable": "tests.test_text_lengths:first_thousand"}
    phase = open_phase("00_preflight", embeddings=model)
    (gate,) = preflight.look(phase).failed
    assert gate.name == "embed.texts_are_read_whole"
    assert gate.found.startswith(
        "400 characters at the median, 4,000 at most, by 201 rows; the model reads about the"
    )
    assert gate.found.endswith("% of the text, in 25 % of the rows, would never be read")
    share = gate.figures["unread_percent"]
    assert share == pytest.approx(100 * 50 * 3000 / (150 * 400 + 50 * 4000), abs=1)
    assert gate.do.endswith("embeddings.accept_unread_percent: 58")
    assert gate.needed == "at most 5 % of the text, as embeddings.accept_unread_percent says"
    accepted = open_phase("00_preflight", embeddings=model | {"accept_unread_percent": 60})
    assert preflight.look(accepted).passed


def test_vectors_made_elsewhere_have_no_model_to_ask(
    articles: psycopg.Connection[Any], make_params: Callable[..., Any]
) -> None:
    p = make_params(
        embeddings={"source": "table", "callable": None, "table": "public.elsewhere"},
    )
    assert list(text_lengths.gates(articles, p)) == []
