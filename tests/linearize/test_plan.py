"""A plan comes back to the bit, and neither of its two files can be cut, edited or mixed unnoticed."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.linearize.plan import DROPPED, LinearLayer, Plan, load_plan, ranks_of, save_plan
from tests.linearize.made import COUNT, make_plan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_plan(tmp_path / "plan.json", make_plan())
    return tmp_path / "plan.json"


def refusal(path: Path) -> str:
    """The message with which both names of a plan are refused: one line, with a remedy."""
    messages = []
    for suffix in (".json", ".safetensors"):
        with pytest.raises(InputError) as caught:
            load_plan(path.with_suffix(suffix))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert messages[0].endswith("run `nbl-export select` again.")
    assert str(path.parent) in messages[0]
    return messages[0]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# round trip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_plan_comes_back_by_either_name(path: Path, suffix: str) -> None:
    loaded, plan = load_plan(path.with_suffix(suffix)), make_plan()
    for field in fields(Plan):
        got, want = getattr(loaded, field.name), getattr(plan, field.name)
        if field.name == "layers":
            assert set(got) == set(want)
            for index, layer in want.items():
                assert got[index].w.dtype == got[index].b.dtype == np.float32
                np.testing.assert_array_equal(got[index].w, layer.w)
                np.testing.assert_array_equal(got[index].b, layer.b)
        elif isinstance(want, dict):
            assert set(got) == set(want)
            for name, value in want.items():
                assert got[name].dtype == value.dtype
                np.testing.assert_array_equal(got[name], value)
        else:
            assert got == want
    assert {p.name for p in path.parent.iterdir()} == {"plan.json", "plan.safetensors"}


@pytest.mark.parametrize(
    ("layers", "kept"),
    [((), (0, 1, 2, 3, 4)), ((4, 1), (0, 2, 3)), ((0, 1, 2, 3, 4), ())],
)
def test_chosen_and_kept_layers_part_the_model(
    tmp_path: Path, layers: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    plan = make_plan(layers=layers)
    assert plan.chosen == tuple(sorted(layers))
    assert plan.attention_layers == kept
    save_plan(tmp_path / "plan.json", plan)
    loaded = load_plan(tmp_path / "plan.json")
    assert (loaded.chosen, loaded.attention_layers) == (plan.chosen, plan.attention_layers)


def with_a_span() -> Plan:
    plan = make_plan()
    probes = {i: array for i in range(COUNT) for array in [plan.probe_y[i]]}
    both = {**probes, **{Mlp(i): array for i, array in probes.items()}}
    return replace(plan, probe_u=both, probe_y=both).with_replaced(
        {Span(1, 2): plan.layers[1], 4: plan.layers[4], 0: DROPPED}
    )


def test_what_is_dropped_comes_back_without_numbers(tmp_path: Path) -> None:
    plan = with_a_span()
    assert plan.linear == (1, 4) and plan.dropped == (0, Mlp(1), 2, Mlp(2))
    assert plan.chosen == (0, 1, Mlp(1), 2, Mlp(2), 4)
    assert plan.blocks == (0, Span(1, 2), 4)
    assert plan.linear_attention == (0, 1, 2, 4) and plan.attention_layers == (3,)
    save_plan(tmp_path / "plan.json", plan)
    loaded = load_plan(tmp_path / "plan.json")
    assert (loaded.linear, loaded.dropped, loaded.blocks) == (plan.linear, plan.dropped, plan.blocks)
    assert {i: one is DROPPED for i, one in loaded.replacements.items()} == {
        i: i in plan.dropped for i in plan.chosen
    }
    assert not any(
        name.startswith(("layers.0.", "layers.2.")) for name in load_file(tmp_path / "plan.safetensors")
    )
    assert loaded.without_layers().chosen == ()


def test_saving_over_an_old_plan_replaces_both_files(path: Path) -> None:
    new = make_plan(seed=1, layers=(2,))
    save_plan(path, new)
    loaded = load_plan(path)
    assert loaded.chosen == (2,)
    np.testing.assert_array_equal(loaded.layers[2].w, new.layers[2].w)


# damage ------------------------------------------------------------------------------------------


def test_missing_files(path: Path) -> None:
    raw = path.with_suffix(".safetensors").read_bytes()
    path.with_suffix(".safetensors").unlink()
    assert "tensors are missing" in refusal(path)
    path.with_suffix(".safetensors").write_bytes(raw)
    path.unlink()
    assert "The plan is missing" in refusal(path)


@pytest.mark.parametrize("keep", [0, 8, -1])
def test_truncated_numbers(path: Path, keep: int) -> None:
    weights = path.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:keep])
    assert "truncated or edited" in refusal(path)


def test_one_changed_bit_in_the_numbers(path: Path) -> None:
    weights = path.with_suffix(".safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(raw)
    assert "truncated or edited" in refusal(path)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"format": "nbl-export/plan/2"}'])
def test_json_that_is_no_plan(path: Path, content: str) -> None:
    path.write_text(content)
    assert "is not a plan of nbl-export" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_sha256": "0" * 64},
        {"weights_sha256": None},
        {"layers": [1, 2, 4]},
        {"layers": [1]},
        {"layers": None},
        {"layers": ["one"]},
        {"layer_count": 4},
        {"layer_count": "5"},
        {"hidden_size": 7},
        {"hidden_size": None},
        {"fit_input": "residual"},
        {"model": "b" * 64},
        {"ridge": 0.01},
    ],
)
def test_an_edited_json(path: Path, changes: dict[str, Any]) -> None:
    edit_json(path, **changes)
    refusal(path)


def test_a_save_that_fails_half_way_leaves_no_mixture(path: Path) -> None:
    # The numbers are new, the JSON is old: to be refused, not read as either.
    with pytest.raises(ValueError):
        save_plan(path, replace(make_plan(seed=1), ridge=float("nan")))
    assert "does not match plan.json" in refusal(path)


# rank --------------------------------------------------------------------------------------------


def of_rank(rank: int) -> Plan:
    plan = make_plan()
    layers = {
        i: LinearLayer.of_rank(np.ascontiguousarray(m.w[:, :rank]), np.ascontiguousarray(m.w[:rank]), m.b)
        for i, m in plan.layers.items()
    }
    return replace(plan, layers=layers, rank=rank)


def test_a_plan_of_low_rank_keeps_the_factors_alone(tmp_path: Path) -> None:
    plan, path = of_rank(2), tmp_path / "plan.json"
    save_plan(path, plan)
    stored = load_file(path.with_suffix(".safetensors"))
    assert {n for n in stored if n.startswith("layers.1.")} == {f"layers.1.{n}" for n in ("up", "down", "b")}
    loaded = load_plan(path)
    assert loaded.rank == 2
    for index, layer in plan.layers.items():
        for name in ("w", "b", "up", "down"):
            np.testing.assert_array_equal(getattr(loaded.layers[index], name), getattr(layer, name))


def test_a_plan_keeps_the_rank_of_each_layer(tmp_path: Path) -> None:
    plan, path = of_rank(2), tmp_path / "plan.json"
    first, *rest = plan.chosen
    layers = {**plan.layers, first: make_plan().layers[first]}
    plan = replace(plan, layers=layers, rank=None, ranks=ranks_of(layers))
    assert plan.ranks == dict.fromkeys(rest, 2) and rest
    save_plan(path, plan)
    loaded = load_plan(path)
    assert loaded.ranks == plan.ranks and loaded.rank is None
    assert [loaded.rank_of(i) for i in plan.chosen] == [None, *[2] * len(rest)]
    for index, layer in plan.layers.items():
        np.testing.assert_array_equal(loaded.layers[index].w, layer.w)
        assert (loaded.layers[index].up is None) == (index == first)
    edit_json(path, ranks={str(i): 3 for i in rest})
    assert "was edited by hand" in refusal(path)
