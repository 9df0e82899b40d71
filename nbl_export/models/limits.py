"""What a model's files claim, compared with the bytes that are there, before anything is built of them.

A configuration is a few lines that anybody can write: a billion layers or a vocabulary of 10¹² would be built for hours
or until memory is gone. Nothing can have more layers than there are tensors, or more weights than the files have bits
for, so the headers of the weight files, which are read in milliseconds, bound everything. A GGUF file's own counts and
lengths are bounded by its size in the same way.
"""

from __future__ import annotations

import math
import re
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nbl_export.errors import InputError
from nbl_export.files import member, open_data, parse_json, read_json

if TYPE_CHECKING:
    import torch

AGAIN = "download the model again"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files that a loader may open, whatever stands there; a training run leaves others of any size beside them.
_READ = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py")
_LOADED_JSON = ("*config*.json", "*token*.json", "*vocab*.json", "*template*.json", INDEX)
_LOADED_TEXT = ("*.model", "*.jinja", "*vocab*.txt", "merges.txt")
_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_VOCABULARY = 1 << 26  # bytes of a tokenizer file that is not JSON
# Configurations name these differently; each is a count of weights' rows, or of modules that are built in a row.
_COUNTED = re.compile(r"(n|num)_([a-z_]*_)?(layers?|blocks?)|num_hidden_layers|depth")
_SIZED = re.compile(
    r"(\w+_)?(vocab_size|hidden_size|hidden_dim|intermediate_size|ffn_dim|embedding_size|head_dim|num_experts)"
    r"|n_embd|n_inner|d_model|d_ff|dim|(n|num)_(attention_|key_value_)?heads?|num_local_experts|n_routed_experts"
    r"|num_labels|type_vocab_size|patch_size|num_channels"
)
_DEEPEST = 20  # dictionaries in a configuration
# Bytes of buffers, such as masks and tables of positions, that a model may make beside its weights.
_BUFFERS = 1 << 30


@dataclass(frozen=True)
class Weights:
    """What the headers of weight files say: how many tensors, and how many bytes they take."""

    tensors: int
    bytes: int

    @property
    def most(self) -> int:
        """More weights than these bytes can hold: there are none of less than four bits."""
        return 2 * self.bytes


def check_folder(source: str, folder: Path, config: Mapping[str, Any]) -> Weights:
    """Refuse a model folder whose files are not regular, leave it, or claim more than there is.

    Raises :class:`InputError`. Returns what the weight files hold.
    """
    for path in sorted({p for pattern in _READ for p in folder.glob(pattern)}):
        if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is not a regular file: {AGAIN}.")
        if path.name != "config.json" and _is_one_of(path, _LOADED_JSON):
            kind = read_json(path, path.name, AGAIN)
            if not isinstance(kind, (dict, list)):
                raise InputError(f"{path} is not a JSON object: {AGAIN}.")
        elif _is_one_of(path, _LOADED_TEXT) and path.stat().st_size > _VOCABULARY:
            raise InputError(f"{path} is larger than {_VOCABULARY >> 20} MiB: {AGAIN}.")
    weights = weights_of(folder)
    check_claims(source, config, weights)
    return weights


