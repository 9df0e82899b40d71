"""Sessions of ONNX Runtime, with its errors as user-facing messages."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.graph.io import check_file, passes_checker


def require_onnxruntime() -> Any:
    """The onnxruntime module, or an error with the pip command to run."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "onnxruntime is not installed: pip install 'nbl-export[cpu]' (or 'nbl-export[gpu]' for CUDA; never both)."
        ) from None
    return onnxruntime


CPU = "CPUExecutionProvider"


def data_folder(folder: Path | None) -> dict[str, str]:
    """The session configuration for a graph passed as bytes whose external data is in ``folder``."""
    return {"session.model_external_initializers_file_folder_path": str(folder)} if folder else {}


def session_options(config: Mapping[str, str] | None = None) -> Any:
    """Options of every session: all cores, ``config`` (session configuration entries), and no log.

    Errors are also raised as exceptions, so the log is not needed.
    """
    options = require_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = os.cpu_count() or 1
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return options


def session(
    path: Path,
    config: Mapping[str, str] | None = None,
    provider: str = CPU,
    rounded: bool = True,
    model: ir.Model | None = None,
    profile: Path | None = None,
) -> Any:
    """An inference session of the graph at ``path`` on one provider; on the CPU with all cores.

    ``config`` are onnxruntime's session configuration entries. On the CPU a half-precision graph is run by
    emulation (:mod:`nbl_export.graph.half_emulation`), which rounds every tensor; ``rounded=False`` runs the file
    itself. ``model`` is the graph at ``path`` if it is already loaded; a half-precision one is changed in place.
    ``profile`` is the file name prefix of a profile to write. Raises :class:`InputError` if onnxruntime does not
    load the graph.
    """
    from nbl_export.graph.half_emulation import compute_in_float32, needs_emulation
    from nbl_export.graph.io import load_graph
    from nbl_export.graph.tensors import follow_links

    ort = require_onnxruntime()
    model = load_graph(path) if model is None else model
    source: str | bytes = str(path)
    if provider == CPU and rounded and needs_emulation(model):
        config = {**(config or {}), **data_folder(follow_links(model))}
        compute_in_float32(model)
        source = ir.to_proto(model).SerializeToString()
    options = session_options(config)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return ort.InferenceSession(source, options, providers=list(dict.fromkeys((provider, CPU))))
    except Exception as error:  # onnxruntime's exceptions have no common base class
        first = str(error).splitlines()[0]
        raise InputError(f"onnxruntime does not load {path}: {first}") from None


def check_loads(path: Path) -> None:
    """Raise :class:`BuildError` if onnxruntime does not load the graph at ``path``; weights are not read."""
    ort = require_onnxruntime()
    options = session_options({"session.disable_prepacking": "1"})
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(str(path), options, providers=[CPU])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise BuildError(f"{path} does not load in onnxruntime: {str(error).splitlines()[0]}") from error


def check_like(source: Path) -> Callable[[Path], None]:
    """The check for a file derived from the graph at ``source``; it raises :class:`BuildError`.

    The ONNX checker, if ``source`` passes it. It refuses operators that onnxruntime adds to ONNX's domain; for such
    a ``source`` the check is that onnxruntime loads the file.
    """
    return check_file if passes_checker(source) else check_loads


def run_limit(files: Sequence[Path]) -> float:
    """Seconds that one run of a graph of these files may take.

    A prefill of thousands of tokens on a slow machine takes less than a second for each MB of weights.
    """
    return 45 + sum(file.stat().st_size for file in files) / 1e6


def run_session(session: Any, outputs: Sequence[str], feeds: Mapping[str, Any], seconds: float) -> list[Any]:
    """``outputs`` of a session; raises :class:`InputError` if an operator refuses its inputs, or after ``seconds``.

    A graph may hold a loop that never ends.
    """
    options = require_onnxruntime().RunOptions()
    with _watched(options, seconds) as late:
        try:
            return list(session.run(outputs, feeds, options))
        except Exception as error:  # onnxruntime's exceptions have no common base class
            if late():
                reason = f"it takes longer than {seconds:,g} s, as a loop without end does"
            else:
                reason = str(error).splitlines()[0]
            raise InputError(f"onnxruntime does not run the graph: {reason}.") from None


# Runs that may last too long: the time at which each ends, by its options. One thread looks at all of them.
_RUNNING: dict[int, tuple[float, Any]] = {}
_LOOK = 0.5


@contextmanager
def _watched(options: Any, seconds: float) -> Iterator[Callable[[], bool]]:
    """End the run with these ``options`` after ``seconds``; yields whether that has happened."""
    end = time.monotonic() + seconds
    _RUNNING[id(options)] = (end, options)
    _watchdog()
    try:
        yield lambda: bool(options.terminate)
    finally:
        del _RUNNING[id(options)]


@cache
def _watchdog() -> threading.Thread:
    def watch() -> None:
        while True:
            time.sleep(_LOOK)
            now = time.monotonic()
            for end, options in list(_RUNNING.values()):
                if now > end:
                    options.terminate = True

    thread = threading.Thread(target=watch, daemon=True, name="nbl-export-watchdog")
    thread.start()
    return thread
