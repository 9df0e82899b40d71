"""Bounds on K: which make sense, whether there are any, and what `auto` means."""

from __future__ import annotations

import math

import pytest

from nbl_export.errors import InputError
from nbl_export.settings import NO_BUDGET, Budget, SelectSettings, auto_budget
from nbl_export.settings.choices import AUTO_PERPLEXITY_RATIO


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(max_kl=-0.1), r"--max-kl is -0\.1; it must be 0 nats or more\."),
        (Budget(max_kl=math.nan), "--max-kl is nan"),
        (
            Budget(max_perplexity_ratio=0.99),
            r"--max-ppl-ratio is 0\.99; it must be 1 or more \(1\.05 allows",
        ),
        (Budget(max_perplexity_ratio=math.nan), "--max-ppl-ratio is nan"),
        (Budget(max_kl=math.inf), "--max-kl is inf; give a finite number"),
        (Budget(min_speedup=0.5), r"--min-speedup is 0\.5; it must be 1 or more"),
        (Budget(max_kl=0.1, min_speedup=math.nan), "--min-speedup is nan"),
    ],
)
def test_bounds_that_make_no_sense(budget: Budget, message: str) -> None:
    with pytest.raises(InputError, match=message):
        budget.check()
    with pytest.raises(InputError, match=message):
        SelectSettings(budget=budget).check()


def test_bounds_that_make_sense() -> None:
    for budget in (NO_BUDGET, Budget(0.0, 1.0, 1.0), Budget(max_kl=1e308), Budget(min_speedup=3.0)):
        budget.check()
    assert not NO_BUDGET and Budget(max_kl=0.0) and Budget(min_speedup=1.0)
    assert Budget(max_kl=0.0).bounds_loss and Budget(max_perplexity_ratio=1.0).bounds_loss
    assert not Budget(min_speedup=2.0).bounds_loss


def test_auto_is_a_tenth_of_perplexity_where_nothing_else_bounds_the_loss() -> None:
    assert AUTO_PERPLEXITY_RATIO == 1.10
    assert auto_budget(NO_BUDGET) == Budget(max_perplexity_ratio=1.10)
    assert auto_budget(Budget(min_speedup=1.2)) == Budget(None, 1.10, 1.2)
    for bounded in (Budget(max_kl=0.3), Budget(max_perplexity_ratio=1.5), Budget(0.3, 1.5, 2.0)):
        assert auto_budget(bounded) == bounded
