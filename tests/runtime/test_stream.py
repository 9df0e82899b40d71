"""Streams: whatever the runtime pads and however it keeps the cache, each row is the row run alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from nbl_export.batch import F32
from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.graph.regions import Region, find_regions
from nbl_export.linearize.swap import linearized
from nbl_export.runtime import intermediates as pieces_module
from nbl_export.runtime.intermediates import compute_tensors, prefill_rows
from nbl_export.runtime.ort import OrtModel, OrtRowsStream, ort_stream
from nbl_export.runtime.stream import PastStream, RowStream
from nbl_export.runtime.torch import TorchDecoder
from tests.fixtures_graph import cpu_session, maps_in_place, original_logits, plan_by_hand, ragged_rows
from tests.graph.by_hand import parsed

LAYERS, HEADS, DIM, VOCAB = 4, 2, 8, 260


LENGTHS, STEPS = (11, 6, 1), 4


@pytest.fixture(scope="module")
def graphs(tiny_graph: Path, static_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """The tiny Llama by form and precision."""
    folder = tmp_path_factory.mktemp("streams")
    found = {("concat", "fp32"): tiny_graph, ("static", "fp32"): static_graph}
    for form in ("concat", "static"):
        for name in ("fp16", "bf16"):
            graph = load_graph(found[form, "fp32"])
            to_precision(graph, PRECISIONS[name], {})
            found[form, name] = folder / f"{form}-{name}" / "model.onnx"
            save_graph(graph, found[form, name])
    return found


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    return ragged_rows([n + STEPS for n in LENGTHS], VOCAB, seed=1)


def teacher_forced(stream: Any, rows: Sequence[Any], steps: int = STEPS) -> list[Any]:
    """Logits of every token of each row: all but the last ``steps`` prefilled, the rest decoded."""
    lengths = [len(r) - steps for r in rows]
    logits = stream.prefill([r[:n] for r, n in zip(rows, lengths, strict=True)])
    assert len(logits) == sum(lengths) and logits.dtype == np.float32
    found = [list(part) for part in np.split(logits, np.cumsum(lengths)[:-1])]
    for step in range(steps):
        logits = stream.decode([int(r[n + step]) for r, n in zip(rows, lengths, strict=True)])
        for row, token in zip(found, logits, strict=True):
            row.append(token)
    return [np.stack(row) for row in found]


def torch_cache(model: Any, row: Any) -> list[Any]:
    with torch.inference_mode():
        cache = model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=True).past_key_values
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]


@pytest.mark.parametrize("form", ["concat", "static"])
def test_every_row_is_the_row_alone(graphs: Any, form: str, rows: list[Any], tiny_model: Any) -> None:
    stream = ort_stream(graphs[form, "fp32"], 20)
    assert isinstance(stream, OrtRowsStream if form == "static" else PastStream)
    assert stream.kv_layers == (0, 1, 2, 3)
    for row, found in zip(rows, teacher_forced(stream, rows), strict=True):
        np.testing.assert_allclose(found, original_logits(tiny_model, row), rtol=0, atol=2e-4)
    pairs, real = stream.cache()
    assert len(pairs) == LAYERS and real.dtype == bool
    for number, row in enumerate(rows):
        assert real[number].sum() == len(row)
        for found_pair, expected_pair in zip(pairs, torch_cache(tiny_model, row), strict=True):
            for found, expected in zip(found_pair, expected_pair, strict=True):
                assert found.shape == (len(rows), HEADS, real.shape[1], DIM)
                np.testing.assert_allclose(found[number][:, real[number]], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("of", ["onnxruntime", "pytorch"])
def test_a_prefill_need_not_make_all_logits(
    graphs: Any, rows: list[Any], tiny_model: Any, of: str, logits_made: Any
) -> None:
    """The last logits are the row's, no others are made, and decoding goes on from there."""
    decoder = OrtModel(graphs["concat", "fp32"]) if of == "onnxruntime" else TorchDecoder(tiny_model)
    made = logits_made(type(decoder))
    stream = PastStream(decoder)
    last = stream.prefill_last([row[:-1] for row in rows])
    following = stream.decode([int(row[-1]) for row in rows])
    assert made == [(len(rows), 1, VOCAB)] * 2
    for row, *found in zip(rows, last, following, strict=True):
        np.testing.assert_allclose(found, original_logits(tiny_model, row)[-2:], rtol=0, atol=2e-4)


