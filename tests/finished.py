"""Finished runs on stories260K, their engines, graphs in every form and precision, and experts, made once."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file

from nbl_export import api
from nbl_export.batch import MAX
from nbl_export.calibrate.probe import probe_inputs
from nbl_export.calibrate.text import CalibrationText, load_text
from nbl_export.engine.library import Library, import_library
from nbl_export.engine.manifest import (
    Limits,
    Manifest,
    NetworkFacts,
    NetworkTensor,
    Profile,
    manifest_path,
    profiles,
)
from nbl_export.engine.manifest import (
    save_manifest as save_at,
)
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch, save_in_precision, trace
from nbl_export.files import sha256_of_file
from nbl_export.graph.cache import is_static, kv_layers
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import graph_precision, precision_of
from nbl_export.linearize.plan import Plan
from nbl_export.models.load import LoadedModel
from nbl_export.models.source import same_model
from nbl_export.models.weights import resident, room
from nbl_export.progress import Listener, Silent
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.settings import VerifySettings
from nbl_export.stages.run import Run
from nbl_export.verify.case import DecoderCase
from nbl_export.workspace import Workspace
from tests.exporters import GRAPH, Export, quantized_by_ort
from tests.families import VOCAB, Calibrated, calibrated, unsaved
from tests.fixtures_graph import plan_by_hand, ragged_rows, tensors_of
from tests.tiny import save_tokenizer

VERIFY = api.VerifySettings(contexts=(16,), rounds=3)
# What the finished run was asked for.
TWO = api.SelectSettings(k=2, criterion="cca")
QUICK = api.VerifySettings(quality=False, speed=False)


def baseline(out: Path) -> Path:
    return out / "baseline" / "model.onnx"


def prompts(out: Path, lengths: Sequence[int]) -> list[Any]:
    """Held-out stories of ``lengths`` tokens, each after the beginning-of-text token."""
    text = load_text(Workspace.open(out).text)
    rows = (np.r_[text.start, text.heldout[i, : n - len(text.start)]] for i, n in enumerate(lengths))
    return [row.astype(np.int32) for row in rows]


@pytest.fixture(scope="session")
def calibration(stories_text: Path) -> api.CalibrateSettings:
    """What the finished run was calibrated with."""
    return api.CalibrateSettings((str(stories_text),), samples=32, seq_len=128, heldout_samples=8)


@pytest.fixture(scope="session")
def stories_out(stories_folder: Path, calibration: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on stories260K with K = 2, calibrated on TinyStories; copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "stories260K"
    report = api.run(stories_folder, out, TWO, calibration, VERIFY)
    assert report.passed, report.checks
    return out


@pytest.fixture(scope="session")
def stories_three(
    stories_out: Path, stories_folder: Path, calibration: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same run with K = 3; copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "three"
    shutil.copytree(stories_out, out, copy_function=shutil.copy2)
    api.run(stories_folder, out, replace(TWO, k=3), calibration, VERIFY)
    return out


def state(out: Path) -> Any:
    return json.loads((out / "nbl" / "workspace.json").read_text())["stages"]


def times(out: Path) -> dict[str, int]:
    """Modification times of all files but the lock and what the workspace writes down for itself."""
    own = (".lock", "workspace.json", "digests.json")
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in own]
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in files}


def assert_same(found: Path, expected: Path) -> None:
    """Two files of equal content. A safetensors file's arrays: the order of its metadata is not fixed."""
    if found.suffix != ".safetensors":
        assert sha256_of_file(found) == sha256_of_file(expected), found.name
        return
    a, b = load_file(found), load_file(expected)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a), found.name


def resumed(out: Path, listener: Listener | None = None) -> Run:
    """A run that goes on in ``out``, without its lock."""
    workspace, heard = Workspace.open(out), listener or Silent()
    source = same_model(workspace.model_info or {})
    workspace.found_model(source.as_json())
    return Run(workspace, LoadedModel(source, heard), heard)


# The start token, and an end after each answer: what was said before stays as it was read.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'system' %}{{ '\\n' }}"
    "{% elif m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
END, OTHER_END = 2, 511


