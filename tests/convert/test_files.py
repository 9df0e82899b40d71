"""The files for llama.cpp and OpenVINO: numbers, orders and tokenizers; tests/runtime/test_forms.py runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.convert.gguf import (
    FORMATS,
    DeciBlock,
    Fields,
    blocks_of,
    check_stored,
    fields_of,
    fields_of_gguf,
    write_gguf,
)
from nbl_export.convert.openvino import check_held, write_openvino
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.linearize.plan import DROPPED, LinearLayer, Plan
from nbl_export.progress import Silent
from nbl_export.runtime.clients import FILE, TOKENIZERS
from tests.convert.test_folders import NoTokenizer
from tests.families import Calibrated, build, calibrated, needs, unsaved
from tests.processes import Notes
from tests.tiny_types import tiny_model

RandomPlan = Callable[[Any, Sequence[Block]], Plan]


@pytest.fixture
def written(
    tmp_path: Path, random_plan: RandomPlan, no_tokenizer: Fields
) -> Callable[..., tuple[Any, Plan, dict[str, Any], dict[str, Any]]]:
    """A tiny Llama with linear blocks as a file: the model, the plan, the file's tensors, and its fields."""

    def write(form: str = "F32", blocks: Sequence[Block] = (1, Mlp(2))) -> Any:
        from gguf import GGUFReader, dequantize

        model = tiny_model("llama", num_hidden_layers=3, attention_bias=True)
        plan = random_plan(model, blocks)
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


def test_numbers_that_float16_does_not_have_are_refused_and_nothing_is_left(
    tmp_path: Path, random_plan: RandomPlan, no_tokenizer: Fields
) -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(
        InputError, match=r"blk\.0\.ffn_up\.weight has numbers that float16 does not have: use"
    ):
        write_gguf(tmp_path / "a.gguf", model, random_plan(model, [1]), no_tokenizer, "F16", Silent())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("chosen", "layer"),
    [
        ([1], [DeciBlock(linear=1), DeciBlock(mlp=1)]),
        ([Mlp(1)], [DeciBlock(attention=1), DeciBlock(linear=Mlp(1))]),
        ([1, Mlp(1)], [DeciBlock(linear=1), DeciBlock(linear=Mlp(1))]),
        ([Span(1, 1)], [DeciBlock(linear=1)]),
    ],
)
def test_a_layer_is_as_many_blocks_as_it_has_biases(
    chosen: Sequence[Block], layer: Sequence[DeciBlock], random_plan: RandomPlan
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    plan = random_plan(model, chosen)
    first, last = DeciBlock(attention=0, mlp=0), DeciBlock(attention=2, mlp=2)
    assert blocks_of(plan) == (first, *layer, last)


def test_what_is_dropped_has_no_block_and_the_first_block_has_heads(random_plan: RandomPlan) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    plan = random_plan(model, []).with_replaced({0: DROPPED, Mlp(1): DROPPED, 2: DROPPED, Mlp(2): DROPPED})
    blocks = blocks_of(plan)
    assert blocks == (DeciBlock(), DeciBlock(mlp=0), DeciBlock(attention=1))
    assert blocks[0].has_heads and not blocks[1].has_heads and blocks[2].has_heads
    # Of a span the first layer has the map, the others nothing.
    span = blocks_of(random_plan(model, [Span(0, 1)]))
    assert span == (DeciBlock(linear=0), DeciBlock(attention=2, mlp=2))


CHANGES: dict[str, Callable[[LinearLayer], LinearLayer]] = {
    "scaled W": lambda one: LinearLayer(one.w * np.float32(1.02), one.b),
    "transposed W": lambda one: LinearLayer(np.ascontiguousarray(one.w.T), one.b),
    "no bias": lambda one: LinearLayer(one.w, 0 * one.b),
}


@pytest.mark.parametrize("form", FORMATS)
def test_what_the_file_has_of_the_plan(
    form: str,
    tmp_path: Path,
    random_plan: Callable[[Any, Sequence[Block]], Plan],
    no_tokenizer: Fields,
) -> None:
    model = tiny_model("llama")
    plan, path = random_plan(model, [1, Mlp(2)]), tmp_path / "model.gguf"
    write_gguf(path, model, plan, no_tokenizer, form, Silent())
    found = check_stored(path, plan)
    assert found.status == "passed" and ("exactly" in found.detail) == (form == "F32")
    for name, change in CHANGES.items():
        other = replace(plan, layers={**plan.layers, Mlp(2): change(plan.layers[Mlp(2)])})
        failed = check_stored(path, other)
        assert failed.status == "failed" and failed.detail.startswith("layer 2.mlp has"), name


# tokenizers ---------------------------------------------------------------------------------------


def byte_level(*splits: Any, **said: Any) -> Any:
    made = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(splits))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", **said)


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(("splits", "name"), [([GPT_2], "gpt-2"), ([DIGITS, GPT_2], "smollm")])
def test_byte_level_tokenizers_are_named_by_how_they_split(splits: list[Any], name: str) -> None:
    tokenizer = byte_level(*splits, chat_template="{{ messages }}")
    fields = {key: value for key, value, _, _ in fields_of(tokenizer, 4)}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.ggml.merges"] == ["a b"] and fields["tokenizer.ggml.bos_token_id"] == 3
    assert fields["tokenizer.ggml.add_bos_token"] is False and fields["tokenizer.ggml.token_type"][3] == 3
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_what_llama_cpp_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="splits a text by rules that --to gguf does not know"):
        fields_of(byte_level(pre_tokenizers.Punctuation(), GPT_2), 4)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    )
    with pytest.raises(InputError, match="no tokenizer of the kind WordPiece"):
        fields_of(words, 2)


