"""Write and read the manifest of an engine: what it is, what it needs, and hashes of both files.

    model.engine   the serialized engine        model.json   its manifest

An engine works only with the library that built it and on the GPUs it was built for. Loading it elsewhere fails,
at best with a message of the library, so the manifest is checked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nbl_export.blocks import Block
from nbl_export.engine.library import Gpu, Library, import_library, runs_here
from nbl_export.engine.network import Limits, NetworkFacts, Profile
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.files import read_sealed, sha256_of_file, write_sealed
from nbl_export.records import from_json, to_json

FORMAT = "nbl-export/engine/1"
_REMEDY = "build the engine again (`nbl-export build OUT --trt`)"


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
