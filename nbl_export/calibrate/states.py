"""What is kept between two blocks of a model: the states of each batch of rows, in memory or in files.

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
