"""One phase of one run: what every notebook opens first, and closes last."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from runbook_lib import db, kernel, sqlmagic
from runbook_lib import params as params_module
from runbook_lib.display import Table
from runbook_lib.gates import BadInput, Gate, GateFailed, Gates, Verdict, collect, gate, not_run
from runbook_lib.ledger import Ledger, as_data
from runbook_lib.params import Params
from runbook_lib.phases import MIGRATE as MIGRATE
from runbook_lib.phases import OPERATE, RUNS_BESIDE, STANDS_ON, UNDO_OPERATION, taken_back, waits
from runbook_lib.phases import UNDO as UNDO
from runbook_lib.running import approval, claim, plans, window


@dataclass(frozen=True)
class Phase:
    """What a notebook works with.

    connection: for the work, in autocommit. ledger: on a connection of its own. execute: False only prints.
    """

    name: str
    run_id: str
    execute: bool
    params: Params
    connection: db.Connection
    ledger: Ledger

    def where_am_i(self) -> Table:
        """Target, server, phase, and where the migration stands by the ledger."""
        server = self.connection.execute(
            "SELECT current_database() AS database, current_user AS role,"
            " coalesce(host(inet_server_addr()), 'local socket') AS address,"
            " current_setting('server_version') AS version"
        ).fetchone()
        assert server is not None
        done = [p for p in MIGRATE if self.ledger.phase_verdict(p) == Verdict.PASS]
        following = next((p for p in MIGRATE if p not in done), "nothing: the reads have moved")
        return Table(
            ("", ""),
            [
                ("target", f"{self.params.target.schema_}.{self.params.target.table}"),
                ("database", f"{server['database']} at {server['address']}, PostgreSQL {server['version']}"),
                ("role", server["role"]),
                ("phase", self.name),
                ("run", self.run_id),
                (
                    "mode",
                    "execute: statements are carried out" if self.execute else "plan only: nothing is changed",
                ),
                ("proved so far", ", ".join(done) or "nothing"),
                ("next by the ledger", following),
            ],
        )

    def require(self) -> Gates:
        """The gates of the way here: every phase before this one has passed in this database, on this target; then
        the maintenance window, which it waits for, and the sign-off, where the parameters ask for one.

        Raises GateFailed, OutsideWindow, NotApproved. A run that carries nothing out only says where things stand.
        """
        gates = collect(self._predecessors())
        if not self.execute:
            return gates.without_pass() + self._judge(approval.check(self))
        gates = self._judge(gates)
        if waits(self.name):
            window.enter(self.params)
        return gates + self._judge(approval.check(self))

    def _predecessors(self) -> list[Gate]:
        if self.name in UNDO:
            return [self._nothing_stands_on_it()]
        if self.name in UNDO_OPERATION:
            return [self._no_later_operation_stands_on_it(), *self._is_as_planned()]
        if self.name == MIGRATE[0] or self.name not in (*MIGRATE, *OPERATE):
            return [gate("phase.may_start", True, self.name, found="needs no phase before it", needed="none")]
        before = OPERATE[self.name] if self.name in OPERATE else MIGRATE[MIGRATE.index(self.name) - 1]
        verdict = self.ledger.phase_verdict(before)
        passed = gate(
            "phase.predecessor_passed",
            verdict == Verdict.PASS,
            before,
            found=f"{verdict} in this database",
            needed="PASS",
            danger="what this phase relies on has not been proved here",
            do=f"run {before} with execute: true first",
        )
        return [passed, *self._is_as_planned()]

    def _is_as_planned(self) -> list[Gate]:
        """No gate before preflight has planned."""
        planned = self.ledger.latest("plan", MIGRATE[0])
        if not planned:
            return []
        same = planned["fingerprint"] == self.params.fingerprint()
        return [
            gate(
                "phase.target_is_as_planned",
                same,
                f"{self.params.target.schema_}.{self.params.target.table}",
                found=f"target, vector, model and ledger {'as planned' if same else 'changed since'}",
                needed="the parameters that preflight planned with",
                danger="phases would work on different columns, models or tables",
                do="put the parameters back, or undo the migration and run 00_preflight again",
            )
        ]

    def _no_later_operation_stands_on_it(self) -> Gate:
        """What an operation made may since have become part of what a later one made."""
        operation = UNDO_OPERATION[self.name]
        later = STANDS_ON.get(operation, "")
        last, own = (self.ledger.last_row(name) for name in (later, operation))
        stands = bool(last and own and last["seq"] > own["seq"] and self.ledger.phase_verdict(later) == Verdict.PASS)
        return gate(
            "phase.no_later_operation_stands_on_it",
            not stands,
            operation,
            found=f"{later} was carried out since" if stands else "no operation since that relies on it",
            needed=f"{later} taken back, or never carried out" if later else "none that relies on it",
            danger="what is to be taken back has become part of what the later one made",
            do=f"run `runbook operate PARAMS {later} --undo --execute` first, or leave both as they are",
        )

    def _nothing_stands_on_it(self) -> Gate:
        """The ways back are taken in order: what an earlier one takes back must be gone."""
        order = tuple(UNDO)
        earlier = [p for way in order[: order.index(self.name)] for p in UNDO[way]]
        standing = [p for p in earlier if self.ledger.phase_verdict(p) == Verdict.PASS]
        ways = [way for way in order if any(p in UNDO[way] for p in standing)]
        return gate(
            "phase.nothing_stands_on_it",
            not standing,
            self.name,
            found=f"{', '.join(standing)} still proved" if standing else "later phases are taken back, or never ran",
            needed="the phases after it taken back first",
            danger="what they made would stand on nothing",
            do=f"run undo/{ways[0]} first" if ways else "",
        )

    def carry_out(self, plan: db.Plan) -> Table:
        """Carries out the plan, statement by statement, each with a bound wait and a row in the ledger."""
        if not self.execute:
            return Table(("not carried out (execute is false)",), [(s.purpose,) for s in plan])
        done = [self.do(s) for s in plan]
        return Table(
            ("what", "lock", "rows", "seconds", "tries"),
            [
                (
                    d.statement.purpose,
                    d.statement.lock or "none",
                    None if d.rows < 0 else d.rows,
                    d.seconds,
                    d.tries,
                )
                for d in done
            ],
        )

    def do(self, statement: db.Statement) -> db.Done:
        """Carries out one statement and writes it into the ledger."""
        done = db.carry_out(self.connection, self.params, statement)
        self.note_statement(done)
        return done

    def note_statement(self, done: db.Done) -> None:
        """A ledger row for a statement that was carried out."""
        s = done.statement
        self.ledger.append(
            "statement",
            {
                "name": s.name,
                "purpose": s.purpose,
                "lock": s.lock,
                "blocks": s.blocks,
                "undo": s.undo,
                "sql": s.text(self.connection),
                "rows": done.rows,
                "seconds": round(done.seconds, 6),
                "tries": done.tries,
            },
        )

    def note(self, kind: str, body: dict[str, Any]) -> None:
        """A ledger row of figures that a later phase or the record needs; nothing where nothing is carried out."""
        if self.execute:
            self.ledger.append(kind, body)

    def prove(self, look: Callable[[Phase], Gates], *, ahead: bool = False) -> Gates:
        """Looks at the database and judges; raises GateFailed, after showing the gates.

        A run that carries nothing out says NOT RUN without looking, except ``ahead`` of any change: then it looks,
        and what would pass says NOT RUN.
        """
        if ahead and not self.execute:
            return self._judge(look(self).without_pass())
        if not self.execute:
            needed = "the phase carried out"
            name = f"{look.__module__.rsplit('.', 1)[-1]}.{look.__name__}"
            return self._judge(Gates((not_run(name, self.name, needed),)))
        return self._judge(look(self))

    def _judge(self, gates: Gates) -> Gates:
        """Writes the gates down; shows the table first and raises after it, so that the record holds both.

        A run that carries nothing out leaves the ledger as it is: what was proved there stays proved.
        """
        if not self.execute:
            for g in gates:
                plans.note(self, "gate", as_data(g))
        elif self.ledger.exists():
            self.ledger.append_gates(gates)
        if gates.failed:
            from IPython.display import display

            display(gates)  # type: ignore[no-untyped-call]
            if self.execute and self.ledger.exists():
                self.ledger.append("phase", {"verdict": "FAIL"})
            raise GateFailed(gates)
        return gates

    def _append_verdicts(self, verdict: str) -> None:
        """This phase's verdict; a way back also says UNDONE for each phase, or the operation, that it took back."""
        if not self.ledger.exists():
            return
        self.ledger.append("phase", {"verdict": verdict})
        for name in taken_back(self.name):
            # An operation that was killed has no verdict, and is taken back all the same.
            if self.ledger.last_row(name) if name in OPERATE else self.ledger.phase_verdict(name) != "NOT RUN":
                replace(self.ledger, phase=name).append("phase", {"verdict": "UNDONE", "by": self.name})

    def close(self, gates: Gates, verdict: str = "PASS") -> Table:
        """Ends the phase: PASS only if there are gates and all passed. Gives back the claim on the target."""
        if self.execute:
            if not gates.passed:
                raise GateFailed(gates)
            self._append_verdicts(verdict)
        else:
            plans.note_statements(self)
        self.connection.close()
        self.ledger.connection.close()
        return Table(
            ("phase", "verdict", "next"), [(self.name, verdict if self.execute else "NOT RUN", following(self.name))]
        )


