"""A decoder graph with a prompt to time: inputs and KV cache stay bound on the device (I/O binding).

The cache of the timed decode step is filled by a real prefill. A growing cache is bound as the runtime returned
it; if the graph can write it in place, one buffer is bound as past and as present at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.names import NUM_LOGITS_TO_KEEP, WRITE_INDICES
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.session import require_onnxruntime

_TOKENS = 32  # distinct tokens in a timed prompt; every vocabulary has these ids


def timed_row(context: int) -> NDArray[np.int32]:
    """A prompt of ``context`` tokens to time."""
    return (np.arange(context) % _TOKENS).astype(np.int32)


class OrtPrompt:
    """A graph in a session with ``batch`` prompts of ``context`` tokens; an in-place cache has ``room`` more slots."""

    def __init__(self, model: OrtModel, context: int, room: int, device: str = "cpu", batch: int = 1) -> None:
        self.model, self.device = model, device
        # The past input for each present output.
        self._pairs = dict(zip(model.interface.present_names, model.past_names, strict=True))
        # A state is read after it is written, so it has a buffer of its own.
        self._kv = {name for entry in model.interface.cache for name in entry.present}
        one = np.ones((batch, 1), dtype=np.int64)
        ids = one * timed_row(context).astype(np.int64)
        prefill = {"input_ids": ids, "position_ids": one * np.arange(context, dtype=np.int64)}
        step = {"input_ids": one, "position_ids": one * context}
        if model.interface.static:
            prefill[WRITE_INDICES], step[WRITE_INDICES] = one[:, 0] * 0, one[:, 0] * context
        else:
            prefill["attention_mask"] = np.ones_like(ids)
            step["attention_mask"] = np.ones((batch, context + 1), dtype=np.int64)
        # Generation needs the logits of the last position only.
        prefill[NUM_LOGITS_TO_KEEP] = step[NUM_LOGITS_TO_KEEP] = np.array(1, dtype=np.int64)
        self.step_inputs = step
        # What is bound lies in the memory of NumPy's arrays, which not every release of onnxruntime keeps alive.
        self._bound: list[Any] = []
        length = context + room if model.interface.in_place else 0
        empty = model.interface.empty_cache(batch, length, model.cache_dtype)
        self._prefill = self._bind(prefill, {name: self._on_device(array) for name, array in empty.items()})
        self._step: Any = None
        self.past: dict[str, Any] = {}

    def prefill(self) -> None:
        """Run the prompt from an empty cache, and bind the cache that it fills."""
        self._run(self._prefill)
        if not self.past:
            outputs = dict(zip(self.model.output_names, self._prefill.get_outputs(), strict=True))
            self.past = {past: outputs[present] for present, past in self._pairs.items()}
            self._step = self._bind(self.step_inputs, self.past)

    def rewind(self) -> None:
        """Restore the cache as filled by the prompt; nothing to do, since steps do not advance it."""

    def step(self) -> None:
        """Run one token after the prompt; the cache does not advance, so every step costs the same."""
        self._run(self._step)

    def memory_bytes(self) -> int:
        """Bytes of the filled cache."""
        return sum(int(np.prod(v.shape())) for v in self.past.values()) * self.model.cache_dtype.itemsize

    def _bind(self, inputs: Mapping[str, Any], past: Mapping[str, Any]) -> Any:
        binding = self.model.session.io_binding()
        asked = {name: array for name, array in inputs.items() if name == NUM_LOGITS_TO_KEEP}
        for name, array in {**self.model.interface.named(inputs), **asked}.items():
            if name in self.model.interface.inputs:
                self._bound.append(value := self._on_device(array))
                binding.bind_ortvalue_input(name, value)
        for name, value in past.items():
            self._bound.append(value)
            binding.bind_ortvalue_input(name, value)
        for name in self.model.output_names:
            if self.model.interface.in_place and name in self._kv:
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
