"""A loaded model: each of its parts is loaded once, when it is asked for, and copies in other dtypes go when unused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import InputError
from nbl_export.models import load
from nbl_export.models.dummy_run import dummy_run, is_known
from nbl_export.models.layers import block_stack
from nbl_export.models.loaded import LoadedModel, why_not_run
from nbl_export.models.source import find_model
from nbl_export.models.tasks import Pooling
from nbl_export.models.weights import dtype_of, resident
from nbl_export.progress import Silent
from tests.encoders import as_sentence_transformer, text_encoder, vision_encoder
from tests.listening import Notes
from tests.models.test_weights import stored_in
from tests.tiny import build, save_tokenizer
from tests.tiny_types import tiny_model


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of every function of loading that runs."""
    ran: list[str] = []
    for name in ("load_model", "load_tokenizer", "load_image_processor", "in_precision"):
        plain = getattr(load, name)

        def counting(*args: Any, name: str = name, plain: Any = plain) -> Any:
            ran.append(name)
            return plain(*args)

        monkeypatch.setattr(load, name, counting)
    return ran


def test_nothing_is_loaded_before_it_is_asked_for_and_then_once(
    tiny_folder: Path, counted: list[str]
) -> None:
    listener = Notes()
    model = LoadedModel(find_model(str(tiny_folder)), listener)
    assert model.task.name == "text-generation" and model.pooling is None
    assert counted == [] and listener.tasks == []
    assert model.model is model.model and model.tokenizer is model.tokenizer
    assert counted == ["load_model", "load_tokenizer"]
    assert listener.tasks == [(f"Loading {tiny_folder.name}", 1, "model", 0)] and listener.advanced == [1]


def test_the_first_run_of_a_model_is_said_and_is_the_only_one(tiny_folder: Path) -> None:
    listener = Notes()
    model = LoadedModel(find_model(str(tiny_folder)), listener)
    assert model.tried is model.model and is_known(model.model)
    assert model.tried is model.model
    assert listener.tasks[1:] == [("Running a short text", 1, "text", 0)] and listener.advanced == [1, 1]


def test_a_large_model_is_loaded_with_progress_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored_in(build(tmp_path / "m", hidden_size=512, vocab_size=3000), torch.bfloat16)
    monkeypatch.setattr("nbl_export.models.loaded._LONG", 1 << 20)
    listener = Notes()
    assert LoadedModel(find_model(str(folder)), listener).model is not None
    mib = (folder / "model.safetensors").stat().st_size >> 20
    assert listener.tasks == [("Loading m", mib, "MiB", 0)] and mib >= 2
    assert len(listener.advanced) > 1 and sum(listener.advanced) == mib


def test_a_copy_is_shared_while_somebody_has_it(tiny_folder: Path, counted: list[str]) -> None:
    model = LoadedModel(find_model(str(tiny_folder)), Silent())
    assert model.in_dtype("float32") is model.model
    half = model.in_dtype("bfloat16")
    assert half is model.in_dtype("bfloat16") and half is not model.model
    assert counted.count("in_precision") == 1
    assert dtype_of(half) == "bfloat16" and {p.dtype for p in model.model.parameters()} == {torch.float32}
    del half
    gc.collect()
    again = model.in_dtype("bfloat16")
    assert counted.count("in_precision") == 2, "the first copy was not kept for nobody"
    original = next(model.model.parameters()).detach().numpy()
    with resident(again):
        rounded = next(again.parameters()).detach().float().numpy()
    # bfloat16 keeps eight binary digits.
    np.testing.assert_allclose(rounded, original, rtol=2**-8, atol=0)


@pytest.mark.parametrize("fastest", ["float32", "bfloat16"])
def test_auto_is_what_the_machine_is_fastest_in(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    monkeypatch.setattr(load, "fast_dtype", lambda *_: fastest)
    found = LoadedModel(find_model(str(tiny_folder)), Silent()).in_dtype("auto")
    assert dtype_of(found) == fastest


def test_encoders_have_what_reads_their_inputs(tmp_path: Path, counted: list[str]) -> None:
    text = LoadedModel(find_model(str(as_sentence_transformer(text_encoder(tmp_path / "bert")))), Silent())
    assert text.pooling == Pooling("mean", True, ("modules.json", "1_Pooling/config.json"))
    assert text.tokenizer("ab")["input_ids"] == [257, *text.tokenizer.convert_tokens_to_ids(["a", "b"]), 258]
    pytest.importorskip("PIL", reason="needs pillow: pip install 'nbl-export[vision]'")
    images = LoadedModel(find_model(str(vision_encoder(tmp_path / "vit"))), Silent())
    assert images.image_processor is images.image_processor
    assert counted == ["load_tokenizer", "load_image_processor"]
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        LoadedModel(find_model(str(tmp_path / "vit")), Silent()).image_processor  # noqa: B018


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that keeps a table in float32, on a machine that is fastest in bfloat16."""
    monkeypatch.setattr(load, "fast_dtype", lambda *_: "bfloat16")
    tiny_model("xglm").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_whose_code_does_not_run_fast_is_run_in_float32(mixed: Path, tiny_folder: Path) -> None:
    listener = Notes()
    model = LoadedModel(find_model(str(mixed)), listener)
    assert dtype_of(model.in_dtype("auto")) == "float32" == model.fast_dtype
    assert [note for note in listener.notes if "does not run in bfloat16" in note] == listener.notes[-1:]
    with pytest.raises(InputError, match=r"does not run in bfloat16 .*: use --calibration-dtype float32\.$"):
        model.in_dtype("bfloat16")
    other = LoadedModel(find_model(str(tiny_folder)), Silent())
    assert dtype_of(other.in_dtype("auto")) == "bfloat16" == other.fast_dtype


def test_what_runs_says_nothing_and_stays_as_it_was() -> None:
    model: Any = tiny_model("llama")
    dummy_run(model)
    blocks = list(block_stack(model)[1].children())
    assert why_not_run(model.to(torch.bfloat16)) is None
    assert list(block_stack(model)[1].children()) == blocks


def test_what_does_not_run_says_why_in_a_line() -> None:
    model: Any = tiny_model("llama")
    dummy_run(model)
    model.model.norm.to(torch.bfloat16)
    model.model.layers[0].mlp.to(torch.bfloat16)
    why = why_not_run(model)
    assert why is not None and "dtype" in why and "\n" not in why
