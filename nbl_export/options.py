"""The command line's options; each stands here once, whichever commands take it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

TRT_CHOICES = ("auto", "tensorrt", "rtx")

_LAYERS, _TEXT, _CHECKS = "Which layers, and how they are fitted", "Calibration text", "Verification"
_GRAPH, _ENGINE = "The graph", "TensorRT engines"
_FOREIGN = "A graph that somebody else exported"
_BENCH, _WHO = "What is timed", "Who takes part"
_TASKS, _RETRIEVAL = "Tasks", "Long-context retrieval"


def _option(
    help_text: str, *names: str, panel: str | None = None, metavar: str | None = None, **more: Any
) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar, **more)


ModelArg = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A Hugging Face id, a folder, or a .gguf file.", show_default=False),
]
OutArg = Annotated[
    Path, typer.Argument(metavar="OUT", help="The output folder of an earlier command.", show_default=False)
]
OptionalOutArg = Annotated[
    Path | None,
    typer.Argument(metavar="OUT", help="The output folder of an earlier command.", show_default=False),
]
OutOpt = Annotated[Path, _option("Output folder; made if needed.", "--output", "-o", metavar="OUT")]
KOpt = Annotated[
    str | None,
    _option(
        "How many attention layers to linearize; auto: --max-ppl-ratio 1.10.",
        "--k",
        panel=_LAYERS,
        metavar="K|auto",
        show_default=False,
    ),
]
MaxKlOpt = Annotated[
    float | None,
    _option(
        "Instead of --k: the largest K whose KL to the original, in nats, is no more.",
        "--max-kl",
        panel=_LAYERS,
        metavar="X",
        show_default=False,
    ),
]
MaxPplOpt = Annotated[
    float | None,
    _option(
        "The largest K whose perplexity is no more than this times the original's.",
        "--max-ppl-ratio",
        panel=_LAYERS,
        metavar="X",
        show_default=False,
    ),
]
MinSpeedupOpt = Annotated[
    float | None,
    _option(
        "The smallest K whose prefill and decode are so many times as fast.",
        "--min-speedup",
        panel=_LAYERS,
        metavar="X",
        show_default=False,
    ),
]
LayersOpt = Annotated[
    str | None,
    _option("Exactly these instead: 3,7,12.", "--layers", panel=_LAYERS, metavar="LIST", show_default=False),
]
CriterionOpt = Annotated[
    Literal["greedy", "kl", "linearity", "nmse", "cca", "drop"] | None,
    _option(
        "greedy: least KL one after the other; kl: each alone; linearity: error × sensitivity; nmse: the fit's error; "
        "cca: the paper's bound; drop: KL when left out.",
        panel=_LAYERS,
        metavar="NAME",
        show_default="greedy; cca for encoders",
    ),
]
FitOpt = Annotated[
    Literal["lmmse", "weighted", "sequential", "drop"],
    _option(
        "lmmse: the paper's; weighted: outlier tokens count less; sequential: behind those before; drop: W, b = 0.",
        "--fit",
        panel=_LAYERS,
        metavar="NAME",
    ),
]
RepairOpt = Annotated[
    int,
    _option(
        "Then distil W and b, and the MLPs behind, for so many steps of 1,024 tokens.",
        "--repair",
        panel=_LAYERS,
        metavar="STEPS",
    ),
]
FitInputOpt = Annotated[
    Literal["normed", "residual"],
    _option("normed or residual: the stream after or before the input norm.", panel=_LAYERS, metavar="NAME"),
]
RepairRankOpt = Annotated[
    int,
    _option(
        "Rank of what the repair may change in the MLPs behind, merged into their weights; 0: the maps alone.",
        "--repair-rank",
        panel=_LAYERS,
        metavar="R",
    ),
]
RankOpt = Annotated[
    int | None,
    _option(
        "W of that rank, as two smaller factors; less than half the model's width.",
        "--rank",
        panel=_LAYERS,
        metavar="R",
        show_default=False,
    ),
]
RidgeOpt = Annotated[
    str,
    _option(
        "Relative to each channel's variance; grows if Cholesky fails. auto: by held-out error.",
        panel=_LAYERS,
        metavar="X|auto",
    ),
]
CalibrationOpt = Annotated[
    list[str] | None,
    _option(
        "A .txt, .jsonl or .parquet file (.gz, .zst too), folder, glob or Hub data set; may be repeated. "
        "Without it, text is sampled from the model itself ('self').",
        panel=_TEXT,
        metavar="TEXT",
        show_default="self",
    ),
]
FieldOpt = Annotated[
    str,
    _option("The text field of .jsonl, .parquet or Hub rows.", "--text-field", panel=_TEXT, metavar="NAME"),
]
SamplesOpt = Annotated[int, _option("Rows of calibration tokens.", panel=_TEXT, metavar="N")]
SeqLenOpt = Annotated[int, _option("Tokens per row.", panel=_TEXT, metavar="N")]
SelectionOpt = Annotated[
    int,
    _option("Rows of tokens for choosing layers: what replacing them costs there.", panel=_TEXT, metavar="N"),
]
HeldoutOpt = Annotated[int, _option("Rows of held-out tokens, for method loss.", panel=_TEXT, metavar="N")]
CalibrationDtypeOpt = Annotated[
    Literal["auto", "float32", "bfloat16"],
    _option(
        "What the model reads the text in. auto: bfloat16 where the processor multiplies it.",
        panel=_TEXT,
        metavar="DTYPE",
    ),
]
SeedOpt = Annotated[int, _option("Seed of everything random.", panel=_TEXT, metavar="N")]
ExporterOpt = Annotated[
    Literal["torch", "genai", "optimum"],
    _option(
        "torch; genai: onnxruntime-genai's builder; optimum: optimum-onnx, in an environment of its own.",
        "--exporter",
        panel=_GRAPH,
        metavar="NAME",
    ),
]
ExporterPythonOpt = Annotated[
    str | None,
    _option(
        "The Python of the environment that has optimum-onnx.",
        "--exporter-python",
        panel=_GRAPH,
        metavar="PATH",
        show_default="$NBL_EXPORT_OPTIMUM_PYTHON",
    ),
]
PrecisionOpt = Annotated[
    Literal["fp32", "fp16", "bf16", "int4", "int8"] | None,
    _option(
        "fp32, fp16, bf16; int4, int8 with genai. The graph itself is in it; what half cannot hold stays fp32.",
        "--precision",
        panel=_GRAPH,
        metavar="NAME",
        show_default="fp32; fp16 with --trt",
    ),
]
CacheOpt = Annotated[
    Literal["concat", "shared", "static", "none"] | None,
    _option(
        "concat grows the KV cache; shared is for ONNX Runtime alone, and fastest there; static writes it in place "
        "(opset 24); none computes all tokens each time.",
        "--kv-cache",
        panel=_GRAPH,
        metavar="NAME",
        show_default="concat; static with --trt",
    ),
]
TrtOpt = Annotated[
    Literal["auto", "tensorrt", "rtx"] | None,
    _option(
        "Build engines, with tensorrt (on this GPU) or rtx (ahead of time, no GPU); auto takes what is there.",
        "--trt",
        panel=_ENGINE,
        metavar="[auto|tensorrt|rtx]",
        show_default=False,
    ),
]
SmOpt = Annotated[
    str | None,
    _option(
        "Compute capabilities to build for with rtx: 86,89.",
        "--sm",
        panel=_ENGINE,
        metavar="LIST",
        show_default="all from 80 on",
    ),
]
BatchOpt = Annotated[int, _option("Largest batch.", "--max-batch", panel=_ENGINE, metavar="N")]
MaxSeqOpt = Annotated[
    int | None,
    _option("Most tokens in one prefill.", "--max-seq", panel=_ENGINE, metavar="N", show_default="512"),
]
MaxContextOpt = Annotated[
    int | None,
    _option("Most tokens of context.", "--max-context", panel=_ENGINE, metavar="N", show_default="2048"),
]
OnnxOpt = Annotated[
    Path | None,
    _option(
        "Rewrite this graph instead, a file or a folder that somebody else exported.",
        "--onnx",
        panel=_FOREIGN,
        metavar="PATH",
        show_default=False,
    ),
]
PlanOpt = Annotated[
    Path | None,
    _option(
        "The plan of its model: OUT/nbl/plan.safetensors of an earlier run.",
        "--plan",
        panel=_FOREIGN,
        metavar="PLAN",
        show_default=False,
    ),
]
ToOpt = Annotated[
    Path | None,
    _option(
        "Folder for the rewritten graph and the files beside it.",
        "--output",
        "-o",
        panel=_FOREIGN,
        metavar="DIR",
        show_default=False,
    ),
]
InPlaceOpt = Annotated[
    bool,
    _option(
        "Change the graph where it lies: its data file is kept, the new weights are appended.",
        "--in-place",
        panel=_FOREIGN,
    ),
]
TrustOpt = Annotated[bool, _option("Run modelling code that comes with the model.", "--trust-remote-code")]
StepsOpt = Annotated[
    int, _option("Teacher-forced decode steps of the parity run.", panel=_CHECKS, metavar="N")
]
ContextsOpt = Annotated[str, _option("Context lengths to time.", panel=_CHECKS, metavar="LIST")]
RoundsOpt = Annotated[
    int, _option("Timed rounds of base and linearized in turn.", panel=_CHECKS, metavar="N")
]
QualityOpt = Annotated[
    bool, _option("Measure method loss on held-out text.", "--quality/--no-quality", panel=_CHECKS)
]
SpeedOpt = Annotated[bool, _option("Time both graphs.", "--speed/--no-speed", panel=_CHECKS)]
TasksOpt = Annotated[
    list[str] | None,
    _option(
        "A .jsonl file (.gz, .zst too), a folder of them, or a task of lm-evaluation-harness, whose data comes from "
        "the Hub; may be repeated.",
        "--tasks",
        panel=_TASKS,
        metavar="NAME|FOLDER|FILE",
        show_default=False,
    ),
]
LimitOpt = Annotated[
    int | None,
    _option(
        "Rows of each task, sampled with the seed.", "--limit", panel=_TASKS, metavar="N", show_default="all"
    ),
]
FewShotOpt = Annotated[
    int | None,
    _option(
        "Examples before each question.",
        "--few-shot",
        panel=_TASKS,
        metavar="N",
        show_default="0; of a named task its own",
    ),
]
ChatTemplateOpt = Annotated[
    bool,
    _option("Ask in the tokenizer's chat template.", "--chat-template/--no-chat-template", panel=_TASKS),
]
EvalSeedOpt = Annotated[int, _option("Seed of everything sampled.", "--seed", panel=_TASKS, metavar="N")]
EvalBatchOpt = Annotated[int, _option("Most rows at once.", "--batch-size", panel=_TASKS, metavar="N")]
MinRecoveryOpt = Annotated[
    float | None,
    _option(
        "Exit 1 where less than this is left of the base's scores, by more than the standard error.",
        "--min-recovery",
        panel=_TASKS,
        metavar="PERCENT",
        show_default=False,
    ),
]
RetrievalOpt = Annotated[
    bool,
    _option("Look up codes hidden in held-out text.", "--retrieval/--no-retrieval", panel=_RETRIEVAL),
]
RetrievalContextsOpt = Annotated[
    str | None,
    _option(
        "Context lengths.",
        "--retrieval-contexts",
        panel=_RETRIEVAL,
        metavar="LIST",
        show_default="256,512,1024 as far as the model goes",
    ),
]
RetrievalSamplesOpt = Annotated[
    int, _option("Questions at each length.", "--retrieval-samples", panel=_RETRIEVAL, metavar="N")
]
AgainstOpt = Annotated[
    list[str] | None,
    _option(
        "Another graph: a folder with a decoder, or an output folder, whose base and linearized graph both take part; "
        "may be repeated.",
        "--against",
        panel=_WHO,
        metavar="[NAME=]DIR",
        show_default=False,
    ),
]
PeerOpt = Annotated[
    list[str] | None,
    _option(
        "PyTorch eager or by torch.compile, or the graph with the same layers left out; may be repeated.",
        "--peer",
        panel=_WHO,
        metavar="eager|compile|dropped",
        show_default=False,
    ),
]
BatchesOpt = Annotated[str, _option("Rows at once.", "--batches", panel=_BENCH, metavar="LIST")]
BenchContextsOpt = Annotated[
    str, _option("Tokens in each row, as far as the model goes.", "--contexts", panel=_BENCH, metavar="LIST")
]
BenchRoundsOpt = Annotated[
    int,
    _option(
        "Timed rounds of everybody in turn; up to three times as many where the noise hides the effect.",
        "--rounds",
        panel=_BENCH,
        metavar="N",
    ),
]
SecondsOpt = Annotated[
    float,
    _option(
        "Bound for each cell and phase; three rounds are always run.", "--seconds", panel=_BENCH, metavar="S"
    ),
]
DeviceOpt = Annotated[str, _option("Where to run.", "--device", panel=_BENCH, metavar="cpu|cuda")]
MemoryOpt = Annotated[
    bool,
    _option(
        "Measure peak memory first, each graph in a process of its own.", "--memory/--no-memory", panel=_BENCH
    ),
]
