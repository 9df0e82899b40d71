"""What is refused before a model's weights are read, and that nothing is which a stage would take."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api, digests
from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.models import load
from nbl_export.models.source import find_model
from nbl_export.settings import RunSettings
from nbl_export.stages.in_order import check_source
from tests.encoders import text_encoder, vision_encoder
from tests.families import build
from tests.finished import TWO
from tests.folders import files_in
from tests.models.spoiled import edit_config, one_sentence


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a file that is hashed, or a model that is loaded, fails the test."""

    def read(*_: Any) -> Any:
        pytest.fail("a file was hashed, or the model loaded")

    monkeypatch.setattr(digests, "sha256_of", read)
    monkeypatch.setattr(load, "load_stored", read)


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of four layers, of width 32, that may be spoiled."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        work()
    return one_sentence(caught)


# a run --------------------------------------------------------------------------------------------

BEYOND: dict[str, tuple[dict[str, Any], str, str]] = {
    "k": ({"k": 99}, "attention", "--k is 99; it must be between 0 and 4 (the model's attention layers)."),
    "k of MLPs": ({"k": 5}, "mlp", "--k is 5; it must be between 0 and 4 (the model's MLPs)."),
    "k of both": ({"k": 9}, "both", "between 0 and 8 (the model's attention layers and MLPs)."),
    "k with spans": ({"k": 9}, "all", "between 0 and 8 (the model's attention layers and MLPs)."),
    "a layer": ({"layers": (1, 99)}, "attention", "names layer 99; the layers that can be are 0, 1, 2, 3."),
    "an MLP": (
        {"layers": (Mlp(3),)},
        "attention",
        "names the MLP of layer 3, and there are no moments of MLPs: calibrate with --blocks both.",
    ),
    "a span": (
        {"layers": (Span(1, 2),)},
        "both",
        "names layers 1 to 2 as a whole, and there are no moments of spans: calibrate with --blocks all.",
    ),
    "a long span": ({"layers": (Span(1, 6),)}, "all", "names 1-6.span, which is not among the spans"),
    "rank": ({"k": 1, "rank": 16}, "attention", "--rank is 16; two factors of that rank are not smaller"),
    "fit": ({"k": 1, "fit": "sequential"}, "all", "--fit sequential is for attentions and MLPs"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_the_configuration_has_not(model: Path, tmp_path: Path, unread: None, name: str) -> None:
    selection, blocks, words = BEYOND[name]
    text: Any = api.CalibrateSettings(blocks=blocks)
    said = refused(lambda: api.run(model, tmp_path / "out", api.SelectSettings(**selection), text))
    assert words in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("selection", "blocks"),
    [
        ({"k": 4}, "attention"),
        ({"k": 8}, "both"),
        ({"k": 8}, "all"),
        ({"layers": (0, 3)}, "attention"),
        ({"layers": (Span(0, 3),)}, "all"),
        ({"layers": (Span(1, 2), 3, Mlp(3))}, "all"),
        ({"k": 0, "rank": 15}, "mlp"),
    ],
)
def test_the_most_that_there_can_be_is_taken(
    model: Path, tmp_path: Path, selection: dict[str, Any], blocks: Any
) -> None:
    source = find_model(str(model))
    text = api.CalibrateSettings(blocks=blocks)
    check_source(source, tmp_path / "out", RunSettings(api.SelectSettings(**selection), text))


def test_which_layers_of_a_hybrid_have_attention_is_left_to_the_model(tmp_path: Path) -> None:
    """Its configuration has four layers, of which two are attention: to name another is refused with what it is."""
    source = find_model(str(build("lfm2", tmp_path / "hybrid")))
    layers = tuple(range(4))
    for selection in (api.SelectSettings(k=4), api.SelectSettings(layers=layers)):
        check_source(source, tmp_path / "out", RunSettings(selection))
    with pytest.raises(InputError, match="--k is 5"):
        check_source(source, tmp_path / "out", RunSettings(api.SelectSettings(k=5)))


def test_text_that_is_not_there_or_not_text(model: Path, tmp_path: Path, unread: None) -> None:
    (tmp_path / "a.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, words in {
        "nosuch.txt": "The calibration text nosuch.txt does not exist: check the path.",
        str(tmp_path / "*.txt"): "No file matches the calibration text",
        str(tmp_path / "empty"): "has no calibration text",
        str(tmp_path / "a.docx"): "is not a calibration text: give a .txt",
        str(tmp_path / "a.jsonl"): "a.jsonl, line 1: no text field 'text' (text fields: words)",
    }.items():
        text = api.CalibrateSettings((source,))
        for verb in (
            lambda t=text: api.run(model, tmp_path / "out", TWO, t),
            lambda t=text: api.calibrate(model, tmp_path / "out", t),
        ):
            assert words in refused(verb)
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_there_before_a_model_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.models.source._hub_snapshot", lambda *_: pytest.fail("it was fetched"))
    text = api.CalibrateSettings(("nosuch.txt",))
    said = refused(lambda: api.run("owner/model", tmp_path / "out", TWO, text))
    assert said == "The calibration text nosuch.txt does not exist: check the path."


def test_a_model_without_its_tokenizer(model: Path, tmp_path: Path, unread: None) -> None:
    for path in model.glob("*token*"):
        path.unlink()
    for verb in (
        lambda: api.run(model, tmp_path / "out", TWO),
        lambda: api.calibrate(model, tmp_path / "out"),
    ):
        assert refused(verb).startswith(f"{model} has no tokenizer: put the tokenizer.json")


def test_an_architecture_that_is_not_known_or_comes_with_code(
    model: Path, tmp_path: Path, unread: None
) -> None:
    edit_config(model, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    assert "has an architecture that transformers " in refused(lambda: api.run(model, tmp_path / "out", TWO))
    edit_config(model, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    for verb in (
        lambda: api.run(model, tmp_path / "out", TWO),
        lambda: api.calibrate(model, tmp_path / "out"),
    ):
        assert "then give --trust-remote-code." in refused(verb)
    (model / "config.json").unlink()
    assert "neither config.json nor a .gguf file" in refused(lambda: api.run(model, tmp_path / "out", TWO))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_somebody_else(model: Path, tmp_path: Path, unread: None) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.onnx").write_text("")
    for out, words in {
        tmp_path / "file": "is a file; --output must be a folder.",
        tmp_path / "theirs": "has a model.onnx that nbl-export did not write",
        model: "whose files it would change: choose another --output.",
    }.items():
        assert words in refused(lambda o=out: api.run(model, o, TWO))
        assert words in refused(lambda o=out: api.calibrate(model, o))
    assert files_in(tmp_path / "theirs") == {"model.onnx"}


def test_encoders_need_material_and_what_reads_it(tmp_path: Path, unread: None) -> None:
    cca, text = api.SelectSettings(k=1), api.CalibrateSettings(("nosuch.txt",))
    bert, vit = text_encoder(tmp_path / "bert"), vision_encoder(tmp_path / "vit")
    out = tmp_path / "out"
    assert "cannot generate its own calibration text" in refused(lambda: api.run(bert, out, cca))
    assert "nosuch.txt does not exist" in refused(lambda: api.run(bert, out, cca, text))
    assert "nosuch.txt names no image" in refused(lambda: api.run(vit, out, cca, text))
    assert "--workload is measured" in refused(
        lambda: api.run(bert, out, api.SelectSettings(k=1, workload=("prefill=8",)))
    )
    (vit / "preprocessor_config.json").unlink()
    (tmp_path / "a.png").write_bytes(b"x")
    image = api.CalibrateSettings((str(tmp_path / "a.png"),))
    assert "has no preprocessor_config.json" in refused(lambda: api.run(vit, out, cca, image))


# in a folder --------------------------------------------------------------------------------------


def test_a_stage_whose_inputs_are_not_made_yet(tiny_folder: Path, tmp_path: Path) -> None:
    from nbl_export.stages.run import Run

    out = tmp_path / "out"
    Run.start(find_model(str(tiny_folder)), out)
    before = files_in(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "sha256_of", lambda *_: pytest.fail("a file was hashed"))
        for verb, stage, command in (
            (lambda: api.select(out, TWO), "calibrate", f"nbl-export calibrate MODEL -o {out}"),
            (
                lambda: api.export(out, api.ExportSettings("fp16")),
                "calibrate",
                f"nbl-export calibrate MODEL -o {out}",
            ),
            (lambda: api.rewrite(out), "select", f"nbl-export select {out} --k K"),
            (lambda: api.verify(out), "select", f"nbl-export select {out} --k K"),
            (lambda: api.evaluate(out, api.EvalSettings()), "select", f"nbl-export select {out} --k K"),
            (lambda: api.bench(out), "select", f"nbl-export select {out} --k K"),
        ):
            assert refused(verb) == f"{out} has no finished `{stage}` yet: run `{command}` first."
    assert files_in(out) == before


def test_a_k_beyond_the_moments_is_refused_before_a_layer_is_scored(
    stories_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_stored", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(
        "nbl_export.linearize.scores.score_layers", lambda *_: pytest.fail("a layer was scored")
    )
    assert "--k is 99; it must be between 0 and 5" in refused(
        lambda: api.select(stories_copy, api.SelectSettings(k=99))
    )
    assert "names layer 7; the layers that can be are 0, 1, 2, 3, 4." in refused(
        lambda: api.select(stories_copy, api.SelectSettings(layers=(7,)))
    )
