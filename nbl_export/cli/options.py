"""Name what commands take beside the settings of their stages: arguments, and the options of every command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from nbl_export.settings import NAME
from nbl_export.settings.definition import MORE

_GENERAL, _FOREIGN = Group("Options", sort_key=1), Group("A graph that somebody else exported", sort_key=2)
NBL_OUT = Path("nbl-out")


def option(
    text: str, *names: str, panel: Group = _GENERAL, shown: str | None = None, dash: bool = False
) -> Parameter:
    """An option; with ``dash`` its value may begin with one."""
    return Parameter(
        name=names,
        help=text,
        group=panel,
        show_default=lambda _: shown,
        negative=(),
        allow_leading_hyphen=dash,
    )


Model = Annotated[str, Parameter(name="MODEL", help="A Hugging Face id, a folder, or a .gguf file.")]
Out = Annotated[Path, Parameter(name="OUT", help="The output folder of an earlier command.")]
Shown = Annotated[Path, Parameter(name="PATH", help="An ONNX file, an engine, a plan, moments, or OUT.")]
Before = Annotated[
    Path, Parameter(name="A", help="OUT, a report.json, bench.json or eval.json, or an ONNX graph: before.")
]
After = Annotated[Path, Parameter(name="B", help="Another of the same kind: after.")]
Output = Annotated[Path, option("Output folder; made if needed.", "--output", "-o", shown=str(NBL_OUT))]
Folder = Annotated[
    Path, option("Folder of the package; an earlier package there is replaced.", "--output", "-o")
]
Layout = Annotated[
    Literal["folder", "web", "triton"],
    option("Where the graph lies: web is for transformers.js, triton a model repository.", "--layout"),
]
Base = Annotated[bool, option("The unmodified graph, too, to compare with.", "--base")]
Moved = Annotated[
    str | None, option("Where the model is now: of a package, or after it was moved.", "--model")
]
Trust = Annotated[bool, option("Run modelling code that comes with the model.", "--trust-remote-code")]
Rehash = Annotated[
    bool, option("Read all files again to see whether they have changed.", "--rehash", panel=MORE)
]
DryRun = Annotated[bool, option("Say what would be done, and do nothing.", "--dry-run")]
Again = Annotated[bool, option("Measure everything anew, whatever the folder says.", "--again")]
Markdown = Annotated[
    str | None,
    option(
        "Write it as Markdown for a pull request; - is the standard output.",
        "--markdown",
        dash=True,
    ),
]
Config = Annotated[Path | None, option("Settings file.", "--config", shown=f"{NAME} if there is one")]
Onnx = Annotated[Path | None, option("Rewrite this graph, a file or a folder.", "--onnx", panel=_FOREIGN)]
PlanFile = Annotated[
    Path | None, option("Plan of its model: OUT/nbl/plan.safetensors.", "--plan", panel=_FOREIGN)
]
To = Annotated[
    Path | None, option("Folder for the graph and the files beside it.", "--output", "-o", panel=_FOREIGN)
]


Text = Annotated[str | None, option("The text; else that of a file or of the standard input.", "--prompt")]
TextFile = Annotated[Path | None, option("A text file in UTF-8; - is the standard input.", "--prompt-file")]


@Parameter(name="*")
@dataclass(frozen=True)
class Said:
    """How every command answers."""

    json: Annotated[
        bool, option("Answer with one JSON object on stdout, and nothing else there.", "--json", panel=MORE)
    ] = False
    quiet: Annotated[bool, option("No progress and no notes.", "--quiet", panel=MORE)] = False
    log_file: Annotated[
        Path | None,
        option("Write everything that is said to the end of this file, too.", "--log-file", panel=MORE),
    ] = None