def _is_one_of(path: Path, patterns: Sequence[str]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, first those beside config.json, then those in folders that the list names.

    Loading opens no others. Raises :class:`InputError` for a list with names that are none, or that leave the folder.
    """
    beside = sorted(folder.glob("*.safetensors"))
    listed = (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file()
    return [*beside, *sorted(indexed(folder).difference(beside))] if listed else beside


def weights_of(folder: Path) -> Weights:
    """What the weight files of a model folder hold, by their headers; raises :class:`InputError` for a damaged one."""
    files = set(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        files |= indexed(folder)
    found = [tensor for path in sorted(files) for tensor in _safetensors(path)]
    return Weights(len(found), sum(found))


def indexed(folder: Path) -> set[Path]:
    """The weight files that the list of a model folder names; raises :class:`InputError` for one that cannot be."""
    what = "The list of the model's weight files"
    index = read_json(folder / INDEX, what, AGAIN)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise InputError(f"{folder / INDEX} has no weight_map: {AGAIN}.")
    found = {
        member(folder, name, f"A file in {INDEX}") for name in dict.fromkeys(map(_hashable, names.values()))
    }
    for path in found:
        if not path.is_file():
            raise InputError(f"{path} is missing, {INDEX} names it: {AGAIN}.")
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is not a .safetensors file, {INDEX} names it: {AGAIN}.")
    return found


def _hashable(name: Any) -> Any:
    return name if isinstance(name, str) else repr(name)[:100]


def _safetensors(path: Path) -> Iterator[int]:
    """The bytes of each tensor of a file, from its header."""
    size = path.stat().st_size
    with open_data(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER):
            raise InputError(f"{path} is truncated or not a safetensors file: {AGAIN}.")
        try:
            header = parse_json(file.read(length))
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                start, end = tensor["data_offsets"]
                if not 0 <= start <= end <= size - 8 - length or min(tensor["shape"], default=0) < 0:
                    raise ValueError(f"the place of {name}")
                yield end - start
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error)[:200]
            raise InputError(f"{path} has a damaged header ({reason}): {AGAIN}.") from None


def check_claims(source: str, config: Mapping[str, Any], weights: Weights) -> None:
    """Refuse a configuration with more layers than there are tensors, or a size beyond all weights."""
    for name, value in _numbers(config):
        if value < 0:
            raise InputError(f"{source}: config.json has {name} {value}, which is negative: {AGAIN}.")
        if _COUNTED.fullmatch(name) and value > weights.tensors:
            raise InputError(
                f"{source}: config.json has {name} {value:,}, its weight files have {weights.tensors:,} tensors: "
                f"{AGAIN}."
            )
        if value > weights.most:
            raise InputError(
                f"{source}: config.json has {name} {value:,}, more than its weight files of {weights.bytes:,} bytes "
                f"hold: {AGAIN}."
            )


def _numbers(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int]]:
    """The counts and sizes of a configuration and of those in it."""
    if depth > _DEEPEST:
        raise InputError(f"config.json is nested more than {_DEEPEST} deep: {AGAIN}.")
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, depth + 1)
        elif _COUNTED.fullmatch(name) or _SIZED.fullmatch(name):
            if isinstance(value, (str, float)) and not (isinstance(value, float) and value.is_integer()):
                raise InputError(f"config.json has {name} {value!r:.100}, which is no whole number: {AGAIN}.")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield name, int(value)


def check_built(source: str, model: torch.nn.Module, weights: Weights) -> None:
    """Refuse a model, built without memory on torch's meta device, that would have more than its files hold."""
    count = sum(p.numel() for p in model.parameters())
    if count > weights.most:
        raise InputError(
            f"{source}: by its config.json it has {count:,} weights, its files have {weights.bytes:,} bytes: {AGAIN}."
        )
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if buffers > _BUFFERS + 2 * weights.bytes:
        raise InputError(
            f"{source}: by its config.json its masks and tables take {buffers / 2**30:,.1f} GiB: {AGAIN}, or lower the "
            "number of positions there."
        )


# GGUF --------------------------------------------------------------------------------------------

_STRING, _ARRAY = 8, 9
# Bytes of each kind of value: u8 i8 u16 i16 u32 i32 f32 bool; u64 i64 f64.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UNSIGNED = {0: "<B", 2: "<H", 4: "<I", 10: "<Q"}
_GGUF_SIZES = (
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "expert_count",
)


def check_gguf(path: Path) -> Mapping[str, int]:
    """Refuse a GGUF file that is truncated or whose counts, lengths or sizes are beyond it.

    Raises :class:`InputError`. Returns its numbers by their keys, as ``llama.block_count``.
    """
    size = path.stat().st_size
    with open_data(path) as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise InputError(f"{path} is not a GGUF file (it starts with {magic!r}): download it again.")
        try:
            return _gguf(_Reader(file, size))
        except (ValueError, struct.error) as error:
            raise InputError(f"{path} is a damaged GGUF file ({error}): download it again.") from None


class _Reader:
    """Values of a GGUF file in order; a length beyond the file's end is a ``ValueError``."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        return int(struct.unpack(form, self.file.read(size))[0])

    def count(self, least: int, what: str) -> int:
        """A number of things of which each takes at least ``least`` bytes of the rest of the file."""
        count = self.number("<Q")
        if count * least > self.size - self.file.tell():
            raise ValueError(f"{what} is {count:,}, the file has {self.size:,} bytes")
        return count

    def string(self) -> str:
        return self.file.read(self.count(1, "the length of a name")).decode("utf-8", "replace")

    def skip(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.file.seek(self.count(1, "the length of a text"), 1)
        elif kind == _ARRAY and depth < 2:
            inner = self.number("<I")
            count = self.count(
                8 if inner in (_STRING, _ARRAY) else _BYTES.get(inner, 1), "the length of a list"
            )
            if inner in _BYTES:
                self.file.seek(count * _BYTES[inner], 1)
            else:
                for _ in range(count):
                    self.skip(inner, depth + 1)
        elif kind in _BYTES:
            self.file.seek(_BYTES[kind], 1)
        else:
            raise ValueError(f"a value has the unknown type {kind}")


def _gguf(reader: _Reader) -> dict[str, int]:
    version = reader.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are known")
    tensors = reader.count(24, "the number of tensors")
    keys = reader.count(12, "the number of keys")
    sizes: dict[str, int] = {}
    for _ in range(keys):
        name, kind = reader.string(), reader.number("<I")
        if kind in _UNSIGNED:
            sizes[name] = reader.number(_UNSIGNED[kind])
        else:
            reader.skip(kind)
    for _ in range(tensors):
        name, dims = reader.string(), reader.number("<I")
        if dims > 8:
            raise ValueError(f"the tensor {name[:100]} has {dims:,} dimensions")
        shape = [reader.number("<Q") for _ in range(dims)]
        reader.number("<I")
        offset = reader.number("<Q")
        if math.prod(shape) > 8 * reader.size or offset > reader.size:
            raise ValueError(f"the tensor {name[:100]} is beyond the end of the file")
    weights = Weights(tensors, reader.size)
    for name, value in sizes.items():
        if name.endswith(".block_count") and value > tensors:
            raise ValueError(f"{name} is {value:,}, the file has {tensors:,} tensors")
        if name.endswith(_GGUF_SIZES) and value > weights.most:
            raise ValueError(f"{name} is {value:,}, the file has {reader.size:,} bytes")
    return sizes
