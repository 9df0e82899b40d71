"""llama.cpp, OpenVINO and mlx-lm as a :class:`~nbl_export.runtime.stream.Stream`, on the CPU.

Products and the cache of llama.cpp and OpenVINO are float32, so that what is compared is the file and not a shortened
cache. llama.cpp comes with the package llama-cpp-py-sync.
"""

from __future__ import annotations

import importlib
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import BOOL, F32, I64, MASK, POSITIONS, SIDES, TOKENS
from nbl_export.errors import BuildError, first_line
from nbl_export.machine import cores
from nbl_export.packages import missing
from nbl_export.runtime.stream import KV, LeftPadded, RowStream, Stream

_BATCH = 256  # tokens of one call


def require_llama_cpp() -> tuple[Any, Any]:
    """The library and what makes its structures; raises :class:`MissingDependencyError` without it."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError:
        raise missing("llama-cpp-py-sync", "Running a GGUF file") from None
    return get_lib(), get_ffi()


class _Log:
    """What the library says from now on. It is kept as long as the library may call it."""

    def __init__(self) -> None:
        lib, ffi = require_llama_cpp()
        self.said: list[str] = []
        self._call = ffi.callback(
            "void(enum ggml_log_level, const char *, void *)",
            lambda _level, text, _data: self.said.append(ffi.string(text).decode(errors="replace")),
        )
        lib.llama_log_set(self._call, ffi.NULL)
        lib.llama_backend_init()

    @property
    def why(self) -> str:
        """The first line that speaks of a failure, or the last one."""
        lines = [line.strip() for line in "".join(self.said).splitlines() if line.strip()]
        failed = [line for line in lines if "error" in line or "fail" in line]
        return (failed or lines[::-1] or ["it does not say why"])[0].rstrip(".")[:300]


class LlamaCppStream(Stream):
    """The GGUF file ``path`` in a context for ``rows`` sequences of ``length`` tokens each. Close it, or use it in a
    ``with`` statement. With ``fused`` attention its cache is as small as the file allows, and its products are float16.
    With ``defaults`` attention, cache and batches are what llama.cpp chooses: to be timed, not compared.

    Raises :class:`BuildError` for a file that llama.cpp does not load. It does not show its cache.
    """

    def __init__(
        self, path: Path, rows: int, length: int, fused: bool = False, defaults: bool = False
    ) -> None:
        (lib, ffi), self._log = require_llama_cpp(), _Log()
        self._lib, self._ffi = lib, ffi
        asked = lib.llama_model_default_params()
        asked.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(path), asked)
        if self._model == ffi.NULL:
            raise BuildError(f"llama.cpp does not load {path}: {self._log.why}.")
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self._width = lib.llama_vocab_n_tokens(self._vocabulary)
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = rows * length, rows
        wanted.n_threads = wanted.n_threads_batch = cores()
        if not defaults:
            wanted.n_batch = wanted.n_ubatch = _BATCH
            attention = "ENABLED" if fused else "DISABLED"
            wanted.flash_attn_type = getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{attention}")
            wanted.type_k = wanted.type_v = lib.GGML_TYPE_F32
        self._batch = int(wanted.n_batch)
        self._context = lib.llama_init_from_model(self._model, wanted)
        if self._context == ffi.NULL:
            lib.llama_model_free(self._model)
            raise BuildError(f"llama.cpp has no room for {rows} rows of {length} tokens: {self._log.why}.")
        self.close = weakref.finalize(self, _free, lib, self._context, self._model)
        self._lengths: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def memory_bytes(self) -> int:  # type: ignore[override]  # as the library says it
        """The bytes of keys and values that the context has."""
        sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(self._log.said))
        return round(sum(map(float, sizes)) * 2**20)

    @property
    def slots(self) -> int:
        """The tokens that each layer's cache has room for."""
        return int(self._lib.llama_n_ctx(self._context))

    def prefill(self, rows: Sequence[NDArray[Any]], last: bool = False) -> F32:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._lengths = [0] * len(rows)
        return np.concatenate([self._read([n] * len(row), row, last) for n, row in enumerate(rows)])

    def prefill_last(self, rows: Sequence[NDArray[Any]]) -> F32:
        return self.prefill(rows, last=True)

    def rewind(self, length: int) -> bool:
        memory = self._lib.llama_get_memory(self._context)
        for n in range(len(self._lengths)):
            self._lib.llama_memory_seq_rm(memory, n, length, -1)
        self._lengths = [length] * len(self._lengths)
        return True

    def decode(self, tokens: Sequence[int]) -> F32:
        return self._read(range(len(tokens)), tokens)

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return (), np.zeros((len(self._lengths), 0), dtype=bool)

    def _read(self, owners: Sequence[int], tokens: Sequence[int] | NDArray[Any], last: bool = False) -> F32:
        """Logits [tokens, vocab] of ``tokens``, each on the row that is its owner; or the last ones alone."""
        lib, count, parts = self._lib, len(tokens), []
        for first in range(0, count, self._batch):
            some = range(first, min(first + self._batch, count))
            wanted = [n for n in some if not last or n == count - 1]
            batch = lib.llama_batch_init(len(some), 0, 1)
            try:
                batch.n_tokens = len(some)
                for place, n in enumerate(some):
                    owner = owners[n]
                    batch.token[place], batch.pos[place] = int(tokens[n]), self._lengths[owner]
                    batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, owner, n in wanted
                    self._lengths[owner] += 1
                if code := lib.llama_decode(self._context, batch):
                    why = f"(llama_decode returns {code}): {self._log.why}"
                    raise BuildError(f"llama.cpp does not run the file {why}.")
                size = 4 * len(wanted) * self._width
                logits = self._ffi.buffer(lib.llama_get_logits(self._context), size)
                parts.append(np.frombuffer(logits, np.float32).reshape(-1, self._width).copy())
            finally:
                lib.llama_batch_free(batch)
        return np.concatenate(parts)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The tokens of ``text``, with those that the file says stand around every text if ``special``."""
        data = text.encode()
        room = len(data) + 8
        found = self._ffi.new("llama_token[]", room)
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), found, room, special, False)
        return [int(token) for token in found[0 : max(count, 0)]]


def _free(lib: Any, context: Any, model: Any) -> None:
    lib.llama_free(context)
    lib.llama_model_free(model)


def quantize(source: Path, target: Path, form: str, kept: Sequence[str] = ()) -> None:
    """Write the GGUF file ``source`` to ``target`` by llama.cpp's quantizer, in a format such as ``Q4_K_M``.

    The matrices named ``kept`` are float16. Raises :class:`BuildError` if it fails, :class:`MissingDependencyError`
    without the library.
    """
    (lib, ffi), log = require_llama_cpp(), _Log()
    asked = lib.llama_model_quantize_default_params()
    asked.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{form}")
    asked.nthread = cores()
    patterns = [ffi.new("char[]", f"^{re.escape(name)}$".encode()) for name in kept]
    # The last one, which is empty, ends them.
    overrides = ffi.new("struct llama_model_tensor_override[]", len(patterns) + 1)
    for override, pattern in zip(overrides, patterns, strict=False):
        override.pattern, override.type = pattern, lib.GGML_TYPE_F16
    asked.tt_overrides = overrides
    failed = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ffi.addressof(asked))
    lib.llama_log_set(ffi.NULL, ffi.NULL)
    if failed:
        raise BuildError(f"llama.cpp does not quantize {source.name}: {log.why}.")


# OpenVINO -----------------------------------------------------------------------------------------

PACKAGE, TOKENIZERS_PACKAGE = "openvino", "openvino-tokenizers"
# The model's file as openvino-genai calls it, the tokenizers', and the input that picks rows.
FILE, BEAMS = "openvino_model.xml", "beam_idx"
TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
# Where the file says which layers of the model have keys and values, in the order of its states.
KV_LAYERS = ("nbl_export", "kv_layers")
# What it is proven with; its defaults are shorter.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


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
                _keep_last_logits(model)
            how = {"INFERENCE_NUM_THREADS": cores()} | ({} if defaults else EXACT)
            compiled = core.compile_model(model, "CPU", how)
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


def _keep_last_logits(model: Any) -> None:
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


# mlx-lm ---------------------------------------------------------------------------------------------


def require_mlx() -> tuple[Any, Any]:
    """The array library and what loads a folder; raises :class:`MissingDependencyError` without them."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError:
        raise missing("mlx-lm", "Running an MLX folder") from None
    return mx, load_model


