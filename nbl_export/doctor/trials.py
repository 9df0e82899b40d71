"""Whether the packages that are there can be used: they are tried in a child process, one after the other.

A package may be there and broken: a shared library is missing, it was built for another NumPy, its native code crashes.
None of these ends the process that asks. Most work, and share what they import; one that fails is tried again alone,
and those that come after a crash go on in another process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from nbl_export.child_process import ChildError, Tell, in_child
from nbl_export.errors import NblError, first_line
from nbl_export.parts import PARTS, Part
from nbl_export.progress import Listener

_SECONDS = 180.0  # of one trial: torch on a cold network disk takes a minute
_SUFFIX = "ExecutionProvider"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Trial:
    """What came of a trial: the reason where it failed, else what was found out."""

    error: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def versions(parts: Iterable[Part] = PARTS) -> dict[str, str]:
    """The version of each package that is there; "unknown" for a module that no record of an installer names."""
    listed = list(parts)
    found = {part.package: known for part in listed if (known := _version(part.package))}
    served = {part.module for part in listed if part.package in found}
    for part in listed:
        if part.module not in served and _is_module(part.module):
            found[part.package] = UNKNOWN
            served.add(part.module)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _is_module(name: str) -> bool:
    """Whether a module of the path has this name; a folder without code is none. Nothing is imported."""
    if "." in name:  # its parent would be imported
        return False
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def try_all(modules: Iterable[str], listener: Listener) -> dict[str, Trial]:
    """A trial of each module, and of the GPU driver under the name :data:`DRIVER`."""
    wanted = list(dict.fromkeys([DRIVER, *modules]))
    found: dict[str, Trial] = {}
    with listener.task("Trying packages", len(wanted), "packages") as task:

        def heard(told: Any) -> None:
            name, error, facts = told
            if not error:
                found[name] = Trial(facts=facts)
                task.advance(1)
            elif name not in failed:
                failed.append(name)

        while waiting := [name for name in wanted if name not in found]:
            failed: list[str] = []
            died = _in_company(waiting, heard)
            if died is not None:
                failed += [name for name in waiting if name not in found and name not in failed][:1]
            for name in failed:
                found[name] = try_one(name)
                task.advance(1)
    return found


def _in_company(names: Sequence[str], heard: Tell) -> Exception | None:
    """Try several in one child process; the error if it did not come to its end."""
    try:
        in_child(each, list(names), "Trying packages", "leave one out", _SECONDS, heard)
    except (ChildError, NblError, OSError) as error:
        return error
    return None


def try_one(name: str) -> Trial:
    """The trial of one module, alone in a child process."""
    try:
        facts = in_child(alone, name, name, "leave it out", _SECONDS)
    except ChildError as error:
        return Trial(error.reason)
    except (NblError, OSError) as error:
        return Trial(f"failed ({first_line(error)})")
    return Trial(facts=facts)


# In the child --------------------------------------------------------------------------------------


def each(names: list[str], tell: Tell) -> None:
    """Try ``names`` in turn and tell of each: its name, whether it failed, and the facts."""
    for name in names:
        try:
            tell([name, False, alone(name, tell)])
        except Exception:  # what it says is asked for when it is tried again
            tell([name, True, {}])


def alone(name: str, _tell: Tell) -> dict[str, Any]:
    """The facts of one trial; whatever it raises is why it failed."""
    return _TRIALS.get(name, imported)(name)


def imported(module: str) -> dict[str, Any]:
    """Import ``module``."""
    importlib.import_module(module)
    return {}


def torch_computes(_module: str) -> dict[str, Any]:
    """A product in float64, the precision in which the CPU is fast, and why no GPU is used."""
    import torch

    one = torch.ones(2, 2, dtype=torch.float64)
    if float((one @ one).sum()) != 8:
        raise RuntimeError("it computes wrongly")
    facts: dict[str, Any] = {"version": torch.__version__}
    with suppress(ImportError):  # of what our own modules need, which is tried by itself
        from nbl_export.models.device import hindrance
        from nbl_export.models.load import fast_dtype

        facts |= {"fast": fast_dtype(), "no_gpu": hindrance("cuda")}
    return facts


_GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
map (float[n, 2] u) => (float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {10, 20}>
{ wu = MatMul(u, w)  y = Add(wu, b) }"""


def onnxruntime_computes(_module: str) -> dict[str, Any]:
    """A graph of one affine map, computed; on a GPU, too, where there is a provider for it."""
    import numpy as np
    import onnx
    import onnxruntime

    graph = onnx.parser.parse_model(_GRAPH).SerializeToString()
    providers = onnxruntime.get_available_providers()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4

    def run_on(provider: str) -> bool:
        session = onnxruntime.InferenceSession(graph, options, providers=[provider])
        (y,) = session.run(None, {"u": np.ones((1, 2), np.float32)})
        if y.tolist() != [[14, 26]]:
            raise RuntimeError(f"{provider} computes wrongly")
        return provider in session.get_providers()

    run_on(f"CPU{_SUFFIX}")
    cuda, no_gpu = f"CUDA{_SUFFIX}", ""
    if cuda not in providers:
        no_gpu = f"version {onnxruntime.__version__} has no {cuda}"
    else:
        try:
            no_gpu = "" if run_on(cuda) else f"{cuda} does not start"
        except Exception as error:  # onnxruntime's exceptions have no common base class
            no_gpu = f"{cuda} does not start ({first_line(error)})"
    names = [name.removesuffix(_SUFFIX) for name in providers]
    return {"version": onnxruntime.__version__, "providers": names, "no_gpu": no_gpu}


def driver_answers(_name: str) -> dict[str, Any]:
    """The GPUs as the driver says them."""
    from nbl_export.engine.gpu import find_gpus

    return asdict(find_gpus())


DRIVER = "the NVIDIA driver"
_TRIALS: dict[str, Callable[[str], dict[str, Any]]] = {
    DRIVER: driver_answers,
    "torch": torch_computes,
    "onnxruntime": onnxruntime_computes,
}
