"""onnxruntime-genai generates from our folders and from its own, rewritten, what our own decode loop gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.linearize.plan import save_plan
from nbl_export.rewrite.foreign import rewrite_foreign
from tests.clients.greedy import by_genai, greedy
from tests.conftest import exhaustive
from tests.exporters import GRAPH, Graphs
from tests.families import Calibrated
from tests.tiny import save_tokenizer
from tests.tiny_types import tiny_model

COUNT = 24
PROMPT = [1, 403, 407, 261, 378]  # "<s> Once upon a time"


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
    prompt = list(range(40, 52))
    save_plan(tmp_path / "plan.json", calibrated_of("llama-gqa").plan((1, 3)))
    folder = tmp_path / "folder"
    rewrite_foreign(source, tmp_path / "plan.json", folder)
    tokens = by_genai(folder, prompt, COUNT, ends=True)
    assert tokens == greedy(folder / GRAPH, prompt, COUNT)
    assert tokens != greedy(source / GRAPH, prompt, COUNT)
    assert by_genai(source, prompt, COUNT, ends=True) == greedy(source / GRAPH, prompt, COUNT)


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
        found.append(by_genai(folder, list(range(40, 52)), COUNT, ends=True))
        assert found[-1] == greedy(folder / GRAPH, list(range(40, 52)), COUNT)[: len(found[-1])]
    assert found[0] != found[1] and min(map(len, found)) > 4
