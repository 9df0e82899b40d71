"""ONNX Runtime as a :class:`~nbl_export.runtime.stream.Stream`, for both forms of the cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.graph.cache import KV_LAYERS_KEY, WRITE_INDICES, is_static
from nbl_export.runtime.decoder import F32, I64, KV, DecoderOutput
from nbl_export.runtime.padding import BOOL, left_padded, prefix_mask, right_padded, rows_of
from nbl_export.runtime.stream import PastStream, Stream


def require_onnxruntime() -> Any:
    """The onnxruntime module, or an error with the pip line to type."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "onnxruntime is not installed: pip install 'nbl-export[cpu]' (or 'nbl-export[gpu]' for CUDA; never both)."
        ) from None
    return onnxruntime


CPU = "CPUExecutionProvider"


def session(
    path: Path, config: Mapping[str, str] | None = None, provider: str = CPU, rounded: bool = True
) -> Any:
    """An inference session of the graph at ``path`` on one provider; on the CPU with all cores.

    ``config`` are onnxruntime's session configuration entries. On the CPU a half graph is run by its
    stand-in (:mod:`nbl_export.graph.standin`), which rounds as the graph says; ``rounded=False`` runs the
    file itself. Raises :class:`InputError` if onnxruntime does not take it.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = os.cpu_count() or 1
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    with _runnable(path, provider == CPU and rounded) as runnable:
        try:
            return ort.InferenceSession(
                str(runnable), options, providers=list(dict.fromkeys((provider, CPU)))
            )
        except Exception as error:  # onnxruntime's exceptions have no common base class
            first = str(error).splitlines()[0]
            raise InputError(f"onnxruntime does not load {path}: {first}") from None


@contextmanager
def _runnable(path: Path, rounded: bool) -> Iterator[Path]:
    from nbl_export.graph.io import load_graph, scratch_copy
    from nbl_export.graph.standin import compute_in_float32, needs_standin

    if rounded and needs_standin(load_graph(path)):
        with scratch_copy(path, compute_in_float32) as copy:
            yield copy
    else:
        yield path


_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OrtModel:
    """A decoder graph in a session: its cache inputs in order, and the layer each belongs to.

    The layers are read from the model's metadata, or are its numbers where there are none.
    """

    def __init__(
        self, path: Path, config: Mapping[str, str] | None = None, provider: str = CPU, rounded: bool = True
    ) -> None:
        self.session = session(path, config, provider, rounded)
        inputs = self.session.get_inputs()
        self.input_names = {i.name for i in inputs}
        self.past_inputs = [i for i in inputs if i.name.startswith("past_key_values.")]
        self.past_names = [i.name for i in self.past_inputs]
        self.output_names = ["logits", *(n.replace("past_key_values", "present") for n in self.past_names)]
        known = self.session.get_modelmeta().custom_metadata_map.get(KV_LAYERS_KEY)
        pairs = len(self.past_names) // 2
        self._kv_layers = tuple(json.loads(known)) if known else tuple(range(pairs))
        if len(self._kv_layers) != pairs:
            raise InputError(
                f"{path}: its metadata names {len(self._kv_layers)} KV layers, its inputs {pairs}."
            )

    @property
    def kv_layers(self) -> tuple[int, ...]:
        return self._kv_layers

    @property
    def static(self) -> bool:
        """Whether the cache is a buffer of fixed length."""
        return WRITE_INDICES in self.input_names

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        """The dtype of keys and values; float32 for a graph without a cache."""
        kind = self.past_inputs[0].type if self.past_inputs else "tensor(float)"
        if kind not in _NUMPY:
            raise InputError(
                f"NumPy has no {kind} for a KV cache: run this graph on the CPU provider, or its engine."
            )
        return np.dtype(_NUMPY[kind])

    def buffers(self, batch: int, length: int) -> list[KV]:
        """Keys and values of every cached layer, zeros of ``length`` places."""
        arrays = [
            np.zeros((batch, i.shape[1], length, i.shape[3]), dtype=self.cache_dtype)
            for i in self.past_inputs
        ]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def named(self, inputs: Mapping[str, I64], past: Sequence[KV]) -> dict[str, Any]:
        """The session's inputs by name; inputs that the graph does not have are left out."""
        feeds: dict[str, Any] = dict(zip(self.past_names, [a for pair in past for a in pair], strict=True))
        return feeds | {name: value for name, value in inputs.items() if name in self.input_names}


