"""Write the JSON Schemas of all reports, of their dataclasses, into the package: python scripts/json_schemas.py"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nbl_export import report
from nbl_export.blocks import MLP, SPAN, Block, Mlp, Span
from nbl_export.report.evaluation import Evaluation
from nbl_export.report.schema import BenchReport, Header, Report

KINDS = (Report, BenchReport, Evaluation)
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
    shared: dict[str, Any] = {}
    body = _fields_of(kind, shared)
    own = {"schema": {"const": kind.SCHEMA}, "verdict": {"enum": list(kind.VERDICTS)}}
    return {
        "$schema": _DRAFT,
        "title": kind.SCHEMA,
        "description": " ".join((kind.__doc__ or "").split("\n\n")[0].split()),
        **body,
        "properties": {**own, **body["properties"]},
        "required": [*own, *body["required"]],
        "$defs": {**shared, "number": _NUMBER, "block": _BLOCK},
    }


def file_of(kind: type[Header]) -> Path:
    """Where the schema of a ``kind`` of report is published: ``report-2.json`` for ``nbl-export/report/2``."""
    _, name, version = kind.SCHEMA.split("/")
    return Path(report.__path__[0]) / "schemas" / f"{name}-{version}.json"


def _fields_of(kind: Any, shared: dict[str, Any]) -> dict[str, Any]:
    """The object of a dataclass; those in it are in ``shared`` by their names, and referred to."""
    hints, every = get_type_hints(kind), fields(kind)
    return {
        "type": "object",
        "properties": {one.name: _of(hints[one.name], shared) for one in every},
        "required": [o.name for o in every if o.default is MISSING and o.default_factory is MISSING],
        "additionalProperties": False,
    }


def _of(hint: Any, shared: dict[str, Any]) -> dict[str, Any]:
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
        name = hint.__name__  # type: ignore[union-attr]
        if name not in shared:
            shared[name] = {}  # a class may have fields of itself
            shared[name] = _fields_of(hint, shared)
        return {"$ref": f"#/$defs/{name}"}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        # An int or a span beside an Mlp is a block, too.
        return {"anyOf": [_of(a, shared) for a in arguments if not (Mlp in arguments and a in (int, Span))]}
    if origin is tuple and arguments[1:] != (Ellipsis,):
        every = [_of(one, shared) for one in arguments]
        return {"type": "array", "prefixItems": every, "minItems": len(every), "maxItems": len(every)}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _of(arguments[1], shared)}
    if origin is not None and issubclass(origin, Sequence):
        return {"type": "array", "items": _of(arguments[0], shared)}
    raise TypeError(f"{hint} has no schema")


def main() -> None:
    for kind in KINDS:
        path = file_of(kind)
        path.write_text(json.dumps(schema_of(kind), indent=2) + "\n", encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()
