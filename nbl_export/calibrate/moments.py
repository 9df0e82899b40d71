"""Second moments of the activations around each attention layer, from which the fit is computed.

Let h be the residual stream at the block's input, x the input of the attention (h after the input norm) and y its
output, each a vector of d values per token. A layer has n, Σx, Σh, Σy, Σxxᵀ, Σyxᵀ, Σyyᵀ, Σhhᵀ and Σyhᵀ in float64:
5 d² values, for any number of tokens; a file has half of each symmetric one, 3.5 d². The moments of disjoint tokens
can be added.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import F64
from nbl_export.blocks import Block, as_json, block_of, from_json
from nbl_export.errors import InputError
from nbl_export.files import parse_json, sync
from nbl_export.ranks import ALONE, Ranks
from nbl_export.tensorfile import load_tensors, save_tensors

if TYPE_CHECKING:
    import torch

FORMAT = "nbl-export/moments/2"
_LAYER = "layer"
CALIBRATE_AGAIN = "run `nbl-export calibrate` again"


@dataclass(frozen=True)
class LayerMoments:
    """Raw sums over ``n`` tokens; vectors are [d], matrices [d, d], all float64.

    ``yx[i, j] = Σ y_i x_j``; ``yh`` likewise against the residual stream.
    """

    n: int
    x: F64
    h: F64
    y: F64
    xx: F64
    yx: F64
    yy: F64
    hh: F64
    yh: F64


ARRAYS = tuple(f.name for f in fields(LayerMoments) if f.name != "n")
_SYMMETRIC = ("xx", "yy", "hh")


@dataclass(frozen=True)
class Moments:
    """The moments of every block of one model over one calibration text."""

    layers: Mapping[Block, LayerMoments]


def shapes(d: int) -> dict[str, tuple[int, ...]]:
    """The shape of each array of :class:`LayerMoments` for a width of ``d``."""
    return {name: (d,) if len(name) == 1 else (d, d) for name in ARRAYS}


def file_bytes(d: int) -> int:
    """Bytes of the numbers in a file of the moments of one layer of a model of width ``d``."""
    return 8 * (3 * d + len(_SYMMETRIC) * d * (d + 1) // 2 + 2 * d * d)


class Accumulator:
    """Accumulates the moments of ``blocks`` in place, as float64 torch tensors on ``device``.

    The products are computed in float64 too: float32 products would lose the small directions of a residual
    stream whose outlier tokens have 10⁴ times the median energy.
    """

    arrays: tuple[str, ...] = ARRAYS

    def __init__(self, blocks: Iterable[Block], d: int, device: torch.device | str = "cpu") -> None:
        import torch

        every = {**{name: shape for name, shape in shapes(d).items() if name in self.arrays}, "n": (1,)}
        self.sums = {
            block: {
                name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in every.items()
            }
            for block in blocks
        }

    def add(self, block: Block, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens; ``h``, ``x``, ``y`` are [..., d] in any float dtype."""
        h, x, y = (t.reshape(-1, t.shape[-1]).double() for t in (h, x, y))
        s = self.sums[block]
        s["n"] += len(h)
        for name, rows in (("h", h), ("x", x), ("y", y)):
            s[name] += rows.sum(0)
            _add_gram(s[name * 2], rows)
        s["yx"].addmm_(y.T, x)
        s["yh"].addmm_(y.T, h)

    def broken(self) -> Block | None:
        """The first block of which an activation was NaN or infinite: the plain sums show it."""
        sums = ((block, s[name]) for block, s in self.sums.items() for name in "hxy" if name in s)
        return next((block for block, vector in sums if not bool(vector.isfinite().all())), None)

    def results(self, ranks: Ranks = ALONE) -> Iterator[tuple[Block, LayerMoments]]:
        """Each block and its moments of all ``ranks``, in the first one; its sums go."""
        for block in list(self.sums):
            sums = self.sums.pop(block)
            ranks.add_up(sums.values())
            if ranks.first:
                yield block, self.moments(block, int(sums.pop("n")), sums)

    def moments(self, block: Block, n: int, sums: Mapping[str, torch.Tensor]) -> LayerMoments:
        """The ``sums`` over ``n`` tokens as arrays; symmetric matrices are completed from their lower triangle."""
        arrays = {name: value.cpu().numpy() for name, value in sums.items()}
        for name in _SYMMETRIC:
            _complete(arrays[name])
        return LayerMoments(n, **arrays)


# A symmetric product needs only its lower triangle. torch has no syrk; row blocks of the lower triangle save three
# eighths of the multiplications and are large enough for the full GEMM rate.
_GRAM_BLOCKS = 4
_GRAM_MIN = 96


def _complete(matrix: F64) -> None:
    """Set the upper triangle to the lower one in place: a copy would be as large again."""
    for i in range(1, len(matrix)):
        matrix[:i, i] = matrix[i, :i]


