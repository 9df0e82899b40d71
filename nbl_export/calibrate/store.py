"""Where the moments of each layer are put when they are finished: in memory, or in a folder from which a run goes on.

While a calibration runs, its files lie in a folder of their own, so that those of an earlier one stay until it is done.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nbl_export.blocks import Block
from nbl_export.calibrate.moments import ARRAYS, LayerMoments, layer_file, load_layer, save_layer, shapes
from nbl_export.checkpoint import Checkpoint
from nbl_export.errors import InputError
from nbl_export.files import sync


class Store(Protocol):
    """Takes the moments of layers in the order in which they are finished."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Where unfinished work is saved; None if it is not."""

    @property
    def scratch(self) -> Path | None:
        """The folder of what is of use only until all is put; None if nothing is gone on from."""

    def begin(self, identity: Mapping[str, str]) -> None:
        """What is put from now on is of this ``identity``: of one model in one dtype over one text."""

    def has(self, index: Block) -> bool:
        """Whether the moments of layer ``index`` are there from an earlier run."""

    def put(self, index: Block, layer: LayerMoments) -> None:
        """Keep the moments of layer ``index``."""


class InMemory:
    """Keeps the moments of every layer in memory; what is interrupted begins anew."""

    checkpoint = None
    scratch = None

    def __init__(self) -> None:
        self.layers: dict[Block, LayerMoments] = {}

    def begin(self, identity: Mapping[str, str]) -> None:
        """Nothing is there from an earlier run."""

    def has(self, index: Block) -> bool:
        return index in self.layers

    def put(self, index: Block, layer: LayerMoments) -> None:
        self.layers[index] = layer


class Unnamed(Mapping[Block, LayerMoments]):
    """Keeps the moments in a file without a name in ``folder``, which is gone with the process; reads them by layer."""

    checkpoint = None
    scratch = None

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[Block, tuple[int, int, int]] = {}

    def begin(self, identity: Mapping[str, str]) -> None:
        """Nothing is there from an earlier run."""

    def has(self, index: Block) -> bool:
        return index in self._places

    def put(self, index: Block, layer: LayerMoments) -> None:
        self._places[index] = self._file.seek(0, 2), layer.n, len(layer.x)
        for name in ARRAYS:
            self._file.write(np.ascontiguousarray(getattr(layer, name)).data)

    def __getitem__(self, index: Block) -> LayerMoments:
        place, n, d = self._places[index]
        self._file.seek(place)
        arrays = {name: np.empty(shape) for name, shape in shapes(d).items()}
        for array in arrays.values():
            self._file.readinto(array.data)  # type: ignore[attr-defined]
        return LayerMoments(n, **arrays)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class MomentsFolder:
    """Keeps the moments in ``folder``, in ``partial`` until all are there, with ``metadata`` that say what they are of.

    A file with other metadata, or a damaged one, is of another run and is written again.
    """

    def __init__(
        self, folder: Path, partial: Path, metadata: Mapping[str, Any], every_seconds: float | None = None
    ) -> None:
        self._folder, self._partial = folder, partial
        self._metadata = dict(metadata)
        states = partial / "states.safetensors"
        self.checkpoint = Checkpoint(states) if every_seconds is None else Checkpoint(states, every_seconds)
        self.scratch = partial / "states"
        self._indices: list[Block] = []

    def begin(self, identity: Mapping[str, str]) -> None:
        """Files of another ``identity`` are not of this run."""
        self._metadata["identity"] = dict(identity)

    def has(self, index: Block) -> bool:
        # A run that ended while it moved its files has some in either folder.
        found = any(self._is_ours(layer_file(place, index), index) for place in (self._partial, self._folder))
        if found:
            self._indices.append(index)
        return found

    def _is_ours(self, path: Path, index: Block) -> bool:
        if not path.is_file():
            return False
        try:
            found, _, metadata = load_layer(path)
        except InputError:
            return False
        return (found, metadata) == (index, self._metadata)

    def put(self, index: Block, layer: LayerMoments) -> None:
        self._partial.mkdir(exist_ok=True)
        save_layer(layer_file(self._partial, index), index, layer, self._metadata)
        self._indices.append(index)

    def publish(self) -> list[Path]:
        """Move the files to their folder, which then has no others; returns them in the order of the layers."""
        files = [layer_file(self._folder, index) for index in sorted(set(self._indices))]
        self._folder.mkdir(exist_ok=True)
        for path in files:
            if (made := self._partial / path.name).is_file():
                made.replace(path)
        for other in set(self._folder.glob("*.safetensors")).difference(files):
            other.unlink()
        sync(self._folder)
        shutil.rmtree(self._partial, ignore_errors=True)
        return files
