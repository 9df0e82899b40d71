"""Describe an engine: the shapes it is built for, what its network has, and the manifest beside it.

    model.engine   the serialized engine        model.json   its manifest

A profile gives each symbolic dimension a minimum, an optimum and a maximum. The shapes of all inputs are derived
from these, so ids, mask, positions and cache are consistent.

            batch        sequence      past                          total = past + sequence
prefill     1 … B        1 … S         0 … C - S (chunked prefill)   1 … C
decode      1 … B        1             1 … C - 1                     2 … C

B, S, C are ``max_batch``, ``max_seq`` and ``max_context``. A static cache always has C slots.

An engine works only with the library that built it and on the GPUs it was built for. Loading it elsewhere fails,
at best with a message of the library, so the manifest is checked first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbl_export.batch import BATCH, MAX, PAST, SEQUENCE, TOTAL
from nbl_export.blocks import Block
from nbl_export.engine.library import Gpu, Library, import_library, runs_here
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.files import read_sealed, sha256_of_file, write_sealed
from nbl_export.records import from_json, to_json
from nbl_export.settings.choices import MAX_CONTEXT, MAX_SEQ

FORMAT = "nbl-export/engine/1"
_REMEDY = "build the engine again (`nbl-export build OUT --trt`)"
PREFILL, DECODE = "prefill", "decode"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """One profile: each input's (minimum, optimum, maximum) shape."""

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Limits:
    """The maximum batch size, tokens per pass, and tokens of context of an engine."""

    max_batch: int
    max_seq: int
    max_context: int


def limits(max_batch: int, max_seq: int | None, max_context: int | None, model_context: int | None) -> Limits:
    """The requested limits; the defaults are 2,048 tokens of context and 512 per pass, or less if the model has less.

    ``model_context`` is the model's number of positions, None if unlimited. Raises :class:`InputError` for a limit
    beyond it, or for limits that contradict each other.
    """
    bound = model_context or 1 << 31
    context = min(MAX_CONTEXT, bound) if max_context is None else max_context
    sequence = min(MAX_SEQ, context) if max_seq is None else max_seq
    if context > bound:
        raise InputError(f"--max-context is {context:,}; the model has {bound:,} positions.")
    if sequence > context:
        raise InputError(f"--max-seq is {sequence:,}, more than --max-context ({context:,}).")
    for option, value, least in (("batch", max_batch, 1), ("seq", sequence, 1), ("context", context, 2)):
        if value < least:
            raise InputError(f"--max-{option} is {value}; it must be at least {least}.")
    return Limits(max_batch, sequence, context)


def profiles(inputs: Mapping[str, Sequence[int | str]], limits: Limits) -> tuple[Profile, Profile]:
    """The prefill and the decode profile for a graph's ``inputs``, shapes of integers and dimension names.

    Raises :class:`BuildError` for an unknown dimension name.
    """
    b, s, c = limits.max_batch, limits.max_seq, limits.max_context
    half = min(max(1, c // 2), c - 1)
    tables = {
        PREFILL: {SEQUENCE: (1, s, s), PAST: (0, 0, c - s), TOTAL: (1, s, c)},
        DECODE: {SEQUENCE: (1, 1, 1), PAST: (1, half, c - 1), TOTAL: (2, half + 1, c)},
    }

    found = []
    for name, table in tables.items():
        # optimum writes the sum where others use a name.
        dims = {BATCH: (1, 1, b), MAX: (c, c, c), **table, f"{PAST} + {SEQUENCE}": table[TOTAL]}
        shapes = {}
        for given, shape in inputs.items():
            if unknown := [dim for dim in shape if not isinstance(dim, int) and dim not in dims]:
                raise BuildError(
                    f"The graph's input {given} has the dimension {unknown[0]!r}, for which no profile has a range."
                )
            sizes = [(dim,) * 3 if isinstance(dim, int) else dims[dim] for dim in shape]
            least, best, most = (tuple(size[which] for size in sizes) for which in range(3))
            shapes[given] = (least, best, most)
        found.append(Profile(name, shapes))
    return found[0], found[1]


@dataclass(frozen=True)
class NetworkTensor:
    """An input or output of a network; ``shape`` has -1 for a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class NetworkFacts:
    """Counts of a parsed network. ``weight_bytes`` are the bytes of its constants by dtype."""

    layers: int
    attention: int
    kv_cache_updates: int
    inputs: tuple[NetworkTensor, ...]
    outputs: tuple[NetworkTensor, ...]
    weight_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Manifest:
    """The recorded facts about an engine.

    ``role`` is base or linearized; ``capabilities`` are the targets of an ahead-of-time build, or the compute
    capability of the GPU ``gpu`` it was built on; ``profiles`` are the shapes; ``hashes`` are the SHA-256 of the
    ONNX files and the plan it was built from, and of the engine; ``kv_layers`` is the model's layer index of each
    KV pair; ``network`` has the counts and dtypes of the parsed network.
    """

    role: str
    library: str
    library_version: str
    ahead_of_time: bool
    capabilities: tuple[str, ...]
    gpu: str | None
    precision: str
    kv_cache: str
    limits: Limits
    profiles: tuple[Profile, ...]
    kv_layers: tuple[int, ...]
    linear_layers: tuple[Block, ...]
    attention: str
    network: NetworkFacts
    hashes: Mapping[str, str]
    build_seconds: float
    size: int
    created_by: str


@dataclass(frozen=True)
class EngineFile:
    """A written engine and its manifest."""

    path: Path
    manifest: Manifest


def manifest_path(engine: Path) -> Path:
    """Where the manifest of the engine file ``engine`` lies: beside it."""
    return engine.with_suffix(".json")


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write the ``manifest`` of an engine to ``path``."""
    write_sealed(path, {"format": FORMAT, **to_json(manifest)})


def load_manifest(engine: Path) -> Manifest:
    """The manifest of the engine at ``engine``; the bytes of both files are checked.

    Raises :class:`InputError` if either is missing, changed or truncated, or if they do not match.
    """
    path = manifest_path(engine)
    if not engine.is_file():
        raise InputError(f"The engine {engine} does not exist: {_REMEDY}.")
    raw = read_sealed(path, "The engine's manifest", _REMEDY)
    raw.pop("format", None)
    manifest = from_json(Manifest, raw, str(path), _REMEDY)
    if sha256_of_file(engine) != manifest.hashes.get("engine"):
        raise InputError(f"{engine} was changed after it was built (its SHA-256 differs): {_REMEDY}.")
    return manifest


def check_runs(manifest: Manifest, gpu: Gpu | None) -> Library:
    """The library that can load the engine on ``gpu``.

    Raises :class:`MissingDependencyError` without a GPU or the library, and :class:`InputError` if the library has
    another version or the engine is for other GPUs.
    """
    if gpu is None:
        raise MissingDependencyError("no NVIDIA GPU is visible")
    library = import_library(manifest.library)
    if library.version != manifest.library_version:
        raise InputError(
            f"The engine was built by {manifest.library} {manifest.library_version}, installed is "
            f"{library.version}: engines run on the version that built them; {_REMEDY}."
        )
    if not runs_here(manifest.capabilities, gpu):
        raise InputError(
            f"The engine was built for {', '.join(manifest.capabilities)}; {gpu.name} has compute capability "
            f"{gpu.compute_capability}: {_REMEDY}."
        )
    return library
