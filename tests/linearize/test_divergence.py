"""The divergence of a repair against the plain formula by autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbl_export.linearize.divergence import divergence


@pytest.mark.parametrize("places", [1, 64, 130])
def test_the_loss_and_its_gradient_are_those_of_the_plain_formula(places: int) -> None:
    generator = torch.Generator().manual_seed(places)
    target = torch.randn(places, 53, generator=generator) * 3
    logits = torch.randn(places, 53, generator=generator, requires_grad=True)
    plain = logits.detach().double().requires_grad_()
    log_p = target.double().log_softmax(-1)
    want = (log_p.exp() * (log_p - plain.log_softmax(-1))).sum(-1).mean()
    found = divergence(logits, target)
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    (3 * found).backward()
    (3 * want).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and plain.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), plain.grad.numpy(), atol=1e-6)


def test_the_gradient_of_bfloat16_logits_is_in_bfloat16() -> None:
    logits = torch.randn(70, 31, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    target = torch.zeros(70, 31).bfloat16()
    divergence(logits, target).backward()  # type: ignore[no-untyped-call]
    want = (logits.detach().float().softmax(-1) - 1 / 31) / 70
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    np.testing.assert_allclose(logits.grad.float().numpy(), want.numpy(), atol=1e-4)


def test_the_gradient_takes_the_place_of_the_target() -> None:
    target, logits = torch.randn(70, 31), torch.randn(70, 31, requires_grad=True)
    loss = divergence(logits, target)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and torch.equal(logits.grad, target)
