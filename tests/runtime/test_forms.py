"""Models and plans in llama.cpp against PyTorch: every form of a layer, formats, tokens, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.convert.folders import write_hf, write_mlx
from nbl_export.convert.gguf import Fields, fields_of, matrices_of, write_gguf
from nbl_export.convert.openvino import write_openvino
from nbl_export.errors import BuildError
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.modeling_nbl import TYPES
from nbl_export.progress import Silent
from nbl_export.runtime.clients import FILE, LlamaCppStream, MlxStream, OpenVinoStream, quantize
from nbl_export.runtime.torch import TransformersStream
from nbl_export.verify.parity.compare import Text, compare
from nbl_export.verify.parity.figures import Parity, gates_for
from nbl_export.verify.parity.pytorch import record_pytorch
from tests.conftest import exhaustive
from tests.convert.test_folders import NoTokenizer
from tests.families import (
    DECODERS,
    WRONG,
    Calibrated,
    assert_as_in_pytorch,
    build,
    calibrated,
    needs,
    stream_parity,
    wrongly,
)
from tests.fixtures_graph import ragged_rows, recorded
from tests.tiny_types import tiny_model

GGUF = needs("gguf")
RandomPlan = Callable[[Any, Sequence[Block]], Plan]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "llama3 rope": ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
}
CHOSEN: tuple[Block, ...] = (0, 2, Mlp(3))


def parity(path: Path, model: Any, plan: Plan | None, steps: int = 4) -> Parity:
    rows = ragged_rows([40, 9, 23], model.config.vocab_size)
    with LlamaCppStream(path, len(rows), 64) as stream:
        return compare(
            record_pytorch(model, plan, Text(rows, steps)),
            recorded(stream, rows, steps),
            gates_for("float32"),
        )


@GGUF
@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_layer(
    name: str,
    tmp_path: Path,
    random_plan: RandomPlan,
    no_tokenizer: Fields,
) -> None:
    kind, changes = MODELS[name]
    model = tiny_model(kind, num_hidden_layers=4, **changes)
    plan, path = random_plan(model, CHOSEN), tmp_path / "model.gguf"
    write_gguf(path, model, plan, no_tokenizer, "F32", Silent())
    assert parity(path, model, plan).failures() == []
    # It is not that of another model.
    assert parity(path, model, None).failures() != []


@GGUF
@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_file_is_seen(
    change: str,
    tmp_path: Path,
    random_plan: RandomPlan,
    no_tokenizer: Fields,
) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    plan, path = random_plan(model, CHOSEN), tmp_path / "model.gguf"
    write_gguf(path, model, wrongly(change, plan), no_tokenizer, "F32", Silent())
    assert parity(path, model, plan).failures() != []


@GGUF
def test_tokens_are_those_of_the_models_tokenizer(
    stories_folder: Path,
    stories_model: Any,
    tmp_path: Path,
    random_plan: RandomPlan,
) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(stories_folder)
    path = tmp_path / "model.gguf"
    write_gguf(
        path, stories_model, random_plan(stories_model, [1]), fields_of(tokenizer, 512), "F32", Silent()
    )
    with LlamaCppStream(path, 1, 64) as stream:
        for text in ("Once upon a time, there was a girl.", " two  spaces\n\nlines", "naïve ☃ 123", ""):
            assert stream.tokenize(text) == tokenizer(text).input_ids


@GGUF
def test_what_is_timed_reads_the_prompt_goes_on_and_comes_back(
    tmp_path: Path, random_plan: RandomPlan, no_tokenizer: Fields
) -> None:
    """By the last logits: those of a step say what the cache holds."""
    model = tiny_model("llama", num_hidden_layers=4)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, random_plan(model, CHOSEN), no_tokenizer, "F32", Silent())
    rows = [np.arange(1, 41, dtype=np.int32), np.arange(5, 45, dtype=np.int32)]
    with LlamaCppStream(path, 2, 64, defaults=True) as stream:
        stream.prefill(rows)
        steps = [stream.decode([7, 9]), stream.decode([3, 3])]
        stream.prefill_last(rows)
        for _ in range(2):
            for tokens, expected in zip(([7, 9], [3, 3]), steps, strict=True):
                np.testing.assert_allclose(stream.decode(tokens), expected, rtol=0, atol=1e-5)
            assert stream.rewind(40)
        # Without forgetting, it is another text.
        stream.decode([3, 3])
        assert np.abs(stream.decode([7, 9]) - steps[0]).max() > 1e-3


@GGUF
def test_its_quantizer_leaves_w_in_float16(
    tmp_path: Path, random_plan: RandomPlan, no_tokenizer: Fields
) -> None:
    from gguf import GGUFReader

    model = tiny_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    plan, path = random_plan(model, CHOSEN), tmp_path / "model.gguf"
    write_gguf(path, model, plan, no_tokenizer, "F32", Silent())
    small, kept = tmp_path / "small.gguf", matrices_of(plan)

    def kinds(names: Sequence[str]) -> dict[str, str]:
        quantize(path, small, "Q4_K_M", names)
        return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(small).tensors}

    plain, found = kinds(()), kinds(kept)
    assert len(kept) == len(plan.layers)
    assert {plain[name] for name in kept} == {"Q4_K"} and {found[name] for name in kept} == {"F16"}
    assert {name for name in plain if plain[name] != found[name]} == set(kept)
    assert {kind for name, kind in found.items() if name.endswith(("bias", "norm.weight"))} == {"F32"}
    with LlamaCppStream(small, 1, 16) as stream:
        assert stream.prefill(ragged_rows([9], model.config.vocab_size)).shape[-1] == model.config.vocab_size


CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},  # of every layer, and shorter than the rows
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
}
# The first attention, whose place in a cache tells the length of a text, in some of them.
BLOCKS: tuple[tuple[Block, ...], ...] = ((0, 2, Mlp(3)), (Span(1, 2),), (0, 1), (3, Mlp(0)))


def written(path: Path, model: Any, plan: Plan) -> Path:
    write_hf(path, model, plan, NoTokenizer(), "float32", Silent())
    return path


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_and_form_of_a_layer(model_type: str, tmp_path: Path, random_plan: RandomPlan) -> None:
    model = tiny_model(model_type, num_hidden_layers=4, **CHANGES.get(model_type, {}))
    plan = random_plan(model, BLOCKS[TYPES.index(model_type) % len(BLOCKS)])
    written(tmp_path, model, plan)
    assert_as_in_pytorch(lambda: TransformersStream(tmp_path), model, plan)


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_folder_for_transformers_is_seen(
    change: str, tmp_path: Path, random_plan: RandomPlan
) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    plan = random_plan(model, [0, 2])
    assert (
        stream_parity(
            TransformersStream(written(tmp_path, model, wrongly(change, plan))), model, plan
        ).failures()
        != []
    )


def test_a_weight_that_is_missing_is_said(tmp_path: Path, random_plan: RandomPlan) -> None:
    """transformers makes one up."""
    model = tiny_model("llama", num_hidden_layers=4)
    config = written(tmp_path, model, random_plan(model, [2])) / "config.json"
    raw = json.loads(config.read_text())
    raw["nbl"]["modules"]["model.layers.1.self_attn"] = {"linear": True, "returns": 2}
    config.write_text(json.dumps(raw))
    with pytest.raises(BuildError, match=r"does not find every weight of .*: model\.layers\.1\.self_attn\."):
        TransformersStream(tmp_path)


MLX = needs("mlx")
MLX_MODELS: dict[str, tuple[str, dict[str, Any], tuple[Block, ...]]] = {
    "llama": ("llama", {}, (0, 2, Mlp(3))),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, (1,)),
    "tied": ("llama", {"tie_word_embeddings": True}, (1,)),
    "llama3 rope": (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
        (1, Mlp(1)),
    ),
    "mistral": ("mistral", {"sliding_window": None}, (Span(1, 2),)),
    "qwen2": ("qwen2", {}, (0, 2)),
}


@MLX
@pytest.mark.parametrize("name", MLX_MODELS)
def test_every_form_of_a_layer_in_mlx(name: str, tmp_path: Path, random_plan: RandomPlan) -> None:
    kind, changes, blocks = MLX_MODELS[name]
    model = tiny_model(kind, num_hidden_layers=4, **changes)
    plan = random_plan(model, blocks)
    write_mlx(tmp_path, model, plan, NoTokenizer(), "float32", Silent())
    assert_as_in_pytorch(lambda: MlxStream(tmp_path), model, plan)


@MLX
@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_folder_for_mlx_is_seen(change: str, tmp_path: Path, random_plan: RandomPlan) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    plan = random_plan(model, [0, 2])
    write_mlx(tmp_path, model, wrongly(change, plan), NoTokenizer(), "float32", Silent())
    assert stream_parity(MlxStream(tmp_path), model, plan).failures() != []


OPENVINO = needs("openvino")
# What keeps states of another kind; tests/convert/test_files.py sees it refused.
USUAL = ("gemma2", "gpt_oss", "falcon-alibi")
HYBRIDS = {"lfm2", "bamba", "nemotron_h", "falcon_h1", "qwen3_next", "minimax"}


def opened(folder: Path, case: Calibrated, plan: Plan) -> OpenVinoStream:
    write_openvino(folder, case.model, plan, NoTokenizer(), "float32", Silent())
    return OpenVinoStream(folder)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return calibrated(build("llama", tmp_path_factory.mktemp("llama")))


@OPENVINO
@pytest.mark.parametrize(
    "name",
    [n if n in USUAL else pytest.param(n, marks=exhaustive) for n in sorted(set(DECODERS) - HYBRIDS)],
)
def test_every_kind_of_attention(name: str, tmp_path: Path) -> None:
    case = calibrated(build(name, tmp_path / "model"))
    plan = case.plan((1, Mlp(0)))
    stream = opened(tmp_path / "form", case, plan)
    found = stream_parity(stream, case.model, plan)
    assert found.failures() == [] and all(step.kv_max_rel > 0 for step in found.steps)
    assert len(stream._request.query_state()) == 2 * len(stream.kv_layers) and 1 not in stream.kv_layers


@OPENVINO
def test_a_wrong_folder_for_openvino_is_seen(case: Calibrated, tmp_path: Path) -> None:
    plan = case.plan((1,))
    (own,) = plan.layers.values()
    stream = opened(tmp_path / "form", case, plan)
    for wrong in (LinearLayer(own.w * np.float32(1.01), own.b), LinearLayer(own.w, np.zeros_like(own.b))):
        assert stream_parity(stream, case.model, replace(plan, layers={1: wrong})).failures() != []


@OPENVINO
def test_what_openvino_times_has_the_last_logits_alone(case: Calibrated, tmp_path: Path) -> None:
    stream = opened(tmp_path, case, case.plan((1,)))
    rows = ragged_rows([9, 9], case.model.config.vocab_size)
    expected = stream.prefill_last(rows), stream.decode([5, 6])
    timed = OpenVinoStream(tmp_path, defaults=True)
    for found, own in zip((timed.prefill_last(rows), timed.decode([5, 6])), expected, strict=True):
        assert found.shape == own.shape and np.abs(found - own).max() < 0.05 * np.abs(own).max()
    assert timed.prefill_last(rows).tobytes() and timed._run(timed._begin(rows)).shape[1] == 1


@OPENVINO
def test_no_folder_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"OpenVINO does not load .*: "):
        OpenVinoStream(tmp_path)
    (tmp_path / FILE).write_text("<net>")
    with pytest.raises(BuildError, match=r"OpenVINO does not load .*: "):
        OpenVinoStream(tmp_path)


TWO = """
import os, signal, sys
from pathlib import Path
from nbl_export.runtime.clients import OpenVinoStream

signal.signal(signal.SIGINT, signal.default_int_handler)
a, b = (OpenVinoStream(Path(sys.argv[1])) for _ in range(2))
del a, b
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("no interrupt")
except KeyboardInterrupt:
    print("interrupted")
"""


@OPENVINO
def test_an_interrupt_after_two_of_them_is_one(case: Calibrated, tmp_path: Path) -> None:
    """OpenVINO would leave a stack of signal handlers that is freed, and Ctrl-C be a segmentation fault."""
    opened(tmp_path, case, case.plan((1,)))
    done = subprocess.run([sys.executable, "-c", TWO, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done
