"""Every parameter with its type, default and description, for the documents."""

from __future__ import annotations

import json
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel

from runbook_lib.params.model import Params


def rows() -> list[tuple[str, str, str, str]]:
    """Every parameter as (key, type, default as JSON or ``required``, description), in the order of the model."""
    return [
        row
        for section_name, section in Params.model_fields.items()
        for row in _of(section_name, typing.cast(type[BaseModel], section.annotation))
    ]


def _of(section: str, model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    found: list[tuple[str, str, str, str]] = []
    for name, field in model.model_fields.items():
        key = f"{section}.{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _of(key, field.annotation)
            continue
        inner = [a for a in typing.get_args(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if inner and type(None) in typing.get_args(field.annotation):
            found += _of(key, inner[0])
            continue
        default = "required" if field.is_required() else json.dumps(field.default, default=str)
        found.append((key, _type_name(field.annotation), default, field.description or ""))
    return found


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is Annotated:
        return _type_name(args[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    if origin in (list, tuple):
        return f"list of {_type_name(args[0])}"
    if origin is dict and typing.get_origin(args[0]) is Annotated:
        return f"name: {_type_name(args[1])}"
    if origin is dict:
        return f"{_type_name(args[1])}, or phase: {_type_name(args[1])}"
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(a) for a in args if a is not type(None))
    return {
        "str": "text",
        "int": "integer",
        "float": "number",
        "Path": "path",
        "bool": "true|false",
    }.get(getattr(annotation, "__name__", ""), str(annotation))
