"""Both graphs and whatever else one might run, in one race → ``report/bench.json``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export import __version__
from nbl_export.errors import InputError
from nbl_export.files import read_sealed, sha256_of_json, write_sealed
from nbl_export.progress import Listener
from nbl_export.records import from_json, to_json
from nbl_export.report.schema import load_report
from nbl_export.settings import BenchSettings
from nbl_export.stage_record import StageRecord, key_of
from nbl_export.stages.bench_candidates import (
    PEER_FORMS,
    Against,
    bench_candidates,
    digest_of_graph,
    graphs_against,
    peer_records,
)
from nbl_export.stages.build import current_engines, model_positions, passed_over
from nbl_export.stages.rewrite import check_baseline, current_rewrite
from nbl_export.stages.run import Run, opened
from nbl_export.stages.verify import finish_drawing, redrawn
from nbl_export.verify.speed.values import CellResult, Machine, Speed
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    from nbl_export.report.schema import BenchReport


@dataclass(frozen=True)
class _Bench:
    """A bench to make: of which rewrite, against which graphs, and the ``key`` that says it is the same bench."""

    run: Run
    settings: BenchSettings
    rewrite: str
    against: tuple[Against, ...]
    key: str


def bench(
    out: str | Path | Run,
    settings: BenchSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> BenchReport:
    """Time both graphs and others in turn → ``report/bench.json`` and its pages, and a part of the report there is.

    A cell in which the linearized graph is slower than its base is a failed check in the value (``passed``), not an
    exception.
    """
    asked = settings or BenchSettings()
    with opened(out, asked, listener, trust_remote_code, rehash) as (run, resolved):
        return _bench(run, resolved)


def _bench(run: Run, settings: BenchSettings) -> BenchReport:
    from nbl_export.report.schema import load_bench

    ws = run.workspace
    check_baseline(ws)
    rewritten, against = current_rewrite(ws), tuple(graphs_against(settings.against))
    others = [[a.name, a.base, digest_of_graph(a.graph)] for a in against]
    made_of = {"rewrite": rewritten.result, "against": sha256_of_json(others)}
    if settings.device == "cuda" and current_engines(ws) and (built := ws.record("build")):
        made_of["build"] = built.result
    if settings.device == "cuda" and (why := passed_over(ws)):
        run.listener.note(f"Not timed: {why}.")
    for peer in PEER_FORMS:
        if peer in settings.peers:
            made_of[peer] = sha256_of_json([record.result for record in peer_records(ws, peer).values()])
    asked = _Bench(run, settings, rewritten.result, against, key_of("bench", asdict(settings), made_of))
    run.stage("bench", asdict(settings), made_of, lambda listener: _measured(asked, listener))
    value = load_bench(ws.report / "bench.json")
    _add_to_report(ws, rewritten, value)
    return value


def _add_to_report(ws: Workspace, rewritten: StageRecord, value: BenchReport) -> None:
    """Give the report of the same graphs the bench, if there is one."""
    finish_drawing(ws)
    if ws.current("verify") is None:
        return
    report, name = load_report(ws.report / "report.json"), str(ws.model.relative_to(ws.root))
    if report.hashes.get(name) == rewritten.files[name] and report.bench != value:
        redrawn(ws, replace(report, bench=value))


def _measured(asked: _Bench, listener: Listener) -> list[Path]:
    from nbl_export.report.assemble import created
    from nbl_export.report.render import write_bench
    from nbl_export.report.schema import BenchReport, environment
    from nbl_export.verify.speed.checks import bench_checks

    run, settings, ws = asked.run, asked.settings, asked.run.workspace
    contexts, notes = _contexts(settings, model_positions(ws))
    kept = _Kept(ws.bench_cells, asked.key)
    cells = [(b, c) for b in settings.batches for c in contexts if (b, c) not in kept.done]
    if kept.cells:
        notes.append(f"{len(kept.cells)} cells are those of a run that was interrupted, on its own roofline.")
        listener.note(f"bench: {len(kept.cells)} cells kept from before.")
    with ExitStack() as stack:
        speed = _raced(asked, cells, kept, stack, listener)
    speed = replace(speed, cells=tuple(kept.cells))
    report = BenchReport(
        created=created(),
        tool_version=__version__,
        model=run.model.source.identity,
        environment=environment(),
        settings=asdict(settings),
        hashes={"rewrite": asked.rewrite},
        speed=speed,
        checks=tuple(bench_checks(speed)),
        notes=tuple(notes),
    )
    files = write_bench(ws.report, report)
    ws.bench_cells.unlink(missing_ok=True)
    return files


def _contexts(settings: BenchSettings, most: int | None) -> tuple[list[int], list[str]]:
    """Those of the contexts that the model's ``most`` positions hold, and a note on the others."""
    contexts = [c for c in settings.contexts if most is None or c <= most]
    left = sorted(set(settings.contexts) - set(contexts))
    if not contexts:
        raise InputError(
            f"--contexts asks for {min(left):,} tokens and more, the model has {most:,} positions."
        )
    named = ", ".join(f"{c:,}" for c in left)
    return contexts, [f"{named} tokens are left out: the model has {most:,} positions."] if left else []


