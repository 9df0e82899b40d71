"""The dtype that calibration reads in, from the setting to the moments and the fits that read again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from nbl_export import api
from nbl_export.blocks import ATTENTION
from nbl_export.calibrate.moments import load_moments
from nbl_export.calibrate.probe import load_probe
from nbl_export.calibrate.text import CalibrationText
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.models.load import LoadedModel
from nbl_export.models.source import find_model
from nbl_export.models.weights import dtype_of
from nbl_export.progress import Silent
from nbl_export.settings import CalibrateSettings
from nbl_export.stages import calibrate as module
from nbl_export.stages import measuring
from nbl_export.stages.calibrate import check_sources, loader_for
from nbl_export.workspace import Workspace
from tests.processes import edit
from tests.tiny import CLS, PAD, SEP, text_encoder, vision_encoder, write_images, write_text
from tests.tiny_types import BEYOND, ENCODERS


@pytest.fixture
def settings(stories_text: Path) -> api.CalibrateSettings:
    return api.CalibrateSettings((str(stories_text),), samples=8, seq_len=64, heldout_samples=2)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bfloat16."""
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda *_: "bfloat16")


def calibrated(model: Path, out: Path, settings: api.CalibrateSettings) -> tuple[Any, str]:
    api.calibrate(str(model), out, settings)
    moments, metadata = load_moments(Workspace.open(out).moments)
    return moments.layers, metadata["dtype"]


def test_auto_is_what_the_machine_is_fastest_in(
    stories_folder: Path, tmp_path: Path, settings: api.CalibrateSettings, fast: None
) -> None:
    half, dtype = calibrated(stories_folder, tmp_path / "auto", settings)
    assert dtype == "bfloat16"
    exact, dtype = calibrated(
        stories_folder, tmp_path / "exact", replace(settings, calibration_dtype="float32")
    )
    assert dtype == "float32"
    for index, layer in exact.items():
        gap = np.linalg.norm(half[index].xx - layer.xx) / np.linalg.norm(layer.xx)
        assert 0 < gap < 1e-2, index
    # What graphs are proven against is the model itself.
    probes = [load_probe(Workspace.open(tmp_path / name).probe) for name in ("auto", "exact")]
    for index in exact:
        np.testing.assert_array_equal(probes[0].y[index], probes[1].y[index])


