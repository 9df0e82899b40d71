"""A decoder measured part by part, its engines and its forms: what passes, what fails and where it says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.calibrate.text import CalibrationText, load_text
from nbl_export.engine.library import Gpu
from nbl_export.engine.manifest import EngineFile, Limits
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.rounding import UNTIMED
from nbl_export.linearize.plan import LinearLayer, Plan, load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.weights import in_precision
from nbl_export.progress import Silent
from nbl_export.runtime.tensorrt import EngineStream
from nbl_export.runtime.torch import torch_stream
from nbl_export.settings import VerifySettings
from nbl_export.verify import engines as engines_module
from nbl_export.verify import measure as module
from nbl_export.verify.case import DecoderCase, Measurement, fitting_prompts
from nbl_export.verify.engines import check_gguf, check_tokens, measure_converted
from nbl_export.verify.measure import measure
from nbl_export.verify.parity.figures import DecoderParity, gates_for
from nbl_export.verify.speed.pair import fitting_contexts
from nbl_export.workspace import Workspace
from tests.finished import Graphs, manifest_of
from tests.runtime.fake_tensorrt import loaded_engine
from tests.verify.conftest import LAYERS, PARITY, case_of, changed, checks, with_fault


def test_a_right_graph_passes_and_what_is_not_asked_for_says_so(
    engine_graphs: Graphs, plan: Plan, text: CalibrationText
) -> None:
    found = measure(
        case_of(
            engine_graphs,
            plan,
            text,
            engine_graphs("concat"),
            engine_graphs("concat", "fp32", LAYERS),
            PARITY,
        )
    )
    assert [(c.name, c.status) for c in found.checks] == [
        ("parity", "passed"),
        ("method loss", "skipped"),
        ("speed", "skipped"),
    ]
    assert [c.detail for c in found.checks[1:]] == ["--no-quality", "--no-speed"]
    parity = found.parity
    assert isinstance(parity, DecoderParity) and parity.precision == "fp32"
    # Prompts of 64, 41 and 23 tokens after the token that a text begins with, and four steps.
    assert parity.prompt_lengths == (65, 42, 24) and len(parity.steps) == 5
    assert parity.worst < 1e-3 and 0 < parity.rounding_noise < 1e-3
    assert found.checks[0].detail == (
        f"max |Δlogit| {parity.worst:.2g} over a prefill and 4 decode steps, within all float32 gates"
    )
    assert parity.base_graph is parity.pytorch_in_precision is None
    assert found.divergence is found.method_loss is found.speed is found.engine_parity is None


@pytest.mark.parametrize(
    ("form", "name", "factor"),
    [
        ("concat", "nbl_linear.weight", 1.05),
        ("static", "nbl_linear.bias", 0.0),
        ("concat", "nbl_linear.weight", float("nan")),
    ],
    ids=["a scaled W", "no bias", "NaN"],
)
def test_wrong_maps_fail_and_their_layer_is_named(
    engine_graphs: Graphs,
    plan: Plan,
    text: CalibrationText,
    tmp_path: Path,
    form: str,
    name: str,
    factor: float,
) -> None:
    path = with_fault(engine_graphs(form, "fp32", LAYERS), tmp_path, "layers.3.", name, factor)
    found = measure(case_of(engine_graphs, plan, text, engine_graphs(form), path, PARITY))
    check = checks(found)["parity"]
    assert check.status == "failed" and "max |Δlogit| is" in check.detail
    assert found.divergence and "layer 3 (linear)" in found.divergence and found.divergence in check.detail
    # The figures are kept all the same.
    assert isinstance(found.parity, DecoderParity) and len(found.parity.steps) == 5


@pytest.mark.parametrize(("noise", "said"), [(2.6e-4, "amplifies rounding"), (2.4e-4, "after the last one")])
def test_a_plan_that_amplifies_rounding_is_told_from_a_fault_after_the_layers(
    engine_graphs: Graphs,
    plan: Plan,
    text: CalibrationText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noise: float,
    said: str,
) -> None:
    """A quarter of the gate of 1e-3, where every layer agrees."""
    monkeypatch.setattr(module, "rounding_noise", lambda *_, **__: noise)
    path = with_fault(engine_graphs("concat", "fp32", LAYERS), tmp_path, "layers.4.", "up_proj", 1.5)
    found = measure(case_of(engine_graphs, plan, text, engine_graphs("concat"), path, PARITY))
    assert isinstance(found.parity, DecoderParity) and found.parity.rounding_noise == noise
    assert found.divergence and said in found.divergence


def test_a_float16_file_that_does_not_run_as_it_is_fails(
    engine_graphs: Graphs, plan: Plan, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures are those of the graph rounded as it says; what onnxruntime makes of the file is held to it too."""
    linear = engine_graphs("concat", "fp16", LAYERS)
    other = changed(linear, tmp_path, "<f2", float("nan"))
    real = module.ort_stream

    def stream(path: Path, longest: int, rounded: bool = True, **others: Any) -> Any:
        # An operator that overflows where values are not rounded as the graph says.
        return real(path if rounded else other, longest, rounded=rounded, **others)

    case = case_of(engine_graphs, plan, text, engine_graphs("concat", "fp16"), linear, PARITY)
    assert checks(measure(case))["parity"].status == "passed"
    monkeypatch.setattr(module, "ort_stream", stream)
    found = measure(case)
    check = checks(found)["parity"]
    assert check.status == "failed" and check.detail.startswith("as onnxruntime runs it, max |Δlogit| is nan")
    assert isinstance(found.parity, DecoderParity) and found.parity.worst < 0.5


