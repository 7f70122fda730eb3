"""Credentials inside a URL: every value of a params file is shown in each record, so none may stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote_plus

URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.I)
# A password with a slash that was not encoded; what follows a port is a path.
UNENCODED = re.compile(r"[^/:@]*:(?!\d+/)[^@]*@")
# As endpoints, gateways, signed URLs and connection strings call what only their user may know.
SECRET = re.compile(
    r"(.*[-_.]|x)?(token|auth|authorization|bearer|secret|password|passwd|passphrase|pwd|sig|signature|credentials?|jwt"
    r"|sslpassword|accesstoken|authtoken|clientsecret"
    r"|(api|access|account|auth|client|functions?|private|secret|sharedaccess|subscription)[-_.]?key)"
    # As a part of a name they are harmless: country_code, primary_key.
    r"|x?key|code|pass|pw|sas",
    re.I,
)
# How keys of well-known services begin, wherever in the URL they stand.
TOKEN = re.compile(r"(?<![\w-])(sk-|pk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza|eyJ)[\w.-]{12,}")


def found_in(text: str) -> str:
    """What of a URL in this text is a credential, without saying it; empty where there is none."""
    return next((what for url in URL.findall(text) for what in _in_url(url)), "")


def _in_url(url: str) -> Iterator[str]:
    scheme, _, rest = url.partition("://")
    user, at, _ = re.split(r"[/?#\\]", rest)[0].rpartition("@")
    # Of other schemes, a user alone is no secret: postgresql://reader@replica.
    if (at and (":" in user or scheme.lower() in ("http", "https"))) or UNENCODED.match(rest):
        yield "user or password in front of the @"
    for part in re.split(r"[?&;#]", rest)[1:]:
        name, equals, value = part.partition("=")
        if equals and value and SECRET.fullmatch(unquote_plus(name)):
            yield f"a value of {unquote_plus(name)}"
    if TOKEN.search(unquote_plus(rest)):
        yield "what looks like a key of a well-known service"
