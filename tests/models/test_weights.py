"""Weights that are read block by block give the same bits as a model that is in memory, and are gone afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from nbl_export.errors import InputError
from nbl_export.linearize.adapters import Adapter, adapted
from nbl_export.models import weights
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import in_memory, in_precision, load_model
from nbl_export.models.source import find_model
from nbl_export.models.stand_ins import standing_in
from nbl_export.models.weights import (
    Stored,
    all_finite,
    device_of,
    dtype_of,
    held,
    resident,
    room,
    stored_of,
    streamed,
    streams,
)
from tests import families
from tests.encoders import as_sentence_transformer, text_encoder
from tests.models.spoiled import small_gguf
from tests.tiny import build as build_tiny

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
    plain = weights.Streaming.value

    def counted(self: Any, weight: Any) -> Any:
        found.append(weight.name)
        return plain(self, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights.Streaming, "value", counted)
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


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    folder = stored_in(as_sentence_transformer(text_encoder(tmp_path / "bert")), torch.float16)
    model: Any = load_model(find_model(str(folder)))
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found, expected = model(input_ids=IDS), theirs(input_ids=IDS)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert absent(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_precision_is_a_rounding_of_what_is_stored(half_folder: Path, dtype: str) -> None:
    ours = in_precision(load_model(find_model(str(half_folder))), dtype)
    assert dtype_of(ours) == dtype
    assert torch.equal(logits(ours), logits(plain(half_folder, getattr(torch, dtype))))


def test_what_is_mapped_is_not_copied(half_folder: Path) -> None:
    half: Any = in_precision(load_model(find_model(str(half_folder))), "bfloat16")
    stored = stored_of(half)
    with resident(half):
        name = "model.layers.1.mlp.up_proj.weight"
        assert half.get_parameter(name).data_ptr() == stored.read[name]().data_ptr()


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

    for module in (
        model,
        model.model,
        model.model.layers[2],
        model.model.layers[2].mlp.act_fn,
        model.lm_head,
    ):
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


def test_a_weight_that_was_read_in_inference_mode_can_be_trained_through(model: Any) -> None:
    with resident(model), torch.inference_mode():
        logits(model)
    with torch.inference_mode():
        context = resident(model)
        context.__enter__()
    added = torch.zeros(32, requires_grad=True)
    hook = model.model.layers[0].register_forward_hook(lambda _m, _a, out: out + added)
    model(input_ids=IDS).logits.sum().backward()
    hook.remove()
    context.__exit__(None, None, None)
    assert added.grad is not None and added.grad.abs().sum() > 0


def test_adapters_are_merged_into_what_is_read_and_nowhere_else(model: Any, half_folder: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    rng = np.random.default_rng(0)
    up, down = (rng.standard_normal(s).astype(np.float32) for s in ((32, 3), (3, 64)))
    theirs = plain(half_folder)
    with torch.no_grad():
        theirs.get_parameter(name).add_(torch.from_numpy(up @ down))
    half = in_precision(model, "float16")
    before = logits(half)
    with adapted(model, {name: Adapter(up, down, ())}):
        assert torch.equal(logits(model), logits(theirs))
        assert torch.equal(logits(half), before), "another precision of the same checkpoint"
    assert model.get_parameter(name).is_meta
    assert torch.equal(logits(model), logits(plain(half_folder)))


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


def test_another_device_gets_everything(model: Any) -> None:
    """The meta device stands for one: whatever stayed behind would be on the CPU."""
    there = streamed(stored_of(model), torch.float16, "meta")
    assert device_of(there) == torch.device("meta")
    assert all(b.device.type == "meta" for b in there.buffers())
    with resident(there):
        assert {(p.device.type, p.dtype) for p in there.parameters()} == {("meta", torch.float16)}
    assert there(input_ids=IDS.to("meta")).logits.device.type == "meta"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_keeps_a_model_that_nobody_has(name: str, tmp_path: Path) -> None:
    model: Any = load_model(find_model(str(stored_in(families.build(name, tmp_path / "m"), torch.bfloat16))))
    model.added = torch.nn.Parameter(torch.zeros(1))
    copies = [model, streamed(Stored(model), torch.float16)]
    logits(copies[0])
    gone: list[int] = []
    for one in copies:
        weakref.finalize(one, gone.append, 1)
    del one, copies, model
    gc.collect()
    assert gone == [1, 1]


# refusals -----------------------------------------------------------------------------------------


def test_a_weight_of_a_gguf_file_that_is_no_number_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "m.gguf", 1)
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32("nan").tobytes()
    path.write_bytes(raw)
    with pytest.raises(
        InputError, match=r"m\.gguf: the weight .* is NaN or infinite: download the model again\."
    ):
        dummy_run(load_model(find_model(str(path))))


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


# stand-ins ----------------------------------------------------------------------------------------

# Numbers of a matrix that is worth a stand-in here.
LARGE = 1025


def test_what_stands_for_a_weight_takes_no_memory_and_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.models.stand_ins._LARGE", 4 * LARGE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    model = load_model(find_model(str(stored_in(build_tiny(tmp_path / "m"), torch.bfloat16))))
    with standing_in(model) as found:
        assert {one.tensor.shape for one in found} == {
            p.shape for p in model.parameters() if p.numel() >= LARGE
        }
        assert not absent(model) and all(not one.tensor.any() for one in found)
        used = [path.stat() for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
        assert len(used) == len(found) and sum(s.st_size for s in used) == sum(
            one.tensor.nbytes for one in found
        )
        assert sum(512 * s.st_blocks for s in used) <= 4096 * len(used)
        for one in found:
            assert torch.equal(one.read(), one.stored().float())
    assert absent(model) and list((tmp_path / "scratch").iterdir()) == []
    with standing_in(plain(tmp_path / "m")) as found:
        assert found == []