class OrtDecoder(OrtModel):
    """A decoder graph whose cache grows, handed in and out as arrays."""

    def empty_past(self, batch: int) -> list[KV]:
        return self.buffers(batch, 0)

    def feeds(self, ids: I64, mask: I64, positions: I64, past: Sequence[KV]) -> dict[str, Any]:
        """The session's inputs by name."""
        return self.named({"input_ids": ids, "attention_mask": mask, "position_ids": positions}, past)

    def __call__(
        self, input_ids: I64, attention_mask: I64, position_ids: I64, past: Sequence[KV]
    ) -> DecoderOutput:
        feeds = self.feeds(input_ids, attention_mask, position_ids, past)
        logits, *kv = self.session.run(self.output_names, feeds)
        return DecoderOutput(logits, tuple(zip(kv[::2], kv[1::2], strict=True)))


class OrtStaticStream(OrtModel):
    """A decoder graph with a static cache of ``capacity`` places, as a stream."""

    def __init__(self, path: Path, capacity: int, rounded: bool = True) -> None:
        super().__init__(path, rounded=rounded)
        self.capacity = capacity
        self._past: list[KV] = []
        self._lengths = np.zeros(0, dtype=np.int64)

    def prefill_feeds(self, rows: Sequence[NDArray[Any]]) -> dict[str, Any]:
        """The session's inputs for ``rows`` and an empty cache."""
        ids, positions = right_padded(rows)
        start = np.zeros(len(rows), dtype=np.int64)
        inputs = {"input_ids": ids, "position_ids": positions, WRITE_INDICES: start}
        return self.named(inputs, self.buffers(len(rows), self.capacity))

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self._check_room(int(self._lengths.max()))
        feeds = self.prefill_feeds(rows)
        return self._run(feeds)[prefix_mask(self._lengths, feeds["input_ids"].shape[1])]

    def decode(self, tokens: Sequence[int]) -> F32:
        self._check_room(int(self._lengths.max()) + 1)
        inputs = {
            "input_ids": np.array(tokens, dtype=np.int64)[:, None],
            "position_ids": self._lengths[:, None],
            WRITE_INDICES: self._lengths,
        }
        logits = self._run(self.named(inputs, self._past))
        self._lengths = self._lengths + 1
        return logits[:, 0]

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return self._past, prefix_mask(self._lengths, self.capacity)

    def _check_room(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise InputError(f"{tokens} tokens do not fit into a static cache of {self.capacity} places.")

    def _run(self, feeds: Mapping[str, Any]) -> F32:
        logits, *kv = self.session.run(self.output_names, feeds)
        self._past = list(zip(kv[::2], kv[1::2], strict=True))
        return np.asarray(logits)


def _is_static(path: Path) -> bool:
    from nbl_export.graph.io import load_graph

    return is_static(load_graph(path))


def ort_stream(path: Path, capacity: int, rounded: bool = True) -> Stream:
    """The decoder graph at ``path`` as a stream of up to ``capacity`` tokens a row (``rounded``: see `session`)."""
    if _is_static(path):
        return OrtStaticStream(path, capacity, rounded)
    return PastStream(OrtDecoder(path, rounded=rounded))


def run_outputs(
    path: Path, rows: Sequence[NDArray[Any]], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Outputs ``names`` (all by default) of the decoder graph at ``path`` on a prefill of ``rows``."""
    if _is_static(path):
        model: OrtModel = (static := OrtStaticStream(path, max(len(row) for row in rows)))
        feeds = static.prefill_feeds(rows)
    else:
        model = growing = OrtDecoder(path)
        feeds = growing.feeds(*left_padded(rows), growing.empty_past(len(rows)))
    wanted = list(names or (o.name for o in model.session.get_outputs()))
    return dict(zip(wanted, model.session.run(wanted, feeds), strict=True))


def run_taps(path: Path, names: Sequence[str], inputs: Mapping[str, I64]) -> dict[str, F32]:
    """Inner tensors ``names`` [batch, sequence, …] of the decoder graph at ``path``, with an empty cache.

    ``inputs`` are left-padded ids and mask, and so is what comes back, whichever way the graph pads.
    """
    from nbl_export.graph.io import with_outputs

    wanted = list(dict.fromkeys(names))
    mask = inputs["attention_mask"].astype(bool)
    with with_outputs(path, wanted) as tapped:
        found = run_outputs(tapped, rows_of(inputs["input_ids"], inputs["attention_mask"]), wanted)
    if _is_static(path):
        right = prefix_mask(mask.sum(axis=1), mask.shape[1])
        found = {name: _moved(value, right, mask) for name, value in found.items()}
    return {name: value.astype(np.float32, copy=False) for name, value in found.items()}


def _moved(value: F32, source: BOOL, target: BOOL) -> F32:
    result = np.zeros_like(value)
    result[target] = value[source]
    return result
