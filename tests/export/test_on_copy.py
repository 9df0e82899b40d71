"""A window that is too long for a check is crossed on a small copy of the model, and what is wrong there is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbl_export.errors import InputError
from nbl_export.export import on_copy
from nbl_export.export.forms import CONCAT, FORMS, NONE, STATIC
from nbl_export.export.on_copy import crossed_on_copy
from nbl_export.graph.summary import OnCopy
from nbl_export.models.compat import is_transformers_4
from nbl_export.models.lengths import Room
from tests.beyond import BEYOND
from tests.tiny_types import tiny_model

pytestmark = pytest.mark.skipif(is_transformers_4(), reason="configurations of transformers 5")


@pytest.fixture(autouse=True)
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every model were large."""
    monkeypatch.setattr(on_copy, "REHEARSAL", Room(0.0))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("mistral", "none"),
        ("gemma3", "static"),
        ("phi3", "concat"),
        ("phi3", "static"),
        ("ministral3", "concat"),
        ("llama4", "static"),
        ("mistral", "shared"),
    ],
)
def test_a_right_form_is_crossed_and_says_with_what(name: str, form: str) -> None:
    model = BEYOND[name].model()
    assert crossed_on_copy(model, FORMS[form]) == (OnCopy(BEYOND[name].key, 100, 16),)


def off(name: str) -> Callable[..., Any]:
    """The export of a model in which nothing begins."""

    def export(copy: torch.nn.Module, path: Any, form: Any) -> Any:
        fields = {**copy.config.to_dict(), **BEYOND[name].off}
        other = type(copy)(type(copy.config).from_dict(fields)).float().eval()  # type: ignore[operator]
        other.load_state_dict(copy.state_dict())
        return original(other, path, form=form)

    original = on_copy.export_torch
    return export


@pytest.mark.parametrize("name", BEYOND)
def test_a_form_without_it_is_refused_before_any_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BEYOND[name].model()
    monkeypatch.setattr(on_copy, "export_torch", off(name))
    with pytest.raises(
        InputError,
        match=rf"^\w+ with --kv-cache concat computes other logits than PyTorch beyond {BEYOND[name].key} 100 \(error "
        r".* where that is 16\): use another --kv-cache, or another --exporter\.$",
    ):
        crossed_on_copy(model, CONCAT)


def test_it_is_done_once_and_not_for_a_model_without_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(on_copy, "_error", lambda *_: calls.append(1) or 0.0)
    model = BEYOND["mistral"].model()
    assert crossed_on_copy(model, CONCAT) == crossed_on_copy(model, CONCAT)
    assert len(calls) == 1
    crossed_on_copy(model, NONE)
    assert len(calls) == 2
    assert crossed_on_copy(tiny_model("llama"), STATIC) == () and len(calls) == 2


def test_what_a_copy_cannot_show_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.model.layers[0].self_attn.frob_window = 100
    assert crossed_on_copy(model, CONCAT) == (OnCopy("LlamaAttention.frob_window", 100, why=on_copy._UNSAID),)

    def refuse(*_: Any) -> Any:
        raise InputError("It cannot be made smaller.")

    monkeypatch.setattr(on_copy, "small_copy", refuse)
    found = crossed_on_copy(BEYOND["mistral"].model(), CONCAT)
    assert found == (OnCopy("sliding_window", 100, why="It cannot be made smaller"),)


def test_a_copy_whose_code_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("No indexer.\nAnd more")

    monkeypatch.setattr(on_copy, "_error", fail)
    found = crossed_on_copy(BEYOND["mistral"].model(), CONCAT)
    assert found == (OnCopy("sliding_window", 100, why="No indexer"),)


def test_other_weights_are_drawn_where_rounding_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([0.5, 1e-5])
    monkeypatch.setattr(on_copy, "_error", lambda *_: next(errors))
    assert crossed_on_copy(BEYOND["mistral"].model(), CONCAT) == (OnCopy("sliding_window", 100, 16),)
