"""Models, exported graphs and a finished run, made once; graphs run by onnxruntime alone, as a consumer does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from nbl_export.batch import real_positions, rows_of_batch
from nbl_export.blocks import Block, Mlp, layer_of
from nbl_export.calibrate.moments import load_moments
from nbl_export.calibrate.probe import load_probe
from nbl_export.export.forms import STATIC
from nbl_export.export.torch import export_torch
from nbl_export.graph.io import load_graph
from nbl_export.graph.summary import ProvenTensors
from nbl_export.linearize.lmmse import fit_lmmse
from nbl_export.linearize.plan import LinearLayer, Plan, load_plan
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.records import STAGES
from nbl_export.rewrite.replace import proven_regions
from nbl_export.runtime.intermediates import compute_tensors, prefill_rows, unbatched
from nbl_export.runtime.stream import Stream
from nbl_export.settings.choices import FitInput
from nbl_export.verify.parity.compare import Recorded, Text, compare, record, stepped
from nbl_export.verify.parity.figures import Gates, Parity
from nbl_export.workspace import Workspace


def load(folder: Path) -> torch.nn.Module:
    """The model in ``folder`` as the tool loads it: float32, CPU, eval."""
    return load_model(find_model(str(folder)))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> torch.nn.Module:
    return load(tiny_folder)


@pytest.fixture(scope="session")
def tiny_graph(tiny_model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, exported; read only."""
    path = tmp_path_factory.mktemp("tiny-graph") / "model.onnx"
    export_torch(tiny_model, path)
    return path


@pytest.fixture(scope="session")
def static_graph(tiny_model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a static cache; read only."""
    path = tmp_path_factory.mktemp("tiny-static") / "model.onnx"
    export_torch(tiny_model, path, form=STATIC)
    return path


@pytest.fixture(scope="session")
def stories_model(stories_folder: Path) -> torch.nn.Module:
    return load(stories_folder)


@pytest.fixture
def stories_copy(stories_out: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed or damaged."""
    return Path(shutil.copytree(stories_out, tmp_path / "out", copy_function=shutil.copy2))


def plan_by_hand(out: Path, layers: Sequence[int], fit_input: FitInput = "normed") -> Plan:
    """A plan of exactly ``layers`` from the moments and the probe of the finished run ``out``."""
    workspace = Workspace.open(out)
    moments, _ = load_moments(workspace.moments)
    probe = load_probe(workspace.probe)
    fits = {i: fit_lmmse(moments.layers[i], fit_input) for i in layers}
    first = load_plan(workspace.plan)
    return Plan(
        model=first.model,
        hidden_size=first.hidden_size,
        layer_count=first.layer_count,
        fit_input=fit_input,
        criterion="by hand",
        ridge=1e-6,
        calibration_tokens=first.calibration_tokens,
        layers={},
        probe=dict(probe.inputs),
        probe_u=probe.x if fit_input == "normed" else probe.h,
        probe_y=probe.y,
    ).with_replaced({i: LinearLayer(f.w.astype(np.float32), f.b.astype(np.float32)) for i, f in fits.items()})


def ragged_rows(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[NDArray[Any]]:
    """Random token ids of the given lengths."""
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocab, length, dtype=np.int32) for length in lengths]


def pad_left(
    rows: Sequence[NDArray[Any]],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Ids, mask and positions of ragged rows, padded on the left with zeros (positions: 0 too)."""
    width = max(map(len, rows))
    ids = np.stack([np.r_[np.zeros(width - len(r), np.int64), r.astype(np.int64)] for r in rows])
    mask = np.stack([np.r_[np.zeros(width - len(r), np.int64), np.ones(len(r), np.int64)] for r in rows])
    positions = np.stack([np.r_[np.zeros(width - len(r), np.int64), np.arange(len(r))] for r in rows])
    return ids, mask, positions


def original_logits(model: torch.nn.Module, row: NDArray[Any], implementation: str = "sdpa") -> NDArray[Any]:
    """Logits [sequence, vocab] of one unpadded row, no cache, by transformers' own attention."""
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    ids = torch.from_numpy(row.astype(np.int64))[None]
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0].numpy()


