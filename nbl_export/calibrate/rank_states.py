"""The states that several processes keep between two blocks, from which any number of processes goes on.

Each process writes those of its own batches, all before the same part of the model:

    states.007.0-of-2.safetensors    batches 0, 2, 4 … before part 7
    states.007.1-of-2.safetensors    batches 1, 3, 5 …

Those before an earlier part are deleted when all have written theirs, so that a process that is killed while it writes
takes nothing from the others.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nbl_export.checkpoint import Checkpoint
from nbl_export.errors import InputError
from nbl_export.files import parse_json
from nbl_export.ranks import Ranks
from nbl_export.tensorfile import StoredTensors, open_tensors, save_tensors

_FORMAT = "nbl-export/rank-states/1"
_NAME = re.compile(r"states\.(\d+)\.\d+-of-\d+\.safetensors")
_DAMAGED = "begin anew"


class RankStates:
    """The states of a calibration of this ``identity``, beside its ``checkpoint``, as often as that is written.

    Nothing is kept without a checkpoint, or where not all machines see its folder.
    """

    def __init__(self, checkpoint: Checkpoint | None, ranks: Ranks, identity: Mapping[str, str]) -> None:
        self._checkpoint, self._ranks, self._identity = checkpoint, ranks, dict(identity)
        self._saved_at = time.monotonic()

    def save(self, part: int, states: Callable[[], Mapping[int, NDArray[Any]]] | None) -> None:
        """Keep the ``states`` of this process before ``part``, by the number of their batch, if a save is due.

        Nothing is kept if a process has more of them than fits in memory: then it has None.
        """
        if self._checkpoint is None or self._ranks.count == 1 or not self._ranks.shared(self._is_due):
            return
        ranks, folder = self._ranks, self._checkpoint.path.parent
        # A machine may not see the output folder.
        if not all(ranks.each(lambda: states is not None and folder.parent.is_dir())):
            return
        assert states is not None
        path = folder / f"states.{part:03}.{ranks.rank}-of-{ranks.count}.safetensors"
        about = json.dumps({**self._identity, "part": part}, sort_keys=True)
        tensors = {str(batch): array for batch, array in states().items()}
        ranks.each(lambda: save_tensors(path, _FORMAT, tensors, {"nbl": about}))
        if ranks.first:
            keep = f".{part:03}.", f"-of-{ranks.count}.safetensors"
            others = (p for p in self._files() if not (keep[0] in p.name and p.name.endswith(keep[1])))
            for other in (*others, self._checkpoint.path):  # a checkpoint of one process is an older one
                other.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def find(self, batches: int) -> tuple[int, dict[int, Path]] | None:
        """The latest part that has states of all ``batches`` before it, and the file of each; None if there is none."""
        return self._ranks.shared(lambda: self._find(batches))

    def load(self, files: Mapping[int, Path], mine: Sequence[int]) -> dict[int, NDArray[Any]]:
        """The states of the batches ``mine``; raises :class:`InputError` if one is not there any more."""
        opened = {path: self._opened(path)[1] for path in {files[batch] for batch in mine}}
        return {batch: opened[files[batch]][str(batch)] for batch in mine}

    def _is_due(self) -> bool:
        assert self._checkpoint is not None
        return time.monotonic() - self._saved_at > self._checkpoint.every_seconds

    def _files(self) -> list[Path]:
        folder = self._checkpoint.path.parent if self._checkpoint else None
        return sorted(p for p in folder.glob("states.*") if _NAME.fullmatch(p.name)) if folder else []

    def _find(self, batches: int) -> tuple[int, dict[int, Path]] | None:
        found: dict[int, dict[int, Path]] = {}
        for path in self._files():
            try:
                part, tensors = self._opened(path)
            except InputError:
                continue
            found.setdefault(part, {}).update((int(name), path) for name in tensors if name.isdecimal())
        whole = [part for part, files in found.items() if set(files) == set(range(batches))]
        return (max(whole), found[max(whole)]) if whole else None

    def _opened(self, path: Path) -> tuple[int, StoredTensors]:
        """The part and the states of a file; raises :class:`InputError` if it is damaged, or of something else."""
        tensors, header = open_tensors(path, _FORMAT, _DAMAGED)
        try:
            about = parse_json(header["nbl"])
            part = about.pop("part")
        except (ValueError, KeyError, TypeError, AttributeError):
            part, about = -1, None
        if about != self._identity or type(part) is not int or part < 0:
            raise InputError(f"{path} is of something else: {_DAMAGED}.")
        return part, tensors
