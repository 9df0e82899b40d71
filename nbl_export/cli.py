"""The command line: one function per command; parse, call, render. No logic.

Exit codes: 0 pass · 1 a gate failed, or no K keeps the budget · 2 bad usage or input · 3 a needed package or device is
missing · 4 an export or build failed · 130 interrupted · 70 an error of nbl-export itself.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from nbl_export import __version__, given, measuring
from nbl_export.errors import GATE_FAILED, INTERNAL, INTERRUPTED, NblError, os_error_in_words
from nbl_export.options import (
    TRT_CHOICES,
    BatchOpt,
    CacheOpt,
    CalibrationDtypeOpt,
    CalibrationOpt,
    ContextsOpt,
    CriterionOpt,
    ExporterOpt,
    ExporterPythonOpt,
    FieldOpt,
    FitInputOpt,
    FitOpt,
    HeldoutOpt,
    InPlaceOpt,
    KOpt,
    LayersOpt,
    MaxContextOpt,
    MaxKlOpt,
    MaxPplOpt,
    MaxSeqOpt,
    MinSpeedupOpt,
    ModelArg,
    OnnxOpt,
    OptionalOutArg,
    OutArg,
    OutOpt,
    PlanOpt,
    PrecisionOpt,
    QualityOpt,
    RankOpt,
    RepairOpt,
    RepairRankOpt,
    RidgeOpt,
    RoundsOpt,
    SamplesOpt,
    SeedOpt,
    SelectionOpt,
    SeqLenOpt,
    SmOpt,
    SpeedOpt,
    StepsOpt,
    ToOpt,
    TrtOpt,
    TrustOpt,
)

if TYPE_CHECKING:
    from nbl_export.report.schema import Report

DEFAULT_COMMAND = "run"
_INTERRUPTED_TEXT = "Interrupted; run the same command again to go on from what is done."


class _DefaultCommandGroup(TyperGroup):
    """`nbl-export MODEL …` means `nbl-export run MODEL …`: what is no command is a model."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


class _EngineCommand(TyperCommand):
    """`--trt` alone means `--trt auto`: the parser knows no option whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for argument, following in zip(args, [*args[1:], ""], strict=True):
            given.append(argument)
            if argument == "--trt" and following not in TRT_CHOICES:
                given.append("auto")
        return super().parse_args(ctx, given)


app = typer.Typer(
    name="nbl-export",
    cls=_DefaultCommandGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Replace a transformer's most linear attention layers by one affine map each (Neural Block "
        "Linearization), in the ONNX graph, and prove the result.\n\n"
        "[bold]nbl-export MODEL --k 8 -o OUT[/bold] does everything; the other commands do one stage each on "
        "the same OUT and go on from what is there."
    ),
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"nbl-export {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(DEFAULT_COMMAND, cls=_EngineCommand)
def run(
    model: ModelArg,
    k: KOpt = None,
    output: OutOpt = Path("nbl-out"),
    max_ppl_ratio: MaxPplOpt = None,
    max_kl: MaxKlOpt = None,
    min_speedup: MinSpeedupOpt = None,
    layers: LayersOpt = None,
    criterion: CriterionOpt = None,
    fit: FitOpt = "lmmse",
    repair: RepairOpt = 0,
    repair_rank: RepairRankOpt = 16,
    rank: RankOpt = None,
    fit_input: FitInputOpt = "normed",
    ridge: RidgeOpt = "1e-6",
    calibration: CalibrationOpt = None,
    text_field: FieldOpt = "text",
    samples: SamplesOpt = 128,
    seq_len: SeqLenOpt = 512,
    selection_samples: SelectionOpt = 8,
    heldout_samples: HeldoutOpt = 24,
    calibration_dtype: CalibrationDtypeOpt = "auto",
    seed: SeedOpt = 0,
    decode_steps: StepsOpt = 8,
    contexts: ContextsOpt = "128,512,1024",
    rounds: RoundsOpt = 7,
    quality: QualityOpt = True,
    speed: SpeedOpt = True,
    exporter: ExporterOpt = "torch",
    exporter_python: ExporterPythonOpt = None,
    precision: PrecisionOpt = None,
    kv_cache: CacheOpt = None,
    trt: TrtOpt = None,
    sm: SmOpt = None,
    max_batch: BatchOpt = 4,
    max_seq: MaxSeqOpt = None,
    max_context: MaxContextOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Everything: calibrate, select, export, rewrite, build (--trt), verify, report. The default command."""
    from nbl_export import api
    from nbl_export.terminal import TerminalListener

    value = api.run(
        model,
        output,
        given.select_settings(
            k,
            given.budget(max_kl, max_ppl_ratio, min_speedup),
            layers,
            criterion,
            fit,
            repair,
            repair_rank,
            rank,
            fit_input,
            ridge,
            seed,
        ),
        given.calibration_settings(
            calibration,
            text_field,
            samples,
            seq_len,
            selection_samples,
            heldout_samples,
            seed,
            calibration_dtype,
        ),
        given.verify_settings(decode_steps, contexts, rounds, quality, speed),
        TerminalListener(),
        trust_remote_code,
        given.export_settings(exporter, exporter_python, precision, kv_cache, bool(trt)),
        given.engine_settings(trt, sm, max_batch, max_seq, max_context) if trt else None,
    )
    _finish(value, output)


