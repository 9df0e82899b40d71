"""Tiny random decoders of the families that exporters treat differently, one row of data each.

Their attention matters: freshly initialized, it moves a model too little to notice when it is wrong, so
weights are scaled up, and biases and norms, which start at zero and one, are drawn at random too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.moments import Moments
from nbl_export.calibrate.probe import Probe, probe_model
from nbl_export.linearize.lmmse import FitInput, fit_lmmse
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.layers import hidden_size, layer_count
from tests.fixtures_graph import load
from tests.tiny import save_tokenizer

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
    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.model_type, **{**_SIZES, **family.fields, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8 if "attn" in path or "attention" in path else 4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(target)
    save_tokenizer(target)
    return target


@dataclass(frozen=True)
class Calibrated:
    """A model as the tool loads it, with its moments and probe on random text."""

    model: torch.nn.Module
    moments: Moments
    probe: Probe

    def plan(self, layers: Sequence[int], fit_input: FitInput = "normed") -> Plan:
        """The plan of exactly ``layers``."""
        fits = {i: fit_lmmse(self.moments.layers[i], fit_input) for i in layers}
        return Plan(
            model="of a test",
            hidden_size=hidden_size(self.model),
            layer_count=layer_count(self.model),
            fit_input=fit_input,
            criterion="by hand",
            ridge=1e-6,
            calibration_tokens=next(iter(self.moments.layers.values())).n,
            layers={i: LinearLayer(f.w.astype(np.float32), f.b.astype(np.float32)) for i, f in fits.items()},
            probe={n: getattr(self.probe, n) for n in ("input_ids", "attention_mask", "position_ids")},
            probe_u=self.probe.x if fit_input == "normed" else self.probe.h,
            probe_y=self.probe.y,
        )


def calibrated(folder: Path) -> Calibrated:
    """Run the model in ``folder`` over random text."""
    model = load(folder)
    vocab = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(3, vocab, (64, 32), dtype=np.int32)
    return Calibrated(model, collect_moments(model, tokens, "of a test"), probe_model(model, tokens))
