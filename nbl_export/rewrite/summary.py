"""What is said of a rewrite in records and reports: values alone, which import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbl_export.blocks import Block
from nbl_export.graph.summary import GraphSummary


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
    """What ``nbl/rewrite.json`` keeps.

    The graph before and after, the model's layer of each KV pair, the proofs, and what storing W costs.
    """

    before: GraphSummary
    after: GraphSummary
    kv_layers: tuple[int, ...]
    proofs: tuple[ProofErrors, ...]
    stored: tuple[StoredError, ...] = field(default=(), kw_only=True)


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
