"""Reads one params file and checks it whole: every problem at once, each with the key and what is valid there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from runbook_lib.params import url_credentials
from runbook_lib.params.model import Params
from runbook_lib.params.run import StepNames
from runbook_lib.params.section import unsound

# Aliases and merges can make a few lines of YAML into more values than any memory holds.
MOST_VALUES = 10_000
# Keys of earlier releases, with what to do instead.
REMOVED = {
    "rehearse.server": "take it out: samples are made in a scratch schema of the target's database;"
    " to rehearse elsewhere, point connection.dsn_env at a copy of the database",
}
TOO_MANY = f"more than {MOST_VALUES} values, aliases counted in full"
# Beside its own, PyYAML lets pass what Python says of a value that is not of its tag.
YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError)


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; a setting that is not in force would look like one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping; a key is one word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} occurs twice: lines {seen[key]} and {line}"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, TOO_MANY, node.start_mark)


class Problem(NamedTuple):
    """One thing that is wrong with a file, in the words of a gate. fact: what must hold. subject: file and key."""

    fact: str
    subject: str
    found: str
    needed: str
    do: str = ""


class Unusable(Exception):
    """A params file that cannot be worked with, with every problem found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(f"{p.subject}: {p.found}" for p in problems))
        self.problems = tuple(problems)


def load(path: str | Path, steps: StepNames | None = None) -> Params:
    """Reads and checks one params file. Relative paths in it are relative to the file's own folder.

    steps: those that may be named in it; without them no name is checked. Raises Unusable with every problem found: a
    missing file, an unknown key (with the nearest valid name), a wrong type, a value out of range.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text("utf-8"), _UniqueKeys)  # noqa: S506 - a SafeLoader
        texts = list(_texts(data))
    except OSError as error:
        do = f"did you mean {near}?" if isinstance(error, FileNotFoundError) and (near := _nearest(path)) else ""
        raise Unusable(
            [Problem("file_is_readable", str(path), error.strerror or "unreadable", "a YAML file", do)]
        ) from error
    except YAML_ERRORS as error:
        # Without its cause, which may quote a line of the file, be it a secret.
        raise Unusable([Problem("file_is_yaml", str(path), _what_is_no_yaml(error), "valid YAML")]) from None
    if not isinstance(data, dict):
        raise Unusable([Problem("file_is_yaml", str(path), type(data).__name__, "sections with keys")])
    if unsound_values := [problem for where, text in texts for problem in _unsound(f"{path}: {where}", text)]:
        raise Unusable(unsound_values)
    try:
        params = Params.model_validate(data, context=steps)
    except ValidationError as error:
        # Without its cause, whose text repeats what was given, be it a secret.
        raise Unusable([_from_pydantic(path, e) for e in error.errors()]) from None
    return _absolute(params, path.parent.resolve())


def _what_is_no_yaml(error: Exception) -> str:
    """Where it is and what, without the line itself, in which a secret may stand."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        return ", ".join(filter(None, (error.context, error.problem))) + at
    if isinstance(error, RecursionError):
        return "nested too deeply, or a part of itself"
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError):
        return " ".join(str(error).split())
    return "a value that does not fit its own type, for instance a date that no calendar has"


def _texts(data: Any) -> Iterator[tuple[str, str]]:
    """Each text of the file, key or value, with the dotted key that it stands at."""
    for n, (where, value) in enumerate(_values("", data)):
        if n > MOST_VALUES:
            raise yaml.YAMLError(TOO_MANY)
        if isinstance(value, str):
            yield where.lstrip("."), value


