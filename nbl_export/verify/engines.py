"""Run the built engines: parity against PyTorch and speed against everything else on the same GPU.

Without a GPU nothing is run, and the report says so; it never says passed for what was not run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nbl_export.engine.gpu import Gpu
from nbl_export.engine.pair import EngineFile
from nbl_export.errors import NblError
from nbl_export.graph.precision import precision_of
from nbl_export.models.load import in_precision
from nbl_export.progress import Listener, Silent
from nbl_export.report.schema import Check
from nbl_export.runtime.ort import CPU, OrtModel, require_onnxruntime
from nbl_export.runtime.prompts import OrtPrompt, timed_row
from nbl_export.runtime.tensorrt import EngineStream

if TYPE_CHECKING:
    import torch

_DEVICES = {CPU: "cpu", "CUDAExecutionProvider": "cuda"}
TIMED_STEPS = 16  # decode steps in a timed round; each is timed on its own, for the 99th percentile


def built_check(engines: Sequence[EngineFile]) -> Check:
    """What was built, as the report's line; the checks behind it were made while building."""
    parts = []
    for engine in engines:
        m = engine.manifest
        count = m.network["attention"]
        kind = f"{count} {m.attention} attention layers" if count else "no attention"
        parts.append(f"{m.role} {m.size / 2**20:,.1f} MiB with {kind}")
    first = engines[0].manifest
    return Check(
        "engine build",
        "passed",
        f"{first.library} {first.library_version}, {first.precision}: {'; '.join(parts)}",
    )


def not_run(engines: Sequence[EngineFile], why: str) -> Check:
    """The line for engines that were built and not run."""
    manifest = engines[0].manifest
    how = "ahead of time for " if manifest.ahead_of_time else "for "
    return Check(
        "engine run", "skipped", f"engine built ({how}{', '.join(manifest.capabilities)}); not run: {why}"
    )


# speed -------------------------------------------------------------------------------------------


class Contender(Protocol):
    """Something to time: a prefill from an empty cache, then steps of one token, each finished on return."""

    @property
    def name(self) -> str: ...

    def prefill(self) -> None: ...

    def step(self) -> None: ...

    def memory_bytes(self) -> int:
        """Bytes of cache and work space on the device, as far as the runtime tells."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one contender at one context: median and 99th percentile."""

    name: str
    context: int
    prefill_ms: float
    prefill_p99_ms: float
    decode_ms: float
    decode_p99_ms: float
    tokens_per_second: float
    memory_bytes: int


def race(
    contenders: Sequence[Contender],
    context: int,
    rounds: int,
    advance: Callable[[int], None],
    absent: dict[str, str] | None = None,
) -> list[Latency]:
    """Time all contenders in turn, ``rounds`` times after a warm-up, the order reversed every round.

    One that fails on the way (no room for its cache) drops out; its reason goes into ``absent``.
    """
    prefill: dict[str, list[float]] = {c.name: [] for c in contenders}
    decode: dict[str, list[float]] = {c.name: [] for c in contenders}
    running = list(contenders)
    for number in range(rounds + 1):
        for contender in list(running if number % 2 else reversed(running)):
            try:
                first = _timed(contender.prefill)
                steps = [_timed(contender.step) for _ in range(TIMED_STEPS)]
            except Exception as error:  # each runtime has exceptions of its own
                if absent is None:
                    raise
                absent[contender.name] = reason_of(error)
                running.remove(contender)
                continue
            if number:  # the first round warms up: kernels are compiled, graphs captured
                prefill[contender.name].append(first)
                decode[contender.name] += steps
        advance(1)
    return [_latency(c, context, prefill[c.name], decode[c.name]) for c in running]


def _latency(contender: Contender, context: int, prefill: list[float], decode: list[float]) -> Latency:
    (p50, p99), (d50, d99) = (np.quantile(times, (0.5, 0.99)) * 1e3 for times in (prefill, decode))
    return Latency(
        contender.name,
        context,
        float(p50),
        float(p99),
        float(d50),
        float(d99),
        1e3 / float(d50),
        contender.memory_bytes(),
    )


