"""The plan: which layers become linear, with which W and b, how they were fitted, and for which model.

A repair may also change weights of the MLPs behind: W + up · down is merged into W, in PyTorch and in the graph, so it
has no cost at run time. The weight is found in the graph by its content: the plan has SHA-256 digests of the original W
in every precision and orientation that an exporter may use.

On disk it is two files: ``plan.json`` with the settings, ``plan.safetensors`` with the tensors. The JSON has the
SHA-256 of both, so that an edit or a truncation of either is detected.
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import F32
from nbl_export.blocks import Block, as_json, attentions, block_of, grouped, parts_in
from nbl_export.errors import InputError
from nbl_export.files import read_json, sha256_of_file, sha256_of_json, write_json
from nbl_export.records import from_json
from nbl_export.settings.choices import FitInput
from nbl_export.tensorfile import open_tensors, save_tensors

FORMAT = "nbl-export/plan/1"
_REMEDY = "run `nbl-export select` again"


_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Adapter:
    """The change of one weight [m, n]: ``up`` [m, r] · ``down`` [r, n], float32; ``digests`` identify the original.

    The digests are those of :func:`weight_digests`.
    """

    up: F32
    down: F32
    digests: tuple[str, ...]

    def change(self) -> F32:
        """up · down [m, n]."""
        return self.up @ self.down


def weight_digests(weight: NDArray[Any]) -> tuple[str, ...]:
    """SHA-256 of ``weight`` [m, n] and of its transpose, each in float32, float16 and bfloat16."""
    with np.errstate(over="ignore"):  # a weight outside the range of float16 is in no float16 graph
        return tuple(
            digest_of(np.ascontiguousarray(oriented).astype(dtype))
            for oriented in (weight, weight.T)
            for dtype in _DTYPES
        )


def digest_of(array: NDArray[Any]) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).tobytes()).hexdigest()


def is_transposed(adapter: Adapter, digest: str) -> bool:
    """Whether the weight with this ``digest`` of the adapter is the transpose of the model's weight."""
    return adapter.digests.index(digest) >= len(_DTYPES)


@dataclass(frozen=True)
class LinearLayer:
    """ŷ = W u + b for one layer: ``w`` [d, d] (output × input) and ``b`` [d], float32.

    A low-rank layer also has its factors ``up`` [d, r] and ``down`` [r, d], whose product is W.
    """

    w: F32
    b: F32
    up: F32 | None = None
    down: F32 | None = None

    @classmethod
    def of_rank(cls, up: F32, down: F32, b: F32) -> LinearLayer:
        """The linear layer ŷ = up · down · u + b."""
        return cls(up @ down, b, up, down)


@dataclass(frozen=True)
class Dropped:
    """Nothing in the place of a block: it adds nothing to the residual stream."""


DROPPED = Dropped()
# What stands in the place of a block.
Replacement = LinearLayer | Dropped


def by_part(replaced: Mapping[Block, Replacement]) -> dict[Block, Replacement]:
    """What becomes of each part of the blocks that are ``replaced``: the map of a span is its first part's."""
    return {
        part: DROPPED if number else replacement
        for block, replacement in replaced.items()
        for number, part in enumerate(parts_in(block))
    }


