"""Build engines of both graphs with the same settings, each in a child process: parse, check, build.

A library that crashes or hangs on a graph costs a sentence, not the run. A graph with a static cache has a symbolic
cache length, but a native cache update of TensorRT needs a fixed one: a temporary copy is parsed in which it is
``max_context``.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export import __version__
from nbl_export.batch.names import LINEARIZED
from nbl_export.engine.elsewhere import write_fixed
from nbl_export.engine.library import Gpu, Library, import_library
from nbl_export.engine.manifest import Manifest, manifest_path, save_manifest
from nbl_export.engine.network import (
    Limits,
    NetworkFacts,
    Parsed,
    Profile,
    check_network,
    check_operators,
    check_precision,
    let_attention_decompose,
    parse_network,
    profiles,
)
from nbl_export.errors import BuildError
from nbl_export.files import TEMPORARY, atomic_path, sha256_of_file
from nbl_export.graph.cache import is_static, kv_layers
from nbl_export.graph.io import external_files, load_graph
from nbl_export.graph.operators import fused_op
from nbl_export.graph.precision import graph_precision
from nbl_export.linearize.plan import Plan
from nbl_export.processes import Tell, in_child
from nbl_export.progress import Listener

TIMINGS = "timing.cache"
# Seconds without progress after which the library hangs. One step of a large model's build may take minutes.
PATIENCE = 1800
_REMEDY = "leave the engines out, or export again with another --kv-cache or --precision"
_WHOLE = 1000  # of the progress of a build


@dataclass(frozen=True)
class Source:
    """A graph to build: its role, its path, its number of attention layers, and the path of the engine."""

    role: str
    graph: Path
    attention: int
    engine: Path


@dataclass(frozen=True)
class Target:
    """What engines are built with and for: the library, this machine's GPU if there is one, shapes, capabilities.

    ``capabilities`` are those to build for ahead of time, such as ``SM86``; empty for the GPU alone.
    """

    library: Library
    gpu: Gpu | None
    limits: Limits
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class EngineFile:
    """A written engine and its manifest."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Built:
    """The facts about an engine of ``size`` bytes. ``fused`` is False if attention was decomposed."""

    facts: NetworkFacts
    profiles: tuple[Profile, ...]
    fused: bool
    seconds: float
    size: int


def build_pair(
    target: Target, sources: Sequence[Source], plan: Plan, plan_hash: str, listener: Listener
) -> tuple[list[EngineFile], list[Path]]:
    """Build every source; returns the engines and all written files.

    The engines are moved into place only after all are built.
    """
    library, gpu = target.library, target.gpu
    capabilities = target.capabilities
    if not capabilities and gpu is not None:
        capabilities = (f"SM{gpu.compute_capability.replace('.', '')}",)
    engines: list[EngineFile] = []
    # All temporary files are written before the first is moved into place: the disk may be full.
    with ExitStack() as writing:
        temporaries = [writing.enter_context(atomic_path(source.engine)) for source in sources]
        for source, temporary in zip(sources, temporaries, strict=True):
            timings = source.engine.with_name(TIMINGS)
            with listener.task(f"Building {source.role} engine", _WHOLE, "‰") as task:
                built = build_in_child(target, replace(source, engine=temporary), timings, task.advance)
            linear = plan.blocks if source.role == LINEARIZED else ()
            model = load_graph(source.graph)
            manifest = Manifest(
                role=source.role,
                library=library.package,
                library_version=library.version,
                ahead_of_time=library.ahead_of_time,
                capabilities=capabilities,
                gpu=None if library.ahead_of_time or gpu is None else gpu.name,
                precision=graph_precision(model).name,
                kv_cache="static" if is_static(model) else "concat",
                limits=target.limits,
                profiles=built.profiles,
                kv_layers=kv_layers(model),
                linear_layers=linear,
                attention="none" if not source.attention else "fused" if built.fused else "decomposed",
                network=built.facts,
                hashes=_hashes(source.graph, model, temporary) | ({"plan": plan_hash} if linear else {}),
                build_seconds=round(built.seconds, 3),
                size=built.size,
                created_by=f"nbl-export {__version__}",
            )
            save_manifest(writing.enter_context(atomic_path(manifest_path(source.engine))), manifest)
            engines.append(EngineFile(source.engine, manifest))
    return engines, [file for one in engines for file in (one.path, manifest_path(one.path))]


def _hashes(graph: Path, model: ir.Model, engine: Path) -> dict[str, str]:
    hashes = {"engine": sha256_of_file(engine), "onnx": sha256_of_file(graph)}
    for data in external_files(model):
        hashes["onnx_data" if data.parent == graph.parent else "shared_data"] = sha256_of_file(data)
    return hashes


