"""Keep the states of each batch of rows between two blocks of a model: in memory, in files, or for several processes.

A batch that has passed the part of the model at hand has its states after it, the others those before it. On disk there
are two sides: states before a part are read from one and those after it written to the other, and with the next part
they change places. So what a checkpoint of a part names is not overwritten before there is one of the next part:

    side 0 ─► part 0 ─► side 1 ─► (checkpoint) ─► part 1 ─► side 0 ─► (checkpoint) ─► part 2 …
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from nbl_export.errors import InputError
from nbl_export.files import open_data, sync
from nbl_export.ranks import on_this_machine

if TYPE_CHECKING:
    import torch


import json
import re
import time
from collections.abc import Callable, Sequence

from nbl_export.checkpoint import Checkpoint
from nbl_export.files import parse_json
from nbl_export.ranks import Ranks
from nbl_export.tensorfile import StoredTensors, open_tensors, save_tensors

# A checkpoint is written from a copy.
_COPIES = 2


class InMemory:
    """The states of ``count`` batches, in memory."""

    on_disk = False

    def __init__(self, count: int) -> None:
        self._states: list[torch.Tensor | None] = [None] * count

    def __len__(self) -> int:
        return len(self._states)

    def get(self, batch: int) -> torch.Tensor | None:
        """The states of ``batch``; None before the first part."""
        return self._states[batch]

    def put(self, batch: int, states: torch.Tensor, passed: bool = True) -> None:
        """Keep the states of ``batch``, which are those after the part if it has ``passed``."""
        self._states[batch] = states

    def after(self, batch: int) -> torch.Tensor | None:
        """The states of ``batch``, which has passed the part."""
        return self._states[batch]

    def turn(self) -> None:
        """The part is finished: what was after it is before the next one."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint has of the states."""
        return {
            f"states.{i}": as_array(states) for i, states in enumerate(self._states) if states is not None
        }

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of files."""
        return {}


class OnDisk:
    """The states of ``count`` batches in files of ``folder``, as ``like`` on whose device they are used."""

    on_disk = True

    def __init__(self, folder: Path | None, count: int, like: torch.Tensor) -> None:
        if folder is None:  # nothing is gone on from
            self._own = tempfile.TemporaryDirectory(prefix="nbl-export.")
            folder = Path(self._own.name)
        self._folder, self._like, self._count = folder, like, count
        self._side = 0  # of the states before the part
        # Shape and SHA-256 of each batch on either side.
        self._known: list[dict[int, tuple[list[int], str]]] = [{}, {}]
        self._unsynced: set[Path] = set()

    def __len__(self) -> int:
        return self._count

    def get(self, batch: int) -> torch.Tensor | None:
        if batch not in self._known[self._side]:
            return None
        return as_tensor(self._read(self._side, batch), self._like)

    def put(self, batch: int, states: torch.Tensor, passed: bool = True) -> None:
        side = 1 - self._side if passed else self._side
        array, path = np.ascontiguousarray(as_array(states)), self._path(side, batch)
        self._folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:  # unlike a mapped file, a full disk is an error and no signal
            file.write(array.data)
        self._known[side][batch] = list(array.shape), hashlib.sha256(array.data).hexdigest()
        self._unsynced.add(path)

    def turn(self) -> None:
        self._side = 1 - self._side
        self._known[1 - self._side] = {}

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {}

    def about(self) -> dict[str, Any]:
        for path in self._unsynced:
            sync(path)
        self._unsynced.clear()
        return {"side": self._side, "files": [{str(b): v for b, v in side.items()} for side in self._known]}

    def adopt(self, about: Mapping[str, Any]) -> None:
        """Take the files that a checkpoint is ``about``; raises an error if they are not as it says."""
        self._side = {0: 0, 1: 1}[about["side"]]
        known = [
            {int(b): ([int(n) for n in shape], str(digest)) for b, (shape, digest) in side.items()}
            for side in about["files"]
        ]
        self._known[0], self._known[1] = known
        for side, batches in enumerate(known):
            for batch, (_, digest) in batches.items():
                if hashlib.sha256(self._read(side, batch).data).hexdigest() != digest:
                    raise ValueError(f"the states of batch {batch}")

    def after(self, batch: int) -> torch.Tensor | None:
        """The states of ``batch`` after the part, if it has passed it."""
        known = batch in self._known[1 - self._side]
        return as_tensor(self._read(1 - self._side, batch), self._like) if known else None

    def _read(self, side: int, batch: int) -> NDArray[Any]:
        shape = self._known[side][batch][0]
        dtype = np.dtype(np.int16 if self._like.element_size() == 2 else str(self._like.dtype).split(".")[1])
        with open_data(self._path(side, batch)) as file:
            content = file.read(int(np.prod(shape)) * dtype.itemsize + 1)
        return np.frombuffer(bytearray(content), dtype).reshape(shape)

    def _path(self, side: int, batch: int) -> Path:
        return self._folder / f"{side}.{batch}.bin"


States = InMemory | OnDisk


def states_for(count: int, batch: int, like: torch.Tensor, folder: Path | None, limit: int | None) -> States:
    """Where the states of ``count`` batches of ``batch`` bytes are kept: in memory, if ``limit`` bytes are enough.

    Without a limit it is half of what is free on the device of ``like``. Files lie in ``folder``, from which a run goes
    on, or in one that goes with the process. Raises :class:`InputError` for less than what one batch takes.
    """
    if limit is not None and limit < batch:
        raise InputError(
            f"--memory {limit:,} bytes is less than the states of one batch of rows take: give {-(-batch // 1000):,}kB "
            "or more, or lower --seq-len."
        )
    allowed = _half_of_the_free(like) if limit is None else limit
    return InMemory(count) if _COPIES * count * batch <= allowed else OnDisk(folder, count, like)


def _half_of_the_free(like: torch.Tensor) -> float:
    import torch

    if like.device.type == "cpu":
        return psutil.virtual_memory().available / 2 / on_this_machine()
    return float(torch.get_device_module(like.device).mem_get_info(like.device)[0] / 2)


def as_array(states: torch.Tensor) -> NDArray[Any]:
    """``states`` as an array; NumPy has no bfloat16, so the bits of two bytes are kept as an integer."""
    import torch

    return (states.view(torch.int16) if states.element_size() == 2 else states).cpu().numpy()


def as_tensor(array: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """The states that :func:`as_array` made ``array`` of, in the dtype and on the device of ``like``."""
    import torch

    tensor = torch.from_numpy(array)
    return (tensor.view(like.dtype) if array.dtype == np.int16 else tensor).to(like.device)


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
