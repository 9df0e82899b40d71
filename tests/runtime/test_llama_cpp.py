"""Models and plans in llama.cpp against PyTorch: every form of a layer, formats, tokens, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.convert.gguf import matrices_of, write_gguf
from nbl_export.convert.gguf_tokenizer import TokenizerFields, fields_of
from nbl_export.linearize.plan import DROPPED, Plan
from nbl_export.progress import Silent
from nbl_export.runtime.llama_cpp import LlamaCppStream, quantize
from nbl_export.stages.forms import Gguf
from nbl_export.verify.parity.decoder import compare, record
from nbl_export.verify.parity.figures import Parity, gates_for
from nbl_export.verify.parity.pytorch import record_pytorch
from tests.converting import WRONG, needs, wrongly
from tests.fixtures_graph import ragged_rows
from tests.tiny_types import tiny_model

pytestmark = needs(Gguf)
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
            record_pytorch(model, plan, rows, steps), record(stream, rows, steps), gates_for("float32")
        )


@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_layer(
    name: str,
    tmp_path: Path,
    random_plan: RandomPlan,
    no_tokenizer: TokenizerFields,
) -> None:
    kind, changes = MODELS[name]
    model = tiny_model(kind, num_hidden_layers=4, **changes)
    plan, path = random_plan(model, CHOSEN), tmp_path / "model.gguf"
    write_gguf(path, model, plan, no_tokenizer, "F32", Silent())
    assert parity(path, model, plan).failures() == []
    # It is not that of another model.
    assert parity(path, model, None).failures() != []


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_file_is_seen(
    change: str,
    tmp_path: Path,
    random_plan: RandomPlan,
    no_tokenizer: TokenizerFields,
) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    plan, path = random_plan(model, CHOSEN), tmp_path / "model.gguf"
    write_gguf(path, model, wrongly(change, plan), no_tokenizer, "F32", Silent())
    assert parity(path, model, plan).failures() != []


def test_spans_and_what_is_dropped(
    tmp_path: Path,
    random_plan: RandomPlan,
    no_tokenizer: TokenizerFields,
) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    plan = random_plan(model, [Span(1, 2)])
    first = plan.layers[1]
    plan = plan.with_replaced({Span(1, 2): first, 0: DROPPED, Mlp(4): DROPPED})
    path = tmp_path / "model.gguf"
    write_gguf(path, model, plan, no_tokenizer, "F32", Silent())
    assert parity(path, model, plan).failures() == []
    with LlamaCppStream(path, 1, 256, fused=True) as stream:
        heads, size = model.config.num_key_value_heads, 32 // model.config.num_attention_heads
        assert abs(stream.cache_bytes - 2 * 2 * heads * size * 4 * stream.slots) <= 0.01 * 2**20


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


def test_what_is_timed_reads_the_prompt_goes_on_and_comes_back(
    tmp_path: Path, random_plan: RandomPlan, no_tokenizer: TokenizerFields
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
            stream.forget(40)
        # Without forgetting, it is another text.
        stream.decode([3, 3])
        assert np.abs(stream.decode([7, 9]) - steps[0]).max() > 1e-3


def test_its_quantizer_leaves_w_in_float16(
    tmp_path: Path, random_plan: RandomPlan, no_tokenizer: TokenizerFields
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
