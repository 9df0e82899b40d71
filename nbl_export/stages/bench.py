"""Both graphs and whatever else one might run, in one race → ``report/bench.json``."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export import __version__
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.files import sha256_of_file, sha256_of_json, write_json
from nbl_export.progress import Listener
from nbl_export.report.bench import CONTROL
from nbl_export.report.schema import load_report
from nbl_export.settings import BenchSettings
from nbl_export.stages.build import current_engines, model_positions
from nbl_export.stages.rewrite import current_rewrite
from nbl_export.stages.run import Run
from nbl_export.stages.verify import redrawn
from nbl_export.workspace import StageRecord, Workspace, is_workspace

if TYPE_CHECKING:
    from nbl_export.report.bench import BenchReport
    from nbl_export.verify.speed.bench import Competitor, Memory, Pair
    from nbl_export.verify.speed.candidates import Contender
    from nbl_export.verify.speed.roofline import Roofline

DROPPED, EAGER, COMPILED = "dropped", "PyTorch eager", "torch.compile"


@dataclass(frozen=True)
class _Rival:
    """A graph from elsewhere: its name, the name of its own base, and where it lies."""

    name: str
    base: str | None
    graph: Path


def bench(run: Run, settings: BenchSettings) -> BenchReport:
    """Time everything in turn → ``report/bench.json``, ``bench.md``, a plot, and a part of the report if there is one.

    A cell that is suspect, or in which the linearized graph is slower than its base, is a failed check in the value,
    not an exception.
    """
    from nbl_export.report.bench import load_bench

    if not run.model.task.causal:
        raise InputError(
            f"A bench times prefill and decode; {run.model.source.source} is an encoder ({run.model.task.name}): its "
            "speed is in the report of `nbl-export verify`."
        )
    ws = run.workspace
    rewritten, rivals = current_rewrite(ws), list(_rivals(settings.against))
    key = sha256_of_json(
        {
            "rewrite": rewritten.key,
            "against": [[r.name, r.base, sha256_of_file(r.graph)] for r in rivals],
            "bench": asdict(settings),
        }
    )

    def work(listener: Listener) -> list[Path]:
        return _measured(run, key, rewritten.key, rivals, settings, listener)

    run.stage("bench", key, asdict(settings), work)
    value = load_bench(ws.report / "bench.json")
    _add_to_report(ws, rewritten, value)
    return value


def _add_to_report(ws: Workspace, rewritten: StageRecord, value: BenchReport) -> None:
    """Give the report of the same graphs the bench, if there is one."""
    verified = ws.record("verify")
    if verified is None or not ws.is_done("verify", verified.key):
        return
    report, name = load_report(ws.report / "report.json"), str(ws.model.relative_to(ws.root))
    bench = value.body()
    if report.hashes.get(name) == rewritten.files[name] and report.bench != bench:
        redrawn(ws, replace(report, bench=bench))


def _rivals(against: Sequence[str]) -> Iterator[_Rival]:
    """What ``--against`` names: [NAME=]DIR, an output folder (both its graphs) or any folder with a graph."""
    from nbl_export.export.sidecars import graph_in

    taken = {BASE, LINEARIZED, CONTROL, DROPPED, EAGER, COMPILED}
    for given in against:
        name, found, folder = given.rpartition("=")
        path = Path(folder)
        name = name if found else path.resolve().name
        if not path.exists():
            raise InputError(f"--against {given}: there is no {folder}.")
        if is_workspace(path):
            other = Workspace.open(path)
            current_rewrite(other)
            base = f"{name}, {BASE}"
            named = [_Rival(base, None, other.baseline), _Rival(f"{name}, {LINEARIZED}", base, other.model)]
        else:
            named = [_Rival(name, None, graph_in(path))]
        for rival in named:
            if rival.name in taken:
                raise InputError(f"--against names {rival.name!r} twice: say NAME=DIR to tell them apart.")
            taken.add(rival.name)
            yield rival


def _measured(
    run: Run,
    key: str,
    rewrite: str,
    rivals: Sequence[_Rival],
    settings: BenchSettings,
    listener: Listener,
) -> list[Path]:
    from nbl_export.report.bench import BenchReport, bench_checks
    from nbl_export.report.environment import environment
    from nbl_export.report.render import write_bench
    from nbl_export.verify.speed.bench import explained

    ws = run.workspace
    most = model_positions(ws)
    contexts = [c for c in settings.contexts if most is None or c <= most]
    notes = []
    if left := sorted(set(settings.contexts) - set(contexts)):
        notes.append(
            f"{', '.join(f'{c:,}' for c in left)} tokens are left out: the model has {most:,} positions."
        )
    if not contexts:
        raise InputError(
            f"--contexts asks for {min(left):,} tokens and more, the model has {most:,} positions."
        )
    kept = _Kept(ws, key)
    cells = [(b, c) for b in settings.batches for c in contexts if (b, c) not in kept.done]
    if kept.cells:
        notes.append(f"{len(kept.cells)} cells are those of a run that was interrupted, on its own roofline.")
        listener.note(f"bench: {len(kept.cells)} cells kept from before.")
    with ExitStack() as stack:
        roofline, described, pairs = _raced(run, rivals, settings, cells, most, kept, stack, listener)
        # The sessions of the race are gone, and what memory they had.
        kept.explain(lambda cell: explained(cell, pairs, _provider(settings)), listener)
    value = BenchReport(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool_version=__version__,
        model=run.model.source.identity,
        environment=environment(),
        settings=asdict(settings),
        roofline=roofline.as_json(),
        hashes={"rewrite": rewrite},
        competitors=described,
        cells=kept.cells,
        checks=tuple(bench_checks(kept.cells)),
        notes=tuple(notes),
    )
    files = write_bench(ws.report, value)
    ws.bench_cells.unlink(missing_ok=True)
    return files


def _raced(
    run: Run,
    rivals: Sequence[_Rival],
    settings: BenchSettings,
    cells: Sequence[tuple[int, int]],
    positions: int | None,
    kept: _Kept,
    stack: ExitStack,
    listener: Listener,
) -> tuple[Roofline, list[dict[str, Any]], dict[str, Pair]]:
    """Race in ``cells``, which ``kept`` is given; the machine, who took part, and whose graphs belong together."""
    from nbl_export.verify.speed.bench import Bench, pairs_of
    from nbl_export.verify.speed.race import Rounds
    from nbl_export.verify.speed.roofline import measure_roofline

    competitors = _competitors(run, rivals, settings, stack)
    memory = _memory(competitors, cells, settings, positions, listener)
    rounds = Rounds(settings.rounds, settings.most * settings.rounds, settings.seconds)
    roofline = measure_roofline(settings.device, _dtype(settings, run.workspace))
    for both in Bench(competitors, LINEARIZED, rounds, roofline, memory, positions).run(cells, listener):
        kept.add([cell.as_json() for cell in both])
    described = [
        {"name": c.name, "base": c.base, "cost": c.cost.as_json() if c.cost else None} for c in competitors
    ]
    return roofline, described, pairs_of(competitors)


class _Kept:
    """The cells measured so far, on disk when each is done: an interrupted bench goes on from there."""

    def __init__(self, ws: Workspace, key: str) -> None:
        self._path, self._key = ws.bench_cells, key
        self.cells: list[dict[str, Any]] = []
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
            if value["key"] == key:
                self.cells = list(value["cells"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there are none, or they are damaged and measured anew

    @property
    def done(self) -> set[tuple[int, int]]:
        return {(cell["batch"], cell["context"]) for cell in self.cells}

    def add(self, cells: Sequence[dict[str, Any]]) -> None:
        self.cells += cells
        self._save()

    def explain(self, reasons: Callable[[dict[str, Any]], dict[str, Any]], listener: Listener) -> None:
        """Give each cell that has none yet its ``explanations``."""
        left = [cell for cell in self.cells if "explanations" not in cell]
        with listener.task("Looking into speedups", len(left), "cells") as task:
            for cell in left:
                cell["explanations"] = reasons(cell)
                self._save()
                task.advance(1)

    def _save(self) -> None:
        write_json(self._path, {"key": self._key, "cells": self.cells})


def _provider(settings: BenchSettings) -> str:
    from nbl_export.runtime.session import CPU
    from nbl_export.verify.speed.candidates import CUDA

    return CUDA if settings.device == "cuda" else CPU


def _dtype(settings: BenchSettings, ws: Workspace) -> str:
    """What products are made in: half graphs run as they are on a GPU only."""
    from nbl_export.graph.io import load_graph
    from nbl_export.graph.precision import graph_precision

    if settings.device == "cpu":
        return "float32"
    gates = graph_precision(load_graph(ws.baseline)).gates
    return gates if gates in ("float16", "bfloat16") else "float32"


def _competitors(
    run: Run, rivals: Sequence[_Rival], settings: BenchSettings, stack: ExitStack
) -> list[Competitor]:
    """Base and linearized graph, the peers that were asked for, those of --against, and the base graph once more.

    The last says what a session's place in memory does to its time.
    """
    from nbl_export.graph.half_emulation import UNTIMED, needs_emulation
    from nbl_export.graph.io import load_graph, scratch_copy
    from nbl_export.rewrite.drop import drop_layers
    from nbl_export.runtime.session import require_onnxruntime
    from nbl_export.verify.speed.bench import Competitor
    from nbl_export.verify.speed.candidates import CUDA, EngineContender, OrtEntrant
    from nbl_export.verify.speed.ceiling import graph_cost

    ws, provider = run.workspace, _provider(settings)
    if provider == CUDA:
        if CUDA not in require_onnxruntime().get_available_providers():
            raise MissingDependencyError(
                "--device cuda needs onnxruntime with CUDA and an NVIDIA GPU: pip install 'nbl-export[gpu]' in an "
                "environment without [cpu], or leave --device out."
            )
    elif needs_emulation(load_graph(ws.baseline)):
        raise InputError(
            f"These graphs are not timed on the CPU: {UNTIMED}. Say --device cuda where there is a GPU."
        )

    def graph(name: str, base: str | None, path: Path) -> Competitor:
        return Competitor(name, OrtEntrant(path, provider), base, path, graph_cost(path))

    found = [graph(BASE, None, ws.baseline), graph(LINEARIZED, BASE, ws.model)]
    if settings.device == "cuda":
        from nbl_export.runtime.tensorrt import EngineStream, load_engine

        for engine in current_engines(ws):
            role = engine.manifest.role
            entrant = partial(EngineContender, EngineStream(load_engine(engine.path)))
            own = found[0 if role == BASE else 1].cost
            found.append(
                Competitor(f"{role} engine", entrant, None if role == BASE else f"{BASE} engine", None, own)
            )
    if "dropped" in settings.peers:
        found.append(graph(DROPPED, BASE, stack.enter_context(scratch_copy(ws.model, drop_layers))))
    if "eager" in settings.peers:
        found.append(Competitor(EAGER, partial(_pytorch, run, settings.device, False)))
    if "compile" in settings.peers:
        found.append(Competitor(COMPILED, partial(_pytorch, run, settings.device, True)))
    found += [graph(r.name, r.base, r.graph) for r in rivals]
    return [*found, graph(CONTROL, None, ws.baseline)]


def _pytorch(run: Run, device: str, compiled: bool, context: int, batch: int) -> Contender:
    import torch

    from nbl_export.verify.speed.candidates import TorchContender

    model = run.model.model.to(device)
    if not compiled:
        return TorchContender(model, context, batch)
    contender = TorchContender(model, context, batch, torch.compile(model, dynamic=True))
    for _ in range(2):  # compiling is no part of the time, and a first step may compile anew
        contender.prefill()
        contender.step()
    return contender


def _memory(
    competitors: Sequence[Competitor],
    cells: Sequence[tuple[int, int]],
    settings: BenchSettings,
    positions: int | None,
    listener: Listener,
) -> Memory:
    """Peaks of the graphs on the CPU, each in a process of its own, before anything is timed."""
    from nbl_export.verify.speed.bench import Memory, ordered
    from nbl_export.verify.speed.peak import peak_bytes

    peaks = {}
    if cells and settings.memory and settings.device == "cpu":
        graphs = list(dict.fromkeys(c.graph for c in competitors if c.graph is not None))
        with listener.task("Measuring peak memory", len(graphs), "graphs") as task:
            for graph in graphs:
                found = peak_bytes(graph, ordered(cells), positions)
                peaks.update({c.name: found for c in competitors if c.graph == graph})
                task.advance(1)
    return Memory(peaks)
