"""Tiny random decoders of the families that exporters treat differently, one row of data each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.blocks import PARTS, SPAN, Block
from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.moments import Moments
from nbl_export.calibrate.probe import Probe, probe_model
from nbl_export.convert.gguf import Fields
from nbl_export.linearize.lmmse import fit_lmmse
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.layers import attention_layers, hidden_size, layer_count
from nbl_export.packages import part
from nbl_export.settings.choices import FitInput
from nbl_export.stages.convert import FORMS
from nbl_export.verify.parity.compare import Text, compare
from nbl_export.verify.parity.figures import Parity, gates_for
from nbl_export.verify.parity.pytorch import record_pytorch
from tests.fixtures_graph import load, ragged_rows, recorded
from tests.tiny import save_tokenizer
from tests.tiny_types import scale_up

LAYERS, WIDTH, HEADS, HEAD_SIZE, VOCAB = 4, 64, 4, 16, 260
# onnxruntime's GroupQueryAttention on the CPU takes head sizes, and rotated parts, that are multiples of 16.
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


@dataclass(frozen=True)
class Family:
    """A model type of transformers, and what its configuration has beside the common sizes."""

    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama-gqa": Family("llama", {"num_key_value_heads": 2}),
    "mha-biases": Family("llama", {"num_key_value_heads": HEADS, "attention_bias": True, "mlp_bias": True}),
    "fused-qkv": Family("phi3", {"num_key_value_heads": 2, "original_max_position_embeddings": 256}),
    # Attention and MLP read one norm, and both are added to the stream; every projection has a bias.
    "parallel-residual": Family(
        "phi",
        # onnxruntime-genai's builder gives every LayerNorm this epsilon, whatever the configuration says.
        {"num_attention_heads": 2, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-6},
    ),
    # The same with queries, keys and values in one projection, head by head.
    "parallel-fused": Family("gpt_neox", {"rotary_pct": 0.5}),
    # One after the other, with LayerNorms: optimizers move the output projection's bias into the residual norm.
    "sequential-biases": Family("gpt_neox", {"rotary_pct": 0.5, "use_parallel_residual": False}),
}


def build(name: str, target: Path, seed: int = 0, **changes: Any) -> Path:
    """Save the model of the family ``name`` and a tokenizer in ``target``; ``changes`` are configuration fields."""
    unsaved(name, seed, **changes).save_pretrained(target)
    save_tokenizer(target)
    return target


def unsaved(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model of the family ``name``; ``changes`` are configuration fields."""
    family = {**FAMILIES, **DECODERS, **MIXTURES}[name]
    torch.manual_seed(seed)
    fields = {**_SIZES, **family.fields, **changes}
    if (layers := changes.get("num_hidden_layers")) is not None:
        # Their number by another name, and what says something of each.
        if "n_layer" in fields:
            fields["n_layer"] = layers
        if "layer_types" in fields:
            fields["layer_types"] = fields["layer_types"][:layers]
    config = AutoConfig.for_model(family.model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    scale_up(model)
    return model


# Every family that is promised to be served, by the features that set it apart: each is active on short text.
_WINDOW = {"sliding_window": 8}
_ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Half the head: a factor for each frequency, one set up to 12 tokens and one beyond, by the batch's longest row.
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 12,
}
_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GQA = {"num_key_value_heads": 2, "head_dim": HEAD_SIZE}
_SHARED = {
    **_WINDOW,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
_FULL = ["full_attention"] * 2
_LINEAR = {"layer_types": [*_FULL, "linear_attention", "full_attention"]}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256}
DECODERS = {
    "llama": Family("llama", {**_GQA, "rope_parameters": _LLAMA_ROPE}),
    "mistral": Family("mistral", {**_GQA, **_WINDOW}),
    "mixtral": Family("mixtral", {**_GQA, **_EXPERTS, "sliding_window": None}),
    "qwen2": Family(
        "qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2, **_WINDOW}
    ),
    "qwen3": Family("qwen3", _GQA),
    "gemma2": Family(
        "gemma2",
        {
            **_GQA,
            **_WINDOW,
            "query_pre_attn_scalar": HEAD_SIZE,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "layer_types": _ALTERNATING,
        },
    ),
    "gemma3-text": Family(
        "gemma3_text",
        {**_GQA, **_WINDOW, "query_pre_attn_scalar": HEAD_SIZE, "layer_types": _ALTERNATING},
    ),
    # The last layer has queries only, and attends to the keys and values of layer 2.
    "gemma3n": Family(
        "gemma3n_text",
        {
            **_GQA,
            **_SHARED,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "intermediate_size": [96] * LAYERS,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma4": Family("gemma4_text", {**_GQA, **_SHARED, "global_head_dim": 2 * HEAD_SIZE}),
    "phi": Family("phi", {"partial_rotary_factor": 0.5}),
    "phi3": Family(
        "phi3",
        {
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 12,
            "rope_parameters": {**_LONG_ROPE, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt2": Family("gpt2", _GPT2),
    "gpt_neox": Family("gpt_neox", {"rotary_pct": 0.5}),
    "falcon": Family("falcon", {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-new": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": Family(
        "falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "opt": Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": WIDTH}),
    "opt-post-norm": Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "olmo2": Family("olmo2", {"num_key_value_heads": 2}),
    "granite": Family(
        "granite",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
    ),
    "smollm3": Family("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 1, 1, 0]}),
    "stablelm": Family(
        "stablelm",
        {"num_key_value_heads": 2, "partial_rotary_factor": 0.25, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    "stablelm-parallel": Family("stablelm", {"num_key_value_heads": 2, "use_parallel_residual": True}),
    "bloom": Family("bloom", {"n_layer": LAYERS, "n_head": HEADS}),
    "gpt_oss": Family("gpt_oss", {**_GQA, **_EXPERTS, **_WINDOW, "layer_types": _ALTERNATING}),
    # Layer 2 keeps a state instead of keys and values; its text takes several chunks.
    "lfm2": Family("lfm2", {"num_key_value_heads": 2, "layer_types": [*_FULL, "conv", "full_attention"]}),
    "bamba": Family("bamba", {**_GQA, **_MAMBA, "attn_layer_indices": [0, 1, 3]}),
    "nemotron_h": Family(
        "nemotron_h",
        {
            **_GQA,
            "layers_block_type": ["attention", "attention", "mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    # Attention and a state-space model side by side in every block.
    "falcon_h1": Family("falcon_h1", {**_GQA, **_MAMBA, "mamba_d_ssm": 128}),
    "qwen3_next": Family(
        "qwen3_next",
        {
            **_GQA,
            **_LINEAR,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            **_ROUTED,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "minimax": Family("minimax", {**_GQA, **_LINEAR, **_EXPERTS, "block_size": 8}),
}
_MOE = {**_GQA, "num_experts": 8, **_ROUTED}
_DEEPSEEK = {"n_routed_experts": 8, **_ROUTED, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
# Mixtures of experts: few and many, and every kind of router, gate and shared experts.
MIXTURES = {
    "qwen3_moe": Family("qwen3_moe", {**_MOE, "norm_topk_prob": True}),
    "qwen3_moe-64": Family("qwen3_moe", {**_MOE, "num_experts": 64, "num_experts_per_tok": 4}),
    "qwen3_moe-128": Family("qwen3_moe", {**_MOE, "num_experts": 128, "num_experts_per_tok": 8}),
    "qwen2_moe": Family("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 32}),
    "olmoe": Family("olmoe", {**_MOE, "intermediate_size": 32}),
    "phimoe": Family("phimoe", {**_GQA, **_EXPERTS}),
    "granitemoe": Family("granitemoe", {**_GQA, **_EXPERTS}),
    "glm4_moe": Family("glm4_moe", {**_GQA, **_DEEPSEEK}),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "num_key_value_heads": HEADS,
            "kv_lora_rank": 24,
            "q_lora_rank": 40,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "ernie4_5_moe": Family("ernie4_5_moe", {**_GQA, **_ROUTED, "moe_num_experts": 8, "moe_k": 2}),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", {**_GQA, "num_experts": 8, "moe_topk": 2}),
    "cohere2_moe": Family("cohere2_moe", {**_MOE, **_WINDOW}),
    "exaone_moe": Family("exaone_moe", {**_MOE, **_WINDOW}),
    "afmoe": Family("afmoe", {**_MOE, **_WINDOW, "num_dense_layers": 1}),
    "minimax_m2": Family("minimax_m2", {**_GQA, **_EXPERTS, "rotary_dim": 8}),
    "lfm2_moe": Family(
        "lfm2_moe",
        {**_MOE, "layer_types": [*_FULL, "conv", "full_attention"], "num_dense_layers": 1},
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            **_GQA,
            **_MAMBA,
            **_EXPERTS,
            "layer_types": ["attention", "attention", "mamba", "attention"],
            "shared_intermediate_size": 32,
        },
    ),
    "gemma4-experts": Family(
        "gemma4_text",
        {
            **_GQA,
            **_WINDOW,
            "layer_types": _ALTERNATING,
            "global_head_dim": 2 * HEAD_SIZE,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
}


@dataclass(frozen=True)
class Calibrated:
    """A model as the tool loads it, with its moments and probe on random text."""

    model: torch.nn.Module
    moments: Moments
    probe: Probe

    def plan(self, blocks: Sequence[Block], fit_input: FitInput = "normed") -> Plan:
        """The plan of exactly ``blocks``, of those that the model has."""
        fits = {i: fit_lmmse(self.moments.layers[i], fit_input) for i in blocks if i in self.moments.layers}
        maps = {i: LinearLayer(f.w.astype(np.float32), f.b.astype(np.float32)) for i, f in fits.items()}
        empty = Plan(
            model="of a test",
            hidden_size=hidden_size(self.model),
            layer_count=layer_count(self.model),
            fit_input=fit_input,
            criterion="by hand",
            ridge=1e-6,
            calibration_tokens=next(iter(self.moments.layers.values())).n,
            layers={},
            probe=dict(self.probe.inputs),
            probe_u=self.probe.x if fit_input == "normed" else self.probe.h,
            probe_y=self.probe.y,
            probe_routes=self.probe.routes,
        )
        return empty.with_replaced(maps)


def attention_share(case: Calibrated) -> tuple[float, float]:
    """How far a model moves without its attention, and with layer 0 fitted: ‖Δlogits‖ / ‖logits‖ on random text."""
    model = case.model
    ids = torch.from_numpy(np.random.default_rng(3).integers(3, VOCAB - 10, (1, 20)))
    zero = LinearLayer(np.zeros((WIDTH, WIDTH), np.float32), np.zeros(WIDTH, np.float32))
    plan = case.plan((0,))
    without = replace(plan, layers={layer.index: zero for layer in attention_layers(model)})
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        found = []
        for changed in (without, plan):
            with linearized(model, changed):
                found.append(float((model(input_ids=ids).logits - whole).norm() / whole.norm()))
    return found[0], found[1]


def calibrated(folder: Path) -> Calibrated:
    """Run the model in ``folder`` over random text."""
    model = load(folder)
    vocab = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(3, vocab, (64, 32), dtype=np.int32)
    return Calibrated(
        model, collect_moments(model, tokens, parts=(*PARTS, SPAN)), probe_model(model, tokens, PARTS)
    )


# converting -----------------------------------------------------------------------------------


@pytest.fixture
def no_tokenizer() -> Fields:
    """The fields of a file whose readers have token ids alone."""
    from gguf import GGUFValueType

    return [("tokenizer.ggml.model", "none", GGUFValueType.STRING, None)]


@pytest.fixture
def random_plan() -> Callable[[Any, Sequence[Block]], Plan]:
    """A plan with random W and b, large enough to matter, for these blocks of a model."""

    def made(model: Any, blocks: Sequence[Block]) -> Plan:
        d, generator = hidden_size(model), np.random.default_rng(5)

        def linear() -> LinearLayer:
            w = generator.normal(size=(d, d)) / np.sqrt(d)
            return LinearLayer(w.astype(np.float32), generator.normal(size=d).astype(np.float32))

        empty = Plan(
            model="of a test",
            hidden_size=d,
            layer_count=layer_count(model),
            fit_input="normed",
            criterion="by hand",
            ridge=1e-6,
            calibration_tokens=1,
            layers={},
            probe={},
            probe_u={},
            probe_y={i: np.zeros((0, d), np.float32) for i in range(layer_count(model))},
        )
        return empty.with_replaced({block: linear() for block in blocks})

    return made


def needs(to: str) -> pytest.MarkDecorator:
    """Skips a test where the engine of a form is not."""
    form = FORMS[to]
    return pytest.mark.skipif(not form.is_here(), reason=f"needs {form.engine}: {part(form.package).pip}")


def assert_as_in_pytorch(open_stream: Callable[[], Any], model: Any, plan: Plan) -> None:
    """The stream computes what PyTorch does with ``plan``, and keeps keys and values of the attention layers alone."""
    found = stream_parity(open_stream(), model, plan)
    assert found.failures() == [] and all(step.kv_max_rel > 0 for step in found.steps)
    stream = open_stream()
    stream.prefill(ragged_rows([5], model.config.vocab_size))
    assert stream.kv_layers == plan.attention_layers and len(stream.cache()[0]) == len(plan.attention_layers)


def stream_parity(stream: Any, model: Any, plan: Plan | None, steps: int = 4) -> Parity:
    rows = ragged_rows([40, 9, 23], model.config.vocab_size)
    return compare(
        record_pytorch(model, plan, Text(rows, steps)), recorded(stream, rows, steps), gates_for("float32")
    )


# What a file may have that it must not, by what is wrong with layer 2.
WRONG: dict[str, Callable[[Plan], LinearLayer]] = {
    "scaled W": lambda plan: LinearLayer(plan.layers[2].w * np.float32(1.01), plan.layers[2].b),
    "no bias": lambda plan: LinearLayer(plan.layers[2].w, np.zeros_like(plan.layers[2].b)),
    "another layer": lambda plan: plan.layers[0],
}


def wrongly(change: str, plan: Plan) -> Plan:
    """``plan`` with what is wrong in it."""
    return replace(plan, layers={**plan.layers, 2: WRONG[change](plan)})
