"""The commands: each parses, calls the Python API and draws. No logic."""

from __future__ import annotations

from nbl_export.cli import answers
from nbl_export.cli.finished import diff, generate, inspect, loaded, package, report
from nbl_export.cli.options import (
    NBL_OUT,
    Again,
    Config,
    DryRun,
    Model,
    Moved,
    Onnx,
    Out,
    Output,
    PlanFile,
    Rehash,
    Said,
    To,
    Trust,
)
from nbl_export.errors import GATE_FAILED, MissingDependencyError
from nbl_export.settings import (
    BenchSettings,
    CalibrateSettings,
    ConvertSettings,
    EngineSettings,
    EvalSettings,
    ExportSettings,
    FolderSettings,
    RunSettings,
    SelectSettings,
    VerifySettings,
)
from nbl_export.settings.definition import UsageError
from nbl_export.settings.graphs import OptionalEngines


def run(
    model: Model,
    /,
    *,
    output: Output = NBL_OUT,
    selection: SelectSettings = SelectSettings(),
    calibration: CalibrateSettings = CalibrateSettings(),
    verification: VerifySettings = VerifySettings(),
    exporting: ExportSettings = ExportSettings(),
    engines: OptionalEngines = OptionalEngines(),
    folder: FolderSettings = FolderSettings(),
    dry_run: DryRun = False,
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> int:
    """Everything from calibrate to verify; the command if none is named."""
    built = engines.asked
    whole = RunSettings(selection, calibration, verification, exporting, built, folder)
    api, terminal = loaded(said, whole.sharing_bounds())
    listener = terminal.TerminalListener()
    asked = (selection, calibration, verification, listener, trust, exporting, built)
    if dry_run:
        ahead = api.dry_run(model, output, *asked, rehash=rehash, folder=folder)
        terminal.show_dry_run(ahead)
        return 0
    value = api.run(model, output, *asked, rehash=rehash, folder=folder)
    terminal.show_report(value, output)
    return 0 if value.passed else GATE_FAILED


def calibrate(
    model: Model,
    /,
    *,
    output: Output = NBL_OUT,
    settings: CalibrateSettings = CalibrateSettings(),
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> None:
    """Stream the moments of the activations into OUT; resumes if interrupted."""
    api, terminal = loaded(said, settings)
    moments = api.calibrate(model, output, settings, terminal.TerminalListener(), trust, rehash=rehash)
    text = f"Calibrated. Next: nbl-export select {output} --k K"
    terminal.finish("calibrate", text, out=output, moments=moments)


def select(
    out: Out,
    /,
    *,
    settings: SelectSettings = SelectSettings(),
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> None:
    """Score every layer, choose K, and write the plan."""
    api, terminal = loaded(said, settings)
    plan = api.select(out, settings, terminal.TerminalListener(), trust, rehash=rehash)
    layers = ", ".join(map(str, plan.blocks)) or "none"
    text = f"Plan: layers {layers}. Next: nbl-export export {out}"
    terminal.finish("select", text, out=out, **answers.of_plan(plan))


def export(
    out: Out,
    /,
    *,
    settings: ExportSettings = ExportSettings(),
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> None:
    """Export the unmodified model to OUT/baseline/model.onnx."""
    api, terminal = loaded(said, settings)
    path = api.export(out, settings, terminal.TerminalListener(), trust, rehash=rehash)
    terminal.finish("export", f"Exported {path}. Next: nbl-export rewrite {out}", out=out, graph=path)


def rewrite(
    out: Out | None = None,
    /,
    *,
    onnx: Onnx = None,
    plan: PlanFile = None,
    output: To = None,
    rehash: Rehash = False,
    said: Said = Said(),
) -> None:
    """Replace the planned attention in the graph, prove it, and count.

    On OUT of earlier commands, or with --onnx on a graph that somebody else exported.
    """
    api, terminal = loaded(said)
    if onnx is None:
        if out is None or plan or output:
            raise UsageError("give OUT alone, or --onnx with --plan and --output.")
        path = api.rewrite(out, terminal.TerminalListener(), rehash=rehash)
        terminal.finish("rewrite", f"Wrote {path}. Next: nbl-export verify {out}", out=out, graph=path)
        return
    if out is not None or plan is None or output is None:
        raise UsageError("--onnx needs --plan and --output, and no OUT.")
    result = api.rewrite_onnx(onnx, plan, output, terminal.TerminalListener())
    terminal.show_rewrite(result)
    text = f"Wrote {result.files[0]}; every replaced layer is proven against the plan's activations."
    terminal.finish("rewrite", text, **answers.of_rewrite(result))


def build(
    out: Out,
    /,
    *,
    settings: EngineSettings = EngineSettings(),
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> None:
    """Build TensorRT engines of both graphs into OUT/engine."""
    api, terminal = loaded(said, settings)
    engines = api.build(out, settings, terminal.TerminalListener(), rehash=rehash)
    terminal.show_engines(engines)
    text = f"Built {out / 'engine'}. Next: nbl-export verify {out}"
    terminal.finish("build", text, out=out, engines=[engine.manifest for engine in engines])


def verify(
    out: Out,
    /,
    *,
    settings: VerifySettings = VerifySettings(),
    model: Moved = None,
    again: Again = False,
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> int:
    """Check parity, measure method loss and speed; exit 1 if a gate fails."""
    api, terminal = loaded(said, settings)
    from nbl_export.places import is_package

    listener = terminal.TerminalListener()
    if is_package(out):
        if model is None:
            raise UsageError(f"{out} is a package: say where its model is with --model")
        found = api.verify_package(out, model, settings, listener, trust)
        terminal.show_verified(found, out)
        return 0 if found.passed else GATE_FAILED
    value = api.verify(out, settings, listener, trust, again, rehash, model)
    terminal.show_report(value, out)
    return 0 if value.passed else GATE_FAILED


def eval_(
    out: Out,
    /,
    *,
    settings: EvalSettings = EvalSettings(),
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> int:
    """Score both graphs on tasks and retrieval; exit 1 if a gate fails."""
    api, terminal = loaded(said, settings)
    value = api.evaluate(out, settings, terminal.TerminalListener(), trust, rehash=rehash)
    terminal.show_evaluation(value, out)
    return 0 if value.passed else GATE_FAILED


def bench(
    out: Out,
    /,
    *,
    settings: BenchSettings = BenchSettings(),
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> int:
    """Time both graphs and others in turn; exit 1 if slower."""
    api, terminal = loaded(said, settings)
    value = api.bench(out, settings, terminal.TerminalListener(), trust, rehash=rehash)
    terminal.show_bench(value, out)
    return 0 if value.passed else GATE_FAILED


def convert(
    out: Out,
    /,
    *,
    settings: ConvertSettings = ConvertSettings(),
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> int:
    """Write the plan in the form of another engine, and prove it there."""
    api, terminal = loaded(said, settings)
    value = api.convert(out, settings, terminal.TerminalListener(), trust, rehash=rehash)
    terminal.show_conversion(value, out)
    return 0 if value.passed else GATE_FAILED


def doctor(*, said: Said = Said()) -> int:
    """Show what is here, and what each missing part would bring."""
    # Not by the API, which imports numpy: where that does not work, this says so.
    from nbl_export import doctor as diagnosing
    from nbl_export.cli import terminal

    terminal.set_up(said.json, said.quiet, said.log_file)
    found = diagnosing.doctor(terminal.TerminalListener())
    terminal.show_diagnosis(found)
    return 0 if found.runs_here else MissingDependencyError.exit_code


IN_ORDER = (
    run,
    calibrate,
    select,
    export,
    rewrite,
    build,
    verify,
    eval_,
    bench,
    generate,
    convert,
    package,
    report,
    inspect,
    diff,
    doctor,
)
