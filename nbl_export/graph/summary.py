"""What is said of a graph in records and reports: values alone, which import nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


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
class Float32Node:
    """A node that stays float32, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class DescribedLayer:
    """What the metadata of a rewritten graph says of a layer: the names of its u and y."""

    layer: int
    kind: Literal["linear", "attention"]
    input: str
    output: str


@dataclass(frozen=True)
class ExportSummary:
    """What ``nbl/export.json`` keeps of an export: the nodes of a half graph that stay float32."""

    kept_float32: tuple[Float32Node, ...] = ()
