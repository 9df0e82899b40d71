"""A package with a draft model: the linearized graph, and a cheaper one that proposes tokens, for onnxruntime-genai.

genai_config.json               of the graph, with the draft's decoder in ``model.draft``
draft/model.onnx …              the draft's graph with all its weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.export.genai_config import NAME, with_draft
from nbl_export.files import read_json, write_json
from nbl_export.generate.drafting import Drafting, measure
from nbl_export.graph.precision import precision_of
from nbl_export.parts import missing
from nbl_export.progress import Listener
from nbl_export.settings.choices import QUANTIZED
from nbl_export.verify.parity.figures import gates_for
from nbl_export.workspace import Workspace

GRAPH = "draft/model.onnx"
PROMPTS, PROMPT_TOKENS = 4, 64
_MOST = 16  # what onnxruntime-genai takes
_TOKENIZER = "tokenizer.json"
# What of a tokenizer does not say which tokens a text has.
_LOOSE = {"truncation", "padding", "version"}


@dataclass(frozen=True)
class Draft:
    """A draft at ``graph`` that proposes ``proposed`` tokens a round; ``cost``: its weights in units of the graph's."""

    graph: Path
    proposed: int
    cost: float


def check_draft(ws: Workspace, folder: Path, proposed: int) -> Draft:
    """The draft in ``folder``; raises :class:`InputError` if it is none for the graph of ``ws``.

    Both must be graphs that onnxruntime-genai runs with the same kind of cache, and read the same tokens; a draft that
    is not smaller cannot pay.
    """
    from nbl_export.generate.genai import why_not
    from nbl_export.verify.speed.ceiling import graph_cost

    if not 1 <= proposed <= _MOST:
        raise InputError(f"--draft-tokens is {proposed}; it must be 1 to {_MOST}.")
    try:
        import onnxruntime_genai as genai
    except ImportError:
        raise missing("onnxruntime-genai", "--draft") from None
    if not hasattr(genai.Generator, "get_speculative_stats"):
        raise InputError(
            f"onnxruntime-genai {genai.__version__} does not decode with a draft: take 0.18 or later."
        )
    graph = folder / "model.onnx"
    if not graph.is_file():
        raise InputError(f"--draft {folder} has no model.onnx: give an output folder, or a package.")
    for path in (ws.model, graph):
        if why := why_not(path):
            raise InputError(f"onnxruntime-genai does not take {path.parent}: {why}.")
    _check_alike(ws.root, folder)
    cost = graph_cost(graph).weight_bytes / graph_cost(ws.model).weight_bytes
    if cost >= 1:
        raise InputError(
            f"The draft cannot pay: a token reads {cost:.2f} times as many bytes of weights in {graph} as in "
            f"{ws.model}. Take a smaller one, of fewer layers or bits."
        )
    return Draft(graph, proposed, cost)


def _check_alike(own: Path, other: Path) -> None:
    configs = [_read(folder / NAME, "The configuration of the graph") for folder in (own, other)]
    a, b = (config["model"].get("vocab_size") for config in configs)
    if a != b:
        raise InputError(f"The draft {other} has another vocabulary than {own}: {b} tokens, not {a}.")
    for config, folder in zip(configs, (own, other), strict=True):
        decoder = config["model"]["decoder"]
        if "layer_types" in decoder or "past_conv_names" in decoder.get("inputs", {}):
            raise InputError(f"{folder} keeps states, which a draft cannot take back: leave --draft out.")
    tokenizers = [_read(folder / _TOKENIZER, "The tokenizer") for folder in (own, other)]
    for name in sorted({*tokenizers[0], *tokenizers[1]} - _LOOSE):
        if tokenizers[0].get(name) != tokenizers[1].get(name):
            raise InputError(
                f"The draft {other} reads other tokens than {own}: the {name!r} of their tokenizers differ."
            )


def _read(path: Path, what: str) -> Any:
    found = read_json(path, what, "export the model again")
    if not isinstance(found, dict):
        raise InputError(f"{path} is not usable: {what.lower()} is no object; export the model again.")
    return found


def add_draft(root: Path, draft: Draft) -> None:
    """Put the draft into the configuration of the package in ``root``, where its graph is already."""
    own, other = (_read(folder / NAME, "The configuration") for folder in (root, draft.graph.parent))
    write_json(root / NAME, with_draft(own, other, GRAPH, draft.proposed))


def measure_draft(
    ws: Workspace, root: Path, draft: Draft, rows: Sequence[Sequence[int]], precision: str, listener: Listener
) -> Drafting:
    """What the draft does for held-out ``rows``, of which the first tokens are the prompts."""
    prompts = [[int(token) for token in row[:PROMPT_TOKENS]] for row in rows[:PROMPTS]]
    # Products with quantized weights round activations, too.
    gates = "float16" if precision in QUANTIZED else precision_of(precision).gates
    near_tie = gates_for(gates).near_tie
    return measure(ws.root, root, prompts, draft.proposed, draft.cost, near_tie, listener)
