"""Parse an ONNX graph into a TensorRT network, check its layers against the plan, and derive the shapes to build for.

A profile gives each symbolic dimension a minimum, an optimum and a maximum. The shapes of all inputs are derived
from these, so ids, mask, positions and cache are consistent.

            batch        sequence      past                          total = past + sequence
prefill     1 … B        1 … S         0 … C - S (chunked prefill)   1 … C
decode      1 … B        1             1 … C - 1                     2 … C

B, S, C are ``max_batch``, ``max_seq`` and ``max_context``. A static cache always has C slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import BATCH, MAX, PAST, SEQUENCE, TOTAL
from nbl_export.engine.library import Library
from nbl_export.errors import BuildError, InputError
from nbl_export.settings.choices import MAX_CONTEXT, MAX_SEQ

if TYPE_CHECKING:
    import onnx_ir as ir

    from nbl_export.graph.precision import Precision

_STANDARD = ("", "ai.onnx")
# By name: older releases do not have the type.
_ATTENTION = "ATTENTION_OUTPUT"
# TensorRT's names of the dtypes.
_DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
# The parser adds scalars such as epsilons in float32.
_PARSER_BYTES = 4096


def _logger(library: Library) -> Any:
    """A logger of the library that keeps ``errors``."""
    kind: Any = library.module.ILogger

    class _Logger(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (kind.Severity.ERROR, kind.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return _Logger()


@dataclass(frozen=True)
class NetworkTensor:
    """An input or output of a network; ``shape`` has -1 for a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class NetworkFacts:
    """Counts of a parsed network. ``weight_bytes`` are the bytes of its constants by dtype."""

    layers: int
    attention: int
    kv_cache_updates: int
    inputs: tuple[NetworkTensor, ...]
    outputs: tuple[NetworkTensor, ...]
    weight_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Parsed:
    """A network with the objects that must live as long as it does; ``logger`` has the library's errors."""

    builder: Any
    network: Any
    parser: Any
    logger: Any
    facts: NetworkFacts

    def first_error(self) -> str:
        """The first error that is not about a missing GPU, which is expected in ahead-of-time builds."""
        real = [m for m in self.logger.errors if "cudaError 35" not in m and "CUDA driver" not in m]
        return shorten(real[0], 400, placeholder=" …") if real else "no reason given"


def check_operators(model: ir.Model, path: Path) -> None:
    """Refuse a graph with non-standard operators, such as those of onnxruntime."""
    foreign = Counter((n.domain, n.op_type) for n in model.graph if n.domain not in _STANDARD)
    if foreign:
        (domain, op), count = foreign.most_common(1)[0]
        more = f" and {len(foreign) - 1} more operators" if len(foreign) > 1 else ""
        raise InputError(
            f"{path} uses {domain}.{op} ({count} nodes){more}, which TensorRT does not know: export the model with "
            "nbl-export's own exporter (`nbl-export export OUT`), whose graphs have standard operators only."
        )


def check_precision(precision: Precision, path: Path) -> None:
    """Refuse a graph with quantized weights."""
    if precision.name not in _DTYPES:
        raise InputError(
            f"{path} has {precision.name} weights, of which no engine is built: export it in {', '.join(_DTYPES)}."
        )


def parse_network(library: Library, path: Path, shown: Path | None = None) -> Parsed:
    """Parse the graph at ``path``, called ``shown`` in messages, into a strongly typed network.

    Raises :class:`BuildError` naming the operator that is not supported.
    """
    trt, logger = library.module, _logger(library)
    builder = trt.Builder(logger)
    # TensorRT 11 ignores the flag and types every network strongly.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        error = parser.get_error(0)
        reason = shorten(str(error.desc()), 300, placeholder=" …").rstrip(".")
        raise BuildError(
            f"{library} does not take the operator {error.node_operator()} ({error.node_name()}) of {shown or path}: "
            f"{reason}."
        )
    return Parsed(builder, network, parser, logger, _facts(library, network))


def _facts(library: Library, network: Any) -> NetworkFacts:
    """Count a network's layers and read its dtypes."""
    kinds: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kinds[layer.type.name] += 1
        if layer.type == library.module.LayerType.CONSTANT:
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


def let_attention_decompose(library: Library, network: Any) -> None:
    """Allow TensorRT to decompose every attention layer for which it has no fused kernel."""
    trt = library.module
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type.name == _ATTENTION:
            layer.__class__ = trt.IAttentionOutputLayer  # the binding returns the base class
            layer.attention.decomposable = True


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


# Profiles ----------------------------------------------------------------------------------------

Shape = tuple[int, ...]
Range = tuple[int, int, int]
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Profile:
    """One profile: each input's (minimum, optimum, maximum) shape."""

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Limits:
    """The maximum batch size, tokens per pass, and tokens of context of an engine."""

    max_batch: int
    max_seq: int
    max_context: int


def limits(max_batch: int, max_seq: int | None, max_context: int | None, model_context: int | None) -> Limits:
    """The requested limits; the defaults are 2,048 tokens of context and 512 per pass, or less if the model has less.

    ``model_context`` is the model's number of positions, None if unlimited. Raises :class:`InputError` for a limit
    beyond it, or for limits that contradict each other.
    """
    bound = model_context or 1 << 31
    context = min(MAX_CONTEXT, bound) if max_context is None else max_context
    sequence = min(MAX_SEQ, context) if max_seq is None else max_seq
    if context > bound:
        raise InputError(f"--max-context is {context:,}; the model has {bound:,} positions.")
    if sequence > context:
        raise InputError(f"--max-seq is {sequence:,}, more than --max-context ({context:,}).")
    for option, value, least in (("batch", max_batch, 1), ("seq", sequence, 1), ("context", context, 2)):
        if value < least:
            raise InputError(f"--max-{option} is {value}; it must be at least {least}.")
    return Limits(max_batch, sequence, context)


def profiles(inputs: Mapping[str, Sequence[int | str]], limits: Limits) -> tuple[Profile, Profile]:
    """The prefill and the decode profile for a graph's ``inputs``, shapes of integers and dimension names.

    Raises :class:`BuildError` for an unknown dimension name.
    """
    b, s, c = limits.max_batch, limits.max_seq, limits.max_context
    batch, buffer = (1, 1, b), (c, c, c)
    half = max(1, c // 2)
    tables: dict[str, dict[str, Range]] = {
        PREFILL: {SEQUENCE: (1, s, s), PAST: (0, 0, c - s), TOTAL: (1, s, c)},
        DECODE: {
            SEQUENCE: (1, 1, 1),
            PAST: (1, min(half, c - 1), c - 1),
            TOTAL: (2, min(half, c - 1) + 1, c),
        },
    }
    found = []
    for name, table in tables.items():
        # optimum writes the sum where others use a name.
        dims = {BATCH: batch, MAX: buffer, **table, f"{PAST} + {SEQUENCE}": table[TOTAL]}
        for given, shape in inputs.items():
            if unknown := [dim for dim in shape if not isinstance(dim, int) and dim not in dims]:
                raise BuildError(
                    f"The graph's input {given} has the dimension {unknown[0]!r}, for which no profile has a range."
                )
        shapes = {
            given: tuple(
                tuple(dim if isinstance(dim, int) else dims[dim][which] for dim in shape)
                for which in range(3)
            )
            for given, shape in inputs.items()
        }
        found.append(Profile(name, shapes))  # type: ignore[arg-type]
    return found[0], found[1]
