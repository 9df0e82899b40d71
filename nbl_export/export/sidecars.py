"""The files beside a graph, such as its configuration and tokenizer, updated for what the rewrite changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.export.genai_config import NAME as GENAI
from nbl_export.files import atomic_path, read_json, stays_in, write_json

CONFIG = "config.json"
# Weights that are not the graph's; a rewritten folder does not need them.
_NOT_COPIED = {".onnx", ".data", ".onnx_data", ".safetensors", ".bin", ".gguf", ".pt", ".pth", ".engine"}


@dataclass(frozen=True)
class Sidecar:
    """A file that goes beside the rewritten graph: as it is, or with the content of ``config``.

    ``under`` is the subfolder that it is in, as the pooling of sentence-transformers.
    """

    source: Path
    config: dict[str, Any] | None = None
    under: Path = Path()


def updated_configs(
    files: Iterable[Path], linear: Iterable[int], kept: Iterable[int], folder: Path | None = None
) -> list[Sidecar]:
    """``files``, their configurations updated: ``linear`` layers are gone, ``kept`` are cached. Writes nothing.

    Those of a subfolder of ``folder`` stay as they are. Raises :class:`InputError` for a configuration that is none.
    """
    layers, cached = list(linear), list(kept)
    return [
        _updated(source, layers, cached)
        if folder is None or source.parent == folder
        else Sidecar(source, under=source.parent.relative_to(folder))
        for source in files
    ]


def _updated(source: Path, linear: list[int], kept: list[int]) -> Sidecar:
    if source.name not in (GENAI, CONFIG):
        return Sidecar(source)
    config = read_json(source, "The configuration beside the graph", "export the model again")
    try:
        return Sidecar(
            source, _genai(config, kept) if source.name == GENAI else _hugging_face(config, linear, kept)
        )
    except (AttributeError, KeyError, TypeError, IndexError):
        raise InputError(f"{source} is no {source.name} of a decoder: export the model again.") from None


def copy_sidecars(files: Iterable[Sidecar], folder: Path) -> list[Path]:
    """Write ``files`` into ``folder``; one that lies there already is changed there. Returns what was written."""
    return [_copy(file, folder / file.under / file.source.name) for file in files]


def _copy(file: Sidecar, target: Path) -> Path:
    if file.config is not None:
        write_json(target, file.config)
    elif file.source.resolve() != target.resolve():
        with atomic_path(target) as temporary:
            shutil.copyfile(file.source, temporary)
    return target


def _genai(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    decoder = config["model"]["decoder"]
    if decoder["num_hidden_layers"] == len(kept):
        return config  # updated already
    # Releases before 0.13 loop over this number of KV pairs; later ones read the graph.
    decoder["num_hidden_layers"] = len(kept)
    window = decoder.get("sliding_window")
    if window and window.get("layers") is not None:  # named by their KV pair, and those were renumbered
        window["layers"] = [new for new, old in enumerate(kept) if old in window["layers"]]
    return config


def _hugging_face(config: dict[str, Any], linear: list[int], kept: list[int]) -> dict[str, Any]:
    return {**config, "nbl_export": {"linearized_layers": linear, "kv_layers": kept}}


def sidecars_of(graph: Path, data: Iterable[Path]) -> list[Path]:
    """The files in the folder of ``graph`` that belong to it: configurations and tokenizer, no weights.

    Raises :class:`InputError` for a link that leaves the folder: it is not followed.
    """
    own = {graph.name, *(path.name for path in data)}
    files = [p for p in sorted(graph.parent.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if p.name not in own and not _NOT_COPIED & set(p.suffixes)]
    for path in files:
        if not stays_in(graph.parent.resolve(), path.resolve()):
            raise InputError(
                f"{path} is a link that leaves its folder; refused. Remove it, or copy the file there."
            )
    return files


def graph_in(path: Path) -> Path:
    """The decoder's ONNX file: ``path`` itself, or the one in the folder ``path``.

    Raises :class:`InputError` if there is none, or several and no configuration or usual name says which.
    """
    if not path.is_dir():
        return path
    if (path / GENAI).is_file():
        config = read_json(path / GENAI, "The configuration beside the graph", "export the model again")
        try:
            name = str(config["model"]["decoder"]["filename"])
        except (KeyError, TypeError):
            raise InputError(f"{path / GENAI} names no decoder: give the .onnx file itself.") from None
        if Path(name).name != name:
            raise InputError(f"{path / GENAI} names a decoder outside its folder ({name}); refused.")
        return path / name
    graphs = sorted(path.glob("*.onnx"))
    usual = [g for g in graphs if g.name == "model.onnx"]
    if len(chosen := usual or graphs) != 1:
        found = ", ".join(g.name for g in graphs) or "none"
        raise InputError(
            f"The folder {path} has no single .onnx file (found: {found}): name the file itself."
        )
    return chosen[0]