@dataclass(frozen=True)
class Plan:
    """What becomes linear or is dropped, and the evidence that the graph rewrite needs.

    ``fit_input`` says what u is. ``probe`` is a ragged batch by input name (``input_ids``, ``attention_mask`` …,
    int64 [batch, sequence]) or images; ``probe_u`` and ``probe_y`` are u and y of the original PyTorch model on it,
    for **every** attention layer, and every MLP where MLPs may be chosen, float32 [unpadded tokens, d]. ``dropped`` are
    the attentions and MLPs that add nothing any more: those of a span after its first, whose map is in ``layers``.
    ``layer_count`` counts all layers of the model, including those without attention. ``fit`` is the name of the fit,
    ``repair`` the number of distillation steps after it, ``rank`` the rank of every W if they were truncated to one,
    ``ranks`` those of the layers for which one was chosen; ``ridge`` is None if it was chosen per layer. ``adapters``
    are the changes that a repair made to retained weights, by the name of the model's parameter. ``probe_routes`` are
    the places [tokens, …, k] that each router of a mixture of experts chose on the probe.
    """

    model: str
    hidden_size: int
    layer_count: int
    fit_input: FitInput
    criterion: str
    ridge: float | None
    calibration_tokens: int
    layers: Mapping[Block, LinearLayer]
    probe: Mapping[str, NDArray[Any]]
    probe_u: Mapping[Block, F32]
    probe_y: Mapping[Block, F32]
    fit: str = "lmmse"
    repair: int = 0
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    rank: int | None = None
    probe_routes: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    ranks: Mapping[Block, int] = field(default_factory=dict)
    dropped: tuple[Block, ...] = ()

    def rank_of(self, layer: Block) -> int | None:
        """The rank of a layer's W; None where it is whole."""
        return self.ranks.get(layer, self.rank)

    @property
    def chosen(self) -> tuple[Block, ...]:
        """Every attention and MLP that is replaced, ascending: linear or dropped."""
        return tuple(sorted([*self.layers, *self.dropped]))

    @property
    def linear(self) -> tuple[Block, ...]:
        """Those that are linear, ascending."""
        return tuple(sorted(self.layers))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What was chosen, with spans of layers as such."""
        return grouped(self.layers, self.dropped)

    @property
    def replacements(self) -> Mapping[Block, Replacement]:
        """What stands in the place of each of ``chosen``; a W is loaded when it is read."""
        return ChainMap(dict.fromkeys(self.dropped, DROPPED), self.layers)  # type: ignore[arg-type]  # only read

    def with_replaced(self, replaced: Mapping[Block, Replacement]) -> Plan:
        """The plan with exactly these blocks ``replaced``."""
        parts = by_part(replaced)
        layers = {part: one for part, one in parts.items() if isinstance(one, LinearLayer)}
        return replace(self, layers=layers, dropped=tuple(sorted(parts.keys() - layers.keys())))

    @property
    def candidates(self) -> tuple[Block, ...]:
        """The blocks of the original model that are in the probe: all its attention layers, and MLPs if asked for."""
        return tuple(sorted(self.probe_y))

    @property
    def linear_attention(self) -> tuple[int, ...]:
        """The layers whose attention is linear or dropped, which have no keys and values."""
        return attentions(self.chosen)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that retain their attention, in the order of the rewritten model's KV pairs."""
        gone = set(self.chosen)
        return tuple(i for i in attentions(self.candidates) if i not in gone)

    def without_layers(self) -> Plan:
        """The plan without linear layers, for the unmodified model."""
        return replace(self, layers={}, dropped=(), adapters={})


def ranks_of(layers: Mapping[Block, LinearLayer]) -> dict[Block, int]:
    """The ranks of those of ``layers`` that have factors."""
    return {i: layer.up.shape[1] for i, layer in layers.items() if layer.up is not None}


def linear_name(layer: Block) -> str:
    """How the names begin that a rewritten graph has for the linear layer in the place of a block."""
    return f"layers.{layer}.nbl_linear"


def linear_output_name(layer: Block) -> str:
    """The name of a linearized layer's output."""
    return f"{linear_name(layer)}.output"


def _stored_names(rank: int | None) -> tuple[str, ...]:
    """The stored arrays of each linear layer: W and b, or the factors of W and b."""
    return ("w", "b") if rank is None else ("up", "down", "b")


class _StoredLayers(Mapping[Block, LinearLayer]):
    """The linear layers of a stored plan, each loaded on access: W of an 8B model's layer has 64 MiB."""

    def __init__(self, stored: Mapping[str, Any], ranks: Mapping[Block, int | None]) -> None:
        self._stored, self._ranks = stored, ranks

    def __getitem__(self, index: Block) -> LinearLayer:
        names = _stored_names(self._ranks[index])
        arrays = {name: self._stored[f"layers.{index}.{name}"] for name in names}
        return LinearLayer(**arrays) if "w" in arrays else LinearLayer.of_rank(**arrays)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)