def test_the_tokenizer_of_a_gguf_file_stays_as_it_is(smollm2: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFWriter

    fields = fields_of_gguf(smollm2)
    writer = GGUFWriter(tmp_path / "copy.gguf", "llama")
    for key, value, kind, element in fields:
        writer.add_key_value(key, value, kind, sub_type=element)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before, after = (GGUFReader(path).fields for path in (smollm2, tmp_path / "copy.gguf"))
    own = [name for name in before if name.startswith("tokenizer.")]
    assert len(own) >= 5 and own == [name for name in after if name.startswith("tokenizer.")]
    assert all(before[name].contents() == after[name].contents() for name in own)


# openvino --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def case(folder: Path) -> Calibrated:
    return calibrated(folder)


@needs("openvino")
def test_an_earlier_file_is_gone_when_a_new_one_cannot_be_made(
    case: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_text("earlier")
    monkeypatch.setattr("nbl_export.convert.openvino._attention", lambda node: 1 / 0)
    with pytest.raises(
        BuildError, match=r"OpenVINO does not read the graph of LlamaForCausalLM .*choose another form"
    ):
        write_openvino(tmp_path, case.model, case.plan((1,)), NoTokenizer(), "float32", Silent())
    assert list(tmp_path.iterdir()) == []


@needs("openvino")
def test_a_tokenizer_that_is_not_converted_is_said(
    case: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Notes()
    write_openvino(tmp_path / "a", case.model, case.plan((1,)), NoTokenizer(), "float32", heard)
    assert any("No tokenizer of OpenVINO is written, give it token ids: " in note for note in heard.notes)
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    write_openvino(tmp_path / "b", case.model, case.plan((1,)), NoTokenizer(), "float32", heard)
    assert "needs openvino-tokenizers: pip install" in heard.notes[-1]
    for name in ("a", "b"):
        assert not (tmp_path / name / TOKENIZERS[0]).exists() and (tmp_path / name / FILE).exists()


def test_states_of_another_kind_are_refused() -> None:
    with pytest.raises(
        InputError, match="Lfm2ForCausalLM keeps states of another kind than keys and values: --to"
    ):
        check_held(unsaved("lfm2"))


def test_without_openvino(case: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match="needs openvino: pip install"):
        write_openvino(tmp_path / "a", case.model, case.plan((1,)), NoTokenizer(), "float32", Silent())
    assert not (tmp_path / "a").exists()