def test_a_half_graph_that_loses_more_than_pytorch_fails_within_the_wide_gates(
    engine_graphs: Graphs, plan: Plan, text: CalibrationText, tmp_path: Path
) -> None:
    right = engine_graphs("static", "fp16", LAYERS)
    wrong = changed(right, tmp_path, "<f2", 1.02)
    for path, status in ((right, "passed"), (wrong, "failed")):
        result = measure(case_of(engine_graphs, plan, text, engine_graphs("static", "fp16"), path, PARITY))
        check = checks(result)["parity"]
        assert check.status == status, check.detail
        assert isinstance(result.parity, DecoderParity)
        assert max(s.max_abs for s in result.parity.steps) < gates_for("float16").max_abs_logit
    assert "PyTorch's own in this precision" in check.detail and "1.5 times that" in check.detail


NONE: Any = None


def case(
    heldout: Any = None, start: tuple[int, ...] = (1,), path: Path = NONE, **settings: Any
) -> DecoderCase:
    rows = np.asarray([[0]] if heldout is None else heldout, dtype=np.int32)
    text = CalibrationText(NONE, NONE, NONE, rows, NONE, np.array(start, dtype=np.int32))
    return DecoderCase(NONE, NONE, path, path, VerifySettings(**settings), Silent(), text)


def test_rows_are_pieces_of_the_text_with_room_for_the_steps() -> None:
    found = case(np.arange(10, 22).reshape(3, 4), decode_steps=2).rows((3, 1))
    # Five tokens and the next three, each after the one that a text begins with.
    assert [row.tolist() for row in found] == [[1, 10, 11, 12, 13, 14], [1, 15, 16, 17]]
    assert {row.dtype for row in found} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    ("precision", "speed", "why"),
    [
        ("fp32", True, None),
        ("fp32", False, "--no-speed"),
        ("fp16", True, UNTIMED),
        ("fp16", False, "--no-speed"),
    ],
)
def test_why_a_graph_is_not_timed(
    engine_graphs: Graphs, precision: str, speed: bool, why: str | None
) -> None:
    found = case(path=engine_graphs("concat", precision, (0, 3)), speed=speed)
    assert found.precision.name == precision
    assert found.why_not_timed == why


