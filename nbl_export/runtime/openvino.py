"""OpenVINO as a :class:`~nbl_export.runtime.stream.Stream`: all rows are one batch on the CPU, padded on the left.

Products and the cache are float32, so that what is compared is the file and not a shortened cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.batch.arrays import BOOL, F32, I64
from nbl_export.batch.names import MASK, POSITIONS, SIDES, TOKENS
from nbl_export.errors import BuildError
from nbl_export.packages import missing
from nbl_export.runtime.stream import KV, LeftPadded

PACKAGE, TOKENIZERS_PACKAGE = "openvino", "openvino-tokenizers"
# The model's file as openvino-genai calls it, the tokenizers', and the input that picks rows.
FILE, BEAMS = "openvino_model.xml", "beam_idx"
TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
# Where the file says which layers of the model have keys and values, in the order of its states.
KV_LAYERS = ("nbl_export", "kv_layers")
_F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def require_openvino() -> Any:
    """OpenVINO; raises :class:`MissingDependencyError` without it."""
    try:
        import openvino
    except ImportError:
        raise missing(PACKAGE, "The form for OpenVINO") from None
    return openvino


@cache
def cpu() -> Any:
    """OpenVINO's core for what runs on the CPU: one, for as long as this process lives.

    Its plugin sets the stack of signal handlers when it is loaded, and back to what it found when its core goes. Of two
    that go in the order in which they came, the second leaves the freed stack of the first, and the next Ctrl-C is a
    segmentation fault (OpenVINO 2026.4).
    """
    ov = require_openvino()
    with suppress(ImportError):  # a core made after it has the operators of tokenizers
        import openvino_tokenizers  # noqa: F401
    return ov.Core()


class OpenVinoStream(LeftPadded):
    """The folder at ``path``; with ``defaults`` its products and its cache are what OpenVINO chooses, and a prefill has
    the last logits alone: to be timed, not compared.

    Raises :class:`BuildError` for a folder that OpenVINO does not load.
    """

    def __init__(self, path: Path, defaults: bool = False) -> None:
        core = cpu()
        try:
            model = core.read_model(path / FILE)
            if defaults:
                _last_logits_alone(model)
            compiled = core.compile_model(model, "CPU", {} if defaults else _F32)
        except Exception as error:  # of any kind, in C++
            raise BuildError(f"OpenVINO does not load {path}: {last_line(error)}.") from error
        told = str(model.get_rt_info(list(KV_LAYERS)).value) if model.has_rt_info(list(KV_LAYERS)) else ""
        self.kv_layers = tuple(map(int, told.split(","))) if told else ()
        self._names = {port.any_name for port in compiled.inputs}
        self._request = compiled.create_infer_request()

    def _empty(self, rows: int) -> None:
        self._request.reset_state()

    def _run(self, ids: I64, num_logits: int = 0) -> F32:
        given = {
            TOKENS: ids,
            MASK: self._mask,
            POSITIONS: self._positions,
            BEAMS: np.arange(len(ids), dtype=np.int32),
        }
        found = self._request.infer({name: value for name, value in given.items() if name in self._names})
        return np.array(found[0])

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        states = {state.name: np.array(state.state.data) for state in self._request.query_state()}
        layers = range(len(self.kv_layers or ()))
        pairs = [[f"past_key_values.{n}.{side}present.{n}.{side}" for side in SIDES] for n in layers]
        return [tuple(states[name] for name in pair) for pair in pairs], self._mask.astype(bool)


def _last_logits_alone(model: Any) -> None:
    """Have logits computed of the last token alone, as openvino-genai does when it loads a folder."""
    from openvino import opset13 as ops

    node = model.outputs[0].node
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input(0).get_source_output()
    first, end, step, axis = (ops.constant([n], np.int64) for n in (-1, np.iinfo(np.int64).max, 1, 1))
    node.input(0).replace_source_output(ops.slice(hidden, first, end, step, axis).output(0))
    model.validate_nodes_and_infer_types()


def last_line(error: Exception) -> str:
    """Why OpenVINO failed: its sentence stands below the places in its source."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def tokenize(path: Path, text: str) -> list[int]:
    """The tokens of ``text`` by the tokenizer in the folder at ``path``, with those that stand around every text.

    Raises :class:`MissingDependencyError` without openvino-tokenizers.
    """
    require_openvino()
    if not find_spec(TOKENIZERS_PACKAGE.replace("-", "_")):
        raise missing(TOKENIZERS_PACKAGE, "The tokenizer for OpenVINO")
    found = cpu().compile_model(path / TOKENIZERS[0], "CPU")([text])
    return [int(token) for token in found[TOKENS][0]]
