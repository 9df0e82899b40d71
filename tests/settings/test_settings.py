"""What is asked of the stages that make something: what `auto` means, what suits a task, and what contradicts."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import inf, nan
from typing import Any

import pytest

from nbl_export import api, settings
from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.models.folder import task_named
from nbl_export.settings import (
    NO_BOUND,
    NO_BUDGET,
    TABLES,
    BenchSettings,
    Budget,
    DiffBounds,
    EngineSettings,
    EvalSettings,
    GenerateSettings,
    LossBound,
    RunSettings,
    SelectSettings,
    Settings,
    VerifySettings,
    auto_budget,
)
from nbl_export.settings.choices import AUTO_PERPLEXITY_RATIO, CRITERIA
from nbl_export.settings.definition import OnDevice, bytes_of
from nbl_export.settings.graphs import OptionalEngines
from nbl_export.settings.making import Workload, workload_of

DECODER, ENCODER = task_named("text-generation"), task_named("feature-extraction")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: SelectSettings(k="8"), "SelectSettings.k is '8'; give a whole number or 'auto'."),  # type: ignore[arg-type]
        (lambda: SelectSettings(k=2.5), "SelectSettings.k is 2.5; give"),  # type: ignore[arg-type]
        (lambda: SelectSettings(k=True), "SelectSettings.k is True; give"),
        (
            lambda: SelectSettings(layers=(1, "2")),
            "SelectSettings.layers is (1, '2'); give a tuple, each of it a layer.",
        ),  # type: ignore[arg-type]
        (
            lambda: settings.CalibrateSettings("a.txt"),
            "CalibrateSettings.calibration is 'a.txt'; give a tuple, each",
        ),  # type: ignore[arg-type]
        (
            lambda: settings.CalibrateSettings(samples="x"),
            "CalibrateSettings.samples is 'x'; give a whole number.",
        ),  # type: ignore[arg-type]
        (lambda: VerifySettings(speed="no"), "VerifySettings.speed is 'no'; give true or false."),  # type: ignore[arg-type]
        (lambda: LossBound(max_kl="a"), "LossBound.max_kl is 'a'; give a number."),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_another_type_is_refused_with_its_field(made: Any, said: str) -> None:
    with pytest.raises(InputError) as told:
        made()
    assert str(told.value).startswith(said)
    assert SelectSettings(k=None, ridge=1, layers=(1, Mlp(2), Span(3, 4)), rank="auto").ridge == 1  # type: ignore[arg-type]


def test_a_criterion_that_suits_the_task() -> None:
    asked = SelectSettings(k=1)
    assert (asked.resolve(DECODER).criterion, asked.resolve(ENCODER).criterion) == ("greedy", "cca")
    # What was asked for is not changed, and nothing else is filled in.
    for criterion in CRITERIA:
        own = replace(asked, criterion=criterion)
        assert own.resolve(DECODER) == own


# graphs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engines", [False, True])
@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ({"target": "onnxruntime"}, ("torch", "fp32", "shared")),
        ({"target": "tensorrt"}, ("torch", "fp16", "static")),
        ({"target": "optimum"}, ("torch", "fp32", "concat")),
        ({"target": "web"}, ("torch", "fp32", "concat")),
        ({"target": "genai"}, ("genai", "fp32", "concat")),
        # Single flags win, and what was said stays where the exporter offers it.
        ({"target": "onnxruntime", "kv_cache": "static"}, ("torch", "fp32", "static")),
        ({"target": "onnxruntime", "precision": "bf16"}, ("torch", "bf16", "shared")),
        ({"target": "genai", "precision": "int4"}, ("genai", "int4", "concat")),
        ({"target": "genai", "exporter": "torch"}, ("torch", "fp32", "concat")),
        ({"target": "tensorrt", "exporter": "optimum"}, ("optimum", "fp32", "concat")),
    ],
)
def test_a_target_says_what_is_not_asked(engines: bool, asked: dict[str, str], made: tuple[str, ...]) -> None:
    settings = api.ExportSettings(**asked)
    settings.check()
    found = settings.resolve(task_named("text-generation"), engines)
    assert (found.exporter, found.precision, found.kv_cache) == made
    # What is made is the same, so what is kept is, too.
    alone = api.ExportSettings(found.precision, found.kv_cache, found.exporter)
    assert found.as_json() == alone.as_json()


def test_an_encoder_has_no_cache_on_any_target_and_no_exporter_of_decoders() -> None:
    encoder = task_named("text-classification")
    assert api.ExportSettings(target="onnxruntime").resolve(encoder).kv_cache == "none"
    with pytest.raises(InputError, match="--target genai is for decoders"):
        api.ExportSettings(target="genai").resolve(encoder)
    assert api.ExportSettings(target="onnxruntime", opset=18).resolve(encoder).opset == 18
    with pytest.raises(InputError, match="--opset is 24; graphs with --kv-cache none are of opsets 18 to 23"):
        api.ExportSettings(target="tensorrt", opset=24).resolve(encoder)


@pytest.mark.parametrize(
    ("settings", "whose"),
    [
        ({"exporter": "genai"}, "--exporter genai"),
        ({"kv_cache": "shared"}, "--kv-cache shared"),
        ({"target": "genai"}, "--target genai"),
        ({"target": "onnxruntime"}, "--target onnxruntime"),
    ],
)
def test_engines_of_graphs_that_tensorrt_does_not_take(
    tmp_path: Any, tiny_folder: Any, settings: dict[str, str], whose: str
) -> None:
    with pytest.raises(
        InputError, match=rf"TensorRT does not take the graphs of {whose}: .*GroupQuery.*static or concat\.$"
    ):
        api.run(
            tiny_folder,
            tmp_path / "out",
            api.SelectSettings(k=1),
            exporting=api.ExportSettings(**settings),
            engines=api.EngineSettings("rtx"),
        )
    assert not (tmp_path / "out").exists()


def test_engines_are_asked_for_by_naming_their_library() -> None:
    options = OptionalEngines(max_batch=8, sm=("86",))
    assert options.asked is None
    found = replace(options, library="rtx").asked
    assert type(found) is settings.EngineSettings
    assert found == settings.EngineSettings("rtx", max_batch=8, sm=("86",))
    # The same settings with the same defaults, but for that.
    assert {**asdict(OptionalEngines()), "library": "auto"} == asdict(settings.EngineSettings())


# choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "opset", "said"),
    [
        ("concat", 18, None),
        ("none", 22, None),
        ("concat", 23, None),
        ("static", 24, None),
        ("concat", 17, "--opset is 17; graphs with --kv-cache concat are of opsets 18 to 23."),
        ("concat", 24, "--opset is 24; graphs with --kv-cache concat are of opsets 18 to 23."),
        (
            "static",
            18,
            "--opset is 18; graphs with --kv-cache static are of opset 24; concat and none go with older ones.",
        ),
        (
            "shared",
            22,
            "--opset is 22; graphs with --kv-cache shared are of opset 23; concat and none go with older ones.",
        ),
        ("shared", 24, "--opset is 24; graphs with --kv-cache shared are of opset 23."),
    ],
)
def test_an_opset_that_a_cache_does_not_have_is_refused(cache: str, opset: int, said: str | None) -> None:
    asked = api.ExportSettings(opset=opset, kv_cache=cache)
    if said is None:
        assert asked.resolve(task_named("text-generation")).opset == opset
        return
    with pytest.raises(InputError) as caught:
        asked.resolve(task_named("text-generation"))
    assert str(caught.value) == said


# converting ----------------------------------------------------------------------------------------


# measuring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "own", "budget", "bound"),
    [
        # Where K is to be found, one bound is the budget and the gate.
        (SelectSettings(budget=Budget(0.1, None, 1.2)), NO_BOUND, Budget(0.1, None, 1.2), LossBound(0.1)),
        (SelectSettings(k="auto"), NO_BOUND, Budget(None, 1.1), LossBound(None, 1.1)),  # type: ignore[arg-type]
        # Where K is given, it is the gate alone.
        (SelectSettings(k=2, budget=Budget(0.1)), NO_BOUND, NO_BUDGET, LossBound(0.1)),
        (SelectSettings(layers=(1,), budget=Budget(None, 2.0)), NO_BOUND, NO_BUDGET, LossBound(None, 2.0)),
        # A bound that verify is given for itself is its own.
        (SelectSettings(budget=Budget(0.1)), LossBound(0.3), Budget(0.1), LossBound(0.3)),
        (SelectSettings(budget=Budget(0.1)), LossBound(None, 1.5), Budget(0.1), LossBound(0.1, 1.5)),
        (SelectSettings(k=2), NO_BOUND, NO_BUDGET, NO_BOUND),
    ],
)
def test_one_bound_serves_the_choice_and_the_verdict(
    selection: SelectSettings, own: LossBound, budget: Budget, bound: LossBound
) -> None:
    found = RunSettings(selection, verification=VerifySettings(bound=own)).sharing_bounds()
    assert (found.selection.budget, found.verification.bound) == (budget, bound)
    found.check()


# budget --------------------------------------------------------------------------------------------


def test_auto_is_a_tenth_of_perplexity_where_nothing_else_bounds_the_loss() -> None:
    assert AUTO_PERPLEXITY_RATIO == 1.10
    assert auto_budget(NO_BUDGET) == Budget(max_perplexity_ratio=1.10)
    assert auto_budget(Budget(min_speedup=1.2)) == Budget(None, 1.10, 1.2)
    for bounded in (Budget(max_kl=0.3), Budget(max_perplexity_ratio=1.5), Budget(0.3, 1.5, 2.0)):
        assert auto_budget(bounded) == bounded


# bounds --------------------------------------------------------------------------------------------

# device --------------------------------------------------------------------------------------------

STAGES = ("calibrate", "select", "verify", "eval")


def asked(table: str, device: str) -> Any:
    more: dict[str, Any] = {"k": 1} if table == "select" else {}
    return TABLES[table](device=device, **more)


@pytest.mark.parametrize("table", STAGES)
def test_a_device_does_not_identify_what_is_made(table: str) -> None:
    plain, other = asked(table, "auto"), asked(table, "cuda")
    assert (
        isinstance(plain, OnDevice) and plain.as_json() == other.as_json() and "device" not in plain.as_json()
    )


# size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 << 29),
        ("1tib", 1 << 40),
        ("64kB", 64_000),
        ("7KiB", 7168),
    ],
)
def test_a_size_is_so_many_bytes(size: str, found: int) -> None:
    assert bytes_of(size) == found
    api.CalibrateSettings(memory=size).check()


# talking -------------------------------------------------------------------------------------------


# workload ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prefill=512", Workload(prefill=512)),
        ("decode=128@4096", Workload(decode=128, context=4096)),
        ("prefill=512,decode=128@4096,batch=4", Workload(512, 128, 4096, 4)),
        ("prefill=512, decode=128", Workload(512, 128, 512)),
        ("batch=2,weight=0.25,prefill=8", Workload(8, batch=2, weight=0.25)),
    ],
)
def test_a_workload_is_what_it_says(text: str, found: Workload) -> None:
    assert workload_of(text) == found
    settings = api.SelectSettings(k=1, workload=(text, "prefill=1"))
    settings.check()
    assert settings.workloads == (found, Workload(prefill=1))


# refusals ------------------------------------------------------------------------------------------

NO_WORKLOADS = (
    *("", "512", "prefill", "prefill=", "prefill=0", "prefill=-5", "prefill=1e3", "prefill=512,prefill=8"),
    *("prefill=512@8", "decode=128", "decode=128@0", "decode=@512", "batch=4", "prefill=8,batch=0"),
    *("prefill=8,weight=0", "prefill=8,weight=inf", "prefill=8,rows=2", "prefill=8;batch=2"),
    f"prefill={'9' * 10}",
)
NO_SIZES = ("4", "GiB", "-1GiB", "4 gigabytes", "4Gi", "1e3MB", "0MB", "0.0GiB", "9" * 40 + "GB", "nan")
NO_DEVICES = ("gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:0,1", "cuda:99999")
REFUSED: list[tuple[Settings, str]] = [
    (SelectSettings(), "Say how many layers to linearize: --k K, --k auto, or a budget"),
    (SelectSettings(k=1, budget=Budget(max_kl=1.0)), "--k and --layers say .*give one of them"),
    (SelectSettings(layers=(1,), budget=Budget(min_speedup=1.5)), "--k and --layers say .*give one of them"),
    (SelectSettings(k=0, budget=Budget(max_kl=0.0)), "--k and --layers say .*give one of them"),
    (
        SelectSettings(k=1, layers=(1, 2)),
        r"--k 1 and --layers with 2 layers contradict each other: give one\.",
    ),
    (SelectSettings(k=1, layers=(1, 1)), ".*contradict each other"),
    (SelectSettings(k=2, layers=()), "--k 2 and --layers with 0 layers contradict"),
    (SelectSettings(layers=(1, 2, 1)), r"--layers names a layer twice: name each layer once\."),
    (SelectSettings(layers=(Span(1, 2), 2)), r"--layers names 2 and 1-2\.span, which overlap: leave one"),
    (SelectSettings(layers=(Mlp(2), Span(1, 2))), ".*overlap"),
    (SelectSettings(layers=(1,), workload=("prefill=8",)), "--layers names the layers, and --workload"),
    (SelectSettings(budget=Budget(max_kl=-0.1)), r"--max-kl is -0\.1; it must be 0 nats or more\."),
    (Budget(max_kl=nan), "--max-kl is nan"),
    (Budget(max_perplexity_ratio=0.99), r"--max-ppl-ratio is 0\.99; it must be 1 or more \(1\.05 allows"),
    (Budget(max_perplexity_ratio=nan), "--max-ppl-ratio is nan"),
    (Budget(max_kl=inf), "--max-kl is inf; give a finite number"),
    (SelectSettings(budget=Budget(min_speedup=0.5)), r"--min-speedup is 0\.5; it must be 1 or more"),
    (Budget(max_kl=0.1, min_speedup=nan), "--min-speedup is nan"),
    (settings.CalibrateSettings(("self", "a.txt")), "--calibration self stands alone"),
    (settings.CalibrateSettings(device="mps"), "--device is mps: an Apple GPU has no float64, .* say cpu"),
    (api.ExportSettings(target="onnx"), "--target 'onnx' is unknown; choose one of onnxruntime, genai"),
    (
        api.ExportSettings(target="genai", kv_cache="static"),
        ".*'static' is not offered by .*genai: choose concat",
    ),
    (
        api.ExportSettings(target="genai", inputs="embeds"),
        "--inputs embeds is for --exporter torch, not for genai",
    ),
    (
        api.ExportSettings(exporter="tensorflow"),
        ".*'tensorflow' is unknown; choose one of torch, genai, optimum",
    ),
    (api.ExportSettings("int4", exporter="optimum"), ".*choose fp32; int4 is for --exporter torch or genai"),
    (api.ExportSettings("fp16", exporter="optimum"), ".*choose fp32; fp16 is for --exporter torch or genai"),
    (
        api.ExportSettings(exporter="genai", kv_cache="static"),
        ".*choose concat; static is for --exporter torch",
    ),
    (api.ExportSettings("fp8"), r".*choose fp32, fp16, bf16, int4, int8\."),
    (
        api.ExportSettings(exporter="genai", opset=18),
        "--opset is for --exporter torch, not for genai: leave one",
    ),
    *(
        (
            api.ConvertSettings(to, bits),
            f"--precision {bits} is of --to gguf, not of --to {to}: choose fp32 or fp16",
        )  # type: ignore[arg-type]
        for to in ("mlx", "hf", "openvino", "decilm")
        for bits in ("q8_0", "q4_k_m")
    ),
    (
        api.ConvertSettings("openvino", "bf16"),
        ".*of --to gguf or mlx or hf or decilm, not .* fp16, and quantize",
    ),
    (VerifySettings(decode_steps=0), r"--decode-steps is 0; it must be at least 1\."),
    (VerifySettings(contexts=(2, 1)), r"--contexts needs lengths of at least 2 tokens\."),
    (VerifySettings(contexts=()), r"--contexts needs lengths of at least 2 tokens\."),
    (VerifySettings(rounds=2), r"--rounds is 2; at least 3 are needed for a spread\."),
    (
        VerifySettings(quality=False, bound=LossBound(None, 1.05)),
        "--no-quality leaves unmeasured what --max-kl",
    ),
    (VerifySettings(bound=LossBound(max_kl=-1.0)), "--max-kl is -1; it must be 0 nats or more"),
    (EvalSettings(retrieval=False), "Nothing to evaluate: name --tasks, or leave out --no-retrieval"),
    (EvalSettings(limit=0), r"--limit is 0; it must be at least 1\."),
    (EvalSettings(few_shot=-1), r"--few-shot is -1; it must be at least 0\."),
    (EvalSettings(batch_size=0), r"--batch-size is 0; it must be at least 1\."),
    (EvalSettings(retrieval_contexts=(1,)), r"--retrieval-contexts needs lengths of at least 2 tokens\."),
    (EvalSettings(retrieval_contexts=()), r"--retrieval-contexts needs lengths of at least 2 tokens\."),
    (EvalSettings(retrieval_samples=0), r"--retrieval-samples is 0; it must be at least 1\."),
    *(
        (EvalSettings(min_recovery=p), rf"--min-recovery is {p}; give percent, between 0 and 200\.")
        for p in (-0.5, 200.5, nan)
    ),
    (BenchSettings(batches=(4, 0)), r"--batches needs numbers of rows, at least 1\."),
    (BenchSettings(batches=()), r"--batches needs numbers of rows, at least 1\."),
    (BenchSettings(contexts=(1,)), r"--contexts needs lengths of at least 2 tokens\."),
    (BenchSettings(rounds=2), r"--rounds is 2; at least 3 are needed for a spread\."),
    (BenchSettings(seconds=0.0), r"--seconds is 0; it must be more than 0\."),
    (BenchSettings(peer=("eager", "jax")), "--peer 'jax' is unknown; choose one of"),
    (BenchSettings(device="tpu"), r"--device 'tpu' is unknown; choose one of cpu, cuda\."),
    (DiffBounds(max_slowdown=0.99), r"--max-slowdown is 0\.99; it must be 1 or more"),
    (GenerateSettings(graph="other"), "--graph 'other' is unknown; choose one of linearized, base, both"),
    (GenerateSettings(max_tokens=0), "--max-tokens is 0; it must be at least 1"),
    (GenerateSettings(temperature=-0.1), "--temperature is -0.1; it must be at least 0"),
    (GenerateSettings(top_p=0.0), "--top-p is 0; it must be more than 0 and at most 1"),
    (GenerateSettings(top_p=1.01), "--top-p is 1.01; it must be more than 0 and at most 1"),
    (GenerateSettings(seed=-1), "--seed is -1; it must be at least 0"),
    (GenerateSettings(raw=True, system="x"), "--raw uses no chat template, and --system is a part of it"),
    *(
        (
            settings.CalibrateSettings(device=device),
            rf"--device is '{device}'; it must be auto, cpu, .* xpu\.$",
        )
        for device in NO_DEVICES
    ),
    *(
        (settings.CalibrateSettings(memory=size), r"--memory is .*; give a size, as 4GiB or 500MB\.$")
        for size in NO_SIZES
    ),
    *(
        (
            SelectSettings(k=1, workload=(text,)),
            "--workload is .*; give a prefill, .*, as prefill=512,decode=",
        )
        for text in NO_WORKLOADS
    ),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_what_is_refused_of_any_model(asked: Settings, said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}") as caught:
        asked.check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "asked",
    [
        *(settings.CalibrateSettings(device=d) for d in ("auto", "cpu", "cuda", "cuda:0", "cuda:9", "xpu")),
        VerifySettings(decode_steps=1, contexts=(2, 2), rounds=3, bound=LossBound(max_perplexity_ratio=1.05)),
        VerifySettings(quality=False),
        EvalSettings(limit=1, few_shot=0, batch_size=1, retrieval_contexts=(2,), retrieval_samples=1),
        *(EvalSettings(min_recovery=percent) for percent in (0.0, 97.0, 200.0)),
        BenchSettings(
            batches=(1,), contexts=(2,), rounds=3, seconds=0.1, peer=("eager", "dropped"), device="cuda"
        ),
        GenerateSettings(temperature=0.0, top_p=1.0, max_tokens=1, seed=0),
    ],
)
def test_what_is_at_a_bound_is_taken(asked: Settings) -> None:
    asked.check()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (SelectSettings(k=1, criterion="greedy"), "--criterion greedy is measured by"),
        (SelectSettings(k=1, criterion="drop"), "--criterion drop is measured by"),
        (SelectSettings(k=1, fit="sequential"), "--fit sequential is measured by"),
        (SelectSettings(k=1, fit="weighted"), "--fit weighted is measured by"),
        (SelectSettings(k=1, ridge=None), "--ridge auto is measured by"),
        (SelectSettings(k=1, repair=1), "--repair is measured by"),
        (SelectSettings(k=1, workload=("prefill=8",)), "--workload is measured by"),
        (SelectSettings(budget=Budget(min_speedup=1.5)), "A budget for K is measured by"),
        (SelectSettings(k=1, criterion="nmse"), None),
        (SelectSettings(k=1, criterion="cca", fit="drop"), None),
        (SelectSettings(layers=(1, 2)), None),
        (api.ConvertSettings(), "Other engines' forms are of decoders;"),
        (
            VerifySettings(bound=LossBound(max_kl=0.1)),
            "--max-kl and --max-ppl-ratio bound what a decoder predicts;",
        ),
        (VerifySettings(), None),
        (EvalSettings(), "Tasks and retrieval are asked of decoders;"),
        (BenchSettings(), "A bench times prefill and decode;"),
        (EngineSettings(), "TensorRT engines are built of decoders only;"),
    ],
)
def test_what_only_a_decoder_can_be_asked(asked: Settings, said: str | None) -> None:
    asked.check()
    asked.resolve(DECODER)
    if said is None:
        asked.resolve(ENCODER)
    else:
        with pytest.raises(InputError, match=rf"^{said}.* this model is an encoder \(feature-extraction\)"):
            asked.resolve(ENCODER)
