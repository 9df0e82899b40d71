"""Forward passes with an explicit cache, in pieces, against transformers' one pass over the whole row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from nbl_export.models.caches import (
    BlockCache,
    CacheShape,
    StateShape,
    cache_layer,
    cache_with,
    entry_in,
    limited_steps,
)
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.forward import SENTENCE, encoder_of, run_uncached, run_with_past
from nbl_export.models.libraries import accepted_arguments
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import Pooling, task_named
from tests.encoders import PAD, text_encoder
from tests.fixtures_graph import original_logits, pad_left, ragged_rows
from tests.tiny_types import tiny_model

LAYERS, KV_HEADS, SIZE, VOCAB = 4, 2, 8, 260


def empty(rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    nothing = torch.zeros(rows, KV_HEADS, 0, SIZE)
    return [(nothing, nothing)] * LAYERS


def step(model: Any, ids: Any, mask: Any, positions: Any, past: Any, keep: int = 0) -> Any:
    tensors = (torch.from_numpy(np.ascontiguousarray(a)) for a in (ids, mask, positions))
    with torch.inference_mode():
        return run_with_past(model, *tensors, past, mask.shape[1] - ids.shape[1], keep)


@pytest.mark.parametrize("cuts", [(9,), (4, 5), (1, 1, 1, 6)], ids=str)
def test_a_row_in_pieces_is_the_row_in_one(tiny_model: Any, cuts: tuple[int, ...]) -> None:
    (row,) = ragged_rows([9], VOCAB)
    past, done, found = empty(1), 0, []
    for cut in cuts:
        ids = row[None, done : done + cut].astype(np.int64)
        done += cut
        positions = np.arange(done - cut, done)[None]
        logits, past = step(tiny_model, ids, np.ones((1, done), np.int64), positions, past)
        assert [t.shape for pair in past for t in pair] == [(1, KV_HEADS, done, SIZE)] * 2 * LAYERS
        found.append(logits[0].numpy())
    np.testing.assert_allclose(np.concatenate(found), original_logits(tiny_model, row), rtol=0, atol=2e-4)


def test_padding_on_the_left_is_hidden_by_the_mask(tiny_model: Any) -> None:
    rows = ragged_rows((7, 3), VOCAB, seed=1)
    logits, past = step(tiny_model, *pad_left(rows), empty(2))
    for i, row in enumerate(rows):
        found = logits[i, 7 - len(row) :].numpy()
        np.testing.assert_allclose(found, original_logits(tiny_model, row), rtol=0, atol=2e-4)
    # Other padding changes nothing of what is real.
    ids, mask, positions = pad_left(rows)
    other, _ = step(tiny_model, np.where(mask == 0, 99, ids), mask, positions, empty(2))
    np.testing.assert_allclose(other[1, 4:], logits[1, 4:], rtol=0, atol=2e-5)
    assert len(past) == LAYERS


def without(forward: Any, argument: str) -> Any:
    """``forward`` of a release of transformers that had no such argument."""
    import inspect

    def older(*args: Any, **kwargs: Any) -> Any:
        assert argument not in kwargs
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    older.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for name, p in signature.parameters.items() if name != argument]
    )
    return older


def test_a_linear_layers_entry_stays_as_it_was(tiny_model: Any) -> None:
    """Layer 0 writes no keys; the others still know how long the past is."""
    (row,) = ragged_rows([6], VOCAB, seed=3)
    attention = tiny_model.model.layers[0].self_attn
    nothing = torch.zeros(1, 1, 0, 1)
    hook = attention.register_forward_hook(lambda _m, _a, out: (torch.zeros_like(out[0]), *out[1:]))
    plain = attention.forward
    try:
        expected = original_logits(tiny_model, row)
        attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
        past = [(nothing, nothing), *empty(1)[1:]]
        found = []
        for at, token in enumerate(row):
            ids = np.array([[token]], np.int64)
            logits, past = step(tiny_model, ids, np.ones((1, at + 1), np.int64), np.array([[at]]), past)
            assert past[0][0].shape == (1, 1, 0, 1) and past[1][0].shape[2] == at + 1
            found.append(logits[0].numpy())
    finally:
        del attention.forward
        hook.remove()
    assert attention.forward.__func__ is plain.__func__
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=2e-4)


# in one pass -------------------------------------------------------------------------------------


def test_a_batch_in_one_pass_leaves_out_what_the_model_does_not_take(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "bert")
    model = load_model(find_model(str(folder)))
    ids = np.array([[257, 20, 30, 258], [257, 40, 258, 256]])
    mask = (ids != 256).astype(np.int64)
    types = np.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    found = run_uncached(model, {**inputs, "pixel_values": np.zeros((2, 3, 4, 4), np.float32)})
    with torch.inference_mode():
        theirs = AutoModel.from_pretrained(folder)(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    torch.testing.assert_close(found.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=1e-5)


class Patches(torch.nn.Module):
    """Takes images in its own precision alone, as a convolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Conv2d(3, 4, 2, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.project(pixel_values)


KV, CONV, MATRIX = CacheShape(2, 8, 8), StateShape("conv", (32, 3)), StateShape("recurrent", (4, 8, 8))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("lfm2", [BlockCache(None, (CONV,)), BlockCache(KV)] * 2),
        ("minimax", [BlockCache(None, (MATRIX,)), BlockCache(KV)] * 2),
        (
            "falcon_h1",
            [BlockCache(KV, (StateShape("conv", (80, 4)), StateShape("recurrent", (4, 16, 8))))] * 4,
        ),
    ],
)
def test_each_block_keeps_what_its_cache_layer_holds(model_type: str, expected: list[BlockCache]) -> None:
    facts = dummy_run(tiny_model(model_type))
    assert list(facts.cache) == expected
    assert (facts.cache_class is None) == (model_type != "minimax")


