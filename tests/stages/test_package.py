"""A package holds what a deployment needs, is the graph that was verified, and is verified wherever it lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nbl_export import api
from nbl_export.calibrate.text import load_text
from nbl_export.errors import InputError, NblError
from nbl_export.files import TEMPORARY, sha256_of_file
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import load_plan
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.stages import verify as stage
from nbl_export.stages.inspection import load_package
from tests.graph.by_hand import resolved
from tests.mutations import OF_WEIGHTS
from tests.processes import edit, flip, nbl

FILES = {
    *("model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "package.json", "README.md"),
    *("report/report.json", "report/report.html", "report/report.md", "report/junit.xml"),
    *("report/plots/layers.png", "report/plots/speed.png"),
    *("nbl/plan.json", "nbl/plan.safetensors", "nbl/text.safetensors", "nbl/export.json"),
}

# What says the digests, and the card, which may be edited.
UNSEALED = ("package.json", "README.md")


def files(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): sha256_of_file(p) for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def packaged(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("packages") / "stories"
    api.package(stories_out, to)
    return to


@pytest.fixture
def copied(packaged: Path, tmp_path: Path) -> Path:
    """A copy of the package, somewhere else."""
    return Path(shutil.copytree(packaged, tmp_path / "copied"))


def test_it_holds_what_a_deployment_needs_and_nothing_else(packaged: Path, stories_out: Path) -> None:
    found, known = files(packaged), load_package(packaged)
    assert set(found) == FILES
    assert dict(known.files) == {n: digest for n, digest in found.items() if n not in UNSEALED}
    assert known.layers == load_plan(stories_out / "nbl/plan.json").blocks and known.precision == "fp32"
    assert not list(packaged.parent.glob(".*"))


def test_the_graph_is_the_verified_one_with_all_weights_beside_it(packaged: Path, stories_out: Path) -> None:
    graph = load_graph(packaged / "model.onnx")
    assert resolved(packaged / "model.onnx").graph == resolved(stories_out / "model.onnx").graph
    places = {
        v.const_value.location
        for v in graph.graph.initializers.values()
        if hasattr(v.const_value, "location")
    }
    assert set(map(str, places)) == {"model.onnx.data"}


@pytest.mark.parametrize(
    "layout, graph, end",
    [
        ("folder", "base.onnx", ".data"),
        ("triton", "models/base/1/model.onnx", ".data"),
    ],
)
def test_with_the_unmodified_graph_beside_it(
    stories_out: Path, stories_folder: Path, tmp_path: Path, layout: str, graph: str, end: str
) -> None:
    to = tmp_path / "package"
    known = api.package(stories_out, to, layout=layout, base=True)
    assert {graph, f"{graph}{end}"} <= known.files.keys() == {*files(to)} - {*UNSEALED}
    # Its reader looks for the graph beside it.
    assert ("genai_config.json" in known.files) == (layout == "folder")
    assert resolved(to / graph).graph == resolved(stories_out / "baseline" / "model.onnx").graph
    assert known.graph.endswith("model.onnx") and api.verify_package(to, stories_folder).passed
    (to / graph).write_bytes(b"another")
    with pytest.raises(InputError, match=r"\.onnx is missing or was changed after it was packaged"):
        api.verify_package(to, stories_folder)


def test_the_text_of_the_fit_and_the_selection_stays_behind(packaged: Path, stories_out: Path) -> None:
    whole, left = (load_text(root / "nbl/text.safetensors") for root in (stories_out, packaged))
    assert np.array_equal(left.heldout, whole.heldout) and np.array_equal(left.start, whole.start)
    assert np.array_equal(left.heldout_document, whole.heldout_document)
    assert np.array_equal(left.calibration, whole.heldout[:1]) and len(left.selection) == 0


def test_it_is_verified_where_it_lies_with_a_model_that_was_moved(
    copied: Path, stories_folder: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(stories_folder, tmp_path / "moved"))
    before = files(copied)
    value = api.verify_package(copied, moved)
    assert value.passed and value.measured.method_loss is not None
    assert {c.name: c.status for c in value.checks} == {
        "package": "passed",
        "parity": "passed",
        "speed": "skipped",
    }
    assert files(copied) == before, "nothing is written"


def repacked(root: Path) -> None:
    """Say in the manifest that the files are as they are."""
    sealed = {n: d for n, d in files(root).items() if n not in UNSEALED}
    edit(root / "package.json", lambda known: known.update(files=sealed))


@pytest.mark.parametrize("fault", ["W × 0.8", "b dropped"])
def test_a_graph_that_is_not_the_plans_fails_though_the_digests_say_otherwise(
    copied: Path, stories_out: Path, stories_folder: Path, fault: str
) -> None:
    plan = load_plan(stories_out / "nbl/plan.json")
    wrong = OF_WEIGHTS[fault](plan, int(plan.linear_attention[0]))
    rewrite_file(stories_out / "baseline/model.onnx", wrong, copied / "model.onnx")
    repacked(copied)
    value = api.verify_package(copied, stories_folder)
    assert not value.passed
    assert [c.name for c in value.checks if c.status == "failed"] == ["parity"]


def truncate(root: Path) -> None:
    path = root / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-4])


def escape(root: Path) -> None:
    outside = "../stories/model.onnx"
    edit(root / "package.json", lambda known: known["files"].update({outside: known["files"]["model.onnx"]}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shorter file": (truncate, r"model.onnx.data is missing or was changed after it was packaged"),
    "a file that is gone": (lambda root: (root / "nbl/plan.json").unlink(), r"plan.json is missing"),
    "a name outside": (escape, r"\.\./stories/model.onnx"),
    "no manifest": (
        lambda root: (root / "package.json").write_text("{}"),
        r"not of a package of this version",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_as_it_was_packaged_is_refused(copied: Path, stories_folder: Path, damage: str) -> None:
    act, words = DAMAGE[damage]
    act(copied)
    with pytest.raises(InputError, match=words) as caught:
        api.verify_package(copied, stories_folder)
    assert "\n" not in str(caught.value)


def test_another_model_is_refused(copied: Path, stories_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(stories_folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"other is not the model that this was made from, .* with --model"):
        api.verify_package(copied, other)


def test_what_is_not_verified_or_failed_is_not_packaged(stories_copy: Path, tmp_path: Path) -> None:
    api.verify(stories_copy, api.VerifySettings(speed=False, bound=api.LossBound(max_kl=1e-6)))
    with pytest.raises(InputError, match=r"says FAIL \(KL bound\): what is not proven is not packaged"):
        api.package(stories_copy, tmp_path / "to")
    api.select(stories_copy, api.SelectSettings(k=1, criterion="cca"))
    with pytest.raises(InputError, match=r"`verify` in .* is out of date .*: run `nbl-export verify"):
        api.package(stories_copy, tmp_path / "to")
    assert not (tmp_path / "to").exists() and not list(tmp_path.glob(".to*"))


@pytest.mark.parametrize("damaged", ["model.onnx.data", "baseline/model.onnx.data", "nbl/plan.safetensors"])
@pytest.mark.parametrize("layout", ["folder", "web"])
def test_what_was_changed_since_it_was_verified_is_not_packaged(
    stories_copy: Path, tmp_path: Path, damaged: str, layout: str
) -> None:
    flip(stories_copy / damaged)
    with pytest.raises(
        InputError, match=rf"{damaged} is missing or was changed after `\w+` wrote it: run `nbl-exp"
    ):
        api.package(stories_copy, tmp_path / "to", layout=layout)
    assert not (tmp_path / "to").exists() and not list(tmp_path.glob(".to*"))


def test_places_that_are_refused(stories_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for to, words in (
        (stories_copy / "package", "lies in the output folder"),
        (stories_copy, "is the output folder"),
        (tmp_path, "holds the output folder"),
        (tmp_path / "full", "has files that are no package"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "nowhere" / "to", "is not a folder: make it first"),
    ):
        with pytest.raises(InputError, match=words):
            api.package(stories_copy, to)
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


def test_an_earlier_package_is_replaced_as_a_whole_or_not_at_all(
    stories_out: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "left.txt").write_text("of the earlier one")
    before = files(copied)
    with monkeypatch.context() as patched:
        patched.setattr(
            stage, "_write_heldout", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
        with pytest.raises((NblError, OSError)):
            api.package(stories_out, copied)
        assert files(copied) == before and not list(copied.parent.glob(".copied*"))
        # A process was killed between the two renames, and the next one fails, too.
        killed = copied.parent / f".copied.killed{TEMPORARY}"
        killed.mkdir()
        copied.rename(killed / "old")
        with pytest.raises((NblError, OSError)):
            api.package(stories_out, copied)
    assert files(copied) == before and not list(copied.parent.glob(".copied*"))
    api.package(stories_out, copied)
    assert set(files(copied)) == FILES


def test_a_folder_whose_model_was_moved_is_verified_and_records_where_it_is(
    stories_copy: Path, stories_folder: Path, tmp_path: Path
) -> None:
    record = stories_copy / "nbl/workspace.json"
    edit(record, lambda state: state["model"].update(path="/nowhere/model"))
    quick = api.VerifySettings(speed=False)
    with pytest.raises(
        InputError, match=r"is not there any more: .*say where it is now \(`nbl-export verify --model`\)"
    ):
        api.verify(stories_copy, quick)
    moved = Path(shutil.copytree(stories_folder, tmp_path / "moved"))
    assert api.verify(stories_copy, quick, model=moved).passed
    assert json.loads(record.read_text())["model"]["path"] == str(moved)
    assert api.verify(stories_copy, replace(quick, decode_steps=4)).passed, "it is found from now on"


def test_the_command_line(stories_out: Path, stories_folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    done = nbl("package", stories_out, "-o", to)
    assert (
        done.code == 0
        and "fp32; linear: 2, 3" in done.out
        and f"nbl-export verify {to} --model MODEL" in done.out
    )
    done = nbl("verify", to)
    assert done.code == 2 and "is a package: say where its model is with --model" in done.err
    done = nbl("verify", to, "--model", stories_folder, "--json")
    answer = json.loads(done.out)
    assert done.code == 0 and answer["passed"] and answer["command"] == "verify"
    done = nbl("verify", to, "--model", stories_folder)
    assert "PASS" in done.out and "perplexity ×" in done.out