def reason_of(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class EngineContender:
    """An engine; its logits stay on the device, as they would in use."""

    def __init__(self, name: str, stream: EngineStream, context: int) -> None:
        self.name, self._stream, self._row = name, stream, timed_row(context)

    def prefill(self) -> None:
        self._stream.prefill_on_device([self._row])
        self._stream.device.synchronize()

    def step(self) -> None:
        self._stream.decode_on_device([1])
        self._stream.device.synchronize()

    def memory_bytes(self) -> int:
        return self._stream.cache_bytes + self._stream.workspace_bytes


class TorchContender:
    """Eager PyTorch with transformers' own cache, in the engines' precision."""

    def __init__(self, name: str, model: torch.nn.Module, context: int) -> None:
        import torch

        self.name, self._model = name, model
        self._device = next(model.parameters()).device
        self._row = torch.from_numpy(timed_row(context).astype(np.int64))[None].to(self._device)
        self._one = self._row[:, :1]
        self._cache: Any = None

    def prefill(self) -> None:
        self._cache = None
        self._forward(self._row)

    def step(self) -> None:
        self._forward(self._one)

    def _forward(self, ids: torch.Tensor) -> None:
        import torch

        from nbl_export.models.compat import cache_argument

        with torch.inference_mode():
            argument = {cache_argument(self._model): self._cache} if self._cache is not None else {}
            output = self._model(input_ids=ids, use_cache=True, **argument)
        self._cache = output[cache_argument(self._model)]
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def memory_bytes(self) -> int:
        return sum(
            t.numel() * t.element_size()
            for layer in self._cache.layers
            for t in (layer.keys, layer.values)
            if t is not None
        )


class OrtContender:
    """A graph in ONNX Runtime's CUDA provider, its cache kept on the device."""

    def __init__(self, name: str, path: Path, context: int, provider: str = "CUDAExecutionProvider") -> None:

        if provider not in require_onnxruntime().get_available_providers():
            raise NblError(f"onnxruntime has no {provider} here")
        self.name = name
        self._prompt = OrtPrompt(
            OrtModel(path, provider=provider, rounded=False), context, TIMED_STEPS, _DEVICES[provider]
        )

    def prefill(self) -> None:
        self._prompt.prefill()

    def step(self) -> None:
        self._prompt.step()

    def memory_bytes(self) -> int:
        return self._prompt.cache_bytes


def gpu_entrants(
    model: torch.nn.Module,
    streams: Mapping[str, EngineStream],
    graphs: Mapping[str, Path],
    precision: str,
) -> dict[str, Callable[[int], Contender]]:
    """Who takes part on a GPU: both engines, both graphs in ONNX Runtime's CUDA provider, eager PyTorch.

    Each is a function of the context length; PyTorch's copy of the model is made in the engines'
    precision when it is first asked for.
    """
    made: dict[str, torch.nn.Module] = {}

    def eager(context: int) -> Contender:
        if "base" not in made:
            made["base"] = in_precision(model, precision_of(precision).gates).to("cuda")
        return TorchContender("PyTorch eager, base", made["base"], context)

    entrants: dict[str, Callable[[int], Contender]] = {}
    for role, stream in streams.items():
        entrants[f"{role} engine"] = partial(_engine_contender, f"{role} engine", stream)
    for role, path in graphs.items():
        entrants[f"onnxruntime CUDA, {role}"] = partial(OrtContender, f"onnxruntime CUDA, {role}", path)
    entrants["PyTorch eager, base"] = eager
    return entrants


def _engine_contender(name: str, stream: EngineStream, context: int) -> Contender:
    return EngineContender(name, stream, context)


@dataclass(frozen=True)
class EngineSpeed:
    """All latencies, base/linearized ratios of the engines, and who could not take part and why."""

    gpu: str
    compute_capability: str
    rounds: int
    latencies: tuple[Latency, ...]
    speedups: tuple[dict[str, float], ...]
    absent: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def speedups(latencies: Sequence[Latency], base: str, linearized: str) -> tuple[dict[str, float], ...]:
    """base/linearized of the medians, for each context."""
    named = {(x.name, x.context): x for x in latencies}
    return tuple(
        {
            "context": float(context),
            "prefill": named[base, context].prefill_ms / named[linearized, context].prefill_ms,
            "decode": named[base, context].decode_ms / named[linearized, context].decode_ms,
        }
        for context in sorted({x.context for x in latencies})
        if (base, context) in named and (linearized, context) in named
    )


def measure_engine_speed(
    gpu: Gpu,
    entrants: dict[str, Callable[[int], Contender]],
    contexts: Sequence[int],
    rounds: int,
    listener: Listener | None = None,
) -> EngineSpeed:
    """Race the ``entrants`` (name → how to make one for a context) at each context length.

    One that cannot be made or run (no CUDA provider, no room) is left out, with its reason.
    """
    latencies: list[Latency] = []
    absent: dict[str, str] = {}
    with (listener or Silent()).task("Timing on the GPU", len(contexts) * (rounds + 1), "rounds") as task:
        for context in contexts:
            contenders = []
            for name, make in entrants.items():
                try:
                    contenders.append(make(context))
                except Exception as error:  # each runtime has exceptions of its own
                    absent[name] = reason_of(error)
            latencies += race(contenders, context, rounds, task.advance, absent)
    return EngineSpeed(
        gpu.name,
        gpu.compute_capability,
        rounds,
        tuple(latencies),
        speedups(latencies, "base engine", "linearized engine"),
        absent,
    )
