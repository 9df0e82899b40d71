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
from nbl_export.settings import BenchSettings
from nbl_export.stage_record import key_of
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
from nbl_export.stages.run import Run, opened, update_report
from nbl_export.verify.speed.values import CellResult, Machine
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    from nbl_export.report.schema import BenchReport


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
    key = key_of("bench", asdict(settings), made_of)

    with run.stage("bench", asdict(settings), made_of) as work:
        if work:
            work.files = _measured(run, settings, rewritten.result, against, key, work)
    value = load_bench(ws.report / "bench.json")
    update_report(ws, bench=value)
    return value


@dataclass(frozen=True)
class _Partial:
    """The cells of a bench that are measured so far."""

    key: str
    cells: tuple[CellResult, ...] = ()


def _measured(
    run: Run, settings: BenchSettings, rewrite: str, against: Sequence[Against], key: str, listener: Listener
) -> list[Path]:
    """Race in every cell, of which each is on disk when it is done: an interrupted bench of this ``key`` goes on."""
    from nbl_export.report.assemble import created
    from nbl_export.report.render import write_bench
    from nbl_export.report.schema import BenchReport, environment
    from nbl_export.verify.speed.candidates import Memory, measure_memory
    from nbl_export.verify.speed.pair import bench_checks, phases_of
    from nbl_export.verify.speed.race import Harness, Rounds

    ws = run.workspace
    positions = model_positions(ws)
    contexts, notes = _contexts(settings, positions)
    kept = _Partial(key)
    # There may be none, or it is damaged: then it is measured anew.
    with suppress(InputError):
        raw = read_sealed(ws.bench_cells, "The bench so far", "it is begun anew")
        kept = from_json(_Partial, raw, str(ws.bench_cells), "it is begun anew")
    found = list(kept.cells) if kept.key == key else []
    done = {(cell.batch, cell.context) for cell in found}
    cells = [(b, c) for b in settings.batches for c in contexts if (b, c) not in done]
    if found:
        notes.append(f"{len(found)} cells are those of a run that was interrupted, on its own roofline.")
        listener.note(f"bench: {len(found)} cells kept from before.")
    with ExitStack() as stack:
        candidates = bench_candidates(run, against, settings, stack)
        measures = cells and settings.memory and settings.device == "cpu"
        harness = Harness(
            candidates,
            _machine(settings, ws),
            Rounds(settings.rounds, settings.most * settings.rounds, settings.seconds),
            phases_of(candidates[0].cost),
            memory=measure_memory(candidates, cells, positions, listener) if measures else Memory(),
            positions=positions,
            anew=settings.anew,
        )
        for both in harness.run(cells, listener):
            found += both
            write_sealed(ws.bench_cells, to_json(_Partial(key, tuple(found))))
        speed = replace(harness.speed(()), cells=tuple(found))
    report = BenchReport(
        created=created(),
        tool_version=__version__,
        model=run.model.source.identity,
        environment=environment(),
        settings=asdict(settings),
        hashes={"rewrite": rewrite},
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


def _machine(settings: BenchSettings, ws: Workspace) -> Machine:
    """What is timed on, and its roofline: half graphs run as they are on a GPU only."""
    from nbl_export.graph.io import load_graph
    from nbl_export.graph.precision import graph_precision
    from nbl_export.verify.speed.ceiling import cpu_machine, measure_roofline

    if settings.device == "cpu":
        return cpu_machine()
    gates = graph_precision(load_graph(ws.baseline)).gates
    roofline = measure_roofline(settings.device, gates if gates in ("float16", "bfloat16") else "float32")
    return Machine(roofline.device, roofline=roofline)
