"""Verify the graphs and engines of a folder → ``report/``; pack what a deployment needs, and verify that anywhere.

A package has:

    model.onnx, model.onnx.data     the linearized graph with all its weights, the same as in the output folder
    config.json, tokenizer …        what lies beside it; embedding.onnx of a graph that reads embeddings
    base.onnx, base.onnx.data       the unmodified graph, where it is wanted
    engine/model.engine …           the linearized engine and its manifest, if there is one
    report/                         the report of the verification
    README.md                       a model card, which may be edited
    nbl/                            what it is verified by: the plan, and the held-out rows of the text or images
    package.json                    what it is, and the SHA-256 of every other file

In the layouts of transformers.js and Triton the graph lies elsewhere (:mod:`nbl_export.export.layouts`). No path of
this machine is in it. The unmodified graph, the moments, the calibration text and whatever was measured on the way
stay behind.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export import __version__
from nbl_export.batch import TOKENS
from nbl_export.calibrate.text import frame_of, load_text
from nbl_export.engine.manifest import manifest_path
from nbl_export.errors import InputError
from nbl_export.export.layouts import LAYOUTS
from nbl_export.export.sidecars import GENAI
from nbl_export.files import TEMPORARY, overlap, read_json, sha256_of_file, sync, write_json, write_text
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.summary import RewriteRecord
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.models.load import LoadedModel, as_setting, find_device
from nbl_export.models.source import ModelIdentity, expected, find_model
from nbl_export.progress import Listener, Silent
from nbl_export.records import STAGES, Check, from_json, part_from_json, to_json
from nbl_export.report.assemble import assemble, created, exported_of, keeping
from nbl_export.report.render import CARD, license_of, model_card, without_paths, write_report
from nbl_export.report.schema import Report, load_report
from nbl_export.runtime.session import check_like
from nbl_export.settings import VerifySettings
from nbl_export.stages.calibrate import loader_for
from nbl_export.stages.inspection import REMEDY, SCHEMA, Package, load_package, recorded_report
from nbl_export.stages.run import (
    Run,
    check_baseline,
    check_machine,
    current_engines,
    current_rewrite,
    graphs_on,
    graphs_setting,
    model_positions,
    opened,
    passed_over,
)
from nbl_export.verify.case import DecoderCase, EncoderCase, Measurement, fitting_prompts
from nbl_export.verify.measure import measure
from nbl_export.workspace import BASE, LINEARIZED, PACKAGE, Places, Workspace, is_package, kept_digests


def verify(
    out: str | Path | Run,
    settings: VerifySettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    again: bool = False,
    rehash: bool = False,
    model: str | Path | None = None,
) -> Report:
    """Parity, method loss and speed. A failed gate is in the report (``passed`` is False), not raised.

    With ``again`` nothing is kept of an earlier verification: a folder from somebody else may hold one. ``model`` is
    where the model is now, if it was moved; the folder records it.
    """
    asked = settings or VerifySettings()
    with opened(out, asked, listener, trust_remote_code, rehash, model=model) as (run, asked):
        ws = run.workspace
        if again:
            ws.forget("verify")
        # It reads the held-out text too.
        made_of = {"rewrite": current_rewrite(ws).result, "calibrate": ws.require("calibrate").result}
        if run.model.task.causal:
            fitting_prompts(model_positions(ws), len(load_text(ws.text).start), asked.decode_steps)
        engines = current_engines(ws)
        if engines and (built := ws.record("build")):
            made_of["build"] = built.result
        device = run.on(asked.device)
        recorded = asked.as_json() | as_setting(device) | graphs_setting(device)
        with run.stage("verify", recorded, made_of, device) as work:
            if work:
                check_baseline(ws)
                plan, earlier, why = load_plan(ws.plan), _earlier(ws, made_of), passed_over(ws)
                if why:
                    work.note(f"Not verified: {why}.")
                with graphs_on(device, work):
                    case = case_of(ws, ws.model, ws.baseline, run.model, plan, asked, work)
                    if isinstance(case, DecoderCase):
                        case = replace(case, engines=engines, passed_over=why)
                    found = measure(case)
                report = assemble(ws, run.model.source, plan, recorded, found, engines)
                graphs = _files(ws, "calibrate", "select", "export", "rewrite")
                work.files = write_report(ws.report, keeping(report, earlier, graphs, _files(ws, "build")))
        return load_report(ws.report / "report.json")


def case_of(
    places: Places,
    graph: Path,
    baseline: Path | None,
    loaded: LoadedModel,
    plan: Plan,
    settings: VerifySettings,
    listener: Listener,
) -> DecoderCase | EncoderCase:
    """What ``graph`` is held against, rewritten from ``baseline``, if that is there; ``places`` has its text."""
    copies, model, task, tensors = exported_of(places).copies, loaded.in_dtype("float32"), loaded.task, {}
    if baseline:
        what, remedy = "The record of the rewrite", "run `nbl-export rewrite` again"
        record = from_json(RewriteRecord, read_json(places.rewrite_summary, what, remedy), what, remedy)
        tensors = {one.layer: one for one in record.tensors}
    if task.causal:
        text = load_text(places.text)
        asked = (model, plan, baseline, graph, settings, listener, text)
        return DecoderCase(*asked, tensors=tensors, copies=copies)
    material = loader_for(loaded.source)
    heldout = material.heldout(material.load(material.path(places)), plan.probe)
    case = EncoderCase(
        model,
        plan,
        baseline,
        graph,
        settings,
        listener,
        task,
        loaded.pooling,
        heldout,
        material.unit,
        tensors=tensors,
        copies=copies,
    )
    if loaded.source.reads != TOKENS:
        return case
    frame = frame_of(loaded.tokenizer)
    return replace(case, unit="documents", pad=frame.pad, left=frame.left)


def _files(ws: Workspace, *stages: str) -> list[str]:
    """The files that ``stages`` recorded."""
    return [name for stage in stages if (record := ws.record(stage)) for name in record.files]


def _earlier(ws: Workspace, made_of: Mapping[str, str]) -> Report | None:
    """The report of the last verification, if it is as that wrote it, and of the same text and graphs."""
    record = recorded_report(ws)
    if record is None or record.version != STAGES["verify"]:
        return None
    if any(record.made_of.get(name) != made_of[name] for name in ("rewrite", "calibrate")):
        return None
    try:
        return load_report(ws.report / "report.json")
    except InputError:
        return None


_SAME = (
    "Packaged: all weights of the graph are in one file; it is the graph that was verified, operator by operator and "
    "weight by weight."
)


@dataclass(frozen=True)
class Verified:
    """What was found of a package; ``measured`` has the figures."""

    package: Package
    measured: Measurement
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not any(check.status == "failed" for check in self.checks)


def package(
    out: str | Path,
    to: str | Path,
    listener: Listener | None = None,
    rehash: bool = False,
    layout: str = "folder",
    base: bool = False,
) -> Package:
    """Write what a deployment needs of ``out`` to the folder ``to``, which :func:`verify_package` takes anywhere.

    It is written whole or not at all; an earlier package there is replaced. ``layout`` is ``web`` for transformers.js
    and ``triton`` for Triton; with ``base`` it has the unmodified graph as well. The model that ``out`` was made from
    is not needed. Raises :class:`InputError` if the output folder has no report of its graph that says PASS, and for
    a file of it that was changed since.
    """
    ws, to = Workspace.open(Path(out), kept_digests(Path(out), rehash, listener)), Path(to)
    with ws.lock():
        for stage in ("verify", "calibrate", "select", "export", "rewrite"):
            ws.require(stage)
        report = load_report(ws.report / "report.json")
        if not report.passed:
            failed = ", ".join(check.name for check in report.checks if check.status == "failed")
            raise InputError(
                f"The report of {ws.root} says FAIL ({failed}): what is not proven is not packaged."
            )
        _check_place(ws, to)
        for left in to.parent.glob(f".{glob.escape(to.name)}.*{TEMPORARY}"):  # by a process that was killed
            _put_back(left, to)
        if base:
            check_baseline(ws)
        beside = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=TEMPORARY, dir=to.parent))
        root, old = beside / "new", beside / "old"
        try:
            root.mkdir()
            made = _write(ws, root, report, layout, base, listener or Silent())
            if to.exists():
                to.rename(old)
            root.rename(to)
            sync(to.parent)
        finally:
            _put_back(beside, to)
    return made


def _put_back(beside: Path, to: Path) -> None:
    """Remove the folder that the package ``to`` was written in; an earlier one is put back if no new one is there."""
    if (old := beside / "old").exists() and not to.exists():  # between the two renames
        old.rename(to)
    shutil.rmtree(beside, ignore_errors=True)


def _write(ws: Workspace, root: Path, report: Report, layout: str, base: bool, listener: Listener) -> Package:
    """Everything of the package, in ``root``."""
    shape, precision, info = LAYOUTS[layout], report.graph.precision, ws.model_info or {}
    graphs = []
    for role, own in ((LINEARIZED, ws.model), (BASE, ws.baseline))[: 1 + base]:
        name, data = shape.names(role, precision)
        graphs.append(root / name)
        model = load_graph(own)
        shape.change(model)
        weights = (v.const_value for v in model.graph.initializers.values() if v.const_value is not None)
        graphs[-1].parent.mkdir(parents=True, exist_ok=True)
        with listener.task("Writing the graph", sum(one.nbytes for one in weights), "bytes") as task:
            save_graph(model, graphs[-1], check_like(own), task.advance, data=data)
    records = [record for stage in ("export", "rewrite") if (record := ws.record(stage))]
    beside = (path for record in records for path in ws.paths(record) if path.parent == ws.root)
    copied = [path for path in beside if not path.name.startswith(ws.model.name)]
    copied += [ws.plan, ws.plan.with_suffix(".safetensors"), ws.export_summary]
    if current_engines(ws):
        copied += [ws.engine, manifest_path(ws.engine)]
    for path in copied:
        target = root / path.relative_to(ws.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shape.finish(root, graphs, precision, report.graph.task is None)
    engine = root / ws.engine.relative_to(ws.root)
    if engine.exists() and (why := shape.engine(root, graphs[0], engine)):
        listener.note(f"The engine {why}.")
    if not shape.genai:
        (root / GENAI).unlink(missing_ok=True)
    source = part_from_json(ModelIdentity, info, "The record of the model", "start again")
    _write_heldout(ws, Places(root), source)

    def digests(paths: Iterable[Path]) -> dict[str, str]:
        return {p.relative_to(root).as_posix(): sha256_of_file(p) for p in sorted(paths) if p.is_file()}

    files = digests(root.rglob("*"))
    notes = (*(note.replace(str(ws.root), ws.root.name) for note in report.notes), _SAME)
    others = {n: d for n, d in report.hashes.items() if not n.startswith(ws.model.name)}
    public = without_paths(replace(report, hashes={**others, **files}, notes=notes))
    files |= digests(write_report(root / ws.report.name, public))
    named, graph = replace(source, source=public.model.source), graphs[0].relative_to(root).as_posix()
    made = Package(created(), __version__, named, report.selection.layers, precision, files, graph)
    license = license_of(Path(info["path"]), info.get("gguf_file")) if info.get("path") else None
    write_text(root / CARD, model_card(public, license, layout))
    write_json(root / PACKAGE, {"schema": SCHEMA, **to_json(made)})
    return made


def _check_place(ws: Workspace, to: Path) -> None:
    if how := overlap(to, ws.root):
        raise InputError(f"{to} {how} the output folder {ws.root}: choose another --output.")
    if not to.parent.is_dir():
        raise InputError(f"{to.parent} is not a folder: make it first.")
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise InputError(f"{to} is not a folder: choose another --output.")
    if to.is_dir() and not is_package(to) and any(to.iterdir()):
        raise InputError(f"{to} has files that are no package: choose another --output, or an empty folder.")


def _write_heldout(ws: Workspace, places: Places, source: ModelIdentity) -> None:
    """Write the rows that a verification reads; those that the fit and the selection read are left out."""
    material = loader_for(source)
    data = material.load(material.path(ws))
    # A file of rows has one at least of each kind that must be there.
    less: dict[str, Any] = {"calibration": data.heldout[:1]}
    for name in ("selection", "selection_document"):
        if hasattr(data, name):
            less[name] = np.zeros((0, *data.heldout.shape[1:]), np.int32)
    material.save(material.path(places), replace(data, **less))


def verify_package(
    package: str | Path,
    model: str | Path,
    settings: VerifySettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
) -> Verified:
    """Whether a package is whole and its graph computes here what PyTorch does with ``model`` and its plan.

    A failed gate is in the value (``passed``), not raised.

    Nothing is written. Raises :class:`InputError` for a file that is not as it was packaged, and for another model.
    """
    settings, listener, root = settings or VerifySettings(), listener or Silent(), Path(package)
    settings.check()
    check_machine(settings)
    found = load_package(root)
    for name, digest in found.files.items():
        if not (root / name).is_file() or sha256_of_file(root / name) != digest:
            raise InputError(f"{root / name} is missing or was changed after it was packaged: {REMEDY}.")
    source = expected(find_model(str(model), trust_remote_code), found.model)
    places, loaded = Places(root), LoadedModel(source, listener)
    plan = load_plan(places.plan)
    if plan.model != source.fingerprint:
        raise InputError(f"{places.plan} is the plan of another model: {REMEDY}.")
    loaded.device = device = find_device(settings.device)
    with graphs_on(device, listener):
        asked, graph = settings.resolve(loaded.task), root / found.graph
        result = measure(case_of(places, graph, None, loaded, plan, asked, listener))
    whole = Check("package", "passed", f"all {len(found.files)} files are as they were packaged")
    return Verified(found, result, (whole, *result.checks))
