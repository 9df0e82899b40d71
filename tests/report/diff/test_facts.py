"""Facts of real reports and graphs, each against what the report says."""

from __future__ import annotations

from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import pytest

from nbl_export.blocks import Mlp
from nbl_export.checks import Check
from nbl_export.report.diff.facts import (
    check_facts,
    engine_facts,
    environment_facts,
    file_facts,
    loss_facts,
    model_facts,
    named_checks,
    parity_facts,
    same_text,
    speed_facts,
    summary_facts,
    task_facts,
)
from nbl_export.report.diff.sides import Opened
from nbl_export.report.schema import load_report
from nbl_export.verify.loss.figures import Likeness, Measure, MethodLoss
from nbl_export.verify.speed.values import Ratio, Speed
from tests.engine.conftest import manifest_by_hand
from tests.report.diff.conftest import changed, report_of
from tests.report.test_evaluation import evaluation

OLD = Path(__file__).parent.parent / "version_1"


def test_a_model_its_layers_and_what_was_asked(two: Opened) -> None:
    report = report_of(two)
    facts = model_facts(report)
    assert facts["linear layers"].figure.value == "2 of 5: 2, 3" and facts["linear layers"].members == (
        "2",
        "3",
    )
    assert facts["model"].figure.value == report.model.source
    said = {name: fact.figure.value for name, fact in facts.items()}
    assert (said["select: k"], said["export: precision"], said["export: kv_cache"]) == ("2", "fp32", "concat")
    assert (said["export: opset"], said["export: exporter"]) == ("23", "torch")
    assert said["verify: contexts"] == "16" and said["verify: quality"] == "yes"
    assert "select: rank" not in said, "what was not given is not there"
    chosen = replace(report.selection, layers=(2, Mlp(3)))
    assert model_facts(replace(report, selection=chosen))["linear layers"].members == ("2", "3.mlp")
    assert model_facts(None) == {}


def test_settings_within_settings_have_both_names(two: Opened) -> None:
    report = report_of(two)
    asked = {**report.settings, "verify": {"bound": {"max_kl": 0.5, "max_perplexity_ratio": None}}}
    said = model_facts(replace(report, settings=asked))
    assert said["verify: bound: max_kl"].figure.value == "0.5"
    assert "verify: bound: max_perplexity_ratio" not in said


def test_counts_of_a_graph(two: Opened) -> None:
    graph = report_of(two).graph.after
    facts = summary_facts(graph)
    assert facts["nodes: MatMul"].figure.value == graph.ops["MatMul"]
    assert facts["size on disk"].figure.value == graph.file_bytes and facts["size on disk"].better == "lower"
    assert sum(f.figure.value for n, f in facts.items() if n.startswith("nodes: ")) == graph.nodes  # type: ignore[misc]
    assert "KV cache, bytes per token" not in summary_facts(replace(graph, kv_bytes_per_token=0))
    assert not any(fact.headline for fact in summary_facts(graph, headline=False).values())


def test_a_graph_file(two: Opened) -> None:
    facts = file_facts(two.graph, headline=True)
    assert facts["linear layers in the graph"].members == ("2", "3")
    assert facts["opset of ai.onnx"].figure.value == 23
    assert facts["KV pairs are of layers"].figure.value == "0, 1, 4"
    assert len(facts["inputs beside the KV cache"].members) == 4
    assert file_facts(None, headline=True) == {}


def test_a_loss_with_its_errors(two: Opened) -> None:
    loss = report_of(two).method_loss
    assert isinstance(loss, MethodLoss)
    figure = loss_facts(loss)["perplexity ratio"].figure
    assert (figure.value, figure.se) == (loss.perplexity_ratio, loss.perplexity_ratio_se)
    se = loss_facts(replace(loss, documents=1))["perplexity ratio"].figure.se
    assert se is not None and isnan(se), "of one document there is none"
    assert loss_facts(None) == {}


def test_measures_of_an_encoder_are_likenesses_or_distances() -> None:
    names = ("cosine of logits", "top-1 agreement", "KL to the original, nats", "change of the score")
    facts = loss_facts(Likeness(9, "images", tuple(Measure(n, 0.5, 0.1, 9) for n in names)))
    assert [facts[name].better for name in names] == ["higher", "higher", "lower", "lower"]
    assert [facts[name].headline for name in names] == [True, False, False, False]