def build_in_child(target: Target, source: Source, timings: Path, advance: Callable[[int], None]) -> Built:
    """Build the engine of ``source`` in a child process, and write it.

    ``timings`` is the file of the library's timing cache; ``advance`` is told thousandths. Raises :class:`InputError`
    for a graph with operators or weights that the library does not know, :class:`BuildError` if parsing, the check of
    the network or the build fails, and :class:`ChildError` if the library crashes or hangs; what is at the engine's
    path is then of no use.
    """
    with parsable(source.graph, target.limits.max_context) as parsed:
        asked = (target.library.package, source, parsed, timings, target.limits, target.capabilities)
        what = f"The build of an engine of {source.graph} with {target.library}"
        built: Built = in_child(_build, asked, what, _REMEDY, PATIENCE, advance)
    return built


def _build(asked: Any, advance: Tell) -> Built:
    package, source, parsed_graph, timings, limits, capabilities = asked
    library = import_library(package)
    start, graph = time.perf_counter(), source.graph
    model = load_graph(graph)
    check_operators(model, graph)
    precision = graph_precision(model)
    check_precision(precision, graph)
    stored = (v.const_value for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
    float32_bytes = sum(value.nbytes for value in stored if value is not None)
    parsed = parse_network(library, parsed_graph, graph)
    operators = sum(fused_op(node) is not None for node in model.graph)
    check_network(parsed.facts, precision, source.attention, is_static(model), float32_bytes, operators)
    shapes = {
        str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape or ()]
        for v in model.graph.inputs
        if v.const_value is None  # for TensorRT an input with a default is a constant
    }
    found = profiles(shapes, limits)
    # Fused attention has no float32 kernel. In half precision a fused kernel is required first, to see if there is one.
    fused = precision.name != "fp32" and operators > 0
    monitor = _monitor(library, advance)
    if not fused:
        let_attention_decompose(library, parsed.network)
    data = _serialize(library, parsed, found, capabilities, timings, monitor)
    if data is None and fused and "decomposable" in " ".join(parsed.logger.errors):
        # There is no fused kernel for this head_dim; the manifest says "decomposed".
        fused = False
        parsed.logger.errors.clear()
        let_attention_decompose(library, parsed.network)
        data = _serialize(library, parsed, found, capabilities, timings, monitor)
    if data is None:
        raise BuildError(f"{library} does not build {graph}: {parsed.first_error()}.")
    size = source.engine.write_bytes(memoryview(data))
    monitor.reach(1)
    return Built(parsed.facts, found, fused, time.perf_counter() - start, size)


@contextmanager
def parsable(path: Path, length: int) -> Iterator[Path]:
    """The file of the graph at ``path`` that TensorRT parses: a static cache has ``length`` positions there."""
    if not is_static(load_graph(path)):
        yield path
        return

    handle, name = tempfile.mkstemp(prefix=".fixed.", suffix=TEMPORARY, dir=path.parent)  # beside its weights
    os.close(handle)
    try:
        write_fixed(path, Path(name), length)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _serialize(
    library: Library,
    parsed: Parsed,
    found: Sequence[Profile],
    capabilities: Sequence[str],
    timings: Path,
    monitor: Any,
) -> Any:
    trt = library.module
    config = parsed.builder.create_builder_config()
    for profile in found:
        made = parsed.builder.create_optimization_profile()
        for name, shapes in profile.shapes.items():
            made.set_shape(name, *shapes)
        if config.add_optimization_profile(made) < 0:
            raise BuildError(f"{library} refuses the {profile.name} profile: {parsed.first_error()}.")
    # Needed to inspect the layers of the engine.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    cache = None
    if library.ahead_of_time:  # nothing is timed
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(library.capabilities[name], index)
    else:
        cache = timing_cache(config, timings)
    config.progress_monitor = monitor  # of which the library keeps no reference of its own
    data = parsed.builder.build_serialized_network(parsed.network, config)
    if data is not None and cache is not None:
        with atomic_path(timings) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    return data


def timing_cache(config: Any, path: Path) -> Any:
    """The kernel timings in the file ``path``, which ``config`` reads and adds to.

    Those of another GPU or version are not accepted: then it begins with none.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _monitor(library: Library, advance: Callable[[int], object]) -> Any:
    """What the library tells of its phases, as thousandths of the build for ``advance``.

    Phases are nested; those without a parent count, and each step of another says that the library is alive.
    """
    base: Any = library.module.IProgressMonitor

    class _Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.reached, self.steps = 0, dict[str, int]()  # of the phases without a parent

        def reach(self, share: float) -> None:
            more = max(0, int(_WHOLE * share) - self.reached)
            self.reached += more
            advance(more)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[name] = max(1, steps)

        def step_complete(self, name: str, step: int) -> bool:
            self.reach(min(1.0, (step + 1) / self.steps[name]) if name in self.steps else 0)
            return True

        def phase_finish(self, name: str) -> None:
            """A phase that ends has made all its steps."""

    return _Monitor()
