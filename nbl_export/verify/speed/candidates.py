"""Make what is timed, and tell which of it finds room: graphs in ONNX Runtime, and whatever else can be stepped.

A :class:`Candidate` makes a :class:`Prompt` for each cell, a number of rows and of tokens in each. What it needs beyond
that (a session, a copy of the model) is made when it is first asked for, and kept from cell to cell.

The peak memory of a graph is measured in a process of its own: the resident bytes at their highest, Python and runtime
included, or the reason why it did not run. Cells are run in ascending order: a runtime keeps what it once took. That
process imports this module, which therefore imports no torch.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import MASK, NUM_LOGITS_TO_KEEP, POSITIONS, TOKENS, WRITE_INDICES, Inputs
from nbl_export.errors import NblError, first_line
from nbl_export.machine import free_memory
from nbl_export.processes import OUT_OF_MEMORY, ChildError, Tell, in_child
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.session import CPU, CUDA, USABLE, require_onnxruntime
from nbl_export.runtime.stream import Stream
from nbl_export.verify.speed.values import CandidateInfo, GraphCost

TIMED_STEPS = 16  # the most decode steps between two prefills: a static cache has that much room
DEVICES = {CPU: "cpu", CUDA: "cuda"}
_TOKENS = 32  # distinct tokens in a timed prompt; every vocabulary has these ids
# Idle threads of one session must not spin on the cores while another is timed.
_CONFIG = {"session.force_spinning_stop": "1"}


class Prompt:
    """A candidate in one cell: a prefill from an empty cache, then steps of one token, each finished on return."""

    def prefill(self) -> None:
        raise NotImplementedError

    def rewind(self) -> None:
        """Have the cache as the prompt alone fills it."""
        self.prefill()

    def step(self) -> None: ...

    def memory_bytes(self) -> int:
        """Bytes of cache and work space, as far as the runtime tells."""
        return 0


def timed_row(context: int) -> NDArray[np.int32]:
    """A prompt of ``context`` tokens to time."""
    return (np.arange(context) % _TOKENS).astype(np.int32)


# A cell of so many tokens in so many rows (context, batch); raises what its runtime raises where it cannot be.
Make = Callable[[int, int], Prompt]
# The same of a graph that is loaded.
RunGraph = Callable[[OrtModel, int, int], Prompt]


@dataclass(frozen=True)
class Candidate:
    """Who is timed: its name, how a cell of it is made, the name of its own base, its graph and what that costs."""

    name: str
    make: Make
    base: str | None = None
    graph: Path | None = None
    cost: GraphCost | None = None

    @property
    def info(self) -> CandidateInfo:
        return CandidateInfo(self.name, self.base, self.cost)


def loaded(path: Path, provider: str = CPU) -> OrtModel:
    """The graph at ``path`` as it is timed; raises :class:`NblError` if this machine has no such ``provider``."""
    if provider not in require_onnxruntime().get_available_providers():
        raise NblError(f"onnxruntime has no {provider} here")
    return OrtModel(path, _CONFIG, provider, rounded=False)


class OrtPrompt(Prompt):
    """A graph in a session with ``batch`` prompts of ``context`` tokens; an in-place cache has ``room`` more slots.

    Inputs and KV cache stay bound on the device. A real prefill fills the cache of the timed decode step: a growing one
    is bound as the runtime returned it, of one that the graph writes in place a buffer is past and present at once.
    """

    def __init__(
        self, model: OrtModel, context: int, batch: int = 1, room: int = TIMED_STEPS, device: str = "cpu"
    ) -> None:
        self.model, self.device, self._interface = model, device, model.interface
        # The past input for each present output.
        self._pairs = dict(zip(self._interface.present_names, model.past_names, strict=True))
        # A state is read after it is written, so it has a buffer of its own.
        self._kv = {name for entry in self._interface.cache for name in entry.present}
        one = np.ones((batch, 1), dtype=np.int64)
        ids = one * timed_row(context).astype(np.int64)
        prefill = {TOKENS: ids, POSITIONS: one * np.arange(context, dtype=np.int64)}
        step = {TOKENS: one, POSITIONS: one * context}
        if self._interface.static:
            prefill[WRITE_INDICES], step[WRITE_INDICES] = one[:, 0] * 0, one[:, 0] * context
        else:
            prefill[MASK], step[MASK] = np.ones_like(ids), np.ones((batch, context + 1), dtype=np.int64)
        self.step_inputs = step
        # What is bound lies in the memory of NumPy's arrays, which not every release of onnxruntime keeps alive.
        self._bound: list[Any] = []
        length = context + room if self._interface.in_place else 0
        empty = self._interface.empty_cache(batch, length, model.cache_dtype)
        self._prefill = self._bind(prefill, {name: self._on_device(array) for name, array in empty.items()})
        self._step: Any = None
        self.past: dict[str, Any] = {}

    def prefill(self) -> None:
        self._run(self._prefill)
        if not self.past:
            outputs = dict(zip(self.model.output_names, self._prefill.get_outputs(), strict=True))
            self.past = {past: outputs[present] for present, past in self._pairs.items()}
            self._step = self._bind(self.step_inputs, self.past)

    def rewind(self) -> None:
        if self._step is None:  # steps do not advance the cache
            self.prefill()

    def step(self) -> None:
        self._run(self._step)  # the cache does not advance, so every step costs the same

    def memory_bytes(self) -> int:
        return sum(int(np.prod(v.shape())) for v in self.past.values()) * self.model.cache_dtype.itemsize

    def _bind(self, inputs: Mapping[str, Any], past: Mapping[str, Any]) -> Any:
        binding, given = self.model.session.io_binding(), self._interface.named(inputs)
        if NUM_LOGITS_TO_KEEP in given:  # generation needs the logits of the last position only
            given[NUM_LOGITS_TO_KEEP] = np.array(1, dtype=np.int64)
        values = {name: self._on_device(array) for name, array in given.items()} | dict(past)
        self._bound += values.values()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.model.output_names:
            if self._interface.in_place and name in self._kv:
                binding.bind_ortvalue_output(name, past[self._pairs[name]])
            else:
                binding.bind_output(name, self.device)
        return binding

    def _run(self, binding: Any) -> None:
        self.model.session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _on_device(self, array: NDArray[Any]) -> Any:
        return require_onnxruntime().OrtValue.ortvalue_from_numpy(
            np.asarray(array, order="C"), self.device, 0
        )


class EncoderPass(Prompt):
    """An encoder graph with a batch to time; there is no token after it."""

    def __init__(self, model: OrtModel, inputs: Inputs) -> None:
        self._session, self._feeds = model.session, model.interface.named(inputs)

    def prefill(self) -> None:
        self._session.run(None, self._feeds)


class StreamPrompt(Prompt):
    """A stream that computes the last logits of a prefill alone, as in use."""

    def __init__(self, stream: Stream, context: int, batch: int = 1) -> None:
        self.stream, self.rows = stream, [timed_row(context)] * batch

    def prefill(self) -> None:
        self.stream.time_prefill(self.rows)

    def rewind(self) -> None:
        if not self.stream.rewind(len(self.rows[0])):
            self.prefill()

    def step(self) -> None:
        self.stream.time_step([1] * len(self.rows))

    def memory_bytes(self) -> int:
        return self.stream.memory_bytes


# memory --------------------------------------------------------------------------------------------


NO_ROOM = "out of memory"
# What the runtime, numpy and C++ say of it.
_ALLOCATION = ("allocate", "bad_alloc")


def ordered(cells: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cells (batch, context) by what attention's scores take in them, each once."""
    return sorted(set(cells), key=lambda cell: (cell[0] * cell[1] ** 2, cell))