def open_phase(name: str, params_file: str, run_id: str = "", execute: bool | str = False) -> Phase:
    """Reads the parameters, connects, and claims the target for this session.

    run_id: empty when somebody steps through by hand. execute: papermill's ``-p execute true`` arrives as text.
    Raises BadInput for parameters, server or another run at work on the same target.
    """
    kernel.let_go()
    params = params_module.load(params_file)
    carry_out = _boolean(execute)
    run_id = run_id or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-by-hand-{uuid.uuid4().hex[:4]}"
    ledger = Ledger(db.connect(params, f"runbook {run_id} {name} ledger"), params, run_id, name)
    kernel.hold(ledger.connection)
    if carry_out:
        ledger.bring_up_to_date()
    if carry_out and name not in RUNS_BESIDE:
        claim.take_for_notebook(ledger.connection, params, run_id)
    phase = Phase(name, run_id, carry_out, params, db.connect(params, f"runbook {run_id} {name}"), ledger)
    kernel.hold(phase.connection)
    sqlmagic.connect(phase)
    return phase


def following(name: str) -> str:
    """What comes after a phase or a way back; an operation stands for itself."""
    if name in OPERATE or name in UNDO_OPERATION:
        return "nothing: an operation stands for itself"
    order = MIGRATE if name in MIGRATE else tuple(UNDO)
    here = order.index(name) if name in order else len(order)
    return order[here + 1] if here + 1 < len(order) else "nothing: this was the last"


def _boolean(value: bool | str) -> bool:
    if isinstance(value, bool):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    problem = Gate(
        "params.value_is_valid",
        Verdict.FAIL,
        "execute",
        repr(value),
        "true or false",
        "a misread switch would change the table, or leave it alone, against the wish of who set it",
        "pass execute: true or execute: false",
    )
    raise BadInput([problem])
