"""Base and linearized engine built with the same settings, so that their comparison is fair."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbl_export import __version__
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.blocks import Mlp
from nbl_export.engine.build import Built
from nbl_export.engine.child import build_in_child
from nbl_export.engine.gpu import Gpu
from nbl_export.engine.library import Library
from nbl_export.engine.manifest import Manifest, manifest_path, manifest_text
from nbl_export.engine.profiles import Limits
from nbl_export.engine.weights import check_pair
from nbl_export.files import TEMPORARY, atomic_path, sha256_of_file
from nbl_export.graph.cache import is_static, kv_layers
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import graph_precision
from nbl_export.graph.tensors import external_files
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Listener


@dataclass(frozen=True)
class Source:
    """A graph to build: its role, its path, its number of attention layers, and the path of the engine."""

    role: str
    graph: Path
    attention: int
    engine: Path


@dataclass(frozen=True)
class EngineFile:
    """A written engine and its manifest."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Target:
    """What engines are built with and for: the library, this machine's GPU if there is one, shapes, capabilities.

    ``capabilities`` are those to build for ahead of time, such as ``SM86``; empty for the GPU alone.
    """

    library: Library
    gpu: Gpu | None
    limits: Limits
    capabilities: tuple[str, ...]

    @property
    def built_for(self) -> tuple[str, ...]:
        """The compute capabilities that the engines run on."""
        if self.capabilities or self.gpu is None:
            return self.capabilities
        return (f"SM{self.gpu.compute_capability.replace('.', '')}",)

    @property
    def gpu_name(self) -> str | None:
        """The GPU that the engines are tied to; None if they are built ahead of time."""
        return None if self.library.ahead_of_time or self.gpu is None else self.gpu.name


def build_pair(
    target: Target,
    sources: Sequence[Source],
    plan: Plan,
    plan_hash: str,
    mlps: Mapping[Mlp, Sequence[str]],
    listener: Listener,
) -> tuple[list[EngineFile], list[Path]]:
    """Build every source and compare the pair; returns the engines and all written files.

    The engines are moved into place only after all are built and their networks are found to differ by the ``plan``
    alone (:func:`.check_pair`, which ``mlps`` is for); raises :class:`BuildError` if they do not.
    """
    library = target.library
    engines: list[EngineFile] = []
    files: list[Path] = []
    # All temporary files are written before the first is moved into place: the disk may be full.
    with ExitStack() as writing:
        timings = writing.enter_context(_timings(sources[0].engine.with_name("timing.cache"), library, files))
        temporaries = [writing.enter_context(atomic_path(source.engine)) for source in sources]
        built: list[Built] = []
        for source, temporary in zip(sources, temporaries, strict=True):
            with listener.task(f"Building {source.role} engine", 1000, "‰") as task:
                built.append(
                    build_in_child(
                        library,
                        source.graph,
                        source.attention,
                        target.limits,
                        target.capabilities,
                        temporary,
                        timings,
                        task,
                    )
                )
        weights = {source.role: result.weights for source, result in zip(sources, built, strict=True)}
        check_pair(weights[BASE], weights[LINEARIZED], plan, mlps)
        for source, temporary, result in zip(sources, temporaries, built, strict=True):
            linear = plan.blocks if source.role == LINEARIZED else ()
            model = load_graph(source.graph)
            manifest = Manifest(
                role=source.role,
                library=library.package,
                library_version=library.version,
                ahead_of_time=library.ahead_of_time,
                capabilities=target.built_for,
                gpu=target.gpu_name,
                precision=graph_precision(model).name,
                kv_cache="static" if is_static(model) else "concat",
                limits=target.limits,
                profiles=result.profiles,
                kv_layers=kv_layers(model),
                linear_layers=linear,
                attention="none" if not source.attention else "fused" if result.fused else "decomposed",
                network=result.facts,
                hashes=_hashes(source, temporary, plan_hash if linear else None),
                build_seconds=round(result.seconds, 3),
                size=result.size,
                created_by=f"nbl-export {__version__}",
            )
            described = manifest_path(source.engine)
            writing.enter_context(atomic_path(described)).write_text(
                manifest_text(manifest), encoding="utf-8"
            )
            files += [source.engine, described]
            engines.append(EngineFile(source.engine, manifest))
    return engines, files


@contextmanager
def _timings(path: Path, library: Library, files: list[Path]) -> Iterator[Path]:
    """A copy of the timings at ``path`` for the builds to add to; it replaces them, and is in ``files``, at the end."""
    if library.ahead_of_time:  # nothing is timed
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent) as folder:
        copy = Path(folder) / path.name
        if path.is_file():
            shutil.copyfile(path, copy)
        yield copy
        if copy.is_file():
            with atomic_path(path) as temporary:
                shutil.copyfile(copy, temporary)
            files.append(path)


def _hashes(source: Source, engine: Path, plan_hash: str | None) -> dict[str, str]:
    hashes = {"engine": sha256_of_file(engine), "onnx": sha256_of_file(source.graph)}
    for data in external_files(load_graph(source.graph)):
        own = data.parent == source.graph.parent
        hashes["onnx_data" if own else "shared_data"] = sha256_of_file(data)
    return hashes | ({"plan": plan_hash} if plan_hash else {})
