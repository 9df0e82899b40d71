"""Graph → engine: parse, check and build.

A graph with a static cache has a symbolic cache length, but a native cache update of TensorRT needs a fixed one.
So a temporary copy is parsed in which the length is ``max_context``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.batch.names import MAX
from nbl_export.engine.library import Library
from nbl_export.engine.network import (
    NetworkFacts,
    Parsed,
    check_network,
    check_operators,
    check_precision,
    let_attention_decompose,
    parse_network,
)
from nbl_export.engine.profiles import Limits, Profile, profiles
from nbl_export.engine.weights import NetworkWeights, network_weights
from nbl_export.errors import BuildError
from nbl_export.graph.cache import is_static
from nbl_export.graph.io import load_graph, scratch_copy
from nbl_export.graph.operators import fused_op
from nbl_export.graph.precision import graph_precision
from nbl_export.progress import Task


@dataclass(frozen=True)
class Job:
    """An engine to build: of ``graph``, a decoder with ``attention`` attention layers, into the file ``engine``.

    ``parsed`` is the file that the library reads, ``graph`` or a copy of it (:func:`parsable`); ``timings`` the file of
    a :class:`TimingCache`; ``capabilities`` are those to build for ahead of time.
    """

    graph: Path
    parsed: Path
    attention: int
    limits: Limits
    capabilities: tuple[str, ...]
    engine: Path
    timings: Path


@dataclass(frozen=True)
class Built:
    """The facts about an engine of ``size`` bytes. ``fused`` is False if attention was decomposed."""

    facts: NetworkFacts
    weights: NetworkWeights
    profiles: tuple[Profile, ...]
    fused: bool
    seconds: float
    size: int


class TimingCache:
    """Kernel timings shared between the builds of one library on one GPU, kept in a file.

    A library that builds ahead of time has no timing cache.
    """

    def __init__(self, library: Library, path: Path) -> None:
        self.library, self.path = library, path
        self._data = path.read_bytes() if path.is_file() else b""
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Make a build read the existing timings and add its own."""
        if self.library.ahead_of_time:
            return
        self._cache = config.create_timing_cache(self._data)
        # A cache of another GPU or version is not accepted: start with an empty one.
        if self._cache is None or not config.set_timing_cache(self._cache, False):
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, False)

    def collect(self) -> None:
        """Store the timings that a build has measured."""
        if self._cache is not None:
            self._data = bytes(self._cache.serialize())

    def save(self) -> list[Path]:
        """Write the timings, if there are any; returns the files written."""
        from nbl_export.files import atomic_path

        if self.library.ahead_of_time or not self._data:
            return []
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(self._data)
        return [self.path]


def build_engine(library: Library, job: Job, task: Task) -> Built:
    """Build an engine and write it; ``task`` is advanced to 1000.

    Raises :class:`InputError` for a graph with operators or weights that the library does not know, and
    :class:`BuildError` if parsing, the check of the network or the build fails.
    """
    start = time.perf_counter()
    path = job.graph
    model = load_graph(path)
    check_operators(model, path)
    precision = graph_precision(model)
    check_precision(precision, path)
    static = is_static(model)
    float32_bytes = sum(
        v.const_value.nbytes
        for v in model.graph.initializers.values()
        if v.const_value is not None and v.dtype == ir.DataType.FLOAT
    )
    parsed = parse_network(library, job.parsed, path)
    operators = sum(fused_op(node) is not None for node in model.graph)
    check_network(parsed.facts, precision, job.attention, static, float32_bytes, operators)
    shapes = {
        str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape or ()]
        for v in model.graph.inputs
        if v.const_value is None  # for TensorRT an input with a default is a constant
    }
    found = profiles(shapes, job.limits)
    # Fused attention has no float32 kernel. In half precision a fused kernel is required first, to see if there is one.
    fused = precision.name != "fp32" and operators > 0
    progress, timings = Progress(task), TimingCache(library, job.timings)
    if not fused:
        let_attention_decompose(library, parsed.network)
    data = _serialize(library, parsed, found, job.capabilities, timings, progress)
    if data is None and fused and "decomposable" in " ".join(parsed.messages.errors):
        # There is no fused kernel for this head_dim; the manifest says "decomposed".
        fused = False
        parsed.messages.errors.clear()
        let_attention_decompose(library, parsed.network)
        data = _serialize(library, parsed, found, job.capabilities, timings, progress)
    if data is None:
        raise BuildError(f"{library} does not build {path}: {parsed.messages.first()}.")
    size = job.engine.write_bytes(memoryview(data))
    timings.save()
    progress.finish()
    weights = network_weights(library, parsed.network, model)
    return Built(parsed.facts, weights, found, fused, time.perf_counter() - start, size)


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
    timings: TimingCache,
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
    if library.ahead_of_time:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(library.capabilities[name], index)
    # Needed to inspect the layers of the engine.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    timings.attach(config)
    # In a name: the library keeps no reference of its own.
    config.progress_monitor = monitor = _monitor(library, progress)
    data = parsed.builder.build_serialized_network(parsed.network, config)
    del monitor
    if data is not None:
        timings.collect()
    return data


def _monitor(library: Library, progress: Progress) -> Any:
    base: Any = library.module.IProgressMonitor

    class _Monitor(base):  # type: ignore[misc]
        """Reports nested phases as one progress bar."""

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            progress.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            progress.step(name, step)
            return True

        def phase_finish(self, name: str) -> None:
            progress.end(name)

    return _Monitor()


class Progress:
    """Nested phases of known length → the progress of the build in thousandths.

    A nested phase is one step of its parent; phases with the same name may follow each other.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._reported = task, 0
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name: parent, steps, done

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._phases[name] = (parent, max(1, steps), 0)

    def step(self, name: str, step: int) -> None:
        if name in self._phases:
            parent, steps, _ = self._phases[name]
            self._phases[name] = (parent, steps, min(steps, step + 1))
            self._report()

    def end(self, name: str) -> None:
        self._phases.pop(name, None)

    def finish(self) -> None:
        """Report that everything is done."""
        self._task.advance(1000 - self._reported)
        self._reported = 1000

    def _report(self) -> None:
        done = int(
            1000 * max((self._done(name) for name, p in self._phases.items() if p[0] is None), default=0)
        )
        if done > self._reported:
            self._task.advance(done - self._reported)
            self._reported = done

    def _done(self, name: str) -> float:
        _, steps, done = self._phases[name]
        inside = max(
            (self._done(n) for n, (parent, *_) in self._phases.items() if parent == name), default=0.0
        )
        return min(1.0, (done + inside) / steps)
