"""Every exporter's graph of every family is rewritten and computes what PyTorch computes with the same maps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from nbl_export.batch import NUM_LOGITS_TO_KEEP
from nbl_export.blocks import Block, Mlp, Span
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.cache import KV_LAYERS_KEY
from nbl_export.graph.io import check_file, passes_checker
from nbl_export.linearize.plan import Plan, save_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.lengths import Crossed, crossed_by, crossing_prompts
from nbl_export.rewrite.foreign import rewrite_foreign
from nbl_export.rewrite.prove import PROOF_TOLERANCE
from nbl_export.rewrite.replace import RewriteResult
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.settings.choices import FitInput
from nbl_export.verify.parity.figures import Parity, gates_for
from tests.conftest import exhaustive
from tests.exporters import GRAPH, METADATA, Graphs, genai
from tests.families import FAMILIES, LAYERS, VOCAB, WIDTH, Calibrated, attention_share, build, calibrated
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


# exporters and families -------------------------------------------------------------------------

MATRIX = {
    "ours-concat": ("llama-gqa",),
    "ours-static": ("llama-gqa",),
    "dynamo-18-eager": ("parallel-fused",),
    "dynamo-18-sdpa": ("llama-gqa", "fused-qkv", "parallel-residual", "sequential-biases"),
    "dynamo-23-eager": ("mha-biases",),
    "dynamo-23-sdpa": ("llama-gqa",),
    "genai-fp32": BUILDER,
    # Of the others it makes graphs that compute something else, which the proof refuses.
    "mobius": ("llama-gqa", "fused-qkv", "parallel-residual", "parallel-fused"),
    "optimum": EVERY,
    "optimum-whole": ("llama-gqa",),
}
OPTIMIZED = {
    "dynamo-18-sdpa+ort": ("llama-gqa", "fused-qkv", "parallel-residual"),
    "dynamo-18-sdpa+transformers": ("llama-gqa", "fused-qkv", "sequential-biases"),
    "dynamo-18-sdpa+slim": ("llama-gqa", "parallel-residual"),
    "dynamo-18-eager+renamed": ("parallel-fused",),
    "optimum+ort": ("llama-gqa", "parallel-fused"),
    "optimum+transformers": EVERY,
    "optimum+slim": ("llama-gqa", "mha-biases", "sequential-biases"),
    "optimum+renamed": ("llama-gqa",),
    "optimum-whole+ort": ("llama-gqa",),
    "optimum-whole+transformers": ("llama-gqa",),
}
# These lose one layer, half of them and all; the others half and all.
THOROUGH = ("llama-gqa", "parallel-residual")
# Each form of a cache, each kind of model and each exporter is there at least once.
USUAL = (
    "ours-static-llama-gqa-one",
    "dynamo-18-eager-parallel-fused-half",
    "dynamo-18-sdpa-parallel-residual-half-residual",
    "dynamo-23-eager-mha-biases-half",
    "genai-fp32-fused-qkv-half",
    "optimum-llama-gqa-one",
    "optimum-sequential-biases-half",
    "optimum-whole-llama-gqa-half",
)
USUALLY_OPTIMIZED = (
    "dynamo-18-sdpa+ort-parallel-residual",
    "dynamo-18-sdpa+slim-parallel-residual",
    "optimum+renamed-llama-gqa",
    "optimum-whole+ort-llama-gqa",
    "optimum+transformers-sequential-biases",
)
RESIDUAL = {("llama-gqa", "genai-fp32"), ("parallel-residual", "dynamo-18-sdpa"), ("fused-qkv", "optimum")}


def cases() -> Iterator[Any]:
    for exporter, families in MATRIX.items():
        for family in families:
            for k, layers in CHOSEN.items():
                if k == "one" and family not in THOROUGH:
                    continue
                fits: list[FitInput] = ["normed"]
                if k == "half" and (family, exporter) in RESIDUAL:
                    fits.append("residual")
                for fit in fits:
                    name = f"{exporter}-{family}-{k}" + ("-residual" if fit == "residual" else "")
                    marks = () if name in USUAL else exhaustive
                    yield pytest.param(exporter, family, layers, fit, id=name, marks=marks)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_matters_in_every_family(family: str, calibrated_of: Callable[[str], Calibrated]) -> None:
    """Without attention, or with the fitted maps, the model says something else: neither goes unnoticed."""
    without, linear = attention_share(calibrated_of(family))
    assert without > 0.5
    assert linear > 0.1
    model = calibrated_of(family).model
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(bias.abs().max() > 0.1 for bias in biases)


@pytest.mark.parametrize(("exporter", "family", "layers", "fit_input"), cases())
def test_float32(
    graphs: Graphs,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    exporter: str,
    family: str,
    layers: tuple[int, ...],
    fit_input: FitInput,
) -> None:
    source, case = graphs(exporter, family), calibrated_of(family)
    plan = case.plan(layers, fit_input)
    out, result = rewritten(source, plan, tmp_path)
    assert parity(case.model, plan, out / GRAPH).failures() == []
    assert_exactly_the_plan_is_gone(exporter, source, out, plan)
    assert_folder_is_told(source, out, plan)
    assert all(p.holds(PROOF_TOLERANCE["fp32"]) for p in result.proofs.values())
    # q, k, v and o have at least 3 d² weights, W and b have d² + d.
    assert weight_bytes(source) - weight_bytes(out) >= len(layers) * 4 * (2 * WIDTH * WIDTH - WIDTH)


@pytest.mark.parametrize(
    ("exporter", "family"),
    [
        pytest.param(e, f, id=f"{e}-{f}", marks=() if f"{e}-{f}" in USUALLY_OPTIMIZED else exhaustive)
        for e, families in OPTIMIZED.items()
        for f in families
    ],
)
def test_optimized(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path, exporter: str, family: str
) -> None:
    source, case = graphs(exporter, family), calibrated_of(family)
    base = graphs(exporter.split("+")[0], family)
    ops, names = zip(*(operators(folder / GRAPH) for folder in (base, source)), strict=True)
    assert (ops[0] == ops[1], bool(names[0] & names[1])) == (
        (True, False) if "renamed" in exporter else (False, True)
    )
    plan = case.plan(CHOSEN["half"])
    out, _ = rewritten(source, plan, tmp_path)
    assert parity(case.model, plan, out / GRAPH).failures() == []
    assert_exactly_the_plan_is_gone(exporter, source, out, plan)


def operators(path: Path) -> tuple[Counter[str], set[str]]:
    """Its operators, and the names of its nodes, weights and inner tensors."""
    graph = onnx.load(str(path), load_external_data=False).graph
    interface = {v.name for v in (*graph.input, *graph.output)}
    tensors = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
    nodes = {node.name for node in graph.node if node.name}
    return Counter(n.op_type for n in graph.node), (tensors | nodes) - interface


def test_a_graph_that_onnxruntime_does_not_run_is_refused(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    """Heads of 8: the builder makes the graph, onnxruntime's operator takes multiples of 16 only."""
    source = graphs("genai-fp32", "stories260K")
    with pytest.raises(
        InputError, match=r"does not run the graph: .* head_size shall be a multiple of 16"
    ) as caught:
        rewritten(source, calibrated_of("stories260K").plan((1,)), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / GRAPH).exists()


