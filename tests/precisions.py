"""The baseline graph of the finished run on stories260K in every precision, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from nbl_export.export.ranges import save_in_precision
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import precision_of
from tests.exporters import GRAPH, Export, quantized_by_ort
from tests.rewrite.by_hand import baseline, prompts

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
