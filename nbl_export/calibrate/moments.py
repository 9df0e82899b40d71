"""Second moments of the activations around each attention layer, from which the fit is computed.

Let h be the residual stream at the block's input, x the input of the attention (h after the input norm) and y its
output, each a vector of d values per token. A layer has n, Σx, Σh, Σy, Σxxᵀ, Σyxᵀ, Σyyᵀ, Σhhᵀ and Σyhᵀ in float64:
5 d² values, for any number of tokens; a file has half of each symmetric one, 3.5 d². The moments of disjoint tokens
can be added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F64
from nbl_export.blocks import Block, Mlp, Span, as_json, block_of, from_json, layer_of, part_of
from nbl_export.errors import InputError
from nbl_export.files import parse_json
from nbl_export.ranks import Ranks
from nbl_export.tensorfile import load_tensors, save_tensors

if TYPE_CHECKING:
    import torch

FORMAT = "nbl-export/moments/2"
_LAYER = "layer"
_DIGITS = 3  # of the number of a layer in a name of a file, so that files are in the order of layers
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

    def __add__(self, other: LayerMoments) -> LayerMoments:
        return LayerMoments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


ARRAYS = tuple(f.name for f in fields(LayerMoments) if f.name != "n")
_SYMMETRIC = ("xx", "yy", "hh")


@dataclass(frozen=True)
class Moments:
    """The moments of every block of one model over one calibration text."""

    layers: Mapping[Block, LayerMoments]

    def __add__(self, other: Moments) -> Moments:
        if set(self.layers) != set(other.layers):
            raise ValueError("moments of different layers cannot be added")
        return Moments({i: self.layers[i] + other.layers[i] for i in self.layers})


def shapes(d: int) -> dict[str, tuple[int, ...]]:
    """The shape of each array of :class:`LayerMoments` for a width of ``d``."""
    return {name: (d,) if len(name) == 1 else (d, d) for name in ARRAYS}


def file_bytes(d: int) -> int:
    """Bytes of the numbers in a file of the moments of one layer of a model of width ``d``."""
    sizes = {name: shape[0] * shape[-1] if len(shape) == 2 else shape[0] for name, shape in shapes(d).items()}
    return 8 * sum(d * (d + 1) // 2 if name in _SYMMETRIC else size for name, size in sizes.items())


class Accumulator:
    """Accumulates the moments of one layer in place, as float64 torch tensors on ``device``.

    The products are computed in float64 too: float32 products would lose the small directions of a residual
    stream whose outlier tokens have 10⁴ times the median energy.
    """

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        import torch

        self.n = 0
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes(d).items()
        }

    def add(self, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens; ``h``, ``x``, ``y`` are [..., d] in any float dtype."""
        h, x, y = (t.reshape(-1, t.shape[-1]).double() for t in (h, x, y))
        s = self.sums
        self.n += h.shape[0]
        for name, rows in (("h", h), ("x", x), ("y", y)):
            s[name] += rows.sum(0)
        _add_gram(s["xx"], x)
        _add_gram(s["yy"], y)
        _add_gram(s["hh"], h)
        s["yx"].addmm_(y.T, x)
        s["yh"].addmm_(y.T, h)

    def is_finite(self) -> bool:
        """False once any activation was NaN or infinite: the plain sums show it."""
        import torch

        return all(bool(torch.isfinite(self.sums[name]).all()) for name in ("h", "x", "y"))

    def add_up(self, ranks: Ranks) -> None:
        """Have the sums of all ``ranks`` in the first one."""
        import torch

        count = torch.tensor([self.n], dtype=torch.float64, device=self.sums["x"].device)
        ranks.add_up((count, *self.sums.values()))
        self.n = int(count)

    def result(self) -> LayerMoments:
        """The moments so far, as NumPy arrays; symmetric matrices are completed from their lower triangle."""
        arrays: dict[str, Any] = {name: value.cpu().numpy().copy() for name, value in self.sums.items()}
        for name in _SYMMETRIC:
            _complete(arrays[name])
        return LayerMoments(n=self.n, **arrays)

    def restore(self, moments: LayerMoments) -> None:
        """Continue from earlier moments, bit for bit."""
        import torch

        self.n = moments.n
        for name in ARRAYS:
            self.sums[name].copy_(torch.from_numpy(getattr(moments, name)))