@app.command()
def calibrate(
    model: ModelArg,
    output: OutOpt = Path("nbl-out"),
    calibration: CalibrationOpt = None,
    text_field: FieldOpt = "text",
    samples: SamplesOpt = 128,
    seq_len: SeqLenOpt = 512,
    selection_samples: SelectionOpt = 8,
    heldout_samples: HeldoutOpt = 24,
    calibration_dtype: CalibrationDtypeOpt = "auto",
    seed: SeedOpt = 0,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Stream the activations' second moments into OUT. Interrupted, it goes on from a checkpoint."""
    from nbl_export import api
    from nbl_export.terminal import TerminalListener

    settings = given.calibration_settings(
        calibration, text_field, samples, seq_len, selection_samples, heldout_samples, seed, calibration_dtype
    )
    api.calibrate(model, output, settings, TerminalListener(), trust_remote_code)
    _say(f"Calibrated. Next: nbl-export select {output} --k K")


@app.command()
def select(
    out: OutArg,
    k: KOpt = None,
    max_ppl_ratio: MaxPplOpt = None,
    max_kl: MaxKlOpt = None,
    min_speedup: MinSpeedupOpt = None,
    layers: LayersOpt = None,
    criterion: CriterionOpt = None,
    fit: FitOpt = "lmmse",
    repair: RepairOpt = 0,
    repair_rank: RepairRankOpt = 16,
    rank: RankOpt = None,
    fit_input: FitInputOpt = "normed",
    ridge: RidgeOpt = "1e-6",
    seed: SeedOpt = 0,
) -> None:
    """Score every layer, choose K, and write the plan."""
    from nbl_export import api
    from nbl_export.terminal import TerminalListener

    budget = given.budget(max_kl, max_ppl_ratio, min_speedup)
    settings = given.select_settings(
        k, budget, layers, criterion, fit, repair, repair_rank, rank, fit_input, ridge, seed
    )
    plan = api.select(out, settings, TerminalListener())
    _say(f"Plan: layers {', '.join(map(str, plan.chosen)) or 'none'}. Next: nbl-export export {out}")


@app.command()
def export(
    out: OutArg,
    exporter: ExporterOpt = "torch",
    exporter_python: ExporterPythonOpt = None,
    precision: PrecisionOpt = None,
    kv_cache: CacheOpt = None,
) -> None:
    """Export the unmodified model to OUT/baseline/model.onnx."""
    from nbl_export import api
    from nbl_export.terminal import TerminalListener

    path = api.export(
        out, given.export_settings(exporter, exporter_python, precision, kv_cache, False), TerminalListener()
    )
    _say(f"Exported {path}. Next: nbl-export rewrite {out}")


@app.command()
def rewrite(
    out: OptionalOutArg = None,
    onnx: OnnxOpt = None,
    plan: PlanOpt = None,
    output: ToOpt = None,
    in_place: InPlaceOpt = False,
) -> None:
    """Replace the planned attention in the graph: find, prove, replace, count.

    On OUT of earlier commands, or with --onnx on a graph that somebody else exported.
    """
    from nbl_export import api
    from nbl_export.report.tables import graph_table
    from nbl_export.terminal import TerminalListener, show_tables

    if onnx is None:
        if out is None or plan or output or in_place:
            raise typer.BadParameter("give OUT alone, or --onnx with --plan and --output or --in-place.")
        path = api.rewrite(out, TerminalListener())
        _say(f"Wrote {path}. Next: nbl-export verify {out}")
        return
    if out is not None or plan is None:
        raise typer.BadParameter("--onnx needs --plan, and no OUT.")
    result = api.rewrite_onnx(onnx, plan, output, in_place, TerminalListener())
    show_tables([graph_table(result.before, result.after)])
    _say(f"Wrote {result.files[0]}; every replaced layer is proven against the plan's activations.")


@app.command(cls=_EngineCommand)
def build(
    out: OutArg,
    trt: TrtOpt = "auto",
    sm: SmOpt = None,
    max_batch: BatchOpt = 4,
    max_seq: MaxSeqOpt = None,
    max_context: MaxContextOpt = None,
) -> None:
    """Build TensorRT engines from both graphs, each with a manifest, into OUT/engine."""
    from nbl_export import api
    from nbl_export.report.tables import engines_table
    from nbl_export.terminal import TerminalListener, show_tables

    settings = given.engine_settings(trt, sm, max_batch, max_seq, max_context)
    engines = api.build(out, settings, TerminalListener())
    show_tables([engines_table([e.manifest for e in engines])])
    _say(f"Built {out / 'engine'}. Next: nbl-export verify {out}")


@app.command()
def verify(
    out: OutArg,
    decode_steps: StepsOpt = 8,
    contexts: ContextsOpt = "128,512,1024",
    rounds: RoundsOpt = 7,
    quality: QualityOpt = True,
    speed: SpeedOpt = True,
) -> None:
    """Check parity against PyTorch, measure the method's loss and the speed; exit 1 if a gate fails."""
    from nbl_export import api
    from nbl_export.terminal import TerminalListener

    settings = given.verify_settings(decode_steps, contexts, rounds, quality, speed)
    _finish(api.verify(out, settings, TerminalListener()), out)


app.command("eval")(measuring.evaluate)
app.command()(measuring.bench)


@app.command()
def report(out: OutArg) -> None:
    """Show the report again and redraw its files from report.json."""
    from nbl_export import api

    _finish(api.report(out), out)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="An ONNX file, an engine, a plan, moments, or an output folder.", show_default=False
        ),
    ],
) -> None:
    """Show what a file or an output folder holds, as a table."""
    from nbl_export import api
    from nbl_export.terminal import show_tables

    show_tables(api.inspect(path))


