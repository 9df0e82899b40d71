"""On the GPU of this machine: engines that really run, with each library that is installed, and every stage."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export import api
from nbl_export.calibrate.moments import ARRAYS, load_moments
from nbl_export.engine.library import Gpu, find_gpu, import_library, runs_here
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.verify.parity.figures import gates_for
from nbl_export.verify.speed.values import Speed
from nbl_export.workspace import Workspace
from tests import tiny
from tests.fixtures_graph import compare_streams, ragged_rows
from tests.on_device import *  # noqa: F403
from tests.processes import torchrun
from tests.runtime.test_engines import run as generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        find_gpu() is None or not torch.cuda.is_available(),
        reason="needs an NVIDIA GPU that torch sees: install a CUDA build of torch",
    ),
]
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SHAPES = {"max_batch": 3, "max_seq": 72, "max_context": 128}
VERIFY = api.VerifySettings(decode_steps=8, quality=False, speed=False)
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def device() -> torch.device:
    """Of the tests of every stage, which are those of :mod:`tests.end_to_end.test_virtual_device`."""
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = find_gpu()
    assert found is not None
    return found


@pytest.fixture(scope="module", params=["tensorrt", "rtx"])
def library(request: pytest.FixtureRequest, gpu: Gpu) -> str:
    """A library that is installed and builds for this GPU."""
    try:
        found = import_library({"rtx": "tensorrt-rtx"}.get(request.param, request.param))
    except MissingDependencyError as error:
        pytest.skip(str(error))
    if found.ahead_of_time and not runs_here(tuple(found.capabilities), gpu):
        pytest.skip(f"{found} does not build for compute capability {gpu.compute_capability}")
    return str(request.param)


def engine_settings(library: str, gpu: Gpu) -> api.EngineSettings:
    sm = (gpu.compute_capability,) if library == "rtx" else ()
    return api.EngineSettings(library, sm=sm, **SHAPES)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def build(stories_out: Path, library: str, gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A finished run on stories260K with K = 2 with engines of the asked-for kind, built once; read only."""

    @functools.cache
    def make(form: str, precision: str) -> Path:
        out = tmp_path_factory.mktemp(f"{library}-{form}-{precision}") / "out"
        shutil.copytree(stories_out, out, copy_function=shutil.copy2)
        api.export(out, api.ExportSettings(precision, form))
        api.rewrite(out)
        api.build(out, engine_settings(library, gpu))
        return out

    return make


def loaded(out: Path, role: str = "linearized") -> EngineStream:
    workspace = Workspace.open(out)
    return load_engine(workspace.engine if role == "linearized" else workspace.base_engine)


# verify ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("form", ["static", "concat"])
def test_verify_runs_the_engines_and_passes(build: Build, form: str, precision: str, gpu: Gpu) -> None:
    report = api.verify(build(form, precision), VERIFY)
    found = {c.name: c for c in report.checks}
    assert report.passed, report.checks
    assert found["engine build"].status == found["engine parity"].status == "passed"
    assert "engine run" not in found and gpu.name in found["engine parity"].detail
    assert report.engine_parity is not None and len(report.engine_parity.linearized.steps) == 9
    assert len(set(report.engine_parity.linearized.prompt_lengths)) == 3
    for manifest in report.engines:
        assert (manifest.kv_cache, manifest.precision) == (form, precision)