def test_held_out_text_is_known_by_its_digest_or_by_the_original(two: Opened, three: Opened) -> None:
    a, b = report_of(two), report_of(three)
    assert same_text(a, b)
    other = replace(b, hashes={**b.hashes, "nbl/text.safetensors": "0" * 64})
    loss = other.method_loss
    assert isinstance(loss, MethodLoss)
    assert same_text(a, other), "the original's perplexity says so"
    for wrong in (
        replace(loss, perplexity_original=loss.perplexity_original * 1.01),
        replace(loss, perplexity_original=nan),
        replace(loss, tokens=loss.tokens + 1),
        None,
    ):
        assert not same_text(a, replace(other, method_loss=wrong))
    neither = [replace(r, hashes={}, method_loss=None) for r in (a, b)]
    assert not same_text(*neither)


def test_parity_of_steps_and_what_is_no_number(two: Opened) -> None:
    parity = report_of(two).parity
    assert parity is not None and hasattr(parity, "steps")
    assert parity_facts(parity)["max |Δlogit|"].figure.value == max(s.max_abs for s in parity.steps)
    steps = (replace(parity.steps[0], max_abs=nan), *parity.steps[1:])
    worst = parity_facts(replace(parity, steps=steps))["max |Δlogit|"].figure.value
    assert isinstance(worst, float) and isnan(worst)


def test_what_no_report_of_ours_says_is_no_error(two: Opened) -> None:
    parity = report_of(two).parity
    assert parity is not None and hasattr(parity, "steps")
    assert list(parity_facts(replace(parity, steps=()))) == ["steps"]
    lost = evaluation(tasks=(replace(evaluation().tasks[0], scored="f1"),), retrieval=())
    assert list(task_facts(lost)) == ["mean recovery of tasks", "mean recovery of retrieval"]


def test_parity_of_an_encoder_is_by_output() -> None:
    parity = load_report(OLD / "encoder.json").parity
    assert parity is not None and hasattr(parity, "outputs")
    assert list(parity_facts(parity)) == [f"max relative difference of {o.output}" for o in parity.outputs]


def test_engines_have_a_library_and_a_size(two: Opened) -> None:
    manifest = manifest_by_hand()
    facts = engine_facts(replace(report_of(two), engines=(manifest,)))
    assert facts[f"{manifest.role} engine: size"].figure.value == manifest.size
    assert engine_facts(report_of(two)) == {} == engine_facts(None)


def test_speedups_are_by_cell_with_their_intervals(two: Opened) -> None:
    speed = report_of(two).speed
    assert speed is not None
    facts = speed_facts(speed, headline=True)
    assert list(facts) == ["prefill 16: speedup", "decode 16: speedup"]
    one = facts["prefill 16: speedup"]
    assert (one.figure.value, one.figure.least, one.figure.most) == pytest.approx((1.2, 1.176, 1.224))
    assert one.detail == "8.33 ms" and one.headline and one.better == "higher"
    assert speed_facts(None) == {}


def test_headlines_are_the_longest_contexts_and_others_are_named(engine_speed: Speed) -> None:
    facts = speed_facts(engine_speed, headline=True)
    assert [name for name, fact in facts.items() if fact.headline] == [
        "prefill 512: speedup",
        "decode 512: speedup",
    ]
    ratio = Ratio(4.0, 3.9, 4.1, 3.8, 4.2, True)
    cell = engine_speed.cells[0]
    peers = tuple(replace(r, linearized_over=ratio) for r in cell.results)
    facts = speed_facts(replace(engine_speed, cells=(replace(cell, results=peers),)))
    assert "prefill 128: over PyTorch eager, base" in facts
    assert "prefill 128: over base engine" not in facts, "that is the speedup itself"


def test_tasks_and_retrieval() -> None:
    facts = task_facts(evaluation())
    assert facts["fruit, acc: linearized"].figure.value == 0.76
    assert facts["fruit, acc: recovery"].figure.se == 0.014
    assert facts["words, perplexity"].figure.value == 13.5
    assert facts["retrieval, 1,024 tokens, choice: linearized"].better == "higher"
    assert "retrieval, 256 tokens, exact: recovery" not in facts
    assert facts["mean recovery of tasks"].headline
    assert task_facts(None) == {}


def test_checks_of_one_name_are_told_apart(two: Opened) -> None:
    twice = changed(two, checks=(Check("x", "passed", ""), Check("x", "failed", "")))
    assert {n: f.figure.value for n, f in check_facts(twice.report, None).items()} == {
        "x": "passed",
        "x (2)": "failed",
    }
    assert named_checks(None) == {}


def test_an_environment_has_versions(two: Opened) -> None:
    report = report_of(two)
    facts = environment_facts(report)
    assert facts["processor"].figure.value == report.environment.processor
    assert facts["onnxruntime"].figure.value == report.environment.packages["onnxruntime"]
    assert environment_facts(None) == {}