def save_plan(path: Path, plan: Plan) -> None:
    """Write ``plan.safetensors`` and then ``path`` (``plan.json``), each atomically."""
    tensors: dict[str, Any] = {f"probe.{name}": value for name, value in plan.probe.items()}
    for index, layer in plan.layers.items():
        tensors |= {
            f"layers.{index}.{name}": getattr(layer, name) for name in _stored_names(plan.rank_of(index))
        }
    for index in plan.probe_u:
        tensors[f"probe_u.{index}"], tensors[f"probe_y.{index}"] = plan.probe_u[index], plan.probe_y[index]
    tensors |= {f"probe_routes.{number}": taken for number, taken in plan.probe_routes.items()}
    for name, adapter in plan.adapters.items():
        tensors[f"adapters.{name}.up"], tensors[f"adapters.{name}.down"] = adapter.up, adapter.down
    weights = path.with_suffix(".safetensors")
    save_tensors(weights, FORMAT, tensors)
    header = {
        "format": FORMAT,
        "model": plan.model,
        "hidden_size": plan.hidden_size,
        "layer_count": plan.layer_count,
        "layers": list(map(as_json, plan.linear)),
        **({"dropped": list(map(as_json, plan.dropped))} if plan.dropped else {}),
        "fit_input": plan.fit_input,
        "criterion": plan.criterion,
        "fit": plan.fit,
        "ridge": plan.ridge,
        "repair": plan.repair,
        "rank": plan.rank,
        **({"ranks": {str(i): rank for i, rank in plan.ranks.items()}} if plan.ranks else {}),
        "adapters": {name: list(adapter.digests) for name, adapter in plan.adapters.items()},
        "calibration_tokens": plan.calibration_tokens,
        "weights": weights.name,
        "weights_sha256": sha256_of_file(weights),
    }
    write_json(path, {**header, "sha256": sha256_of_json(header)})


def load_plan(path: Path) -> Plan:
    """Read a plan from its ``.json`` or ``.safetensors`` path.

    Raises :class:`InputError` if either file is missing, damaged, or does not belong to the other.
    """
    path, weights = path.with_suffix(".json"), path.with_suffix(".safetensors")
    header = read_json(path, "The plan", _REMEDY)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path} is not a plan of nbl-export: {_REMEDY}.")
    digest = header.pop("sha256", None)
    said = from_json(_Header, header, str(path), _REMEDY)
    if not weights.is_file():
        raise InputError(f"The plan's tensors are missing ({weights}): {_REMEDY}.")
    if sha256_of_file(weights) != said.weights_sha256:
        raise InputError(f"{weights} is truncated or edited: it does not match {path.name}: {_REMEDY}.")
    if digest != sha256_of_json(header):
        raise InputError(f"{path} was edited by hand: {_REMEDY}.")
    # Both digests are those of what was written, so what is in the files need not be looked at again.
    stored, _ = open_tensors(weights, FORMAT, _REMEDY)
    groups: dict[str, dict[str, Any]] = {name: {} for name in ("probe", "probe_u", "probe_y", "probe_routes")}
    for key in stored:
        group, _, rest = key.partition(".")
        if group in groups:
            groups[group][rest] = stored[key]
    probe_u, probe_y = ({block_of(i): v for i, v in groups[g].items()} for g in ("probe_u", "probe_y"))
    ranks = {block_of(name): rank for name, rank in said.ranks.items()}
    own = {f.name: getattr(said, f.name) for f in fields(_Header)}
    for name in ("format", "weights", "weights_sha256"):
        del own[name]
    return Plan(
        **{
            **own,
            "ranks": ranks,
            "layers": _StoredLayers(stored, {i: ranks.get(i, said.rank) for i in said.layers}),
            "adapters": {
                name: Adapter(stored[f"adapters.{name}.up"], stored[f"adapters.{name}.down"], digests)
                for name, digests in said.adapters.items()
            },
        },
        probe=groups["probe"],
        probe_u=probe_u,
        probe_y=probe_y,
        probe_routes={int(number): taken for number, taken in groups["probe_routes"].items()},
    )


@dataclass(frozen=True)
class _Header:
    """``plan.json``, without its own digest; what a plan need not have has a default."""

    format: str
    model: str
    hidden_size: int
    layer_count: int
    layers: tuple[Block, ...]
    fit_input: FitInput
    criterion: str
    ridge: float | None
    calibration_tokens: int
    weights_sha256: str
    weights: str
    fit: str
    repair: int
    rank: int | None
    adapters: Mapping[str, tuple[str, ...]]
    ranks: Mapping[str, int] = field(default_factory=dict)
    dropped: tuple[Block, ...] = ()
