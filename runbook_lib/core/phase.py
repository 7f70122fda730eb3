"""One phase of one run: what every notebook opens first, and closes last."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg

from runbook_lib.core import (
    approval,
    cell_order,
    claim,
    db,
    kernel,
    maintenance_window,
    opening,
    plans,
    predecessors,
    sqlmagic,
)
from runbook_lib.core.cell_order import Order, OutOfOrder, WhileOpen, cell
from runbook_lib.core.display import Table
from runbook_lib.core.gates import (
    Gate,
    GateFailed,
    Gates,
    NotApproved,
    OutsideWindow,
    Verdict,
    collect,
)
from runbook_lib.core.ledger import Ledger, as_data
from runbook_lib.core.registry import MIGRATE, OPERATE, STEPS, UNDO, following, function, rolled_back_by, waits
from runbook_lib.core.target import load_params
from runbook_lib.params import Params

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, repr=False, eq=False)
class Phase:
    """What a notebook works with.

    connection: for the work, in autocommit; read-only in the server but inside :meth:`opened`. ledger: on a
    connection of its own. execute: False only prints. order: the progress of this session. judged: its gates.
    """

    name: str
    run_id: str
    execute: bool
    params: Params
    connection: WhileOpen[db.Connection] = WhileOpen()  # noqa: RUF009 - a descriptor, which a dataclass knows
    ledger: WhileOpen[Ledger] = WhileOpen()  # noqa: RUF009
    order: Order = field(default_factory=lambda: Order(""))
    judged: list[Gate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order.name = self.order.name or self.name

    def __repr__(self) -> str:
        return f"<{self.name} of run {self.run_id}, {self.order.ended or 'open'}>"

    @property
    def gates(self) -> Gates:
        """The last result of every gate of this session, including those that stopped it."""
        return Gates(tuple({(g.name, g.subject): g for g in self.judged}.values()))

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

    def require(self, *looks: Callable[[Phase], Gates]) -> Gates:
        """The gates of the way here: every phase before this one has passed in this database, on this target; then
        the maintenance window, which it waits for, the sign-off, where the parameters ask for one, and the looks that
        this notebook takes before it changes anything.

        Only when all of them have passed may this session change anything. Raises GateFailed, OutsideWindow,
        NotApproved. A run that carries nothing out takes the looks too: what holds says WOULD PASS, and what an
        earlier step of its plan is to bring about says NOT RUN.
        """
        self._must_be_connected()
        self.order.required = False
        since = predecessors.newest_row(self.ledger)
        try:
            gates = self._way_here()
            for look in looks:
                with self.order.look(_name(look)):
                    found = look(self)
                gates += self._judge(found if self.execute else found.in_a_plan())
        except (GateFailed, NotApproved, OutsideWindow) as error:
            self.order.unproved[cell_order.REQUIRE] = _why(error)
            raise
        if self.execute:
            self.order.unproved.clear()
            self.order.recheck = partial(predecessors.gone, self.name, self.ledger, self.params, since)
            self.order.required = True
        return gates

    def _way_here(self) -> Gates:
        gates = collect(predecessors.gates(self.name, self.ledger, self.params))
        if not self.execute:
            return self._judge(plans.on_the_way(self.name, gates) + self._sign_off().in_a_plan())
        gates = self._judge(gates)
        if waits(self.name):
            gates += self._judge(maintenance_window.clocks_agree(self.ledger.connection, self.params))
            maintenance_window.enter(self.params)
        return gates + self._judge(self._sign_off())

    def _sign_off(self) -> Gates:
        return approval.check(self.name, self.ledger, self.execute, self.planned)

    def join(self) -> None:
        """Takes part in a step that another session has opened, and which that session proves and closes.

        Raises OutOfOrder where what the step rests on does not hold.
        """
        since = predecessors.newest_row(self.ledger)
        if why := predecessors.gone(self.name, self.ledger, self.params, since):
            raise OutOfOrder(f"{self.name} cannot be helped: {why}", "the phase before it")
        self.order.recheck = partial(predecessors.gone, self.name, self.ledger, self.params, since)
        self.order.required = True

    def ask(self, every_s: float = 0.0) -> None:
        """May this session change anything now? Raises OutOfOrder where a gate has not passed in it, or where what
        it rests on has been undone since. every_s: for long work, which asks often; the ledger is asked less so.
        """
        self._must_be_connected()
        self.order.must_have_passed()
        self._must_still_rest(every_s)

    def _must_still_rest(self, every_s: float = 0.0) -> None:
        if self.order.recheck is None or not self.order.asks_now(every_s):
            return
        try:
            why = self.order.recheck()
        except psycopg.OperationalError:
            self._must_be_connected()
            raise
        if why:
            raise OutOfOrder(f"{self.name} is open, and since its gates passed {why}", cell(cell_order.REQUIRE))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Opens the session for a change, and closes it again. Asks first, except where nothing is carried out: then
        the session stays read-only. Raises OutOfOrder.
        """
        self._must_be_connected()
        if not self.execute:
            yield
            return
        self.ask()
        self.order.proved = False
        with self.order.lifted(self.connection):
            yield
        self.order.proved = False

    def _must_be_connected(self) -> None:
        """Raises OutOfOrder for a phase that was closed, or whose sessions have ended, and with them its claim."""
        _ = self.connection, self.ledger

    def planned(self) -> list[dict[str, str]]:
        """The statements that the step would carry out now, as plain data."""
        step = STEPS.get(self.name)
        statements = [s for plan in (step.plans if step else ()) for s in function(plan)(self)]
        return db.rendered(statements, self.connection)

    def note_in_plan(self, kind: str, body: Mapping[str, Any]) -> None:
        """A row of figures for the page of a plan, which is not in the ledger."""
        plans.note(self.params, self.run_id, self.name, self.connection.info.user, kind, body)

    def carry_out(self, plan: db.Plan) -> Table:
        """Carries out the plan, statement by statement, each with a bound wait and a row in the ledger."""
        self.order.must_be_open()
        if not self.execute:
            return Table(("not carried out (execute is false)",), [(s.purpose,) for s in plan])
        with self.opened():
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
        with self.opened():
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
        self.order.must_be_open()
        if not self.execute:
            return
        if not self.order.looking:
            self.ask(cell_order.SECONDS_BETWEEN_QUESTIONS)
        self.ledger.append(kind, body)

    def prove(self, look: Callable[[Phase], Gates], *, ahead: bool = False, midway: bool = False) -> Gates:
        """Looks at the database and judges; raises GateFailed, after showing the gates.

        A run that carries nothing out looks as well where the look is ``ahead`` of any change, and at what already
        exists: what holds says WOULD PASS. What only the step itself brings about says NOT RUN. midway: the step goes
        on after these gates, so they do not close it.
        """
        self._must_be_connected()
        name = _name(look)
        if not self.execute:
            return self._judge(look(self).in_a_plan() if ahead else self._foreseen(name, look))
        self.order.must_be_required()
        self._must_still_rest()
        with self.order.look(name):
            try:
                gates = self._judge(look(self))
            except GateFailed as error:
                self.order.unproved[name] = _why(error)
                raise
        del self.order.unproved[name]
        self.order.proved = not midway
        return gates

    def _foreseen(self, name: str, look: Callable[[Phase], Gates]) -> Gates:
        """What the step is to prove: looked at only where the step has nothing left to do, or is a phase that has
        passed, and would not measure again; of a rollback only where nothing else is to be rolled back before it.
        The server is not kept busy for it for long.
        """
        left, step = len(self.planned()), STEPS.get(self.name)
        there = not left or (self.name in MIGRATE and self.ledger.phase_verdict(self.name) == Verdict.PASS)
        if self.name in UNDO:
            there = there and not predecessors.gone(self.name, self.ledger, self.params, 0)
        why = ""
        if step is not None and not step.measures and there:
            try:
                with db.bounded(self.connection, plans.LONGEST_LOOK):
                    return plans.of_what_is_there(self.name, look(self))
            except psycopg.errors.QueryCanceled:
                why = f"a check took longer than {plans.LONGEST_LOOK}; "
            except psycopg.Error as error:
                db.raise_if_lost(self.connection, error)
        return plans.not_there_yet(name, self.name, left, look, why)

    def _judge(self, gates: Gates) -> Gates:
        """Writes the gates down; shows the table first and raises after it, so that the record holds both.

        A run that carries nothing out leaves the ledger as it is: what was proved there stays proved.
        """
        self.judged.extend(gates)
        if not self.execute:
            for g in gates:
                self.note_in_plan("gate", as_data(g))
        elif self.ledger.exists():
            self.ledger.append_gates(gates)
        if gates.failed:
            from IPython.display import display

            display(gates)  # type: ignore[no-untyped-call]
            if self.execute and self.ledger.exists():
                self.ledger.append("phase", {"verdict": "FAIL"})
            raise GateFailed(gates, shown=True)
        return gates

    def _append_verdicts(self, verdict: str) -> None:
        """This phase's verdict; a rollback also says UNDONE for each phase, or the operation, that it rolled back."""
        if not self.ledger.exists():
            return
        self.ledger.append("phase", {"verdict": verdict})
        for name in rolled_back_by(self.name):
            # An operation that was killed has no verdict, and is rolled back all the same.
            if self.ledger.last_row(name) if name in OPERATE else self.ledger.phase_verdict(name) != "NOT RUN":
                replace(self.ledger, phase=name).append("phase", {"verdict": "UNDONE", "by": self.name})

    def close(self, gates: Gates | None = None, verdict: str = "PASS") -> Table:
        """Ends the phase, and gives back the claim on the target. PASS only if the way here and what was done are
        proved in this session, and still hold by the ledger; otherwise raises OutOfOrder. gates: shown before; they
        are judged as well.
        """
        self._must_be_connected()
        if self.execute:
            if gates is not None and gates.failed:
                raise GateFailed(gates, shown=True)
            self.ask()
            if not self.order.proved or not (gates is None or gates.passed):
                raise OutOfOrder(f"{self.name} is open, and what it did is not proved", cell(cell_order.PROVE))
            self._append_verdicts(verdict)
        else:
            for planned in self.planned():
                self.note_in_plan("planned", planned)
        self.end("is closed", _after(self.name))
        return Table(
            ("phase", "verdict", "next"), [(self.name, verdict if self.execute else "NOT RUN", following(self.name))]
        )

    def end(self, why: str, following: str) -> str:
        """Ends both sessions; returns the name of what was open, empty where it had ended before."""
        if self.order.ended:
            return ""
        self.order.end(f"{self.name} {why}", following)
        # Also those that the server has ended, which are not handed out any more.
        self.__dict__["_connection"].close()
        self.__dict__["_ledger"].connection.close()
        return self.name


