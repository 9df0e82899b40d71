"""What stages need: the terms by hand, and the sums against what was measured."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nbl_export import api
from nbl_export.calibrate import collect, sampling
from nbl_export.linearize import loss
from nbl_export.models import weights
from nbl_export.models.source import find_model
from nbl_export.models.tasks import task_named
from nbl_export.settings import RunSettings
from nbl_export.stages import needs as needed
from nbl_export.stages.needs import GIB, MIB, Need, Sizes, needs, sizes_of
from nbl_export.stages.resources import model_sizes
from nbl_export.stages.room import Room
from tests.beyond import BEYOND
from tests.conftest import ROOT
from tests.tiny_types import tiny_model

TASK = task_named("text-generation")
TEXT = api.CalibrateSettings(("text",), samples=8, seq_len=640, selection_samples=2, heldout_samples=2)


def asked(text: api.CalibrateSettings = TEXT, precision: str = "bf16", **selection: Any) -> RunSettings:
    chosen = api.SelectSettings(**{"k": 12, "criterion": "kl", **selection})
    return RunSettings(chosen, text, exporting=api.ExportSettings(precision)).resolve(TASK)


@pytest.fixture(scope="module")
def stories(stories_folder: Path) -> Sizes:
    return model_sizes(find_model(str(stories_folder)))[0]


def test_the_sizes_of_a_model_are_counted_by_hand(stories: Sizes) -> None:
    d, inner, layers, vocabulary, heads, kv = 64, 172, 5, 512, 8, 4
    block = 2 * d * d + 2 * d * (d // heads * kv) + 3 * d * inner + 2 * d
    assert (stories.shape.width, stories.shape.layers, stories.vocabulary) == (d, layers, vocabulary)
    assert (stories.block, stories.blocks, stories.head) == (block, layers * block, vocabulary * d)
    assert (stories.largest, stories.inner) == (vocabulary * d, inner)
    assert stories.cache == 2 * layers * kv * (d // heads)
    assert (stories.stored, stories.computed) == (4, False)


def test_what_is_done_at_once_is_what_the_stages_do_at_once() -> None:
    assert (needed._BATCH, needed._SAMPLED, needed._SAMPLE_LENGTH) == (
        collect._BATCH_TOKENS,
        sampling._SAMPLE_BATCH,
        sampling._SAMPLE_LENGTH,
    )
    assert (needed._KEPT, needed._NEXT) == (weights._KEPT, loss._NEXT_BYTES)


def test_the_largest_phase_counts() -> None:
    need = Need(Room("x", 5), 100, ({"a": 1.0, "b": 2.0}, {"c": 2.5}, {"d": 0.0, "e": 2.9}))
    assert (need.memory, need.most, need.stage) == (103, "b", "x")


def test_what_is_mapped_is_not_in_memory(stories: Sizes) -> None:
    assert stories.held(4, 1000) == 0 and stories.held(2, 1000) == 2000
    assert replace(stories, computed=True).held(4, 1000) == 4000
    assert stories.kept(2) == 2 * stories.shape.weights
    large = replace(stories, shape=replace(stories.shape, weights=GIB + 1), block=7, head=9)
    assert large.kept(2) == 18  # of what does not stay in memory, the largest part


def test_more_text_takes_more_of_what_grows_with_it(stories: Sizes) -> None:
    few, many = (
        {n.stage: n for n in needs(stories, asked(replace(TEXT, samples=rows)), 4)} for rows in (8, 8000)
    )
    added = 7992 * 640
    width = stories.shape.width
    assert many["calibrate"].memory - few["calibrate"].memory == 2 * 4 * width * added
    assert many["calibrate"].most == "states between blocks"
    sums = (3 * 1.25 + 4) * width**2 * stories.shape.layers
    assert many["calibrate"].exact - few["calibrate"].exact == pytest.approx(sums * added)
    assert many["calibrate"].fast - few["calibrate"].fast == pytest.approx(2.0 * stories.blocks * added)
    assert many["select"].memory == few["select"].memory
    files = replace(TEXT, samples=8000, memory="10MB")
    (in_files, *_) = needs(stories, asked(files), 4)
    assert in_files.memory == few["calibrate"].memory - 2 * 4 * width * 8 * 640


def test_a_criterion_that_runs_no_model_needs_less(stories: Sizes) -> None:
    found = {
        name: next(n for n in needs(stories, asked(criterion=name, k=2), 2) if n.stage == "select")
        for name in ("cca", "kl", "greedy")
    }
    assert found["cca"].memory < found["kl"].memory < found["greedy"].memory
    assert 0 == found["cca"].fast < found["kl"].fast < found["greedy"].fast


def test_a_graph_in_half_precision_is_converted_in_every_run(stories: Sizes) -> None:
    steps = {"verification": api.VerifySettings(decode_steps=3)}
    half, single = (
        {n.stage: n for n in needs(stories, replace(asked(precision=p, k=2), **steps), 4)}
        for p in ("bf16", "fp32")
    )
    weights = stories.shape.weights
    # A prefill and three steps of two graphs; the proof runs one.
    assert (half["verify"].widened, half["rewrite"].widened) == (8 * 4 * weights, 4 * weights)
    assert single["verify"].widened == single["rewrite"].widened == 0
    assert single["verify"].read - half["verify"].read == 8 * 2 * weights
    assert half["verify"].memory > single["verify"].memory


def test_a_repair_is_a_phase_of_its_own(stories: Sizes) -> None:
    without, repaired = (
        next(n for n in needs(stories, asked(repair=steps, k=2), 4) if n.stage == "select")
        for steps in (0, 100)
    )
    assert repaired.fast > without.fast and len(repaired.phases) == len(without.phases) + 1


# against what was measured ------------------------------------------------------------------------

PAGE = ROOT / "docs" / "large-models.md"


def measured() -> list[tuple[str, str, float]]:
    """Shape, stage and anonymous MiB of each row that scripts/bench_scale.py wrote; one with an exit code is none."""
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| ([\d,]+) \| .*\|  \|$", PAGE.read_text(), re.M)
    return [(shape, stage, float(mib.replace(",", ""))) for shape, stage, mib in rows]


@pytest.fixture(scope="module")
def shapes() -> Iterator[dict[str, Sizes]]:
    """The sizes of each shape of scripts/bench_scale.py, from its configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        bench = importlib.import_module("bench_scale")
        yield {name: sizes_of(built(shape.config()), 2, 0) for name, shape in bench.SHAPES.items()}


