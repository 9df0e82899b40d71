"""Signals that end the process, and standard streams that are closed, full, or read by nobody."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.cli import output
from nbl_export.cli.output import TerminalListener
from nbl_export.cli.terminal import Written, prompts
from nbl_export.errors import InputError, Interrupted
from nbl_export.evaluate.answer import Figures, Generated
from nbl_export.packages import pip_line
from nbl_export.progress import Silent
from tests.processes import (
    ENVIRONMENT,
    Done,
    assert_refused,
    nbl,
    no_leftovers,
    send,
)
from tests.rewrite.test_foreign import Source, assert_rewritten, contents, exported


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return exported(tmp_path)


def ended(command: list[object], setup: Callable[[], object] = lambda: None, **how: Any) -> Done:
    """`nbl-export COMMAND` in a process that is set up as the test says."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    done = subprocess.run(
        [sys.executable, "-m", "nbl_export", *map(str, command)],
        env=ENVIRONMENT,
        timeout=120,
        preexec_fn=lambda: setup() and None,
        check=False,
        **streams,
    )
    return Done(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode())


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


# streams -----------------------------------------------------------------------------------------


def test_results_that_nobody_reads_are_no_error(source: Source) -> None:
    """As in `nbl-export inspect X | head -1`."""
    writing = closed_pipe()
    assert ended(["inspect", source.graph], stdout=writing) == Done(0, "", "")
    os.close(writing)


def test_a_full_device_is_said_when_the_work_is_done(source: Source) -> None:
    with Path("/dev/full").open("w") as full:
        done = ended(["inspect", source.graph], stdout=full)
    assert_refused(done, 2, "No space left on device")


def test_no_file_is_opened_in_place_of_a_closed_stream(source: Source) -> None:
    """Or what a library prints would be written into the graph."""

    def close() -> None:
        for number in range(3):
            os.close(number)

    done = ended([*source.arguments("-o", source.out)], close, stdin=None, stdout=None, stderr=None)
    assert done.code == 2  # there was nowhere to show the result
    assert_rewritten(source.out / "model.onnx", source.plan)


# signals -----------------------------------------------------------------------------------------

INTERRUPTING = """
import os, sys
from nbl_export import cli
from nbl_export.rewrite import replace

real = replace.count

def interrupted(*args, **options):
    os.kill(os.getpid(), {signum})
    return real(*args, **options)

replace.count = interrupted
cli.main()
"""