def test_a_whole_run_with_fused_attention(library: str, gpu: Gpu, stories_text: Path, tmp_path: Path) -> None:
    """From the model to the report in one call; four heads of 64, for which there are fused kernels."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    report = api.run(
        tiny.build(tmp_path / "model", **sizes),
        tmp_path / "out",
        api.SelectSettings(k=2),
        api.CalibrateSettings((str(stories_text),), samples=16, seq_len=128, heldout_samples=4),
        replace(VERIFY, speed=True, contexts=(16, 64), rounds=3),
        exporting=api.ExportSettings("fp16", "static"),
        engines=engine_settings(library, gpu),
    )
    assert [m.attention for m in report.engines] == ["fused", "fused"]
    assert {c.name: c.status for c in report.checks}["engine parity"] == "passed", report.checks
    _check_speed(report.engine_speed, gpu)
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert f"Speed on {gpu.name}" in text and "| prefill 64 | linearized engine |" in text


def _check_speed(speed: Speed | None, gpu: Gpu) -> None:
    assert speed is not None
    machine = speed.machine
    assert (machine.device, machine.compute_capability) == (gpu.name, gpu.compute_capability)
    cells = {(c.phase, c.context): c for c in speed.cells}
    for name in ("base engine", "linearized engine", "PyTorch eager, base"):
        for context in (16, 64):
            for phase in ("prefill", "decode"):
                x = cells[phase, context].of(name)
                assert x is not None and x.timing.p99_ms is not None
                assert 0 < x.timing.low_ms <= x.timing.median_ms <= x.timing.high_ms
                # Of prefills both are of the same figures; a round of decode is the mean of several steps.
                assert x.timing.p99_ms >= (x.timing.median_ms if phase == "prefill" else 0)
                tokens = 1 if phase == "decode" else context
                assert x.tokens_per_second == pytest.approx(1e3 * tokens / x.timing.median_ms, rel=1e-6)
                assert x.cache_bytes and x.rounds >= 6
    assert {(c.phase, c.context) for c, _, _ in speed.speedups()} == cells.keys()


# the stream --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("form", ["static", "concat"])
@pytest.mark.parametrize("role", ["base", "linearized"])
def test_batch_after_batch_to_the_end_of_the_context(
    build: Build, stories_model: Any, role: str, form: str, precision: str
) -> None:
    """Each prefill begins anew, whatever the buffers hold, and a step's inputs are never the last one's."""
    out = build(form, precision)
    plan, stream = load_plan(Workspace.open(out).plan), loaded(out, role)
    if role == "base":
        plan = replace(plan, layers={})
    gates = gates_for(DTYPES[precision])
    with linearized(stories_model, plan):
        for number, lengths in enumerate(((128, 101, 77), (90,), (128,), (70, 128, 99), (65, 77, 128))):
            reference = PastStream(TorchDecoder(stories_model, plan.chosen))
            rows = ragged_rows(lengths, 500, seed=number)
            parity = compare_streams(reference, stream, rows, 60, gates)
            assert parity.failures() == [], lengths
    with pytest.raises(InputError, match="context of 128 tokens is full"):
        stream.decode([1, 1, 1])
    assert stream.memory_bytes > 0


def test_a_decode_step_as_a_cuda_graph_is_the_same_step(build: Build, library: str) -> None:
    """Ours where the library has none of its own; inputs of every step reach the recorded graph."""
    out = build("static", "fp32")
    recorded, stepwise = loaded(out), loaded(out)
    assert recorded.captures == (library == "tensorrt")
    stepwise.captures = False
    if library != "tensorrt":
        for index, name in enumerate(stepwise.contexts):
            context = stepwise.engine.create_execution_context()  # without a graph, as is the default
            assert context.set_optimization_profile_async(index, stepwise.device.stream)
            stepwise.contexts[name] = context
    for seed, lengths in enumerate(((9, 4, 30), (5, 12, 64), (17,))):
        a, b = (generate(stream, lengths, 40, seed) for stream in (recorded, stepwise))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
        assert not any(np.array_equal(x, y) for x, y in itertools.pairwise(a))
    assert (recorded._replay is not None) == (library == "tensorrt")
    assert stepwise._replay is None


# two processes of torchrun, by NCCL with a GPU for each, by gloo if they share one ---------------


def test_two_processes_on_gpus_give_what_one_gives(
    stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    asked = api.CalibrateSettings(
        (str(stories_text),), samples=64, seq_len=128, heldout_samples=4, device="cuda"
    )
    api.calibrate(stories_folder, one, asked)
    plan = api.select(one, api.SelectSettings(k=2, device="cuda"))
    options = ["--calibration", stories_text, "--samples", 64, "--seq-len", 128, "--heldout-samples", 4]
    done = torchrun(2, "calibrate", stories_folder, "-o", two, *options, "--device", "cuda")
    assert done.code == 0, done
    want, found = (load_moments(Workspace.open(out).moments)[0].layers for out in (one, two))
    for index, layer in want.items():
        for name in ARRAYS:
            value = getattr(layer, name)
            gap = np.linalg.norm(getattr(found[index], name) - value)
            assert gap <= 1e-12 * np.linalg.norm(value), (index, name)
    done = torchrun(2, "select", two, "--k", 2, "--device", "cuda")
    assert done.code == 0, done
    assert load_plan(Workspace.open(two).plan).chosen == plan.chosen