@pytest.mark.parametrize(
    ("limit", "room", "fitting", "dropped"),
    [
        (None, 1, [16, 64, 512], ""),
        (512, 0, [16, 64, 512], ""),
        (512, 1, [16, 64], "512"),
        (16, 1, [8], "16, 64, 512"),  # half of the positions where nothing that was asked for fits
        (2, 1, [2], "16, 64, 512"),
    ],
)
def test_contexts_that_a_model_has_positions_for(
    limit: int | None, room: int, fitting: list[int], dropped: str
) -> None:
    found = Measurement()
    assert fitting_contexts(found, limit, (16, 64, 512), room) == fitting
    told = f"Speed at {dropped} tokens is not measured: the model has {limit} positions."
    assert found.notes == ([told] if dropped else [])


L4 = Gpu("NVIDIA L4", "8.9")


@pytest.mark.parametrize(("positions", "steps", "most"), [(512, 448, 447), (512, 10**5, 447), (32, 16, 15)])
def test_steps_that_do_not_fit_are_refused(positions: int, steps: int, most: int) -> None:
    with pytest.raises(InputError, match=f"the model has {positions} positions: ask for {most} or fewer"):
        fitting_prompts(positions, 1, steps)


ROOM = Limits(max_batch=3, max_seq=70, max_context=96)


Measure = Callable[..., Measurement]


@pytest.fixture
def on_gpu(
    engine_graphs: Graphs, text: CalibrationText, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> Measure:
    """Measure a pair of engines of the named graphs as if on a GPU; ``engine`` is another linearized one's graph."""

    def run(
        form: str = "static",
        precision: str = "fp32",
        settings: VerifySettings = PARITY,
        limits: Limits = ROOM,
        engine: Path | None = None,
        base_engine: Path | None = None,
    ) -> Measurement:
        base, linear = engine_graphs(form, precision), engine_graphs(form, precision, LAYERS)
        pair = [
            EngineFile(path, manifest_of(path, limits, role))
            for path, role in ((base_engine or base, "base"), (engine or linear, "linearized"))
        ]
        monkeypatch.setattr(engines_module, "find_gpu", lambda: L4)
        monkeypatch.setattr(engines_module, "load_engine", functools.partial(loaded_engine, limits=limits))
        return measure(case_of(engine_graphs, plan, text, base, linear, settings, pair))

    return run


@pytest.mark.parametrize(
    ("form", "precision"), [("static", "fp32"), ("concat", "fp32"), ("static", "fp16"), ("concat", "bf16")]
)
def test_a_right_engine_passes(on_gpu: Measure, form: str, precision: str) -> None:
    result = on_gpu(form, precision)
    told = checks(result)
    assert told["engine build"].status == told["parity"].status == told["engine parity"].status == "passed"
    assert "on NVIDIA L4, within all" in told["engine parity"].detail and "engine run" not in told
    assert result.engine_parity is not None and result.engine_speed is None
    found = result.engine_parity.linearized
    assert found is not None and [s.step for s in found.steps] == [0, 1, 2, 3, 4]
    # Ragged, and as many tokens as that: all but the last four of each row in the prefill.
    assert found.prompt_lengths == (65, 42, 24) and found.steps[0].tokens == sum(found.prompt_lengths)
    assert (max(s.max_abs for s in found.steps) < 1e-3) == (precision == "fp32")


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        (Limits(1, 70, 96), (65,)),
        (Limits(2, 50, 96), (50, 32)),
        (Limits(3, 60, 61), (57, 36, 21)),  # shorter and still ragged; four places are left for decoding
    ],
)
def test_rows_are_as_long_as_the_engine_takes(
    on_gpu: Measure, limits: Limits, lengths: tuple[int, ...]
) -> None:
    result = on_gpu(limits=limits)
    assert checks(result)["engine parity"].status == "passed"
    assert result.engine_parity is not None and result.engine_parity.linearized is not None
    assert result.engine_parity.linearized.prompt_lengths == lengths


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_an_engine_of_other_weights_fails(
    on_gpu: Measure, engine_graphs: Graphs, tmp_path: Path, factor: float
) -> None:
    wrong = changed(engine_graphs("static", "fp32", LAYERS), tmp_path, "<f4", factor)
    found = checks(on_gpu(engine=wrong))
    # The graph itself is right; only what runs on the GPU is not.
    assert found["parity"].status == "passed"
    assert found["engine parity"].status == "failed"
    assert (
        "max |Δlogit| is" in found["engine parity"].detail
        and "gate is 0.001" in found["engine parity"].detail
    )


