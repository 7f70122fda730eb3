"""What is masked and what is left, in which words; no value leaves the module."""

import time
from collections.abc import Callable

import pytest

from runbook_lib.core.gates import BadInput
from runbook_lib.embeddings import masking
from runbook_lib.params import Params

MakeParams = Callable[..., Params]
ALL = ["email", "phone", "card", "iban", "ip", "token"]


def masked(make_params: MakeParams, text: str, **more: object) -> tuple[str, dict[str, int]]:
    p = make_params(masking={"rules": ALL} | more)
    texts, counts = masking.mask([text], masking.rules(p.masking))
    return texts[0], dict(counts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail bob@example.com or ann.b+c@mail.example.co.uk.", "mail <email> or <email>."),
        ("card 5500-0000-0000-0004 was refused", "card <card> was refused"),
        ("card 4111 1111 1111 1111", "card <card>"),
        ("pay DE89 3704 0044 0532 0130 00 today", "pay <iban> today"),
        ("pay GB82WEST12345698765432 TODAY", "pay <iban> TODAY"),
        ("from 192.168.10.20, 2001:db8::ff00:42:8329 and ::1", "from <ip>, <ip> and <ip>"),
        ("key sk_live_4eC39HqLyjWDarjtT1zdp7dcABCD here", "key <token> here"),
        ("id AKIAIOSFODNN7EXAMPLE here", "id <token> here"),
        ("Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "Bearer <token>"),
        ("call +49 30 901820 or +1 212-555-0123", "call <phone> or <phone>"),
        ("two@a.example,three@b.example", "<email>,<email>"),
        ("paid by 4111 1111 1111 1111. From 10.0.0.1. Or ::1.", "paid by <card>. From <ip>. Or <ip>."),
        ("from 10.0.0.1: no, from fe80::1: no", "from <ip>: no, from <ip>: no"),
        ("...bob@example.com, -x+y@example.com", "...<email>, -<email>"),
    ],
)
def test_values_become_stable_placeholders(make_params: MakeParams, text: str, expected: str) -> None:
    found, counts = masked(make_params, text)
    assert found == expected
    assert sum(counts.values()) == expected.count("<")
    assert masked(make_params, expected) == (expected, {}), "what is masked is left alone"


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",
        "DE88370400440532013000",
        "version 1.2.3 of 2026-11-22 10:20:30, in std::vector and a::join",
        "999.1.1.1",
        "1.2.3.4.5 of 10.0.0.1.example.com, 0.4111111111111111 and 4111111111111111.5",
        "an ordinary sentence, with CWE-79, CVE-2024-12345 and 12345678",
        "a_very_long_identifier_without_any_digit_in_it",
        "order 0049 30 901820",
    ],
)
def test_near_misses_are_left_alone(make_params: MakeParams, text: str) -> None:
    assert masked(make_params, text) == (text, {})


def test_numbers_of_a_country_are_found_where_it_is_named(make_params: MakeParams) -> None:
    assert masked(make_params, "call (212) 555-0123", phone_region="US")[0] == "call <phone>"
    assert masked(make_params, "call (212) 555-0123")[0] == "call (212) 555-0123"


def test_own_patterns_come_with_their_own_name(make_params: MakeParams) -> None:
    text, counts = masked(make_params, "T-17 of A-1, by ann@example.org", patterns={"ticket": r"T-\d+"})
    assert (text, counts) == ("<ticket> of A-1, by <email>", {"email": 1, "ticket": 1})


def test_without_rules_texts_stay_as_they_are(make_params: MakeParams) -> None:
    assert masking.masked(make_params(), ["ann@example.org"]) == ["ann@example.org"]


@pytest.mark.parametrize(
    ("pattern", "needed"),
    [
        ("(", "ticket is not a regular expression: missing ), unterminated subpattern at position 0"),
        ("x*", "ticket matches the empty string, so it would mask every position of a text"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused_before_the_start(
    make_params: MakeParams, pattern: str, needed: str
) -> None:
    with pytest.raises(BadInput) as error:
        make_params(masking={"patterns": {"ticket": pattern}})
    assert error.value.needed == needed


@pytest.mark.attack
@pytest.mark.parametrize("text", ["a." * 20_000 + "@", "x@" + "b." * 20_000 + "1", "-eyJaaaaaaaa" * 10_000])
def test_no_text_takes_the_square_of_its_length(make_params: MakeParams, text: str) -> None:
    began = time.process_time()
    masked(make_params, text)
    assert time.process_time() - began < 4


@pytest.mark.attack
def test_a_pattern_that_never_ends_is_named_in_bounded_time(
    make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "LONGEST_SEARCH_S", 0.1)
    with pytest.raises(BadInput) as error:
        masked(make_params, "a" * 40 + "!", patterns={"letters": r"(a+)+$"})
    assert str(error.value) == (
        "\nFAIL    masking.rules_can_be_applied   masking.patterns.letters\n"
        "  found   not through a text of 41 characters in 0.1 s of processor time\n"
        "  needed  an expression whose time grows with the text, not with the ways to read it\n"
        "  danger  values would leave for the model unmasked; no text of this batch was sent\n"
        "  do      write it without a repetition inside a repetition: (a+)+ finds what a+ does"
    )
    assert masked(make_params, "aab", patterns={"letters": r"a+"})[0] == "<letters>b"


def test_named_entities_without_the_extra_are_bad_input(
    make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    masking._analyzer.cache_clear()
    with pytest.raises(BadInput) as error:
        masking.rules(make_params(masking={"named_entities": True}).masking)
    assert str(error.value) == (
        "\nFAIL    masking.rules_can_be_applied   masking.named_entities\n"
        "  found   import of presidio_analyzer halted; None in sys.modules\n"
        "  needed  presidio-analyzer with a language model\n"
        "  danger  values would leave for the model unmasked; no text of this batch was sent\n"
        "  do      pip install 'pgvector-runbook[masking]'"
    )


def test_named_entities_are_masked_by_the_analyzer(make_params: MakeParams, monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        start, end = 0, 3

    class Analyzer:
        def analyze(self, *, text: str, language: str, entities: list[str]) -> list[Result]:
            return [Result()]

    monkeypatch.setattr(masking, "_analyzer", Analyzer)
    text, counts = masked(make_params, "Ann wrote", named_entities=True)
    assert (text, counts) == ("<named_entity> wrote", {"named_entity": 1})
