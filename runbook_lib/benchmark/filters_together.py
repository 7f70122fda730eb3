"""Filters given together are searched like all sets that match as few rows; here each set is proved by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runbook_lib.benchmark.cheapest_way import Choice
from runbook_lib.benchmark.filter_classes import FilterClass
from runbook_lib.benchmark.loop import Measured, measure
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.thresholds import at_least
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, share_classes

SHOWN = 3


@dataclass(frozen=True)
class Together:
    """A set of filters. shares: by class of the share that is expected of them, that share. recall: on the held-out
    questions of all these classes, by the ways chosen there. exact: is the set searched exactly, since that was too
    little?
    """

    name: str
    shares: Mapping[str, float]
    questions: int
    recall: float
    short: int
    exact: bool

    def as_data(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self)


def proved(
    connection: db.Connection, params: Params, choices: Sequence[Choice], asked: Mapping[FilterClass, Sequence[Query]]
) -> list[Together]:
    """Each set of filters of the classes of several filters, on the held-out questions that have it."""
    found: dict[str, list[tuple[FilterClass, Measured]]] = {}
    for choice in choices:
        if choice.of.filter == share_classes.TOGETHER and choice.chosen:
            for name, mine in _by_name(asked[choice.of][1::2]):
                found.setdefault(name, []).append((choice.of, measure(connection, params, choice.chosen.way, mine)))
    return [_together(params, name, found[name]) for name in sorted(found)]


def _by_name(queries: Sequence[Query]) -> Iterator[tuple[str, list[Query]]]:
    names = [combined_filters.name([name for name, _ in q.allowed]) for q in queries]
    for name in dict.fromkeys(names):
        yield name, [q for q, own in zip(queries, names, strict=True) if own == name]


def _together(params: Params, name: str, measured: Sequence[tuple[FilterClass, Measured]]) -> Together:
    questions = sum(m.questions for _, m in measured)
    recall = sum(m.recall * m.questions for _, m in measured) / questions
    short = sum(m.rows_short for _, m in measured)
    enough = at_least(recall, params.tune.target_recall) and not short
    return Together(name, {of.listed: of.share for of, _ in measured}, questions, round(recall, 4), short, not enough)


def gates(params: Params, recorded: Mapping[str, Any] | None) -> list[Gate]:
    """Gate: every set of filters reaches the target, or is searched exactly; none where no set was measured."""
    sets = list((recorded or {}).get("together", ()))
    if not sets:
        return []
    by_index = [s for s in sets if not s["exact"]]
    worst = sorted(by_index, key=lambda s: float(s["recall"]))[:SHOWN]
    said = [f"{s['name']} {s['recall']:.3f} on {s['questions']} held-out questions" for s in worst]
    exactly = [s["name"] for s in sets if s["exact"]]
    if exactly:
        said.append(f"searched exactly: {', '.join(exactly[:SHOWN])}{', …' if len(exactly) > SHOWN else ''}")
    return [
        gate(
            "tune.filters_together_reach_the_target",
            all(at_least(s["recall"], params.tune.target_recall) and not s["short"] for s in by_index),
            f"{len(sets)} sets of filters given together",
            found="; ".join(said),
            needed=f"recall {params.tune.target_recall:g} for each, or an exact search",
            danger="searches with these filters would hide answers that exact search finds",
            do="run 70_tune again; raise tune.queries if it comes back",
            figures={"sets": len(sets), "exact": len(exactly)},
        )
    ]
