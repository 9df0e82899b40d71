"""What commands answer with as JSON: a report as its file has it, or what was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.files import jsonable
from nbl_export.records import to_json

if TYPE_CHECKING:
    from nbl_export.linearize.plan import Plan
    from nbl_export.rewrite.replace import RewriteResult

ANSWER, ERROR = "nbl-export/answer/1", "nbl-export/error/1"


def answer(command: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The object of a ``command`` that has no report: values, dataclasses and paths by name."""
    return {"schema": ANSWER, "command": command, **facts}


def error(message: str, code: int) -> dict[str, Any]:
    """The object of a command that ended with an error."""
    return {"schema": ERROR, "error": message, "exit_code": code}


def text_of(value: Any) -> str:
    """``value`` as the text of a JSON document."""
    return json.dumps(_plain(value), indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    return jsonable(value)


def of_plan(plan: Plan) -> dict[str, Any]:
    """What was chosen, and how it was fitted; not W and b."""
    names = ("model", "criterion", "fit", "fit_input", "ridge", "repair", "rank", "calibration_tokens")
    return {
        "k": len(plan.chosen),
        "layers": plan.blocks,
        **{name: getattr(plan, name) for name in names},
        "ranks": {str(layer): rank for layer, rank in plan.ranks.items()},
    }


def of_rewrite(result: RewriteResult) -> dict[str, Any]:
    """The files that were written, the graph before and after, and the proof of each block."""
    from nbl_export.rewrite.replace import rewrite_summary

    return {"files": result.files, "graph": rewrite_summary(result)}