def _values(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield where, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        shown = ascii(key)[1:-1] if isinstance(key, str) and unsound(key) else key
        if isinstance(key, str):
            yield f"{where}.{shown}", key
        yield from _values(f"{where}.{shown}", each)


def _nearest(missing: Path) -> Path | None:
    """The file that was meant, next to the missing one or in the folder params/ there."""
    others = {other.name: other for folder in ("params", ".") for other in (missing.parent / folder).glob("*.y*ml")}
    near = difflib.get_close_matches(missing.name, others, n=1)
    return others[near[0]] if near else None


def _unsound(subject: str, text: str) -> Iterator[Problem]:
    """What of a text can be written into no statement and no record, or must stay out of both."""
    if why := unsound(text):
        yield Problem("value_is_valid", subject, why, "a text that can be stored in UTF-8")
    # A masking pattern describes what credentials look like.
    elif ": masking.patterns." not in subject and (what := url_credentials.found_in(text)):
        yield Problem(
            "url_holds_no_credentials",
            subject,
            f"a URL with {what}",
            "a URL without credentials: every record shows the parameters",
            "take it out, change it where it was in use, and name the environment variable that holds the new one,"
            " for an endpoint in embeddings.api_key_env",
        )


def _absolute(params: Params, folder: Path) -> Params:
    def at(value: Path | None) -> Path | None:
        return None if value is None else folder / value

    return params.model_copy(
        update={
            "queries": params.queries.model_copy(
                update={
                    "file": at(params.queries.file),
                    "judgements": at(params.queries.judgements),
                    "embeddings": at(params.queries.embeddings),
                }
            ),
            "embeddings": params.embeddings.model_copy(
                update={"file": at(params.embeddings.file), "ids_file": at(params.embeddings.ids_file)}
            ),
            "record": params.record.model_copy(update={"runs_dir": at(params.record.runs_dir)}),
            "model_change": params.model_change.model_copy(
                update={"replaces_params": at(params.model_change.replaces_params)}
            ),
            "health": params.health.model_copy(update={"stop_file": at(params.health.stop_file)}),
        }
    )


def _from_pydantic(path: Path, error: Any) -> Problem:
    where = ".".join(str(part) for part in error["loc"]) or "the file as a whole"
    subject = f"{path}: {where}"
    if error["type"] == "extra_forbidden":
        if (dotted := ".".join(map(str, error["loc"]))) in REMOVED:
            return Problem(
                "key_is_known", subject, "a key of an earlier release", "a file without it", REMOVED[dotted]
            )
        names = _valid_names(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1, cutoff=0.5)
        do = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(names)}"
        return Problem("key_is_known", subject, "unknown key", "a key that the runbook knows", do)
    if error["type"] == "missing":
        return Problem("key_is_given", subject, "not given", _describe(error["loc"]))
    found = _shown(error["loc"], error["input"])
    needed = error["msg"].removeprefix("Value error, ")
    # Where a section's keys do not fit each other, what the section is for would help nobody.
    do = "" if isinstance(error["input"], dict) else _describe(error["loc"])
    if error["type"] == "literal_error":
        values = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(error["input"]), values, n=1)
        do = f"did you mean {near[0]}?" if near else do
    return Problem("value_is_valid", subject, found, needed[:1].lower() + needed[1:], do)


def _shown(loc: tuple[Any, ...], value: Any) -> str:
    if isinstance(value, dict):
        return "this combination"
    # Somebody who put the secret where its name belongs must not find it in every log.
    may_be_secret = any(part == "connection" or str(part).endswith("_env") for part in loc)
    return "a value that is not shown, since it may hold a secret" if may_be_secret else repr(value)


def _section(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The section at that place of the file: of the model, or one that a list or a mapping of sections holds."""
    kind: Any = Params
    for part in loc:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = next((f.annotation for n, f in kind.model_fields.items() if part in (n, f.alias)), None)
        elif get_origin(kind) in (list, dict):
            kind = get_args(kind)[-1]
        if get_origin(kind) is UnionType:
            kind = next((k for k in get_args(kind) if k is not type(None)), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _valid_names(loc: tuple[Any, ...]) -> list[str]:
    model = _section(loc)
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _describe(loc: tuple[Any, ...]) -> str:
    """What the key is for, from its own description."""
    model = _section(loc[:-1])
    if model is None or not loc:
        return ""
    for name, field in model.model_fields.items():
        if loc[-1] in (name, field.alias):
            return field.description or f"the section {loc[-1]}"
    return ""