def test_a_static_stream_serves_its_whole_capacity_and_no_more(graphs: Any, tiny_model: Any) -> None:
    stream = ort_stream(graphs["static", "fp32"], 9)
    rows = ragged_rows((9, 5), VOCAB)
    for row, found in zip(rows, teacher_forced(stream, rows, 2), strict=True):
        np.testing.assert_allclose(found, original_logits(tiny_model, row), rtol=0, atol=2e-4)
    assert stream.cache()[1].tolist() == [[True] * 9, [True] * 5 + [False] * 4]
    with pytest.raises(InputError, match="10 tokens do not fit into a static cache of 9 slots"):
        stream.decode([1, 1])
    with pytest.raises(InputError, match="10 tokens do not fit"):
        stream.prefill(ragged_rows((10,), VOCAB))


class Echo(RowStream):
    """Its logits and its keys are the tokens, its values twice as much."""

    kv_layers = (1, 3)

    def _empty(self) -> Any:
        return []

    def _logits(self, tokens: NDArray[Any], cache: Any) -> F32:
        cache.extend(tokens.tolist())
        return np.array(tokens, np.float32)[:, None]

    def _sides(self, cache: Any) -> list[tuple[F32, F32]]:
        keys = np.array(cache, np.float32)[None, None, :, None]
        return [(keys, 2 * keys), (keys + 10, 2 * keys + 20)]


def test_each_row_has_a_cache_of_its_own_which_is_padded_to_the_longest() -> None:
    stream = Echo()
    assert stream.prefill([np.array([1, 2, 3]), np.array([4])]).tolist() == [[1], [2], [3], [4]]
    assert stream.decode([5, 6]).tolist() == [[5], [6]]
    pairs, real = stream.cache()
    assert real.tolist() == [[True] * 4, [True, True, False, False]]
    assert len(pairs) == 2
    for number, (keys, values) in enumerate(pairs):
        ten = 10 * number
        assert keys[0, 0, :, 0].tolist() == [1 + ten, 2 + ten, 3 + ten, 5 + ten]
        assert keys[1, 0, :, 0].tolist() == [4 + ten, 6 + ten, 0, 0]
        assert np.array_equal(values, 2 * keys)
    stream.prefill([np.array([7])])
    assert stream.cache()[1].tolist() == [[True]]


