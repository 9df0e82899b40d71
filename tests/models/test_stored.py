"""What a checkpoint stores comes out as transformers makes it: mixed dtypes, shards, GGUF files, merged experts."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.stored import stored_tensors
from nbl_export.models.weights import resident
from tests import families
from tests.models.test_load import small_gguf
from tests.models.test_weights import IDS, absent, logits, plain, stored_in
from tests.stories import build as build_stories
from tests.tiny import build as build_tiny


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


def test_a_buffer_of_the_checkpoint_is_exact(tmp_path: Path) -> None:
    folder = families.build("llama", tmp_path / "m")
    scale = {"model.norm.weight": torch.float32}
    path = folder / "model.safetensors"
    weights = {n: w.to(scale.get(n, torch.bfloat16)) for n, w in load_file(path).items()}
    weights["model.norm.weight"] += 1e-4  # which bfloat16 cannot hold
    save_file(weights, path, {"format": "pt"})
    model = load_model(find_model(str(folder)))
    with resident(model):
        assert torch.equal(model.model.norm.weight, weights["model.norm.weight"])  # type: ignore[union-attr]


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


def test_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_gguf(tmp_path / "m.gguf", 1)
    parsed: list[str] = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    for times in (1, 2):
        load_model(find_model(str(path)))
        assert parsed == [str(path)] * times and gguf.GGUFReader is Counted


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_transformers_merges_are_mapped_or_in_memory(name: str, tmp_path: Path) -> None:
    folder = stored_in(families.build(name, tmp_path / name), torch.bfloat16, torch.float32, "gate")
    assert torch.equal(logits(load_model(find_model(str(folder)))), logits(plain(folder)))


def test_the_dtype_of_most_weights(tmp_path: Path, stories_folder: Path, shared_data: Path) -> None:
    assert stored_tensors(stories_folder).dtype == torch.float32
    assert stored_tensors(stories_folder).others == {}
    folder = build_stories(shared_data / "models" / "stories260K", tmp_path / "s")
    found = stored_tensors(stored_in(folder, torch.float16, torch.bfloat16))
    assert found.dtype == torch.float16 and all("norm" in name for name in found.others) and found.others
    assert stored_tensors(tmp_path).dtype is None
