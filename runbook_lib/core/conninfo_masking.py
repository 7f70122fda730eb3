"""No part of a password in a message, whatever libpq took the connection string for.

A password with ``@``, ``/`` or a blank that was not encoded is read by libpq as part of a host, a port or a path, and
comes back in its errors. So everything that may have been meant as the password is masked, rather too much than too
little.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from urllib.parse import quote, quote_plus, unquote, unquote_plus

import psycopg
from psycopg.conninfo import conninfo_to_dict

# A shorter run of letters gives nothing away, and is found in every message.
SHORTEST_PART = 3
MASK = "***"
SECRET_KEYWORDS = ("password", "sslpassword", "passwd", "pwd", "scram_client_key", "scram_server_key")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
_KEYWORD = re.compile(rf"\b(?:{'|'.join(SECRET_KEYWORDS)})\s*=\s*", re.I)
# Where the value of a keyword ends, if it was not quoted: at the next keyword that libpq may know.
_NEXT_KEYWORD = re.compile(
    r"\s+(?:host\w*|port|user|dbname|service|passfile|options|connect_timeout|application_name|ssl\w+|gss\w+|krb\w+"
    r"|client_encoding|keepalives\w*|tcp_user_timeout|replication|channel_binding|require_auth|target_session_attrs"
    r"|load_balance_hosts|fallback_application_name)\s*=",
    re.I,
)


def masked(message: str, *conninfos: str) -> str:
    """The message on one line, with every run of three letters or more that a password has masked."""
    flat = _flat(message)
    hidden = bytearray(len(flat))
    for secret in _forms(conninfos):
        for start in range(len(flat) - SHORTEST_PART + 1):
            end = start + SHORTEST_PART
            if flat[start:end] in secret:
                hidden[start:end] = b"\x01" * SHORTEST_PART
    shown = "".join("\0" if hide else letter for letter, hide in zip(flat, hidden, strict=True))
    return re.sub("\0+", MASK, shown)


def _forms(conninfos: tuple[str, ...]) -> set[str]:
    secrets = {secret for conninfo in conninfos for secret in meant(conninfo)} | {os.environ.get("PGPASSWORD", "")}
    encodings = (str, quote, quote_plus, unquote, unquote_plus, _flat)
    forms = {encode(secret) for secret in secrets for encode in encodings}
    return {form for form in forms if len(form) >= SHORTEST_PART}


def _flat(text: str) -> str:
    return " ".join(text.split())


def meant(conninfo: str) -> set[str]:
    """Everything that may have been meant as a password, read more generously than libpq reads."""
    found: set[str] = set()
    with suppress(psycopg.ProgrammingError):  # not one to libpq: what was meant is read below
        found |= {str(v) for k, v in conninfo_to_dict(conninfo).items() if k in SECRET_KEYWORDS}
    if scheme := _URL.match(conninfo):
        rest = conninfo[scheme.end() :]
        before = rest[: rest.rindex("@")] if "@" in rest else ""
        if ":" in before:
            found.add(before.split(":", 1)[1])
        # With an & that was not encoded the password goes on behind it, up to the next keyword.
        found |= {re.split(r"&(?=[a-z_]{3,}=)", rest[m.end() :])[0] for m in _KEYWORD.finditer(rest)}
        return found
    if "@" in conninfo:
        # An address without its "://": everything between the first colon behind any slashes and the last @.
        before = re.sub(r"^[a-z]*:?/+", "", conninfo[: conninfo.rindex("@")])
        found.add(before.split(":", 1)[-1])
    for m in _KEYWORD.finditer(conninfo):
        value = conninfo[m.end() :]
        end = _NEXT_KEYWORD.search(value)
        found.add(value[: end.start()] if end else value)
        if value.startswith("'"):
            found.add(re.sub(r"\\(.)", r"\1", value[1:].split("'")[0]))
    return found