# A symmetric product needs only its lower triangle. torch has no syrk; row blocks of the lower triangle save three
# eighths of the multiplications and are large enough for the full GEMM rate.
_GRAM_BLOCKS = 4
_GRAM_MIN = 96


def _complete(matrix: F64) -> None:
    """Set the upper triangle to the lower one, block by block: a whole copy would be as large again."""
    d = len(matrix)
    for start in range(0, d, _GRAM_MIN):
        stop = min(start + _GRAM_MIN, d)
        lower = np.tril(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = lower + np.tril(lower, -1).T
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T


def _add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    d = rows.shape[1]
    step = max(_GRAM_MIN, -(-d // _GRAM_BLOCKS))
    for start in range(0, d, step):
        stop = min(start + step, d)
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def _lower(matrix: F64) -> F64:
    """The lower triangle, row after row."""
    return np.concatenate([row[: i + 1] for i, row in enumerate(matrix)])


def _whole(lower: F64, d: int) -> F64:
    """The symmetric matrix [d, d] of a lower triangle."""
    matrix = np.empty((d, d), lower.dtype)
    start = 0
    for i, row in enumerate(matrix):
        row[: i + 1] = lower[start : start + i + 1]
        start += i + 1
    _complete(matrix)
    return matrix


def save_layer(path: Path, index: Block, layer: LayerMoments, metadata: Mapping[str, Any]) -> None:
    """Write the moments of layer ``index`` with JSON ``metadata``, which say what they are of, atomically."""
    tensors: dict[str, Any] = {"n": np.array([layer.n], dtype=np.int64)}
    arrays = {name: getattr(layer, name) for name in ARRAYS}
    tensors |= {name: _lower(a) if name in _SYMMETRIC else a for name, a in arrays.items()}
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
    """Where a folder of moments has those of layer ``index``."""
    numbers = (index.layer, index.last) if isinstance(index, Span) else (layer_of(index),)
    kind = f".{part_of(index)}" * isinstance(index, (Mlp, Span))
    return folder / f"{'-'.join(f'{number:0{_DIGITS}}' for number in numbers)}{kind}.safetensors"


def save_moments(folder: Path, moments: Moments, metadata: Mapping[str, Any]) -> list[Path]:
    """Write moments and JSON ``metadata``, a file for each layer; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, layer in moments.layers.items():
        save_layer(layer_file(folder, index), index, layer, metadata)
    return [layer_file(folder, index) for index in moments.layers]


def load_moments(path: Path) -> tuple[Moments, dict[str, Any]]:
    """The moments in a folder, or in one file of it, and their metadata; a layer is read when it is asked for.

    Raises :class:`InputError` for anything else, and for a layer of other moments than the first.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} has no moments: {CALIBRATE_AGAIN}.")
    index, _, metadata = load_layer(files[0])
    if len(files) == 1:
        return Moments(_StoredLayers({index: path if path.is_file() else files[0]}, metadata)), metadata
    found = {named: file for file in files if (named := _of_name(file)) is not None}
    return Moments(_StoredLayers({i: found[i] for i in sorted(found)}, metadata)), metadata


def _of_name(file: Path) -> Block | None:
    """The block of a file that is named as :func:`layer_file` names it."""
    numbers, dot, kind = file.stem.partition(".")
    first, *last = (number.lstrip("0") or "0" for number in numbers.split("-"))
    if last == [first]:
        last = []
    try:
        index = block_of("-".join([first, *last]) + dot + kind)
    except ValueError:
        return None
    return index if layer_file(file.parent, index) == file else None


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


def digest_of_tokens(tokens: NDArray[Any]) -> str:
    """SHA-256 of token ids or pixels with their shape, which identifies the calibration data."""
    return hashlib.sha256(str(tokens.shape).encode() + np.ascontiguousarray(tokens).tobytes()).hexdigest()
