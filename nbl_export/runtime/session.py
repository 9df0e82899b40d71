"""Sessions of ONNX Runtime, with its errors as user-facing messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.errors import BuildError, InputError, MissingDependencyError, first_line
from nbl_export.graph import operators
from nbl_export.graph.io import check_file, external_files, follow_links, load_graph, passes_checker
from nbl_export.graph.rounding import compute_in_float32, needs_emulation
from nbl_export.machine import cores, free_memory
from nbl_export.packages import part


def require_onnxruntime() -> Any:
    """The onnxruntime module, or an error with the pip command to run."""
    try:
        import onnxruntime
    except ImportError as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, KeyboardInterrupt):  # it came during the import
            raise cause from None
        raise MissingDependencyError(
            f"onnxruntime is not installed: {part('onnxruntime').pip} (or, for CUDA, {part('onnxruntime-gpu').pip}; "
            "never both)."
        ) from None
    return onnxruntime


# One of onnxruntime's execution providers, by its name or with options, as onnxruntime takes them.
Provider = str | tuple[str, Mapping[str, str]]
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_FOLDING = "ConstantFolding"
_running: ContextVar[Provider] = ContextVar("running", default=CPU)


def provider_on(device: str) -> Provider:
    """Where onnxruntime runs graphs that are compared on ``device``, as torch names it: in CUDA if it has that there.

    Without TF32, whose products are no float32: what it loses would be taken for a fault of the graph.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or CUDA not in require_onnxruntime().get_available_providers():
        return CPU
    return CUDA, {"device_id": number or "0", "use_tf32": "0"}


@contextmanager
def running_on(device: str) -> Iterator[None]:
    """Within the block, sessions that are told no provider are those of ``device``: see :func:`provider_on`."""
    token = _running.set(provider_on(device))
    try:
        yield
    finally:
        _running.reset(token)


def data_folder(folder: Path | None) -> dict[str, str]:
    """The session configuration for a graph passed as bytes whose external data is in ``folder``."""
    return {"session.model_external_initializers_file_folder_path": str(folder)} if folder else {}


def session_options(config: Mapping[str, str] | None = None) -> Any:
    """Options of every session: all cores of this process, ``config`` (session configuration entries), and no log.

    Errors are also raised as exceptions, so the log is not needed.
    """
    options = require_onnxruntime().SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = cores()
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return options


def frugal(options: Any, packed: bool = False) -> Any:
    """``options`` with which a session takes little memory beside its weights, which are mapped from their files.

    Prepacking would copy every weight; ``packed`` keeps it where it is how an operator computes. The arena does not
    return memory.
    """
    options.enable_cpu_mem_arena = False
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def lend(options: Any, arrays: Mapping[str, NDArray[Any]]) -> list[Any]:
    """Let a session read the ``arrays`` as its initializers of these names, without a copy.

    What is returned must be kept as long as the session is used.
    """
    make = require_onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type
    kept: list[Any] = []
    for name, array in arrays.items():
        # NumPy's own types have no bfloat16.
        numbers = np.ascontiguousarray(array).view(f"u{array.itemsize}")
        value = make(numbers, int(ir.DataType.from_numpy(array.dtype)))
        options.add_initializer(name, value)
        kept += [numbers, value]
    return kept


def session(
    path: Path,
    config: Mapping[str, str] | None = None,
    provider: Provider | None = None,
    rounded: bool = True,
    model: ir.Model | None = None,
    small: bool = False,
) -> Any:
    """An inference session of the graph at ``path`` on one provider; on the CPU with all cores.

    Without a ``provider`` it is the CPU, or what :func:`running_on` says. ``config`` are onnxruntime's session
    configuration entries. A half-precision graph is run by emulation (:mod:`nbl_export.graph.rounding`), which rounds
    every tensor; ``rounded=False`` runs the file itself. ``model`` is the graph at ``path`` if it is already loaded; a
    half-precision one is changed in place. A ``small`` session on the CPU takes little memory beside the weights, which
    are mapped (:func:`frugal`), and more time for each run: weights in half precision are converted in each. Raises
    :class:`InputError` if onnxruntime does not load the graph.
    """
    require_onnxruntime()
    provider = _running.get() if provider is None else provider
    model = load_graph(path) if model is None else model
    source: str | bytes = str(path)
    small = small and provider == CPU
    packed = any(operators.key(node) in operators.PACKED for node in model.graph)
    half = needs_emulation(model)
    if rounded and half:
        config = {**(config or {}), **data_folder(follow_links(model))}
        compute_in_float32(model)
        source = ir.to_proto(model).SerializeToString()
    options = session_options(config)
    if small:
        frugal(options, packed)
    return load(source, options, str(path), provider, folded=not small or packed or not half)


def load(
    source: str | bytes,
    options: Any,
    name: str,
    provider: Provider = CPU,
    folded: bool = True,
) -> Any:
    """An inference session of a graph; raises :class:`InputError` if onnxruntime does not load it.

    Not ``folded``, what depends on weights alone, such as a Cast of them, is computed in each run, and is not kept.
    """
    ort = require_onnxruntime()
    without = {} if folded else {"disabled_optimizers": [_FOLDING]}
    providers = [provider, *[CPU] * (provider != CPU)]
    try:
        return ort.InferenceSession(source, options, providers=providers, **without)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise InputError(f"onnxruntime does not load {name}: {first_line(error)}") from None


def check_loads(path: Path) -> None:
    """Raise :class:`BuildError` if onnxruntime does not load the graph at ``path``; weights are not read."""
    ort = require_onnxruntime()
    options = session_options({"session.disable_prepacking": "1"})
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(str(path), options, providers=[CPU])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise BuildError(f"{path} does not load in onnxruntime: {first_line(error)}") from error


def check_like(source: Path) -> Callable[[Path], None]:
    """The check for a file derived from the graph at ``source``; it raises :class:`BuildError`.

    The ONNX checker, if ``source`` passes it. It refuses operators that onnxruntime adds to ONNX's domain; for such
    a ``source`` the check is that onnxruntime loads the file.
    """
    return check_file if passes_checker(source) else check_loads


def run_session(session: Any, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
    """``outputs`` of a session; raises :class:`InputError` if an operator refuses its inputs."""
    try:
        return list(session.run(outputs, feeds))
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise InputError(f"onnxruntime does not run the graph: {first_line(error)}.") from None


# memory -------------------------------------------------------------------------------------------

# Of the memory that is free; the rest is for activations, and for what nobody counts.
USABLE = 0.9


def session_bytes(path: Path) -> int:
    """Bytes of a usual session of the graph at ``path``: its files, and a packed copy, in float32 of half precision."""
    model = load_graph(path)
    size = sum(file.stat().st_size for file in [path, *external_files(model)])
    return size * (3 if needs_emulation(model) else 2)


def fit(*sizes: int) -> bool:
    """Whether sessions of these sizes find room beside each other."""
    return sum(sizes) <= USABLE * free_memory()
