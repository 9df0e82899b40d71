"""The attention of every served family is found and observed; anything else is refused before work begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from nbl_export.errors import InputError
from nbl_export.files import read_table
from nbl_export.models import layers
from nbl_export.models.dummy_run import check_supported
from nbl_export.models.layers import Family as Row
from nbl_export.models.layers import attention_layers, observed, structure
from tests.conftest import ROOT
from tests.models.architectures import COMMON, COUNT, FAMILIES, SIZES, D, Family, build


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest) -> tuple[Any, Family]:
    family = FAMILIES[request.param]
    kind = "LMHeadModel" if family.name == "GPT2" else "ForCausalLM"
    return build(family.name, kind, **family.fields), family


IDS = torch.tensor([[5, 9, 3, 44, 7], [8, 2, 2, 31, 30]])


def test_what_is_observed_is_what_goes_in_and_out(served: tuple[Any, Family]) -> None:
    model, family = served
    # Hooks of our own at the norm before and the projection inside, which the product never looks at.
    want: dict[int, list[torch.Tensor]] = {}
    handles = []
    for i in range(COUNT):
        kept = want.setdefault(i, [torch.empty(0)] * 3)

        def norm(_m: Any, args: Any, result: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            kept[0], kept[1] = args[0].clone(), result.clone()

        def out(_m: Any, _a: Any, result: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            kept[2] = result.clone()

        handles.append(model.get_submodule(family.norm.format(i)).register_forward_hook(norm))
        projection = model.get_submodule(f"{family.attention.format(i)}.{family.output}")
        handles.append(projection.register_forward_hook(out))
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    order: list[int] = []

    def observer(index: int, *activations: torch.Tensor) -> None:
        order.append(index)
        seen[index] = tuple(a.clone() for a in activations)

    with torch.inference_mode(), observed(model, attention_layers(model), observer):
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    assert order == [0, 1, 2]
    for index, activations in seen.items():
        for name, got, expected in zip("hxy", activations, want[index], strict=True):
            assert got.shape == (2, 5, D)
            assert torch.equal(got, expected.view_as(got)), (index, name)
        h, x, y = activations
        assert not torch.allclose(h, x, atol=1e-3)
        assert y.abs().max() > 0


# refused -----------------------------------------------------------------------------------------


def refusal(model: Any) -> str:
    with pytest.raises(InputError) as caught:
        attention_layers(model)
    message = str(caught.value)
    assert message.endswith("this architecture is not supported yet.")
    return message


def test_a_model_without_attention() -> None:
    model = build("Mamba", "ForCausalLM", **COMMON, hidden_size=D, num_hidden_layers=2, state_size=4)
    assert "MambaForCausalLM has no list of its 2 layers in which an attention is known" in refusal(model)


def test_a_block_with_two_attentions() -> None:
    model = build("Llama", "ForCausalLM", **FAMILIES["llama"].fields)
    model.model.layers[1].second = model.model.layers[0].self_attn
    assert "Layer 1 (LlamaDecoderLayer) has 2 attention modules where one is expected" in refusal(model)


def test_cross_attention_is_no_candidate() -> None:
    model = build("GPT2", "LMHeadModel", **FAMILIES["gpt2"].fields, add_cross_attention=True)
    assert [layer.module.rsplit(".")[-1] for layer in attention_layers(model)] == ["attn"] * COUNT


@pytest.mark.parametrize("kinds", [["full_attention", "conv"], ["conv", "full_attention"]])
def test_other_layers_are_no_candidates(kinds: list[str]) -> None:
    fields = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    model = build("Lfm2", "ForCausalLM", **fields, layer_types=kinds)
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
    fields = {**SIZES, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 32}
    model = build("JetMoe", "ForCausalLM", **fields)
    with pytest.raises(
        InputError, match="JetMoeForCausalLM is not supported: its attention sends every token"
    ):
        check_supported(model)


def test_two_stacks_of_the_same_depth() -> None:
    model = build("Llama", "ForCausalLM", **FAMILIES["llama"].fields)
    model.second = torch.nn.ModuleList(model.model.layers)
    assert "has 2 lists of its 3 layers" in refusal(model)


def test_an_attention_that_adds_the_residual_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    # BLOOM's attention returns h + y: fitting that as y would be wrong without any sign of it.
    fields = {**COMMON, "hidden_size": D, "n_layer": 2, "n_head": 4}
    model = build("Bloom", "ForCausalLM", **fields)
    assert all(layer.adds == "residual" for layer in attention_layers(model))
    monkeypatch.setattr(layers, "family_of", lambda _: Row())
    assert "adds the residual itself" in refusal(model)


def test_a_family_s_name_says_nothing_of_its_attention() -> None:
    """Kimi Linear has softmax attention in some layers, of the class KimiLinearAttention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    pytest.importorskip("transformers.models.kimi_linear", reason="needs transformers 5 with Kimi Linear")
    config = AutoConfig.for_model(
        "kimi_linear",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"] * 2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    found = structure(AutoModelForCausalLM.from_config(config).eval())
    assert [layer.index for layer in found.layers] == [1, 3]
    assert found.others == {0: "linear_attention", 2: "linear_attention"}


TABLE = read_table(ROOT / "nbl_export" / "models" / "families.toml")
TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def family_of_type(model_type: str) -> Row:
    text = type("Config", (), {"model_type": model_type})
    return layers.family_of(type("Model", (), {"config": type("Whole", (), {"get_text_config": text})()})())  # type: ignore[arg-type]


def test_a_model_type_is_of_one_row_and_known_to_transformers() -> None:
    names = [name for row in TABLE.values() for name in row["models"]]
    assert len(names) == len(set(names))
    assert not set(names) - set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "bloom", "mpnet"])
def test_paths_lead_from_a_block_to_modules(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **TEXT, n_layer=2, n_head=4)
    model: Any = AutoModel.from_config(config)
    block = model.h[0] if model_type == "bloom" else model.encoder.layer[0]
    family = family_of_type(model_type)
    attention = block.get_submodule(family.attention or "self_attention")
    assert any("query" in name or name == "q" for name, _ in attention.named_children())
    if family.output:
        # What writes y maps to the stream's width.
        assert tuple(block.get_submodule(family.output).weight.shape) == (16, 16)