def test_an_engine_that_cannot_run_is_a_failed_check_and_not_the_end(
    on_gpu: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_self: Any, profile: str) -> None:
        raise BuildError(f"The engine failed to run its {profile} profile.")

    monkeypatch.setattr(EngineStream, "_execute", broken)
    found = checks(on_gpu())
    assert found["parity"].status == "passed"
    for name in ("engine parity", "base engine parity"):
        assert (found[name].status, found[name].detail) == (
            "failed",
            "The engine failed to run its prefill profile.",
        )


@pytest.mark.parametrize("limits", [Limits(3, 4, 8), Limits(3, 1, 2)], ids=str)
def test_an_engine_too_short_for_the_steps_is_no_crash_and_no_pass(on_gpu: Measure, limits: Limits) -> None:
    """``build --max-context 8`` and ``verify --decode-steps 8`` are both allowed."""
    result = on_gpu(settings=replace(PARITY, decode_steps=8), limits=limits)
    told = checks(result)["engine run"]
    assert told.status == "skipped" and "hold no prompt and 8 decode steps" in told.detail
    assert result.engine_parity is None


def test_without_a_gpu_nothing_is_run_and_nothing_passes(
    on_gpu: Measure, monkeypatch: pytest.MonkeyPatch, engine_graphs: Graphs, text: CalibrationText, plan: Plan
) -> None:
    monkeypatch.setattr(engines_module, "find_gpu", lambda: None)
    monkeypatch.setattr(engines_module, "load_engine", lambda path: pytest.fail("loaded"))
    base, linear = engine_graphs("static", "fp16"), engine_graphs("static", "fp16", LAYERS)
    ahead = {"ahead_of_time": True, "capabilities": ("SM86", "SM89"), "gpu": None}
    pair = [
        EngineFile(p, manifest_of(p, role=r, **ahead)) for p, r in ((base, "base"), (linear, "linearized"))
    ]
    settings = replace(PARITY, speed=True)
    result = measure(case_of(engine_graphs, plan, text, base, linear, settings, pair))
    found = checks(result)
    assert found["engine build"].status == "passed"
    assert found["engine run"].status == "skipped"
    assert found["engine run"].detail == (
        "engine built (ahead of time for SM86, SM89); not run: no NVIDIA GPU"
    )
    assert {n for n in found if n.startswith("engine")} == {"engine build", "engine run"}
    assert result.engine_parity is None and result.engine_speed is None
    # Nothing of a GPU can be said from a CPU without its kernels.
    assert (
        found["speed"].status == "skipped" and "does not compute in half precision" in found["speed"].detail
    )


@pytest.fixture
def eager_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def converted(model: torch.nn.Module, dtype: str, device: str) -> Any:
        assert device == "cuda"
        return in_precision(model, dtype)

    monkeypatch.setattr(engines_module, "in_precision", converted)


@pytest.mark.usefixtures("eager_on_cpu")
def test_speed_of_everyone_at_the_contexts_that_the_engines_hold(on_gpu: Measure) -> None:
    """65 tokens are more than one prefill holds."""
    settings = replace(PARITY, speed=True, contexts=(8, 64, 65), rounds=3)
    result = on_gpu("static", "fp16", settings, Limits(2, 64, 96))
    assert result.engine_speed is not None
    speed = result.engine_speed
    ran = [(r.name, c.context) for c in speed.cells for r in c.results if c.phase == "decode"]
    names = ["base engine", "linearized engine", "PyTorch eager, base"]
    assert ran == [(name, context) for context in (8, 64) for name in names]
    assert [cell.context for cell, _, _ in speed.speedups()] == [8, 8, 64, 64]
    assert speed.machine.device == "NVIDIA L4"
    for graph in ("base", "linearized"):
        name, why = f"onnxruntime CUDA, {graph}", "onnxruntime has no CUDAExecutionProvider here"
        assert all(cell.absent[name] == why for cell in speed.cells)
        assert result.notes.count(f"Not timed on the GPU: {name}: {why}.") == 1


