"""A form of the cache that a model computes other numbers in is refused before any work, with what to use instead."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from nbl_export.errors import InputError
from nbl_export.export import form_check as module
from nbl_export.export import recurrence
from nbl_export.export.form_check import _error, check_form
from nbl_export.export.forms import CONCAT, FORMS, NONE, SHARED, STATIC
from nbl_export.export.functions import exportable
from nbl_export.models.compat import is_transformers_4
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.weights import Stored, streamed
from tests.beyond import BEYOND
from tests.families import unsaved
from tests.models.test_weights import reads
from tests.tiny_types import tiny_model


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2"])
def test_every_form_is_the_model(model_type: str, form: Any) -> None:
    if (model_type, form) == ("gemma2", SHARED):
        with pytest.raises(
            InputError, match=r"^Gemma2Attention caps its scores, which .*: use --kv-cache concat\.$"
        ):
            check_form(tiny_model(model_type), form)
        return
    check_form(tiny_model(model_type), form)


def test_weights_are_read_once_for_all_passes() -> None:
    model = streamed(Stored(tiny_model("llama")), torch.float32)
    dummy_run(model)
    with reads() as found:
        assert _error(model, CONCAT) < 1e-3
    assert max(Counter(found).values()) == 1
    # Without room for them each pass reads them: two rows alone, a prefill and a step.
    with pytest.MonkeyPatch.context() as patch, reads() as found:
        patch.setattr(module, "room", lambda model: 0)
        _error(model, CONCAT)
    assert max(Counter(found).values()) == 4


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("gpt_oss", "GptOssAttention has attention sinks"),
        ("bloom", "Layer 0 has attention that is not one Attention"),
    ],
)
def test_other_attention_than_the_operators_is_refused_before_any_work(model_type: str, found: str) -> None:
    with pytest.raises(InputError, match=f"^{found}.* does not compute: use --kv-cache concat"):
        check_form(unsaved(model_type, num_hidden_layers=1), SHARED)


def test_a_window_over_places_is_no_window_over_positions() -> None:
    # GPT-Neo takes its own local mask by the length of the cache, which a static buffer has from the start.
    attention = [[["global", "local"], 1]]
    model = tiny_model("gpt_neo", num_layers=2, num_hidden_layers=2, attention_types=attention)
    check_form(model, CONCAT)
    with pytest.raises(
        InputError, match=r"GPTNeoForCausalLM computes other logits with --kv-cache static.*concat"
    ):
        check_form(model, STATIC)


@pytest.mark.parametrize("form", [CONCAT, NONE], ids=lambda f: f.name)
def test_positions_that_count_padding_are_refused(form: Any) -> None:
    config = AutoConfig.for_model(
        "bart", vocab_size=60, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.ndim > 1 else 1)
    with pytest.raises(InputError, match=r"padded rows: this architecture is not supported yet\.$"):
        check_form(model, form)


def test_a_state_that_is_no_cache_has_inputs_of_its_own_in_a_growing_cache() -> None:
    model = tiny_model("lfm2")
    check_form(model, NONE)
    check_form(model, CONCAT)
    with pytest.raises(InputError, match=r"layer 0: conv.*--exporter torch with --kv-cache concat"):
        check_form(model, STATIC)


def test_layers_that_loop_over_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_form(tiny_model("jamba"), NONE)
    monkeypatch.setattr(recurrence, "_FUNCTIONS", {})
    with pytest.raises(
        InputError,
        match=r"^JambaForCausalLM takes a step for each token of a text, and",
    ):
        check_form(tiny_model("jamba"), NONE)


@pytest.mark.parametrize("form", [CONCAT, STATIC, NONE], ids=lambda form: form.name)
def test_layers_without_keys_of_their_own_are_served(form: Any) -> None:
    check_form(tiny_model("gemma3n_text"), form)


def test_attention_whose_keys_cannot_be_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3n_text")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with pytest.raises(InputError, match=r"Layer 2 .* which layer's it attends to cannot be seen"):
        check_form(model, NONE)


def test_experts_that_loop_over_who_was_hit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # So it is with transformers 4, which has no interface to replace them by.
    model = tiny_model("mixtral")
    check_form(model, CONCAT)
    monkeypatch.setattr(type(model), "_can_set_experts_implementation", classmethod(lambda _: False))
    model.config._experts_implementation = "eager"
    with pytest.raises(
        InputError, match=r"^MixtralForCausalLM runs the experts that its tokens go to in a loop of its own"
    ):
        check_form(model, CONCAT)


@pytest.mark.skipif(is_transformers_4(), reason="configurations of transformers 5")
@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("name", BEYOND)
def test_what_begins_at_a_length_is_rehearsed(name: str, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BEYOND[name].model()
    assert _error(model, form) < 1e-3
    # A form that computes another model is seen beyond the length alone.
    off = BEYOND[name].model(off=True)
    dummy_run(off)
    other = replace(form, module=lambda _model: form.module(off))
    monkeypatch.setattr(module, "exportable", lambda _model, *functions: exportable(off, *functions))
    assert _error(model, other) > 0.1
    monkeypatch.setattr(module, "crossed_by", lambda *_: ())
    assert _error(model, other) < 1e-3


@pytest.mark.parametrize("form", [CONCAT, STATIC, NONE], ids=lambda form: form.name)
def test_experts_without_an_interface_are_refused_in_our_words(form: Any) -> None:
    with pytest.raises(
        InputError, match=r"^DbrxForCausalLM runs the experts that its tokens go to in a loop of its own"
    ):
        check_form(tiny_model("dbrx"), form)


def test_a_step_for_each_token_is_refused_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([own(self, x[:, i : i + 1]) for i in range(x.shape[1])], dim=1)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(
        InputError, match=r"^LlamaForCausalLM takes a step for each token of a text, and a graph"
    ):
        check_form(tiny_model("llama"), CONCAT)


def test_no_form_is_advised_that_is_refused_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Lfm2MLP.forward
    monkeypatch.setattr(Lfm2MLP, "forward", lambda self, x: own(self, x) * (2 if x.shape[1] > 60 else 1))
    with pytest.raises(
        InputError, match=r"^Lfm2ForCausalLM computes texts of more than 60 tokens in another way"
    ):
        check_form(tiny_model("lfm2"), STATIC)


def test_a_branch_on_a_value_is_refused_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    own = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return own(self, x * 2 if x.mean() > 1000 else x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(
        InputError, match=r"^LlamaForCausalLM goes one of two ways by a number that it computes"
    ):
        check_form(tiny_model("llama"), CONCAT)


@pytest.mark.parametrize("kinds", [["indexed_attention"] * 4, ["full_attention", "minimax_m3_sparse"] * 2])
def test_attention_to_the_keys_that_an_index_chooses_is_named(
    kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in DeepSeek V3.2 and GLM-MoE-DSA, and beside full attention in MiniMax-M3.
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "layer_types", kinds, raising=False)
    with pytest.raises(
        InputError,
        match=rf"has layers of {kinds[1]}, in which an index .* need that cache as inputs and outputs",
    ):
        check_form(model, CONCAT)


def test_a_form_is_advised_only_where_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def refused(model: Any, form: Any) -> None:
        raise InputError("cannot be traced")

    monkeypatch.setattr(module, "_error", lambda _model, form, *_: 0.0 if form.name == "none" else 9.0)
    with pytest.raises(InputError, match=r": use --kv-cache none\.$"):
        check_form(model, CONCAT)
    monkeypatch.setattr(module, "_check_trace", refused)
    with pytest.raises(InputError, match=r": this architecture is not supported yet\.$"):
        check_form(model, CONCAT)
