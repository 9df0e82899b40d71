"""An encoder measured part by part: a ragged batch, what fails and where it says so, and what is timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.calibrate.text import heldout_rows, load_text
from nbl_export.linearize.plan import load_plan
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import find_pooling, task_named
from nbl_export.settings import VerifySettings
from nbl_export.verify import encoder as module
from nbl_export.verify.case import EncoderCase
from nbl_export.verify.encoder import measure_encoder
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.parity.figures import EncoderParity
from nbl_export.workspace import Workspace
from tests.encoders import CLS, PAD, POSITIONS, SEP, as_sentence_transformer, text_encoder, write_text
from tests.listening import Notes
from tests.verify.measured import with_fault

PARITY = VerifySettings(quality=False, speed=False)
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> EncoderCase:
    """A sentence-transformers folder with layers 0 and 2 of 4 linear, as far as it is rewritten."""
    place = tmp_path_factory.mktemp("bert")
    folder = as_sentence_transformer(text_encoder(place / "model"))
    source = write_text(place / "text.jsonl")
    out = place / "out"
    settings = api.CalibrateSettings(
        (str(source),), samples=24, seq_len=90, heldout_samples=4, dtype="float32"
    )
    api.calibrate(folder, out, settings)
    api.select(out, api.SelectSettings(layers=LAYERS))
    api.export(out)
    api.rewrite(out)
    ws, found = Workspace.open(out), find_model(str(folder))
    plan = load_plan(ws.plan)
    return EncoderCase(
        load_model(found),
        plan,
        ws.baseline,
        ws.model,
        PARITY,
        Notes(),
        task_named(found.task),
        find_pooling(folder),
        heldout_rows(load_text(ws.text), plan.probe),
        "documents",
        PAD,
    )


def faulty(case: EncoderCase, folder: Path, layer: str, name: str, factor: float) -> EncoderCase:
    return replace(case, rewritten=with_fault(case.rewritten, folder, layer, name, factor))


def parity_of(found: Measurement) -> EncoderParity:
    assert isinstance(found.parity, EncoderParity)
    return found.parity


def test_a_right_graph_passes_in_every_output(bert: EncoderCase) -> None:
    found = measure_encoder(bert)
    assert [(c.name, c.status) for c in found.checks] == [
        ("parity", "passed"),
        ("method loss", "skipped"),
        ("speed", "skipped"),
    ]
    parity = parity_of(found)
    names = ["last_hidden_state", "pooler_output", "sentence_embedding"]
    assert [o.output for o in parity.outputs] == names
    assert [o.tokens for o in parity.outputs] == [sum(parity.lengths), 4, 4]
    assert found.checks[0].detail == (
        f"max relative difference {parity.worst:.2g} in {', '.join(names)}, within all float32 gates"
    )
    assert (parity.precision, parity.pytorch_in_precision, found.divergence) == ("fp32", None, None)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("nbl_linear.weight", 1.05), ("nbl_linear.bias", 0.0), ("nbl_linear.weight", float("nan"))],
    ids=["a scaled W", "no bias", "NaN"],
)
def test_wrong_maps_fail_and_their_layer_is_named(
    bert: EncoderCase, tmp_path: Path, name: str, factor: float
) -> None:
    found = measure_encoder(faulty(bert, tmp_path, "layers.2.", name, factor))
    check = found.checks[0]
    assert check.status == "failed" and "of last_hidden_state is" in check.detail
    assert found.divergence and "layer 2 (linear)" in found.divergence and found.divergence in check.detail
    assert len(parity_of(found).outputs) == 3


def test_what_is_wrong_after_the_states_fails_in_its_output_alone(bert: EncoderCase, tmp_path: Path) -> None:
    found = measure_encoder(faulty(bert, tmp_path, "pooler", "weight", 1.05))
    detail = found.checks[0].detail
    assert found.checks[0].status == "failed" and "of pooler_output is" in detail
    assert "of last_hidden_state" not in detail and "of sentence_embedding" not in detail


# the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rows_are_cut_to_other_lengths_and_keep_their_ends(bert: EncoderCase, left: bool) -> None:
    batch = module._batch(replace(bert, left=left))
    mask, ids = batch["attention_mask"].astype(bool), batch["input_ids"]
    whole = [row["input_ids"][0] for row in bert.heldout]
    lengths = [min(len(row), most) for row, most in zip(whole, (64, 41, 23, 9), strict=True)]
    assert mask.sum(axis=1).tolist() == lengths and len(set(lengths)) > 2
    for row, real, original in zip(ids, mask, whole, strict=True):
        kept = row[real]
        assert kept[0] == CLS and kept[-1] == SEP and (row[~real] == PAD).all()
        assert kept[:-1].tolist() == original[: len(kept) - 1].tolist()
        assert real[-1] if left else real[0]


# loss and speed ----------------------------------------------------------------------------------


def test_one_row_of_each_length_that_the_model_has_positions_for_is_timed(bert: EncoderCase) -> None:
    settings = replace(PARITY, speed=True, contexts=(16, POSITIONS, POSITIONS + 1), rounds=3)
    found = measure_encoder(replace(bert, settings=settings))
    assert found.speed is not None
    assert [(c.phase, c.batch, c.context) for c in found.speed.cells] == [
        ("encode", 1, 16),
        ("encode", 1, POSITIONS),
    ]
    assert all([r.name for r in c.results] == ["base", "linearized"] for c in found.speed.cells)
    assert len(found.notes) == 1 and found.notes[0].startswith(
        f"Speed at {POSITIONS + 1} tokens is not measured"
    )