@pytest.mark.parametrize("model_type", ["lfm2", "bamba", "minimax", "falcon_h1", "nemotron_h", "qwen3_next"])
def test_a_text_goes_on_from_its_entries(model_type: str) -> None:
    """A text in two parts, with a cache made anew in between, has the logits of the whole."""
    model: Any = tiny_model(model_type)
    facts, ids = dummy_run(model), torch.arange(2, 25)[None]
    entries = [block.empty(torch.zeros(()), 1) for block in facts.cache]
    found = []
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[0]
        for start, stop in ((0, 20), (20, 21), (21, 22), (22, 23)):
            layers = [cache_layer(*block, start) for block in zip(facts.cache, entries, strict=True)]
            cache = cache_with(layers, facts.cache_class)
            given = accepted_arguments(model, position_ids=torch.arange(start, stop)[None])
            part = model(input_ids=ids[:, start:stop], cache=cache, use_cache=True, **given)
            found.append(part.logits[0])
            entries = [entry_in(cache, i, block) for i, block in enumerate(facts.cache)]
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-3, atol=1e-4)


def test_a_step_has_the_limits_of_a_text() -> None:
    """The state after a text and after its tokens one by one; transformers' own steps are 10 % off."""
    model: Any = tiny_model("nemotron_h", time_step_min=0.5)
    ids = torch.arange(2, 12)[None]

    def state(parts: list[slice]) -> torch.Tensor:
        cache = None
        for part in parts:
            given = {} if cache is None else {"cache": cache}
            positions = torch.arange(10)[None, part]
            cache = model(input_ids=ids[:, part], position_ids=positions, use_cache=True, **given).cache
        found: torch.Tensor = cache.layers[0].recurrent_states[0]
        return found.clone()

    one_by_one = [slice(0, 2), *(slice(i, i + 1) for i in range(2, 10))]
    with torch.inference_mode():
        whole, own = state([slice(0, 10)]), state(one_by_one)
        with limited_steps(model):
            limited = state(one_by_one)
        again = state(one_by_one)
    assert (own - whole).norm() > 0.05 * whole.norm()
    torch.testing.assert_close(limited, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, own, rtol=0, atol=0)


def test_a_state_that_is_handed_over_is_not_overwritten() -> None:
    model: Any = tiny_model("lfm2")
    facts = dummy_run(model)
    entries = [block.empty(torch.zeros(()), 1, 2) for block in facts.cache]
    layers = [cache_layer(*block, 2) for block in zip(facts.cache, entries, strict=True)]
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5]]), cache=cache_with(layers), use_cache=True)
    assert all(not entry[0].any() for entry in entries if len(entry) == 1)


IDS = np.array([[257, 20, 30, 40, 258], [257, 50, 258, PAD, PAD]])
INPUTS = {
    "token_type_ids": np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]),
    "attention_mask": (IDS != PAD).astype(np.int64),
    "input_ids": IDS,
}
FEATURES = task_named("feature-extraction")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def theirs(folder: Path, inputs: Any) -> Any:
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(**{n: torch.from_numpy(a) for n, a in inputs.items()})


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_states_and_the_sentence_are_those_of_transformers_and_numpy(bert: Path, mode: str) -> None:
    model = load_model(find_model(str(bert)))
    encoder = encoder_of(model, FEATURES, Pooling(mode, True, ()), INPUTS)  # type: ignore[arg-type]
    # By position, in one order whatever the batch's.
    assert encoder.inputs == ("input_ids", "attention_mask", "token_type_ids")
    with torch.inference_mode():
        found = dict(
            zip(encoder.outputs, encoder(*(torch.from_numpy(INPUTS[n]) for n in encoder.inputs)), strict=True)
        )
    states = theirs(bert, INPUTS).last_hidden_state.double().numpy()
    mask = INPUTS["attention_mask"].astype(bool)
    np.testing.assert_allclose(found["last_hidden_state"].numpy()[mask], states[mask], rtol=0, atol=1e-5)
    rows = [states[i][mask[i]] for i in range(2)]
    pooled = np.array([{"mean": r.mean(0), "cls": r[0], "max": r.max(0)}[mode] for r in rows])
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(found[SENTENCE].numpy(), expected, rtol=0, atol=1e-5)


def test_rotary_encoders_get_a_row_of_positions_each(tmp_path: Path) -> None:
    """Left to themselves they make one row for all, which ONNX's RotaryEmbedding does not take."""
    fields = {"global_attn_every_n_layers": 2, "local_attention": 8, "vocab_size": 264, "pad_token_id": PAD}
    folder = text_encoder(tmp_path / "modern", "modernbert", "ModernBertModel", **fields)
    model: Any = load_model(find_model(str(folder)))
    given = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
    encoder = encoder_of(model, FEATURES, None, given)
    seen: list[Any] = []
    rotary = next(m for m in model.modules() if "rotary" in type(m).__name__.lower())

    def note(_module: Any, args: Any, kwargs: Any) -> None:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        seen.extend(a for a in given if not a.is_floating_point())

    hook = rotary.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        (states, *_) = encoder(*(torch.from_numpy(given[n]) for n in encoder.inputs))
    hook.remove()
    assert seen and seen[0].tolist() == [list(range(5))] * 2
    mask = torch.from_numpy(given["attention_mask"]).bool()
    expected = theirs(folder, given).last_hidden_state
    torch.testing.assert_close(states[mask], expected[mask], rtol=0, atol=1e-4)
