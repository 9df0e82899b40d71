"""Another project's exporter as a child: the model it is handed, whole files or none, one sentence, no survivor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from nbl_export.errors import BuildError, MissingDependencyError
from nbl_export.export import others
from nbl_export.export.others import VARIABLE, Exporter, as_hf_folder, check_known, export_with, find_exporter
from nbl_export.files import TEMPORARY
from nbl_export.models.load import LoadedModel
from nbl_export.models.source import find_model
from nbl_export.packages import pip_line
from nbl_export.progress import Silent
from tests import exporters
from tests.fixtures_graph import load
from tests.tiny import build

FakePython = Callable[[str], str]
EARLIER = dict.fromkeys(("model.onnx", "model.onnx.data", "tokenizer.json"), "earlier")


BASE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def loaded(source: Path) -> LoadedModel:
    return LoadedModel(find_model(str(source)), Silent())


def handed_off(source: Path, folder: Path) -> Path:
    return as_hf_folder(loaded(source), folder)


def torch_logits(folder: Path, ids: Sequence[int]) -> NDArray[Any]:
    """PyTorch's logits of the model in ``folder`` as the tool loads it: [tokens, vocab]."""
    with torch.no_grad():
        return load(folder)(input_ids=torch.tensor([list(ids)])).logits[0].numpy()


def nothing_left_over(folder: Path) -> bool:
    return not list(folder.glob(f".*{TEMPORARY}"))


