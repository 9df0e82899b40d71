"""The file holds the model's numbers in llama.cpp's order; tests/runtime/test_llama_cpp.py shows that it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.blocks import Block, Mlp
from nbl_export.convert.gguf import FORMATS, write_gguf
from nbl_export.convert.gguf_tokenizer import TokenizerFields
from nbl_export.errors import InputError
from nbl_export.linearize.adapters import Adapter
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Silent
from tests.tiny_types import tiny_model

RandomPlan = Callable[[Any, Sequence[Block]], Plan]


@pytest.fixture
def written(
    tmp_path: Path, random_plan: RandomPlan, no_tokenizer: TokenizerFields
) -> Callable[..., tuple[Any, Plan, dict[str, Any], dict[str, Any]]]:
    """A tiny Llama with linear blocks as a file: the model, the plan, the file's tensors, and its fields."""

    def write(form: str = "F32", blocks: Sequence[Block] = (1, Mlp(2)), adapt: bool = False) -> Any:
        from gguf import GGUFReader, dequantize

        model = tiny_model("llama", num_hidden_layers=3, attention_bias=True)
        plan = random_plan(model, blocks)
        if adapt:
            up, down = np.ones((64, 1), np.float32), np.full((1, 32), 0.5, np.float32)
            shape = model.get_parameter("model.layers.0.mlp.up_proj.weight").shape
            change = Adapter(np.resize(up, (shape[0], 1)), np.resize(down, (1, shape[1])), ())
            plan = Plan(**{**vars(plan), "adapters": {"model.layers.0.mlp.up_proj.weight": change}})
        path = tmp_path / f"model-{form}.gguf"
        write_gguf(path, model, plan, no_tokenizer, form, Silent())
        reader = GGUFReader(path)
        tensors = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return model, plan, tensors, fields

    return write


def test_the_numbers_are_the_models(written: Callable[..., Any]) -> None:
    model, plan, tensors, fields = written()
    own = {name: p.numpy() for name, p in model.named_parameters()}
    assert fields["general.architecture"] == "deci" and fields["deci.block_count"] == 5
    heads, kv = model.config.num_attention_heads, model.config.num_key_value_heads
    assert fields["deci.attention.head_count"] == [heads, heads, 0, heads, heads]
    assert fields["deci.attention.head_count_kv"] == [kv, 0, 0, kv, 0]
    assert np.array_equal(tensors["token_embd.weight"], own["model.embed_tokens.weight"])
    assert np.array_equal(tensors["blk.2.ffn_up.weight"], own["model.layers.1.mlp.up_proj.weight"])
    assert np.array_equal(tensors["blk.0.attn_output.bias"], own["model.layers.0.self_attn.o_proj.bias"])
    # W stands behind the norm of what it replaces, and its bias where one is added.
    assert np.array_equal(tensors["blk.1.attn_output.weight"], plan.layers[1].w)
    assert np.array_equal(tensors["blk.1.ffn_down.bias"], plan.layers[1].b)
    assert np.array_equal(tensors["blk.1.attn_norm.weight"], own["model.layers.1.input_layernorm.weight"])
    assert np.array_equal(tensors["blk.4.attn_output.weight"], plan.layers[Mlp(2)].w)
    assert np.array_equal(
        tensors["blk.4.attn_norm.weight"], own["model.layers.2.post_attention_layernorm.weight"]
    )
    assert not tensors["blk.1.ffn_up.weight"].any() and "blk.2.attn_q.weight" not in tensors
    # Element i of each half is neighbour 2 i and 2 i + 1.
    for name, count in (("q", heads), ("k", kv)):
        for kind in ("weight", "bias"):
            rows = own[f"model.layers.0.self_attn.{name}_proj.{kind}"].reshape(
                count, 2, -1, *[32] * (kind == "weight")
            )
            found = tensors[f"blk.0.attn_{name}.{kind}"].reshape(count, -1, 2, *[32] * (kind == "weight"))
            assert np.array_equal(found[:, :, 0], rows[:, 0]) and np.array_equal(found[:, :, 1], rows[:, 1])


@pytest.mark.parametrize(("form", "error"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2)])
def test_matrices_are_in_the_format_and_vectors_are_not(
    written: Callable[..., Any], form: str, error: float
) -> None:
    assert form in FORMATS
    _, plan, tensors, _ = written(form)
    w, b = tensors["blk.1.attn_output.weight"], tensors["blk.1.ffn_down.bias"]
    assert np.array_equal(b, plan.layers[1].b) and not np.array_equal(w, plan.layers[1].w)
    assert np.abs(w - plan.layers[1].w).max() <= error * np.abs(plan.layers[1].w).max()


def test_what_a_repair_changed_is_in_the_file(written: Callable[..., Any]) -> None:
    model, plan, tensors, _ = written(adapt=True)
    ((name, adapter),) = plan.adapters.items()
    expected = model.get_parameter(name).numpy() + adapter.change()
    assert np.array_equal(tensors["blk.0.ffn_up.weight"], expected)


def test_numbers_that_float16_does_not_have_are_refused_and_nothing_is_left(
    tmp_path: Path, random_plan: RandomPlan, no_tokenizer: TokenizerFields
) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(
        InputError, match=r"blk\.0\.ffn_up\.weight has numbers that float16 does not have: use"
    ):
        write_gguf(tmp_path / "a.gguf", model, random_plan(model, [1]), no_tokenizer, "F16", Silent())
    assert not list(tmp_path.iterdir())
