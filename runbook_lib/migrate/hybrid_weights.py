"""Part of phase 70: the weights of words and vectors in hybrid, learned from judged queries, otherwise equal."""

from __future__ import annotations

from typing import Any

from runbook_lib.benchmark import comparison, fusion, loop, query_set, replica
from runbook_lib.core import db
from runbook_lib.core.display import number
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.search import word_statistics
from runbook_lib.search.hybrid import EQUAL_WEIGHT

KIND = "hybrid_weights"


def plan(connection: db.Connection, params: Params) -> list[db.Statement]:
    """Counting the words if due, and storing the weight."""
    if not params.search.has_fulltext:
        return []
    learned = params.search.hybrid.weights == "learned"
    count = word_statistics.due(connection, params)
    return [*count, *([word_statistics.learn_statement(params, None)] if learned else [])]


def apply(phase: Phase, candidates: int) -> None:
    """Counts the table's words if due, and learns hybrid's weights. candidates: the search function's ef_search or
    probes.
    """
    p = phase.params
    if not p.search.has_fulltext:
        return
    for statement in word_statistics.due(phase.connection, p):
        phase.do(statement)
    if p.search.hybrid.weights == "equal":
        return
    asked, marks = comparison.sampled(phase.connection, phase.ledger, p)
    judged = query_set.with_vectors(p, asked.judged)

    def learn() -> fusion.Fusion | None:
        with loop.through_the_index(phase.connection, p, candidates) as connection:
            return fusion.learn(connection, p, judged, marks)

    found = replica.again(p, learn)
    phase.do(word_statistics.learn_statement(p, found.vector_weight if found and found.kept else None))
    phase.note(KIND, {"judged": len(judged)} | (found.as_data() if found else {}))


def undo_plan(connection: db.Connection, params: Params) -> list[db.Statement]:
    """Back to equal weights, if others were learned."""
    known = word_statistics.counted(connection, params)
    learned = known is not None and known.vector_weight is not None
    return [word_statistics.learn_statement(params, None)] if learned else []


def gates(connection: db.Connection, ledger: Ledger, params: Params) -> list[Gate]:
    """Does hybrid use the weights in the record?"""
    noted = ledger.latest(KIND)
    if not params.search.has_fulltext or params.search.hybrid.weights == "equal" or noted is None:
        return []
    known = word_statistics.counted(connection, params)
    there = known.vector_weight if known else None
    wanted = noted["vector_weight"] if noted.get("kept") else None
    return [
        gate(
            "tune.hybrid_weights_are_as_learned",
            there == wanted,
            params.function_name,
            found=_said(there, noted),
            needed=f"{_weights(wanted)}, as the ledger has it",
            danger="hybrid would rank by weights that were never measured",
            do="run 70_tune again",
            figures=noted,
        )
    ]


def _weights(vectors: float | None) -> str:
    vectors = EQUAL_WEIGHT if vectors is None else vectors
    return f"vectors {vectors:g}, words {1 - vectors:g}"


def _said(there: float | None, noted: dict[str, Any]) -> str:
    if "proved" not in noted:
        few = f"only {number(noted['judged'])} judged queries" if noted["judged"] else "no judged queries"
        return f"{_weights(there)}: equal, with {few} to learn from"
    on = noted["proved"]
    tried = "" if noted["kept"] else f"; {_weights(noted['vector_weight'])} did worse and is not used"
    return (
        f"{_weights(there)}{tried}; learned on {number(noted['learned_on'])} judged queries, nDCG@10 on"
        f" {number(noted['proved_on'])} others: learned {on['learned']:.3f}, equal {on['equal']:.3f},"
        f" words alone {on['words']:.3f}, vectors alone {on['vectors']:.3f}"
    )
