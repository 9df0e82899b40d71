"""Candidates on the CPU: what a cell of each really runs, and what one round of it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.engine.network import Limits
from nbl_export.errors import NblError
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.session import CUDA
from nbl_export.runtime.tensorrt import EngineStream
from nbl_export.verify.speed.candidates import (
    TIMED_STEPS,
    EncoderPass,
    EnginePrompt,
    OrtGraph,
    TorchPrompt,
    graph_candidate,
)
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.race import DECODE_STEPS, Rounds, decode_seconds, prefill_seconds, race
from nbl_export.verify.speed.values import CandidateInfo
from tests.runtime.fake_tensorrt import FakeEngine, Graphs, loaded_engine
from tests.verify.clocked import Scripted

ROOM = Limits(max_batch=2, max_seq=12, max_context=12 + TIMED_STEPS)


def cached(model: Any, tokens: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values [heads, tokens, head_dim] of each layer, by transformers."""
    with torch.inference_mode():
        cache = model(torch.tensor([list(tokens)]), use_cache=True).past_key_values
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]


@pytest.mark.parametrize("form", ["static", "concat"])
def test_an_engine_really_fills_its_cache_and_advances(graphs: Graphs, form: str) -> None:
    stream = EngineStream(loaded_engine(graphs(form), ROOM))
    prompt = EnginePrompt(stream, 12)
    for steps in (TIMED_STEPS, 3):  # to the end of the context, and anew from an empty cache
        prompt.prefill()
        for _ in range(steps):
            prompt.step()
        pairs, real = stream.cache()
        assert real.sum() == 12 + steps
        for pair, expected in zip(pairs, cached(graphs.model, [*range(12), *[1] * steps]), strict=True):
            for side, wanted in zip(pair, expected, strict=True):
                np.testing.assert_allclose(side[0][:, real[0]], wanted, rtol=0, atol=1e-4)
    assert prompt.memory_bytes() == stream.cache_bytes + 2 * FakeEngine.device_memory_size_v2


def test_no_timed_step_records_a_graph(graphs: Graphs) -> None:
    """Recording takes far longer than a step: it belongs to the warm-up, or the 99th percentile is its time."""
    loaded = loaded_engine(graphs("static"), ROOM)
    prompt = EnginePrompt(EngineStream(loaded), 12)
    race({"base engine": prompt}, decode_seconds, Rounds(3, 3), lambda _: None)
    events = loaded.device.events  # type: ignore[attr-defined]
    assert events.count("replay") > 0
    second = [i for i, event in enumerate(events) if event == ("run", "prefill")][1]
    assert ("capture", "decode") in events[:second]
    assert ("capture", "decode") not in events[second:]


def test_a_round_of_decode_is_some_steps_after_the_prompt(clock: list[float]) -> None:
    log: list[str] = []
    prompt: Any = Scripted("it", clock, log, lambda n: float(n))
    assert decode_seconds(prompt) == pytest.approx(tuple(range(1, 1 + DECODE_STEPS)))
    assert log == ["it rewind", *["it step"] * (1 + DECODE_STEPS)]
    log.clear()
    assert len(prefill_seconds(prompt)) == 1 and log == ["it prefill"]


def test_pytorch_begins_anew_and_advances(stories_model: Any) -> None:
    stories_model.set_attn_implementation("sdpa")
    prompt = TorchPrompt(stories_model, 12)
    for steps in (5, 2):
        prompt.prefill()
        for _ in range(steps):
            prompt.step()
        expected = cached(stories_model, [*range(12), *[0] * steps])
        for layer, (keys, values) in zip(prompt._cache.layers, expected, strict=True):
            np.testing.assert_allclose(layer.keys[0].numpy(), keys, rtol=0, atol=1e-4)
            np.testing.assert_allclose(layer.values[0].numpy(), values, rtol=0, atol=1e-4)
        assert prompt.memory_bytes() == 2 * 5 * 4 * (12 + steps) * 8 * 4


def test_a_missing_provider_is_named(graphs: Graphs) -> None:
    with pytest.raises(NblError, match=r"^onnxruntime has no CUDAExecutionProvider here$"):
        OrtGraph(graphs("static"), CUDA)(12)


def test_a_graph_takes_part_with_its_own_cost_and_is_loaded_only_when_asked(graphs: Graphs) -> None:
    path = graphs("concat", "fp32", (0, 3))
    candidate = graph_candidate("linearized", path, "base")
    assert candidate.info == CandidateInfo("linearized", "base", graph_cost(path)) and candidate.graph == path
    assert "model" not in vars(candidate.make)
    prompts = [candidate.make(context, batch) for context, batch in ((8, 1), (12, 2))]
    assert prompts[0].model is prompts[1].model  # type: ignore[attr-defined]
    # Keys and values of three layers, four heads of eight float32.
    for prompt, places in zip(prompts, (8, 24), strict=True):
        prompt.prefill()
        assert prompt.memory_bytes() == 2 * 3 * 4 * places * 8 * 4


def test_an_encoder_s_pass_is_its_batch_and_nothing_after_it(tmp_path: Path) -> None:
    """A graph that has no token types is not given any."""
    shape = ir.Shape(["batch", "sequence"])
    ids, mask = (
        ir.Value(name=n, shape=shape, type=ir.TensorType(ir.DataType.INT64))
        for n in ("input_ids", "attention_mask")
    )
    node = ir.node("Mul", [ids, mask])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "logits", ids.type, shape
    graph = ir.Graph([ids, mask], node.outputs, nodes=[node], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    model = OrtModel(tmp_path / "model.onnx")
    batch = {"input_ids": np.arange(6).reshape(2, 3), "attention_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    ran: list[Any] = []
    session = model.session

    class Watched:
        def run(self, names: Any, feeds: Any) -> None:
            ran.append(session.run(names, feeds))

    model.session = Watched()
    once = EncoderPass(model, {**batch, "token_type_ids": np.zeros((2, 3), np.int64)})
    once.prefill()
    once.step()
    assert [run[0].tolist() for run in ran] == [[[0, 1, 0], [3, 4, 5]]] and once.memory_bytes() == 0
