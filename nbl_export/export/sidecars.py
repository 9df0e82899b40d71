"""The files next to a graph, such as its configuration and tokenizer, updated after the rewrite."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.export.genai_config import NAME as GENAI
from nbl_export.files import atomic_path, json_text, read_json, stays_in, write_text

CONFIG = "config.json"
# Weights of other formats; a rewritten folder does not need them.
_FULL = "full_attention"  # in layer_types of genai_config.json
_NOT_COPIED = {".onnx", ".data", ".onnx_data", ".safetensors", ".bin", ".gguf", ".pt", ".pth", ".engine"}


@dataclass(frozen=True)
class Sidecar:
    """A file for the folder of the rewritten graph: a copy of ``source``, or the content of ``config``.

    ``under`` is its subfolder, as for the pooling of sentence-transformers.
    """

    source: Path
    config: dict[str, Any] | None = None
    under: Path = Path()


def updated_configs(
    files: Iterable[Path], linear: Iterable[int], cached: Iterable[int], folder: Path | None = None
) -> list[Sidecar]:
    """``files`` with updated configurations: ``linear`` layers have no KV cache, ``cached`` layers do.

    Nothing is written. Files in a subfolder of ``folder`` stay unchanged. Raises :class:`InputError` for an invalid
    configuration.
    """
    linear_layers, kv_layers = list(linear), list(cached)
    return [
        _updated(source, linear_layers, kv_layers)
        if folder is None or source.parent == folder
        else Sidecar(source, under=source.parent.relative_to(folder))
        for source in files
    ]


def _updated(source: Path, linear: list[int], cached: list[int]) -> Sidecar:
    if source.name not in (GENAI, CONFIG):
        return Sidecar(source)
    # Models have infinity in their configuration, which transformers reads; onnxruntime-genai reads plain JSON.
    is_json = source.name == GENAI
    config = read_json(source, "The configuration of the graph", "export the model again", finite=is_json)
    try:
        return Sidecar(
            source, _genai(config, cached) if source.name == GENAI else _hugging_face(config, linear, cached)
        )
    except (AttributeError, KeyError, TypeError, IndexError):
        raise InputError(
            f"{source} is not a valid {source.name} of a decoder: export the model again."
        ) from None


def copy_sidecars(files: Iterable[Sidecar], folder: Path) -> list[Path]:
    """Write ``files`` into ``folder``, updating those that are already there; returns the written files."""
    return [_copy(file, folder / file.under / file.source.name) for file in files]


def unlike(files: Iterable[Sidecar], folder: Path) -> Path | None:
    """The first file in ``folder`` that is missing or not what :func:`copy_sidecars` writes of ``files``."""
    for file in files:
        target = folder / file.under / file.source.name
        written = _text(file.config).encode() if file.config is not None else None
        if not target.is_file():
            return target
        if (written or file.source.read_bytes()) != target.read_bytes():
            return target
    return None


def _text(config: dict[str, Any]) -> str:
    return json_text(config, finite=False)


def _copy(file: Sidecar, target: Path) -> Path:
    if file.config is not None:
        write_text(target, _text(file.config))
    elif file.source.resolve() != target.resolve():
        with atomic_path(target) as temporary:
            shutil.copyfile(file.source, temporary)
    return target


def _genai(config: dict[str, Any], cached: list[int]) -> dict[str, Any]:
    decoder = config["model"]["decoder"]
    if kinds := decoder.get("layer_types"):  # of the layers that keep something: keys and values, or a state
        if kinds.count(_FULL) != len(cached):
            kinds = [kind for layer, kind in enumerate(kinds) if kind != _FULL or layer in cached]
            decoder |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
        return config
    if decoder["num_hidden_layers"] == len(cached):
        return config  # already updated
    # Releases before 0.13 loop over this number of KV pairs; later ones read the graph.
    decoder["num_hidden_layers"] = len(cached)
    window = decoder.get("sliding_window")
    if window and window.get("layers") is not None:  # layers are KV pair numbers, which have changed
        window["layers"] = [new for new, old in enumerate(cached) if old in window["layers"]]
    return config


def _hugging_face(config: dict[str, Any], linear: list[int], cached: list[int]) -> dict[str, Any]:
    return {**config, "nbl_export": {"linearized_layers": linear, "kv_layers": cached}}


def sidecars_of(graph: Path, data: Iterable[Path]) -> list[Path]:
    """The files in the folder of ``graph`` that belong to it: configurations and tokenizer, no weights.

    Raises :class:`InputError` for a link that points outside the folder; it is not followed.
    """
    own = {graph.name, *(path.name for path in data)}
    files = [p for p in sorted(graph.parent.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if p.name not in own and not _NOT_COPIED & set(p.suffixes)]
    for path in files:
        if not stays_in(graph.parent.resolve(), path.resolve()):
            raise InputError(
                f"{path} is a link that leaves its folder, so it is not followed: remove it, or copy the file there."
            )
    return files


def graph_in(path: Path) -> Path:
    """The decoder's ONNX file: ``path`` itself, or the one in the folder ``path``.

    Raises :class:`InputError` if there is none, or if there are several and neither the configuration nor the usual
    file name decides.
    """
    if not path.is_dir():
        return path
    if (path / GENAI).is_file():
        config = read_json(path / GENAI, "The configuration of the graph", "export the model again")
        try:
            name = str(config["model"]["decoder"]["filename"])
        except (KeyError, TypeError):
            raise InputError(f"{path / GENAI} names no decoder: give the .onnx file itself.") from None
        if Path(name).name != name:
            raise InputError(
                f"{path / GENAI} names a decoder outside its folder ({name}), which is not read: give the .onnx "
                "file itself."
            )
        return path / name
    graphs = sorted(path.glob("*.onnx"))
    usual = [g for g in graphs if g.name == "model.onnx"]
    if len(chosen := usual or graphs) != 1:
        found = ", ".join(g.name for g in graphs) or "none"
        raise InputError(
            f"The folder {path} has no single .onnx file (found: {found}): name the file itself."
        )
    return chosen[0]