def _raced(
    asked: _Bench, cells: Sequence[tuple[int, int]], kept: _Kept, stack: ExitStack, listener: Listener
) -> Speed:
    """Race in ``cells``, which ``kept`` is given; the race without cells."""
    from nbl_export.verify.speed.memory import Memory, measure_memory
    from nbl_export.verify.speed.pair import phases_of
    from nbl_export.verify.speed.race import Harness, Rounds

    run, settings = asked.run, asked.settings
    candidates = bench_candidates(run, asked.against, settings, stack)
    positions = model_positions(run.workspace)
    measured = cells and settings.memory and settings.device == "cpu"
    harness = Harness(
        candidates,
        _machine(settings, run.workspace),
        Rounds(settings.rounds, settings.most * settings.rounds, settings.seconds),
        phases_of(candidates[0].cost),
        memory=measure_memory(candidates, cells, positions, listener) if measured else Memory(),
        positions=positions,
        anew=settings.anew,
    )
    for both in harness.run(cells, listener):
        kept.add(both)
    return harness.speed(())


def _machine(settings: BenchSettings, ws: Workspace) -> Machine:
    """What is timed on, and its roofline: half graphs run as they are on a GPU only."""
    from nbl_export.graph.io import load_graph
    from nbl_export.graph.precision import graph_precision
    from nbl_export.verify.speed.roofline import cpu_machine, measure_roofline

    if settings.device == "cpu":
        return cpu_machine()
    gates = graph_precision(load_graph(ws.baseline)).gates
    roofline = measure_roofline(settings.device, gates if gates in ("float16", "bfloat16") else "float32")
    return Machine(roofline.device, roofline=roofline)


class _Kept:
    """The cells measured so far, on disk when each is done: an interrupted bench goes on from there."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        found = _Partial(key)
        # There may be none, or it is damaged: then it is measured anew.
        with suppress(InputError):
            raw = read_sealed(path, "The bench so far", "it is begun anew")
            found = from_json(_Partial, raw, str(path), "it is begun anew")
        same = found if found.key == key else _Partial(key)
        self.cells = list(same.cells)

    @property
    def done(self) -> set[tuple[int, int]]:
        return {(cell.batch, cell.context) for cell in self.cells}

    def add(self, cells: Sequence[CellResult]) -> None:
        self.cells += cells
        self._save()

    def _save(self) -> None:
        write_sealed(self._path, to_json(_Partial(self._key, tuple(self.cells))))


@dataclass(frozen=True)
class _Partial:
    key: str
    cells: tuple[CellResult, ...] = ()
