"""The static cache: its interface, its operators, and that every token's logits are transformers' own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.opt import modeling_opt

from nbl_export.errors import InputError
from nbl_export.export.forms import STATIC
from nbl_export.export.torch import export_torch
from nbl_export.models.dummy_run import check_supported
from tests.fixtures_graph import original_logits, ragged_rows
from tests.sessions import cpu_session
from tests.variants import SIZES

LAYERS, HEADS, DIM, VOCAB = 4, 2, 8, 260
SMALL_OPT: Any = {
    "vocab_size": 50,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def proto(static_graph: Path) -> onnx.ModelProto:
    return onnx.load(str(static_graph), load_external_data=False)


def randomized(model: Any, scale: float = 6) -> Any:
    """``model`` with attention that matters and biases that are not zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.eval().requires_grad_(False).parameters():
        if parameter.ndim == 2:
            parameter.mul_(scale)
        else:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# Structure ---------------------------------------------------------------------------------------


def interface(values: Any) -> list[tuple[str, int, tuple[int | str, ...]]]:
    kinds = [(v.name, v.type.tensor_type) for v in values]
    return [(n, t.elem_type, tuple(d.dim_param or d.dim_value for d in t.shape.dim)) for n, t in kinds]


def test_interface_is_the_documented_one(proto: onnx.ModelProto) -> None:
    tokens = ("batch_size", "sequence_length")
    buffer = ("batch_size", HEADS, "max_sequence_length", DIM)
    pairs = [f"{layer}.{side}" for layer in range(LAYERS) for side in ("key", "value")]
    assert interface(proto.graph.input) == [
        ("input_ids", onnx.TensorProto.INT64, tokens),
        ("position_ids", onnx.TensorProto.INT64, tokens),
        ("write_indices", onnx.TensorProto.INT64, ("batch_size",)),
        *((f"past_key_values.{p}", onnx.TensorProto.FLOAT, buffer) for p in pairs),
    ]
    assert interface(proto.graph.output) == [
        ("logits", onnx.TensorProto.FLOAT, (*tokens, VOCAB)),
        *((f"present.{p}", onnx.TensorProto.FLOAT, buffer) for p in pairs),
    ]


def test_opset_24_and_standard_operators_only(proto: onnx.ModelProto, static_graph: Path) -> None:
    onnx.checker.check_model(str(static_graph), full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 24)]
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    assert all(onnx.defs.get_schema(n.op_type, 24).since_version <= 24 for n in proto.graph.node)


def test_each_layer_writes_two_buffers_and_attends_once_in_groups(proto: onnx.ModelProto) -> None:
    ops = Counter(n.op_type for n in proto.graph.node)
    assert (ops["TensorScatter"], ops["Attention"]) == (2 * LAYERS, LAYERS)
    assert (ops["RMSNormalization"], ops["RotaryEmbedding"]) == (2 * LAYERS + 1, 2 * LAYERS)
    # Grouped keys are not repeated, and norms and rotary embeddings are not taken apart.
    assert not ops.keys() & {"Expand", "Tile", "ReduceMean", "Pow", "Softmax", "ScatterND"}
    assert (ops["Cos"], ops["Sin"], ops["LessOrEqual"]) == (1, 1, 1)
    writers = {n.output[0]: n for n in proto.graph.node if n.op_type == "TensorScatter"}
    attended = [n.input[1:3] for n in proto.graph.node if n.op_type == "Attention"]
    for layer in range(LAYERS):
        present = [f"present.{layer}.{side}" for side in ("key", "value")]
        assert [list(names) for names in attended].count(present) == 1
        for side, name in zip(("key", "value"), present, strict=True):
            node = writers[name]
            assert (node.input[0], node.input[2]) == (f"past_key_values.{layer}.{side}", "write_indices")
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes["axis"] == -2 and attributes.get("mode", b"linear") == b"linear"


# Numbers -----------------------------------------------------------------------------------------


