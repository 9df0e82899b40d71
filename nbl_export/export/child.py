"""Run another project's exporter as a child process.

1. Its files are moved into the target folder when all are complete, or not at all. A tokenizer that it could
   not load is copied from the model folder.
2. A failure is one sentence with the last line of its output; the output itself is not shown.
3. It downloads nothing, is killed after an interrupt, and dies with this process if that is killed (on Linux).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbl_export.checkpoint import deferred_interrupt
from nbl_export.child_process import die_with_parent
from nbl_export.errors import BuildError, Interrupted, MissingDependencyError
from nbl_export.files import TEMPORARY, publish, read_json, sync
from nbl_export.graph.io import delete_graphs
from nbl_export.models.compat import CONFIG, TOKENIZER
from nbl_export.progress import Listener

GRAPH = "model.onnx"
_TOKENIZER_FILES = ("token*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*")
# The last line of a traceback, and Python's message for a missing module.
_RAISED = re.compile(r"[\w.]*(?:Error|Exception|Interrupt|Exit): .+")
_NO_MODULE = re.compile(r"No module named '?([\w.]+)'?")


@dataclass(frozen=True)
class Exporter:
    """A program run as ``python -m module``; ``remedy`` is the end of a sentence that says how to install it."""

    name: str
    module: str
    remedy: str


def require(exporter: Exporter, python: str) -> None:
    """Raise :class:`MissingDependencyError` unless ``python`` runs and has the exporter, which is not started."""
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({exporter.module!r}) is None)"
    with tempfile.TemporaryDirectory() as empty:
        code, output = _run(exporter, [python, "-c", probe], Path(empty))
    if code:
        raise _missing(exporter, python, _last_line(output))


def export_in_child(
    exporter: Exporter,
    python: str,
    model: Path,
    target: Path,
    arguments: Callable[[Path], list[str]],
    listener: Listener,
    readers: Sequence[Path] = (),
) -> list[Path]:
    """Export the folder ``model`` into ``target``; returns the new files.

    ``arguments`` returns the command line after the module for a given output folder. ``readers`` are graphs elsewhere
    that read the data in ``target``: they are deleted before it is replaced. Raises
    :class:`MissingDependencyError` or :class:`BuildError`; ``target`` is then unchanged.
    """
    require(exporter, python)
    with (
        listener.task(f"Exporting ONNX with {exporter.name}", 1, "graph") as task,
        _scratch(target) as scratch,  # (1)
    ):
        filled = scratch / "filled"
        filled.mkdir()
        code, output = _run(exporter, [python, "-m", exporter.module, *arguments(filled)], scratch)
        if code or not (filled / GRAPH).is_file():
            raise _failure(exporter, python, model, code, output)
        if not (filled / TOKENIZER).exists():
            _copy_tokenizer(model, filled)
        files = _move(filled, target, readers)
        task.advance(1)
    return files


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    target.parent.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent))
    try:
        yield folder.resolve()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(exporter: Exporter, command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and output. In an empty ``folder`` Python cannot import a user's file instead of a module."""
    process = None
    try:
        with deferred_interrupt() as stop:  # one that came inside Popen would leave a child that nobody knows
            process = _started(exporter, command, folder)
        if stop:
            raise Interrupted(stop[0])
        output, _ = process.communicate()
        return process.returncode, output
    finally:
        if process is not None and process.poll() is None:
            process.kill()  # (3)
            process.wait()


def _started(exporter: Exporter, command: list[str], folder: Path) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},  # (3)
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            # What it would write after our death nobody would take, and the next run would find it writing.
            preexec_fn=die_with_parent if sys.platform == "linux" else None,  # (3)
        )
    except OSError as error:
        raise _missing(exporter, command[0], f"it cannot be run, {error.strerror}") from None


def _copy_tokenizer(model: Path, filled: Path) -> None:
    for path in sorted({p for pattern in _TOKENIZER_FILES for p in model.glob(pattern)}):
        shutil.copyfile(path, filled / path.name)


def _move(filled: Path, target: Path, readers: Sequence[Path]) -> list[Path]:
    """Move the files into ``target``, the graph last; an earlier graph and its data are deleted first.

    A kill leaves the whole graph or none: never an old graph with new data.
    """
    target.mkdir(exist_ok=True)
    names = sorted((p.name for p in filled.iterdir() if p.is_file()), key=lambda n: (n == GRAPH, n))
    if old := sorted(target.glob(f"{GRAPH}*")):
        delete_graphs(readers)
    for stale in old:  # the graph before its data
        stale.unlink()
    sync(target)
    for name in names:
        publish(filled / name, target / name)
    return sorted(target / name for name in names)


def _missing(exporter: Exporter, python: str, said: str) -> MissingDependencyError:
    found = _NO_MODULE.search(said)
    why = f"it has no module {found[1]}" if found else said or f"it has no module {exporter.module}"
    return MissingDependencyError(
        f"{exporter.name} is not installed for {python} ({why}): {exporter.remedy}."
    )


def _failure(
    exporter: Exporter, python: str, model: Path, code: int, output: str
) -> BuildError | MissingDependencyError:
    said = _last_line(output)
    if code > 0 and _NO_MODULE.search(said):
        return _missing(exporter, python, said)
    if code < 0:
        name = signal.Signals(-code).name
        said = f"it was killed by {name}" + (", often because memory ran out" if name == "SIGKILL" else "")
    elif not code:
        said = f"it wrote no {GRAPH}"
    config = read_json(model / CONFIG, "config.json of the model", "fetch the model again")
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    return BuildError(
        f"{exporter.name} cannot export {architecture} ({said or f'exit code {code}'}): choose another exporter."
    )


def _last_line(output: str) -> str:  # (2)
    lines = [line.strip() for line in re.split(r"[\r\n]+", output) if line.strip()]
    raised = [line for line in lines if _RAISED.fullmatch(line)]
    return (raised or lines or [""])[-1].rstrip(".")[:300]
