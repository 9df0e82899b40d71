"""Base and linearized engine built with the same settings, so that their comparison is fair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nbl_export import __version__
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.engine.build import Built, TimingCache, build_engine
from nbl_export.engine.gpu import Gpu
from nbl_export.engine.library import Library
from nbl_export.engine.manifest import Manifest, manifest_path, manifest_text
from nbl_export.engine.profiles import Limits
from nbl_export.errors import BuildError
from nbl_export.files import atomic_path, sha256_of_file
from nbl_export.graph.cache import is_static, kv_layers
from nbl_export.graph.io import DATA_SUFFIX, load_graph
from nbl_export.graph.precision import graph_precision
from nbl_export.progress import Listener

# The minimum share of the removed weight bytes by which an engine must shrink, and the size difference allowed
# between two builds of one network.
_SHARE, _VARIES_BY = 0.9, 1 << 16


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
    linear_layers: Sequence[int],
    plan_hash: str,
    listener: Listener,
) -> tuple[list[EngineFile], list[Path]]:
    """Build every source and compare the pair; returns the engines and all written files.

    The engines are moved into place only after all are built and the linearized one is found to be smaller by the
    removed weights; raises :class:`BuildError` if it is not.
    """
    library, limits = target.library, target.limits
    timings = TimingCache(library, sources[0].engine.with_name("timing.cache"))
    built: list[Built] = []
    for source in sources:
        with listener.task(f"Building {source.role} engine", 1000, "‰") as task:
            built.append(
                build_engine(
                    library, source.graph, source.attention, limits, target.capabilities, timings, task
                )
            )
    check_shrinks(dict(zip((s.role for s in sources), built, strict=True)))
    engines, files = [], timings.save()
    # All temporary files are written before the first is moved into place: the disk may be full.
    with ExitStack() as writing:
        for source, result in zip(sources, built, strict=True):
            temporary = writing.enter_context(atomic_path(source.engine))
            temporary.write_bytes(memoryview(result.data))
            linear = tuple(linear_layers) if source.role == LINEARIZED else ()
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
                limits=limits,
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


def _hashes(source: Source, engine: Path, plan_hash: str | None) -> dict[str, str]:
    data = source.graph.with_name(source.graph.name + DATA_SUFFIX)
    hashes = {"engine": sha256_of_file(engine), "onnx": sha256_of_file(source.graph)}
    if data.is_file():
        hashes["onnx_data"] = sha256_of_file(data)
    return hashes | ({"plan": plan_hash} if plan_hash else {})


def check_shrinks(built: Mapping[str, Built]) -> None:
    """Raise :class:`BuildError` unless the linearized engine is smaller than the base by the removed weights.

    It loses the removed weights and their code, which cannot be more than all code of the base.
    """
    base, linear = built[BASE], built[LINEARIZED]
    weights = [sum(b.facts.weight_bytes.values()) for b in (base, linear)]
    removed, shrunk, code = weights[0] - weights[1], base.size - linear.size, max(0, base.size - weights[0])
    if not _SHARE * removed - _VARIES_BY <= shrunk <= removed + code + _VARIES_BY:
        raise BuildError(
            f"The linearized engine is {shrunk:,} bytes smaller than the base, but {removed:,} bytes of weights "
            "were removed, so the two do not belong together: build both again."
        )
