"""A tiny mixture of experts whose router scores two experts nearly alike: any rounding sends tokens elsewhere."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.calibrate.probe import probe_inputs
from nbl_export.calibrate.text import CalibrationText
from nbl_export.export.torch import export_torch, save_in_precision
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import precision_of
from nbl_export.linearize.plan import Plan
from nbl_export.models.weights import resident, room
from nbl_export.progress import Silent
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.settings import VerifySettings
from nbl_export.verify.case import DecoderCase
from tests.exporters import GRAPH
from tests.families import VOCAB, Calibrated, calibrated, unsaved
from tests.fixtures_graph import ragged_rows, tensors_of
from tests.tiny import save_tokenizer

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
        """The case of the rewritten graph ``linear``, on random text."""
        rows = np.random.default_rng(9).integers(3, VOCAB - 10, (8, 96), dtype=np.int32)
        none = np.zeros_like(rows)
        text = CalibrationText(none, none, none, rows, none, np.array([5], np.int32))
        settings = VerifySettings(decode_steps=3, quality=False, speed=False)
        base = self.graph(precision)
        tensors = tensors_of(base, self.plan)
        return DecoderCase(self.model, self.plan, base, linear, settings, Silent(), text, tensors=tensors)

    def rewritten(self, precision: str, target: Path, plan: Plan | None = None) -> Path:
        """The graph with the plan's layers linear, in the folder ``target``."""
        rewrite_file(self.graph(precision), plan or self.plan, target / GRAPH)
        return target / GRAPH


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
    model = unsaved("qwen3_moe", num_hidden_layers=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp.gate.weight" in name:
                noise = torch.randn(weight[0].shape, generator=torch.Generator().manual_seed(1))
                weight[1] = weight[0] * (1 + 1e-4 * noise)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    case = calibrated(folder)
    return Experts(case, case.plan(CHOSEN), folder)
