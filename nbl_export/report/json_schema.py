"""The JSON Schema of a report, made from its dataclasses: what :func:`nbl_export.records.from_json` reads.

The files that are published, ``schemas/*.json`` beside this module, are made by ``scripts/json_schemas.py``.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nbl_export.blocks import MLP, SPAN, Block, Mlp, Span
from nbl_export.report.header import Header

FOLDER = Path(__file__).parent / "schemas"
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_SIMPLE = {str: "string", bool: "boolean", int: "integer", type(None): "null"}
# JSON has no NaN and no infinity.
_NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
_BLOCK = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": rf"^\d+\.{MLP}$|^\d+(-\d+)?\.{SPAN}$"},
    ]
}


def schema_of(kind: type[Header]) -> dict[str, Any]:
    """The schema of a ``kind`` of report as its file has it."""
    shared = _Shared()
    body = shared.fields_of(kind)
    own = {"schema": {"const": kind.SCHEMA}, "verdict": {"enum": list(kind.VERDICTS)}}
    return {
        "$schema": _DRAFT,
        "title": kind.SCHEMA,
        "description": " ".join((kind.__doc__ or "").split("\n\n")[0].split()),
        **body,
        "properties": {**own, **body["properties"]},
        "required": [*own, *body["required"]],
        "$defs": {**shared.found, "number": _NUMBER, "block": _BLOCK},
    }


def file_of(kind: type[Header]) -> Path:
    """Where the schema of a ``kind`` of report is published: ``report-2.json`` for ``nbl-export/report/2``."""
    _, name, version = kind.SCHEMA.split("/")
    return FOLDER / f"{name}-{version}.json"


class _Shared:
    """Schemas of types, those of dataclasses ``found`` by their names and referred to."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._classes: dict[str, type[Any]] = {}

    def fields_of(self, kind: Any) -> dict[str, Any]:
        """The object of a dataclass."""
        hints, every = get_type_hints(kind), fields(kind)
        return {
            "type": "object",
            "properties": {one.name: self.of(hints[one.name]) for one in every},
            "required": [
                one.name for one in every if one.default is MISSING and one.default_factory is MISSING
            ],
            "additionalProperties": False,
        }

    def of(self, hint: Any) -> dict[str, Any]:
        """The schema of a type that fields of reports have; raises ``TypeError`` for one that none has yet."""
        origin, arguments = get_origin(hint), get_args(hint)
        if hint == Block or hint in (Mlp, Span):
            return {"$ref": "#/$defs/block"}
        if hint is float:
            return {"$ref": "#/$defs/number"}
        if hint in _SIMPLE:
            return {"type": _SIMPLE[hint]}
        if hint is Any or hint is object:
            return {}
        if is_dataclass(hint):
            return self._reference(hint)
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (Union, types.UnionType):
            # An int or a span beside an Mlp is a block, too.
            either = [self.of(one) for one in arguments if not (Mlp in arguments and one in (int, Span))]
            return {"anyOf": either}
        if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
            return {"type": "array", "items": self.of(arguments[0])}
        if origin is tuple:
            every = [self.of(one) for one in arguments]
            return {"type": "array", "prefixItems": every, "minItems": len(every), "maxItems": len(every)}
        if origin is not None and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        if origin is not None and issubclass(origin, Sequence):
            return {"type": "array", "items": self.of(arguments[0])}
        raise TypeError(f"{hint} has no schema")

    def _reference(self, kind: Any) -> dict[str, Any]:
        name = kind.__name__
        if self._classes.setdefault(name, kind) is not kind:
            raise TypeError(f"{kind} and {self._classes[name]} have one name")
        if name not in self.found:
            self.found[name] = {}  # a class may have fields of itself
            self.found[name] = self.fields_of(kind)
        return {"$ref": f"#/$defs/{name}"}
