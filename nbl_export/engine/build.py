"""Build engines of both graphs with the same settings, each in a child process: parse, check, build.

A library that crashes or hangs on a graph costs a sentence, not the run. A graph with a static cache has a symbolic
cache length, but a native cache update of TensorRT needs a fixed one: a temporary copy is parsed in which it is
``max_context``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export import __version__
from nbl_export.batch.names import LINEARIZED, MAX
from nbl_export.child_process import Tell, in_child
from nbl_export.engine.library import Gpu, Library, library_of
from nbl_export.engine.manifest import Manifest, manifest_path, manifest_text
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
from nbl_export.files import atomic_path, sha256_of_file
from nbl_export.graph.cache import is_static, kv_layers
from nbl_export.graph.io import external_files, load_graph, scratch_copy
from nbl_export.graph.operators import fused_op
from nbl_export.graph.precision import graph_precision
from nbl_export.linearize.plan import Plan
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
                built = build_in_child(target, source, temporary, timings, task.advance)
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
            described = writing.enter_context(atomic_path(manifest_path(source.engine)))
            described.write_text(manifest_text(manifest), encoding="utf-8")
            engines.append(EngineFile(source.engine, manifest))
    return engines, [file for one in engines for file in (one.path, manifest_path(one.path))]


def _hashes(graph: Path, model: ir.Model, engine: Path) -> dict[str, str]:
    hashes = {"engine": sha256_of_file(engine), "onnx": sha256_of_file(graph)}
    for data in external_files(model):
        hashes["onnx_data" if data.parent == graph.parent else "shared_data"] = sha256_of_file(data)
    return hashes


def build_in_child(
    target: Target, source: Source, engine: Path, timings: Path, advance: Callable[[int], None]
) -> Built:
    """:func:`build_engine` of ``source`` into the file ``engine``, in a child process.

    Raises what that raises, and :class:`ChildError` if the library crashes or hangs; what is at ``engine`` is then of
    no use.
    """
    with parsable(source.graph, target.limits.max_context) as parsed:
        made = replace(source, engine=engine)
        asked = (target.library.package, made, parsed, timings, target.limits, target.capabilities)
        what = f"The build of an engine of {source.graph} with {target.library}"
        built: Built = in_child(_work, asked, what, _REMEDY, PATIENCE, advance)
    return built


def _work(asked: Any, tell: Tell) -> Built:
    package, source, parsed, timings, limits, capabilities = asked
    return build_engine(library_of(package), source, parsed, timings, limits, capabilities, tell)


def build_engine(
    library: Library,
    source: Source,
    parsed_graph: Path,
    timings: Path,
    limits: Limits,
    capabilities: Sequence[str],
    advance: Callable[[int], object],
) -> Built:
    """Build an engine of ``source``, and write it.

    The library reads ``parsed_graph`` (:func:`parsable`); ``timings`` is the file of its timing cache; ``advance`` is
    told thousandths. Raises :class:`InputError` for a graph with operators or weights that the library does not know,
    and :class:`BuildError` if parsing, the check of the network or the build fails.
    """
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
    progress = Progress(advance)
    if not fused:
        let_attention_decompose(library, parsed.network)
    data = _serialize(library, parsed, found, capabilities, timings, progress)
    if data is None and fused and "decomposable" in " ".join(parsed.messages.errors):
        # There is no fused kernel for this head_dim; the manifest says "decomposed".
        fused = False
        parsed.messages.errors.clear()
        let_attention_decompose(library, parsed.network)
        data = _serialize(library, parsed, found, capabilities, timings, progress)
    if data is None:
        raise BuildError(f"{library} does not build {graph}: {parsed.messages.first()}.")
    size = source.engine.write_bytes(memoryview(data))
    progress.reach(1)
    return Built(parsed.facts, found, fused, time.perf_counter() - start, size)


@contextmanager
def parsable(path: Path, length: int) -> Iterator[Path]:
    """The file of the graph at ``path`` that TensorRT parses: a static cache has ``length`` positions there."""
    if not is_static(load_graph(path)):
        yield path
        return

    def fix(model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            assert value.shape is not None
            dims = [length if str(getattr(d, "value", d)) == MAX else d for d in value.shape]
            value.shape = ir.Shape(dims)

    with scratch_copy(path, fix) as copy:
        yield copy


def _serialize(
    library: Library,
    parsed: Parsed,
    found: Sequence[Profile],
    capabilities: Sequence[str],
    timings: Path,
    progress: Progress,
) -> Any:
    trt = library.module
    config = parsed.builder.create_builder_config()
    for profile in found:
        made = parsed.builder.create_optimization_profile()
        for name, shapes in profile.shapes.items():
            made.set_shape(name, *shapes)
        if config.add_optimization_profile(made) < 0:
            raise BuildError(f"{library} refuses the {profile.name} profile: {parsed.messages.first()}.")
    # Needed to inspect the layers of the engine.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    cache = None
    if library.ahead_of_time:  # nothing is timed
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(library.capabilities[name], index)
    else:
        cache = timing_cache(config, timings)
    # In a name: the library keeps no reference of its own.
    config.progress_monitor = monitor = _monitor(library, progress)
    data = parsed.builder.build_serialized_network(parsed.network, config)
    del monitor
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


class Progress:
    """Phases of known length → the progress of the build in thousandths.

    Phases are nested; those without a parent count, and each step of another says that the library is alive.
    """

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._advance, self._reached = advance, 0
        self._steps: dict[str, int] = {}  # of the phases without a parent

    def start(self, name: str, parent: str | None, steps: int) -> None:
        if parent is None:
            self._steps[name] = max(1, steps)

    def step(self, name: str, step: int) -> None:
        self.reach(min(1.0, (step + 1) / self._steps[name]) if name in self._steps else 0)

    def reach(self, share: float) -> None:
        """Report that this ``share`` of the build is done."""
        more = max(0, int(_WHOLE * share) - self._reached)
        self._reached += more
        self._advance(more)


def _monitor(library: Library, progress: Progress) -> Any:
    base: Any = library.module.IProgressMonitor

    class _Monitor(base):  # type: ignore[misc]
        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            progress.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            progress.step(name, step)
            return True

        def phase_finish(self, name: str) -> None:
            """A phase that ends has made all its steps."""

    return _Monitor()
