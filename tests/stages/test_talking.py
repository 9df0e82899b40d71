"""Which graphs of a folder are opened, with what, and which folders generate nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.errors import InputError, MissingDependencyError, NblError
from nbl_export.generate import genai
from nbl_export.parts import part
from nbl_export.progress import Silent
from nbl_export.runtime import sizes
from nbl_export.settings.talking import BOTH, GENAI, ORT
from nbl_export.stages import talking
from nbl_export.stages.rewrite import drop_baseline
from nbl_export.stages.talking import Talk
from nbl_export.workspace import Workspace
from tests.genai_config import change
from tests.listening import Notes
from tests.talking import END, OTHER_END


def state(out: Path, how: Callable[[Any], object]) -> None:
    """Change the record of the folder."""
    path = out / "nbl" / "workspace.json"
    found = json.loads(path.read_text())
    how(found)
    path.write_text(json.dumps(found))


def talk(out: Path, listener: Any = None, lenient: bool = False, **asked: Any) -> Talk:
    return Talk(Workspace.open(out), api.GenerateSettings(**asked), listener or Silent(), lenient=lenient)


def refused(out: Path, kind: type[NblError] = InputError, **asked: Any) -> str:
    with pytest.raises(kind) as caught, talk(out, **asked).opened(LINEARIZED):
        pass
    assert type(caught.value) is kind
    return str(caught.value)


def test_the_graphs_that_are_asked_for(talking_out: Path) -> None:
    base, linearized = talking_out / "baseline" / "model.onnx", talking_out / "model.onnx"
    assert talk(talking_out, graph=BOTH).graphs == {BASE: base, LINEARIZED: linearized}
    assert list(talk(talking_out, graph=BOTH).graphs) == [BASE, LINEARIZED]
    assert talk(talking_out, graph=BASE).graphs == {BASE: base}
    found = talk(talking_out)
    assert found.graphs == {LINEARIZED: linearized}
    assert (found.positions, found.stops) == (512, {END, OTHER_END})
    assert found.prompts.has_template and not talk(talking_out, raw=True).prompts.has_template


def test_without_its_configuration_or_the_package_it_runs_in_onnx_runtime(
    talking_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runtime(listener: Any = None, **asked: Any) -> str:
        with talk(talking_copy, listener, **asked).opened(LINEARIZED) as (opened,):
            return opened.runtime

    assert runtime(runtime=ORT) == "ONNX Runtime"
    with monkeypatch.context() as patch:
        patch.setattr(genai, "is_installed", lambda: False)
        assert runtime() == "ONNX Runtime"
        said = refused(talking_copy, MissingDependencyError, runtime=GENAI)
        assert said == (
            f"onnxruntime-genai is not installed: {part('onnxruntime-genai').pip}, or leave out --runtime genai."
        )


@pytest.mark.client
def test_a_configuration_that_asks_for_more_is_said_and_not_used(
    talking_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )
    heard, found = Notes(), talk(talking_copy)
    with found.opened(LINEARIZED) as (opened,):
        assert opened.runtime == "onnxruntime-genai"
    options = {"custom_ops_library": "/tmp/evil.so"}
    change(talking_copy, lambda c: c["model"]["decoder"]["session_options"].update(options))
    monkeypatch.setattr(Workspace, "damaged_file", lambda *_: None)  # its record can be written anew, too
    monkeypatch.setattr(genai, "GenaiRow", lambda *_: pytest.fail("it was given to it"))
    with talk(talking_copy, heard).opened(LINEARIZED) as (opened,):
        assert opened.runtime == "ONNX Runtime"
    (note,) = heard.notes
    assert note.startswith("linearized runs in ONNX Runtime: ") and "custom_ops_library" in note
    assert "custom_ops_library" in refused(talking_copy, runtime=GENAI)


@pytest.mark.client
def test_what_genai_does_not_load_runs_in_onnx_runtime(
    talking_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )
    heard = Notes()
    change(talking_copy, lambda c: c["model"].update(type="no such type"))
    monkeypatch.setattr(Workspace, "damaged_file", lambda *_: None)
    with talk(talking_copy, heard).opened(LINEARIZED) as (opened,):
        assert opened.runtime == "ONNX Runtime"
    assert "no such type" in heard.notes[0]
    assert refused(talking_copy, runtime=GENAI).endswith(": leave out --runtime genai.")


def test_sessions_that_do_not_fit_are_small(talking_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    stream = talking._stream

    def noting(path: Path, name: str, small: bool, listener: Any) -> Any:
        asked.append((name, small))
        return stream(path, name, small, listener)

    monkeypatch.setattr(talking, "_stream", noting)
    found = talk(talking_out, graph=BOTH, runtime=ORT)
    with found.opened(BASE, LINEARIZED):
        pass
    monkeypatch.setattr(sizes, "free", lambda: 1000)
    with found.opened(BASE):
        pass
    assert asked == [(BASE, False), (LINEARIZED, False), (BASE, True)]


def test_a_folder_without_its_unmodified_graph(talking_copy: Path) -> None:
    out = shutil.copytree(talking_copy, talking_copy.with_name("whole"), copy_function=shutil.copy2)
    drop_baseline(Workspace.open(out))
    assert "has no unmodified graph any more (--keep-baseline no)" in refused(out, graph=BASE)
    assert "has no unmodified graph any more" in refused(out, graph=BOTH)
    heard = Notes()
    assert list(talk(out, heard, lenient=True, graph=BOTH).graphs) == [LINEARIZED]
    assert heard.notes[0].startswith("The linearized graph alone answers: ")
    assert list(talk(out).graphs) == [LINEARIZED]
    with pytest.raises(InputError, match="has no unmodified graph"):
        talk(out, heard, lenient=True, graph=BASE)


def test_a_folder_that_is_not_that_far(talking_copy: Path, tmp_path: Path) -> None:
    state(talking_copy, lambda s: s["stages"].pop("rewrite"))
    assert "has no finished `rewrite` yet: run `nbl-export rewrite" in refused(talking_copy)
    assert list(talk(talking_copy, graph=BASE).graphs) == [BASE]
    (talking_copy / "baseline" / "model.onnx").write_bytes(b"")
    assert "is missing or was changed after `export` wrote it" in refused(talking_copy, graph=BASE)
    state(talking_copy, lambda s: s["stages"].pop("export"))
    assert "has no finished `export` yet" in refused(talking_copy, graph=BASE)


def test_an_encoder_generates_nothing(talking_copy: Path) -> None:
    for task in ("feature-extraction", "text-classification", "\x1b[2J"):
        state(talking_copy, lambda s, task=task: s["model"].update(task=task))
        assert "is of a model that generates no text" in refused(talking_copy)


def test_a_folder_without_a_tokenizer(talking_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (talking_copy / name).unlink()
    monkeypatch.setattr(Workspace, "damaged_file", lambda *_: None)
    assert "has no tokenizer: put the tokenizer.json" in refused(talking_copy)


def test_a_system_message_needs_a_chat_template(stories_out: Path) -> None:
    assert "--system has no place, since this model's tokenizer has no chat template" in refused(
        stories_out, system="Be kind."
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_runs_as_it_is_or_says_that_it_does_not(stories_copy: Path, precision: str) -> None:
    api.export(stories_copy, api.ExportSettings(precision))
    heard = Notes()
    with talk(stories_copy, heard, graph=BASE, runtime=ORT).opened(BASE) as (opened,):
        logits = opened.reader.read([1, 403, 407], 4)
        assert logits.shape == (512,) and opened.reader.add(261).shape == (512,)
    assert len(heard.notes) == (precision == "bf16")
    if heard.notes:
        assert heard.notes[0].startswith("base is computed in float32 and rounded")
