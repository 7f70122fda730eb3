"""Shapes of personal and secret data in text: counted by preflight, and masked before a text leaves for the model.

A value found is replaced by a placeholder such as ``<email>``, the same for every value, so that a text keeps its
meaning and the vector does not depend on whose address stands in it. Counts leave this module, values never do.
"""

from __future__ import annotations

import ipaddress
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, Protocol

import phonenumbers

from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.params.data import Masking

# (start, end) of every value of one kind in a text.
Finder = Callable[[str], Iterable[tuple[int, int]]]

# Tried once in a run of such characters: tried at each of them, a long run would take the square of its length.
EMAIL = re.compile(r"(?<![\w.+-])[.+-]*(\w[\w.+-]*@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b)")
# A full stop ends a sentence, and is no part of a number unless a digit follows.
CARD = re.compile(r"(?<!\d)(?<!\d\.)(?:\d[ -]?){12,18}\d(?!\d|\.\d)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
IP_V4 = re.compile(r"(?<!\w)(?<!\w\.)\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\w)")
IP_V6 = re.compile(r"(?<![\w:])(?<!\w\.)(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|(?<=::))(?!\w|:[\w:]|\.\w)")
# Prefixes that their makers publish so that scanners find them; below, anything as long and as mixed as a key.
KNOWN_TOKEN = re.compile(
    r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_\w{36,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|[rs]k_(?:live|test)_\w{16,})\b"
    r"|(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
)
LONG_TOKEN = re.compile(r"(?<![\w-])[\w-]{32,}(?![\w-])", re.ASCII)
# An international number without its + cannot be told from an order number: it needs masking.phone_region.
ONLY_INTERNATIONAL = None
# A text takes milliseconds, unless an expression tries every way to read it.
LONGEST_SEARCH_S = 10.0


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


def _is_mixed(text: str) -> bool:
    return any(c.isdigit() for c in text) and any(c.isalpha() for c in text)


def _found(text: str, pattern: re.Pattern[str], holds: Callable[[str], bool]) -> Iterator[tuple[int, int]]:
    return (m.span() for m in pattern.finditer(text) if holds(m.group()))


def _emails(text: str) -> Iterable[tuple[int, int]]:
    # Looking for the sign first is a hundred times cheaper than the expression, and most texts have none.
    return (m.span(1) for m in EMAIL.finditer(text)) if "@" in text else ()


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    """The longest run of groups may take in the word after the number; shorter ones are tried before it is let go."""
    for match in IBAN.finditer(text):
        value = match.group()
        ends = [len(value), *(m.start() for m in re.finditer(" ", value))]
        end = next((e for e in sorted(ends, reverse=True) if e >= 15 and _is_iban(value[:e])), None)
        if end is not None:
            yield match.start(), match.start() + end


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    yield from _found(text, IP_V4, _is_address)
    if "::" in text or text.count(":") >= 7:
        yield from _found(text, IP_V6, _is_address)


def _tokens(text: str) -> Iterator[tuple[int, int]]:
    yield from (m.span() for m in KNOWN_TOKEN.finditer(text))
    yield from _found(text, LONG_TOKEN, _is_mixed)


def _phones(region: str | None) -> Finder:
    def find(text: str) -> Iterator[tuple[int, int]]:
        if region or "+" in text:
            yield from ((m.start, m.end) for m in phonenumbers.PhoneNumberMatcher(text, region))

    return find


# In the order in which they are masked: a card number is not to be read as a telephone's, nor an IBAN as a token.
FINDERS: dict[str, Finder] = {
    "email": _emails,
    "iban": _ibans,
    "card": lambda text: _found(text, CARD, _is_card),
    "ip": _addresses,
    "token": _tokens,
    "phone": _phones(ONLY_INTERNATIONAL),
}
# What preflight calls them.
KINDS = {
    "email": "e-mail addresses",
    "card": "payment card numbers",
    "iban": "IBANs",
    "ip": "IP addresses",
    "token": "long tokens",
    "phone": "telephone numbers",
}


@dataclass(frozen=True)
class Rule:
    """One kind of value, and how it is found."""

    name: str
    find: Finder


def rules(masking: Masking) -> tuple[Rule, ...]:
    """The rules that the parameters name: named entities last, since what the others left is language.

    Raises BadInput where presidio-analyzer is wanted and not installed.
    """
    finders = FINDERS | {"phone": _phones(masking.phone_region)}
    wanted = [Rule(name, finder) for name, finder in finders.items() if name in masking.rules]
    wanted += [Rule(name, _pattern(name, pattern)) for name, pattern in masking.patterns.items()]
    return (*wanted, Rule("named_entity", _named_entities())) if masking.named_entities else tuple(wanted)


def _pattern(name: str, pattern: str) -> Finder:
    compiled = re.compile(pattern)

    def find(text: str) -> list[tuple[int, int]]:
        try:
            with _bounded(LONGEST_SEARCH_S):
                return [m.span() for m in compiled.finditer(text) if m.group()]
        except TimeoutError as error:
            found = f"not through a text of {len(text)} characters in {LONGEST_SEARCH_S:g} s of processor time"
            needed = "an expression whose time grows with the text, not with the ways to read it"
            do = "write it without a repetition inside a repetition: (a+)+ finds what a+ does"
            raise BadInput([_cannot_mask(found, do, f"masking.patterns.{name}", needed)]) from error

    return find


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds of processor time. Python's re gives way to signals alone, which only
    the main thread takes; ITIMER_VIRTUAL is used by nothing else here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _Analyzer(Protocol):
    def analyze(self, *, text: str, language: str, entities: list[str]) -> list[Any]: ...


def _named_entities() -> Finder:
    analyzer = _analyzer()

    def find(text: str) -> Iterator[tuple[int, int]]:
        for result in analyzer.analyze(text=text, language="en", entities=["PERSON", "LOCATION", "NRP"]):
            yield result.start, result.end

    return find


@cache
def _analyzer() -> _Analyzer:
    try:
        from presidio_analyzer import AnalyzerEngine
    except ImportError as error:
        raise BadInput([_cannot_mask(str(error), "pip install 'pgvector-runbook[masking]'")]) from error
    try:
        return AnalyzerEngine()  # type: ignore[no-any-return]
    # Without its language model presidio asks spaCy's command line to fetch it, which may end in SystemExit.
    except (OSError, ImportError, SystemExit) as error:
        do = "python -m spacy download en_core_web_lg, or carry the package of that model to this machine"
        raise BadInput([_cannot_mask(f"{type(error).__name__}: {error}", do)]) from error


def _cannot_mask(
    found: str,
    do: str,
    subject: str = "masking.named_entities",
    needed: str = "presidio-analyzer with a language model",
) -> Gate:
    danger = "values would leave for the model unmasked; no text of this batch was sent"
    return Gate("masking.rules_can_be_applied", Verdict.FAIL, subject, found, needed, danger, do)


def mask(texts: Sequence[str], wanted: Sequence[Rule]) -> tuple[list[str], Counter[str]]:
    """The texts with every value replaced by ``<rule>``, and how many values each rule replaced."""
    counts: Counter[str] = Counter()
    return [mask_one(text, wanted, counts)[0] for text in texts] if wanted else list(texts), counts


@dataclass(frozen=True)
class Replaced:
    """What one rule replaced in a text: where it stood, and how long its placeholder is."""

    spans: Sequence[tuple[int, int]]
    placeholder: int

    def before(self, place: int, *, is_end: bool) -> int:
        """A place in the text before it, from one in the text after it. is_end: of a part, so that it takes in the
        whole of a value that was replaced, as the beginning does by itself."""
        longer = 0
        for start, stop in self.spans:
            if place + longer <= start:
                break
            if place + longer < start + self.placeholder:
                return stop if is_end else start
            longer += (stop - start) - self.placeholder
        return place + longer


def mask_one(text: str, wanted: Sequence[Rule], counts: Counter[str]) -> tuple[str, list[Replaced]]:
    """The text with every value replaced, and what was replaced, rule by rule."""
    replaced = []
    for rule in wanted:
        spans = _disjoint(rule.find(text))
        if spans:
            counts[rule.name] += len(spans)
            placeholder = f"<{rule.name}>"
            parts, end = [], 0
            for start, stop in spans:
                parts += [text[end:start], placeholder]
                end = stop
            text = "".join([*parts, text[end:]])
            replaced.append(Replaced(spans, len(placeholder)))
    return text, replaced


def _disjoint(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    kept: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if kept and start < kept[-1][1]:
            kept[-1] = (kept[-1][0], max(stop, kept[-1][1]))
        else:
            kept.append((start, stop))
    return kept


def masked(params: Params, texts: Sequence[str]) -> list[str]:
    """The texts as the model may see them."""
    return mask(texts, rules(params.masking))[0]


def note(phase: Phase, counts: Counter[str], texts: int) -> None:
    """A ledger row of how many values each rule replaced; of the values nothing is written down."""
    if phase.params.masking != Masking():
        phase.note("masking", {"texts": texts, "values": dict(sorted(counts.items()))})


def count(texts: Iterable[str]) -> dict[str, int]:
    """How many of these texts hold each kind at least once, in preflight's words. No text leaves this function."""
    found = dict.fromkeys(KINDS.values(), 0)
    for text in texts:
        for name, kind in KINDS.items():
            found[kind] += any(True for _ in FINDERS[name](text))
    return found
