"""Weights are read block by block, in the bits of a model in memory, whatever way a checkpoint stores them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nbl_export.models import weights
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.stored import Merged
from nbl_export.models.weights import (
    all_finite,
    dtype_of,
    held,
    in_memory,
    in_precision,
    resident,
    room,
    streaming_of,
    streams,
)
from tests import families
from tests.models.test_source import small_gguf
from tests.tiny import build as build_tiny
from tests.tiny import save_tokenizer
from tests.tiny_types import tiny_model

IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def stored_in(folder: Path, dtype: torch.dtype, other: torch.dtype | None = None, of: str = "norm") -> Path:
    """The model in ``folder`` with its weights in ``dtype``, those whose name has ``of`` in the ``other``."""
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        kinds = {name: other if other and of in name else dtype for name in weights}
        save_file({n: w.to(kinds[n]) for n, w in weights.items()}, path, {"format": "pt"})
    return folder


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def absent(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}


@contextmanager
def reads() -> Iterator[list[str]]:
    """Within the block, the names of the weights that are read, one for each time, in order."""
    found: list[str] = []
    plain = weights.Weight.value

    def counted(self: Any) -> Any:
        found.append(self.name)
        return plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights.Weight, "value", counted)
        yield found


@contextmanager
def largest(model: torch.nn.Module) -> Iterator[list[int]]:
    """Within the block, the bytes of weights in memory at the end of each module, but those of the stored embedding."""
    found: list[int] = []

    def look(*_: Any) -> None:
        there = {id(p): p for p in model.parameters() if not p.is_meta and p.dtype == torch.float32}
        found.append(sum(4 * p.numel() for p in there.values()))

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture
def half_folder(tmp_path: Path) -> Path:
    return stored_in(build_tiny(tmp_path / "tiny"), torch.bfloat16)


@pytest.fixture
def model(half_folder: Path) -> Any:
    """A model whose checkpoint is in bfloat16, in float32."""
    return load_model(find_model(str(half_folder)))


def plain(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """By transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


# the same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.DECODERS)
def test_every_family_is_what_transformers_loads(name: str, tmp_path: Path) -> None:
    folder = stored_in(families.build(name, tmp_path / name), torch.float16, torch.float32)
    model, theirs = load_model(find_model(str(folder))), plain(folder)
    assert torch.equal(logits(model), logits(theirs))
    ours, expected = (dict(m.named_buffers()) for m in (model, theirs))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(b, expected[n]) and b.dtype == expected[n].dtype for n, b in ours.items())
    assert model.config.to_dict() == theirs.config.to_dict()
    assert model.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_precision_is_a_rounding_of_what_is_stored(half_folder: Path, dtype: str) -> None:
    ours = in_precision(load_model(find_model(str(half_folder))), dtype)
    assert dtype_of(ours) == dtype
    assert torch.equal(logits(ours), logits(plain(half_folder, getattr(torch, dtype))))


# what is in memory --------------------------------------------------------------------------------


def test_no_more_than_a_block_is_in_memory(model: Any) -> None:
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    beside = 4 * (model.model.norm.weight.numel() + model.lm_head.weight.numel())
    with largest(model) as found:
        logits(model)
    assert block <= max(found) <= max(block, beside) + 4 * 32
    embedding = {"model.embed_tokens.weight"}
    assert absent(model) == {n for n, _ in model.named_parameters(remove_duplicate=False)} - embedding


def test_an_error_within_a_block_leaves_nothing(model: Any) -> None:
    before = absent(model)

    def fail(*_: Any) -> None:
        raise ArithmeticError

    for module in (model, model.model.layers[2], model.model.layers[2].mlp.act_fn, model.lm_head):
        for register in (module.register_forward_pre_hook, module.register_forward_hook):
            hook = register(fail)
            with pytest.raises(ArithmeticError):
                logits(model)
            hook.remove()
            assert absent(model) == before
    hook = model.model.layers[1].register_forward_pre_hook(fail, prepend=True)  # before its weights are read
    with pytest.raises(ArithmeticError):
        logits(model)
    hook.remove()
    assert absent(model) == before and logits(model).isfinite().all()


def test_what_is_held_stays_as_long_as_somebody_holds_it(model: Any) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with held(model, ["model.layers.1"]):
        first = model.get_parameter(name)
        with held(model, [name]), resident(model):
            logits(model)
            assert model.get_parameter(name) is first and not absent(model)
        logits(model)
        assert model.get_parameter(name) is first
        assert model.get_parameter("model.layers.0.mlp.up_proj.weight").is_meta
        assert model.get_parameter("model.layers.1.mlp.down_proj.weight").isfinite().all()
    assert model.get_parameter(name).is_meta


def test_a_model_stays_if_all_of_it_finds_room(model: Any) -> None:
    before = absent(model)
    everything = 4 * sum(model.get_parameter(name).numel() for name in before)
    assert streams(model)
    for budget, stays in ((0, False), (everything - 1, False), (everything, True), (float("inf"), True)):
        with resident(model, budget):
            assert streams(model) != stays and bool(absent(model)) != stays
            assert logits(model).isfinite().all()
        assert absent(model) == before and streams(model)
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    with held(model, ["model.layers.0"]), resident(model, everything - block):
        assert not streams(model), "what is there already takes no more"
    assert 0 < room() <= 2 << 30


def test_a_model_whose_passes_are_timed_reads_nothing_in_one(model: Any, tmp_path: Path) -> None:
    gguf = load_model(find_model(str(small_gguf(tmp_path / "m.gguf", 1))))
    for one in (model, in_precision(model, "bfloat16"), gguf):
        ids = IDS % one.config.vocab_size
        expected, made = logits(one, ids), in_memory(one, "cpu")
        assert absent(one) and not absent(made) and not streams(made)
        with reads() as read:
            assert torch.equal(logits(made, ids), expected)
        assert not read and not any(m._forward_pre_hooks for m in made.modules())
        assert dtype_of(made) == dtype_of(one)
        tied = one.config.tie_word_embeddings
        assert (made.get_input_embeddings().weight is made.get_output_embeddings().weight) == tied
        assert in_memory(made, "cpu") is made


# refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_single_value_that_is_no_number_is_found(dtype: torch.dtype) -> None:
    tensor = torch.randn(301, 517).to(dtype)
    tensor[3, 4] = torch.finfo(dtype).max
    assert all_finite(tensor) and all_finite(tensor.T) and all_finite(tensor[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (150, 259), (300, 516)):
            kept = tensor[place].clone()
            tensor[place] = bad
            assert not all_finite(tensor) and not all_finite(tensor.T)
            tensor[place] = kept
    assert all_finite(tensor)


# how they are stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["lm_head", "embed_tokens", "v_proj"])
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


def saved(target: Path, family: str = "mixtral") -> Path:
    tiny_model(family).to(torch.bfloat16).save_pretrained(target)
    save_tokenizer(target)
    return target


def of_experts(model: Any) -> dict[str, Merged]:
    return {read.name: read for read in streaming_of(model).stored.read.values() if isinstance(read, Merged)}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
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


def test_other_dtypes_among_the_experts_are_exact(tmp_path: Path) -> None:
    folder = stored_in(saved(tmp_path / "m"), torch.bfloat16, torch.float32, "experts.1.")
    model = load_model(find_model(str(folder)))
    assert torch.equal(logits(model), logits(plain(folder)))
