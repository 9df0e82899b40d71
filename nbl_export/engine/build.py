"""Build engines of both graphs with the same settings, each in a child process: parse, check, build.

A library that crashes or hangs on a graph costs a sentence, not the run. A graph with a static cache has a symbolic
cache length, but a native cache update of TensorRT needs a fixed one: a temporary copy is parsed in which it is
``max_context``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any

import onnx_ir as ir

from nbl_export import __version__
from nbl_export.blocks import Block
from nbl_export.engine.elsewhere import parsable, write_for_others
from nbl_export.engine.library import Gpu, Library
from nbl_export.engine.manifest import (
    Limits,
    Manifest,
    NetworkFacts,
    NetworkTensor,
    Profile,
    manifest_path,
    profiles,
    save_manifest,
)
from nbl_export.errors import BuildError, InputError
from nbl_export.files import atomic_path, sha256_of_file
from nbl_export.graph.cache import is_static, kv_layers
from nbl_export.graph.io import external_files, load_graph
from nbl_export.graph.operators import fused_op
from nbl_export.graph.precision import Precision, graph_precision
from nbl_export.processes import Tell, in_child
from nbl_export.progress import Listener

TIMINGS = "timing.cache"
# Seconds without progress after which the library hangs. One step of a large model's build may take minutes.
PATIENCE = 1800
_REMEDY = "leave the engines out, or export again with another --kv-cache or --precision"
_WHOLE = 1000  # of the progress of a build
_STANDARD = ("", "ai.onnx")
# By name: older releases do not have the type.
_ATTENTION = "ATTENTION_OUTPUT"
# TensorRT's names of the dtypes.
_DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
# The parser adds scalars such as epsilons in float32.
_PARSER_BYTES = 4096


@dataclass(frozen=True)
class Source:
    """A graph to build: its role, its path, its number of attention layers, and the path of the engine.

    ``linear`` are the blocks that the plan of the SHA-256 ``plan`` has made linear in it.
    """

    role: str
    graph: Path
    attention: int
    engine: Path
    linear: tuple[Block, ...] = ()
    plan: str | None = None


@dataclass(frozen=True)
class Target:
    """What engines are built with and for: the library, this machine's GPU if there is one, shapes, capabilities.

    ``capabilities`` are those to build for ahead of time, such as ``SM86``; empty for the GPU alone.
    """

    library: Library
    gpu: Gpu | None
    limits: Limits
    capabilities: tuple[str, ...]


def build_pair(target: Target, sources: Sequence[Source], listener: Listener) -> list[Path]:
    """Build every source, and write what other tools need to build it; returns all written files.

    The engines are moved into place only after all are built.
    """
    built: dict[Path, Manifest] = {}
    # All temporary files are written before the first is moved into place: the disk may be full.
    with ExitStack() as writing:
        temporaries = [writing.enter_context(atomic_path(source.engine)) for source in sources]
        for source, temporary in zip(sources, temporaries, strict=True):
            timings = source.engine.with_name(TIMINGS)
            with listener.task(f"Building {source.role} engine", _WHOLE, "‰") as task:
                manifest = build_in_child(target, replace(source, engine=temporary), timings, task.advance)
            save_manifest(writing.enter_context(atomic_path(manifest_path(source.engine))), manifest)
            built[source.engine] = manifest
    files = [file for engine in built for file in (engine, manifest_path(engine))]
    for source in sources:
        files += write_for_others(source.graph, source.engine, built[source.engine])
    return files


def build_in_child(target: Target, source: Source, timings: Path, advance: Callable[[int], None]) -> Manifest:
    """Build the engine of ``source`` in a child process, and write it; returns its manifest.

    ``timings`` is the file of the library's timing cache; ``advance`` is told thousandths. Raises :class:`InputError`
    for a graph with operators or weights that the library does not know, :class:`BuildError` if parsing, the check of
    the network or the build fails, and :class:`ChildError` if the library crashes or hangs; what is at the engine's
    path is then of no use.
    """
    with parsable(source.graph, target.limits.max_context) as parsed:
        what = f"The build of an engine of {source.graph} with {target.library}"
        built: Manifest = in_child(
            _build, (target, source, parsed, timings), what, _REMEDY, PATIENCE, advance
        )
    return built


def _build(asked: tuple[Target, Source, Path, Path], advance: Tell) -> Manifest:
    target, source, parsed, timings = asked
    library, gpu, start, graph = target.library, target.gpu, time.perf_counter(), source.graph
    model = load_graph(graph)
    precision, static = graph_precision(model), is_static(model)
    check_graph(model, precision, graph)
    stored = (v.const_value for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
    float32_bytes = sum(value.nbytes for value in stored if value is not None)
    network = Network(library, parsed, graph)
    operators = sum(fused_op(node) is not None for node in model.graph)
    check_network(network.facts, precision, source.attention, static, float32_bytes, operators)
    shapes = {
        str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape or ()]
        for v in model.graph.inputs
        if v.const_value is None  # for TensorRT an input with a default is a constant
    }
    found = profiles(shapes, target.limits)
    # Fused attention has no float32 kernel. In half precision a fused kernel is required first, to see if there is one.
    fused = precision.name != "fp32" and operators > 0
    monitor = _monitor(library, advance)
    if not fused:
        network.let_attention_decompose()
    data = network.serialize(found, target.capabilities, timings, monitor)
    if data is None and fused and "decomposable" in " ".join(network.errors):
        # There is no fused kernel for this head_dim; the manifest says "decomposed".
        fused = False
        network.errors.clear()
        network.let_attention_decompose()
        data = network.serialize(found, target.capabilities, timings, monitor)
    if data is None:
        raise BuildError(f"{library} does not build {graph}: {network.first_error()}.")
    size = source.engine.write_bytes(memoryview(data))
    monitor.reach(1)
    hashes = {"engine": source.engine, "onnx": graph}
    hashes |= {"onnx_data" if f.parent == graph.parent else "shared_data": f for f in external_files(model)}
    here = (f"SM{gpu.compute_capability.replace('.', '')}",) if gpu else ()
    return Manifest(
        role=source.role,
        library=library.package,
        library_version=library.version,
        ahead_of_time=library.ahead_of_time,
        capabilities=target.capabilities or here,
        gpu=None if library.ahead_of_time or gpu is None else gpu.name,
        precision=precision.name,
        kv_cache="static" if static else "concat",
        limits=target.limits,
        profiles=found,
        kv_layers=kv_layers(model),
        linear_layers=source.linear,
        attention="none" if not source.attention else "fused" if fused else "decomposed",
        network=network.facts,
        build_seconds=round(time.perf_counter() - start, 3),
        hashes={name: sha256_of_file(file) for name, file in hashes.items()}
        | ({"plan": source.plan} if source.plan else {}),
        size=size,
        created_by=f"nbl-export {__version__}",
    )


def check_graph(model: ir.Model, precision: Precision, path: Path) -> None:
    """Refuse a graph with non-standard operators, such as those of onnxruntime, or with quantized weights."""
    foreign = Counter((n.domain, n.op_type) for n in model.graph if n.domain not in _STANDARD)
    if foreign:
        (domain, op), count = foreign.most_common(1)[0]
        more = f" and {len(foreign) - 1} more operators" if len(foreign) > 1 else ""
        raise InputError(
            f"{path} uses {domain}.{op} ({count} nodes){more}, which TensorRT does not know: export the model with "
            "nbl-export's own exporter (`nbl-export export OUT`), whose graphs have standard operators only."
        )
    if precision.name not in _DTYPES:
        raise InputError(
            f"{path} has {precision.name} weights, of which no engine is built: export it in {', '.join(_DTYPES)}."
        )


class Network:
    """The graph at ``path``, called ``shown`` in messages, as a strongly typed network, and what it has.

    Raises :class:`BuildError` naming the operator that is not supported. ``errors`` are those that the library logs.
    """

    def __init__(self, library: Library, path: Path, shown: Path | None = None) -> None:
        self.library, self.errors, trt = library, list[str](), library.module
        self._logger = _logger(library, self.errors)  # all of these must live as long as the network
        self._builder = trt.Builder(self._logger)
        # TensorRT 11 ignores the flag and types every network strongly.
        self._network = self._builder.create_network(
            1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        self._parser = trt.OnnxParser(self._network, self._logger)
        if not self._parser.parse_from_file(str(path)):
            error = self._parser.get_error(0)
            reason = shorten(str(error.desc()), 300, placeholder=" …").rstrip(".")
            raise BuildError(
                f"{library} does not take the operator {error.node_operator()} ({error.node_name()}) of "
                f"{shown or path}: {reason}."
            )
        self._layers = [self._network.get_layer(i) for i in range(self._network.num_layers)]
        self.facts = self._facts()

    def _facts(self) -> NetworkFacts:
        network, kinds, weights = (
            self._network,
            Counter(one.type.name for one in self._layers),
            Counter[str](),
        )
        for layer in self._layers:
            if layer.type == self.library.module.LayerType.CONSTANT:
                output = layer.get_output(0)
                weights[output.dtype.name] += int(prod(output.shape) * output.dtype.itemsize)
        ends = [network.get_input(i) for i in range(network.num_inputs)]
        ends += [network.get_output(i) for i in range(network.num_outputs)]
        tensors = tuple(NetworkTensor(end.name, end.dtype.name, tuple(end.shape)) for end in ends)
        return NetworkFacts(
            layers=network.num_layers,
            attention=kinds[_ATTENTION],
            kv_cache_updates=kinds["KV_CACHE_UPDATE"],
            inputs=tensors[: network.num_inputs],
            outputs=tensors[network.num_inputs :],
            weight_bytes=dict(weights),
        )

    def first_error(self) -> str:
        """The first error that is not about a missing GPU, which is expected in ahead-of-time builds."""
        real = [m for m in self.errors if "cudaError 35" not in m and "CUDA driver" not in m]
        return shorten(real[0], 400, placeholder=" …") if real else "no reason given"

    def let_attention_decompose(self) -> None:
        """Allow TensorRT to decompose every attention layer for which it has no fused kernel."""
        for layer in self._layers:
            if layer.type.name == _ATTENTION:
                layer.__class__ = (
                    self.library.module.IAttentionOutputLayer
                )  # the binding returns the base class
                layer.attention.decomposable = True

    def serialize(
        self, found: Sequence[Profile], capabilities: Sequence[str], timings: Path, monitor: Any
    ) -> Any:
        """The engine's bytes, or None: then the library has logged why."""
        library, builder = self.library, self._builder
        config = builder.create_builder_config()
        for profile in found:
            made = builder.create_optimization_profile()
            for name, shapes in profile.shapes.items():
                made.set_shape(name, *shapes)
            if config.add_optimization_profile(made) < 0:
                raise BuildError(f"{library} refuses the {profile.name} profile: {self.first_error()}.")
        # Needed to inspect the layers of the engine.
        config.profiling_verbosity = library.module.ProfilingVerbosity.DETAILED
        cache = None
        if library.ahead_of_time:  # nothing is timed
            config.num_compute_capabilities = len(capabilities)
            for index, name in enumerate(capabilities):
                config.set_compute_capability(library.capabilities[name], index)
        else:
            cache = timing_cache(config, timings)
        config.progress_monitor = monitor  # of which the library keeps no reference of its own
        data = builder.build_serialized_network(self._network, config)
        if data is not None and cache is not None:
            with atomic_path(timings) as temporary:
                temporary.write_bytes(bytes(cache.serialize()))
        return data


