"""llama.cpp as a :class:`~nbl_export.runtime.stream.Stream`: each row is a sequence of one context on the CPU.

Keys and values are kept in float32, so that what is compared is the file and not a shortened cache. The library comes
with the package llama-cpp-py-sync.
"""

from __future__ import annotations

import os
import re
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

PACKAGE = "llama-cpp-py-sync"
_BATCH = 256  # tokens of one call


def require_llama_cpp() -> tuple[Any, Any]:
    """The library and what makes its structures; raises :class:`MissingDependencyError` without it."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError:
        raise missing(PACKAGE, "Running a GGUF file") from None
    return get_lib(), get_ffi()


class LlamaCppStream(Stream):
    """The GGUF file ``path`` in a context for ``rows`` sequences of ``length`` tokens each. Close it, or use it in a
    ``with`` statement. With ``fused`` attention its cache is as small as the file allows, and its products are float16.
    With ``defaults`` attention, cache and batches are what llama.cpp chooses: to be timed, not compared.

    Raises :class:`BuildError` for a file that llama.cpp does not load. It does not show its cache.
    """

    def __init__(
        self, path: Path, rows: int, length: int, fused: bool = False, defaults: bool = False
    ) -> None:
        self._lib, self._ffi = require_llama_cpp()
        lib, ffi = self._lib, self._ffi
        self._said: list[str] = []
        # Kept as long as the library may call it.
        self._log = ffi.callback("void(enum ggml_log_level, const char *, void *)", self._listen)
        lib.llama_log_set(self._log, ffi.NULL)
        lib.llama_backend_init()
        self._context = ffi.NULL
        asked = lib.llama_model_default_params()
        asked.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(path), asked)
        if self._model == ffi.NULL:
            raise BuildError(f"llama.cpp does not load {path}: {self._why()}.")
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self._width = lib.llama_vocab_n_tokens(self._vocabulary)
        wanted = lib.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = rows * length, rows
        wanted.n_threads = wanted.n_threads_batch = cores()
        if not defaults:
            wanted.n_batch = wanted.n_ubatch = _BATCH
            wanted.flash_attn_type = (
                lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if fused else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
            wanted.type_k = wanted.type_v = lib.GGML_TYPE_F32
        self._batch = int(wanted.n_batch)
        self._context = lib.llama_init_from_model(self._model, wanted)
        if self._context == ffi.NULL:
            self.close()
            raise BuildError(f"llama.cpp has no room for {rows} rows of {length} tokens: {self._why()}.")
        self._lengths: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model."""
        if self._context != self._ffi.NULL:
            self._lib.llama_free(self._context)
        if self._model != self._ffi.NULL:
            self._lib.llama_model_free(self._model)
        self._context = self._model = self._ffi.NULL

    def _listen(self, _level: Any, text: Any, _data: Any) -> None:
        self._said.append(self._ffi.string(text).decode(errors="replace"))

    def _why(self) -> str:
        """The last error that the library said."""
        lines = [
            line.strip() for line in "".join(self._said).splitlines() if "error" in line or "fail" in line
        ]
        return (lines[0] if lines else "it does not say why").rstrip(".")

    @property
    def cache_bytes(self) -> int:
        """The bytes of keys and values that the context has, as the library says."""
        sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(self._said))
        return round(sum(map(float, sizes)) * 2**20)

    @property
    def slots(self) -> int:
        """The tokens that each layer's cache has room for."""
        return int(self._lib.llama_n_ctx(self._context))

    def _begin(self, rows: Sequence[NDArray[Any]]) -> None:
        """Have an empty cache for ``rows``."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._lengths = [0] * len(rows)

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._begin(rows)
        return np.concatenate([self._read([n] * len(row), row) for n, row in enumerate(rows)])

    def prefill_last(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._begin(rows)
        found = []
        for n, row in enumerate(rows):
            for first in range(0, len(row), self._batch):
                some = row[first : first + self._batch]
                last = np.arange(first, first + len(some)) == len(row) - 1
                found.append(self._pass([n] * len(some), some, last))
        return np.concatenate(found)

    def forget(self, length: int) -> None:
        """Have of each row its first ``length`` tokens alone."""
        memory = self._lib.llama_get_memory(self._context)
        for n in range(len(self._lengths)):
            self._lib.llama_memory_seq_rm(memory, n, length, -1)
            self._lengths[n] = length

    def decode(self, tokens: Sequence[int]) -> F32:
        return self._read(range(len(tokens)), tokens)

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return (), np.zeros((len(self._lengths), 0), dtype=bool)

    def _read(self, owners: Sequence[int], tokens: Sequence[int] | NDArray[Any]) -> F32:
        """Logits [tokens, vocab] of ``tokens``, each of which goes on the row that is its owner."""
        parts = []
        for first in range(0, len(tokens), self._batch):
            some = slice(first, first + self._batch)
            parts.append(self._pass(owners[some], tokens[some]))
        return np.concatenate(parts)

    def _pass(
        self,
        owners: Sequence[int],
        tokens: Sequence[int] | NDArray[Any],
        wanted: NDArray[np.bool_] | None = None,
    ) -> F32:
        """Logits [tokens, vocab] of ``tokens``, or of those that are ``wanted``."""
        lib, count = self._lib, len(tokens)
        said = np.ones(count, bool) if wanted is None else wanted
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for n, (owner, token) in enumerate(zip(owners, tokens, strict=True)):
                batch.token[n], batch.pos[n] = int(token), self._lengths[owner]
                batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, owner, int(said[n])
                self._lengths[owner] += 1
            if code := lib.llama_decode(self._context, batch):
                raise BuildError(
                    f"llama.cpp does not run the file (llama_decode returns {code}): {self._why()}."
                )
            rows = int(said.sum())
            logits = self._ffi.buffer(lib.llama_get_logits(self._context), 4 * rows * self._width)
            return np.frombuffer(logits, np.float32).reshape(rows, self._width).copy()
        finally:
            lib.llama_batch_free(batch)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The tokens of ``text``, with those that the file says stand around every text if ``special``."""
        data = text.encode()
        room = len(data) + 8
        found = self._ffi.new("llama_token[]", room)
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), found, room, special, False)
        return [int(token) for token in found[0 : max(count, 0)]]


def quantize(source: Path, target: Path, form: str, kept: Sequence[str] = ()) -> None:
    """Write the GGUF file ``source`` to ``target`` by llama.cpp's quantizer, in a format such as ``Q4_K_M``.

    The matrices named ``kept`` are float16. Raises :class:`BuildError` if it fails, :class:`MissingDependencyError`
    without the library.
    """
    lib, ffi = require_llama_cpp()
    said: list[str] = []
    log = ffi.callback(
        "void(enum ggml_log_level, const char *, void *)",
        lambda _level, text, _data: said.append(ffi.string(text).decode(errors="replace")),
    )
    lib.llama_log_set(log, ffi.NULL)
    lib.llama_backend_init()
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
        why = next((line.strip() for line in reversed(said) if line.strip()), "it does not say why")
        raise BuildError(f"llama.cpp does not quantize {source.name}: {why[:300]}.")
