"""A layer whose keys and values another one reads is no candidate, and says so."""

from __future__ import annotations

import pytest

from nbl_export.blocks import ATTENTION, MLP, PARTS
from nbl_export.errors import InputError
from nbl_export.models.candidates import candidates, check_parts, described, reasons
from nbl_export.models.layers import structure
from tests.tiny_types import tiny_model


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


def test_several_readers_are_all_named() -> None:
    model = tiny_model(
        "gemma4_text",
        num_hidden_layers=6,
        layer_types=["sliding_attention", *["full_attention"] * 5],
        num_kv_shared_layers=4,
    )
    assert reasons(model) == {1: "its keys and values are read by layers 2, 3, 4 and 5"}


def test_of_others_every_attention_layer_is_one() -> None:
    for model_type in ("llama", "lfm2"):
        model = tiny_model(model_type)
        assert candidates(model) == structure(model).layers
        assert described(model) == structure(model).as_json()


@pytest.mark.parametrize("parts", [(MLP,), PARTS])
def test_mlps_of_which_none_can_become_linear_are_refused_with_the_reason(parts: tuple[str, ...]) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:  # which runs it once more
        layer.register_forward_hook(lambda block, _args, output: block.mlp(output))
    with pytest.raises(InputError, match=r"none of Llama\w* can become linear \(it is run more than once"):
        check_parts(model, parts)
    check_parts(model, (ATTENTION,))
    check_parts(tiny_model("llama"), parts)
