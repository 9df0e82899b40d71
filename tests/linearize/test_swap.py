"""The swapped PyTorch model computes x @ Wᵀ + b in the planned layers, and versions of it row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import InputError
from nbl_export.linearize.plan import Adapter, LinearLayer, Plan
from nbl_export.linearize.swap import ORIGINAL, Version, adapted, linearized, replaced, sweep
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.weights import Stored, streamed
from nbl_export.settings.choices import FitInput
from tests.fixtures_graph import maps_in_place
from tests.linearize.made import random_maps
from tests.models.test_weights import reads
from tests.processes import Notes
from tests.tiny_types import tiny_model

D = 32
FIT_INPUTS: tuple[FitInput, ...] = ("normed", "residual")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return load_model(find_model(str(tiny_folder)))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, size=(2, 20)))


def make_plan(
    layers: Mapping[int, LinearLayer], fit_input: FitInput = "normed", count: int = 4, width: int = D
) -> Plan:
    return Plan(
        model="", hidden_size=width, layer_count=count, fit_input=fit_input, criterion="cca", ridge=1e-6,
        calibration_tokens=1, layers=layers, probe={}, probe_u={}, probe_y={},
    )  # fmt: skip


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def by_hand(
    model: Any, ids: torch.Tensor, layers: Mapping[int, LinearLayer], fit_input: FitInput
) -> torch.Tensor:
    """The original model, what whose attention of ``layers`` returns is W u + b instead, by hooks."""
    with maps_in_place(model, make_plan(layers, fit_input)):
        return logits(model, ids)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
@pytest.mark.parametrize("chosen", [(), (1, 3), (0, 1, 2, 3)])
def test_the_swapped_model_is_the_one_written_out(
    model: Any, ids: torch.Tensor, fit_input: FitInput, chosen: tuple[int, ...]
) -> None:
    layers = random_maps(*chosen)
    want = by_hand(model, ids, layers, fit_input)
    with linearized(model, make_plan(layers, fit_input)) as swapped:
        got = logits(swapped, ids)
    assert distance(got, want) < 1e-4


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_swap_tells_apart_what_it_must(model: Any, ids: torch.Tensor, fit_input: FitInput) -> None:
    layers = random_maps(1, 3)
    with linearized(model, make_plan(layers, fit_input)):
        got = logits(model, ids)
    nothing = {i: LinearLayer(np.zeros((D, D), np.float32), np.zeros(D, np.float32)) for i in layers}
    transposed = {i: LinearLayer(np.ascontiguousarray(m.w.T), m.b) for i, m in layers.items()}
    no_bias = {i: LinearLayer(m.w, np.zeros_like(m.b)) for i, m in layers.items()}
    other_input: FitInput = "residual" if fit_input == "normed" else "normed"
    others = {
        "the original": by_hand(model, ids, {}, fit_input),
        "no attention": by_hand(model, ids, nothing, fit_input),
        "W transposed": by_hand(model, ids, transposed, fit_input),
        "no bias": by_hand(model, ids, no_bias, fit_input),
        "one layer only": by_hand(model, ids, {1: layers[1]}, fit_input),
        "maps exchanged": by_hand(model, ids, {1: layers[3], 3: layers[1]}, fit_input),
        "the other input": by_hand(model, ids, layers, other_input),
    }
    for what, other in others.items():
        assert distance(got, other) > 0.05, what


@pytest.mark.parametrize("fit_input", FIT_INPUTS)
def test_the_original_comes_back(model: Any, ids: torch.Tensor, fit_input: FitInput) -> None:
    def state() -> list[tuple[str, int, int, int]]:
        return [
            (name, id(m), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ]

    before, modules = logits(model, ids), state()
    plan = make_plan(random_maps(0, 2), fit_input)
    with linearized(model, plan):
        assert not torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ZeroDivisionError), linearized(model, plan):
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), before)
    assert state() == modules


@pytest.mark.parametrize(
    ("count", "width", "plan"), [(5, D, "5 layers of width 32"), (4, 64, "4 layers of width 64")]
)
def test_a_plan_for_another_model_is_refused(model: Any, count: int, width: int, plan: str) -> None:
    said = f"The plan is for {plan}; this model has 4 of width 32.*run `nbl-export select` for this model"
    with pytest.raises(InputError, match=said), linearized(model, make_plan({}, "normed", count, width)):
        pytest.fail("entered")


# versions -----------------------------------------------------------------------------------------


DOWN = "model.layers.2.mlp.down_proj.weight"
ROWS = [torch.arange(3 + i, 15 + 2 * i) for i in range(3)]


@pytest.fixture(scope="module")
def in_memory() -> Any:
    model = tiny_model("llama")
    dummy_run(model)  # the first walk makes it, by a pass of its own
    return model


@pytest.fixture(params=[False, True], ids=["in memory", "read block by block"])
def either(in_memory: Any, request: pytest.FixtureRequest) -> Any:
    return streamed(Stored(in_memory), torch.float32) if request.param else in_memory


def change(size: float) -> dict[str, Adapter]:
    return {DOWN: Adapter(np.full((D, 1), size, np.float32), np.ones((1, 48), np.float32), ())}


def swept(model: Any, versions: list[Version], **options: Any) -> dict[tuple[int, int], torch.Tensor]:
    found = {
        (row, which): out.clone() for row, which, out in sweep(model, ROWS, versions, "normed", **options)
    }
    assert len(found) == len(ROWS) * len(versions)
    return found


def test_versions_are_whole_runs_and_weights_are_read_once(in_memory: Any) -> None:
    model, linear = streamed(Stored(in_memory), torch.float32), random_maps(*range(4))
    settled = {1: linear[1]}
    wanted = [
        (Version(0), {}, {}),
        (Version(1, settled), settled, {}),
        (Version(2, {1: linear[1], 3: linear[3]}, change(0.05)), {1: linear[1], 3: linear[3]}, change(0.05)),
        (Version(2, settled, change(0.1)), settled, change(0.1)),
        (Version(0, {0: linear[0]}), {0: linear[0]}, {}),
    ]
    lengths: list[int] = []
    notes = Notes()
    with reads() as found:
        ours = swept(
            model,
            [version for version, *_ in wanted],
            settled=settled,
            advance=lengths.append,
            listener=notes,
        )
    blocks = in_memory.config.num_hidden_layers
    assert notes.tasks == [("Running the blocks", blocks, "blocks", 0)] and notes.advanced == [1] * blocks
    assert set(Counter(found).values()) == {1} and lengths == [len(row) for row in ROWS]
    for which, (_, layers, adapters) in enumerate(wanted):
        with replaced(in_memory, layers, "normed") if layers else nullcontext(), adapted(in_memory, adapters):
            for number, row in enumerate(ROWS):
                assert torch.equal(ours[number, which], logits(in_memory, row[None])[0]), (which, number)
    assert len({float(out.sum()) for (row, _), out in ours.items() if row == 0}) == len(wanted)


def test_a_change_begins_with_its_version_and_ends_with_the_sweep(either: Any) -> None:
    model = either
    before, seen = logits(model, ROWS[0][None])[0], []

    @contextmanager
    def changed() -> Iterator[None]:
        seen.append("begun")
        with adapted(model, change(0.2)):
            yield
        seen.append("ended")

    ours = swept(model, [Version(2, change=changed())])
    assert seen == ["begun", "ended"] and not torch.equal(ours[0, 0], before)
    assert torch.equal(swept(model, [ORIGINAL])[0, 0], before)