@pytest.mark.parametrize("layers", [(), (0,), (0, 1), (2, 4), (0, 1, 2, 3, 4)], ids=str)
def test_masks_and_positions_stay_right_across_decode(
    stories_out: Path, stories_model: Any, layers: tuple[int, ...]
) -> None:
    """Against one pass over the whole row without a cache; the first layer is the one usually asked."""
    plan = plan_by_hand(stories_out, layers)
    rows = ragged_rows((18, 13, 6), 500, seed=4)
    with linearized(stories_model, plan):
        decoder = TorchDecoder(stories_model, plan.chosen)
        assert decoder.kv_layers == tuple(i for i in range(5) if i not in layers)
        assert len(decoder.empty_past(3)) == 5 - len(layers)
        found = teacher_forced(PastStream(decoder), rows, 5)
    for row, logits in zip(rows, found, strict=True):
        with maps_in_place(stories_model, plan):
            expected = original_logits(stories_model, row)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-4)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The weights of every piece that is run."""
    seen: list[list[str]] = []
    real = pieces_module._proto

    def proto(*given: Any) -> Any:
        made = real(*given)
        seen.append([t.name for t in made.graph.initializer])
        return made

    monkeypatch.setattr(pieces_module, "_proto", proto)
    return seen


def whole(path: Path, names: list[str], feeds: dict[str, Any]) -> list[Any]:
    """The same tensors by onnxruntime itself, as outputs of the whole graph."""
    model = load_graph(path)
    values = {v.name: v for node in model.graph for v in node.outputs}
    for name in names:
        if not values[name].is_graph_output():
            values[name].type = values[name].type or ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(values[name])
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    runner = cpu_session(model, options)
    return runner.run(names, feeds)  # type: ignore[no-any-return]


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
def test_any_cut_gives_the_same_tensors(tiny_graph: Path, sizes: list[list[str]], limit: int) -> None:
    model = load_graph(tiny_graph)
    regions = [r for r in find_regions(model) if isinstance(r, Region)]
    names = [str(v.name) for r in regions for v in (r.inputs[0], r.outputs[0].value)] + [
        "logits",
        "present.3.value",
    ]
    rows = prefill_rows(model, ragged_rows((9, 4), 260))
    found = compute_tensors(load_graph(tiny_graph), names, rows, limit)
    for row, tensors in zip(rows, found, strict=True):
        for name, expected in zip(names, whole(tiny_graph, names, row), strict=True):
            np.testing.assert_allclose(tensors[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    count = {1: 20, 20_000: 3, 1 << 30: 1}[limit]
    assert len(sizes) >= count and (limit > 1 << 20) == (len(sizes) == 1)
    if limit == 1:  # a piece holds what one node reads, and no weight comes twice but for a tied one
        assert max(map(len, sizes)) <= 4


def test_a_tensor_that_is_given_cuts_what_lies_before_it(tiny_graph: Path, sizes: list[list[str]]) -> None:
    model = load_graph(tiny_graph)
    region = find_regions(model)[2]
    assert isinstance(region, Region)
    rows = prefill_rows(model, ragged_rows((6,), 260))
    x = np.random.default_rng(0).standard_normal((1, 6, 32)).astype(np.float32)
    (found,) = compute_tensors(
        load_graph(tiny_graph),
        [str(region.outputs[0].value.name)],
        [{**rows[0], str(region.inputs[0].name): x}],
    )
    weights = {name for piece in sizes for name in piece}
    assert weights and all("layers.2.self_attn" in n or "layers" not in n for n in weights)
    (other,) = compute_tensors(
        load_graph(tiny_graph),
        [str(region.outputs[0].value.name)],
        [{**rows[0], str(region.inputs[0].name): 2 * x}],
    )
    assert found[str(region.outputs[0].value.name)].shape == (1, 6, 32)
    assert not np.allclose(found[str(region.outputs[0].value.name)], other[str(region.outputs[0].value.name)])


def test_unknown_tensors_and_graphs_that_do_not_run_are_refused(tiny_graph: Path) -> None:
    rows = prefill_rows(load_graph(tiny_graph), ragged_rows((3,), 260))
    with pytest.raises(InputError, match="has no tensor 'nothing'"):
        compute_tensors(load_graph(tiny_graph), ["nothing"], rows)
    wrong = [{**rows[0], "input_ids": np.full((1, 3), 9999)}]  # no such token
    with pytest.raises(InputError, match="onnxruntime does not run the graph") as caught:
        compute_tensors(load_graph(tiny_graph), ["logits"], wrong)
    assert "\n" not in str(caught.value)


def test_computed_weights_are_made_where_they_are_read_and_not_carried(sizes: list[list[str]]) -> None:
    """A weight in another format is as large as itself: it belongs to the piece that multiplies by it."""
    text = """g (float[n] x) => (float[n] y) {
        wide_a = Cast<to = 1>(a)
        wide_b = Cast<to = 1>(b)
        m = Add(x, wide_a)
        n = Mul(m, wide_b)
        y = Sub(n, wide_a)
    }"""
    a, b = np.array([1, 2, 3], dtype=np.int32), np.array([4, 5, 6], dtype=np.int32)
    x = np.array([0.5, 1, 2], dtype=np.float32)
    (found,) = compute_tensors(parsed(text, a=a, b=b), ["y"], [{"x": x}], partition_bytes=12)
    assert found["y"].tolist() == ((x + a) * b - a).tolist()
    assert sizes == [["a"], ["b"], ["a"]]


def test_branches_read_tensors_from_outside(sizes: list[list[str]]) -> None:
    text = """g (float[n] x) => (float[n] y) {
        m = Abs(x)
        top = ReduceMax<keepdims = 0>(x)
        large = Greater(top, limit)
        y = If(large) <
            then_branch = t () => (float[n] added) { added = Add(m, w) },
            else_branch = e () => (float[n] scaled) { scaled = Mul(m, w) }
        >
    }"""
    weights = {"w": np.array([10], dtype=np.float32), "limit": np.float32(5)}
    for x, expected in (([1.0, -2.0], [10.0, 20.0]), ([9.0, -2.0], [19.0, 12.0])):
        feeds = {"x": np.array(x, dtype=np.float32)}
        (found,) = compute_tensors(parsed(text, **weights), ["y"], [feeds], partition_bytes=1)
        assert found["y"].tolist() == expected
    assert len(sizes) > 2