def ended_by(signum: int, source: Source, before: Any, *more: object) -> Done:
    """A rewrite that sends itself the signal when the new graph is written and not yet in place."""
    command = [
        sys.executable,
        "-c",
        INTERRUPTING.format(signum=int(signum)),
        *map(str, source.arguments(*more)),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        preexec_fn=lambda: signal.signal(signum, before) and None,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("signum", SIGNALS)
def test_every_signal_cleans_up_and_says_one_sentence(source: Source, signum: int) -> None:
    before = contents(source.folder)
    done = ended_by(signum, source, signal.SIG_DFL, "-o", source.out)
    assert_refused(
        done, SIGNALS[signal.Signals(signum)], "Interrupted; run the same command again", quietly=False
    )
    assert contents(source.folder) == before and not source.out.exists()


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(source: Source) -> None:
    done = ended_by(signal.SIGHUP, source, signal.SIG_IGN, "-o", source.out)
    assert done.code == 0, done
    assert_rewritten(source.out / "model.onnx", source.plan)


def test_an_interrupt_that_a_library_swallows_ends_the_work_at_its_next_step() -> None:
    reached: list[str] = []

    def work() -> None:
        with output.signals(), TerminalListener().task("Exporting ONNX", 3, "steps") as task:
            with suppress(KeyboardInterrupt):
                send(signal.SIGTERM)()
            reached.append("behind the library")
            task.advance(1)
            reached.append("the next step")

    with pytest.raises(Interrupted) as ended:
        work()
    assert ended.value.exit_code == 143
    output.stop_if_asked()  # of an earlier command
    assert reached == ["behind the library"]


def test_an_interrupt_that_a_library_makes_an_error_of_is_one(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As C++ does that calls Python; the library says so in its log, too."""

    def library(*_: object, **__: object) -> int:
        try:
            send(signal.SIGTERM)()
        except KeyboardInterrupt as interrupt:
            logging.getLogger("a library").error("fake tensor raised TypeError")
            raise InputError("torch.onnx.export cannot export LlamaForCausalLM") from interrupt
        return 0

    main = import_module("nbl_export.cli.main")
    monkeypatch.setattr(sys, "argv", ["nbl-export", "export", "out"])
    monkeypatch.setattr(main, "app", library)
    monkeypatch.setattr(main, "words_of", list)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 143
    said = capsys.readouterr().err
    assert said.startswith("error: Interrupted; run the same command again") and said.count("\n") == 1
    logging.getLogger("a library").error("of the next command")
    assert [record.message for record in caplog.records] == ["of the next command"]


# writing -------------------------------------------------------------------------------------------

PROMPT = "Once upon a time"
SMALL = ["--max-tokens", 20]


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal
        self.lost: OSError | None = None

    def isatty(self) -> bool:
        return self.terminal


class Stdin:
    def __init__(self, content: bytes, terminal: bool = False) -> None:
        self.buffer, self.terminal = io.BytesIO(content), terminal

    def isatty(self) -> bool:
        return self.terminal


def test_words_a_file_the_standard_input_and_turns_that_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffHé\r\n\n".encode())
    assert prompts(" a\n", None, False) == " a\n"
    assert prompts(None, file, False) == "Hé\r\n"  # without the end of the last line
    for path in (None, Path("-")):
        monkeypatch.setattr(sys, "stdin", Stdin("模型\r\n".encode()))
        assert prompts(None, path, False) == "模型"
    monkeypatch.setattr(sys, "stdin", Stdin(b"", terminal=True))
    lines = iter(["Hi", "  ", "b\udcff"])

    def typed_line(_: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed_line)
    assert list(prompts(None, None, False)) == ["Hi", "b?"]


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ("a", b"b", "--prompt and --prompt-file are two prompts"),
        (" \n", None, "--prompt has no text"),
        ("\ud800", None, "--prompt is not UTF-8"),
        (None, b"\xff", "is not UTF-8: convert it"),
        (None, b"\n", "has no text: give a prompt"),
        (None, Path("gone"), r"No such file or directory reading --prompt-file gone"),
        (None, Path("-"), "There is no prompt: give --prompt TEXT, --prompt-file FILE"),
        (None, None, "There is no prompt: give --prompt TEXT, --prompt-file FILE"),
    ],
)
def test_what_is_no_prompt(
    words: str | None,
    content: bytes | Path | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"", terminal=True))
    file = content if isinstance(content, Path) else tmp_path / "prompt.txt" if content else None
    if isinstance(content, bytes):
        (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        prompts(words, file, True)


PIECES = {"base": ("a\x1b[2J\tb", "\nc"), "linearized": ("d\n", "e")}


@pytest.mark.parametrize(
    ("graph", "terminal", "expected"),
    [
        ("base", False, "a\x1b[2J\tb\nc"),
        ("base", True, "a�[2J    b\nc\n"),
        ("both", False, "base:\na\x1b[2J\tb\nc\n\nlinearized:\nd\ne\n"),
        ("both", True, "base:\na�[2J    b\nc\n\nlinearized:\nd\ne\n"),
    ],
)
def test_a_pipe_has_the_text_and_a_terminal_what_it_can_show(
    graph: str, terminal: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    written = Written(graph, Silent())
    for name in ("base", "linearized") if graph == "both" else ("base",):
        for piece in PIECES[name]:
            assert written.piece(name, piece)
        written.answered(Generated(name, "", (), "ended", Figures(1, 1.0, 0, 0.0)))
    assert stream.getvalue() == expected
    stream.lost = OSError()
    assert not written.piece("base", "to nobody")


def test_the_command_prints_the_text_and_nothing_else(talking_out: Path, tmp_path: Path) -> None:
    (expected,) = api.generate(talking_out, PROMPT, api.GenerateSettings(max_tokens=20))
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    done = nbl("generate", talking_out, "--prompt-file", tmp_path / "prompt.txt", *SMALL)
    assert (done.code, done.out) == (0, expected.text)
    assert re.fullmatch(
        r"· linearized: prefill 5 tokens [\d,]+/s · decode 19 tokens [\d,]+/s · cut at --max-tokens\n",
        re.sub(r" *\n(?!$)", " ", done.err),
    ), done.err


# commands ------------------------------------------------------------------------------------------

TEXT = ["--samples", "32", "--seq-len", "128", "--heldout-samples", "8"]
FAST = ["--decode-steps", "2", "--contexts", "8", "--rounds", "3", "--no-quality"]


@pytest.fixture(scope="session")
def place(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `out`: K = 2, `--trt` as the last word, no GPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'nbl-export[rtx]'")
    from nbl_export.engine.library import find_gpu

    if find_gpu() is not None:
        pytest.skip("is about machines without a GPU")
    folder = tmp_path_factory.mktemp("place")
    done = nbl(stories_folder, *arguments(stories_text), "--k", 2, "--trt", cwd=folder)
    assert done.code == 0, done
    (folder / "first.txt").write_text(done.out)
    return folder


def arguments(text: Path) -> list[object]:
    # Two neighbouring layers: in a model of 1 MB, code for others may outweigh the weights that are gone.
    return ["-o", "out", "--calibration", text, "--criterion", "cca", *TEXT, *FAST]


def engines(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "engine").iterdir()}


def manifest(out: Path, name: str = "model") -> Any:
    return json.loads((out / "engine" / f"{name}.json").read_text())


# a run with --trt --------------------------------------------------------------------------------


def test_a_run_with_trt_builds_and_reports(place: Path) -> None:
    out = place / "out"
    text = (place / "first.txt").read_text()
    assert "Engines: tensorrt-rtx" in text and "fp16, static cache" in text
    assert re.search(r"PASS  \(graph rewrite, .*\n +2 of 5 attention layers", text, re.S)
    stages = json.loads((out / "nbl" / "workspace.json").read_text())["stages"]
    settings = stages["export"]["settings"]
    assert (settings["precision"], settings["kv_cache"], settings["opset"]) == ("fp16", "static", 24)
    for name, attention in (("baseline", 5), ("model", 3)):
        found = manifest(out, name)
        assert found["network"]["attention"] == attention
        assert (found["precision"], found["kv_cache"]) == ("fp16", "static")
        assert found["limits"] == {"max_batch": 4, "max_seq": 512, "max_context": 512}  # it has 512 positions
    kinds = ("{}.engine", "{}.json", "{}.trtexec.sh", "{}_rows.py")
    assert set(stages["build"]["files"]) == {
        "model.fixed.onnx",
        "baseline/model.fixed.onnx",
        *(f"engine/{kind.format(n)}" for n in ("baseline", "model") for kind in kinds),
    }
    # onnxruntime-genai does not know this form of the cache.
    assert not list(out.rglob("genai_config.json"))
    no_leftovers(out)


# build --------------------------------------------------------------------------------------


REFUSED = {
    "unknown library": (["--trt", "foo"], 2, ("foo",)),
    "no GPU for tensorrt": (
        ["--trt", "tensorrt"],
        3,
        ("no NVIDIA GPU", "--trt rtx", pip_line("rtx")),
    ),
    "unknown capability": (["--sm", "90"], 2, ("--sm '90'", "SM86")),
    "context beyond the model": (["--max-context", "513"], 2, ("--max-context is 513", "512 positions")),
    "prefill beyond the context": (
        ["--max-seq", "65", "--max-context", "64"],
        2,
        ("--max-seq is 65", "(64)"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_builds_are_refused_in_one_sentence(place: Path, name: str) -> None:
    options, code, words = REFUSED[name]
    before = engines(place / "out")
    assert_refused(nbl("build", "out", *options, cwd=place), code, *words)
    assert engines(place / "out") == before


def test_doctor_says_whether_the_main_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = nbl("doctor", cwd=tmp_path)
    assert done.code == 0, done
    assert done.out.splitlines()[-1] == "The main job runs here." and str(tmp_path) in done.out
    (tmp_path / "numpy.py").write_text("raise ImportError('libblas.so.3 is not there')")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = nbl("doctor", cwd=tmp_path)
    assert done.code == 3 and "Traceback" not in done.err, done
    assert done.out.splitlines()[-1] == "The main job does not run here."
    assert re.search(r"^numpy .*libblas\.so\.3 is not there", done.out, re.M)
    assert_refused(nbl("doctor", "here", cwd=tmp_path), 2, "more than this command takes")