@pytest.fixture
def measured(stories_out: Path, stories_model: Any) -> Callable[..., tuple[str, str]]:
    """The verdict of a form that computes by another plan than it should, and what the unmodified one does."""
    ws = Workspace.open(stories_out)
    plan, text = load_plan(ws.plan), load_text(ws.text)
    settings = VerifySettings(decode_steps=2)
    case = DecoderCase(stories_model, plan, None, ws.model, settings, Silent(), text)

    def measure(precision: str, change: Callable[[LinearLayer], LinearLayer]) -> tuple[str, str]:
        whole = plan.layers
        wrong = replace(plan, layers={i: change(whole[i]) for i in whole})
        plans: dict[str, Plan] = {"form": wrong, "unmodified": plan.without_layers()}

        @contextmanager
        def opened(path: Path, _rows: int, _length: int) -> Any:
            by = plans[path.name]
            with linearized(stories_model, by):
                yield torch_stream(stories_model, by.linear_attention)

        check, _ = measure_converted(
            case, Path("form"), precision, "an engine", opened, lambda: Path("unmodified")
        )
        return check.status, check.detail

    return measure


def scaled(by: float) -> Callable[[LinearLayer], LinearLayer]:
    return lambda one: LinearLayer((one.w * np.float32(by)).astype(np.float32), one.b)


def test_the_same_plan_passes_in_every_precision(measured: Callable[..., tuple[str, str]]) -> None:
    for precision in ("fp32", "fp16", "bf16", "q8_0"):
        status, detail = measured(precision, scaled(1.0))
        assert status == "passed" and "in an engine, within all" in detail


@pytest.mark.parametrize(("precision", "by"), [("fp32", 1.01), ("fp16", 1.05), ("bf16", 1.5), ("q8_0", 1.02)])
def test_another_plan_fails(measured: Callable[..., tuple[str, str]], precision: str, by: float) -> None:
    assert measured(precision, scaled(by))[0] == "failed"


CONFIG = SimpleNamespace(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
CASE: Any = SimpleNamespace(
    model=SimpleNamespace(config=CONFIG), text=SimpleNamespace(heldout=np.arange(300, 340)[None])
)


@pytest.mark.parametrize(
    ("layers", "status"), [((0, 1, 3), "passed"), ((0, 1, 2, 3), "failed"), ((0,), "failed")]
)
def test_a_cache_of_other_layers_is_seen(
    monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...], status: str
) -> None:
    stream = SimpleNamespace(memory_bytes=3 * 2 * 4 * 8 * 4 * 512, slots=512, tokenize=None)
    monkeypatch.setattr("nbl_export.verify.engines.LlamaCppStream", lambda *_, **__: nullcontext(stream))
    monkeypatch.setattr("nbl_export.verify.engines.check_tokens", lambda *_: None)
    case: Any = SimpleNamespace(model=CASE.model, plan=SimpleNamespace(attention_layers=layers))
    assert check_gguf(case, Path("model.gguf"), None)[1].status == status


@pytest.mark.parametrize("wrong", [None, 5, -1])
def test_another_token_is_seen_and_named(stories_folder: Path, wrong: int | None) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(stories_folder)

    def tokenize(text: str) -> list[int]:
        own = list(tokenizer(text).input_ids)
        if wrong == -1:
            return own[:-1]
        return own if wrong is None else [*own[:wrong], 7, *own[wrong + 1 :]]

    found = check_tokens(CASE, tokenizer, tokenize, "llama.cpp")
    assert found.status == ("passed" if wrong is None else "failed")
    if wrong == 5:
        assert found.detail.startswith("token 5 of held-out text is [7] in llama.cpp")