class Buffers:
    """The graph's cache, kept by the test: ``capacity`` places, all of them ``garbage`` at first."""

    def __init__(self, path: Path, batch: int, capacity: int, garbage: float = 0.0) -> None:
        self.session = cpu_session(path)
        shapes = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past")}
        generator = np.random.default_rng(9)
        self.past = {
            n: (garbage * generator.standard_normal((batch, s[1], capacity, s[3]))).astype(np.float32)
            for n, s in shapes.items()
        }

    def __call__(self, tokens: Sequence[Any], at: Sequence[int], pad: int = 0) -> list[Any]:
        """Logits of each row's ``tokens``, written from its place ``at``; rows are padded on the right."""
        width = max(map(len, tokens))
        ids = np.stack([np.r_[t, np.full(width - len(t), pad)].astype(np.int64) for t in tokens])
        start = np.array(at, dtype=np.int64)
        feeds = {"input_ids": ids, "position_ids": start[:, None] + np.arange(width), "write_indices": start}
        logits, *present = self.session.run(None, feeds | self.past)
        self.past = dict(zip(self.past, present, strict=True))
        return [logits[i, : len(t)] for i, t in enumerate(tokens)]


def worst(
    path: Path, rows: Sequence[Any], chunks: Sequence[Sequence[int]], model: Any, **options: Any
) -> float:
    """Feed ``chunks[step][row]`` tokens of each row at a time; the largest difference of any logit.

    A row with no tokens left in a step is fed padding where its next token will go.
    """
    capacity = options.pop("capacity", max(map(len, rows)) + max(map(max, chunks)))
    pad = options.pop("pad", 0)
    buffers = Buffers(path, len(rows), capacity, **options)
    done = [0] * len(rows)
    found: list[list[Any]] = [[] for _ in rows]
    for sizes in chunks:
        parts = [r[d : d + n] for r, d, n in zip(rows, done, sizes, strict=True)]
        for i, logits in enumerate(buffers(parts, done, pad)):
            found[i].extend(logits)
        done = [d + n for d, n in zip(done, sizes, strict=True)]
    assert done == [len(r) for r in rows]
    expected = [original_logits(model, row) for row in rows]
    return max(float(np.abs(np.stack(f) - e).max()) for f, e in zip(found, expected, strict=True))


ONE = (1, 1, 1)


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([(11, 6, 2)], id="ragged prefill"),
        pytest.param([(11, 6, 2), ONE, ONE, ONE, ONE, ONE], id="prefill, then decode"),
        pytest.param([ONE] * 7, id="one token at a time"),
        pytest.param([(6, 3, 1), (5, 4, 3), ONE, ONE], id="two chunks, then decode"),
        pytest.param([(9, 2, 4), (1, 5, 2), (3, 3, 3), ONE], id="chunks that change places"),
        pytest.param([(4, 7, 5), (0, 2, 1), (2, 0, 1), ONE], id="rows that wait"),
        pytest.param([(7,), (1,), (1,)], id="batch 1"),
        pytest.param([(1,), (1,)], id="batch 1 from one token"),
    ],
)
def test_logits_equal_transformers(
    static_graph: Path, tiny_model: Any, chunks: list[tuple[int, ...]]
) -> None:
    rows = ragged_rows(np.sum(chunks, axis=0).tolist(), VOCAB, seed=1)
    assert worst(static_graph, rows, chunks, tiny_model) < 2e-4


@pytest.mark.parametrize("extra", [0, 1, 50])
def test_the_last_place_of_the_buffer_serves_and_free_places_do_not_matter(
    static_graph: Path, tiny_model: Any, extra: int
) -> None:
    """The longest row fills the buffer to its end."""
    rows = ragged_rows((12, 7, 5), VOCAB, seed=2)
    chunks = [(10, 5, 3), ONE, ONE]
    assert worst(static_graph, rows, chunks, tiny_model, capacity=12 + extra) < 2e-4