@dataclass(frozen=True)
class Memory:
    """Peak bytes of each candidate by (batch, context), or why its process did not run that cell.

    ``free`` says how many bytes there are to be had. Without peaks everything fits.
    """

    peaks: Mapping[str, Mapping[tuple[int, int], int | str]] = field(default_factory=dict)
    free: Callable[[], int] = free_memory

    def peak(self, name: str, cell: tuple[int, int]) -> int | None:
        """The peak bytes of one that runs the cell, if they were measured."""
        found = self.peaks.get(name, {}).get(cell)
        return found if isinstance(found, int) else None

    def fitting(
        self,
        candidates: Sequence[Candidate],
        cell: tuple[int, int],
        held: dict[str, int],
        absent: dict[str, str],
    ) -> list[Candidate]:
        """Those that fit beside each other, the first before the last; reasons go into ``absent``.

        ``held`` is what each has taken in earlier cells and keeps; it is told what they take in this one.
        """
        largest = max((self.peak(name, cell) or 0 for name in self.peaks), default=0)
        found, left = [], self.free() * USABLE
        for one in candidates:
            # PyTorch, which has no process of its own, is taken for as large as the largest.
            peak = self.peaks.get(one.name, {}).get(cell, largest)
            if isinstance(peak, str):
                absent[one.name] = peak
                continue
            before = held.get(one.name, 0)
            if (more := max(0, peak - before)) > left:
                need = f"{peak / 2**30:.1f} GiB"
                absent[one.name] = f"does not fit into memory with the others: it needs {need}"
                continue
            left -= more
            held[one.name] = max(peak, before)
            found.append(one)
        return found


