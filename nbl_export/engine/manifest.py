"""The manifest beside each engine: what it is, what it needs, and the hashes that bind the two.

    model.engine   the serialized engine        model.json   its manifest

An engine is tied to the library that built it and to the GPUs it was built for; loading one elsewhere
fails with a message of the library's, at best. So the manifest is checked first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nbl_export.engine.gpu import Gpu
from nbl_export.engine.library import Library, library_of, runs_here
from nbl_export.engine.network import NetworkFacts
from nbl_export.engine.profiles import Limits, Profile
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.files import json_text, read_json, sha256_of_file, sha256_of_json, write_text
from nbl_export.records import from_json, to_json

FORMAT = "nbl-export/engine/1"
_REMEDY = "build the engine again (`nbl-export build OUT --trt`)"


@dataclass(frozen=True)
class Manifest:
    """What is recorded of an engine.

    ``role`` is base or linearized; ``capabilities`` are the targets of an ahead-of-time build, or the
    one compute capability of the GPU ``gpu`` it was built on; ``profiles`` the shapes; ``hashes`` the
    SHA-256 of the ONNX files and the plan it came from, and of the engine; ``kv_layers`` the model's
    layer of each KV pair; ``network`` the counts and dtypes read from the parsed network.
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
    linear_layers: tuple[int, ...]
    attention: str
    network: NetworkFacts
    hashes: Mapping[str, str]
    build_seconds: float
    size: int
    created_by: str


def manifest_path(engine: Path) -> Path:
    return engine.with_suffix(".json")


def manifest_text(manifest: Manifest) -> str:
    """What stands in the manifest's file."""
    body = {"format": FORMAT, **to_json(manifest)}
    return json_text({**body, "sha256": sha256_of_json(body)})


def save_manifest(engine: Path, manifest: Manifest) -> Path:
    """Write the manifest of an ``engine`` that is already there."""
    path = manifest_path(engine)
    write_text(path, manifest_text(manifest))
    return path


def load_manifest(engine: Path) -> Manifest:
    """The manifest of the engine at ``engine``, both checked byte for byte.

    Raises :class:`InputError` if either is missing, changed, cut short, or does not belong to the other.
    """
    path = manifest_path(engine)
    if not engine.is_file():
        raise InputError(f"The engine {engine} does not exist.")
    raw = read_json(path, "The engine's manifest", _REMEDY)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(f"{path} is no engine manifest of nbl-export ({FORMAT}): {_REMEDY}.")
    text = json_text(raw)
    digest = raw.pop("sha256", None)
    if digest != sha256_of_json(raw) or text.encode() != path.read_bytes():
        raise InputError(f"{path} was changed after it was written: {_REMEDY}.")
    del raw["format"]
    manifest = from_json(Manifest, raw, str(path), _REMEDY)
    if "engine" not in manifest.hashes:
        raise InputError(f"{path} is damaged (no SHA-256 of the engine): {_REMEDY}.")
    size = engine.stat().st_size
    if size != manifest.size:
        state = "truncated" if size < manifest.size else "not the one its manifest describes"
        raise InputError(
            f"{engine} is {state}: {size:,} bytes, the manifest says {manifest.size:,}: {_REMEDY}."
        )
    if sha256_of_file(engine) != manifest.hashes["engine"]:
        raise InputError(f"{engine} was changed after it was built (its SHA-256 differs): {_REMEDY}.")
    return manifest


def check_runs(manifest: Manifest, gpu: Gpu | None) -> Library:
    """The library that can load the engine on ``gpu``.

    Raises :class:`MissingDependencyError` without a GPU or the library, :class:`InputError` if it is of
    another version or for other GPUs; each says what does not fit.
    """
    if gpu is None:
        raise MissingDependencyError("no NVIDIA GPU is visible")
    library = library_of(manifest.library)
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
