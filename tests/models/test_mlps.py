"""The MLP of each layer, found in the model; a linear layer in its place changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from nbl_export.blocks import MLP, Mlp
from nbl_export.linearize.plan import LinearLayer
from nbl_export.linearize.swap import replaced
from nbl_export.models.candidates import block_modules, blocks_of, candidates
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import observed
from nbl_export.models.mlps import MlpPaths, mlp_paths
from tests.encoders import vision_encoder
from tests.families import DECODERS, LAYERS, WIDTH, unsaved

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 89]])
# Every family whose MLP is one block between two tensors; the module that writes y, and the one that reads h.
FOUND = {
    "llama": ("mlp", "post_attention_layernorm"),
    "gemma2": ("mlp", "pre_feedforward_layernorm"),
    "olmo2": ("mlp", "mlp"),
    "phi": ("mlp", "input_layernorm"),
    "mixtral": ("mlp", "post_attention_layernorm"),
    "gpt2": ("mlp", "ln_2"),
    "bloom": ("mlp.dense_4h_to_h", "post_attention_layernorm"),
    "gpt_oss": ("mlp", "post_attention_layernorm"),
    "opt": ("fc2", "final_layer_norm"),
    "opt-post-norm": ("fc2", "fc1"),
    "gemma3n": ("mlp", "pre_feedforward_layernorm"),
    "gemma4": ("mlp", "pre_feedforward_layernorm"),
}
# Their MLP is modules of the layer, not one, so that there is none to be run alone.
APART = ("opt", "opt-post-norm")
# A norm behind the MLP, or the attention beside it, or more than both.
NOT_ADDED = ("gemma2", "olmo2", "phi", "opt-post-norm", "gemma3n", "gemma4")


def kept(seen: dict[Any, tuple[torch.Tensor, ...]]) -> Any:
    """Keeps what passes; a model may add to it in place."""
    return lambda index, *rest: seen.update({index: tuple(t.clone() for t in rest)})


def made(family: str) -> Any:
    return unsaved(family).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FOUND)
def test_the_mlp_of_every_layer_is_found(family: str) -> None:
    model = made(family)
    found = candidates(model, {MLP})
    assert [one.index for one in found] == [Mlp(i) for i in range(LAYERS)]
    output, stream = FOUND[family]
    assert {one.output.removeprefix(f"{one.block}.") for one in found} == {output}
    assert {one.stream.removeprefix(f"{one.block}.") for one in found} == {stream}


@pytest.mark.parametrize("family", FOUND)
def test_what_is_seen_is_what_the_mlp_reads_and_adds(family: str) -> None:
    """The stream after the MLP is the one before it and y, in families that add y as it is."""
    model = made(family)
    seen: dict[Any, tuple[torch.Tensor, ...]] = {}
    states: list[torch.Tensor] = []
    hook = model.get_submodule(blocks_of(model)[0].block).register_forward_hook(
        lambda _m, _a, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode(), observed(model, blocks_of(model), kept(seen)):
        model(input_ids=IDS)
    hook.remove()
    h, x, y = seen[Mlp(0)]
    with torch.inference_mode():
        module = model.get_submodule(block_modules(model, Mlp(0)).module)
        if family in APART:
            layer = model.model.decoder.layers[0]
            given = layer.fc2(layer.activation_fn(module(x)))
            assert torch.allclose(given, y, atol=1e-6)
        else:
            given = module(x, *([torch.zeros_like(x)] if family == "bloom" else []))
            assert torch.equal(given[0] if isinstance(given, tuple) else given, y)
    assert h.shape == x.shape == y.shape == (*IDS.shape, WIDTH)
    if family not in NOT_ADDED:
        assert torch.allclose(states[0], h + y, atol=1e-6)


@pytest.mark.parametrize("family", [*FOUND, "falcon", "gpt_neox", "qwen3_next", "lfm2"])
def test_a_linear_layer_in_the_place_of_an_mlp_computes_w_u_plus_b(family: str) -> None:
    model = made(family)
    generator = torch.Generator().manual_seed(0)
    w, b = (torch.randn(shape, generator=generator) for shape in ((WIDTH, WIDTH), (WIDTH,)))
    linear = {Mlp(1): LinearLayer(w.numpy(), b.numpy())}
    seen: dict[Any, tuple[torch.Tensor, ...]] = {}
    with torch.inference_mode():
        whole = model(input_ids=IDS).logits
        with replaced(model, linear, "normed"), observed(model, blocks_of(model), kept(seen)):
            changed = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, whole), "the model is as it was"
    _, x, y = seen[Mlp(1)]
    assert torch.allclose(y, x @ w.T + b, atol=1e-4)
    assert not torch.allclose(changed, whole)


def test_an_mlp_in_two_modules_gives_w_u_plus_b_behind_its_activation() -> None:
    """BERT's is `intermediate` and `output.dense`: what is computed in between is not read."""
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=99
        )
    ).eval()
    assert mlp_paths(model)[0] == MlpPaths("encoder.layer.0.intermediate", "encoder.layer.0.output.dense")
    w, b = torch.randn(16, 16), torch.randn(16)
    seen: dict[Any, tuple[torch.Tensor, ...]] = {}
    for fit_input in ("normed", "residual"):
        with (
            torch.inference_mode(),
            replaced(model, {Mlp(0): LinearLayer(w.numpy(), b.numpy())}, fit_input),
            observed(model, blocks_of(model), kept(seen)),
        ):
            model(input_ids=IDS)
        h, x, y = seen[Mlp(0)]
        assert torch.equal(h, x), "the norm is behind the sum"
        assert torch.allclose(y, x @ w.T + b, atol=1e-5)


def test_an_mlp_that_is_not_found_is_kept_and_its_attention_is_a_candidate() -> None:
    model = made("llama")
    for layer in model.model.layers:  # which runs it once more
        layer.register_forward_hook(lambda block, _args, output: block.mlp(output))
    assert [one.index for one in candidates(model, {"attention", MLP})] == list(range(LAYERS))
    assert "run more than once" in dummy_run(model).odd_mlps[0]


def test_a_list_of_other_length_than_the_rows_is_no_mlp() -> None:
    """Packed rows, say: what is read cannot be put back into rows."""
    model = made("opt")
    for layer in model.model.decoder.layers:
        layer.fc1.register_forward_pre_hook(lambda _module, args: (args[0][1:],))
        layer.fc2.register_forward_hook(lambda _m, _a, output: torch.cat([output[:1], output]))
    assert [one.index for one in candidates(model, {"attention", MLP})] == list(range(LAYERS))


def test_two_modules_that_may_be_the_mlp_are_none() -> None:
    model = made("llama")
    model.model.layers[1].other_mlp = torch.nn.Linear(WIDTH, WIDTH)
    found = mlp_paths(model)
    assert found[1] == "2 of its modules are MLPs where one is expected"
    assert found[0] == MlpPaths("model.layers.0.mlp", "model.layers.0.mlp")


@pytest.mark.parametrize("family", DECODERS)
def test_attention_alone_is_what_it_was(family: str) -> None:
    found = candidates(made(family))
    assert found and all(isinstance(one.index, int) for one in found)


def test_the_mlps_of_a_vision_encoder_are_found_though_it_runs_twice(
    tmp_path: Path,
) -> None:
    model = AutoModel.from_pretrained(vision_encoder(tmp_path)).eval()
    assert not dummy_run(model).odd_mlps
    assert [one.stream for one in candidates(model, (MLP,))] == [
        f"layers.{i}.layernorm_after" for i in range(len(candidates(model)))
    ]
