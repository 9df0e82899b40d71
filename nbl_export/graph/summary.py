"""What is said of a graph in records and reports: values alone, which import nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nbl_export.blocks import Block


@dataclass(frozen=True)
class GraphSummary:
    """What a before/after table shows: counts, and bytes on disk of graph and external data."""

    nodes: int
    ops: Mapping[str, int]
    inputs: int
    outputs: int
    kv_pairs: int
    kv_bytes_per_token: int
    initializers: int
    parameters: int
    file_bytes: int


@dataclass(frozen=True)
class Stored:
    """Initializers of one dtype: how many, and their bytes."""

    count: int
    bytes: int


@dataclass(frozen=True)
class GraphFacts:
    """What a graph file says without its weights.

    ``opsets`` by domain; ``initializers`` by dtype; ``inputs`` and ``outputs`` as ``name: dtype[shape]``, without those
    of the KV cache, of which ``cache`` is the first one's type. ``linear`` are the blocks that a rewrite made linear,
    ``kv_layers`` the model's layer index of each KV pair.
    """

    summary: GraphSummary
    opsets: Mapping[str, int]
    initializers: Mapping[str, Stored]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: str
    kv_layers: tuple[int, ...]
    linear: tuple[Block, ...]


@dataclass(frozen=True)
class Float32Node:
    """A node that stays float32, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class DescribedLayer:
    """What the metadata of a rewritten graph says of a layer: the names of its u and y, empty if it is dropped."""

    layer: Block
    kind: Literal["linear", "attention", "mlp", "dropped"]
    input: str
    output: str


@dataclass(frozen=True)
class OnCopy:
    """A length of the model, ``key`` and ``tokens``, that was crossed on a copy of it in which it is ``small``.

    ``small`` None: it was not, and ``why``.
    """

    key: str
    tokens: int
    small: int | None = None
    why: str = ""


@dataclass(frozen=True)
class ExportSummary:
    """What ``nbl/export.json`` keeps of an export: the nodes of a half graph that stay float32, and the lengths that
    were crossed on a copy of the model.
    """

    kept_float32: tuple[Float32Node, ...] = ()
    copies: tuple[OnCopy, ...] = ()
