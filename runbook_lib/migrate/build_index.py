"""Phase 60: the vector index, built concurrently, watched while it grows, and proved by the catalogue."""

from __future__ import annotations

from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gates, collect
from runbook_lib.core.phase import Phase
from runbook_lib.indexes import building, index_proof, vector_index
from runbook_lib.indexes.building import BuildStep
from runbook_lib.indexes.building import in_the_way as in_the_way
from runbook_lib.indexes.vector_index import VectorIndex
from runbook_lib.params import Params


def index(connection: db.Connection, params: Params) -> VectorIndex:
    """The index that the parameters name, as the catalogue has it now."""
    return vector_index.find(connection, params)


def _left(connection: db.Connection, params: Params) -> list[BuildStep]:
    return building.build_steps(connection, index(connection, params))


def plan(phase: Phase) -> db.Plan:
    """What is missing; nothing if the index is whole. What an unfinished build left is dropped first."""
    return building.plan(phase.connection, _left(phase.connection, phase.params))


def apply(phase: Phase) -> Table:
    """Builds what is missing, saying phase, blocks and time left; an interrupt cancels the build in the server."""
    return building.build(
        phase, lambda: _left(phase.connection, phase.params), lambda: index(phase.connection, phase.params)
    )


def verify(phase: Phase) -> Gates:
    """Valid and ready by pg_index, the right operator class and column, built in memory, and it finds known rows."""
    found = index(phase.connection, phase.params)
    gates = [index_proof.is_valid(found)]
    if found.usable:
        gates += [
            index_proof.has_right_class(found),
            *index_proof.serves_every_search(phase.connection, found),
            index_proof.was_built_in_memory(found, phase.ledger),
            index_proof.finds_known_rows(phase.connection, found),
        ]
    return collect(gates)


def undo_plan(phase: Phase) -> db.Plan:
    """DROP INDEX CONCURRENTLY, if the index is there; that of a partitioned table by a short lock."""
    return building.plan(phase.connection, building.drop_steps(index(phase.connection, phase.params)))


def undo(phase: Phase) -> Table:
    """Drops the index of every partition; does nothing where there is none."""
    return building.carry_out(phase, building.drop_steps(index(phase.connection, phase.params)))


def verify_undone(phase: Phase) -> Gates:
    """No index of that name is left, valid or not."""
    return collect([index_proof.is_gone(index(phase.connection, phase.params))])
