"""What torch.onnx takes for zero is not dropped."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from nbl_export.export.symbols import small_numbers_kept


class _Norm(torch.nn.Module):
    """The mean square with an epsilon: 1e-9 is one that onnxscript takes for zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-9)


@pytest.mark.parametrize("kept", [True, False])
def test_an_epsilon_is_kept_within_the_block_alone(kept: bool) -> None:
    with small_numbers_kept() if kept else nullcontext():
        program = torch.onnx.export(_Norm().eval(), (torch.ones(2, 4),), dynamo=True, verbose=False)
    assert program is not None
    assert any(node.op_type == "Add" for node in program.model.graph) is kept