def test_fits_that_read_the_text_again_read_it_in_the_same_dtype(
    stories_folder: Path,
    tmp_path: Path,
    settings: api.CalibrateSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    for name in ("weighted_moments", "sequential_fits"):
        real = getattr(measuring, name)

        def spy(model: torch.nn.Module, *args: Any, real: Any = real, name: str = name) -> Any:
            seen.append((name.partition("_")[0], dtype_of(model)))
            return real(model, *args)

        monkeypatch.setattr(measuring, name, spy)
    calibrated(stories_folder, tmp_path / "out", replace(settings, calibration_dtype="bfloat16"))
    api.select(tmp_path / "out", api.SelectSettings(k=2, criterion="cca", fit="weighted"))
    assert seen == [("weighted", "bfloat16")]
    assert load_plan(Workspace.open(tmp_path / "out").plan).fit == "weighted"


# calibration data ----------------------------------------------------------------------------------

TEXT = CalibrateSettings(("unused",), samples=4, seq_len=32, heldout_samples=2, selection_samples=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    text_encoder(folder / "bert")
    vision_encoder(folder / "vit")
    write_text(folder / "text.jsonl")
    pytest.importorskip("PIL", reason="needs pillow: pip install 'nbl-export[vision]'")
    write_images(folder / "images")
    return folder


@pytest.fixture(scope="module")
def loaded(place: Path, tiny_folder: Path) -> Callable[[str], LoadedModel]:
    folders = {"decoder": tiny_folder, "bert": place / "bert", "vit": place / "vit"}
    models = {name: LoadedModel(find_model(str(folder)), Silent()) for name, folder in folders.items()}
    return models.__getitem__


def read(loaded: Callable[[str], LoadedModel], name: str, source: Path) -> Any:
    """The material of the model ``name``, read from ``source``, saved and loaded again."""
    material = loader_for(loaded(name).source)
    value = material.read(
        loaded(name), CalibrateSettings(**{**vars(TEXT), "calibration": (str(source),)}), Silent()
    )
    path = source.with_name(f"{name}.safetensors")
    material.save(path, value)
    again = material.load(path)
    assert type(again) is type(value)
    for field in vars(value):
        assert np.array_equal(getattr(again, field), getattr(value, field)), field
    return again


def test_an_encoder_writes_no_text_of_its_own(loaded: Callable[[str], LoadedModel], place: Path) -> None:
    own = CalibrateSettings(("self",))
    check_sources(loaded("decoder").source, own)
    for name, unit in (("bert", "text"), ("vit", "images")):
        check_sources(loaded(name).source, CalibrateSettings((str(place / "text.jsonl"),)))
        with pytest.raises(InputError, match=f"is an encoder and cannot generate its own calibration {unit}"):
            check_sources(loaded(name).source, own)


# decoders ----------------------------------------------------------------------------------------


def test_a_decoder_is_judged_on_prompts_as_they_are_used(
    loaded: Callable[[str], LoadedModel], place: Path
) -> None:
    text = read(loaded, "decoder", place / "text.jsonl")
    assert text.calibration.shape == (4, 32)
    material = loader_for(loaded("decoder").source)
    rows = material.ranges(loaded("decoder").model, text, {"input_ids": None})
    # The beginning of text stands before each row.
    assert [row.tolist() for row in rows] == [[256, *row] for row in text.calibration.tolist()]
    probe = material.probe(loaded("decoder"), text, (ATTENTION,))
    assert probe.inputs["attention_mask"].sum(axis=1).tolist() == [24, 16]
    assert probe.inputs["input_ids"][0].tolist() == text.calibration[0, :24].tolist()
    assert probe.inputs["input_ids"][1, 8:].tolist() == text.calibration[1, :16].tolist()


# text encoders -----------------------------------------------------------------------------------


def test_a_text_encoder_is_probed_with_framed_rows_of_two_lengths(
    loaded: Callable[[str], LoadedModel], place: Path
) -> None:
    text = read(loaded, "bert", place / "text.jsonl")
    probe = loader_for(loaded("bert").source).probe(loaded("bert"), text, (ATTENTION,))
    assert list(probe.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    ids, mask = probe.inputs["input_ids"], probe.inputs["attention_mask"].astype(bool)
    assert mask.sum(axis=1).tolist() == [24, 16] and (ids[~mask] == PAD).all()
    for row, kept in zip(ids, mask, strict=True):
        assert row[kept][0] == CLS and row[kept][-1] == SEP and not {CLS, SEP} & {*row[kept][1:-1].tolist()}
    # h enters a block of the model, and y of its last layer is what transformers adds there.
    model: Any = AutoModel.from_pretrained(place / "bert")
    seen: dict[str, torch.Tensor] = {}
    block = model.encoder.layer[2]
    block.register_forward_pre_hook(lambda _m, args: seen.update(h=args[0]))
    block.attention.output.dense.register_forward_hook(lambda _m, _a, output: seen.update(y=output))
    with torch.inference_mode():
        model(**{n: torch.from_numpy(a) for n, a in probe.inputs.items()})
    for name, found in (("h", probe.h[2]), ("y", probe.y[2])):
        np.testing.assert_allclose(found, seen[name].numpy()[mask], rtol=0, atol=1e-5)


def test_an_encoder_is_judged_on_whole_documents(loaded: Callable[[str], LoadedModel], place: Path) -> None:
    text = read(loaded, "bert", place / "text.jsonl")
    material = loader_for(loaded("bert").source)
    rows = material.heldout(text, {"input_ids": None, "token_type_ids": None})
    assert len(rows) == len(text.heldout) == 2
    for row, ids, document in zip(rows, text.heldout, text.heldout_document, strict=True):
        assert row["input_ids"].tolist() == [[t for t, d in zip(ids, document, strict=True) if d >= 0]]
        assert row["token_type_ids"].shape == row["input_ids"].shape and not row["token_type_ids"].any()
    assert all(set(row) == {"input_ids"} for row in material.heldout(text, {"input_ids": None}))
    batch = material.ranges(loaded("bert").model, text, {"token_type_ids": None})
    assert batch["input_ids"].tolist() == text.calibration.tolist() and batch["attention_mask"].all()
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}


# vision encoders ---------------------------------------------------------------------------------


def test_a_vision_encoder_is_probed_and_judged_with_images(
    loaded: Callable[[str], LoadedModel], place: Path
) -> None:
    images = read(loaded, "vit", place / "images")
    assert images.calibration.shape == (4, 3, 32, 32) and images.heldout.shape == (2, 3, 32, 32)
    material = loader_for(loaded("vit").source)
    probe = material.probe(loaded("vit"), images, (ATTENTION,))
    assert np.array_equal(probe.inputs["pixel_values"], images.calibration[:2])
    # Every patch, and the class token, of both.
    assert probe.x[0].shape == (2 * 17, 48)
    rows = material.heldout(images, {"pixel_values": None})
    assert [row["pixel_values"].shape for row in rows] == [(1, 3, 32, 32)] * 2
    assert np.array_equal(np.concatenate([row["pixel_values"] for row in rows]), images.heldout)
    assert np.array_equal(
        material.ranges(loaded("vit").model, images, {})["pixel_values"], images.calibration
    )


def test_images_of_a_size_that_the_model_does_not_take(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "vit", tmp_path / "vit")
    size = {"height": 48, "width": 48}
    edit(folder / "preprocessor_config.json", lambda processor: processor.update(size=size))
    model = LoadedModel(find_model(str(folder)), Silent())
    material = loader_for(model.source)
    images = material.read(
        model, CalibrateSettings(**{**vars(TEXT), "calibration": (str(place / "images"),)}), Silent()
    )
    with pytest.raises(
        InputError, match=r"does not take the images that its preprocessor_config\.json makes \("
    ):
        material.probe(model, images, (ATTENTION,))


def test_ranges_are_of_text_beyond_a_length_too() -> None:
    rows = np.random.default_rng(0).integers(3, 250, (4, 48)).astype(np.int32)
    text = CalibrationText(rows, rows, rows, rows, rows, np.array([2], np.int32))
    model = BEYOND["mistral"].model()
    *usual, row = found = module.CalibrationLoader().ranges(model, text, {})
    assert (
        [len(one) for one in found] == [49] * 4 + [108] and row[0] == 2 and list(row[1:49]) == list(rows[0])
    )
    assert module._longer_rows(model, text, [rows.reshape(-1)[:109]]) == []
    plain = module.CalibrationLoader().ranges(BEYOND["mistral"].model(sliding_window=None), text, {})
    assert [list(one) for one in plain] == [list(one) for one in usual]
    batch = module._Passages().ranges(ENCODERS["modernbert"].model(), text, {})
    assert batch["attention_mask"].sum(axis=1).tolist() == [48] * 4 + [208]
    assert batch["input_ids"][4].tolist() == np.resize(rows, 208).tolist()


@pytest.mark.parametrize(("width", "longest"), [(220, 208), (120, 120)])
def test_a_row_of_the_probe_of_a_text_encoder_goes_beyond_a_length(
    loaded: Callable[[str], LoadedModel], width: int, longest: int
) -> None:
    rows = np.random.default_rng(0).integers(3, 250, (2, width)).astype(np.int32)
    text = CalibrationText(rows, rows, rows, rows, rows, np.array([CLS], np.int32))
    model: Any = SimpleNamespace(tokenizer=loaded("bert").tokenizer)
    model.model = ENCODERS["modernbert"].model(vocab_size=264)
    model.in_dtype = lambda _dtype: model.model
    probe = loader_for(loaded("bert").source).probe(model, text, (ATTENTION,))
    assert probe.inputs["attention_mask"].sum(axis=1).tolist() == [longest, 16]
