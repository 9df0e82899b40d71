"""ONNX Runtime as a :class:`~nbl_export.runtime.decoder.Decoder`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.runtime.decoder import F32, I64, KV, DecoderOutput

KV_LAYERS_KEY = "nbl_export.kv_layers"


def require_onnxruntime() -> Any:
    """The onnxruntime module, or an error with the pip line to type."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "onnxruntime is not installed: pip install 'nbl-export[cpu]' (or 'nbl-export[gpu]' for CUDA; never both)."
        ) from None
    return onnxruntime


def session(path: Path, config: Mapping[str, str] | None = None) -> Any:
    """An inference session of the graph at ``path`` on the CPU provider, all cores.

    ``config`` are onnxruntime's session configuration entries. Raises :class:`InputError` if
    onnxruntime does not take the file.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = os.cpu_count() or 1
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        first = str(error).splitlines()[0]
        raise InputError(f"onnxruntime does not load {path}: {first}") from None


class OrtDecoder:
    """A decoder graph in ONNX Runtime, its KV cache handed in and out as arrays.

    The cache inputs are taken from the session in order; which layer each belongs to is read from
    the model's metadata, or is its number where there is none.
    """

    def __init__(self, path: Path, config: Mapping[str, str] | None = None) -> None:
        self.session = session(path, config)
        names = [i.name for i in self.session.get_inputs()]
        self.input_names = set(names)
        self.past_inputs = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
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

    def empty_past(self, batch: int) -> list[KV]:
        shapes = [(batch, i.shape[1], 0, i.shape[3]) for i in self.past_inputs]
        arrays = [np.zeros(shape, dtype=np.float32) for shape in shapes]
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def feeds(self, ids: I64, mask: I64, positions: I64, past: Sequence[KV]) -> dict[str, Any]:
        """The session's inputs by name; inputs that the graph does not have are left out."""
        flat = [array for pair in past for array in pair]
        feeds: dict[str, Any] = dict(zip(self.past_names, flat, strict=True))
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            if name in self.input_names:
                feeds[name] = value
        return feeds

    def __call__(
        self, input_ids: I64, attention_mask: I64, position_ids: I64, past: Sequence[KV]
    ) -> DecoderOutput:
        feeds = self.feeds(input_ids, attention_mask, position_ids, past)
        logits, *kv = self.session.run(self.output_names, feeds)
        return DecoderOutput(logits, tuple(zip(kv[::2], kv[1::2], strict=True)))


def run_taps(path: Path, names: Sequence[str], inputs: Mapping[str, I64]) -> dict[str, F32]:
    """Inner tensors ``names`` of the decoder graph at ``path``, run on ``inputs`` with an empty cache."""
    from nbl_export.graph.io import with_outputs

    wanted = list(dict.fromkeys(names))
    with with_outputs(path, wanted) as tapped:
        decoder = OrtDecoder(tapped)
        ids = inputs["input_ids"]
        feeds = decoder.feeds(
            ids, inputs["attention_mask"], inputs["position_ids"], decoder.empty_past(len(ids))
        )
        return dict(zip(wanted, decoder.session.run(wanted, feeds), strict=True))
