"""Parse each command into the function of the Python API that does it, and draw what that returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbl_export.cli.options import (
    NBL_OUT,
    After,
    Again,
    Base,
    Before,
    Config,
    DryRun,
    Folder,
    Layout,
    Markdown,
    Model,
    Moved,
    Onnx,
    Out,
    Output,
    PlanFile,
    Rehash,
    Said,
    Shown,
    Text,
    TextFile,
    To,
    Trust,
)
from nbl_export.errors import GATE_FAILED, MissingDependencyError
from nbl_export.ranks import place
from nbl_export.settings import (
    BenchSettings,
    CalibrateSettings,
    ConvertSettings,
    DiffBounds,
    EngineSettings,
    EvalSettings,
    ExportSettings,
    FolderSettings,
    GenerateSettings,
    RunSettings,
    SelectSettings,
    VerifySettings,
)
from nbl_export.settings.definition import Settings, UsageError
from nbl_export.settings.graphs import OptionalEngines
from nbl_export.workspace import check_free, check_output, is_package

if TYPE_CHECKING:
    from pathlib import Path

    from nbl_export.cli.output import TerminalListener


def loaded(
    said: Said, *asked: Settings | RunSettings, out: Path | None = None, busy: Path | None = None
) -> tuple[Any, Any, TerminalListener]:
    """The Python API, what draws, and what progress goes to: imported when a command runs, since --help needs none.

    What is asked for, that ``out`` is a folder of earlier commands, and that nobody works in the folder ``busy``, is
    checked before, so that it is answered at once what cannot be.
    """
    for settings in asked:
        settings.check()
    if out is not None:
        check_output(out)
    if busy is not None and place().count == 1:
        check_free(busy)
    from nbl_export import api
    from nbl_export.cli import output, terminal

    output.set_up(said.json, said.quiet, said.log_file)
    return api, terminal, output.TerminalListener()


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
    api, terminal, listener = loaded(said, whole.sharing_bounds(), busy=None if dry_run else output)
    asked = (selection, calibration, verification, listener, trust, exporting, built, rehash, folder)
    if dry_run:
        ahead = api.dry_run(model, output, *asked)
        terminal.show("dry-run", vars(ahead), ahead.tables)
        return 0
    value = api.run(model, output, *asked)
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
    api, terminal, listener = loaded(said, settings, busy=output)
    moments = api.calibrate(model, output, settings, listener, trust, rehash)
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
    api, terminal, listener = loaded(said, settings, out=out, busy=out)
    terminal.show_plan(api.select(out, settings, listener, trust, rehash=rehash), out)


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
    api, terminal, listener = loaded(said, settings, out=out, busy=out)
    path = api.export(out, settings, listener, trust, rehash=rehash)
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
    if (
        (onnx is None) is (out is None)
        or (onnx is None) is (plan is not None)
        or (plan is None) is not (output is None)
    ):
        raise UsageError("give OUT alone, or --onnx with --plan and --output, and no OUT")
    api, terminal, listener = loaded(said, out=out, busy=out)
    if onnx is None:
        path = api.rewrite(out, listener, rehash=rehash)
        terminal.finish("rewrite", f"Wrote {path}. Next: nbl-export verify {out}", out=out, graph=path)
    else:
        terminal.show_rewrite(api.rewrite_onnx(onnx, plan, output, listener))


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
    api, terminal, listener = loaded(said, settings, out=out, busy=out)
    terminal.show_engines(api.build(out, settings, listener, rehash=rehash), out)


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
    here = None if (packed := is_package(out)) else out
    api, terminal, listener = loaded(said, settings, out=here, busy=here)
    if packed:
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
    api, terminal, listener = loaded(said, settings, out=out, busy=out)
    value = api.evaluate(out, settings, listener, trust, rehash=rehash)
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
    api, terminal, listener = loaded(said, settings, out=out, busy=out)
    value = api.bench(out, settings, listener, trust, rehash=rehash)
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
    api, terminal, listener = loaded(said, settings, out=out, busy=out)
    value = api.convert(out, settings, listener, trust, rehash=rehash)
    terminal.show_conversion(value, out)
    return 0 if value.passed else GATE_FAILED


def generate(
    out: Out,
    /,
    *,
    prompt: Text = None,
    prompt_file: TextFile = None,
    settings: GenerateSettings = GenerateSettings(),
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> None:
    """Print what a graph generates after a prompt, or after each line typed."""
    api, terminal, listener = loaded(said, settings, out=out)
    from nbl_export.cli.terminal import Written, prompts

    text, written = prompts(prompt, prompt_file, said.json), Written(settings.graph, listener, not said.json)
    answers = api.generate(out, text, settings, listener, trust, rehash, written.piece, written.answered)
    terminal.finish("generate", None, out=out, prompt=text, answers=answers)


def package(
    out: Out,
    /,
    *,
    to: Folder,
    layout: Layout = "folder",
    base: Base = False,
    rehash: Rehash = False,
    said: Said = Said(),
) -> None:
    """Write what a deployment needs, and can verify, to a folder of its own."""
    api, terminal, listener = loaded(said, out=out, busy=out)
    terminal.show_package(api.package(out, to, listener, rehash, layout, base), to)


def report(out: Out, /, *, said: Said = Said()) -> int:
    """Show the report again and redraw its files from report.json."""
    api, terminal, _ = loaded(said)
    value = api.report(out)
    terminal.show_report(value, out)
    return 0 if value.passed else GATE_FAILED


def inspect(path: Shown, /, *, said: Said = Said()) -> None:
    """Show what a file or an output folder holds, as a table."""
    api, terminal, _ = loaded(said)
    tables = api.inspect(path)
    terminal.show("inspect", {"tables": tables}, tables)


def diff(
    a: Before,
    b: After,
    /,
    *,
    bounds: DiffBounds = DiffBounds(),
    markdown: Markdown = None,
    config: Config = None,
    said: Said = Said(),
) -> int:
    """Say what changed from A to B; exit 1 on a regression."""
    api, terminal, _ = loaded(said, bounds)
    to_output = markdown == "-"
    value = api.diff(a, b, bounds, None if to_output else markdown)
    terminal.show_diff(value, to_output)
    return 0 if value.passed else GATE_FAILED


def doctor(*, said: Said = Said()) -> int:
    """Show what is here, and what each missing part would bring."""
    # Not by the API, which imports numpy: where that does not work, this says so.
    from nbl_export import doctor as diagnosing
    from nbl_export.cli import output

    output.set_up(said.json, said.quiet, said.log_file)
    found = diagnosing.doctor(output.TerminalListener())
    output.show_diagnosis(found)
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
