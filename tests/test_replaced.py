"""What a test replaced matters to the modules that could use it, and to no others."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from nbl_export.export.forms import FORMS
from nbl_export.models import layers
from nbl_export.models.loaded import LoadedModel
from nbl_export.stages import in_order
from nbl_export.verify.speed import ceiling
from tests.replaced import replaced_for

EXPORT, ROOFLINE = "nbl_export.export", "nbl_export.verify.speed.roofline"
# The place, the name there, and whom it matters to.
REPLACED: dict[str, tuple[Any, str, set[str]]] = {
    "of a room above": (in_order, "run", set()),
    "of a room below": (layers, "attention_layers", {EXPORT}),
    "of a class below": (LoadedModel, "tried", {EXPORT}),
    "of what the other imports": (ceiling, "timed", {ROOFLINE}),
    "of a library": (psutil, "virtual_memory", {EXPORT, ROOFLINE}),
}


@pytest.mark.parametrize("what", REPLACED)
def test_it_matters_to_what_imports_it(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, matters = REPLACED[what]
    monkeypatch.setattr(place, name, getattr(place, name))
    assert {room for room in (EXPORT, ROOFLINE) if replaced_for(room)} == matters
    monkeypatch.undo()
    assert not replaced_for(EXPORT) and not replaced_for(ROOFLINE)


def test_data_matters_whosever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "concat", FORMS["concat"])  # type: ignore[arg-type]
    assert replaced_for(EXPORT) and replaced_for(ROOFLINE)


def test_an_environment_variable_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert not replaced_for(EXPORT)


def test_a_package_that_is_left_out_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", None)
    assert not replaced_for(EXPORT, without=("psutil",)) and replaced_for(EXPORT, without=("onnxruntime",))


def test_another_monkeypatch_counts_too() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "attention_layers", layers.attention_layers)
        assert replaced_for(EXPORT)
    assert not replaced_for(EXPORT)
