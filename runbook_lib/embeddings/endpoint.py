"""An OpenAI-compatible embeddings endpoint: batches, bounded retries, and a key that is never written anywhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import numpy as np
import tenacity

from runbook_lib.core import redaction
from runbook_lib.core.gates import BadInput, Gate, RunbookError, Verdict
from runbook_lib.embeddings.sources import Vectors
from runbook_lib.params import Params
from runbook_lib.params.data import Embeddings

if TYPE_CHECKING:
    import httpx

# 408, 425 and 429 ask for patience; 5xx is the server's trouble, not the request's.
PASSING = frozenset({408, 409, 425, 429})
# The endpoint says that it is this text which it cannot take: too long, or not to its liking.
REFUSALS = frozenset({400, 413, 422})
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
# A server that asks for more patience than this is away.
LONGEST_RETRY_AFTER_S = 300.0
SHOWN_CHARACTERS = 200


class EndpointAway(RunbookError):
    """The endpoint gave no answer in all the tries, or none that can be read. No row is to blame."""


class TextRefused(RunbookError):
    """The endpoint cannot take what it was sent."""


class _Passing(Exception):
    """A failure that may be over at the next try; ``wait_s`` is the server's own wish, or None."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


def model(params: Params) -> Callable[[list[str]], Vectors]:
    """A function from texts to vectors, shape (number of texts, dimensions of the model).

    Raises BadInput where the key is not in the environment, or the endpoint does not know key, address or model;
    EndpointAway after ``request_tries``; TextRefused where a text is to blame.
    """
    # Imported here: every phase imports this module, and few have an endpoint.
    import httpx

    e = params.embeddings
    key = _key(e)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = httpx.Client(timeout=e.request_timeout_s, headers=headers)
    asked: dict[str, Any] = {"model": e.model, "encoding_format": "float"}
    if e.send_dimensions:
        asked["dimensions"] = params.vector.dimension

    def embed(texts: list[str]) -> Vectors:
        parts = [texts[i : i + e.request_texts] for i in range(0, len(texts), e.request_texts)]
        pool, over = ThreadPoolExecutor(e.parallel_requests), threading.Event()
        try:
            vectors = list(pool.map(lambda part: _ask(client, e, asked, part, over), parts))
        except Exception:
            # The others give up with the one that failed, so that nothing is asked for in vain.
            over.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if len({v.shape[1] for v in vectors}) > 1:
            raise _unreadable(e, "vectors of different dimensions")
        return np.concatenate(vectors) if vectors else np.zeros((0, params.vector.dimension), dtype=np.float32)

    return embed


def _key(e: Embeddings) -> str:
    if e.api_key_env is None:
        return ""
    # A line end comes with many a file that the variable was filled from.
    key = os.environ.get(e.api_key_env, "").strip()
    redaction.remember(key)
    if key and key.isascii() and key.isprintable():
        return key
    subject = f"environment variable {e.api_key_env}"
    found = "a character that no header of HTTP may hold" if key else "not set"
    raise cannot_load(subject, found, "the endpoint's key", f"export {e.api_key_env}=…")


def cannot_load(
    subject: str, found: str, needed: str, do: str, danger: str = "no text could be embedded; nothing was started"
) -> BadInput:
    """The model that the parameters name cannot be used at all."""
    return BadInput([Gate("embed.model_can_be_loaded", Verdict.FAIL, subject, found, needed, danger, do)])


def _ask(
    client: httpx.Client, e: Embeddings, asked: dict[str, Any], texts: list[str], over: threading.Event
) -> Vectors:
    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wished = error.wait_s if isinstance(error, _Passing) else None
        return backoff(state) if wished is None else wished

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        seconds = state.next_action.sleep if state.next_action else 0.0
        print(f"  endpoint: {error}; try {state.attempt_number + 1} of {e.request_tries} in {seconds:.1f} s")

    backoff = tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
    tries = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(e.request_tries) | tenacity.stop_when_event_set(over),
        sleep=tenacity.sleep_using_event(over),
        wait=wait,
        retry=tenacity.retry_if_exception_type(_Passing),
        before_sleep=say,
        reraise=True,
    )
    try:
        return tries(_ask_once, client, e, asked | {"input": texts})
    except _Passing as error:
        raise EndpointAway(
            found=f"{error}, after {e.request_tries} tries at {e.url}",
            needed="an answer",
            danger="the rows of this batch have no vectors yet; what was done before them is kept",
            do="look at the endpoint's limits and state, and run this phase again: it resumes where it stopped",
        ) from None


def _ask_once(client: httpx.Client, e: Embeddings, body: dict[str, Any]) -> Vectors:
    import httpx

    try:
        answer = client.post(str(e.url), json=body)
    except httpx.TimeoutException as error:
        raise _Passing(f"no answer within {e.request_timeout_s:g} s") from error
    except httpx.TransportError as error:
        raise _Passing(f"{type(error).__name__}: {error}") from error
    status = answer.status_code
    if status in PASSING or status >= 500:
        raise _Passing(f"status {status}", _retry_after(answer))
    if status != HTTPStatus.OK:
        raise _refusal(e, answer, body["input"])
    return _vectors(e, answer, len(body["input"]))


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the server asks for: RFC 9110, 10.2.3, a number or a date."""
    value = answer.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def _refusal(e: Embeddings, answer: httpx.Response, texts: Sequence[str]) -> RunbookError:
    found = f"status {answer.status_code}{_message(answer, texts)}"
    if answer.status_code in REFUSALS:
        return TextRefused(
            found=found,
            needed="a vector for each text",
            danger="rows without a vector are never found by the new search",
            do="shorten these texts, or choose a model that takes them",
        )
    do = "check embeddings.url, embeddings.model and the key in the variable that embeddings.api_key_env names"
    return cannot_load(str(e.url), found, "status 200", do)


def _message(answer: httpx.Response, texts: Sequence[str]) -> str:
    """What the endpoint says, without the key, and not at all where it repeats a text."""
    try:
        error = answer.json()["error"]
        message = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return ""
    if any(t[:SHOWN_CHARACTERS] in message or message in t for t in texts):
        return ", with a message that repeats the text"
    return ": " + str(redaction.redacted(" ".join(message.split())))[:SHOWN_CHARACTERS]


def _vectors(e: Embeddings, answer: httpx.Response, n: int) -> Vectors:
    try:
        data = sorted(answer.json()["data"], key=lambda item: item["index"])
        indexes = [item["index"] for item in data]
        vectors = np.array([item["embedding"] for item in data], dtype=np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(e, f"{type(error).__name__} while reading the answer") from error
    if indexes != list(range(n)) or vectors.ndim != 2:
        raise _unreadable(e, f"{len(data)} vectors for {n} texts")
    return vectors


def _unreadable(e: Embeddings, found: str) -> EndpointAway:
    return EndpointAway(
        found=f"{found}, from {e.url}",
        needed='{"data": [{"index": 0, "embedding": [number, …]}, …]}, one for each text',
        danger="a vector that is read wrongly would stand for a text that it was not made of",
        do="check that embeddings.url is that of an OpenAI-compatible endpoint, …/v1/embeddings",
    )
