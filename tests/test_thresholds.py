"""Figures against limits: what found and needed say never looks alike where the two differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runbook_lib
from runbook_lib.benchmark import index_recall
from runbook_lib.core import thresholds
from runbook_lib.core.gates import Gate
from runbook_lib.core.phase import Phase
from runbook_lib.core.thresholds import apart, at_least, at_most
from runbook_lib.migrate import live_calls, shadow
from runbook_lib.operate import rebuild_index

GB = 1024 * thresholds.MB


@pytest.mark.parametrize(
    ("write", "found", "needed", "texts"),
    [
        (thresholds.score, 0.9, 0.95, ("0.900", "0.950")),
        (thresholds.score, 0.9496, 0.95, ("0.9496", "0.9500")),
        (thresholds.score, 0.97 - 0.02, 0.95, ("0.950", "0.950")),
        (thresholds.change, -0.0504, -0.05, ("-0.0504", "-0.0500")),
        (thresholds.milliseconds, 26.001, 26.0, ("26.001 ms", "26.000 ms")),
        (thresholds.plain, 10.0, 12.5, ("10", "12.5")),
        (thresholds.plain, 20.004, 20, ("20.004", "20")),
        (thresholds.percent, 0.8996, 0.9, ("89.96 %", "90 %")),
        (thresholds.percent, 0.899996, 0.9, ("89.9996 %", "90 %")),
        (thresholds.size, 64 * thresholds.MB, 2 * GB, ("64 MB", "2.0 GB")),
        (thresholds.size, 64 * thresholds.MB + 200_000, 64 * thresholds.MB, ("64.2 MB", "64.0 MB")),
        (thresholds.size, 64 * thresholds.MB + 1, 64 * thresholds.MB, ("64.000001 MB", "64.000000 MB")),
        (thresholds.duration, 90, 7200, ("90.0 s", "2 h 0 min")),
        (thresholds.duration, 7200.4, 7200, ("7200.4 s", "7200.0 s")),
    ],
)
def test_two_figures_look_alike_only_where_they_are(
    write: thresholds.Writer, found: float, needed: float, texts: tuple[str, str]
) -> None:
    assert apart(found, needed, write) == texts


def test_what_floating_point_makes_of_equal_figures_decides_nothing() -> None:
    assert at_least(0.3, 0.1 + 0.2) and at_most(0.1 + 0.2, 0.3), "0.1 + 0.2 is 0.30000000000000004"
    assert not at_least(0.2999, 0.3) and not at_most(0.3001, 0.3)


def test_no_gate_writes_a_limit_in_digits_of_its_own() -> None:
    by_hand = re.compile(r"""needed=.*?(\{[^}]*:[+,]?\.\d|\{duration\(|f"(at most )?\{size\()""")
    assert by_hand.search('needed=f"at most {found:.3f}"'), "it would find one"
    sources = {path.name: path.read_text() for path in Path(runbook_lib.__file__).parent.rglob("*.py")}
    assert [(name, m[0]) for name, text in sources.items() for m in by_hand.finditer(text)] == []


def said(gate: Gate) -> tuple[str, str, str]:
    return str(gate.verdict), gate.found, gate.needed


def test_what_nobody_judged_is_called_accepted_only_where_it_is(open_phase: Callable[..., Phase]) -> None:
    recorded: dict[str, Any] = {"systems": {"legacy": {}, "vector": {}}}
    verdicts = []
    for accepted in (False, True):
        phase = open_phase("80_shadow", cut_over={"accept_unjudged": accepted})
        verdicts.append(said(shadow._relevance_is_kept(phase.params, recorded, "vector"))[:2])
    assert verdicts == [
        ("UNKNOWN", "no judgements"),
        ("PASS", "no judgements, accepted by cut_over.accept_unjudged"),
    ]


def test_gates_of_relevance_and_time_show_why_they_fail(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase("80_shadow")
    pair = {"low": -0.001, "high": 0.0, "p_value": 0.04}
    systems = {
        "legacy": {"nDCG@10": 0.3, "p50_ms": 20.0, "p95_ms": 26.0},
        "vector": {"nDCG@10": 0.2996, "p50_ms": 20.004, "p95_ms": 31.002},
        "exact": {"p50_ms": 20.0, "p95_ms": 30.0},
    }
    recorded: dict[str, Any] = {"systems": systems, "paired": pair, "slices": [], "judged": 50, "winner": "legacy"}
    assert said(shadow._relevance_is_kept(phase.params, recorded, "vector")) == (
        "FAIL",
        "nDCG@10 0.2996 on 50 judged queries, legacy 0.300 (difference -0.001 to +0.000, p = 0.04); best is legacy",
        "at least 0.3000",
    )
    fast = shadow._is_fast_enough(recorded, "vector", 1.0)
    assert "at least 31.002 ms" in said(fast)[1] and said(fast)[2].startswith("at most 31.000 ms")
    assert said(shadow._index_pays(recorded)) == ("FAIL", "p50 20.004 ms, exact 20.00 ms", "at most 20.000 ms")
    assert said(live_calls._is_fast_enough("vector", [31.002] * 30, [26.0] * 30, 1.0)) == (
        "FAIL",
        "p95 31.00 ms, at least 31.002 ms with 99 % confidence, legacy 26.00 ms, 30 calls",
        "at most 31.000 ms, with 5 ms for noise",
    )
    was, now = (index_recall.IndexRecall("i", r, 1.0, 0, 200) for r in (0.9998, 0.9496))
    assert said(rebuild_index.recall_gate(phase.params, "rebuild.new_index_finds_as_much", "i", was, now)) == (
        "FAIL",
        "recall 0.9496 on 200 queries, 0 short of rows; before recall 1.000 on 200 queries, 0 short of rows",
        "recall 0.9500, no more queries short of rows than before",
    )
