"""What can become linear in every served family is found and observed; what one tiny pass says; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, BertLMHeadModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from nbl_export.blocks import ATTENTION, MLP, PARTS, Mlp, Span, spans_of
from nbl_export.errors import InputError
from nbl_export.files import read_table
from nbl_export.linearize.plan import DROPPED, by_part
from nbl_export.linearize.swap import replaced
from nbl_export.models import layers
from nbl_export.models.candidates import (
    adding,
    block_modules,
    blocks_of,
    candidates,
    check_blocks,
    check_supported,
    choices,
    described,
    observing,
)
from nbl_export.models.dummy_run import BlockCache, dummy_run
from nbl_export.models.folder import task_named
from nbl_export.models.layers import Family, attention_layers, mlp_modules, structure
from nbl_export.models.load import load_model
from nbl_export.models.running import observed
from nbl_export.models.source import find_model
from nbl_export.models.walk import segments, walking
from tests.conftest import ROOT
from tests.families import LAYERS, WIDTH, unsaved
from tests.tiny import IMAGE_TOKENS, text_encoder, vision_encoder
from tests.tiny_types import tiny_model

# refused -----------------------------------------------------------------------------------------


def refusal(model: Any) -> str:
    with pytest.raises(InputError) as caught:
        attention_layers(model)
    message = str(caught.value)
    assert message.endswith("this architecture is not supported yet.")
    return message


def test_a_model_without_attention() -> None:
    model = tiny_model("mamba", num_hidden_layers=2, state_size=4)
    assert "MambaForCausalLM has no list of its 2 layers in which an attention is known" in refusal(model)


def test_a_block_with_two_attentions() -> None:
    model = tiny_model("llama")
    model.model.layers[1].second = model.model.layers[0].self_attn
    assert "Layer 1 (LlamaDecoderLayer) has 2 attention modules where one is expected" in refusal(model)


def test_other_layers_are_no_candidates() -> None:
    kinds = ["conv", "full_attention"]
    model = tiny_model("lfm2", num_hidden_layers=2, layer_types=kinds)
    found = structure(model)
    assert [layer.index for layer in found.layers] == [kinds.index("full_attention")]
    assert found.others == {kinds.index("conv"): "conv"}
    check_supported(model, cached=False)
    with pytest.raises(
        InputError,
        match=rf"1 layers .* \(layer {kinds.index('conv')}: conv\).*--exporter torch with --kv-cache concat",
    ):
        check_supported(model)


def test_a_family_is_refused_for_the_reason_in_its_row() -> None:
    model = tiny_model("jetmoe", num_hidden_layers=2, num_key_value_heads=2, kv_channels=8)
    with pytest.raises(
        InputError, match="JetMoeForCausalLM is not supported: its attention sends every token"
    ):
        check_supported(model)


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_an_attention_of_two_streams_is_refused(model_type: str) -> None:
    model = torch.nn.Module()
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type=model_type))  # type: ignore[assignment]
    with pytest.raises(InputError, match="twice as wide as what it writes"):
        structure(model)


def test_an_attention_that_adds_the_residual_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # BLOOM's attention returns h + y: fitting that as y would be wrong without any sign of it.
    model = unsaved("bloom")
    assert all(layer.adds == "residual" for layer in attention_layers(model))
    monkeypatch.setattr(layers, "family_of", lambda _: Family())
    assert "adds the residual itself" in refusal(model)


TABLE = read_table(ROOT / "nbl_export" / "models" / "families.toml")


def test_a_model_type_is_of_one_row_and_known_to_transformers() -> None:
    names = [name for row in TABLE.values() for name in row["models"]]
    assert len(names) == len(set(names))
    assert not set(names) - set(CONFIG_MAPPING_NAMES)


# one tiny pass ------------------------------------------------------------------------------------


def test_an_attention_that_is_not_run_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(InputError, match="does not run the attention of layer 1 as it is"):
        check_supported(model)


def test_a_model_that_looks_ahead_is_refused() -> None:
    # A BERT saved as a language model without is_decoder has the name of one, but sees what comes later.
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    with pytest.raises(InputError, match="is not causal"):
        check_supported(model)


# what is seen ------------------------------------------------------------------------------------


def test_an_encoder_sees_both_ways_and_all_its_tokens(tmp_path: Path) -> None:
    features = task_named("feature-extraction")
    text = load_model(find_model(str(text_encoder(tmp_path / "bert"))))
    found = dummy_run(text)
    assert (
        not found.causal and found.tokens == 8 and found.linear_output and found.cache == (BlockCache(),) * 4
    )
    assert set(found.outputs) == {"last_hidden_state", "pooler_output"}
    check_supported(text, task=features)
    with pytest.raises(InputError, match="BertModel is not causal"):
        check_supported(text)
    images = load_model(find_model(str(vision_encoder(tmp_path / "vit"))))
    # Patches and one more: not what is read, but what attention sees.
    assert dummy_run(images).tokens == IMAGE_TOKENS
    check_supported(images, task=features)


def test_a_model_that_cannot_be_run_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel\nand a long story")

    model.model.layers[3].mlp.forward = broken
    with pytest.raises(InputError, match=r"^LlamaForCausalLM cannot be run: no such kernel\.$"):
        dummy_run(model)


def test_a_block_that_runs_twice_in_a_pass_is_refused() -> None:
    # Of its states in each of both runs W and b could be right for one.
    with pytest.raises(
        InputError, match=r"^DoryForCausalLM runs block 1 2 times in one pass, each with other"
    ):
        dummy_run(tiny_model("dory"))
    dummy_run(tiny_model("dory", n_recurrent_loops=1))


def test_attention_of_another_form_is_refused() -> None:
    model = transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    ).eval()
    with pytest.raises(
        InputError,
        match=r"takes and returns other states than \[rows, tokens, width\] \(layer 0 .* an output of a list",
    ):
        check_supported(model)


# candidates --------------------------------------------------------------------------------------


def test_layers_that_others_read_are_no_candidates() -> None:
    model = tiny_model("gemma3n_text")
    assert [layer.index for layer in candidates(model)] == [2, 3]
    assert described(model) == {
        "blocks": 4,
        "kinds": {"2": "sliding window", "3": "full"},
        "others": {
            "0": "sliding window: its keys and values are read by layer 2",
            "1": "full: its keys and values are read by layer 3",
        },
    }


def test_mlps_of_which_none_can_become_linear_are_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:  # which runs it once more
        layer.register_forward_hook(lambda block, _args, output: block.mlp(output))
    with pytest.raises(InputError, match=r"none of Llama\w* can become linear \(it is run more than once"):
        check_blocks(model, PARTS)
    check_blocks(model, (ATTENTION,))
    check_blocks(tiny_model("llama"), PARTS)


# MLPs ---------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 89]])
# Every family whose MLP is one block between two tensors; the module that writes y, and the one that reads h.
FOUND = {
    "llama": ("mlp", "post_attention_layernorm"),
    "gemma2": ("mlp", "pre_feedforward_layernorm"),
    "olmo2": ("mlp", "mlp"),
    "phi": ("mlp", "input_layernorm"),
    "mixtral": ("mlp", "post_attention_layernorm"),
    "gpt2": ("mlp", "ln_2"),
    "bloom": ("mlp.dense_4h_to_h", "post_attention_layernorm"),
    "gpt_oss": ("mlp", "post_attention_layernorm"),
    "opt": ("fc2", "final_layer_norm"),
    "opt-post-norm": ("fc2", "fc1"),
    "gemma3n": ("mlp", "pre_feedforward_layernorm"),
    "gemma4": ("mlp", "pre_feedforward_layernorm"),
}
# Their MLP is modules of the layer, not one, so that there is none to be run alone.
APART = ("opt", "opt-post-norm")
# A norm behind the MLP, or the attention beside it, or more than both.
NOT_ADDED = ("gemma2", "olmo2", "phi", "opt-post-norm", "gemma3n", "gemma4")


def kept(seen: dict[Any, tuple[torch.Tensor, ...]]) -> Any:
    """Keeps what passes; a model may add to it in place."""
    return lambda index, *rest: seen.update({index: tuple(t.clone() for t in rest)})


def unsaved_of(family: str) -> Any:
    return unsaved(family).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FOUND)
def test_what_is_seen_is_what_the_mlp_reads_and_adds(family: str) -> None:
    """The stream after the MLP is the one before it and y, in families that add y as it is."""
    model = unsaved_of(family)
    found = candidates(model, {MLP})
    assert [one.index for one in found] == [Mlp(i) for i in range(LAYERS)]
    output, stream = FOUND[family]
    assert {one.output.removeprefix(f"{one.block}.") for one in found} == {output}
    assert {one.stream.removeprefix(f"{one.block}.") for one in found} == {stream}
    seen: dict[Any, tuple[torch.Tensor, ...]] = {}
    states: list[torch.Tensor] = []
    hook = model.get_submodule(blocks_of(model)[0].block).register_forward_hook(
        lambda _m, _a, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode(), observed(model, blocks_of(model), kept(seen)):
        model(input_ids=IDS)
    hook.remove()
    h, x, y = seen[Mlp(0)]
    with torch.inference_mode():
        module = model.get_submodule(block_modules(model, Mlp(0)).module)
        if family in APART:
            layer = model.model.decoder.layers[0]
            given = layer.fc2(layer.activation_fn(module(x)))
            assert torch.allclose(given, y, atol=1e-6)
        else:
            given = module(x, *([torch.zeros_like(x)] if family == "bloom" else []))
            assert torch.equal(given[0] if isinstance(given, tuple) else given, y)
    assert h.shape == x.shape == y.shape == (*IDS.shape, WIDTH)
    if family not in NOT_ADDED:
        assert torch.allclose(states[0], h + y, atol=1e-6)


def test_an_attention_whose_family_is_called_after_its_experts_is_no_mlp() -> None:
    model = tiny_model("olmoe")
    assert not any(isinstance(found, str) for found in mlp_modules(model).values())
    check_blocks(model, PARTS)


# spans --------------------------------------------------------------------------------------------

# Family → a part of the reason.
NOT = {
    "gemma2": "such as a norm between",
    "olmo2": "such as a norm between",
    "bloom": "adds the residual itself",
    "opt-post-norm": "such as a norm between",
    "gemma3n": "more than the stream from each other",
}


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi", "gpt2", "gpt_neox", "opt", "granite"])
def test_layers_that_only_add(name: str) -> None:
    model = unsaved_of(name)
    found, scale = adding(model), getattr(model.config, "residual_multiplier", 1.0)
    assert (scale != 1.0) == (name == "granite")
    assert found.scales == pytest.approx(dict.fromkeys(range(LAYERS), scale))
    assert found.why_not == {} and choices(model, ["span"]) == spans_of(range(LAYERS))


@pytest.mark.parametrize("name", NOT)
def test_layers_that_do_more(name: str) -> None:
    model = unsaved_of(name)
    found = adding(model)
    assert found.scales == {} and choices(model, ["span"]) == []
    assert all(NOT[name] in why for why in found.why_not.values())
    if name in ("gemma2", "bloom"):
        with pytest.raises(InputError, match=rf"no layer of \w+ can be in one .*{NOT[name]}.*--blocks both"):
            check_blocks(model, ["attention", "mlp", "span"])


def test_a_norm_that_changes_next_to_nothing_is_seen() -> None:
    """A norm of weight 1 gives a y of the same direction, and another size for each token."""
    model = unsaved_of("gemma2")
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.zero_()  # Gemma's norms multiply by 1 + weight
        layer.post_feedforward_layernorm.weight.data.zero_()
    assert adding(model).scales == {}


@pytest.fixture(scope="module")
def granite() -> Any:
    return unsaved_of("granite")


def test_what_a_span_adds_is_what_its_map_is_to_write(granite: Any) -> None:
    """With exactly that in the place of its first attention, and the rest dropped, nothing changes after the span."""
    ids = torch.arange(3, 27).reshape(2, 12)
    span, seen = Span(1, 2), {}

    def observe(block: Any, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        seen[block] = (h.clone(), x.clone(), y.clone())

    assert span in choices(granite, ["span"])  # before the hooks of a walk
    states: Any = None
    with torch.inference_mode(), walking(granite) as run:
        for part in segments(granite)[:2]:
            wanted = [1, Mlp(1), span, Span(1, 1)] if part.start == 1 else []
            with observing(granite, run, part, wanted, observe) as step:
                states = step({"input_ids": ids}, states)
    assert set(seen) == {1, Mlp(1), span, Span(1, 1)}
    with torch.inference_mode():
        every = granite(input_ids=ids, output_hidden_states=True).hidden_states
    # The states are those after the part, not after the span.
    torch.testing.assert_close(states, every[2])
    torch.testing.assert_close(seen[span][0], every[1])
    assert torch.equal(seen[span][1], seen[1][1])
    y = seen[span][2].float()
    with torch.inference_mode(), replaced(granite, by_part({span: DROPPED}), "normed"):
        module = granite.get_submodule(attention_layers(granite)[1].module)
        hook = module.register_forward_hook(lambda _m, _a, output: (y, *output[1:]))
        found = granite(input_ids=ids, output_hidden_states=True).hidden_states
        hook.remove()
    torch.testing.assert_close(found[3], every[3], rtol=1e-4, atol=1e-4)
    assert (seen[Span(1, 1)][2] - seen[span][2]).norm() > 0.1 * y.norm()
