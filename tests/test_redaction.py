"""One redaction: each secret that was read, in whatever form it is written."""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.core import redaction
from runbook_lib.embeddings import embedding
from runbook_lib.runner import ending

# A quote, a backslash, and what URLs, HTML and JSON write otherwise.
SECRET = r"""pl4nted p@ss/w0rd+%'"\<ü>"""
WRITTEN: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in a URL": quote,
    "in a query": quote_plus,
    "in a URL, all of it": lambda s: quote(s, safe=""),
    "in a URL, small letters": lambda s: quote(s, safe="").lower(),
    "base64": lambda s: base64.b64encode(s.encode()).decode(),
    "base64 for a URL": lambda s: base64.urlsafe_b64encode(s.encode()).decode(),
    "base64 behind a name": lambda s: base64.b64encode(b"me:" + s.encode()).decode(),
    "base64 behind another": lambda s: base64.b64encode(b"us:" + s.encode() + b"!").decode(),
    "base64 behind a third": lambda s: base64.b64encode(b"them:" + s.encode() + b"!!").decode(),
    "hex": lambda s: s.encode().hex(),
    "JSON": json.dumps,
    "JSON in UTF-8": lambda s: json.dumps(s, ensure_ascii=False),
    "JSON in JSON": lambda s: json.dumps(json.dumps(s)),
    "repr": repr,
    "HTML": html.escape,
    "HTML in JSON": lambda s: json.dumps(html.escape(s)),
    "SQL": lambda s: sql.Literal(s).as_string(),
    "a connection string": lambda s: make_conninfo(password=s),
    "a shell's": shlex.quote,
    "over lines": lambda s: "\n    ".join((s[:9], s[9:14], s[14:])),
    "over lines, in JSON": lambda s: json.dumps("\n".join((s[:9], s[9:]))),
    "in colours": lambda s: f"\x1b[31m{s[:6]}\x1b[39;49m{s[6:]}",
    "in colours of HTML": lambda s: f"{s[:6]}</span><span style='color:red'>{s[6:]}",
}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_secrets", ())
    monkeypatch.setattr(redaction, "_names", frozenset())
    yield


@pytest.mark.attack
@pytest.mark.parametrize("form", WRITTEN)
def test_a_secret_is_found_in_every_form(form: str) -> None:
    written = WRITTEN[form](SECRET)
    redaction.remember(SECRET)
    masked = redaction.redacted(f"before {written} behind")
    assert masked.startswith("before") and masked.endswith("behind") and "***" in masked
    for part in (SECRET[:5], SECRET[-5:], written[6:12], base64.b64encode(SECRET.encode()).decode()[4:12]):
        assert part.lower() not in masked.lower()


def test_nested_data_is_redacted_and_figures_stay() -> None:
    redaction.remember("sk-4711-abc")
    data = {"a sk-4711-abc": [1, 2.5, None, True, ("x", "sk-4711-abc!")], "b": {"c": "fine"}}
    assert redaction.redacted(data) == {"a ***": [1, 2.5, None, True, ["x", "***!"]], "b": {"c": "fine"}}


@pytest.mark.attack
@pytest.mark.parametrize("bounded", [ending._bounded, lambda text: embedding.said(ValueError(text))])
def test_no_half_of_a_secret_is_left_where_an_error_is_cut(bounded: Callable[[str], str]) -> None:
    redaction.remember("sk-4711-abcdef-planted")
    for letters in range(460, 2000):
        assert "sk-4711" not in bounded("x" * letters + "sk-4711-abcdef-planted")


@pytest.mark.parametrize("word", ["", "legacy", "1234", "vector", "a1b2"])
def test_a_common_word_is_no_secret_that_could_be_kept(word: str) -> None:
    redaction.remember(word)
    assert redaction.redacted(f"the route is {word}.") == f"the route is {word}."


def test_a_password_that_is_a_name_in_use_is_shown_where_the_name_is(make_params: Callable[..., Any]) -> None:
    make_params(target={"name": "articles_2026"})
    redaction.remember("articles_2026")
    redaction.remember_conninfo("host=db user=app_owner1 password=app_owner1")
    assert redaction.redacted("articles_2026 of app_owner1") == "articles_2026 of app_owner1"


def test_every_secret_that_the_parameters_name_is_known(
    make_params: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {"RUNBOOK_TEST_DSN": "postgresql://me:d%40ta-4711@h/d", "REPLICA": "host=r password='replic4 pw'"}
    read |= {"KEY": "sk-4711-key\n", "HOOK": "https://hooks.example.com/services/T0/xoxb-4711-abcd?sig=s1gn4ture"}
    for name, value in (read | {"PGPASSWORD": "pg-4711-pw"}).items():
        monkeypatch.setenv(name, value)
    make_params(search={"read_dsn_env": "REPLICA"}, embeddings={"api_key_env": "KEY"}, notify={"webhook_env": "HOOK"})
    secrets = ("d@ta-4711", "d%40ta-4711", "replic4 pw", "sk-4711-key", read["HOOK"], "xoxb-4711-abcd", "s1gn4ture")
    for secret in (*secrets, "pg-4711-pw"):
        assert redaction.redacted(f"x {secret} y") == "x *** y"
    assert redaction.redacted("services at hooks.example.com") == "services at hooks.example.com"


def test_a_field_of_the_library_keeps_its_name_where_a_password_is_the_same_word() -> None:
    redaction.remember("started_at", "Started-At")
    assert redaction.redacted({"started_at": "by started_at", "Started-At": 1}) == {"started_at": "by ***", "***": 1}