def check_network(
    facts: NetworkFacts,
    precision: Precision,
    attention: int,
    static: bool,
    float32_bytes: int,
    operators: int | None = None,
) -> None:
    """Check a network against the plan; raises :class:`BuildError` for the first difference.

    1. Exactly ``attention`` attention layers (L - K), or the number of attention ``operators`` in the graph, since
       some exporters decompose attention.
    2. Two KV inputs and two KV outputs for each, and two native cache updates if the cache is static.
    3. KV in the precision's dtype, logits in float32, every other input in int64.
    4. Weights in the precision's dtype, except ``float32_bytes`` that are float32 in the graph itself.
    """
    wanted = _DTYPES[precision.name]
    past = [t for t in facts.inputs if t.name.startswith("past_key_values.")]
    present = [t for t in facts.outputs if t.name.startswith("present.")]
    counts = {
        "attention layers": (facts.attention, attention if operators is None else operators),
        "KV inputs": (len(past), 2 * attention),
        "KV outputs": (len(present), 2 * attention),
    }
    if static:
        counts["KV cache updates"] = (facts.kv_cache_updates, 2 * attention)
    for what, (found, expected) in counts.items():
        if found != expected:
            raise BuildError(f"The TensorRT network has {found} {what}, expected {expected}.")
    types = dict.fromkeys((*past, *present), wanted)
    types |= {tensor: "INT64" for tensor in facts.inputs if tensor not in past}
    types |= {tensor: "FLOAT" for tensor in facts.outputs if tensor.name == "logits"}
    for tensor, dtype in types.items():
        if tensor.dtype != dtype:
            raise BuildError(f"The TensorRT network's {tensor.name} is {tensor.dtype}, expected {dtype}.")
    other = sum(b for d, b in facts.weight_bytes.items() if d in _DTYPES.values() and d != wanted)
    total = sum(facts.weight_bytes.values())
    if other > float32_bytes + _PARSER_BYTES:
        raise BuildError(
            f"{other:,} of {total:,} bytes of the TensorRT network's weights are not {wanted}; the graph keeps "
            f"{float32_bytes:,}."
        )


def timing_cache(config: Any, path: Path) -> Any:
    """The kernel timings in the file ``path``, which ``config`` reads and adds to.

    Those of another GPU or version are not accepted: then it begins with none.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _logger(library: Library, errors: list[str]) -> Any:
    """A logger of the library that adds to ``errors``."""
    kind: Any = library.module.ILogger

    class _Logger(kind):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in (kind.Severity.ERROR, kind.Severity.INTERNAL_ERROR):
                errors.append(message)

    return _Logger()


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
