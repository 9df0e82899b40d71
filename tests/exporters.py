"""The ways people get an ONNX graph of a decoder, each a function from a model folder to a folder with a graph.

Every one writes ``model.onnx``, its data if it keeps any, and what its tool puts beside them.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import DynamicCache

from nbl_export.export.forms import FORMS
from nbl_export.export.others import VARIABLE, as_hf_folder, export_with, find_exporter
from nbl_export.export.torch import export_torch
from nbl_export.models.dummy_run import cache_shapes
from nbl_export.models.layers import layer_count
from nbl_export.models.load import LoadedModel
from nbl_export.models.running import quiet
from nbl_export.models.source import find_model
from nbl_export.progress import Silent
from tests.families import Calibrated, build, calibrated
from tests.fixtures_graph import load

GRAPH = "model.onnx"
METADATA = ("author", "a test")
Export = Callable[[Path, Path], None]


def ours(form: str) -> Export:
    """This package's exporter, with the cache in ``form``."""

    def export(model: Path, folder: Path) -> None:
        export_torch(load(model), folder / GRAPH, form=FORMS[form])

    return export


# torch.onnx.export as anybody would call it ------------------------------------------------------


class Decoder(torch.nn.Module):
    """A model as a function of tensors: ids, mask, positions, then key and value of each layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> Any:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *(side for layer in cache.layers for side in (layer.keys, layer.values))


@dataclass(frozen=True)
class Names:
    """What a caller of ``torch.onnx.export`` calls the cache; without ``present`` torch names the outputs."""

    past: Callable[[int, str], str]
    present: Callable[[int, str], str] | None = None


# One number for each tensor, and nothing that says which is a key; outputs are add_307, cat_2, cat_3 …
FLAT = Names(lambda layer, side: f"kv_in_{2 * layer + (side == 'v')}")
NUMBERED = Names(lambda layer, side: f"cache_{side}_{layer}", lambda layer, side: f"new_{side}{layer}")


def dynamo(opset: int, attention: str, names: Names, external: bool = False) -> Export:
    """``torch.onnx.export(dynamo=True)`` of the model as transformers has it."""

    def export(model: Path, folder: Path) -> None:
        loaded: Any = load(model)
        loaded.set_attn_implementation(attention)
        shape = next(iter(cache_shapes(loaded).values()))
        heads, size = shape.heads, shape.key_size
        entries = [(layer, side) for layer in range(layer_count(loaded)) for side in "kv"]
        past = tuple(torch.randn(2, heads, 5, size) for _ in entries)
        ids = torch.ones(2, 3, dtype=torch.int64)
        positions = torch.arange(5, 8)[None].expand(2, 3)
        free = torch.export.Dim.DYNAMIC
        tokens = {0: free, 1: free}
        outputs = ["logits", *(names.present(*entry) for entry in entries)] if names.present else None
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                Decoder(loaded),
                (ids, torch.ones(2, 8, dtype=torch.int64), positions, *past),
                dynamo=True,
                opset_version=opset,
                input_names=[
                    "input_ids",
                    "attention_mask",
                    "position_ids",
                    *(names.past(*e) for e in entries),
                ],
                output_names=outputs,
                dynamic_shapes=(tokens, tokens, tokens, tuple({0: free, 2: free} for _ in past)),
                verbose=False,
            )
        assert program is not None
        program.save(str(folder / GRAPH), external_data=external)

    return export


def torchscript(names: Names, tokens: Sequence[str], opset: int = 17) -> Export:
    """``torch.onnx.export(dynamo=False)``, the older exporter; ``tokens`` are the names of ids, mask and positions."""

    def export(model: Path, folder: Path) -> None:
        loaded: Any = load(model)
        assert names.present is not None
        shape = next(iter(cache_shapes(loaded).values()))
        entries = [(layer, side) for layer in range(layer_count(loaded)) for side in "kv"]
        before, after = ([name(*entry) for entry in entries] for name in (names.past, names.present))
        past = [torch.randn(2, shape.heads, 5, shape.key_size) for _ in entries]
        ids = torch.ones(2, 3, dtype=torch.int64)
        mask, positions = torch.ones(2, 8, dtype=torch.int64), torch.arange(5, 8)[None].expand(2, 3)
        axes = {name: {0: "b", 1: "s"} for name in (*tokens, "logits")} | {tokens[1]: {0: "b", 1: "t"}}
        axes |= {name: {0: "b", 2: "p"} for name in before} | {name: {0: "b", 2: "t"} for name in after}
        with quiet(), torch.no_grad():
            torch.onnx.export(
                Decoder(loaded),
                (ids, mask, positions, *past),
                str(folder / GRAPH),
                dynamo=False,
                opset_version=opset,
                input_names=[*tokens, *before],
                output_names=["logits", *after],
                dynamic_axes=axes,
            )

    return export


# other projects ----------------------------------------------------------------------------------


def genai(precision: str) -> Export:
    """onnxruntime-genai's model builder."""

    def export(model: Path, folder: Path) -> None:
        pytest.importorskip(
            "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
        )
        export_with(find_exporter("genai"), handed_over(model, folder), folder, precision, Silent())

    return export


