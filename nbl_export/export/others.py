"""Export with another project's exporter in a child process: onnxruntime-genai's model builder, or optimum.

1. Its files are moved into the target folder when all are complete, or not at all. A tokenizer that it could
   not load is copied from the model folder.
2. A failure is one sentence with the last line of its output; the output itself is not shown.
3. It downloads nothing, is killed after an interrupt, and dies with this process if that is killed (on Linux).
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.errors import BuildError, MissingDependencyError
from nbl_export.files import TEMPORARY, publish, read_json, sync
from nbl_export.graph.io import delete_graphs
from nbl_export.models.folder import CONFIG, TOKENIZER, make_readable, readable_folder
from nbl_export.models.running import quiet, replaced
from nbl_export.models.weights import resident
from nbl_export.packages import part
from nbl_export.processes import die_with_parent
from nbl_export.progress import Listener

if TYPE_CHECKING:
    from nbl_export.models.load import LoadedModel

VARIABLE = "NBL_EXPORT_OPTIMUM_PYTHON"
# The execution provider to build for: fused half-precision operators exist on CUDA only. No build needs a GPU.
_PROVIDERS = {"fp32": "cpu", "int4": "cpu", "int8": "cpu", "fp16": "cuda", "bf16": "cuda"}
_GRAPH = "model.onnx"
_TOKENIZER_FILES = ("token*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*")
# The last line of a traceback, and Python's message for a missing module.
_RAISED = re.compile(r"[\w.]*(?:Error|Exception|Interrupt|Exit): .+")
# How the builder asks for an architecture.
_KNOWN = re.compile(r"architectures\[0\] == \"(\w+)\"")
_NO_MODULE = re.compile(r"No module named '?([\w.]+)'?")


@dataclass(frozen=True)
class Exporter:
    """A program run as ``python -m module``; ``remedy`` is the end of a sentence that says how to install it."""

    name: str
    module: str
    python: str
    remedy: str


def find_exporter(name: str, python: str | None = None) -> Exporter:
    """The exporter ``name``: genai in this environment, optimum in that of ``python`` or of the :data:`VARIABLE`.

    Raises :class:`MissingDependencyError` unless it is installed there; it is not started.
    """
    if name == "genai":
        package = "onnxruntime-genai"
        install = f"install it with `{part(package).pip}`"
        exporter = Exporter(package, "onnxruntime_genai.models.builder", sys.executable, install)
    else:
        make = (  # without accelerate it stores a tied embedding twice
            "make one (`python -m venv E; E/bin/pip install optimum-onnx onnxruntime onnxscript accelerate`) and name "
            f"its python, E/bin/python, in {VARIABLE}"
        )
        if not (python := python or os.environ.get(VARIABLE)):
            raise MissingDependencyError(f"optimum runs in an environment of its own: {make}.")
        exporter = Exporter("optimum", "optimum.exporters.onnx", python, make)
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({exporter.module!r}) is None)"
    with tempfile.TemporaryDirectory() as empty:
        code, said = _run(exporter, ["-c", probe], Path(empty))
    if code:
        raise _missing(exporter, said)
    return exporter


def check_known(exporter: Exporter, model: Path) -> None:
    """Raise :class:`BuildError` unless onnxruntime-genai's builder knows the architecture of the folder ``model``.

    It goes by the names of architectures in its code, and says so only when it has read a model.
    """
    found = find_spec("onnxruntime_genai")
    code = Path(str(found.origin)).parent / "models" / "builder.py" if found and found.origin else None
    if exporter.name == "optimum" or code is None or not code.is_file():
        return
    known = set(_KNOWN.findall(code.read_text("utf-8")))
    if known and (architecture := _architecture(model)) not in known:
        raise BuildError(f"{exporter.name} cannot export {architecture}: choose another exporter.")


def _architecture(model: Path) -> str:
    config = read_json(model / CONFIG, "config.json of the model", "fetch the model again")
    return str((config.get("architectures") or [config.get("model_type")])[0])


def export_with(
    exporter: Exporter,
    model: Path,
    target: Path,
    precision: str,
    listener: Listener,
    trust_remote_code: bool = False,
    readers: Sequence[Path] = (),
) -> list[Path]:
    """Export the Hugging Face folder ``model`` to ``target/model.onnx``; returns the files written.

    ``readers`` are graphs elsewhere that read the data in ``target``: they are deleted before it is replaced. Raises
    :class:`MissingDependencyError` or :class:`BuildError`; ``target`` is then unchanged.
    """
    target.parent.mkdir(exist_ok=True)
    scratch_folder = tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", suffix=TEMPORARY, dir=target.parent, ignore_cleanup_errors=True
    )
    with listener.task(f"Exporting ONNX with {exporter.name}", 1, "graph") as task, scratch_folder as name:
        scratch = Path(name).resolve()
        filled = scratch / "filled"  # (1)
        filled.mkdir()
        asked = ["-m", model.resolve(), "--task", "text-generation-with-past", filled]
        asked += ["--trust-remote-code"] * trust_remote_code
        if exporter.name != "optimum":
            asked = ["-i", model.resolve(), "-o", filled, "-c", scratch / "cache"]
            asked += ["-p", precision, "-e", _PROVIDERS[precision], "--extra_options", "hf_token=false"]
            asked += [f"hf_remote={str(trust_remote_code).lower()}"]
        code, said = _run(exporter, ["-m", exporter.module, *map(str, asked)], scratch)
        if code or not (filled / _GRAPH).is_file():
            raise _failure(exporter, model, code, said)
        if not (filled / TOKENIZER).exists():
            for path in {p for pattern in _TOKENIZER_FILES for p in model.glob(pattern)}:
                shutil.copyfile(path, filled / path.name)
        files = _move(filled, target, readers)
        task.advance(1)
    return files


def _run(exporter: Exporter, arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and what it said last; in an empty ``folder`` Python imports no user's file instead of a module."""
    try:
        done = subprocess.run(
            [exporter.python, *arguments],
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
        raise _missing(exporter, f"it cannot be run, {error.strerror}") from None
    lines = [line.strip() for line in re.split(r"[\r\n]+", done.stdout) if line.strip()]  # (2)
    raised = [line for line in lines if _RAISED.fullmatch(line)]
    return done.returncode, (raised or lines or [""])[-1].rstrip(".")[:300]


def _move(filled: Path, target: Path, readers: Sequence[Path]) -> list[Path]:
    """Move the files into ``target``, the graph last; an earlier graph and its data are deleted first.

    A kill leaves the whole graph or none: never an old graph with new data.
    """
    target.mkdir(exist_ok=True)
    names = sorted((p.name for p in filled.iterdir() if p.is_file()), key=lambda n: (n == _GRAPH, n))
    old = sorted(target.glob(f"{_GRAPH}*"))
    delete_graphs([*readers, *old] if old else [])  # the graph before its data
    sync(target)
    for name in names:
        publish(filled / name, target / name)
    return sorted(target / name for name in names)


def _missing(exporter: Exporter, said: str) -> MissingDependencyError:
    found = _NO_MODULE.search(said)
    why = f"it has no module {found[1]}" if found else said or f"it has no module {exporter.module}"
    return MissingDependencyError(
        f"{exporter.name} is not installed for {exporter.python} ({why}): {exporter.remedy}."
    )


def _failure(exporter: Exporter, model: Path, code: int, said: str) -> BuildError | MissingDependencyError:
    if code > 0 and _NO_MODULE.search(said):
        return _missing(exporter, said)
    if code < 0:
        name = signal.Signals(-code).name
        said = f"it was killed by {name}" + (", often because memory ran out" if name == "SIGKILL" else "")
    elif not code:
        said = f"it wrote no {_GRAPH}"
    for path in (model, model.resolve()):
        said = said.replace(f"The {path} model", "the model").replace(str(path), "the model")
    return BuildError(
        f"{exporter.name} cannot export {_architecture(model)} ({said or f'exit code {code}'}): choose another "
        "exporter."
    )


def as_hf_folder(model: LoadedModel, folder: Path) -> Path:
    """``model`` as a folder for both major versions of transformers: its own folder if possible, else ``folder``.

    ``folder`` (new or empty, deleted by the caller) gets links to the weights, or the dequantized weights of a
    GGUF file in float32. The source folder and the loaded model are not changed.
    """
    if model.source.gguf_file is None:
        return readable_folder(Path(model.source.path), folder)
    folder.mkdir(parents=True, exist_ok=True)
    loaded: Any = model.model
    with quiet(), resident(loaded), replaced(loaded, "config", copy.deepcopy(loaded.config)):
        loaded.save_pretrained(folder)  # this changes the configuration
        model.tokenizer.save_pretrained(folder)
    make_readable(folder)
    return folder
