"""No tensor of the CPU meets the model on a device, shown without one: :mod:`tests.on_device` on a virtual device.

With a real GPU the same tests run in ``tests/gpu``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nbl_export import pipeline
from nbl_export.models import device as devices
from tests.on_device import *  # noqa: F403
from tests.virtual_device import Mixed, virtual_device


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """The virtual device, which is what cuda means here."""
    find = devices.find_device
    with virtual_device() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "find_device", lambda asked: found if asked == "cuda" else find(asked))
        patch.setattr(pipeline, "check_device", lambda _asked: None)
        yield found


def test_it_is_a_device_of_its_own(device: torch.device) -> None:
    there, here = torch.arange(6.0).reshape(2, 3).to(device), torch.ones(2, 3)
    assert there.device == torch.device("virtual", 0) and (there + there).device == there.device
    for mixed in (lambda: there + here, lambda: there @ here.T, lambda: torch.cat([there, here])):
        with pytest.raises((Mixed, RuntimeError), match=r"same device|on virtual and on cpu"):
            mixed()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    with pytest.raises(Mixed, match="generator"):
        torch.rand(3, device=device, generator=torch.Generator())
    assert torch.equal((there * 2).cpu(), here.cumsum(1).cumsum(1) * 0 + torch.arange(6.0).reshape(2, 3) * 2)


def test_it_computes_what_the_cpu_does(device: torch.device) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    layer(x).softmax(-1).square().sum().backward()
    weight = torch.nn.Parameter(layer.weight.detach().to(device))
    torch.nn.functional.linear(x.to(device), weight, layer.bias.detach().to(device)).softmax(
        -1
    ).square().sum().backward()
    assert weight.grad is not None and layer.weight.grad is not None
    assert torch.allclose(weight.grad.cpu(), layer.weight.grad)
    weight.data = torch.zeros(2, 3, device=device)
    weight.data[0] += 1
    assert weight.cpu().tolist() == [[1, 1, 1], [0, 0, 0]]
