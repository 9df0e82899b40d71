"""Names that every package uses: of a graph's inputs and dimensions, and of the two graphs that are compared."""

from __future__ import annotations

# The graph of the unmodified model, and the rewritten one.
BASE, LINEARIZED = "base", "linearized"
# Inputs of a graph.
TOKENS, EMBEDDINGS, MASK, POSITIONS = "input_ids", "inputs_embeds", "attention_mask", "position_ids"
TOKEN_TYPES, PIXELS = "token_type_ids", "pixel_values"
PER_LAYER = (
    "per_layer_inputs"  # embeddings of each layer, beside inputs_embeds, as onnxruntime-genai calls them
)
WRITE_INDICES = "write_indices"  # the input that only a static cache has
# For how many last positions logits are computed, and the value that means all of them.
NUM_LOGITS_TO_KEEP = "num_logits_to_keep"
ALL_LOGITS = 0
# Symbolic dimensions of a decoder graph. MAX is the length of a static cache.
BATCH, SEQUENCE, PAST, TOTAL, MAX = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "max_sequence_length",
)
SIDES = ("key", "value")  # of a KV pair


def past_name(index: int, side: str) -> str:
    """The input of a KV pair's past keys or values."""
    return f"past_key_values.{index}.{side}"


def present_name(index: int, side: str) -> str:
    """The output of a KV pair's present keys or values."""
    return f"present.{index}.{side}"


def past_state_name(layer: int, kind: str) -> str:
    """The input of a state that a layer without softmax attention keeps, named as onnxruntime-genai does."""
    return f"past.{layer}.{kind}"


def present_state_name(layer: int, kind: str) -> str:
    """The output of such a state after the last token."""
    return f"present.{layer}.{kind}"
