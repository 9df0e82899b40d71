"""A branch on the length of a text is found in every model and form, and refused with the length where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.bloom.modeling_bloom import BloomMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from nbl_export.errors import InputError
from nbl_export.export import recurrence
from nbl_export.export.form_check import check_form
from nbl_export.export.forms import CONCAT, FORMS, NONE, STATIC
from nbl_export.export.lengths import Branches
from nbl_export.export.torch import check_traces, export_torch
from tests.alone import furthest, rows_of
from tests.families import unsaved
from tests.tiny_types import tiny_model


def branching(monkeypatch: pytest.MonkeyPatch, longer: Any) -> Any:
    """A Llama whose MLP doubles the states of a text that is ``longer`` than those that are traced."""
    own = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = own(self, x)
        return y * 2 if longer(x.shape[1]) else y

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    return tiny_model("llama")


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
def test_a_branch_on_the_number_of_new_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    model = branching(monkeypatch, lambda tokens: tokens > 60)
    with pytest.raises(
        InputError, match=r"^LlamaForCausalLM computes texts of more than 6\d tokens in another"
    ):
        check_form(model, form)


@pytest.mark.parametrize(
    ("longer", "found"),
    [
        (lambda tokens: tokens // 90 > 0, "more than 89 tokens"),  # chunks, of which the first is traced
        (lambda tokens: tokens * tokens > 10000, "more than 100 tokens"),
        (lambda tokens: tokens >= 250, "more than 249 tokens"),  # of 256 positions
    ],
)
def test_where_the_branch_is(monkeypatch: pytest.MonkeyPatch, longer: Any, found: str) -> None:
    with pytest.raises(Branches, match=found):
        check_traces(branching(monkeypatch, longer), NONE)


def test_a_branch_beyond_the_positions_of_the_model_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    check_traces(branching(monkeypatch, lambda tokens: tokens > 256), NONE)


def test_the_graph_itself_is_looked_at_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    with pytest.raises(Branches, match="more than 60 tokens"):
        export_torch(branching(monkeypatch, lambda tokens: tokens > 60), tmp_path / "model.onnx", form=NONE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", [CONCAT, NONE], ids=lambda form: form.name)
def test_a_table_as_long_as_the_model_is_no_branch(form: Any) -> None:
    check_form(tiny_model("gpt_neo"), form)


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
def test_ordinary_models_hold_for_every_length(form: Any) -> None:
    check_traces(tiny_model("llama"), form)


def test_a_model_without_a_limit_is_looked_at_up_to_very_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unsaved("bloom").eval()
    model.config.max_position_embeddings = None
    check_traces(model, CONCAT)
    own = BloomMLP.forward

    def forward(self: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return own(self, x if x.shape[1] < 100_000 else x * 2, residual)

    monkeypatch.setattr(BloomMLP, "forward", forward)
    with pytest.raises(Branches, match="more than 99,999 tokens"):
        check_traces(model, NONE)


@pytest.mark.parametrize("form", [CONCAT, NONE], ids=lambda form: form.name)
@pytest.mark.parametrize("model_type", ["minimax", "bamba"])
def test_layers_that_compute_a_text_in_chunks_hold_beyond_one(model_type: str, form: Any) -> None:
    # By their own code the graph was one of 90 tokens, and onnxruntime did not run it for a text of two chunks.
    check_form(tiny_model(model_type), form)


def test_a_loop_over_chunks_that_is_not_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "_FORWARDS", {})
    with pytest.raises(
        Branches, match=r"ForCausalLM computes texts of more than (89|90) tokens in another way"
    ):
        check_traces(tiny_model("minimax"), NONE)


@pytest.mark.parametrize("form", [CONCAT, STATIC, NONE], ids=lambda form: form.name)
def test_doge_that_drops_keys_of_longer_texts_is_refused(form: Any) -> None:
    # Its logits were wrong from token 100 on. Of keys of one score transformers drops any: a row's logits are others in
    # a batch, so there is nothing to be equal to.
    with pytest.raises(
        Branches, match=r"^DogeForCausalLM computes texts of more than 100 tokens in another way"
    ):
        check_form(tiny_model("doge"), form)


@pytest.mark.parametrize("form", ["concat", "static", "none"])
def test_doge_that_keeps_all_keys_is_served(form: str, tmp_path: Any) -> None:
    # So are those that are published: they keep as many keys as they have positions.
    model = tiny_model("doge", num_hidden_layers=2, keep_window_size=256)
    check_form(model, FORMS[form])
    assert furthest(model, tmp_path, form, rows_of(135, 104, 60), steps=5) < 1e-4
