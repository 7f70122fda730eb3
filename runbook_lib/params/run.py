"""How a run is run: sign-off, hours, limits, who hears of it, what it leaves."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from runbook_lib.params.section import AnyPath, Minutes, Section, ShortName

# In run.phase_timeout_minutes: the phases that are not named.
EVERY_PHASE = "every_phase"


class StepNames(NamedTuple):
    """The steps, as far as the parameters name them; the context in which a file is validated.

    spelled: the name of today of what a file calls a step, for instance of ``10_refresh``; its second argument is the
    folder where the name alone would not say it. every: all of them. waiting: those that can wait for a sign-off.
    """

    spelled: Callable[[str, str], str]
    every: Sequence[str]
    waiting: Sequence[str]


class Approval(Section):
    """Steps that need a second person."""

    phases: list[str] = Field([], description="They wait for `runbook approve` by another database user.")

    @field_validator("phases")
    @classmethod
    def can_wait(cls, value: list[str], info: ValidationInfo) -> list[str]:
        if not isinstance(steps := info.context, StepNames):
            return value
        value = [steps.spelled(name, "operate") for name in value]
        _require_known(value, steps.waiting)
        return value


def _require_known(given: Iterable[str], known: Sequence[str]) -> None:
    """A mistyped phase would never wait, or never end: it must not pass for a setting."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise ValueError(f"{name}: " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"))


def _for_every_phase(value: Any) -> Any:
    return {EVERY_PHASE: value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class Run(Section):
    """When steps may run, and for how long."""

    phase_timeout_minutes: Annotated[dict[str, Minutes], BeforeValidator(_for_every_phase)] = Field(
        {}, description="Interrupt a step that takes longer: one number for all, or one each."
    )
    window: str | None = Field(
        None,
        pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$",
        description='Hours in which steps that change something may start and continue, such as "22:00-05:00".',
    )
    time_zone: str = Field("UTC", description="Of the window, such as Europe/Berlin.")
    outside_window: Literal["wait", "stop"] = Field(
        "wait", description="Outside these hours, wait or stop with exit code 3."
    )

    @field_validator("phase_timeout_minutes")
    @classmethod
    def names_phases(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if not isinstance(steps := info.context, StepNames):
            return value
        value = {steps.spelled(name, ""): minutes for name, minutes in value.items()}
        _require_known(value, [EVERY_PHASE, *steps.every])
        return value

    @field_validator("time_zone")
    @classmethod
    def is_a_time_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError("a name of the IANA time zone database, for instance Europe/Berlin") from error
        return value

    @model_validator(mode="after")
    def window_is_open_at_some_time(self) -> Self:
        if self.window and self.window[:5] == self.window[6:]:
            raise ValueError("run.window opens and closes at the same minute; leave it out to be always open")
        return self

    def timeout_minutes(self, phase: str) -> float | None:
        """The limit of one phase; None if it has none."""
        return self.phase_timeout_minutes.get(phase, self.phase_timeout_minutes.get(EVERY_PHASE))


class Notify(Section):
    """Who is told that a gate did not pass, a sign-off is needed or a run has ended."""

    command: list[str] = Field([], description="Program and arguments; receives the event as JSON on standard input.")
    webhook_env: str | None = Field(
        None, description="Environment variable that holds a URL; the event is sent by POST."
    )
    timeout_s: float = Field(10.0, gt=0, le=120, description="Timeout of either.")

    @field_validator("webhook_env")
    @classmethod
    def is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not value.replace("_", "").isalnum():
            raise ValueError(
                "takes the name of an environment variable; the URL itself is a secret, so keep it out of this file"
            )
        return value


class RecordSection(Section):
    """What a run leaves."""

    runs_dir: AnyPath = Field(Path("runs"), description="Folder of the runs, relative to the params file.")
    readable_by: Literal["owner", "group", "everyone"] = Field(
        "owner",
        description="Who may read records, which quote rows: you, your group, or everyone, within the umask.",
    )

    keep: int | None = Field(
        None,
        ge=1,
        description="Records of passed refreshes and checks to keep; older folders are removed, their ledger rows"
        " stay. All if unset.",
    )

    @property
    def folder_mode(self) -> int:
        """Permissions of a run's folder; its files have the same, less the right to enter."""
        return {"owner": 0o700, "group": 0o750, "everyone": 0o755}[self.readable_by]


class LedgerSection(Section):
    """The runbook's own schema in the target database."""

    schema_: ShortName = Field("runbook", alias="schema", description="Schema of the ledger and the staging table.")
