"""llama.cpp as a :class:`~nbl_export.runtime.stream.Stream`: each row is a sequence of one context on the CPU.

Keys and values are kept in float32, so that what is compared is the file and not a shortened cache. The library comes
with the package llama-cpp-py-sync.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32
from nbl_export.errors import BuildError
from nbl_export.machine import cores
from nbl_export.packages import missing
from nbl_export.runtime.stream import KV, Stream

if TYPE_CHECKING:
    from typing import Self

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

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._begin(rows)
        return np.concatenate([self._read([n] * len(row), row) for n, row in enumerate(rows)])

    def prefill_last(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._begin(rows)
        return np.concatenate([self._read([n] * len(row), row, last=True) for n, row in enumerate(rows)])

    def _begin(self, rows: Sequence[NDArray[Any]]) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._lengths = [0] * len(rows)

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
