"""Keep what records and reports say of a graph and its rewrite: values alone, which import nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """What a graph file says without its weights; those are the SHA-256 of all, if they were read.

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
    weights: str = ""


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


@dataclass(frozen=True)
class ProofErrors:
    """How far one layer's tensors u and y in the graph are from PyTorch's: relative errors, infinite for none."""

    layer: Block
    input_error: float
    output_error: float


@dataclass(frozen=True)
class StoredError:
    """What storing W in the graph's format costs one linear layer: ‖Ŵu - Wu‖ / ‖Wu‖ on the probe."""

    layer: Block
    error: float


@dataclass(frozen=True)
class RewriteSummary:
    """The graph before and after, the model's layer of each KV pair, the proofs, and what storing W costs."""

    before: GraphSummary
    after: GraphSummary
    kv_layers: tuple[int, ...]
    proofs: tuple[ProofErrors, ...]
    stored: tuple[StoredError, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class ProvenTensors:
    """The names of a layer's proven tensors in the unmodified graph: its ``input`` u and its ``output`` y.

    ``later`` is the bias that is added to y afterwards, empty without one; ``shapes`` are those of u on each row of the
    plan's probe.
    """

    layer: Block
    input: str
    output: str
    later: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class RewriteRecord(RewriteSummary):
    """The same with the ``tensors`` of every layer that was found: ``nbl/rewrite.json`` of an output folder."""

    tensors: tuple[ProvenTensors, ...]


@dataclass(frozen=True, kw_only=True)
class ForeignSummary(RewriteSummary):
    """The same of a graph that somebody else exported.

    ``source`` is its name, ``plan_sha256`` the hash of the plan's header, and ``graph_sha256`` that of the rewritten
    graph. ``files`` are those that were written into the folder.
    """

    source: str
    plan_sha256: str
    graph_sha256: str
    files: tuple[str, ...] = ()
