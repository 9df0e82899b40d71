"""Who takes part in a bench: the folder's graphs and engines, graphs from elsewhere, and the model in PyTorch."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.files import sha256_of_file, sha256_of_json
from nbl_export.packages import part
from nbl_export.report.assemble import conversions_in, stage_of
from nbl_export.settings import BenchSettings
from nbl_export.settings.graphs import GGUF_TYPES, PRECISIONS
from nbl_export.stage_record import StageRecord
from nbl_export.stages.build import current_engines
from nbl_export.stages.rewrite import check_baseline, current_rewrite
from nbl_export.stages.run import Run
from nbl_export.verify.speed.values import CONTROL
from nbl_export.workspace import Workspace, is_workspace

if TYPE_CHECKING:
    from nbl_export.verify.speed.candidates import Candidate, Prompt

LLAMA_CPP, OPENVINO = "llama.cpp", "openvino"
PEER_FORMS = {LLAMA_CPP: "gguf", OPENVINO: "openvino"}  # what `convert` writes for it
DROPPED, EAGER, COMPILED = "dropped", "PyTorch eager", "torch.compile"


@dataclass(frozen=True)
class Against:
    """A graph from elsewhere: its name, the name of its own base, and where it lies."""

    name: str
    base: str | None
    graph: Path


def graphs_against(against: Sequence[str]) -> Iterator[Against]:
    """What ``--against`` names: [NAME=]DIR, an output folder (both its graphs) or any folder with a graph."""
    from nbl_export.export.sidecars import graph_in
    from nbl_export.verify.engines import BASE_ENGINE, LINEARIZED_ENGINE

    own = {BASE, LINEARIZED, CONTROL, DROPPED, EAGER, COMPILED, BASE_ENGINE, LINEARIZED_ENGINE}
    own |= {
        name
        for peer, form in PEER_FORMS.items()
        for precision in PRECISIONS[form]
        for name in _peer_names(peer, precision)
    }
    named_folders = [
        _named_folder(given, own) for given in against
    ]  # a word at the end is read before any graph
    taken: set[str] = set()
    for name, path in named_folders:
        if is_workspace(path):
            other = Workspace.open(path)
            check_baseline(other)
            current_rewrite(other)
            base = f"{name}, {BASE}"
            named = [Against(base, None, other.baseline), Against(f"{name}, {LINEARIZED}", base, other.model)]
        else:
            named = [Against(name, None, graph_in(path))]
        for one in named:
            if one.name in taken:
                raise InputError(f"--against names {one.name!r} twice: say NAME=DIR to tell them apart.")
            taken.add(one.name)
            yield one


def _named_folder(given: str, own: Container[str]) -> tuple[str, Path]:
    """Name and folder of one ``--against``; ``own`` are the names of what the bench times itself."""
    name, found, folder = given.rpartition("=")
    path = Path(folder)
    name = name if found else path.resolve().name
    if not name.strip() or not folder:
        raise InputError(f"--against {given} has no {'folder' if name.strip() else 'name'}: say NAME=DIR.")
    if name in own:
        raise InputError(
            f"--against {given}: the bench itself times what it calls {name!r}; say NAME=DIR with another name."
        )
    if not path.exists():
        raise InputError(f"--against {given}: there is no {folder}.")
    return name, path


def digest_of_graph(path: Path) -> str:
    """SHA-256 over an ONNX file and its external data."""
    from nbl_export.graph.io import external_files, load_graph

    return sha256_of_json([sha256_of_file(f) for f in (path, *external_files(load_graph(path)))])


def provider_of(settings: BenchSettings) -> str:
    """The execution provider that graphs run in."""
    from nbl_export.runtime.session import CPU, CUDA

    return CUDA if settings.device == "cuda" else CPU


def bench_candidates(
    run: Run, against: Sequence[Against], settings: BenchSettings, stack: ExitStack
) -> list[Candidate]:
    """Base and linearized graph, the peers that were asked for, those of --against, and the base graph once more.

    The last says what a session's place in memory does to its time, or, where sessions are made anew, how often that
    changes a comparison. ``stack`` holds the graphs made for the race.
    """
    from nbl_export.graph.io import scratch_copy
    from nbl_export.rewrite.replace import drop_layers
    from nbl_export.verify.speed.candidates import Candidate, graph_candidate

    ws = run.workspace
    graph = partial(graph_candidate, provider=provider_of(settings), kept=not settings.anew)
    _check_device(ws, settings)
    base, linearized = graph(BASE, ws.baseline), graph(LINEARIZED, ws.model, BASE)
    found = [base, linearized]
    if settings.device == "cuda":
        found += _engines(ws, base, linearized)
    if "dropped" in settings.peers:
        found.append(graph(DROPPED, stack.enter_context(scratch_copy(ws.model, drop_layers)), BASE))
    for peer in PEER_FORMS:
        if peer in settings.peers:
            found += _peers(run, peer, stack)
    if "eager" in settings.peers:
        found.append(Candidate(EAGER, partial(_pytorch, run, settings.device, False)))
    if "compile" in settings.peers:
        found.append(Candidate(COMPILED, partial(_pytorch, run, settings.device, True)))
    return [*found, *(graph(a.name, a.graph, a.base) for a in against), graph(CONTROL, ws.baseline)]


def _check_device(ws: Workspace, settings: BenchSettings) -> None:
    from nbl_export.graph.io import load_graph
    from nbl_export.graph.rounding import UNTIMED, needs_emulation
    from nbl_export.runtime.session import require_onnxruntime

    if settings.device == "cuda":
        if provider_of(settings) not in require_onnxruntime().get_available_providers():
            raise MissingDependencyError(
                "--device cuda needs onnxruntime with CUDA and an NVIDIA GPU: "
                f"{part('onnxruntime-gpu').pip} in an environment without [cpu], or leave --device out."
            )
    elif needs_emulation(load_graph(ws.baseline)):
        raise InputError(
            f"These graphs are not timed on the CPU: {UNTIMED}. Say --device cuda where there is a GPU."
        )


def peer_records(ws: Workspace, peer: str) -> dict[str, StageRecord]:
    """The records of the folder's forms for the engine that a ``peer`` is, of its plan and passed, by precision.

    Raises :class:`InputError` if there is none, :class:`MissingDependencyError` without the engine.
    """
    from nbl_export.stages.forms import FORMS

    wanted = PEER_FORMS[peer]
    FORMS[wanted].require()
    found = {}
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


def _peer_names(peer: str, precision: str) -> tuple[str, str]:
    """What the linearized form of a precision is called, and its base."""
    name = f"{peer} {GGUF_TYPES[precision] if PEER_FORMS[peer] == 'gguf' else precision}"
    return name, f"{name}, {BASE}"


def _peers(run: Run, peer: str, stack: ExitStack) -> Iterator[Candidate]:
    """Each form of the folder for an engine, and the unmodified model in the same precision, made for the race."""
    from nbl_export.linearize.plan import load_plan
    from nbl_export.stages.convert import unmodified_form
    from nbl_export.stages.forms import FORMS
    from nbl_export.verify.speed.candidates import Candidate

    plan = load_plan(run.workspace.plan)
    for precision in peer_records(run.workspace, peer):
        form = FORMS[PEER_FORMS[peer]](run, precision)
        name, base = _peer_names(peer, precision)
        unmodified = stack.enter_context(unmodified_form(form, plan, run.listener))()
        yield Candidate(base, partial(_peer_prompt, peer, unmodified))
        yield Candidate(name, partial(_peer_prompt, peer, form.place), base)


def _peer_prompt(peer: str, path: Path, context: int, batch: int) -> Prompt:
    """A form in its engine, with the attention, the cache and the batches that it chooses itself."""
    from nbl_export.verify.speed.candidates import TIMED_STEPS, StreamPrompt

    if peer == OPENVINO:
        from nbl_export.runtime.openvino import OpenVinoStream

        return StreamPrompt(OpenVinoStream(path, defaults=True), context, batch)
    from nbl_export.runtime.llama_cpp import LlamaCppStream

    stream = LlamaCppStream(path, batch, context + TIMED_STEPS, defaults=True)
    return StreamPrompt(stream, context, batch)


def _engines(ws: Workspace, base: Candidate, linearized: Candidate) -> Iterator[Candidate]:
    from nbl_export.runtime.tensorrt import EngineStream, load_engine
    from nbl_export.verify.engines import BASE_ENGINE, LINEARIZED_ENGINE
    from nbl_export.verify.speed.candidates import Candidate, StreamPrompt

    for engine in current_engines(ws):
        make = partial(StreamPrompt, EngineStream(load_engine(engine.path)))
        if engine.manifest.role == BASE:
            yield Candidate(BASE_ENGINE, make, cost=base.cost)
        else:
            yield Candidate(LINEARIZED_ENGINE, make, BASE_ENGINE, cost=linearized.cost)


def _pytorch(run: Run, device: str, compiled: bool, context: int, batch: int) -> Prompt:
    import torch

    from nbl_export.models.load import in_memory
    from nbl_export.verify.speed.candidates import TorchPrompt

    model = in_memory(run.model.model, device)
    if not compiled:
        return TorchPrompt(model, context, batch)
    prompt = TorchPrompt(model, context, batch, torch.compile(model, dynamic=True))
    for _ in range(2):  # compiling is no part of the time, and a first step may compile anew
        prompt.prefill()
        prompt.step()
    return prompt
