"""Keep the states of each batch of rows before and after the part of a model at hand: in memory, or in files.

States in files, and those that are saved from memory, are files of one form: the part before which they are is in their
name, and what calibration they are of in their header. Any number of processes goes on from the latest part of which
all batches have states, with any amount of memory.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import InputError
from nbl_export.models.weights import half_free, weights_like
from nbl_export.ranks import ALONE, Ranks
from nbl_export.tensorfile import StoredTensors, open_tensors, save_tensors

_FORMAT = "nbl-export/states/2"
_FILES = "states.*.safetensors"
# States after a part are kept beside those before it, from which an interrupted run goes on.
_SIDES = 2


class States:
    """The states of the batches with these ``numbers`` in ``model``, of at most ``values`` numbers each.

    They are in memory if ``limit`` bytes are enough for both sides of a part; without a limit that is half of what is
    free. Files lie in ``folder``, and are of this ``identity``; without one nothing is gone on from. Raises
    :class:`InputError` for a limit that is less than what one batch takes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        numbers: Sequence[int],
        values: int,
        limit: int | None = None,
        folder: Path | None = None,
        identity: Mapping[str, str] | None = None,
        ranks: Ranks = ALONE,
        every_seconds: float = 60.0,
    ) -> None:
        self._like = weights_like(model)
        size = values * self._like.element_size()
        if limit is not None and limit < size:
            raise InputError(
                f"--memory {limit:,} bytes is less than the states of one batch of rows take: give "
                f"{-(-size // 1000):,}kB or more, or lower --seq-len."
            )
        self.numbers, self.part = numbers, 0
        self._folder, self._identity, self._ranks = folder, dict(identity or {}), ranks
        self._every_seconds, self._saved_at = every_seconds, time.monotonic()
        self.on_disk = _SIDES * len(numbers) * size > (half_free(model) if limit is None else limit)
        if self.on_disk and (folder is None or ranks.count > 1):  # a machine may not see the output folder
            self._own = tempfile.TemporaryDirectory(prefix="nbl-export.")
            folder = Path(self._own.name)
        self._place = folder
        self._before: dict[int, Any] = {}
        self._after: dict[int, Any] = {}

    def get(self, number: int) -> torch.Tensor | None:
        """The states of the batch before the part; None before the first part."""
        kept = self._before.get(number)
        return self._read(kept, number) if isinstance(kept, StoredTensors) else kept

    def put(self, number: int, states: torch.Tensor) -> None:
        """Keep the states of the batch after the part."""
        if self._folder is None:
            self._before.pop(number, None)
        self._after[number] = states
        if self.on_disk:
            self._after[number] = self._written(self.part + 1, str(number), {number: states})

    def turn(self) -> None:
        """The part is finished: what was after it is before the next one."""
        self._before, self._after, self.part = self._after, {}, self.part + 1
        if self.on_disk:
            self._forget()

    def save(self, now: bool = False) -> None:
        """Keep the states before the part if a save is due, or ``now``; not where a machine does not see the folder."""
        folder, late = self._folder, time.monotonic() - self._saved_at > self._every_seconds
        if folder is None or not self.part or not self._ranks.shared(lambda: late or now):
            return
        if all(self._ranks.each(lambda: not self.on_disk and folder.parent.is_dir())):
            name = f"{self._ranks.rank}-of-{self._ranks.count}"
            self._ranks.each(lambda: self._written(self.part, name, self._before))
            if self._ranks.first:
                self._forget()
            self._saved_at = time.monotonic()

    def resume(self, count: int, most: int) -> bool:
        """Go on at the latest part up to ``most`` of which all ``count`` batches have states, if there is one.

        Raises :class:`InputError` where a process cannot read them.
        """

        def find() -> tuple[int, dict[int, Path]]:
            found: dict[int, dict[int, Path]] = {}
            for path in self._folder.glob(_FILES) if self._folder else ():
                with suppress(InputError, ValueError):
                    files = found.setdefault(_part_of(path), {})
                    files.update((int(number), path) for number in self._opened(path))
            whole = [part for part, files in found.items() if len(files) == count and part <= most]
            return (max(whole), found[max(whole)]) if whole else (0, {})

        part, files = self._ranks.shared(find)
        mine = {number: files[number] for number in self.numbers if files}
        opened: dict[Path, StoredTensors] = {}
        self._ranks.each(lambda: opened.update((path, self._opened(path)) for path in set(mine.values())))
        for number, path in mine.items():
            self._before[number] = opened[path] if self.on_disk else self._read(opened[path], number)
        self.part = part
        return bool(files)

    def _written(self, part: int, name: str, states: Mapping[int, torch.Tensor]) -> StoredTensors:
        assert self._place is not None
        self._place.mkdir(exist_ok=True)
        arrays = {str(number): _as_array(one) for number, one in states.items()}
        path = self._place / f"states.{part:03}.{name}.safetensors"
        save_tensors(path, _FORMAT, arrays, {"nbl": self._about(part)})
        return StoredTensors(path, list(arrays))

    def _about(self, part: int) -> str:
        return json.dumps({**self._identity, "part": part}, sort_keys=True)

    def _opened(self, path: Path) -> StoredTensors:
        """The states of a file; raises :class:`InputError` if it is damaged, or of something else."""
        tensors, header = open_tensors(path, _FORMAT, "begin anew")
        if header.get("nbl") != self._about(_part_of(path)):
            raise InputError(f"{path} is of something else: begin anew.")
        return tensors

    def _read(self, stored: StoredTensors, number: int) -> torch.Tensor:
        tensor = torch.from_numpy(stored[str(number)])
        return (tensor.view(self._like.dtype) if self._like.element_size() == 2 else tensor).to(
            self._like.device
        )

    def _forget(self) -> None:
        """Delete the states of other parts."""
        for path in self._place.glob(_FILES) if self._place else ():
            if _part_of(path) != self.part:
                path.unlink(missing_ok=True)


def _part_of(path: Path) -> int:
    return int(path.name.split(".")[1])


def _as_array(states: torch.Tensor) -> Any:
    """``states`` as an array; NumPy has no bfloat16, so the bits of two bytes are kept as an integer."""
    return (states.view(torch.int16) if states.element_size() == 2 else states).cpu().numpy()
