"""Reads one params file and checks it whole: every problem at once, each with the key and what is valid there."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from runbook_lib.gates import BadInput, Gate, Verdict
from runbook_lib.params.model import Params
from runbook_lib.params.section import unsound


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; a setting that is not in force would look like one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands twice: lines {seen[key]} and {line}"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


def load(path: str | Path) -> Params:
    """Reads and checks one params file. Relative paths in it are relative to the file's own folder.

    Raises BadInput with every problem found: a missing file, an unknown key (with the nearest valid name), a
    wrong type, a value out of range.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text("utf-8"), _UniqueKeys)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise BadInput(
            [_problem("file_is_readable", str(path), error.strerror or "unreadable", "a YAML file")]
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput([_problem("file_is_yaml", str(path), " ".join(str(error).split()), "valid YAML")]) from error
    if not isinstance(data, dict):
        raise BadInput([_problem("file_is_yaml", str(path), type(data).__name__, "sections with keys")])
    if unsound_values := list(_unsound(path, data)):
        raise BadInput(unsound_values)
    try:
        params = Params.model_validate(data)
    except ValidationError as error:
        # Without its cause, whose text repeats what was given, be it a secret.
        raise BadInput([_from_pydantic(path, e) for e in error.errors()]) from None
    return _absolute(params, path.parent.resolve())


def _unsound(path: Path, value: Any, where: str = "") -> Iterator[Gate]:
    """Each text of the file, key or value, that can be written into no statement and no record."""
    if isinstance(value, dict):
        for key, inner in value.items():
            shown = ascii(key)[1:-1] if isinstance(key, str) and unsound(key) else key
            yield from _unsound(path, key, f"{where}.{shown}")
            yield from _unsound(path, inner, f"{where}.{shown}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _unsound(path, inner, f"{where}.{i}")
    elif isinstance(value, str) and (why := unsound(value)):
        yield _problem("value_is_valid", f"{path}: {where.lstrip('.')}", why, "a text that can be stored in UTF-8")


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


def _problem(fact: str, subject: str, found: str, needed: str, do: str = "") -> Gate:
    return Gate(
        f"params.{fact}",
        Verdict.FAIL,
        subject,
        found,
        needed,
        "a misread parameter would act on the wrong thing; nothing was started",
        do or "mend the file and run the same command again",
    )


def _from_pydantic(path: Path, error: Any) -> Gate:
    where = ".".join(str(part) for part in error["loc"]) or "the file as a whole"
    subject = f"{path}: {where}"
    if error["type"] == "extra_forbidden":
        names = _valid_names(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1, cutoff=0.5)
        do = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(names)}"
        return _problem("key_is_known", subject, "unknown key", "a key that the runbook knows", do)
    if error["type"] == "missing":
        return _problem("key_is_given", subject, "not given", _describe(error["loc"]))
    found = _shown(error["loc"], error["input"])
    needed = error["msg"].removeprefix("Value error, ")
    # Where a section's keys do not fit each other, what the section is for would help nobody.
    do = "" if isinstance(error["input"], dict) else _describe(error["loc"])
    return _problem("value_is_valid", subject, found, needed[:1].lower() + needed[1:], do)


def _shown(loc: tuple[Any, ...], value: Any) -> str:
    if isinstance(value, dict):
        return "this combination"
    # Somebody who put the DSN where its name belongs must not find the password in every log.
    return "a value that is not shown, since it may hold a secret" if loc[:1] == ("connection",) else repr(value)


def _section(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    model: type[BaseModel] = Params
    for part in loc:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    return model


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