@pytest.mark.parametrize("garbage", [1.0, 1e4])
@pytest.mark.parametrize("pad", [0, 259])
def test_what_lies_in_free_places_and_in_padding_is_not_seen(
    static_graph: Path, tiny_model: Any, garbage: float, pad: int
) -> None:
    rows = ragged_rows((13, 8, 3), VOCAB, seed=3)
    chunks = [(9, 5, 1), (2, 1, 1), ONE, (1, 1, 0)]
    assert worst(static_graph, rows, chunks, tiny_model, garbage=garbage, pad=pad) < 2e-4


def test_the_cache_holds_transformers_keys_and_values(static_graph: Path, tiny_model: Any) -> None:
    rows = ragged_rows((9, 6), VOCAB, seed=5)
    buffers = Buffers(static_graph, 2, 14, garbage=5.0)
    untouched = {n: a.copy() for n, a in buffers.past.items()}
    buffers([r[:-1] for r in rows], (0, 0))
    buffers([r[-1:] for r in rows], (8, 5))
    for number, row in enumerate(rows):
        with torch.inference_mode():
            cache = tiny_model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).past_key_values
        for layer, entry in enumerate(cache.layers):
            for side, expected in (("key", entry.keys), ("value", entry.values)):
                found = buffers.past[f"past_key_values.{layer}.{side}"][number]
                np.testing.assert_allclose(found[:, : len(row)], expected[0].numpy(), rtol=0, atol=1e-4)
                # Beyond the widest write nothing is touched.
                before = untouched[f"past_key_values.{layer}.{side}"][number]
                assert np.array_equal(found[:, 9:], before[:, 9:])


# Other families ----------------------------------------------------------------------------------


def test_sliding_window_holds_beyond_the_window(tmp_path: Path) -> None:
    model = randomized(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)))
    model.set_attn_implementation("eager")
    path, _ = export_torch(model, tmp_path / "model.onnx", form=STATIC)
    assert model.config._attn_implementation == "eager"
    rows = ragged_rows((17, 7, 4), 50)
    assert worst(path, rows, [(9, 3, 2), (3, 1, 0), ONE, ONE, (3, 1, 0)], model, garbage=10) < 2e-4
    # The window matters: without it the logits are others.
    windowed = original_logits(model, rows[0])
    model.config.sliding_window = None
    assert np.abs(original_logits(model, rows[0]) - windowed).max() > 1e-2


def test_window_in_some_layers_only(tmp_path: Path) -> None:
    """Two masks in one graph, each with its own rule."""
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    model = randomized(Qwen2ForCausalLM(config))
    path, _ = export_torch(model, tmp_path / "model.onnx", form=STATIC)
    rows = ragged_rows((11, 8), 50)
    assert worst(path, rows, [(7, 3), (2, 3), (1, 1), (1, 1)], model, garbage=10) < 2e-4
    masks = {n.input[3] for n in onnx.load(str(path)).graph.node if n.op_type == "Attention"}
    assert len(masks) == 2


def test_a_model_that_makes_its_mask_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomized(OPTForCausalLM(OPTConfig(**SMALL_OPT)))
    check_supported(model)  # as it is
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool)
    monkeypatch.setattr(modeling_opt, "create_causal_mask", lambda **_: mask, raising=False)
    with pytest.raises(
        InputError, match=r"OPTForCausalLM makes its attention mask itself.*--kv-cache concat"
    ):
        export_torch(model, tmp_path / "model.onnx", form=STATIC)


def test_a_model_without_position_ids_is_refused(tmp_path: Path) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)).eval()
    before = model.config._attn_implementation
    with pytest.raises(
        InputError, match=r"BloomForCausalLM takes no position_ids.*--kv-cache concat"
    ) as caught:
        export_torch(model, tmp_path / "model.onnx", form=STATIC)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    assert model.config._attn_implementation == before