@pytest.fixture
def logits_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], list[tuple[int, ...]]]:
    """Called with a class of decoders: the shapes of the logits that any of them makes from then on."""

    def watch(decoder: type) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        plain = decoder.__call__

        def counted(self: Any, *given: Any) -> Any:
            output = plain(self, *given)
            shapes.append(tuple(output.logits.shape))
            return output

        monkeypatch.setattr(decoder, "__call__", counted)
        return shapes

    return watch


@contextmanager
def maps_in_place(model: Any, plan: Plan) -> Iterator[None]:
    """``model`` with the planned outputs overwritten by W u + b: hooks of the tests' own."""
    handles, blocks_input = [], {}
    for index, linear in plan.replacements.items():
        block = model.model.layers[layer_of(index)]
        part, before = block.self_attn, block
        if isinstance(index, Mlp):
            part, before = block.mlp, block.post_attention_layernorm
        w, b = torch.zeros(plan.hidden_size, plan.hidden_size), torch.zeros(plan.hidden_size)
        if isinstance(linear, LinearLayer):
            w, b = torch.from_numpy(linear.w), torch.from_numpy(linear.b)

        def keep(_block: Any, args: Any, kwargs: Any, index: Block = index) -> None:
            blocks_input[index] = kwargs.get("hidden_states", args[0] if args else None)

        def overwrite(
            _module: Any, args: Any, kwargs: Any, output: Any, index: Block = index, w: Any = w, b: Any = b
        ) -> Any:
            x = kwargs.get("hidden_states", args[0] if args else None)
            u = x if plan.fit_input == "normed" else blocks_input[index]
            y = u @ w.T + b
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handles.append(before.register_forward_pre_hook(keep, with_kwargs=True))
        handles.append(part.register_forward_hook(overwrite, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def external_entry(path: Path, name: str) -> tuple[int, int]:
    """Offset and length of an initializer in the data file of the graph at ``path``."""
    proto = onnx.load(str(path), load_external_data=False)
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    fields = {e.key: e.value for e in tensor.external_data}
    return int(fields.get("offset", 0)), int(fields["length"])


def perturb(path: Path, name: str, factor: float = 2.0) -> None:
    """Multiply one float32 initializer of the graph at ``path``, which then holds it itself.

    Another graph that reads the same data file stays as it is.
    """
    proto = onnx.load(str(path), load_external_data=False)
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    array = numpy_helper.to_array(tensor, str(path.parent)) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    path.write_bytes(proto.SerializeToString())


def rerecord(out: Path, stage: str) -> None:
    """Take the files of ``stage`` as they are now for what it wrote, and for what the stages after it were made of."""
    workspace = Workspace.open(out)
    record = workspace.record(stage)
    assert record is not None
    files = [out / name for name in record.files]
    workspace.redrew(stage, files)
    for name in STAGES:
        after = workspace.record(name)
        above = (
            {n: r.result for n in after.made_of if n in STAGES and (r := workspace.record(n))}
            if after
            else {}
        )
        if after and any(after.made_of[n] != above[n] for n in above):
            made_of, notes = {**after.made_of, **above}, list(after.notes)
            workspace.finish(name, after.settings, made_of, workspace.paths(after), after.seconds, notes)


def low_rank(plan: Plan, rank: int) -> Plan:
    """``plan`` with maps of ``rank``: the first singular vectors of each W, be they the best or not."""
    layers = {}
    for index, layer in plan.layers.items():
        u, s, v = np.linalg.svd(layer.w)
        layers[index] = LinearLayer.of_rank(u[:, :rank] * s[:rank], v[:rank], layer.b)
    return replace(plan, layers=layers, rank=rank)


_PROVEN: dict[Any, dict[Block, ProvenTensors]] = {}


def tensors_of(baseline: Path, plan: Plan) -> dict[Block, ProvenTensors]:
    """What the record of a rewrite has of ``baseline``: the names of its proven tensors."""
    key = (baseline, baseline.stat().st_mtime_ns, plan.chosen, plan.fit_input)
    if key not in _PROVEN:
        proofs = proven_regions(baseline, plan).proofs.values()
        _PROVEN[key] = {p.layer: p.tensors for p in proofs if p.u is not None and p.y is not None}
    return _PROVEN[key]


def compare_streams(
    reference: Stream, candidate: Stream, rows: Any, steps: int, gates: Gates, alone: Any = ()
) -> Parity:
    """The figures of ``candidate`` against ``reference``, run one after the other."""
    ours, theirs = (recorded(stream, rows, steps, alone) for stream in (reference, candidate))
    return compare(ours, theirs, gates)


def recorded(stream: Stream, rows: Any, steps: int, alone: Any = ()) -> Recorded:
    """What ``stream`` gives for ``rows``, the last ``steps`` tokens decoded, and for those ``alone``."""
    text = Text(rows, steps, alone)
    return record(stepped(stream, text), stream.kv_layers, text)


def intermediate_tensors(path: Path, names: Sequence[str], inputs: Any) -> dict[str, np.ndarray]:
    """Intermediate tensors ``names`` [batch, sequence, …] of the graph at ``path``, padded with zeros as ``inputs``."""
    model = load_graph(path)
    wanted = list(dict.fromkeys(names))
    found = compute_tensors(model, wanted, prefill_rows(model, rows_of_batch(inputs)))

    def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
        real = real_positions(inputs, rows[0].shape[-2])
        flat = [unbatched(row, int(own.sum())) for row, own in zip(rows, real, strict=True)]
        result = np.zeros((*real.shape, *flat[0].shape[1:]), dtype=np.float32)
        result[real] = np.concatenate(flat)
        return result

    return {name: padded([row[name] for row in found]) for name in wanted}


# sessions -------------------------------------------------------------------------------------


def cpu_session(graph: Path | onnx.ModelProto | ir.Model, options: Any = None) -> Any:
    """An inference session of a file, or of a graph in memory; the test is skipped without onnxruntime."""
    ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'nbl-export[cpu]'")
    if isinstance(graph, ir.Model):
        graph = ir.to_proto(graph)
    source = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_graph(graph: Path | onnx.ModelProto | ir.Model, feeds: Mapping[str, Any], options: Any = None) -> Any:
    """All outputs by name of a graph that takes exactly ``feeds``."""
    session = cpu_session(graph, options)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def decode(
    runner: Any, rows: Sequence[Any], past: Mapping[str, Any], pairs: Mapping[str, str], steps: int
) -> Iterator[dict[str, Any]]:
    """All outputs of a ragged prefill and of decode ``steps``; ``pairs`` are the outputs that caches come from."""
    inputs, outputs = ([v.name for v in values] for values in (runner.get_inputs(), runner.get_outputs()))
    ids, mask, positions = pad_left([row[: len(row) - steps] for row in rows])
    for step in range(steps + 1):
        if step:
            ids = np.array([[row[len(row) - steps + step - 1]] for row in rows], dtype=np.int64)
            mask, positions = np.c_[mask, np.ones_like(ids)], positions[:, -1:] + 1
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        found = dict(zip(outputs, runner.run(None, {n: feeds[n] for n in inputs}), strict=True))
        past = {old: found[new] for old, new in pairs.items()}
        yield found


def empty_past(session: Any, rows: int, head_size: int | None = None) -> dict[str, Any]:
    """A cache of no tokens for each past input of ``session``; ``head_size`` where the graph does not say it."""
    return {
        i.name: np.zeros((rows, i.shape[1], 0, head_size or i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }


@pytest.fixture
def cuda_sessions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """onnxruntime says that it has CUDA; the value grows by what each session asks for, and all run on the CPU."""
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="needs onnxruntime: pip install 'nbl-export[cpu]'"
    )
    asked: list[Any] = []
    plain = onnxruntime.InferenceSession

    def make(source: Any, options: Any = None, *, providers: list[Any], **more: Any) -> Any:
        asked.append(providers)
        return plain(source, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    return asked
