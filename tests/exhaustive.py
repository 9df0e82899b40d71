"""What the usual run leaves out for its time: variants that take minutes and seldom say something new.

With ``NBL_EXPORT_ALL_TESTS=1`` all are run. Of a test in :data:`USUAL` the usual run has these variants.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import pytest

_ALL = "NBL_EXPORT_ALL_TESTS"
ALL = _ALL in os.environ

exhaustive = pytest.mark.skipif(not ALL, reason=f"only with {_ALL}=1")

# Each form of a cache, each kind of model and each exporter is there at least once.
USUAL: Mapping[str, tuple[str, ...]] = {
    "clients/test_genai.py::test_genai_generates_from_its_own_folder_rewritten": (
        "fp32-to a new folder-one",
        "int4-in place-half",
    ),
    "clients/test_genai.py::test_genai_generates_what_our_decoder_does": (
        "fp32-concat",
        "fp16-shared",
    ),
    "clients/test_genai.py::test_states_beside_the_cache_are_carried_from_token_to_token": (
        "lfm2",
        "bamba",
    ),
    "clients/test_optimum.py::test_optimum_generates_what_our_decoder_does": (
        "one-llama-gqa",
        "half-parallel-residual",
    ),
    "end_to_end/test_heads.py::test_a_row_has_the_result_of_its_text_wherever_it_is_padded": (
        "reward",
        "state",
        "embedding",
    ),
    "end_to_end/test_hybrid.py::test_a_graph_goes_on_through_chunks_and_beyond": (
        "lfm2",
        "bamba",
        "qwen3_next",
    ),
    "end_to_end/test_matrix.py::test_a_trained_model": (
        "ours-concat-one",
        "dynamo-18-sdpa-half",
        "optimum-all",
        "optimum+slim-one",
    ),
    "end_to_end/test_matrix.py::test_float32": (
        "ours-concat-llama-gqa-half",
        "ours-static-llama-gqa-one",
        "dynamo-18-eager-parallel-fused-half",
        "dynamo-18-sdpa-llama-gqa-one",
        "dynamo-18-sdpa-fused-qkv-half",
        "dynamo-18-sdpa-parallel-residual-half-residual",
        "dynamo-23-eager-mha-biases-half",
        "dynamo-23-sdpa-llama-gqa-all",
        "genai-fp32-llama-gqa-half",
        "genai-fp32-llama-gqa-half-residual",
        "genai-fp32-fused-qkv-half",
        "genai-fp32-parallel-residual-all",
        "optimum-llama-gqa-one",
        "optimum-mha-biases-half",
        "optimum-fused-qkv-half",
        "optimum-fused-qkv-half-residual",
        "optimum-parallel-residual-all",
        "optimum-parallel-fused-half",
        "optimum-sequential-biases-half",
        "optimum-whole-llama-gqa-half",
    ),
    "end_to_end/test_moved.py::test_a_folder_that_went_away_is_not_made_anew": (
        "calibrate-moved",
        "select-deleted",
        "export in halves-moved",
        "eval-deleted",
    ),
    "end_to_end/test_multimodal_graphs.py::test_graph": (
        "gemma3-concat",
        "gemma3n-concat",
        "qwen3-vl-concat",
        "phi4-multimodal-concat",
        "qwen2.5-vl-static",
        "llama4-static",
    ),
    "end_to_end/test_shared_keys.py::test_a_layer_that_borrows_is_linearized_alone": (
        "gemma3n_text-concat",
        "gemma4_text-static",
    ),
    "end_to_end/test_smollm2.py::test_graphs_of_other_operators": ("genai-int4-concat",),
    "evaluate/test_harness.py::test_a_task_of_the_hub_is_asked_as_its_rows_in_a_file_are": (
        "winogrande",
        "lambada_openai",
    ),
    "export/test_embeds.py::test_a_decoder_of_embeddings_is_the_model": (
        "gemma3-concat-layers0",
        "qwen2.5-vl-static-layers2",
        "llava-shared-layers3",
        "gemma4-static-layers6",
        "gpt_neox-concat-layers7",
    ),
    "export/test_grouped.py::test_windows_are_found_by_what_the_masks_are": ("gemma3-text-expected2",),
    "export/test_half.py::test_a_cache_beyond_float16_is_refused_by_its_layer": ("static-value",),
    "export/test_half.py::test_a_cache_that_float16_just_holds_is_finite": ("key",),
    "export/test_lengths.py::test_doge_that_keeps_all_keys_is_served": ("static",),
    "export/test_lm_head.py::test_half_graphs_too": ("fp16",),
    "export/test_lm_head.py::test_other_heads": ("gemma2",),
    "export/test_on_copy.py::test_a_form_without_it_is_refused_before_any_work": (
        "mistral",
        "llama4",
    ),
    "export/test_on_copy.py::test_a_right_form_is_crossed_and_says_with_what": (
        "mistral-none",
        "gemma3-static",
        "ministral3-concat",
        "phi3-static",
    ),
    "export/test_ropes.py::test_a_short_row_has_the_frequencies_of_the_longest": ("phi3-static",),
    "export/test_ropes.py::test_both_ways_are_in_the_graph": (
        "phi3-none",
        "dynamic-static",
    ),
    "export/test_ropes.py::test_decoding_across_it_is_transformers_own": (
        "phi3-static",
        "dynamic-concat",
    ),
    "graph/test_external_data.py::test_six_gigabytes_take_little_memory": ("kernel",),
    "models/test_row_positions.py::test_300_tokens_are_decoded_across_it": ("static",),
    "models/test_row_positions.py::test_the_temperature_follows_each_rows_positions": (
        "concat",
        "static",
    ),
    "rewrite/test_replace_half.py::test_parity": (
        "(0,)-static-fp32",
        "(1, 2)-concat-fp16",
        "(0, 1, 2, 3, 4)-static-bf16",
        "(1, 2)-static-fp16",
        "(0,)-concat-bf16",
    ),
    "scripts/test_regenerate_graphs.py::test_reference_graphs_are_up_to_date": (
        "torch-shared-llama",
        "torch-static-llama",
        "genai-int4-llama",
        "optimum-llama",
        "torch-biases",
        "torch-phi3",
        "genai-phi",
        "optimum-phi",
    ),
}


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Skip the variants that are not in the usual run."""
    for item in items:
        test, _, variant = item.nodeid.removeprefix("tests/").partition("[")
        if test in USUAL and variant.removesuffix("]") not in USUAL[test]:
            item.add_marker(exhaustive)
