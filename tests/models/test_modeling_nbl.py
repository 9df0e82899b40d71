"""Linear blocks as transformers calls them; tests/convert/test_hf.py loads whole models."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from nbl_export.models import modeling_nbl
from nbl_export.models.modeling_nbl import LinearBlock, Linearized
from nbl_export.models.registered import PREFIX, TYPES, classes_of, source_of


def test_a_block_is_called_as_an_attention_and_as_an_mlp() -> None:
    states = torch.randn(2, 3, 8)
    attention, mlp = LinearBlock(8, True, 2), LinearBlock(8, True, None)
    assert attention.linear is not None and mlp.linear is not None
    y, weights = attention(hidden_states=states, attention_mask=None, past_key_values=None)
    assert torch.equal(y, attention.linear(states)) and weights is None
    assert torch.equal(mlp(states), mlp.linear(states))


def test_what_was_left_out_adds_nothing() -> None:
    dropped = LinearBlock(8, False, 2)
    assert not list(dropped.parameters())
    assert not dropped(torch.randn(1, 2, 8))[0].any()


def test_the_file_needs_torch_alone() -> None:
    """It is copied into folders that are loaded without nbl-export."""
    tree = ast.parse(Path(modeling_nbl.__file__).read_text())
    names = {
        node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names == {"__future__", "pathlib", "typing", "torch"}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_classes_are_those_of_the_type_with_linear_layers(model_type: str) -> None:
    config, model = classes_of(model_type)
    plain = CONFIG_MAPPING[model_type]
    assert issubclass(config, plain) and config.model_type == PREFIX + model_type
    assert issubclass(model, Linearized) and model.config_class is config
    text = source_of(model_type)
    assert f"from transformers import {plain.__name__}, {model.__mro__[2].__name__}" in text
    compile(text, "modeling_nbl.py", "exec")
    assert model.source() == text
