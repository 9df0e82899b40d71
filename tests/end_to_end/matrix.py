"""What the tests of foreign graphs share: rewriting a folder, and what must then be true of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from nbl_export.batch import NUM_LOGITS_TO_KEEP
from nbl_export.blocks import Block, Mlp, Span
from nbl_export.graph.cache import KV_LAYERS_KEY
from nbl_export.graph.io import check_file, passes_checker
from nbl_export.linearize.plan import Plan, save_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.lengths import Crossed, crossed_by, crossing_prompts
from nbl_export.rewrite.foreign import rewrite_foreign
from nbl_export.rewrite.replace import RewriteResult
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.verify.parity.figures import Parity, gates_for
from tests.exporters import GRAPH, METADATA
from tests.families import FAMILIES, LAYERS, VOCAB
from tests.fixtures_graph import compare_streams, ragged_rows

DECODE = 4
ROWS = ragged_rows((20, 13, 7), VOCAB - 10, seed=3)
# What few bits cost is an average: over few tokens of a random model it scatters.
MORE_ROWS = ragged_rows((60, 50, 50, 40, 30, 20), VOCAB - 10, seed=4)
CAPACITY = max(len(row) for row in MORE_ROWS)
# Layer 0 is the one that exporters read the past length off.
CHOSEN: dict[str, tuple[Block, ...]] = {
    "one": (0,),
    "half": (1, Mlp(1), Mlp(2), 3),
    "all": tuple(range(LAYERS)),
    # Where the family has none, what is left of it.
    "spans": (Span(0, 1), Mlp(2), Span(3, 3)),
}
EVERY = tuple(FAMILIES)
# GPT-NeoX is not among the builder's architectures.
BUILDER = tuple(name for name, family in FAMILIES.items() if family.model_type != "gpt_neox")
# What attention comes down to in each exporter's graph: one of these a layer.
CORES = ("Softmax", "Attention", "GroupQueryAttention")
TOLD = ("input_ids", "attention_mask", "position_ids", "write_indices", NUM_LOGITS_TO_KEEP)


def rewritten(folder: Path, plan: Plan, root: Path) -> tuple[Path, RewriteResult]:
    """The folder's decoder rewritten by ``plan``, as somebody does it who has both as files."""
    root.mkdir(exist_ok=True)
    save_plan(root / "plan.json", plan)
    result = rewrite_foreign(folder, root / "plan.json", root / "out")
    return root / "out", result


def parity(model: Any, plan: Plan, path: Path, dtype: str = "float32") -> Parity:
    """The graph at ``path`` against ``model`` with the plan's maps, ragged prefill and decode, beyond every length."""
    rows = MORE_ROWS if dtype.startswith("int") else ROWS
    prompts = crossing_prompts(crossed(model))
    alone = ragged_rows([prompt + DECODE for prompt in prompts], VOCAB - 10, seed=5) if prompts else []
    with linearized(model, plan):
        reference = PastStream(TorchDecoder(model, plan.linear_attention))
        stream = ort_stream(path, CAPACITY)
        return compare_streams(reference, stream, rows, DECODE, gates_for(dtype), alone=alone)


def crossed(model: Any) -> tuple[Crossed, ...]:
    """The lengths of ``model``, and the prompts that cross them in :func:`parity`."""
    return crossed_by(model, DECODE, [len(row) - DECODE for row in ROWS])


def cache_names(exporter: str, before: Sequence[str], kept: Sequence[int]) -> set[str]:
    """The cache inputs that a rewrite leaves, by what the exporter calls them."""
    if "cache_k_0" in before:
        return {f"cache_{side}_{new}" for new in range(len(kept)) for side in "kv"}
    if "kv_in_0" in before:  # numbers that count tensors, not layers, mean nothing and stay
        return {f"kv_in_{2 * layer + side}" for layer in kept for side in range(2)}
    if "past_key_values.0.key" in before:
        return {f"past_key_values.{new}.{side}" for new in range(len(kept)) for side in ("key", "value")}
    assert exporter.startswith("optimum-whole")
    return set()


def assert_exactly_the_plan_is_gone(exporter: str, source: Path, out: Path, plan: Plan) -> None:
    """Read with onnx alone: layers, interface, metadata, dead weight."""
    if passes_checker(source / GRAPH):  # genai's graphs have norms that the checker does not know
        check_file(out / GRAPH)
    before, after = (onnx.load(str(f / GRAPH), load_external_data=False) for f in (source, out))
    layers = [sum(n.op_type in CORES for n in p.graph.node) for p in (before, after)]
    assert layers == [LAYERS, len(plan.attention_layers)]

    names = [[i.name for i in p.graph.input] for p in (before, after)]
    told = [[i for i in p.graph.input if i.name in TOLD] for p in (before, after)]
    assert told[0] == told[1]  # also those that nothing reads any more, with their shapes
    cache = cache_names(exporter, names[0], plan.attention_layers)
    assert set(names[1]) == {i.name for i in told[0]} | cache
    assert len(after.graph.output) == 1 + len(cache)
    if "new_k0" in [o.name for o in before.graph.output]:
        new = [f"new_{side}{i}" for i in range(len(plan.attention_layers)) for side in "kv"]
        assert [o.name for o in after.graph.output] == ["logits", *new]
    if "present.0.key" in [o.name for o in before.graph.output]:
        new = [f"present.{i}.{side}" for i in range(len(plan.attention_layers)) for side in ("key", "value")]
        assert {o.name for o in after.graph.output} == {"logits", *new}

    metadata = {p.key: p.value for p in after.metadata_props}
    assert metadata[METADATA[0]] == METADATA[1]
    assert json.loads(metadata[KV_LAYERS_KEY]) == (
        list(plan.attention_layers) if cache or not plan.attention_layers else []
    )
    read = {name for node in after.graph.node for name in node.input} | {o.name for o in after.graph.output}
    assert {t.name for t in after.graph.initializer} <= read
    assert all(any(name in read for name in node.output) for node in after.graph.node)


def assert_folder_is_told(source: Path, out: Path, plan: Plan) -> None:
    others = {p.name for p in source.iterdir()} - {GRAPH, f"{GRAPH}.data"}
    assert others <= {p.name for p in out.iterdir()}
    if "genai_config.json" in others:
        old, new = (json.loads((f / "genai_config.json").read_text()) for f in (source, out))
        assert old["model"]["decoder"].pop("num_hidden_layers") == LAYERS
        assert new["model"]["decoder"].pop("num_hidden_layers") == len(plan.attention_layers)
        assert old == new
    if "config.json" in others:
        config = json.loads((out / "config.json").read_text())
        assert config["nbl_export"]["linearized_layers"] == list(plan.linear_attention)


def weight_bytes(folder: Path) -> int:
    tensors = onnx.load(str(folder / GRAPH)).graph.initializer
    return sum(numpy_helper.to_array(t).nbytes for t in tensors)


def file_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.name.startswith(GRAPH))
