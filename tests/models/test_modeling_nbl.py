"""Linear blocks as transformers calls them; tests/convert/test_hf.py loads whole models."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from nbl_export.models import modeling_nbl
from nbl_export.models.modeling_nbl import LinearBlock


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
