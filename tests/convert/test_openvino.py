"""What is written for OpenVINO, and what is not; tests/runtime/test_forms.py runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nbl_export.convert.openvino import check_held, write_openvino
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.progress import Silent
from nbl_export.runtime.clients import FILE, TOKENIZERS
from tests.convert.test_folders import NoTokenizer
from tests.converting import needs
from tests.families import Calibrated, build, calibrated, unsaved
from tests.processes import Notes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def case(folder: Path) -> Calibrated:
    return calibrated(folder)


@needs("openvino")
def test_an_earlier_file_is_gone_when_a_new_one_cannot_be_made(
    case: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_text("earlier")
    monkeypatch.setattr("nbl_export.convert.openvino._attention", lambda node: 1 / 0)
    with pytest.raises(
        BuildError, match=r"OpenVINO does not read the graph of LlamaForCausalLM .*choose another form"
    ):
        write_openvino(tmp_path, case.model, case.plan((1,)), NoTokenizer(), "float32", Silent())
    assert list(tmp_path.iterdir()) == []


@needs("openvino")
def test_a_tokenizer_that_is_not_converted_is_said(
    case: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Notes()
    write_openvino(tmp_path / "a", case.model, case.plan((1,)), NoTokenizer(), "float32", heard)
    assert any("No tokenizer of OpenVINO is written, give it token ids: " in note for note in heard.notes)
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    write_openvino(tmp_path / "b", case.model, case.plan((1,)), NoTokenizer(), "float32", heard)
    assert "needs openvino-tokenizers: pip install" in heard.notes[-1]
    for name in ("a", "b"):
        assert not (tmp_path / name / TOKENIZERS[0]).exists() and (tmp_path / name / FILE).exists()


def test_states_of_another_kind_are_refused() -> None:
    with pytest.raises(
        InputError, match="Lfm2ForCausalLM keeps states of another kind than keys and values: --to"
    ):
        check_held(unsaved("lfm2"))


def test_without_openvino(case: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match="needs openvino: pip install"):
        write_openvino(tmp_path / "a", case.model, case.plan((1,)), NoTokenizer(), "float32", Silent())
    assert not (tmp_path / "a").exists()
