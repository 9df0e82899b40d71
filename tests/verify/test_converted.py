"""What a form computes is held to its precision's gates, PyTorch standing for an engine; so are its tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.text import load_text
from nbl_export.linearize.plan import LinearLayer, Plan, load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.progress import Silent
from nbl_export.runtime.torch import torch_stream
from nbl_export.settings import VerifySettings
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.engines import check_gguf, check_tokens, measure_converted
from nbl_export.workspace import Workspace


@pytest.fixture
def measured(stories_out: Path, stories_model: Any) -> Callable[..., tuple[str, str]]:
    """The verdict of a form that computes by another plan than it should, and what the unmodified one does."""
    ws = Workspace.open(stories_out)
    plan, text = load_plan(ws.plan), load_text(ws.text)
    settings = VerifySettings(decode_steps=2)
    case = DecoderCase(stories_model, plan, None, ws.model, settings, Silent(), text)

    def measure(precision: str, change: Callable[[LinearLayer], LinearLayer]) -> tuple[str, str]:
        whole = plan.layers
        wrong = replace(plan, layers={i: change(whole[i]) for i in whole})
        plans: dict[str, Plan] = {"form": wrong, "unmodified": plan.without_layers()}

        @contextmanager
        def opened(path: Path, _rows: int, _length: int) -> Any:
            by = plans[path.name]
            with linearized(stories_model, by):
                yield torch_stream(stories_model, by.linear_attention)

        check, _ = measure_converted(
            case, Path("form"), precision, "an engine", opened, lambda: Path("unmodified")
        )
        return check.status, check.detail

    return measure


def scaled(by: float) -> Callable[[LinearLayer], LinearLayer]:
    return lambda one: LinearLayer((one.w * np.float32(by)).astype(np.float32), one.b)


def test_the_same_plan_passes_in_every_precision(measured: Callable[..., tuple[str, str]]) -> None:
    for precision in ("fp32", "fp16", "bf16", "q8_0"):
        status, detail = measured(precision, scaled(1.0))
        assert status == "passed" and "in an engine, within all" in detail


@pytest.mark.parametrize(("precision", "by"), [("fp32", 1.01), ("fp16", 1.05), ("bf16", 1.5), ("q8_0", 1.02)])
def test_another_plan_fails(measured: Callable[..., tuple[str, str]], precision: str, by: float) -> None:
    assert measured(precision, scaled(by))[0] == "failed"


CONFIG = SimpleNamespace(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
CASE: Any = SimpleNamespace(
    model=SimpleNamespace(config=CONFIG), text=SimpleNamespace(heldout=np.arange(300, 340)[None])
)


@pytest.mark.parametrize(
    ("layers", "status"), [((0, 1, 3), "passed"), ((0, 1, 2, 3), "failed"), ((0,), "failed")]
)
def test_a_cache_of_other_layers_is_seen(
    monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...], status: str
) -> None:
    stream = SimpleNamespace(memory_bytes=3 * 2 * 4 * 8 * 4 * 512, slots=512, tokenize=None)
    monkeypatch.setattr("nbl_export.verify.engines.LlamaCppStream", lambda *_, **__: nullcontext(stream))
    monkeypatch.setattr("nbl_export.verify.engines.check_tokens", lambda *_: None)
    case: Any = SimpleNamespace(model=CASE.model, plan=SimpleNamespace(attention_layers=layers))
    assert check_gguf(case, Path("model.gguf"), None)[1].status == status


@pytest.mark.parametrize("wrong", [None, 5, -1])
def test_another_token_is_seen_and_named(stories_folder: Path, wrong: int | None) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(stories_folder)

    def tokenize(text: str) -> list[int]:
        own = list(tokenizer(text).input_ids)
        if wrong == -1:
            return own[:-1]
        return own if wrong is None else [*own[:wrong], 7, *own[wrong + 1 :]]

    found = check_tokens(CASE, tokenizer, tokenize, "llama.cpp")
    assert found.status == ("passed" if wrong is None else "failed")
    if wrong == 5:
        assert found.detail.startswith("token 5 of held-out text is [7] in llama.cpp")
