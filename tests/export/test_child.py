"""Another project's exporter as a child: whole files or none, one sentence, no survivor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import BuildError, MissingDependencyError
from nbl_export.export import child
from nbl_export.export.child import Exporter, export_in_child, require
from nbl_export.progress import Silent
from tests.export.exported import nothing_left_over

EXPORTER = Exporter("frobnicator", "frob.onnx", "install frob")
FakePython = Callable[[str], str]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder with an earlier export."""
    folder = tmp_path / "out" / "baseline"
    folder.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        (folder / name).write_text("earlier")
    return folder


def export(python: str, target: Path, model: Path) -> list[Path]:
    return export_in_child(EXPORTER, python, model, target, lambda folder: ["-o", str(folder)], Silent())


def as_it_was(target: Path) -> bool:
    return {p.name: p.read_text() for p in target.iterdir()} == dict.fromkeys(
        ("model.onnx", "model.onnx.data", "tokenizer.json"), "earlier"
    ) and nothing_left_over(target.parent)


def test_files_arrive_and_what_belonged_to_the_earlier_graph_goes(
    fake_python: FakePython, target: Path, tiny_folder: Path
) -> None:
    python = fake_python(
        "echo new > filled/model.onnx; echo c > filled/config.json; mkdir filled/sub; echo x > y"
    )
    # The exporter wrote no tokenizer, so the model's own is there.
    own = {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }  # the last by transformers 4 only
    names = sorted({"config.json", "model.onnx"} | own & {p.name for p in tiny_folder.iterdir()})
    assert export(python, target, tiny_folder) == [target / name for name in names]
    assert sorted(p.name for p in target.iterdir()) == names
    assert (target / "model.onnx").read_text() == "new\n"
    assert (target / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()
    assert nothing_left_over(target.parent)


def test_a_new_target_is_made(fake_python: FakePython, tmp_path: Path, tiny_folder: Path) -> None:
    python = fake_python('[ "$4" = "$PWD/filled" ] && echo new > "$4/model.onnx"')
    assert tmp_path / "a" / "b" / "model.onnx" in export(python, tmp_path / "a" / "b", tiny_folder)
    assert (tmp_path / "a" / "b" / "model.onnx").read_text() == "new\n"


def test_it_is_told_to_stay_offline(fake_python: FakePython, target: Path, tiny_folder: Path) -> None:
    python = fake_python('echo "$HF_HUB_OFFLINE" > filled/model.onnx')
    export(python, target, tiny_folder)
    assert (target / "model.onnx").read_text() == "1\n"


@pytest.mark.parametrize(
    "commands, said",
    [
        ("echo 'Traceback'; echo 'ValueError: no such thing.'; echo; exit 1", "ValueError: no such thing"),
        # The exception is the reason, whatever is printed on the way out.
        ("echo 'a.b.OddError: odd'; echo 'leaked semaphores' >&2; exit 1", "a.b.OddError: odd"),
        (r"printf '10%%\r20%%\rout of room'; exit 3", "out of room"),
        ("exit 5", "exit code 5"),
        (
            "echo half > filled/model.onnx; kill -9 $$",
            "it was killed by SIGKILL, often because memory ran out",
        ),
        ("echo half > filled/model.onnx; kill -SEGV $$", "it was killed by SIGSEGV"),
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


def test_missing_module_is_named_with_the_remedy(bare_python: str, target: Path, tiny_folder: Path) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        export(bare_python, target, tiny_folder)
    assert str(caught.value) == (
        f"frobnicator is not installed for {bare_python} (it has no module frob): install frob."
    )
    assert as_it_was(target)


def test_module_missing_inside_a_package_that_is_there(bare_python: str) -> None:
    with pytest.raises(MissingDependencyError, match=r"it has no module json\.onnx"):
        require(Exporter("frobnicator", "json.onnx", "install frob"), bare_python)
    require(Exporter("frobnicator", "json.decoder", "install frob"), bare_python)


def test_module_that_the_exporter_itself_misses(
    fake_python: FakePython, target: Path, tiny_folder: Path
) -> None:
    python = fake_python("""echo "ModuleNotFoundError: No module named 'onnx'"; exit 1""")
    with pytest.raises(MissingDependencyError, match="it has no module onnx"):
        export(python, target, tiny_folder)
    assert as_it_was(target)


def test_python_that_is_not_there(tmp_path: Path) -> None:
    python = str(tmp_path / "nowhere" / "python")
    with pytest.raises(MissingDependencyError, match="it cannot be run, No such file or directory"):
        require(EXPORTER, python)


@pytest.mark.skipif(sys.platform != "linux", reason="a child learns of its parent's death on Linux only")
def test_a_killed_parent_takes_the_child_with_it(
    fake_python: FakePython, target: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    python = fake_python(f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 60")
    parent = os.fork()
    if not parent:
        try:
            export(python, target, tiny_folder)
        finally:
            os._exit(1)
    while not pid_file.exists():
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    child, deadline = Path(f"/proc/{int(pid_file.read_text())}/stat"), time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_stop_between_two_files_leaves_no_graph_with_data_of_another(
    fake_python: FakePython, target: Path, tiny_folder: Path, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python(
        "echo new > filled/model.onnx; echo new > filled/model.onnx.data; echo c > filled/tokenizer.json"
    )
    real, files = child.publish, []

    def publish(temporary: Path, path: Path) -> None:
        if len(files) == moved:
            raise KeyboardInterrupt
        files.append(path.name)
        real(temporary, path)

    monkeypatch.setattr(child, "publish", publish)
    with pytest.raises(KeyboardInterrupt):
        export(python, target, tiny_folder)
    assert not (target / "model.onnx").exists()
    monkeypatch.undo()
    export(python, target, tiny_folder)
    assert (target / "model.onnx").read_text() == (target / "model.onnx.data").read_text() == "new\n"


def test_modules_of_the_folder_we_are_in_are_not_taken(
    bare_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "frob").mkdir()
    (tmp_path / "frob" / "onnx.py").write_text("raise SystemExit('taken')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingDependencyError, match="no module frob"):
        require(EXPORTER, bare_python)


@pytest.mark.parametrize("while_starting", [True, False])
def test_interrupt_kills_the_child(
    fake_python: FakePython,
    target: Path,
    tiny_folder: Path,
    tmp_path: Path,
    while_starting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that comes while Popen has the child and has not yet returned it."""
    pid_file = tmp_path / "pid"
    python = fake_python(
        f"echo half > filled/model.onnx; echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 60"
    )
    sent, real = threading.Event(), subprocess.Popen.__init__

    def started(self: subprocess.Popen[str], command: list[str], **options: Any) -> None:
        real(self, command, **options)
        if command[1] == "-m":
            assert sent.wait(30)

    def interrupt() -> None:
        while not pid_file.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    if while_starting:
        monkeypatch.setattr(subprocess.Popen, "__init__", started)
    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        export(python, target, tiny_folder)
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert as_it_was(target)