def mobius(model: Path, folder: Path) -> None:
    """Graphs that are built by a description of the family."""
    pytest.importorskip("mobius", reason="needs mobius-onnx: pip install 'nbl-export[dev]'")
    asked = ["--config", str(handed_over(model, folder)), "--dtype", "f32", "--runtime", "ort-genai"]
    subprocess.run(
        [sys.executable, "-m", "mobius", "build", *asked, str(folder)], check=True, capture_output=True
    )


def optimum(model: Path, folder: Path) -> None:
    """optimum for generation: one graph with a KV cache."""
    exporter = find_exporter("optimum", optimum_python())
    export_with(exporter, handed_over(model, folder), folder, "fp32", Silent())


def optimum_whole(model: Path, folder: Path) -> None:
    """optimum without a cache: every step computes all tokens again."""
    command = [optimum_python(), "-m", "optimum.exporters.onnx", "-m", str(handed_over(model, folder))]
    subprocess.run([*command, "--task", "text-generation", str(folder)], check=True, capture_output=True)


def optimum_python() -> str:
    """The Python of an environment with optimum; the test is skipped where there is none."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"needs {VARIABLE}, the python of an environment with optimum-onnx")
    return python


def handed_over(model: Path, folder: Path) -> Path:
    return as_hf_folder(
        LoadedModel(find_model(str(model)), Silent()), folder.with_name(f"{folder.name}.handed")
    )


# optimizers of graphs ----------------------------------------------------------------------------


def optimized_by_ort(source: Path, folder: Path) -> None:
    """What an onnxruntime session makes of the graph, saved: extended optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / GRAPH)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source / GRAPH), options, providers=["CPUExecutionProvider"])


def optimized_by_transformers(source: Path, folder: Path) -> None:
    """onnxruntime's optimizer of transformers."""
    from onnxruntime.transformers.optimizer import optimize_model

    optimized = optimize_model(str(source / GRAPH), "gpt2", opt_level=0)
    optimized.save_model_to_file(str(folder / GRAPH))


def slimmed(source: Path, folder: Path) -> None:
    onnxslim = pytest.importorskip("onnxslim", reason="needs onnxslim: pip install 'nbl-export[dev]'")
    onnx.save(onnxslim.slim(str(source / GRAPH)), str(folder / GRAPH))


def quantized_by_ort(as_operator: bool, bits: int = 4) -> Export:
    """onnxruntime's quantizer: MatMulNBits with zero points, or DequantizeLinear without; of 8 bits without, too."""

    def quantize(source: Path, folder: Path) -> None:
        from onnxruntime.quantization import QuantFormat
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            MatMulNBitsQuantizer,
        )

        form = QuantFormat.QOperator if as_operator else QuantFormat.QDQ
        proto = onnx.load(str(source / GRAPH))
        for entry in proto.opset_import:
            if not entry.domain and not as_operator:
                entry.version = max(entry.version, 21)  # the first whose DequantizeLinear has blocks
        config = DefaultWeightOnlyQuantConfig(
            block_size=32, is_symmetric=not as_operator or bits == 8, quant_format=form, bits=bits
        )
        quantizer = MatMulNBitsQuantizer(proto, algo_config=config)
        with silenced("onnxruntime.quantization.matmul_nbits_quantizer"):
            quantizer.process()
        onnx.save(quantizer.model.model, str(folder / GRAPH))

    return quantize


