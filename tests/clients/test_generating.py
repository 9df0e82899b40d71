"""onnxruntime-genai and optimum generate from our folders and from their own, rewritten, what our decode loop gives."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.export.tidy import add_num_logits_input_to_file, sliced_lm_head
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import save_plan
from nbl_export.rewrite.foreign import rewrite_foreign
from tests.clients.greedy import by_genai, greedy
from tests.conftest import exhaustive
from tests.exporters import GRAPH, Graphs, optimum_python
from tests.families import Calibrated
from tests.tiny import save_tokenizer
from tests.tiny_types import tiny_model

COUNT = 24
PROMPT = [1, 403, 407, 261, 378]  # "<s> Once upon a time"
TOKENS = list(range(40, 52))
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


@pytest.mark.client
@pytest.mark.parametrize(
    ("precision", "cache"),
    [
        ("fp32", "concat"),
        ("fp16", "shared"),
        pytest.param("fp16", "concat", marks=exhaustive),
        pytest.param("fp32", "shared", marks=exhaustive),
    ],
)
def test_genai_generates_what_our_decoder_does(stories_copy: Path, precision: str, cache: str) -> None:
    if (precision, cache) != ("fp32", "concat"):
        api.export(stories_copy, api.ExportSettings(precision, cache))
        api.rewrite(stories_copy)
    for folder in (stories_copy, stories_copy / "baseline"):
        told = json.loads((folder / "genai_config.json").read_text())
        assert told["search"]["past_present_share_buffer"] is (cache == "shared")
        assert by_genai(folder, PROMPT, COUNT, ends=True) == greedy(folder / GRAPH, PROMPT, COUNT)


@pytest.mark.client
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=exhaustive), "int4"])
def test_genai_generates_from_its_own_folder_rewritten(
    graphs: Graphs,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    precision: str,
) -> None:
    source = graphs(f"genai-{precision}", "llama-gqa")
    save_plan(tmp_path / "plan.json", calibrated_of("llama-gqa").plan((1, 3)))
    folder = tmp_path / "folder"
    rewrite_foreign(source, tmp_path / "plan.json", folder)
    tokens = by_genai(folder, TOKENS, COUNT, ends=True)
    assert tokens == greedy(folder / GRAPH, TOKENS, COUNT)
    assert tokens != greedy(source / GRAPH, TOKENS, COUNT)
    assert by_genai(source, TOKENS, COUNT, ends=True) == greedy(source / GRAPH, TOKENS, COUNT)


@pytest.mark.client
@pytest.mark.parametrize("cache", ["concat", "shared"])
def test_a_ragged_batch_gives_each_prompt_what_it_gives_alone(stories_copy: Path, cache: str) -> None:
    """It pads on the right and reads every row's last logits: what a graph of the last position would not have."""
    genai = pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )
    if cache != "concat":
        api.export(stories_copy, api.ExportSettings(kv_cache=cache))
        api.rewrite(stories_copy)
    model = genai.Model(str(stories_copy))
    tokenizer = genai.Tokenizer(model)

    def tokens(prompts: list[str]) -> list[list[int]]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=64, do_sample=False, batch_size=len(prompts))
        generator = genai.Generator(model, parameters)
        generator.append_tokens(tokenizer.encode_batch(prompts))
        for _ in range(12):
            generator.generate_next_token()
        return [[int(t) for t in generator.get_sequence(i)[-12:]] for i in range(len(prompts))]

    prompts = ["Once upon a time", "One day a little girl named Lily found a big"]
    alone = [tokens([prompt])[0] for prompt in prompts]
    assert alone[0] != alone[1]
    assert tokens(prompts) == alone


@pytest.mark.client
@pytest.mark.parametrize(
    "model_type", ["lfm2", *(pytest.param(name, marks=exhaustive) for name in ("bamba", "qwen3_next"))]
)
def test_states_beside_the_cache_are_carried_from_token_to_token(model_type: str, tmp_path: Path) -> None:
    """Short convolutions, state-space models and linear attention, before and after a layer of attention is linear."""
    model = tmp_path / "model"
    tiny_model(model_type).save_pretrained(model)
    save_tokenizer(model)
    text = api.CalibrateSettings(samples=8, seq_len=64, heldout_samples=2)
    api.calibrate(model, tmp_path / "out", text)
    api.select(tmp_path / "out", api.SelectSettings(layers=(1,)))
    api.export(tmp_path / "out")
    api.rewrite(tmp_path / "out")
    found = []
    for folder in (tmp_path / "out" / "baseline", tmp_path / "out"):
        found.append(by_genai(folder, TOKENS, COUNT, ends=True))
        assert found[-1] == greedy(folder / GRAPH, TOKENS, COUNT)[: len(found[-1])]
    assert found[0] != found[1] and min(map(len, found)) > 4


# optimum ------------------------------------------------------------------------------------------


def by_optimum(folder: Path) -> list[int]:
    command = [optimum_python(), "-c", GENERATE, str(folder), json.dumps(TOKENS), str(COUNT)]
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
    tokens = by_optimum(tmp_path / "out")
    assert len(tokens) == COUNT
    assert tokens == greedy(tmp_path / "out" / GRAPH, TOKENS, COUNT)
    assert tokens != greedy(source / GRAPH, TOKENS, COUNT)
