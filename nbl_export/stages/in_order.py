"""Run every stage in order.

calibrate → select ─┐
export ─────────────┴→ rewrite → (build →) verify
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nbl_export.blocks import most_blocks
from nbl_export.models.source import ModelSource
from nbl_export.progress import Listener
from nbl_export.ranks import check_alone
from nbl_export.report.schema import Report
from nbl_export.settings import (
    CalibrateSettings,
    EngineSettings,
    ExportSettings,
    FolderSettings,
    RunSettings,
    SelectSettings,
    VerifySettings,
)
from nbl_export.stages.build import build, check_engines, check_limits, check_states
from nbl_export.stages.calibrate import calibrate, check_calibration, check_text
from nbl_export.stages.export import check_export, check_model, export
from nbl_export.stages.needs import check_disk, order, sizes_of_source
from nbl_export.stages.rewrite import drop_baseline, rewrite
from nbl_export.stages.run import Run, check_machine, opened
from nbl_export.stages.select.stage import select
from nbl_export.stages.verify import verify


def run(
    model: str | Path,
    out: str | Path,
    selection: SelectSettings,
    calibration: CalibrateSettings | None = None,
    verification: VerifySettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    exporting: ExportSettings | None = None,
    engines: EngineSettings | None = None,
    rehash: bool = False,
    folder: FolderSettings | None = None,
) -> Report:
    """Every stage in order; ``model`` is a Hub id, a folder or a GGUF file.

    What is done already with the same settings is kept. Without ``engines`` no TensorRT engine is built.
    """
    whole = RunSettings.of(selection, calibration, verification, exporting, engines, folder)
    check_asked(str(model), whole)

    checked = partial(check_source, Path(out))
    with opened(out, whole, listener, trust_remote_code, rehash, checked, model, new=True) as (work, asked):
        keeps, chosen = asked.folder.keeps, asked.selection
        if work.workspace.record("calibrate") is None:
            _check_new(work, asked)
        calibrate(model, work, asked.calibration)
        if chosen.budget or chosen.workload:
            export(work, asked.exporting, there=keeps)  # layers are weighed with the speed of the graph
        select(work, chosen)
        export(work, asked.exporting, there=keeps)
        rewrite(work, whole=not keeps)
        if asked.engines:
            build(work, asked.engines)
        report = verify(work, asked.verification)
        if not keeps and report.passed:
            drop_baseline(work.workspace)
        elif not keeps:
            work.listener.note("The unmodified graph is kept, since the verification failed.")
    return report


def check_asked(model: str, asked: RunSettings) -> None:
    """Refuse, before the model is looked for, what is refused of any, or what this machine has nothing for."""
    check_alone()
    asked.check()
    check_machine(asked)
    check_export(None, asked.exporting)
    if asked.engines:
        check_engines(None, asked.engines)
    check_text(model, asked.calibration)


def check_source(out: Path, source: ModelSource, asked: RunSettings) -> None:
    """Refuse, by the model's small files, what no run of ``source`` into ``out`` can be asked.

    A configuration says how many layers a model has, and not which can become linear: what counts is the most that
    there can be.
    """
    from nbl_export.linearize.scores import check_selection

    check_export(source, asked.exporting)
    config = check_calibration(out, source, asked.calibration)
    if isinstance(layers := getattr(config, "num_hidden_layers", None), int):
        most = most_blocks(layers, asked.calibration.parts)
        check_selection(asked.selection, most, getattr(config, "hidden_size", None))


def _check_new(work: Run, asked: RunSettings) -> None:
    """Refuse, before the first minute of work, what a later stage would."""
    from nbl_export.calibrate.text import start_tokens
    from nbl_export.linearize.scores import check_selection
    from nbl_export.models.candidates import check_blocks, choices, described
    from nbl_export.models.layers import hidden_size, positions
    from nbl_export.runtime.session import require_onnxruntime
    from nbl_export.verify.case import fitting_prompts

    require_onnxruntime()
    model, parts = work.model, asked.calibration.parts
    check_blocks(model.tried, parts)
    others = described(model.model)["others"]
    check_selection(asked.selection, choices(model.model, parts), hidden_size(model.model), others)
    if asked.engines:
        check_states(model.model)
        check_limits(asked.engines, positions(model.model))
    if model.task.causal:
        start = len(start_tokens(model.tokenizer))
        fitting_prompts(positions(model.model), start, asked.verification.decode_steps)
    check_model(work, asked.exporting)
    check_disk(work.workspace, sizes_of_source(model.source), asked, order(asked))
