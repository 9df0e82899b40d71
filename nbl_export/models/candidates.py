"""The attention layers that can be linearized: those whose keys and values no other layer attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import AttentionLayer, Structure, structure

if TYPE_CHECKING:
    import torch


def candidates(model: torch.nn.Module) -> tuple[AttentionLayer, ...]:
    """Every attention layer of ``model`` that can be linearized, in order."""
    kept = reasons(model)
    return tuple(layer for layer in structure(model).layers if layer.index not in kept)


def reasons(model: torch.nn.Module) -> Mapping[int, str]:
    """Why each of the other attention layers keeps its attention."""
    readers: dict[int, list[int]] = {}
    for borrower, lender in sorted(dummy_run(model).shared.items()):
        readers.setdefault(lender, []).append(borrower)
    return {lender: _read_by(borrowers) for lender, borrowers in readers.items()}


def _read_by(layers: list[int]) -> str:
    named = ", ".join(map(str, layers[:-1]))
    return f"its keys and values are read by layer{'s' if named else ''} {named}{' and ' if named else ''}{layers[-1]}"


def described(model: torch.nn.Module) -> dict[str, Any]:
    """The blocks of ``model`` for a record: their number, the kinds of its candidates, and what the others are."""
    found, kept = structure(model), reasons(model)
    layers = tuple(layer for layer in found.layers if layer.index not in kept)
    others = {
        layer.index: f"{layer.kind}: {kept[layer.index]}" for layer in found.layers if layer.index in kept
    }
    return Structure(layers, dict(sorted({**found.others, **others}.items()))).as_json()
