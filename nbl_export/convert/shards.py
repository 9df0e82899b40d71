"""Weights in safetensors files of a size, and the index that says which file has which."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.batch.arrays import F32
from nbl_export.errors import InputError
from nbl_export.files import atomic_path, write_json

if TYPE_CHECKING:
    import torch

_SHARD = 1 << 30  # bytes of one file of weights


class Shards:
    """The files of weights in ``folder``, one after the other, so that memory has one of them, and their index.

    Weights are in a ``dtype`` of torch such as ``float16``; ``made_by`` is what a file says it is of (``pt``, ``mlx``).
    """

    def __init__(self, folder: Path, dtype: str, made_by: str) -> None:
        self._folder, self._dtype, self._made_by = folder, dtype, made_by
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = self._total = 0
        self._names: list[list[str]] = []

    def add(self, name: str, value: F32) -> None:
        """Add a weight; raises :class:`InputError` for numbers that the dtype does not have."""
        import torch

        from nbl_export.models.weights import all_finite

        tensor = torch.tensor(value, dtype=getattr(torch, self._dtype))
        if not all_finite(tensor):
            raise InputError(f"{name} has numbers that {self._dtype} does not have: use --precision bf16.")
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > _SHARD:
            self._write()
        self._held[name] = tensor
        self._bytes += size
        self._total += size

    def _path(self, number: int) -> Path:
        return self._folder / f"model-{number + 1:05}.safetensors"

    def _write(self) -> None:
        from safetensors.torch import save_file

        with atomic_path(self._path(len(self._names))) as temporary:
            save_file(self._held, temporary, metadata={"format": self._made_by})
        self._names.append(list(self._held))
        self._held, self._bytes = {}, 0

    def finish(self) -> list[Path]:
        """Write what is left, and the index; returns all files."""
        self._write()
        index = self._folder / "model.safetensors.index.json"
        places = {name: self._path(n).name for n, names in enumerate(self._names) for name in names}
        write_json(index, {"metadata": {"total_size": self._total}, "weight_map": places})
        return [*(self._path(n) for n in range(len(self._names))), index]
