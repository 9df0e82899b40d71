"""A trace ends after its time, with one sentence, whatever code it is in; and nothing ends later."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from nbl_export.errors import InputError
from nbl_export.export import time_limit as room
from nbl_export.export.form_check import check_form
from nbl_export.export.forms import CONCAT
from nbl_export.export.time_limit import seconds_for, seconds_to_write, time_limit
from nbl_export.export.torch import export_torch
from tests.tiny_types import tiny_model

LATE = (
    r"^Tracing A takes longer than 0 s, as .*: use another --kv-cache or --exporter, or a faster machine\.$"
)


def work(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def test_what_is_in_time_is_left_alone() -> None:
    with time_limit(60, "A"):
        work(0.1)
    with pytest.raises(KeyError), time_limit(60, "A"):
        raise KeyError


def test_a_loop_is_ended() -> None:
    begun = time.monotonic()
    with pytest.raises(InputError, match=LATE), time_limit(0.2, "A"):
        work(60)
    assert time.monotonic() - begun < 10
    work(0.3)  # nothing is raised any more


def test_code_that_catches_everything_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_AGAIN", 0.3)
    caught = []
    with pytest.raises(InputError, match=LATE), time_limit(0.2, "A"):
        for _ in range(2):
            try:
                work(60)
            except BaseException as error:
                if len(caught) == 1:
                    raise
                caught.append(error)
    assert len(caught) == 1


def test_a_trace_without_end_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    own = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        while torch.compiler.is_exporting():
            x = x + 1
        return own(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(room, "_BASE", 0.5)
    monkeypatch.setattr(room, "_OF_BLOCK", 0.0)
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"^Tracing LlamaForCausalLM takes longer than 0 s"):
        check_form(model, CONCAT)
    with pytest.raises(InputError, match=r"^Tracing LlamaForCausalLM takes longer than 0 s"):
        export_torch(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == [] and model.config._attn_implementation == "sdpa"


def test_larger_models_have_more_time() -> None:
    assert seconds_for(2) < seconds_for(48) < 3600 * 2
    assert seconds_to_write(1) < seconds_to_write(100)