@pytest.fixture(scope="session")
def talking_out(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported and rewritten; copy it before changing it."""
    model, out = tmp_path_factory.mktemp("model") / "model", tmp_path_factory.mktemp("talking") / "out"
    shutil.copytree(stories_folder, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, OTHER_END]}))
    api.calibrate(model, out, api.CalibrateSettings((str(stories_text),), 8, 64, heldout_samples=4))
    api.select(out, api.SelectSettings(layers=(1, 3)))
    api.export(out)
    api.rewrite(out)
    shutil.rmtree(model)  # the folder is enough
    return out


@pytest.fixture
def talking_copy(talking_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(talking_out, tmp_path / "out", copy_function=shutil.copy2))


# onnxruntime runs GroupQueryAttention of this model's head size nowhere on the CPU, so the graphs are not of genai.
QUANTIZERS: Mapping[str, Export] = {
    "int8": quantized_by_ort(as_operator=True, bits=8),
    "int4": quantized_by_ort(as_operator=True),
    "int4-qdq": quantized_by_ort(as_operator=False),
}
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZERS)


def made(out: Path, name: str, folder: Path) -> Path:
    """The baseline of the run ``out`` in the precision ``name``, written into ``folder``."""
    source = baseline(out)
    if name == "fp32":
        return source
    folder.mkdir(parents=True)
    if name in QUANTIZERS:
        QUANTIZERS[name](source.parent, folder)
    else:
        rows = prompts(out, (60, 40)) if name == "fp16" else []
        save_in_precision(load_graph(source), folder / GRAPH, precision_of(name), rows)
    return folder / GRAPH


@pytest.fixture(scope="session")
def baseline_in(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The baseline by the name of its precision; read only."""
    root = tmp_path_factory.mktemp("precisions")
    return cache(lambda name: made(stories_out, name, root / name))


# engines ----------------------------------------------------------------------------------------

LIMITS = Limits(max_batch=3, max_seq=9, max_context=16)
_DTYPES = {"FLOAT16": "HALF", "BFLOAT16": "BF16"}


class Graphs:
    """Decoder graphs of stories260K in every form and precision, each made when first asked for."""

    def __init__(self, model: torch.nn.Module, out: Path, folder: Path) -> None:
        self.model, self.out, self.folder = model, out, folder

    def __call__(self, form: str, precision: str = "fp32", layers: Sequence[int] = ()) -> Path:
        """The graph without the attention of ``layers``; read only."""
        name = "-".join([form, precision, *map(str, layers)])
        path = self.folder / name / "model.onnx"
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        if layers:
            rewrite_file(self(form, precision), plan_by_hand(self.out, layers), path)
        elif precision != "fp32":
            rows = ragged_rows((24, 17), 500, seed=1)
            save_in_precision(load_graph(self(form)), path, precision_of(precision), rows)
        elif form == "concat":
            return self.out / "baseline" / "model.onnx"
        else:
            save_graph(trace(self.model, FORMS[form]), path)
        return path


@pytest.fixture(scope="session")
def engine_graphs(stories_model: Any, stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(stories_model, stories_out, tmp_path_factory.mktemp("engine-graphs"))


@pytest.fixture(scope="session")
def rtx() -> Library:
    """The real library, which builds ahead of time without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'nbl-export[rtx]'")
    return import_library("tensorrt-rtx")


@pytest.fixture(scope="session")
def built_out(rtx: Library, stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run in float16 with a static cache, and its engines; copy it before changing it."""
    out = tmp_path_factory.mktemp("built") / "out"
    shutil.copytree(stories_out, out, copy_function=shutil.copy2)
    api.export(out, api.ExportSettings("fp16", "static"))
    api.rewrite(out)
    api.build(out, api.EngineSettings("rtx", max_batch=2, max_seq=64, max_context=256, sm=("89", "86")))
    return out


@pytest.fixture
def built_copy(built_out: Path, tmp_path: Path) -> Path:
    """A copy of the run with engines, to be changed or damaged."""
    return Path(shutil.copytree(built_out, tmp_path / "out", copy_function=shutil.copy2))


def save_manifest(engine: Path, manifest: Manifest) -> Path:
    """Write the manifest of an existing ``engine``."""
    save_at(manifest_path(engine), manifest)
    return manifest_path(engine)


def manifest_by_hand(**changes: Any) -> Manifest:
    """A manifest of no real engine."""
    fields: dict[str, Any] = {
        "role": "linearized",
        "library": "tensorrt-rtx",
        "library_version": "1.7.1.116",
        "ahead_of_time": True,
        "capabilities": ("SM86", "SM89"),
        "gpu": None,
        "precision": "fp16",
        "kv_cache": "static",
        "limits": Limits(max_batch=2, max_seq=64, max_context=256),
        "profiles": (Profile("prefill", {"input_ids": ((1, 1), (1, 64), (2, 64))}),),
        "kv_layers": (0, 1, 4),
        "linear_layers": (2, 3),
        "attention": "fused",
        "network": NetworkFacts(7, 3, 6, (), (), {}),
        "hashes": {"engine": "0" * 64, "onnx": "1" * 64},
        "build_seconds": 1.25,
        "size": 1000,
        "created_by": "nbl-export, by hand",
    }
    return Manifest(**{**fields, **changes})


def manifest_of(path: Path, limits: Limits = LIMITS, role: str = "linearized", **changes: Any) -> Manifest:
    """The manifest that an engine of the graph at ``path`` for one GPU would have."""
    model = load_graph(path)
    given = [value for value in model.graph.inputs if value.const_value is None]

    def dims(value: ir.Value) -> list[int | str]:
        return [d if isinstance(d, int) else str(d.value) for d in value.shape or ()]

    def tensors(values: Sequence[ir.Value]) -> tuple[NetworkTensor, ...]:
        known = {MAX: limits.max_context}
        shapes = [tuple(d if isinstance(d, int) else known.get(d, -1) for d in dims(v)) for v in values]
        dtypes = [_DTYPES.get(v.dtype.name, v.dtype.name) for v in values if v.dtype]
        return tuple(map(NetworkTensor, [str(v.name) for v in values], dtypes, shapes))

    layers = kv_layers(model)
    fields: dict[str, Any] = {
        "role": role,
        "library": "tensorrt",
        "library_version": "10.16.0",
        "ahead_of_time": False,
        "capabilities": ("SM89",),
        "gpu": "NVIDIA L4",
        "precision": graph_precision(model).name,
        "kv_cache": "static" if is_static(model) else "concat",
        "limits": limits,
        "profiles": profiles({str(v.name): dims(v) for v in given}, limits),
        "kv_layers": layers,
        "linear_layers": (),
        "attention": "fused" if layers else "none",
        "network": NetworkFacts(
            len(layers), len(layers), 0, tensors(given), tensors(model.graph.outputs), {}
        ),
    }
    return manifest_by_hand(**{**fields, **changes})


# experts --------------------------------------------------------------------------------------

CHOSEN = (1,)
_ROWS = ragged_rows((20, 13, 7), VOCAB - 10, seed=3)


@dataclass(frozen=True)
class Experts:
    """The model as calibrated, its plan, and its graph in each precision."""

    case: Calibrated
    plan: Plan
    folder: Path

    @property
    def model(self) -> Any:
        return self.case.model

    def graph(self, precision: str) -> Path:
        """The unmodified graph; made when it is asked for."""
        path = self.folder / precision / GRAPH
        if not path.exists():
            path.parent.mkdir()
            if precision == "fp32":
                export_torch(self.model, path)
            else:
                save_in_precision(load_graph(self.graph("fp32")), path, precision_of(precision), _ROWS)
        return path

    def verified(self, precision: str, linear: Path) -> DecoderCase:
        """The case of the rewritten graph ``linear``."""
        return on_random_text(self.model, self.plan, self.graph(precision), linear)

    def rewritten(self, precision: str, target: Path, plan: Plan | None = None) -> Path:
        """The graph with the plan's layers linear, in the folder ``target``."""
        rewrite_file(self.graph(precision), plan or self.plan, target / GRAPH)
        return target / GRAPH


def on_random_text(model: Any, plan: Plan, base: Path, linear: Path) -> DecoderCase:
    """The case of the graph ``linear``, which is ``base`` rewritten by ``plan``."""
    rows = np.random.default_rng(9).integers(3, VOCAB - 10, (8, 96), dtype=np.int32)
    none = np.zeros_like(rows)
    text = CalibrationText(none, none, none, rows, none, np.array([5], np.int32))
    settings = VerifySettings(decode_steps=3, quality=False, speed=False)
    return DecoderCase(model, plan, base, linear, settings, Silent(), text, tensors=tensors_of(base, plan))


def another(experts: Experts, level: float, which: str) -> Plan:
    """The plan of another fine-tune: the weights whose names have ``which`` in them, with relative noise."""
    other, generator = copy.deepcopy(experts.model), torch.Generator().manual_seed(1)
    with resident(other, room(other)), torch.no_grad():
        for name, weight in other.named_parameters():
            if weight.ndim > 1 and which in name and "embed" not in name and "lm_head" not in name:
                weight.mul_(1 + level * torch.randn(weight.shape, generator=generator))
        probe = probe_inputs(other, experts.plan.probe)
    return replace(experts.plan, probe_u=probe.x, probe_y=probe.y, probe_routes=probe.routes)


def swap_experts(model: ir.Model) -> None:
    """The first router's scores of two experts are exchanged, so that tokens go to the wrong ones of them."""
    router = next(node for node in model.graph if node.op_type == "TopK")
    scores = router.inputs[0]
    assert scores is not None
    order = ir.tensor(np.array([3, 1, 2, 0]), name="exchanged")
    value = ir.Value(
        name="exchanged", const_value=order, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([4])
    )
    model.graph.register_initializer(value)
    node = ir.node("Gather", [scores, value], {"axis": -1})
    node.outputs[0].name, node.outputs[0].type = "exchanged.scores", scores.type
    node.outputs[0].shape = scores.shape
    router.prepend(node)
    router.replace_input_with(0, node.outputs[0])


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    folder = tmp_path_factory.mktemp("experts")
    model = unsaved("qwen3_moe", num_hidden_layers=3, num_experts=4, norm_topk_prob=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp.gate.weight" in name:
                noise = torch.randn(weight[0].shape, generator=torch.Generator().manual_seed(1))
                weight[1] = weight[0] * (1 + 1e-4 * noise)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    case = calibrated(folder)
    return Experts(case, case.plan(CHOSEN), folder)