def _add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    d = rows.shape[1]
    step = max(_GRAM_MIN, -(-d // _GRAM_BLOCKS))
    for start in range(0, d, step):
        stop = min(start + step, d)
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def _whole(lower: F64, d: int) -> F64:
    """The symmetric matrix [d, d] of a lower triangle, which is given row after row."""
    matrix = np.empty((d, d))
    for i in range(d):
        matrix[i, : i + 1] = lower[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2]
    _complete(matrix)
    return matrix


def save_layer(path: Path, index: Block, layer: LayerMoments, metadata: Mapping[str, Any]) -> None:
    """Write the moments of layer ``index`` with JSON ``metadata``, which say what they are of, atomically."""
    tensors: dict[str, Any] = {"n": np.array([layer.n], dtype=np.int64)}
    arrays = {name: getattr(layer, name) for name in ARRAYS}
    tensors |= {n: a[np.tri(len(a), dtype=bool)] if n in _SYMMETRIC else a for n, a in arrays.items()}
    about = json.dumps({**metadata, _LAYER: as_json(index)}, sort_keys=True)
    save_tensors(path, FORMAT, tensors, {"nbl": about})


def load_layer(path: Path) -> tuple[Block, LayerMoments, dict[str, Any]]:
    """Index, moments and metadata as :func:`save_layer` wrote them; raises :class:`InputError` for anything else."""
    tensors, header = load_tensors(path, FORMAT, CALIBRATE_AGAIN)
    metadata = parse_json(header["nbl"])
    index, d = from_json(metadata.pop(_LAYER)), len(tensors["x"])
    arrays = {name: _whole(tensors[name], d) if name in _SYMMETRIC else tensors[name] for name in ARRAYS}
    return index, LayerMoments(int(tensors["n"][0]), **arrays), metadata


def layer_file(folder: Path, index: Block) -> Path:
    """Where a folder of moments has those of ``index``: numbers have three digits, for the order of layers."""
    return folder / f"{re.sub('[0-9]+', lambda number: number[0].zfill(3), str(index))}.safetensors"


def load_moments(path: Path) -> tuple[Moments, dict[str, Any]]:
    """The moments in a folder, or in one file of it, and their metadata; a layer is read when it is asked for.

    Raises :class:`InputError` for anything else, and for a layer of other moments than the first.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} has no moments: {CALIBRATE_AGAIN}.")
    index, _, metadata = load_layer(files[0])
    found = {index: files[0]}
    for file in files[1:]:
        with suppress(ValueError):  # a file of somebody else
            found[block_of(re.sub("0*([0-9]+)", r"\1", file.stem))] = file
    return Moments(_StoredLayers({i: found[i] for i in sorted(found)}, metadata)), metadata


class _StoredLayers(Mapping[Block, LayerMoments]):
    """The moments of a layer, read from its file at each access: all of a large model's would exceed memory."""

    def __init__(self, files: Mapping[Block, Path], metadata: Mapping[str, Any]) -> None:
        self._files, self._metadata = dict(files), dict(metadata)

    def __getitem__(self, index: Block) -> LayerMoments:
        path = self._files[index]
        found, layer, metadata = load_layer(path)
        if found != index or metadata != self._metadata:
            raise InputError(f"{path} is of other moments than those beside it: {CALIBRATE_AGAIN}.")
        return layer

    def __iter__(self) -> Iterator[Block]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class MomentsFolder:
    """Keeps the moments in ``folder``, in ``partial`` until all are there, with ``metadata`` that say what they are of.

    A file with other metadata, or a damaged one, is of another run and is written again.
    """

    def __init__(self, folder: Path, partial: Path, metadata: Mapping[str, Any]) -> None:
        self._folder, self._partial, self._metadata = folder, partial, dict(metadata)
        self._indices: set[Block] = set()

    def has(self, index: Block) -> bool:
        """Whether the moments of ``index`` are there from an earlier run."""
        # A run that ended while it moved its files has some in either folder.
        for place in (self._partial, self._folder):
            with suppress(InputError):
                found, _, metadata = load_layer(layer_file(place, index))
                if (found, metadata) == (index, self._metadata):
                    self._indices.add(index)
                    return True
        return False

    def put(self, index: Block, layer: LayerMoments) -> None:
        """Keep the moments of ``index``."""
        self._partial.mkdir(exist_ok=True)
        save_layer(layer_file(self._partial, index), index, layer, self._metadata)
        self._indices.add(index)

    def publish(self) -> list[Path]:
        """Move the files to their folder, which then has no others; returns them in the order of the layers."""
        files = [layer_file(self._folder, index) for index in sorted(self._indices)]
        self._folder.mkdir(exist_ok=True)
        for path in files:
            if (made := self._partial / path.name).is_file():
                made.replace(path)
        for other in set(self._folder.glob("*.safetensors")).difference(files):
            other.unlink()
        sync(self._folder)
        shutil.rmtree(self._partial, ignore_errors=True)
        return files


def digest_of_tokens(tokens: NDArray[Any]) -> str:
    """SHA-256 of token ids or pixels with their shape, which identifies the calibration data."""
    return hashlib.sha256(str(tokens.shape).encode() + np.ascontiguousarray(tokens).tobytes()).hexdigest()