def measure_memory(
    candidates: Sequence[Candidate],
    cells: Sequence[tuple[int, int]],
    positions: int | None = None,
    listener: Listener | None = None,
) -> Memory:
    """Peaks of the candidates' graphs on the CPU, each in a process of its own: see :func:`peak_bytes`."""
    peaks: dict[Path, Mapping[tuple[int, int], int | str]] = {}
    graphs = dict.fromkeys(c.graph for c in candidates if c.graph is not None)
    with (listener or Silent()).task("Measuring peak memory", len(graphs), "graphs") as task:
        for graph in graphs:
            peaks[graph] = peak_bytes(graph, ordered(cells), positions)
            task.advance(1)
    return Memory({c.name: peaks[c.graph] for c in candidates if c.graph is not None})


def peak_bytes(
    path: Path, cells: Sequence[tuple[int, int]], positions: int | None = None
) -> dict[tuple[int, int], int | str]:
    """Peaks of the graph at ``path`` in each of ``cells`` (batch, context), or why it has none there.

    After the last of the ``positions`` there is no token to decode. Raises :class:`ChildError` for other faults.
    """
    told: list[int | str] = []
    asked = [str(path.resolve()), [list(cell) for cell in cells], positions]
    what, remedy, missing = f"Measuring the peak memory of {path}", "leave it out with --no-memory", NO_ROOM
    try:
        in_child(measure, asked, what, remedy, heard=told.append)
    except ChildError as error:
        if error.signal is None and error.reason != OUT_OF_MEMORY:
            raise
        # A process that is killed wanted more than there is, as C++ does that aborts; a crash may have others.
        if error.signal not in (None, signal.SIGKILL, signal.SIGABRT):
            missing = error.reason
    return dict(zip(cells, [*told, *[missing] * (len(cells) - len(told))], strict=True))


def measure(asked: Any, tell: Tell) -> None:
    """In the child: tell the peak after each cell, or why there is none."""
    path, cells, positions = asked
    model = loaded(Path(path))  # a graph that does not load is not one without room
    for index, (batch, context) in enumerate(cells):
        try:
            prompt = OrtPrompt(model, context, batch)
            prompt.prefill()
            if context != positions:
                prompt.step()
        except Exception as error:  # the runtime's own kind of out-of-memory, or what it does not run
            reason = first_line(error)
            reason = NO_ROOM if any(word in reason for word in _ALLOCATION) else reason
            for _ in cells[index:]:
                tell(reason)
            return
        # What getrusage says on Linux counts what the parent took.
        status = Path("/proc/self/status")
        peak = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else None
        tell(int(peak) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        del prompt