class MlxStream(RowStream):
    """The folder at ``path`` on the CPU. Of its tensors' names the parts in ``renamed`` are others in mlx-lm.

    Raises :class:`BuildError` for a folder that mlx-lm does not load.
    """

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None) -> None:
        self._mx, load_model = require_mlx()
        self._mx.set_default_device(self._mx.cpu)
        classes = {"get_model_classes": lambda config: _renaming(config, renamed)} if renamed else {}
        try:
            self._model, config = load_model(path, **classes)
        except Exception as error:  # its own code may raise anything
            raise BuildError(f"mlx-lm does not load {path}: {first_line(error)[:300]}.") from error
        states = [block["attention"] for block in config["block_configs"]]
        # A layer with a matrix has a place for a cache, too, which it leaves empty.
        places = [n for n, state in enumerate(states) if not state.get("no_op")]
        self.kv_layers = tuple(n for n in places if "n_heads_in_group" in states[n])

    def _empty(self) -> Any:
        return self._model.make_cache()

    def _logits(self, tokens: NDArray[Any], cache: Any) -> F32:
        ids = self._mx.array(tokens.astype(np.int32))[None]
        logits = self._model(ids, cache=cache)[0].astype(self._mx.float32)
        self._mx.eval(logits)
        return np.array(logits)

    def _sides(self, cache: Any) -> list[tuple[F32, F32]]:
        def side(array: Any, length: int) -> F32:
            return np.array(array.astype(self._mx.float32))[:, :, :length]

        kept = [one for one in cache if one.offset]
        return [(side(one.keys, one.offset), side(one.values, one.offset)) for one in kept]


def _renaming(config: Mapping[str, Any], renamed: Mapping[str, str]) -> tuple[Any, Any]:
    module: Any = importlib.import_module(f"mlx_lm.models.{config['model_type']}")

    class Renamed(module.Model):  # type: ignore[misc,name-defined]  # of a module found by its name
        def sanitize(self, weights: Mapping[str, Any]) -> Any:
            return super().sanitize({_name(key, renamed): value for key, value in weights.items()})

    return Renamed, module.ModelArgs


def _name(key: str, renamed: Mapping[str, str]) -> str:
    for other, own in renamed.items():
        key = key.replace(other, own)
    return key
