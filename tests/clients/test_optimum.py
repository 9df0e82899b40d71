"""optimum generates from a folder it exported and we rewrote, token for token what our own decode loop gives."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.export.tidy import add_num_logits_input_to_file, sliced_lm_head
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import save_plan
from nbl_export.rewrite.foreign import rewrite_foreign
from tests.clients.greedy import greedy
from tests.conftest import exhaustive
from tests.exporters import GRAPH, Graphs, optimum_python
from tests.families import Calibrated

PROMPT = list(range(40, 52))
COUNT = 24
# No token ends the text; it is run where there is optimum and none of this package.
GENERATE = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder)
ids = torch.tensor([prompt])
model.generation_config.eos_token_id = None
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
print(json.dumps(tokens[0, len(prompt):].tolist()))
"""


def generated(folder: Path) -> list[int]:
    command = [optimum_python(), "-c", GENERATE, str(folder), json.dumps(PROMPT), str(COUNT)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    tokens: list[int] = json.loads(found.stdout.splitlines()[-1])
    return tokens


@pytest.mark.client
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-gqa", pytest.param("parallel-residual", marks=exhaustive)])
@pytest.mark.parametrize("layers", [(0,)], ids=["one"])
def test_optimum_generates_what_our_decoder_does(
    graphs: Graphs,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    family: str,
    layers: tuple[int, ...],
) -> None:
    source = graphs("optimum", family)
    save_plan(tmp_path / "plan.json", calibrated_of(family).plan(layers))
    rewrite_foreign(source, tmp_path / "plan.json", tmp_path / "out")
    add_num_logits_input_to_file(tmp_path / "out" / GRAPH)  # as a run with its exporter does
    assert sliced_lm_head(load_graph(tmp_path / "out" / GRAPH)) is not None
    tokens = generated(tmp_path / "out")
    assert len(tokens) == COUNT
    assert tokens == greedy(tmp_path / "out" / GRAPH, PROMPT, COUNT)
    assert tokens != greedy(source / GRAPH, PROMPT, COUNT)
