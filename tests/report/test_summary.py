"""The headline figures are the report's, and only those that were measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nbl_export.blocks import Block, Mlp
from nbl_export.report.schema import Report
from nbl_export.report.speed import ceiling_in_words
from nbl_export.report.summary import (
    headlines,
    replaced,
    verdict_line,
)
from nbl_export.verify.parity.figures import DecoderParity, MethodLoss


def test_headlines_of_a_whole_report(full: Report) -> None:
    shown = {h.name: h for h in headlines(full)}
    assert shown["Attention layers replaced"].value == "2 of 5"
    assert shown["Attention layers replaced"].detail == "layers 2, 3"
    assert (shown["KV cache"].value, shown["KV cache"].detail) == ("-40.0%", "1,280 → 768 bytes per token")
    assert isinstance(full.method_loss, MethodLoss) and isinstance(full.parity, DecoderParity)
    assert full.speed is not None
    assert shown["Perplexity"].value == f"× {full.method_loss.perplexity_ratio:.3f}"
    _, prefill, over = full.speed.speedups()[0]
    assert shown["Prefill on the CPU"].value == f"{over.value:.2f}×"
    assert shown["Prefill on the CPU"].detail.endswith(f"; {ceiling_in_words(prefill)}")
    assert f"{prefill.ceiling:.2f}×" in ceiling_in_words(prefill)
    assert shown["Decode on the GPU"].value == "1.25×" and "512 tokens" in shown["Decode on the GPU"].detail
    worst = max(s.max_abs for s in full.parity.steps)
    assert abs(float(shown["Parity"].value) / worst - 1) < 0.05


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((2, 3), "2 of 5 attention layers"),
        ((Mlp(1),), "1 of 5 MLPs"),
        ((2, Mlp(1), Mlp(4)), "1 of 5 attention layers and 2 of 5 MLPs"),
        ((), "0 of 5 attention layers"),
    ],
)
def test_what_was_replaced_is_counted_by_kind(report: Report, layers: tuple[Block, ...], words: str) -> None:
    model = replace(report.model, layers=5)
    assert replaced(replace(report, model=model, selection=replace(report.selection, layers=layers))) == words


def test_verdict_names_what_it_costs_and_what_was_asked(report: Report) -> None:
    assert isinstance(report.method_loss, MethodLoss)
    loss = replace(report.method_loss, perplexity_ratio=1.5203, kl=0.4182)
    costly = replace(report, method_loss=loss)
    what = "(graph rewrite, parity); perplexity × 1.520, KL 0.42 on held-out text"
    assert verdict_line(costly) == f"{what}, no bound asked"

    def asked(**bound: float | None) -> Report:
        return replace(costly, settings={**costly.settings, "verify": {"bound": bound}})

    assert (
        verdict_line(asked(max_kl=None, max_perplexity_ratio=1.05))
        == f"{what}, at most perplexity × 1.05 asked"
    )
    both = verdict_line(asked(max_kl=0.5, max_perplexity_ratio=2.0))
    assert both == f"{what}, at most perplexity × 2 and KL 0.5 asked"
    nan = replace(costly, method_loss=replace(loss, perplexity_ratio=math.nan, kl=math.inf))
    assert "perplexity × nan, KL inf on held-out text" in verdict_line(nan)