def quantized_dynamically(source: Path, folder: Path) -> None:
    """onnxruntime's dynamic quantization: products of 8-bit integers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with silenced("root"):
        quantize_dynamic(str(source / GRAPH), str(folder / GRAPH), weight_type=QuantType.QInt8)


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """One log line for each node is a lot."""
    logger = logging.getLogger(name if name != "root" else None)
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def renamed(source: Path, folder: Path) -> None:
    """The same graph; no name of a node, weight or inner tensor means anything."""
    model = ir.load(source / GRAPH)
    generator = np.random.default_rng(0)
    interface = {*model.graph.inputs, *model.graph.outputs}

    def name() -> str:
        return generator.bytes(6).hex()

    for node in model.graph:
        node.name = name()
        for value in node.outputs:
            if value not in interface:
                value.name = name()
    for value in list(model.graph.initializers.values()):
        value.name = name()
    ir.save(model, folder / GRAPH)


OPTIMIZERS: Mapping[str, Export] = {
    "ort": optimized_by_ort,
    "transformers": optimized_by_transformers,
    "slim": slimmed,
    "renamed": renamed,
    "nbits": quantized_by_ort(as_operator=True),
    "qdq": quantized_by_ort(as_operator=False),
    "dynamic": quantized_dynamically,
}
EXPORTERS: Mapping[str, Export] = {
    "ours-concat": ours("concat"),
    "ours-static": ours("static"),
    "ours-shared": ours("shared"),
    "dynamo-18-eager": dynamo(18, "eager", FLAT),
    "dynamo-18-sdpa": dynamo(18, "sdpa", NUMBERED),
    "dynamo-23-eager": dynamo(23, "eager", NUMBERED, external=True),
    "dynamo-23-sdpa": dynamo(23, "sdpa", FLAT, external=True),
    "genai-fp32": genai("fp32"),
    "genai-int4": genai("int4"),
    "genai-int8": genai("int8"),
    "mobius": mobius,
    "optimum": optimum,
    "optimum-whole": optimum_whole,
}


def add_metadata(folder: Path) -> None:
    """An entry of a user's own, which a rewrite must keep."""
    proto = onnx.load(str(folder / GRAPH), load_external_data=False)
    onnx.helper.set_model_props(
        proto, {**{p.key: p.value for p in proto.metadata_props}, METADATA[0]: METADATA[1]}
    )
    onnx.save(proto, str(folder / GRAPH))


class Graphs:
    """Folders with graphs, each made once. ``exporter`` may name an optimizer too: ``optimum+slim``."""

    def __init__(self, model_of: Callable[[str], Path], root: Path) -> None:
        self.model_of, self.root = model_of, root
        self.made: dict[tuple[str, str], Path] = {}

    def __call__(self, exporter: str, family: str) -> Path:
        """The folder of the graph; read only."""
        if (exporter, family) not in self.made:
            self.made[exporter, family] = self._make(exporter, family)
        return self.made[exporter, family]

    def _make(self, exporter: str, family: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=f"{family}-{exporter}-", dir=self.root)) / "graph"
        folder.mkdir()
        base, _, optimizer = exporter.partition("+")
        if optimizer:
            OPTIMIZERS[optimizer](self(base, family), folder)
        else:
            EXPORTERS[base](self.model_of(family), folder)
        add_metadata(folder)
        return folder


# fixtures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_of(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model folder of a family, or of stories260K."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def folder(family: str) -> Path:
        return stories_folder if family == "stories260K" else build(family, root / family)

    return folder


@pytest.fixture(scope="session")
def calibrated_of(model_of: Callable[[str], Path]) -> Callable[[str], Calibrated]:
    """The loaded and calibrated model of a family."""
    return cache(lambda family: calibrated(model_of(family)))


@pytest.fixture(scope="session")
def graphs(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Graphs of all exporters, each made when it is first asked for; read only."""
    return Graphs(model_of, tmp_path_factory.mktemp("graphs"))
