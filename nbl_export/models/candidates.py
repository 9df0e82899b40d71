"""What can be linearized: attention layers whose keys and values no other layer attends to, and MLPs that are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import PIXELS
from nbl_export.blocks import ATTENTION, MLP, Block, Mlp, part_of
from nbl_export.errors import InputError
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import (
    BlockModules,
    Structure,
    attention_layers,
    backbone,
    block_stack,
    main_input,
    structure,
)
from nbl_export.models.load import quiet
from nbl_export.models.mlps import MlpPaths, mlp_paths
from nbl_export.models.sharing import shared_keys

if TYPE_CHECKING:
    import torch


def candidates(
    model: torch.nn.Module, parts: Collection[str] = (ATTENTION,)
) -> tuple[BlockModules[Block], ...]:
    """Every attention and MLP of ``model``, of these ``parts``, that can be linearized, in order."""
    kept = reasons(model)
    return tuple(one for one in blocks_of(model) if one.index not in kept and part_of(one.index) in parts)


def blocks_of(model: torch.nn.Module) -> tuple[BlockModules[Block], ...]:
    """Every attention layer and every MLP of ``model`` that is found, in order."""
    facts, (path, _) = dummy_run(model), block_stack(model)
    found: list[Any] = list(attention_layers(model))
    for index, paths in mlp_paths(model).items():
        if isinstance(paths, MlpPaths) and index in facts.mlp_streams and index not in facts.odd_mlps:
            stream = facts.mlp_streams[index]
            block = f"{path}.{index}"
            found.append(
                BlockModules(Mlp(index), block, paths.module, paths.output, paths.adds, MLP, stream=stream)
            )
    return tuple(sorted(found, key=lambda one: one.index))


def check_parts(model: torch.nn.Module, parts: Collection[str]) -> None:
    """Refuse MLPs as candidates of a ``model`` of which none can become linear: :class:`InputError` with the reason."""
    if MLP not in parts or any(isinstance(one.index, Mlp) for one in blocks_of(model)):
        return
    why = [found for found in mlp_paths(model).values() if isinstance(found, str)]
    why = why or list(dummy_run(model).odd_mlps.values()) or ["it does not run them as they are"]
    [(reason, _)] = Counter(why).most_common(1)
    raise InputError(
        f"--blocks asks for MLPs, and none of {type(model).__name__} can become linear ({reason}): use --blocks "
        "attention."
    )


def block_modules(model: torch.nn.Module, block: Block) -> BlockModules[Block]:
    """Those of ``block``, which must exist."""
    return next(one for one in blocks_of(model) if one.index == block)


def reasons(model: torch.nn.Module) -> Mapping[int, str]:
    """Why each of the other attention layers keeps its attention."""
    readers: dict[int, list[int]] = {}
    for borrower, lender in sorted(dummy_run(model).shared.items()):
        readers.setdefault(lender, []).append(borrower)
    return {lender: _read_by(borrowers) for lender, borrowers in readers.items()}


def _read_by(layers: list[int]) -> str:
    named = ", ".join(map(str, layers[:-1]))
    return f"its keys and values are read by layer{'s' if named else ''} {named}{' and ' if named else ''}{layers[-1]}"


def shared_without_numbers(model: torch.nn.Module) -> Mapping[int, int]:
    """The layer whose keys and values each borrowing layer attends to, of a ``model`` on the meta device, by the shapes
    of one pass; empty where its code looks at numbers.
    """
    import torch

    run: Any = backbone(model)
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    if main_input(model) == PIXELS:
        return {}
    try:
        with torch.inference_mode(), quiet():
            return shared_keys(model, attention_layers(model), lambda: run(input_ids=tokens, use_cache=True))
    except Exception:  # a model's own code may raise anything
        return {}


def described(model: torch.nn.Module) -> dict[str, Any]:
    """The blocks of ``model`` for a record: their number, the kinds of its candidates, and what the others are."""
    found, kept = structure(model), reasons(model)
    layers = tuple(layer for layer in found.layers if layer.index not in kept)
    others = {
        layer.index: f"{layer.kind}: {kept[layer.index]}" for layer in found.layers if layer.index in kept
    }
    return Structure(layers, dict(sorted({**found.others, **others}.items()))).as_json()