def test_what_the_builder_has_no_architecture_for_is_refused(graphs: Graphs) -> None:
    with pytest.raises(BuildError, match=r"cannot export GPTNeoXForCausalLM .* choose another exporter"):
        graphs("genai-fp32", "parallel-fused")


FOREIGN = ["dynamo-18-sdpa", "genai-fp32", "genai-int4", "optimum"]


@pytest.mark.parametrize("exporter", FOREIGN)
def test_weights_of_another_training_are_not_proven(graphs: Graphs, tmp_path: Path, exporter: str) -> None:
    other = calibrated(build("llama-gqa", tmp_path / "other", seed=1))
    with pytest.raises(BuildError, match=r"Layer 1 is not proven: .* not of the model the plan was made for"):
        rewritten(graphs(exporter, "llama-gqa"), other.plan((1,)), tmp_path)
    assert not (tmp_path / "out" / GRAPH).exists()


def test_the_epsilon_of_a_layer_norm_reaches_the_builder(tmp_path: Path) -> None:
    source = build("parallel-residual", tmp_path / "model", layer_norm_eps=1e-3)
    (tmp_path / "graph").mkdir()
    genai("fp32")(source, tmp_path / "graph")
    case = calibrated(source)
    assert parity(case.model, case.plan(()), tmp_path / "graph" / GRAPH).failures() == []


FEW_BITS = (("llama-gqa", "one"), ("fused-qkv", "half"))


@pytest.mark.parametrize(
    ("bits", "family", "k"),
    [
        *(
            pytest.param(4, f, k, id=f"int4-{f}-{k}", marks=() if (f, k) in FEW_BITS else exhaustive)
            for f in BUILDER
            for k in (CHOSEN if f == "llama-gqa" else ["half"])
        ),
        pytest.param(8, "llama-gqa", "half", id="int8-llama-gqa-half"),
    ],
)
def test_few_bits(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path, bits: int, family: str, k: str
) -> None:
    exporter = f"genai-int{bits}"
    source, case = graphs(exporter, family), calibrated_of(family)
    plan = case.plan(CHOSEN[k])
    out, _ = rewritten(source, plan, tmp_path)
    assert_exactly_the_plan_is_gone(exporter, source, out, plan)
    assert_folder_is_told(source, out, plan)
    assert file_bytes(out) < file_bytes(source)
    assert_loses_no_more(case.model, plan, source, out, f"int{bits}")


def assert_loses_no_more(model: Any, plan: Plan, source: Path, out: Path, dtype: str = "int4") -> None:
    own = parity(model, plan.without_layers(), source / GRAPH, dtype)
    assert parity(model, plan, out / GRAPH, dtype).failures_against(own, "the unmodified graph") == []


@pytest.mark.parametrize(
    ("exporter", "family"),
    [
        ("optimum+nbits", "llama-gqa"),
        ("optimum+qdq", "mha-biases"),
        pytest.param("dynamo-18-sdpa+qdq", "fused-qkv", marks=exhaustive),
        ("optimum+dynamic", "llama-gqa"),
        pytest.param("dynamo-18-sdpa+dynamic", "parallel-residual", marks=exhaustive),
    ],
)
def test_quantized_by_onnxruntime(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path, exporter: str, family: str
) -> None:
    source, case = graphs(exporter, family), calibrated_of(family)
    plan = case.plan(CHOSEN["half"])
    out, _ = rewritten(source, plan, tmp_path)
    assert_exactly_the_plan_is_gone(exporter, source, out, plan)
    dtype = "int8" if exporter.endswith("dynamic") else "int4"
    assert_loses_no_more(case.model, plan, source, out, dtype)
    assert file_bytes(out) < file_bytes(source)
    # W is stored as its neighbours are: read by the operator that reads theirs.
    kind = {"nbits": "MatMulNBits", "qdq": "DequantizeLinear", "dynamic": "MatMulInteger"}
    graph = onnx.load(str(out / GRAPH), load_external_data=False).graph
    stored = {t.name for t in graph.initializer if t.name.startswith("layers.1.nbl_linear.weight")}
    readers = {n.op_type for n in graph.node if stored & set(n.input)}
    assert kind[exporter.split("+")[1]] in readers and "MatMul" not in readers
