"""What is asked of the stages that make something: what `auto` means, what suits a task, and what contradicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbl_export import settings
from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.models.tasks import task_named
from nbl_export.settings import Budget, SelectSettings
from nbl_export.settings.choices import CRITERIA

DECODER, ENCODER = task_named("text-generation"), task_named("feature-extraction")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SelectSettings(), "Say how many layers to linearize: --k K, --k auto, or a budget"),
        (SelectSettings(k=1, budget=Budget(max_kl=1.0)), "give one of them"),
        (SelectSettings(layers=(1,), budget=Budget(min_speedup=1.5)), "give one of them"),
        (SelectSettings(k=0, budget=Budget(max_kl=0.0)), "give one of them"),
        (
            SelectSettings(k=1, layers=(1, 2)),
            r"^--k 1 and --layers with 2 layers contradict each other: give one\.",
        ),
        (SelectSettings(k=1, layers=(1, 1)), "contradict each other"),
        (SelectSettings(k=2, layers=()), "--k 2 and --layers with 0 layers contradict"),
        (SelectSettings(layers=(1, 2, 1)), r"^--layers names a layer twice: name each layer once\."),
        (
            SelectSettings(layers=(Span(1, 2), 2)),
            r"^--layers names 2 and 1-2\.span, which overlap: leave one",
        ),
        (SelectSettings(layers=(Span(1, 2), Span(2, 3))), r"names 2-3\.span and 1-2\.span, which overlap"),
        (SelectSettings(layers=(Mlp(2), Span(1, 2))), "overlap"),
    ],
)
def test_one_way_only_says_how_many(settings: SelectSettings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings.check()


def test_auto_is_a_budget_or_a_ridge_by_error() -> None:
    auto: Any = "auto"
    assert settings.SelectSettings(k=auto).budget.max_perplexity_ratio == 1.10
    own = settings.SelectSettings(k=auto, budget=settings.Budget(max_kl=0.1))
    assert own.k is None and own.budget == settings.Budget(max_kl=0.1)
    assert settings.SelectSettings(k=1, ridge=auto).ridge is None


def test_text_that_the_model_writes_stands_alone() -> None:
    settings.CalibrateSettings().check()
    with pytest.raises(InputError, match="--calibration self stands alone"):
        settings.CalibrateSettings(("self", "a.txt")).check()


def test_a_criterion_that_suits_the_task() -> None:
    asked = SelectSettings(k=1)
    assert (asked.resolve(DECODER).criterion, asked.resolve(ENCODER).criterion) == ("greedy", "cca")
    # What was asked for is not changed, and nothing else is filled in.
    for criterion in CRITERIA:
        own = replace(asked, criterion=criterion)
        assert own.resolve(DECODER) == own


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"criterion": "greedy"}, "--criterion greedy"),
        ({"criterion": "drop"}, "--criterion drop"),
        ({"fit": "sequential"}, "--fit sequential"),
        ({"fit": "weighted"}, "--fit weighted"),
        ({"ridge": None}, "--ridge auto"),
        ({"repair": 1}, "--repair"),
        ({"k": None, "budget": Budget(min_speedup=1.5)}, "A budget for K"),
        ({"criterion": "nmse"}, None),
        ({"criterion": "cca", "fit": "drop"}, None),
        ({"k": None, "layers": (1, 2)}, None),
    ],
)
def test_what_only_a_decoder_can_be_measured_by(asked: dict[str, Any], said: str | None) -> None:
    selection = SelectSettings(**{"k": 1, **asked})
    selection.check()
    selection.resolve(DECODER)
    if said is None:
        assert selection.resolve(ENCODER).criterion in ("cca", "nmse")
    else:
        with pytest.raises(InputError, match=rf"^{said} is measured by .* an encoder \(feature-extraction\)"):
            selection.resolve(ENCODER)


def test_a_repair_leaves_quantized_weights_alone() -> None:
    repair = SelectSettings(k=1, repair=5)
    for precision in ("int4", "int8"):
        with pytest.raises(InputError, match=rf"an {precision} graph does not hold"):
            repair.check_precision(precision)
        replace(repair, repair_rank=0).check_precision(precision)
        replace(repair, repair=0).check_precision(precision)
    for precision in ("fp32", "fp16", "bf16", None):
        repair.check_precision(precision)
