"""Both graphs and whatever else one might run, in one race → ``report/bench.json``.

Beside the folder's graphs and engines take part: its forms for other engines, graphs from elsewhere, and the model in
PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from nbl_export import __version__
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.export.sidecars import graph_in
from nbl_export.files import read_sealed, sha256_of_file, sha256_of_json, write_sealed
from nbl_export.graph.io import external_files, load_graph, scratch_copy
from nbl_export.graph.precision import graph_precision
from nbl_export.graph.rounding import UNTIMED, needs_emulation
from nbl_export.linearize.plan import load_plan
from nbl_export.machine import cores
from nbl_export.models.weights import in_memory
from nbl_export.packages import part
from nbl_export.progress import Listener
from nbl_export.records import StageRecord, from_json, key_of, to_json
from nbl_export.report.assemble import conversions_in, created, stage_of
from nbl_export.report.render import write_bench
from nbl_export.report.schema import BenchReport, environment, load_bench
from nbl_export.rewrite.replace import drop_layers
from nbl_export.runtime.clients import LlamaCppStream, OpenVinoStream
from nbl_export.runtime.session import CPU, CUDA, require_onnxruntime
from nbl_export.runtime.tensorrt import load_engine
from nbl_export.settings import BenchSettings
from nbl_export.settings.graphs import GGUF_TYPES
from nbl_export.stages.convert import FORMS, place_of, unmodified_form
from nbl_export.stages.inspection import update_report
from nbl_export.stages.run import (
    Run,
    check_baseline,
    current_engines,
    current_rewrite,
    model_positions,
    opened,
    passed_over,
)
from nbl_export.verify.speed.candidates import (
    TIMED_STEPS,
    Candidate,
    Memory,
    Prompt,
    StreamPrompt,
    measure_memory,
)
from nbl_export.verify.speed.ceiling import cpu_machine, measure_roofline
from nbl_export.verify.speed.pair import TorchPrompt, bench_checks, graph_candidate, phases_of
from nbl_export.verify.speed.race import Harness, Rounds
from nbl_export.verify.speed.values import CONTROL, CellResult, Machine
from nbl_export.workspace import BASE, LINEARIZED, Workspace, is_workspace

PEER_FORMS = {"llama.cpp": "gguf", "openvino": "openvino"}  # what `convert` writes for a peer
BASE_ENGINE, LINEARIZED_ENGINE = "base engine", "linearized engine"
DROPPED, EAGER, COMPILED = "dropped", "PyTorch eager", "torch.compile"
_OWN = (BASE, LINEARIZED, CONTROL, BASE_ENGINE, LINEARIZED_ENGINE, DROPPED, EAGER, COMPILED)


def bench(
    out: str | Path | Run,
    settings: BenchSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> BenchReport:
    """Time both graphs and others in turn → ``report/bench.json`` and its pages, and a part of the report there is.

    A cell in which the linearized graph is slower than its base is a failed check in the value (``passed``), not an
    exception. Each cell is on disk when it is done: an interrupted bench goes on.
    """
    with opened(out, settings or BenchSettings(), listener, trust_remote_code, rehash) as (run, asked):
        ws = run.workspace
        check_baseline(ws)
        against = list(graphs_against(asked.against))
        others = [
            (
                name,
                base,
                sha256_of_json([sha256_of_file(f) for f in (path, *external_files(load_graph(path)))]),
            )
            for name, base, path in against
        ]
        made_of = {"rewrite": current_rewrite(ws).result, "against": sha256_of_json(others)}
        if asked.device == "cuda":
            if current_engines(ws) and (built := ws.record("build")):
                made_of["build"] = built.result
            if why := passed_over(ws):
                run.listener.note(f"Not timed: {why}.")
        for peer in asked.peer:
            if peer in PEER_FORMS:
                made_of[peer] = sha256_of_json([one.result for one in _peer_records(ws, peer).values()])
        with run.stage("bench", asdict(asked), made_of) as work:
            if work:
                work.files = _measured(run, asked, made_of, against, work)
        value = load_bench(ws.report / "bench.json")
        update_report(ws, bench=value)
        return value


def _measured(
    run: Run,
    settings: BenchSettings,
    made_of: dict[str, str],
    against: Sequence[tuple[str, str | None, Path]],
    listener: Listener,
) -> list[Path]:
    """Race in every cell that is not measured yet, and write the report of all."""
    ws, key = run.workspace, key_of("bench", asdict(settings), made_of)
    positions, notes, found = model_positions(ws), list[str](), list[CellResult]()
    contexts = [c for c in settings.contexts if positions is None or c <= positions]
    left = sorted(set(settings.contexts) - set(contexts))
    if not contexts:
        raise InputError(
            f"--contexts asks for {left[0]:,} tokens and more, the model has {positions:,} positions."
        )
    if left:
        named = ", ".join(f"{c:,}" for c in left)
        notes.append(f"{named} tokens are left out: the model has {positions:,} positions.")
    of_torch = torch.get_num_threads()
    if settings.device == "cpu" and {"eager", "compile"} & {*settings.peer} and of_torch != cores():
        notes.append(
            f"PyTorch takes {of_torch} threads, as OMP_NUM_THREADS asks it to, and the others {cores()}."
        )
    # There may be none, or it is damaged: then it is measured anew.
    with suppress(InputError):
        raw = read_sealed(ws.bench_cells, "The bench so far", "it is begun anew")
        if raw.get("key") == key:
            found = [
                from_json(CellResult, cell, str(ws.bench_cells), "it is begun anew") for cell in raw["cells"]
            ]
    done = {(cell.batch, cell.context) for cell in found}
    cells = [(b, c) for b in settings.batches for c in contexts if (b, c) not in done]
    if found:
        notes.append(f"{len(found)} cells are those of a run that was interrupted, on its own roofline.")
        listener.note(f"bench: {len(found)} cells kept from before.")
    with ExitStack() as stack:
        candidates = list(bench_candidates(run, against, settings, stack))
        machine = cpu_machine() if settings.device == "cpu" else None
        if machine is None:  # half graphs run as they are on a GPU only
            gates = graph_precision(load_graph(ws.baseline)).gates
            half = gates if gates in ("float16", "bfloat16") else "float32"
            roofline = measure_roofline(settings.device, half)
            machine = Machine(roofline.device, roofline=roofline)
        measures = cells and settings.memory and settings.device == "cpu"
        harness = Harness(
            candidates,
            machine,
            Rounds(settings.rounds, settings.most * settings.rounds, settings.seconds),
            phases_of(candidates[0].cost),
            memory=measure_memory(candidates, cells, positions, listener) if measures else Memory(),
            positions=positions,
            anew=settings.anew,
        )
        for both in harness.run(cells, listener):
            found += both
            write_sealed(ws.bench_cells, {"key": key, "cells": [to_json(cell) for cell in found]})
        speed = harness.speed(found)
    report = BenchReport(
        created=created(),
        tool_version=__version__,
        model=run.model.source.identity,
        environment=environment(),
        settings=asdict(settings),
        hashes={"rewrite": made_of["rewrite"]},
        speed=speed,
        checks=tuple(bench_checks(speed)),
        notes=tuple(notes),
    )
    files = write_bench(ws.report, report)
    ws.bench_cells.unlink(missing_ok=True)
    return files


# who takes part -------------------------------------------------------------------------------------


def graphs_against(against: Sequence[str]) -> Iterator[tuple[str, str | None, Path]]:
    """What ``--against`` names, [NAME=]DIR, an output folder (both its graphs) or any folder with a graph: the name of
    each graph, that of its own base, and where it lies.
    """
    folders = [_named_folder(given) for given in against]  # a word at the end is read before any graph
    taken: set[str] = set()
    for name, path in folders:
        named: list[tuple[str, str | None, Path]]
        if is_workspace(path):
            other, base = Workspace.open(path), f"{name}, {BASE}"
            check_baseline(other)
            current_rewrite(other)
            named = [(base, None, other.baseline), (f"{name}, {LINEARIZED}", base, other.model)]
        else:
            named = [(name, None, graph_in(path))]
        for one in named:
            if one[0] in taken:
                raise InputError(f"--against names {one[0]!r} twice: say NAME=DIR to tell them apart.")
            taken.add(one[0])
            yield one


def _named_folder(given: str) -> tuple[str, Path]:
    """Name and folder of one ``--against``."""
    name, found, folder = given.rpartition("=")
    path = Path(folder)
    name = name if found else path.resolve().name
    if not name.strip() or not folder:
        raise InputError(f"--against {given} has no {'folder' if name.strip() else 'name'}: say NAME=DIR.")
    if name in _OWN or name.partition(" ")[0] in PEER_FORMS:
        raise InputError(
            f"--against {given}: the bench itself times what it calls {name!r}; say NAME=DIR with another name."
        )
    if not path.exists():
        raise InputError(f"--against {given}: there is no {folder}.")
    return name, path


def bench_candidates(
    run: Run, against: Sequence[tuple[str, str | None, Path]], settings: BenchSettings, stack: ExitStack
) -> Iterator[Candidate]:
    """Base and linearized graph, the peers that were asked for, those of --against, and the base graph once more.

    The last says what a session's place in memory does to its time, or, where sessions are made anew, how often that
    changes a comparison. ``stack`` holds the graphs made for the race.
    """
    ws, cuda = run.workspace, settings.device == "cuda"
    if cuda and CUDA not in require_onnxruntime().get_available_providers():
        raise MissingDependencyError(
            "--device cuda needs onnxruntime with CUDA and an NVIDIA GPU: "
            f"{part('onnxruntime-gpu').pip} in an environment without [cpu], or leave --device out."
        )
    if not cuda and needs_emulation(load_graph(ws.baseline)):
        raise InputError(
            f"These graphs are not timed on the CPU: {UNTIMED}. Say --device cuda where there is a GPU."
        )
    graph = partial(graph_candidate, provider=CUDA if cuda else CPU, kept=not settings.anew)
    base, linearized = graph(BASE, ws.baseline), graph(LINEARIZED, ws.model, BASE)
    yield from (base, linearized)
    for engine in current_engines(ws) if cuda else ():
        make = partial(StreamPrompt, load_engine(engine.path))
        if engine.manifest.role == BASE:
            yield Candidate(BASE_ENGINE, make, cost=base.cost)
        else:
            yield Candidate(LINEARIZED_ENGINE, make, BASE_ENGINE, cost=linearized.cost)
    if "dropped" in settings.peer:
        yield graph(DROPPED, stack.enter_context(scratch_copy(ws.model, drop_layers)), BASE)
    for peer in PEER_FORMS:
        for precision in _peer_records(ws, peer) if peer in settings.peer else ():
            to, plan = PEER_FORMS[peer], load_plan(ws.plan)
            name = f"{peer} {GGUF_TYPES[precision] if to == 'gguf' else precision}"
            written = stack.enter_context(unmodified_form(run, to, precision, plan, run.listener))()
            yield Candidate(f"{name}, {BASE}", partial(_peer_prompt, peer, written))
            yield Candidate(name, partial(_peer_prompt, peer, place_of(ws, to, precision)), f"{name}, {BASE}")
    for name, asked in ((EAGER, "eager"), (COMPILED, "compile")):
        if asked in settings.peer:
            yield Candidate(name, partial(_pytorch, run, settings.device, asked == "compile"))
    yield from (graph(name, path, its_base) for name, its_base, path in against)
    yield graph(CONTROL, ws.baseline)


def _peer_records(ws: Workspace, peer: str) -> dict[str, StageRecord]:
    """The records of the folder's forms for the engine that a ``peer`` is, of its plan and passed, by precision.

    Raises :class:`InputError` if there is none, :class:`MissingDependencyError` without the engine.
    """
    wanted, found = PEER_FORMS[peer], {}
    FORMS[wanted].require()
    for name, conversion in conversions_in(ws, current=True).items():
        form, precision = name.split(" ")
        record = ws.record(stage_of(form, precision))
        if form == wanted and record is not None and conversion.passed:
            found[precision] = record
    if not found:
        raise InputError(
            f"--peer {peer} times the folder's forms for it, and {ws.root} has none of its plan that passed: run "
            f"`nbl-export convert {ws.root} --to {wanted}` first."
        )
    return found


def _peer_prompt(peer: str, path: Path, context: int, batch: int) -> Prompt:
    """A form in its engine, with the attention, the cache and the batches that it chooses itself."""
    if peer == "openvino":
        return StreamPrompt(OpenVinoStream(path, defaults=True), context, batch)
    stream = LlamaCppStream(path, batch, context + TIMED_STEPS, defaults=True)
    return StreamPrompt(stream, context, batch)


def _pytorch(run: Run, device: str, compiled: bool, context: int, batch: int) -> Prompt:
    model = in_memory(run.model.model, device)
    if not compiled:
        return TorchPrompt(model, context, batch)
    prompt = TorchPrompt(model, context, batch, torch.compile(model, dynamic=True))
    for _ in range(2):  # compiling is no part of the time, and a first step may compile anew
        prompt.prefill()
        prompt.step()
    return prompt
