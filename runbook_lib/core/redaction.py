"""Secrets that this process has read, kept out of everything that it prints, records or raises.

Whoever reads one says so here. What leaves the process (a kernel's messages, the console, the ledger, files of the
record, errors, hooks) goes through :func:`redacted`, which knows each secret in the forms that it may take: encoded
for a URL, for JSON, HTML, SQL or a shell, in Base64 or hex, coloured, and split over lines.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict

from runbook_lib.core import conninfo_masking
from runbook_lib.core.conninfo_masking import MASK

if TYPE_CHECKING:
    from runbook_lib.params import Params

# Shorter ones, or words, would be found in every message; those of a connection string are masked in the messages
# about the connection all the same, see conninfo_masking.
SHORTEST, SHORTEST_WORD = 5, 8
# Of a webhook's path: "services" is none, a token is.
SHORTEST_TOKEN = 16
# Shorter runs of Base64 turn up in any picture.
SHORTEST_BASE64 = 8

# The names of fields in what the library writes.
FIELD = re.compile("[a-z_]+")

# What may stand between two letters of a secret: line ends and blanks, backslashes of any depth of quoting, colours,
# marks where a line may break.
_MARKS = r"(?:\x1b|\\u001b|\\x1b)\[[0-9;]*m|<wbr>|</?span[^<>]*>"
_GAP = rf"(?:\s|{_MARKS}|\\[nrt]?)"

# As tuples, so that the pattern of what is known now is found in the cache.
_secrets: tuple[str, ...] = ()
_names: frozenset[str] = frozenset()


def read_with(params: Params) -> None:
    """Remembers what the variables that the parameters name hold, and PGPASSWORD.

    Names in the parameters are shown in every record, so a password that is one of them is not kept from it.
    """
    global _names
    _names |= frozenset(_texts(params.for_record()))
    remember(os.environ.get("PGPASSWORD", ""))
    for variable in (params.connection.dsn_env, params.search.read_dsn_env):
        remember_conninfo(os.environ.get(variable or "", ""))
    remember(os.environ.get(params.embeddings.api_key_env or "", "").strip())
    remember_url(os.environ.get(params.notify.webhook_env or "", "").strip())


def remember(*secrets: str) -> None:
    """Keeps these out of what leaves the process from now on; not one that a common word or a name would be."""
    global _secrets
    new = {s for s in secrets if _is_unmistakable(s)} - _names - {*_secrets}
    if new:
        _secrets = (*_secrets, *sorted(new))


def remember_conninfo(conninfo: str) -> None:
    """What may have been meant as a password in a connection string."""
    global _names
    try:
        known = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        known = {}
    secret = conninfo_masking.SECRET_KEYWORDS
    _names |= {str(value) for key, value in known.items() if key not in secret}
    remember(*conninfo_masking.meant(conninfo))


def remember_url(url: str) -> None:
    """A URL that is a secret as a whole, and what in it is one by itself: credentials, tokens in path and query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        remember(url)
        return
    remember(url, unquote(url), parts.password or "", parts.username or "")
    values = [value for _, value in parse_qsl(parts.query)]
    segments = [unquote(s) for s in parts.path.split("/") if len(s) >= SHORTEST_TOKEN or _is_mixed(s)]
    remember(parts.path if segments else "", parts.query, *values, *segments)


def redacted(value: Any) -> Any:
    """Plain data, or a text, with every secret replaced; what is neither comes back as it is."""
    if not _secrets:
        return value
    if isinstance(value, str):
        return _masked(value)
    if isinstance(value, Mapping):
        # A field's name is ours, not data; masked because a password is the same word, nothing would find the field.
        return {key if _is_field(key) else redacted(key): redacted(inner) for key, inner in value.items()}
    return [redacted(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_field(key: Any) -> bool:
    return isinstance(key, str) and FIELD.fullmatch(key) is not None


def _masked(text: str) -> str:
    needles, pattern = _known(_secrets)
    # The pattern is slow, for it allows a gap behind each letter; hardly any text needs it.
    flat = _flat(text)
    return pattern.sub(MASK, text) if any(needle in flat for needle in needles) else text


@lru_cache(maxsize=1)
def _known(secrets: tuple[str, ...]) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """What to look for first, in a text without gaps, and the pattern of all forms, longest first."""
    forms = {form: False for secret in secrets for form in _as_written(secret)}
    forms |= {form: True for secret in secrets for form in _in_letters_of_any_case(secret)}
    longest_first = sorted(forms, key=len, reverse=True)
    needles = tuple({_flat(form) for form in forms})
    return needles, re.compile("|".join(_with_gaps(form, forms[form]) for form in longest_first))


def _flat(text: str) -> str:
    """Without any gap, in small letters."""
    flat = "".join(re.sub(_MARKS, "", text).split())
    for gap in ("\\n", "\\r", "\\t", "\\"):
        flat = flat.replace(gap, "")
    return flat.lower()


def _with_gaps(form: str, any_case: bool) -> str:
    letters = f"{_GAP}*".join(re.escape(letter) for letter in form)
    return f"(?i:{letters})" if any_case else letters


def _as_written(secret: str) -> Iterator[str]:
    """As text, as a literal of several languages, and in Base64; each also inside JSON."""
    escaped = secret.replace("\\", "\\\\")
    texts = {secret, repr(secret)[1:-1], html.escape(secret), shlex.quote(secret).strip("'")}
    texts |= {escaped.replace("'", "\\'"), escaped.replace('"', '\\"'), secret.replace("'", "''")}
    for text in texts:
        yield text
        yield json.dumps(text)[1:-1]
        yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield from _in_base64(secret.encode(errors="surrogateescape"))


def _in_letters_of_any_case(secret: str) -> Iterator[str]:
    content = secret.encode(errors="surrogateescape")
    yield content.hex()
    # In a form that percent signs make, %2f is %2F.
    yield from {quote(content), quote(content, safe=""), quote_plus(content)} - {secret}


def _in_base64(content: bytes) -> Iterator[str]:
    """By itself and inside something longer ("user:password"), as it comes out at each of the three places."""
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + content).decode()
        core = encoded[-(-before * 8 // 6) : (before + len(content)) * 8 // 6]
        if len(core) >= SHORTEST_BASE64:
            yield core
            yield core.translate(str.maketrans("+/", "-_"))


def _is_unmistakable(secret: str) -> bool:
    return len(secret) >= SHORTEST_WORD or (len(secret) >= SHORTEST and _is_mixed(secret))


def _is_mixed(text: str) -> bool:
    """Of more than one kind of letter: small, large, digit, other."""
    return len({0 if c.islower() else 1 if c.isupper() else 2 if c.isdigit() else 3 for c in text}) > 1


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _texts(each)]