def _say(text: str) -> None:
    from nbl_export.terminal import say

    say(text)


def _finish(value: Report, out: Path) -> None:
    from nbl_export.terminal import show_report

    show_report(value, out)
    if not value.passed:
        raise typer.Exit(GATE_FAILED)


def main() -> None:
    """Entry point: errors become one sentence on stderr and an exit code; never a traceback."""
    try:
        code = app(standalone_mode=False)
    except NblError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED_TEXT, INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(INTERRUPTED)
    except OSError as error:
        translated = os_error_in_words(error, "while working")
        _fail(str(translated), translated.exit_code)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # usage errors of the parser
            _fail(f"{str(error.format_message()).rstrip('.')}. See nbl-export --help.", 2)
        if os.environ.get("NBL_EXPORT_DEBUG"):
            raise
        _fail(
            f"Internal error, please report it: {type(error).__name__}: {error} "
            "(set NBL_EXPORT_DEBUG=1 for the traceback).",
            INTERNAL,
        )
    else:
        if code == INTERRUPTED:  # the parser turns Ctrl-C into an exit code
            _fail(_INTERRUPTED_TEXT, INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    # Names out of a file may be long, and may hold what a terminal obeys.
    message = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message)
    message = re.sub(r"\S{300,}", lambda long: f"{long[0][:100]}…{long[0][-50:]}", message)
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)
