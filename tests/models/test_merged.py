"""Weights of experts, which transformers merges, are what it makes of them, and are made when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import WeightConverter

from nbl_export.errors import InputError
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.stored import Merged, put_off
from nbl_export.models.weights import resident, stored_of
from tests.models.test_weights import absent, logits, plain, reads, stored_in
from tests.tiny import save_tokenizer

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


def test_transformers_is_as_it_was(tmp_path: Path) -> None:
    convert = WeightConverter.convert
    folder = saved(tmp_path / "m")
    load_model(find_model(str(folder)))
    assert WeightConverter.convert is convert
    with pytest.raises(ZeroDivisionError), put_off():
        raise ZeroDivisionError
    assert WeightConverter.convert is convert


def test_other_dtypes_among_the_experts_are_in_memory(tmp_path: Path) -> None:
    """Which of them a rounded model would round, nobody says."""
    folder = stored_in(saved(tmp_path / "m"), torch.bfloat16, torch.float32, "experts.1.")
    model = load_model(find_model(str(folder)))
    assert of_experts(model) == {}
    assert torch.equal(logits(model), logits(plain(folder)))
