"""What is traced in the place of a model's own functions computes the same, as does the model after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from nbl_export.batch import BOOL, F64
from nbl_export.errors import InputError
from nbl_export.export import functions
from nbl_export.export.functions import _inverse_erf, attention, exportable
from nbl_export.export.traced_experts import experts
from tests.alone import furthest, own_logits, own_steps, rows_of
from tests.tiny_types import tiny_model

HEADS, KV_HEADS, NEW, TOTAL, SIZE = 4, 2, 3, 5, 8


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Numbers large enough for a cap or a sink to be missed."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape) * scale).float()


def by_hand(q: F64, k: F64, v: F64, mask: BOOL, scale: float, cap: float | None, sinks: F64 | None) -> F64:
    """[batch, new, heads, size], one query at a time: softmax over the keys it sees (and its head's sink)."""
    out = np.zeros((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    for b, h, i in np.ndindex(q.shape[0], q.shape[1], q.shape[2]):
        group = h // (q.shape[1] // k.shape[1])
        scores = scale * k[b, group] @ q[b, h, i]
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        seen = mask[b, 0, i]
        weights = np.exp(scores[seen])
        total = weights.sum() + (np.exp(sinks[h]) if sinks is not None else 0.0)
        out[b, i, h] = weights / total @ v[b, group][seen]
    return out


@pytest.mark.parametrize("cap", [None, 2.0], ids=["no cap", "capped"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize(("kv_heads", "scaling"), [(KV_HEADS, None), (HEADS, 0.5)])
def test_attention_is_the_textbooks(
    cap: float | None, sinks: bool, kv_heads: int, scaling: float | None
) -> None:
    q = drawn(2, HEADS, NEW, SIZE)
    k, v = drawn(2, kv_heads, TOTAL, SIZE, seed=1), drawn(2, kv_heads, TOTAL, SIZE, seed=2)
    # Causal, and the first key of row 1 is padding.
    mask = np.tril(np.ones((NEW, TOTAL), bool), TOTAL - NEW)[None, None].repeat(2, 0)
    mask[1, :, :, 0] = False
    s_aux = drawn(HEADS, seed=3) if sinks else None
    found, weights = attention(torch.nn.Module(), q, k, v, torch.from_numpy(mask), scaling, cap, s_aux)
    expected = by_hand(
        *(t.double().numpy() for t in (q, k, v)),
        mask,
        SIZE**-0.5 if scaling is None else scaling,
        cap,
        s_aux.double().numpy() if s_aux is not None else None,
    )
    assert weights is None and found.shape == (2, NEW, HEADS, SIZE) and found.is_contiguous()
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0], ids=["no cap", "capped"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
def test_a_bias_of_positions_is_added_to_the_scores(cap: float | None, masked: bool) -> None:
    q, k, v = (
        drawn(2, HEADS, NEW, SIZE),
        drawn(2, HEADS, TOTAL, SIZE, seed=1),
        drawn(2, HEADS, TOTAL, SIZE, seed=2),
    )
    bias, mask = (
        drawn(2, HEADS, NEW, TOTAL, seed=4),
        torch.ones(NEW, TOTAL, dtype=torch.bool).tril(TOTAL - NEW),
    )
    scores = (q @ k.mT).double() * SIZE**-0.5
    scores = (scores if cap is None else torch.tanh(scores / cap) * cap) + bias
    seen = mask if masked else torch.ones_like(mask)
    expected = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()).transpose(1, 2)
    given = mask[None, None].expand(2, 1, -1, -1) if masked else None
    found, _ = attention(torch.nn.Module(), q, k, v, given, softcap=cap, position_bias=bias)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_keys_that_an_index_has_chosen_are_not_taken_for_all(name: str) -> None:
    # As in MiniMax-M3 and DeepSeek V3.2: with short texts every key is chosen, and nothing differs.
    q = drawn(1, HEADS, NEW, SIZE)
    with pytest.raises(
        InputError, match=r"^Module has an index with a cache of its own that chooses the keys"
    ):
        attention(torch.nn.Module(), q, q, q, None, **{name: torch.zeros(1, NEW, 2, dtype=torch.long)})
    attention(torch.nn.Module(), q, q, q, None, **{name: None})


# experts -----------------------------------------------------------------------------------------


def test_experts_take_the_tokens_that_were_sent_to_them_none_or_many() -> None:
    model: Any = tiny_model("mixtral", num_experts_per_tok=2, num_local_experts=4)
    block = next(m for m in model.modules() if isinstance(m, MixtralSparseMoeBlock)).experts
    states, weights = drawn(6, 32, seed=1, scale=1.0), drawn(6, 2, seed=2, scale=1.0).abs()
    # Expert 3 gets no token, expert 1 one of every.
    chosen = torch.tensor([[0, 1], [1, 2], [2, 1], [1, 0], [0, 1], [1, 2]])
    up, down = block.gate_up_proj.double().numpy(), block.down_proj.double().numpy()
    expected = np.zeros((6, 32))
    for token, slot in np.ndindex(6, 2):
        expert = int(chosen[token, slot])
        gate, inner = np.split(up[expert] @ states[token].double().numpy(), 2)
        inner = gate / (1 + np.exp(-gate)) * inner
        expected[token] += float(weights[token, slot]) * (down[expert] @ inner)
    with torch.inference_mode():
        found = experts(block, states, chosen, weights)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# in a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neo", "deepseek_v2", "phi3"])
def test_a_model_computes_the_same_with_them_and_is_as_before_after_them(model_type: str) -> None:
    fields = {"attn_logit_softcapping": 1.0} if model_type == "gemma2" else {}
    model: Any = tiny_model(model_type, **fields)
    model.set_attn_implementation("eager")
    # Padding in front of the second row: without any, transformers makes no mask at all.
    ids = torch.tensor([[5, 9, 3, 44, 7, 8, 2], [0, 0, 2, 31, 30, 1, 6]])
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
    before = model.config._attn_implementation
    originals = (torch.polar, torch.view_as_complex, torch.nn.functional.scaled_dot_product_attention)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits
        with pytest.raises(ZeroDivisionError), exportable(model, None):
            found = model(input_ids=ids, attention_mask=mask).logits
            assert torch.polar is not originals[0]
            raise ZeroDivisionError
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-4)
    assert model.config._attn_implementation == before
    now = (torch.polar, torch.view_as_complex, torch.nn.functional.scaled_dot_product_attention)
    assert all(a is b for a, b in zip(now, originals, strict=True))


def test_the_inverse_of_erf_is_computed() -> None:
    y = torch.tensor([-0.999, -0.9, -0.3, 0.0, 1e-3, 0.5, 0.9, 0.99, 0.999])
    torch.testing.assert_close(_inverse_erf(y), torch.erfinv(y), rtol=2e-5, atol=1e-7)


def test_one_row_of_a_causal_module_without_a_mask_is_causal() -> None:
    """transformers leaves the mask out where a row is not padded, and says by the module that there should be one."""
    causal, encoder = torch.nn.Module(), torch.nn.Module()
    causal.is_causal = True  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 4, generator=generator) for heads in (4, 2, 2))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    for more in ({}, {"softcap": 2.0}):
        expected, _ = attention(causal, query, key, value, seen, **more)  # type: ignore[arg-type]
        found, _ = attention(causal, query, key, value, None, **more)  # type: ignore[arg-type]
        whole, _ = attention(encoder, query, key, value, None, **more)  # type: ignore[arg-type]
        assert torch.equal(found, expected)
        assert not torch.allclose(whole, expected)


class _Buckets(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, distances: torch.Tensor) -> torch.Tensor:
        # 22 - 1 is 16 / 2 times a whole power, but for the last bit.
        return self.function(distances, 16, 22).long().clamp(-16, 16)


def test_logarithmic_buckets_are_those_of_pytorch_in_another_runtime(tmp_path: Path) -> None:
    own, distances = modeling_deberta_v2.make_log_bucket_position, torch.arange(-40, 41)
    module = _Buckets(functions._by_table(own)).eval()
    free = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(module, (distances,), dynamo=True, dynamic_shapes=free, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name
    expected = _Buckets(own)(distances).numpy()
    assert np.array_equal(session.run(None, {name: distances.numpy()})[0], expected)
    assert len(np.unique(expected)) > 20


def test_a_short_row_has_the_frequencies_of_the_longest(tmp_path: Path) -> None:
    """With a switch at 100 tokens."""
    model = tiny_model("phi3", num_hidden_layers=2, max_position_embeddings=512)
    rows = rows_of(120, 50)
    # What transformers keeps of a longer text it forgets at a short one.
    alone = [own_logits(model, row[:-3]) for row in rows]
    off = [np.abs(t[:-3] - a).max() for t, a in zip(own_steps(model, rows, 3), alone, strict=True)]
    assert off[0] < 1e-4 and off[1] > 0.01
    own_logits(model, rows_of(20)[0])
    assert furthest(model, tmp_path, "static", rows, steps=3, together=True) < 1e-4
