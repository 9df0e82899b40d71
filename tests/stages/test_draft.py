"""A package with a draft model: what is one for a graph, and that onnxruntime-genai generates the graph's own text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.finished import verify_package
from nbl_export.stages.draft import GRAPH
from nbl_export.stages.package import load_package
from tests.command_line import nbl
from tests.families import build

pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'")
TEXT = api.CalibrateSettings(("self",), samples=24, seq_len=64, heldout_samples=6)
VERIFY = api.VerifySettings(speed=False, quality=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most of its weights are those of MLPs, which int4 makes an eighth of."""
    return build("llama-gqa", tmp_path_factory.mktemp("draft") / "model", intermediate_size=512)


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    target = model.parent / "out"
    plan = api.SelectSettings(k=1, criterion="cca")
    assert api.run(model, target, plan, TEXT, VERIFY).verdict == "passed"
    return target


@pytest.fixture(scope="module")
def draft(model: Path, out: Path) -> Path:
    """The same model in four bits, made from what ``out`` has."""
    target = model.parent / "int4"
    shutil.copytree(out, target)
    exporting = api.ExportSettings("int4", exporter="genai")
    plan = api.SelectSettings(k=1, criterion="cca")
    assert api.run(model, target, plan, TEXT, VERIFY, exporting=exporting).verdict == "passed"
    return target


@pytest.fixture(scope="module")
def bundle(out: Path, draft: Path) -> Path:
    target = out.parent / "bundle"
    api.package(out, target, draft=draft, draft_tokens=3)
    return target


def generated(folder: Path, prompt: list[int]) -> tuple[list[int], dict[str, Any]]:
    import onnxruntime_genai as genai

    found = genai.Model(str(folder))
    parameters = genai.GeneratorParams(found)
    parameters.set_search_options(max_length=len(prompt) + 40, do_sample=False)
    generator = genai.Generator(found, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)], generator.get_speculative_stats()


@pytest.mark.client
def test_the_text_is_the_graphs_own_and_takes_fewer_of_its_passes(out: Path, bundle: Path) -> None:
    prompt = list(range(40, 60))
    own, drafted = generated(out, prompt), generated(bundle, prompt)
    assert own[0] == drafted[0]
    assert drafted[1]["rounds"] < len(own[0]) - len(prompt) and own[1]["rounds"] == 0


@pytest.mark.client
def test_it_says_what_the_draft_does(bundle: Path, out: Path) -> None:
    found = load_package(bundle)
    assert found.draft is not None and found.draft.proposed == 3
    assert 0.3 < found.draft.acceptance <= 1 and found.draft.cost < 0.4
    assert 1 < found.draft.tokens_per_round <= 4
    assert found.draft.expected == pytest.approx(found.draft.tokens_per_round / (1 + 3 * found.draft.cost))
    line = f"{found.draft.acceptance:.0%} of those checked were kept"
    assert line in (bundle / "README.md").read_text()
    assert {GRAPH, f"{GRAPH}.data", "genai_config.json"} <= found.files.keys()
    told = json.loads((bundle / "genai_config.json").read_text())
    assert told["model"]["draft"]["filename"] == GRAPH and told["speculative"] == {"max_draft_tokens": 3}
    assert str(out.parent) not in "".join(p.read_text() for p in bundle.glob("*.json"))


@pytest.mark.client
def test_it_is_verified_as_any_package(bundle: Path, model: Path) -> None:
    assert verify_package(bundle, model, VERIFY).passed
    weights = bundle / f"{GRAPH}.data"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(InputError, match="changed after it was packaged"):
            verify_package(bundle, model, VERIFY)
    finally:
        weights.write_bytes(whole)


@pytest.mark.client
def test_a_draft_that_proposes_other_text_cannot_pay(
    out: Path, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers in another order: it costs the same, and nothing of it is kept."""
    import onnx
    from onnx import numpy_helper

    other = shutil.copytree(draft, tmp_path / "other")
    graph = onnx.load(str(other / "model.onnx"))
    for tensor in graph.graph.initializer:
        if "norm" in tensor.name:
            scale = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(scale[::-1].copy() * -1, tensor.name))
    onnx.save(graph, str(other / "model.onnx"), save_as_external_data=True, location="other.data")
    with pytest.raises(InputError, match=r"The draft cannot pay: .* tokens come of a round that costs"):
        api.package(out, tmp_path / "package", draft=other)
    assert not (tmp_path / "package").exists() and not list(tmp_path.glob(".package*"))


def other_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    vocab = told["model"]["vocab"]
    a, b = list(vocab)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(told))


def configured(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "genai_config.json"
        told = json.loads(path.read_text())
        change(told)
        path.write_text(json.dumps(told))

    return act


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no graph": (lambda folder: (folder / "model.onnx").unlink(), "has no model.onnx: give an output folder"),
    "no configuration": (lambda folder: (folder / "genai_config.json").unlink(), "has no genai_config.json"),
    "other tokens": (other_tokens, "reads other tokens than .*: the 'model' of their tokenizers differ"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "another vocabulary": (
        configured(lambda told: told["model"].update(vocab_size=300)),
        "has another vocabulary than .*: 300 tokens, not 260",
    ),
    "a library": (
        configured(lambda told: told["model"].update(custom_ops_library="x.so")),
        "'custom_ops_library', which is more than a decoder needs",
    ),
    "states": (
        configured(lambda told: told["model"]["decoder"].update(layer_types=["conv"])),
        "keeps states, which a draft cannot take back",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_draft_for_a_graph_is_refused(out: Path, draft: Path, tmp_path: Path, wrong: str) -> None:
    other = shutil.copytree(
        draft, tmp_path / "other", ignore=shutil.ignore_patterns("nbl", "baseline", "report")
    )
    # Unmodified matrices are in the baseline's data.
    shutil.copytree(draft / "baseline", other / "baseline")
    change, said = WRONG[wrong]
    change(other)
    with pytest.raises(InputError) as caught:
        api.package(out, tmp_path / "package", draft=other)
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--draft-tokens", "0"], "--draft-tokens is 0; it must be 1 to 16."),
        (["--layout", "web"], "--draft is for onnxruntime-genai, which does not read --layout web"),
    ],
)
def test_the_command_line(out: Path, draft: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = nbl("package", out, "-o", tmp_path / "p", "--draft", draft, *options)
    assert done.code == 2 and said in " ".join(done.err.split())


@pytest.mark.client
def test_the_command_line_says_what_it_brings(out: Path, draft: Path, tmp_path: Path) -> None:
    done = nbl("package", out, "-o", tmp_path / "p", "--draft", draft, "--draft-tokens", 2, "--json")
    told = json.loads(done.out)
    assert done.code == 0 and told["draft"]["proposed"] == 2 and told["draft"]["expected"] > 1


def test_a_draft_that_is_no_cheaper_cannot_pay(out: Path, draft: Path, tmp_path: Path) -> None:
    """Even where all that it proposes is kept."""
    with pytest.raises(
        InputError, match=r"The draft cannot pay: a token reads \d\.\d\d times as many bytes of weights"
    ):
        api.package(draft, tmp_path / "p", draft=out)
    with pytest.raises(InputError, match=r"and the draft .* are one folder"):
        api.package(out, draft / "p", draft=draft)