def built(config: dict[str, Any]) -> torch.nn.Module:
    """A model without numbers."""
    kind = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(kind)
    model.tie_weights()
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(("shape", "stage", "mib"), measured())
def test_memory_is_within_half_as_much_of_what_was_measured(
    shapes: dict[str, Sizes], shape: str, stage: str, mib: float
) -> None:
    name, _, criterion = stage.partition(" ")
    settings = asked(criterion=criterion) if criterion else asked()
    need = next(n for n in needs(shapes[shape], settings, 2) if n.stage == name)
    found = need.memory / MIB
    assert mib / 1.5 <= found <= 1.5 * mib, f"{found:,.0f} MiB: {dict(need.peak)}"


def test_layers_that_lend_keys_cannot_go_and_borrowers_keep_none() -> None:
    for name, head_sizes in (("gemma3n_text", 8), ("gemma4_text", 8)):
        model = tiny_model(name)
        sizes = sizes_of(model.to("meta"), 4, 100)
        # Layers 2 and 3 of 4 read the keys and values of layers 0 and 1.
        assert sizes.shape.layers == 2 and sizes.cache == 2 * 2 * head_sizes * 2
    assert sizes_of(tiny_model("llama").to("meta"), 4, 100).shape.layers == 4


def test_texts_that_cross_lengths_take_time_and_memory() -> None:
    model = BEYOND["mistral"].model().to("meta")
    sizes = sizes_of(model, 4, 100)
    assert (sizes.crossing, sizes.scores, sizes.copied) == ((96, 108), 108 * 108 * 4, False)
    plain = replace(sizes, crossing=(), scores=0)
    assert sizes_of(BEYOND["mistral"].model(sliding_window=None).to("meta"), 4, 100).crossing == ()
    text = replace(TEXT, seq_len=64)
    for stage in ("export", "verify"):
        more, less = (
            next(n for n in needs(s, asked(text, "fp16"), 4) if n.stage == stage) for s in (sizes, plain)
        )
        assert more.fast > less.fast and more.memory > less.memory
        assert "scores beyond a length" in more.phases[-1]
    # PyTorch and two graphs compute each token once, in the model's blocks and its head.
    assert more.fast - less.fast == 2.0 * 3 * (96 + 108) * (sizes.blocks + sizes.head)
    copied = replace(sizes, copied=True)
    longer, shorter = (
        next(n for n in needs(s, asked(text), 4) if n.stage == "calibrate") for s in (copied, plain)
    )
    assert longer.seconds > 1 > shorter.seconds
