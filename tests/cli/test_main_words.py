"""Odd command lines: none is an internal error, each says what is amiss in one sentence, and nothing is made."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from nbl_export.cli.main import app, words_of
from nbl_export.settings.choices import CACHES, CRITERIA, LIBRARIES, PEERS, PRECISIONS, TARGETS
from nbl_export.settings.definition import UsageError
from tests.command_line import assert_refused, nbl

ODD: dict[tuple[str, ...], str] = {
    ("run",): "MODEL is missing",
    ("run", "--trt"): "MODEL is missing",
    ("build",): "OUT is missing",
    ("build", "--trt"): "OUT is missing",
    ("build", "--trt", "rtx"): "OUT is missing",
    ("select",): "OUT is missing",
    ("--k",): "--k needs a value",
    ("--k", "2"): "MODEL is missing",
    ("--trt",): "MODEL is missing",
    ("-o",): "--output needs a value",
    ("-o", "out"): "MODEL is missing",
    ("--",): "MODEL is missing",
    ("-",): "Unknown option: -",
    ("",): "An argument is empty",
    ("build", ""): "An argument is empty",
    ("verify", "", "--no-speed"): "An argument is empty",
    ("model", "--k", "2", "-o", ""): "-o is empty",
    ("model", "--k="): "--k is ''",
    ("selct", "out"): "selct is no command, and no model here; did you mean select.",
    ("select", "out", "--max-kl", "inf"): "--max-kl is inf; give a finite number",
    ("verify", "out", "--max-ppl-ratio", "1e400"): "--max-ppl-ratio is inf; give a finite number",
    ("bench", "out", "--seconds", "inf"): "--seconds is inf; give a finite number",
    ("calibrate", "model", "-o", "out", "--calibration="): "--calibration is empty; give some text",
    ("help",): "did you mean --help.",
    ("build", "out", "more"): "more is more than this command takes",
    ("rewrite",): "give OUT alone, or --onnx",
    ("--config",): "--config needs a value",
}


@pytest.mark.parametrize("line", ODD, ids=" ".join)
def test_an_odd_line_is_one_sentence(tmp_path: Path, line: tuple[str, ...]) -> None:
    assert_refused(nbl(*line, cwd=tmp_path), 2, ODD[line])
    assert list(tmp_path.iterdir()) == []


def test_bare_it_shows_the_help_and_fails() -> None:
    """A script that forgot its arguments must not go on."""
    done, asked = nbl(), nbl("--help")
    assert (done.code, done.out) == (2, "") and asked.code == 0
    assert done.err == asked.out


@pytest.mark.parametrize(
    ("word", "meant"), [("selct", "select"), ("verfy", "verify"), ("reports", "report"), ("Run", "run")]
)
def test_a_misspelled_command_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"did you mean {meant}$"):
        words_of([word, "out"])
    (tmp_path / word).mkdir()
    assert words_of([word, "out"]) == ["run", word, "out"]


@pytest.mark.parametrize(
    "model",
    ["gpt2", "t5-small", "bert-base-uncased", "tests", "owner/select", "./selct", "clip", "bloom-560m"],
)
def test_a_model_is_no_misspelled_command(model: str) -> None:
    assert words_of([model, "--k", "2"]) == ["run", model, "--k", "2"]


@pytest.fixture(scope="module")
def completion() -> str:
    """The script that a shell is given."""
    return app.generate_completion(shell="bash")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("run model --kv-cache ", CACHES),
        ("run model --kv-cache st", ("static",)),
        ("export out --precision ", PRECISIONS),
        ("run model --target ", tuple(TARGETS)),
        ("select out --criterion ", tuple(CRITERIA)),
        ("select out --k ", ("auto",)),
        ("run model --trt ", LIBRARIES),
        ("bench out --peer ", PEERS),
        ("sel", ("select",)),
    ],
)
def test_a_shell_completes_what_can_be_chosen(completion: str, typed: str, offered: tuple[str, ...]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    words = ["nbl-export", *typed.split(" ")]
    asked = (
        f"COMP_WORDS=({' '.join(shlex.quote(w) for w in words)})\nCOMP_CWORD={len(words) - 1}\n"
        '_nbl_export\necho "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run([bash, "--norc"], input=completion + asked, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == sorted(offered), done.stderr
