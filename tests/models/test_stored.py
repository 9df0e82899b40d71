"""What a checkpoint stores comes out as transformers makes it: mixed dtypes, shards, GGUF files, merged experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.errors import InputError
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.stored import Merged, stored_tensors
from nbl_export.models.weights import resident, stored_of
from tests.models.spoiled import small_gguf
from tests.models.test_weights import IDS, absent, logits, plain, reads, stored_in
from tests.stories import build as build_stories
from tests.tiny import build as build_tiny
from tests.tiny import save_tokenizer


@pytest.fixture
def half_folder(tmp_path: Path) -> Path:
    return stored_in(build_tiny(tmp_path / "tiny"), torch.bfloat16)


@pytest.mark.parametrize("of", ["lm_head", "embed_tokens", "model.layers.2.", "v_proj"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_few_weights_of_another_dtype_are_exact(tmp_path: Path, of: str, tied: bool) -> None:
    folder = stored_in(
        build_tiny(tmp_path / "m", tie_word_embeddings=tied), torch.bfloat16, torch.float32, of
    )
    model = load_model(find_model(str(folder)))
    assert torch.equal(logits(model), logits(plain(folder)))


def test_shards_and_names_without_the_prefix(tmp_path: Path, half_folder: Path) -> None:
    weights = load_file(half_folder / "model.safetensors")
    (half_folder / "model.safetensors").unlink()
    names = {n: n.removeprefix("model.") for n in weights}
    shards = [f"model-0000{1 + i % 2}-of-00002.safetensors" for i in range(len(weights))]
    index = {"metadata": {}, "weight_map": {names[n]: s for n, s in zip(weights, shards, strict=True)}}
    (half_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in set(shards):
        chosen = {names[n]: w for (n, w), s in zip(weights.items(), shards, strict=True) if s == shard}
        kept = {n: w.float() if "norm" in n else w for n, w in chosen.items()}
        save_file(kept, half_folder / shard, {"format": "pt"})
    model = load_model(find_model(str(half_folder)))
    assert absent(model) and torch.equal(logits(model), logits(plain(half_folder)))


def test_a_gguf_file_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "m.gguf", 1)
    model = load_model(find_model(str(path)))
    assert absent(model) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    ids = IDS % 40
    assert torch.equal(logits(model, ids), logits(plain(tmp_path, gguf_file="m.gguf"), ids))


def test_a_quantized_gguf_file_is_what_transformers_makes_of_it(smollm2: Path) -> None:
    model = load_model(find_model(str(smollm2)))
    assert torch.equal(logits(model), logits(plain(smollm2.parent, gguf_file=smollm2.name)))


def test_the_dtype_of_most_weights(tmp_path: Path, stories_folder: Path, shared_data: Path) -> None:
    assert stored_tensors(stories_folder).dtype == torch.float32
    assert stored_tensors(stories_folder).others == {}
    folder = build_stories(shared_data / "models" / "stories260K", tmp_path / "s")
    found = stored_tensors(stored_in(folder, torch.float16, torch.bfloat16))
    assert found.dtype == torch.float16 and all("norm" in name for name in found.others) and found.others
    assert stored_tensors(tmp_path).dtype is None


SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
}
FAMILIES = ("mixtral", "qwen3_moe")


def saved(target: Path, family: str = "mixtral", **changes: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)
    save_tokenizer(target)
    return target


def of_experts(model: Any) -> dict[str, Merged]:
    return {name: read for name, read in stored_of(model).read.items() if isinstance(read, Merged)}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_read_by_block_and_are_what_transformers_makes(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", family)
    model = load_model(find_model(str(folder)))
    found = of_experts(model)
    assert len(found) == 2 * 4 and set(found) <= absent(model)
    assert torch.equal(logits(model), logits(plain(folder)))
    with reads() as names:
        logits(model)
    assert set(found) <= set(names) and len(names) == len(set(names))
    theirs = dict(plain(folder).named_parameters())
    with resident(model):
        assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def test_an_expert_that_is_no_number_is_named_while_loading(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if ".2." in n and "experts.3." in n)
    weights[name][-1, -1] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        InputError, match=r"the weight model\.layers\.2\.mlp\.experts\.\w+ is NaN or infinite"
    ):
        load_model(find_model(str(folder)))


def test_other_dtypes_among_the_experts_are_in_memory(tmp_path: Path) -> None:
    """Which of them a rounded model would round, nobody says."""
    folder = stored_in(saved(tmp_path / "m"), torch.bfloat16, torch.float32, "experts.1.")
    model = load_model(find_model(str(folder)))
    assert of_experts(model) == {}
    assert torch.equal(logits(model), logits(plain(folder)))
