"""Weights of experts, which transformers merges, are what it makes of them, and are made when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.errors import InputError
from nbl_export.models import merged
from nbl_export.models.compat import weight_converter
from nbl_export.models.load import load_model
from nbl_export.models.merged import Merged
from nbl_export.models.source import find_model
from nbl_export.models.weights import resident, stored_of
from tests.models.test_weights import absent, largest, logits, plain, reads, stored_in
from tests.tiny import save_tokenizer

pytestmark = pytest.mark.skipif(weight_converter() is None, reason="transformers merges nothing")

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
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe")


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


def test_no_more_than_a_block_of_experts_is_in_memory(tmp_path: Path) -> None:
    model = load_model(find_model(str(saved(tmp_path / "m"))))
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())  # type: ignore[operator, union-attr]
    with largest(model) as found:
        logits(model)
    assert max(found) < 1.5 * block


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_loading_copies_no_experts(tmp_path: Path) -> None:
    load_model(find_model(str(saved(tmp_path / "small"))))  # what is imported at the first time
    folder = saved(tmp_path / "m", hidden_size=256, intermediate_size=2048, num_local_experts=8)
    size = (folder / "model.safetensors").stat().st_size
    before = anonymous()
    model = load_model(find_model(str(folder)))
    grown = anonymous() - before
    assert size > 50e6 and grown < size / 4
    del model


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


def test_what_cannot_be_put_off_is_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m")
    expected = logits(plain(folder))
    stack = torch.stack

    def numbers_only(tensors: Any, **options: Any) -> torch.Tensor:
        if any(t.is_meta for t in tensors):
            raise NotImplementedError
        return stack(tensors, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "stack", numbers_only)
        model = load_model(find_model(str(folder)))
    assert of_experts(model) == {}
    assert torch.equal(logits(model), expected)


def test_where_transformers_merges_nothing_nothing_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "weight_converter", lambda: None)
    with merged.put_off() as found:
        assert found == {}


def test_transformers_is_as_it_was(tmp_path: Path) -> None:
    convert = weight_converter().convert
    folder = saved(tmp_path / "m")
    load_model(find_model(str(folder)))
    assert weight_converter().convert is convert
    with pytest.raises(ZeroDivisionError), merged.put_off():
        raise ZeroDivisionError
    assert weight_converter().convert is convert


def test_other_dtypes_among_the_experts_are_in_memory(tmp_path: Path) -> None:
    """Which of them a rounded model would round, nobody says."""
    folder = stored_in(saved(tmp_path / "m"), torch.bfloat16, torch.float32, "experts.1.")
    model = load_model(find_model(str(folder)))
    assert of_experts(model) == {}
    assert torch.equal(logits(model), logits(plain(folder)))
