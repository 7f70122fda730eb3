"""Well-known shapes of personal and secret data in text: counted, never shown."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping

EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")
CARD = re.compile(r"(?<![\d.])(?:\d[ -]?){12,18}\d(?![\d.])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
IP = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
TOKEN = re.compile(r"\b(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[A-Za-z0-9_-]{32,}\b")


def _passes_luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: the check digit of payment cards."""
    total = 0
    for i, character in enumerate(reversed(digits)):
        digit = int(character) * (2 if i % 2 else 1)
        total += digit - 9 if digit > 9 else digit
    return total % 10 == 0


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return len(set(digits)) > 1 and _passes_luhn(digits)


def _is_iban(text: str) -> bool:
    """ISO 13616: the country and check digits moved to the end, letters as numbers, leave 1 modulo 97."""
    compact = text.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _is_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


KINDS: Mapping[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "e-mail addresses": (EMAIL, lambda _: True),
    "payment card numbers": (CARD, _is_card),
    "IBANs": (IBAN, _is_iban),
    "IP addresses": (IP, _is_address),
    "long tokens": (TOKEN, lambda _: True),
}


def count(texts: Iterable[str]) -> dict[str, int]:
    """How many of these texts hold each kind at least once. No text leaves this function."""
    found = dict.fromkeys(KINDS, 0)
    for text in texts:
        for kind, (pattern, holds) in KINDS.items():
            found[kind] += any(holds(m.group()) for m in pattern.finditer(text))
    return found