@pytest.fixture(scope="session")
def optimum_python() -> str:
    """The Python of an environment with optimum; the test is skipped where there is none."""
    return exporters.optimum_python()


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[[str], str]:
    """An interpreter that has every module and, asked to run one, runs the given shell commands instead."""

    def write(commands: str) -> str:
        path = tmp_path / "fake-python"
        path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{commands}\n')
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """This interpreter without any installed package."""
    path = tmp_path / "bare-python"
    path.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder with an earlier export."""
    folder = tmp_path / "out" / "baseline"
    folder.mkdir(parents=True)
    for name, content in EARLIER.items():
        (folder / name).write_text(content)
    return folder


def export(
    python: str, target: Path, model: Path, name: str = "frobnicator", trusted: bool = False
) -> list[Path]:
    exporter = Exporter(name, "frob.onnx", python, "install frob")
    return export_with(exporter, model, target, "fp32", Silent(), trusted)


def as_it_was(target: Path) -> bool:
    return {p.name: p.read_text() for p in target.iterdir()} == EARLIER and nothing_left_over(target.parent)


def test_files_arrive_and_what_belonged_to_the_earlier_graph_goes(
    fake_python: FakePython, target: Path, tiny_folder: Path
) -> None:
    python = fake_python(
        'echo "$HF_HUB_OFFLINE" > filled/model.onnx; echo c > filled/config.json; echo x > y'
    )
    # The exporter wrote no tokenizer, so the model's own is there.
    names = ["config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert export(python, target, tiny_folder) == [target / name for name in names]
    assert sorted(p.name for p in target.iterdir()) == names
    assert (target / "model.onnx").read_text() == "1\n"
    assert (target / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()
    assert nothing_left_over(target.parent)


@pytest.mark.parametrize("name, asked", [("optimum", "--trust-remote-code"), ("genai", "hf_remote=true")])
def test_remote_code_runs_only_if_trusted(
    tiny_folder: Path, target: Path, fake_python: Any, name: str, asked: str
) -> None:
    for trusted in (False, True):
        export(fake_python('echo "$@" > filled/model.onnx'), target, tiny_folder, name, trusted)
        assert (asked in (target / "model.onnx").read_text()) is trusted


@pytest.mark.parametrize(
    "commands, said",
    [
        # The exception is the reason, whatever is printed on the way out.
        ("echo 'a.b.OddError: odd.'; echo 'leaked semaphores' >&2; exit 1", "a.b.OddError: odd"),
        (r"printf '10%%\r20%%\rout of room'; exit 3", "out of room"),
        ("exit 5", "exit code 5"),
        (
            "echo half > filled/model.onnx; kill -9 $$",
            "it was killed by SIGKILL, often because memory ran out",
        ),
        ("echo bye", "it wrote no model.onnx"),
    ],
)
def test_failure_is_one_sentence_and_leaves_the_target_alone(
    fake_python: FakePython, target: Path, tiny_folder: Path, commands: str, said: str
) -> None:
    with pytest.raises(BuildError) as caught:
        export(fake_python(commands), target, tiny_folder)
    assert (
        str(caught.value) == f"frobnicator cannot export LlamaForCausalLM ({said}): choose another exporter."
    )
    assert as_it_was(target)


def test_a_module_that_is_missing_is_named_with_the_remedy(
    fake_python: FakePython, bare_python: str, target: Path, tiny_folder: Path, monkeypatch: Any
) -> None:
    python = fake_python("""echo "ModuleNotFoundError: No module named 'onnx'"; exit 1""")
    with pytest.raises(MissingDependencyError, match=r"\(it has no module onnx\): install frob\."):
        export(python, target, tiny_folder)
    assert as_it_was(target)
    with pytest.raises(MissingDependencyError, match="it cannot be run, No such file or directory"):
        export(str(target / "nowhere"), target, tiny_folder)
    with pytest.raises(MissingDependencyError, match=r"no module optimum.*pip install optimum-onnx"):
        find_exporter("optimum", bare_python)
    monkeypatch.setenv(VARIABLE, python)
    assert find_exporter("optimum").python == python
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(MissingDependencyError, match=f"environment of its own.*{VARIABLE}"):
        find_exporter("optimum")
    monkeypatch.setattr(sys, "executable", bare_python)
    with pytest.raises(MissingDependencyError, match=re.escape(pip_line("genai"))):
        find_exporter("genai")


@pytest.mark.parametrize("moved", [0, 2])
def test_a_stop_between_two_files_leaves_no_graph_with_data_of_another(
    fake_python: FakePython, target: Path, tiny_folder: Path, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python("for f in model.onnx model.onnx.data tokenizer.json; do echo new > filled/$f; done")
    real, files = others.publish, []

    def publish(temporary: Path, path: Path) -> None:
        if len(files) == moved:
            raise KeyboardInterrupt
        files.append(path.name)
        real(temporary, path)

    monkeypatch.setattr(others, "publish", publish)
    with pytest.raises(KeyboardInterrupt):
        export(python, target, tiny_folder)
    assert not (target / "model.onnx").exists()


# The exporters themselves -------------------------------------------------------------------------


# The folder handed over ---------------------------------------------------------------------------

BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
}
# Families that transformers 4 spells the rotary embedding of in its own way.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "partial": ("GPTNeoX", {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}}),
    "by layer": ("Gemma3", {"rope_parameters": BY_LAYER, "sliding_window": 16}),
}
FIELDS = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = list(range(3, 90))
READ = """
import sys, torch, numpy
from pathlib import Path
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        numpy.save(folder / "logits.npy", model(torch.arange(3, 90)[None]).logits[0].numpy())
"""


def test_both_transformers_read_the_same_model(tmp_path: Path, optimum_python: str) -> None:
    folders = []
    for name, (kind, changes) in FAMILIES.items():
        config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(
            config(**FIELDS, **json.loads(json.dumps(changes)))
        )
        for weight in model.parameters():
            weight.data.mul_(6 if weight.ndim == 2 else 1)
        model.save_pretrained(tmp_path / name / "own")
        assert handed_off(tmp_path / name / "own", tmp_path / name / "handed") == tmp_path / name / "handed"
        folders += [str(tmp_path / name / folder) for folder in ("own", "handed")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([optimum_python, "-c", READ, *folders], env=environment, check=True, capture_output=True)
    for name in FAMILIES:
        expected = torch_logits(tmp_path / name / "own", IDS)
        assert np.array_equal(torch_logits(tmp_path / name / "handed", IDS), expected)
        found = np.load(tmp_path / name / "handed" / "logits.npy")
        np.testing.assert_allclose(found, expected, atol=1e-5)
        # Without the hand-off it reads another model, without a word.
        assert np.abs(np.load(tmp_path / name / "own" / "logits.npy") - expected).max() > 0.1


def test_the_users_folder_is_linked_to_and_untouched(tmp_path: Path) -> None:
    own = build(tmp_path / "own", num_hidden_layers=1)
    (own / "pytorch_model.bin").write_bytes(b"pickled")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in own.iterdir()}
    handed = handed_off(own, tmp_path / "handed")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in own.iterdir()} == before
    assert (handed / "model.safetensors").readlink() == own / "model.safetensors"
    assert not (handed / "config.json").is_symlink() and not (handed / "pytorch_model.bin").exists()
    assert handed_off(handed, tmp_path / "again") == handed


def test_what_the_builder_does_not_know_is_said_before_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs nbl-export[genai]")
    for architecture, known in (("LlamaForCausalLM", True), ("MixtralForCausalLM", False)):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        with nullcontext() if known else pytest.raises(BuildError, match="cannot export MixtralForCausalLM"):
            check_known(find_exporter("genai"), tmp_path)
