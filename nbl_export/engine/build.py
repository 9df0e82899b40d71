"""Graph → engine: parse, check, build, and read back what was built.

One graph with a static cache serves every length; its network does not, since a native cache update
wants a number. So the cache's length is set to ``max_context`` in a temporary copy that is parsed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
    let_attention_decompose,
    parse_network,
)
from nbl_export.engine.profiles import Limits, Profile, profiles
from nbl_export.errors import BuildError
from nbl_export.graph.cache import is_static
from nbl_export.graph.io import load_graph, scratch_copy
from nbl_export.graph.operators import fused_op
from nbl_export.graph.precision import graph_precision
from nbl_export.progress import Task


@dataclass(frozen=True)
class Built:
    """A serialized engine and what is known of it. ``fused`` is False where attention was decomposed."""

    data: Any
    facts: NetworkFacts
    profiles: tuple[Profile, ...]
    fused: bool
    seconds: float

    @property
    def size(self) -> int:
        return int(self.data.nbytes)


class TimingCache:
    """Kernel timings shared between the builds of one library on one GPU, kept in a file.

    A library that builds ahead of time measures nothing: it has none.
    """

    def __init__(self, library: Library, path: Path) -> None:
        self.library, self.path = library, path
        self._data = path.read_bytes() if path.is_file() else b""
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Let a build read the timings there are and add its own."""
        if self.library.ahead_of_time:
            return
        self._cache = config.create_timing_cache(self._data)
        # A cache of another GPU or version is not accepted: begin an empty one.
        if self._cache is None or not config.set_timing_cache(self._cache, False):
            self._cache = config.create_timing_cache(b"")
            config.set_timing_cache(self._cache, False)

    def collect(self) -> None:
        """Take over what a build has measured."""
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


def build_engine(
    library: Library,
    path: Path,
    attention: int,
    limits: Limits,
    capabilities: Sequence[str],
    timings: TimingCache,
    task: Task,
) -> Built:
    """Build the engine of the decoder graph at ``path``, which has ``attention`` attention layers.

    ``task`` is advanced to 1000. Raises :class:`InputError` for a graph with foreign operators and
    :class:`BuildError` if the graph is not parsed, is not what it should be, or is not built.
    """
    start = time.perf_counter()
    model = load_graph(path)
    check_operators(model, path)
    precision = graph_precision(model)
    static = is_static(model)
    kept = sum(
        v.const_value.nbytes
        for v in model.graph.initializers.values()
        if v.const_value is not None and v.dtype == ir.DataType.FLOAT
    )
    with _parsable(path, static, limits.max_context) as parsable:
        parsed = parse_network(library, parsable, path)
    operators = sum(fused_op(node) is not None for node in model.graph)
    check_network(parsed.facts, precision, attention, static, kept, operators)
    shapes = {
        str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape or ()]
        for v in model.graph.inputs
        if v.const_value is None  # TensorRT takes an input with a default for a constant
    }
    found = profiles(shapes, limits)
    # Fused attention has no float32 kernel; in half a kernel is insisted on first, so that it is known.
    fused = precision.name != "fp32" and operators > 0
    progress = Progress(task)
    if not fused:
        let_attention_decompose(library, parsed.network)
    data = _serialize(library, parsed, found, capabilities, timings, progress)
    if data is None and fused and "decomposable" in " ".join(parsed.messages.errors):
        # No fused kernel for these heads; the report says "decomposed".
        fused = False
        parsed.messages.errors.clear()
        let_attention_decompose(library, parsed.network)
        data = _serialize(library, parsed, found, capabilities, timings, progress)
    if data is None:
        raise BuildError(f"{library} does not build {path}: {parsed.messages.first()}.")
    progress.finish()
    return Built(data, parsed.facts, found, fused, time.perf_counter() - start)


@contextmanager
def _parsable(path: Path, static: bool, length: int) -> Iterator[Path]:
    if not static:
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
    # The engine must be able to tell what it consists of.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    timings.attach(config)
    monitor = _monitor(library, progress)
    config.progress_monitor = monitor
    with native_output_silenced(), _interruptible(monitor):
        data = parsed.builder.build_serialized_network(parsed.network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if data is not None:
        timings.collect()
    return data


@contextmanager
def _interruptible(monitor: Any) -> Iterator[None]:
    # The library swallows an exception that its callbacks raise: Ctrl-C must be a mark that they see.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        monitor.interrupted = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(library: Library, progress: Progress) -> Any:
    base: Any = library.module.IProgressMonitor

    class _Monitor(base):  # type: ignore[misc]
        """Nested phases as one bar, and Ctrl-C as a request to stop."""

        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._guarded(lambda: progress.start(name, parent, steps))

        def step_complete(self, name: str, step: int) -> bool:
            self._guarded(lambda: progress.step(name, step))
            return not self.interrupted

        def phase_finish(self, name: str) -> None:
            self._guarded(lambda: progress.end(name))

        def _guarded(self, work: Callable[[], None]) -> None:
            # An exception must not travel through the library's own frames.
            try:
                work()
            except KeyboardInterrupt:
                self.interrupted = True

    return _Monitor()


@contextmanager
def native_output_silenced() -> Iterator[None]:
    """Keep what a native library prints past its own logger off the standard error, for the block.

    Python's own standard error goes on reaching the terminal.
    """
    before = sys.stderr
    before.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8", errors="replace") as terminal:
            sys.stderr = terminal
            os.dup2(nothing, 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
        sys.stderr = before


class Progress:
    """Nested phases of known length → how many thousandths of the whole are done.

    A phase inside another is one step of it; phases of one name may follow each other.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._told = task, 0
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name: parent, steps, done

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._phases[name] = (parent, max(1, steps), 0)

    def step(self, name: str, step: int) -> None:
        if name in self._phases:
            parent, steps, _ = self._phases[name]
            self._phases[name] = (parent, steps, min(steps, step + 1))
            self._tell()

    def end(self, name: str) -> None:
        self._phases.pop(name, None)

    def finish(self) -> None:
        """Everything is done."""
        self._task.advance(1000 - self._told)
        self._told = 1000

    def _tell(self) -> None:
        done = int(
            1000 * max((self._done(name) for name, p in self._phases.items() if p[0] is None), default=0)
        )
        if done > self._told:
            self._task.advance(done - self._told)
            self._told = done

    def _done(self, name: str) -> float:
        _, steps, done = self._phases[name]
        inside = max(
            (self._done(n) for n, (parent, *_) in self._phases.items() if parent == name), default=0.0
        )
        return min(1.0, (done + inside) / steps)