def changes(work: Callable[Concatenate[Phase, P], T]) -> Callable[Concatenate[Phase, P], T]:
    """For a function that changes something: it asks before it begins, and its session may write while it runs."""

    @wraps(work)
    def asked(phase: Phase, /, *arguments: P.args, **named: P.kwargs) -> T:
        with phase.opened():
            return work(phase, *arguments, **named)

    return asked


def open_phase(name: str, params_file: str, run_id: str = "", execute: bool | str = False) -> Phase:
    """Reads the parameters, connects, and claims the target for this session.

    run_id: empty when somebody steps through by hand. execute: papermill's ``-p execute true`` arrives as text.
    Raises BadInput for parameters, server or another run at work on the same target, and for a parameter that
    papermill set although the notebook has none of its name.
    """
    kernel.keep_secrets()
    # First of all: where this fails, the cells below must not work on what was open before.
    here = f"{cell(cell_order.OPEN)} of its own notebook"
    let_go = kernel.let_go(f"was let go when {name} was opened in this kernel", here)
    opening.refuse_unknown_parameters()
    params = load_params(params_file)
    carry_out = opening.as_boolean(execute)
    opening.refuse_distributed(name, params)
    run_id = run_id or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-by-hand-{uuid.uuid4().hex[:4]}"
    ledger = Ledger(db.connect(params, f"runbook {run_id} {name} ledger"), params, run_id, name)
    try:
        if carry_out:
            ledger.bring_up_to_date()
        if carry_out and not (name in STEPS and STEPS[name].concurrent):
            claim.take_for_notebook(ledger.connection, params, run_id)
        phase = Phase(name, run_id, carry_out, params, db.connect(params, f"runbook {run_id} {name}"), ledger)
        phase.order.fence(phase.connection)
    except BaseException:
        ledger.connection.close()
        raise
    kernel.hold(phase.end)
    sqlmagic.connect(params, run_id, lambda: phase.connection)
    if let_go:
        print(
            f"{let_go} was open in this kernel and has been let go; {name} is open. Next: {cell(cell_order.REQUIRE)}."
        )
    return phase


def _name(look: Callable[[Phase], Gates]) -> str:
    return f"{look.__module__.rsplit('.', 1)[-1]}.{look.__name__}"


def _why(error: GateFailed | NotApproved | OutsideWindow) -> str:
    if isinstance(error, GateFailed):
        return cell_order.said(g.name for g in error.gates.failed)
    if isinstance(error, NotApproved):
        return f"it has no sign-off: {error.found}"
    return "the maintenance window is closed"


def _after(name: str) -> str:
    """What a person does after closing: the next notebook, or the same again from its first cells."""
    after = following(name)
    again = f"{cell(cell_order.OPEN)} opens it again"
    return again if after.startswith("nothing") else f"the notebook {after}; {again}"
