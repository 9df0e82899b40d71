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
    "cli/test_main.py::test_an_interrupted_export_can_be_repeated": ("0.5",),
    "cli/test_main.py::test_bad_usage_and_bad_input_exit_2": (
        "unknown model",
        "unknown path",
        "folder without a model",
        "file that is no GGUF",
        "negative K",
        "K is no number",
        "K and a budget",
        "unknown fit",
        "unknown option",
        "ridge is nan",
        "encoder-decoder",
        "pickled weights",
        "output is a file",
        "output of another model",
        "verify on a foreign folder",
        "inspect something else",
    ),
    "cli/test_main.py::test_unusable_text_exits_2": ("empty.txt--words0", "binary.txt-content2-words2"),
    "export/test_embeds.py::test_a_decoder_of_embeddings_is_the_model": (
        "gemma3-concat-layers0",
        "qwen2.5-vl-static-layers2",
    ),
    "export/test_grouped.py::test_windows_are_found_by_what_the_masks_are": ("gemma3-text",),
    "export/test_ranges.py::test_a_cache_beyond_float16_is_refused_by_its_layer": ("static-value",),
    "export/test_lm_head.py::test_other_heads": ("gemma2",),
    "export/test_functions.py::test_a_short_row_has_the_frequencies_of_the_longest": ("phi3-static",),
    "export/test_functions.py::test_both_ways_are_in_the_graph": ("phi3-none",),
    "export/test_stand_ins.py::test_every_kind_of_weight": ("phi3-shared",),
    "generate/test_reader.py::test_a_text_that_grows_is_read_once": ("ours-concat", "whole"),
    "graph/test_external_data.py::test_six_gigabytes_take_little_memory": ("kernel",),
    "models/test_attention.py::test_the_temperature_follows_each_rows_positions": ("concat",),
    "rewrite/test_prove_rounding.py::test_another_fine_tune_is_refused": (
        "fp16-",
        "fp16-mlp",
        "bf16-self_attn",
        "int8-",
        "int8-mlp",
        "int4-self_attn",
        "int4-qdq-mlp",
    ),
    "rewrite/test_prove_rounding.py::test_the_stream_of_the_next_layer_is_not_this_ones": (
        "-1-fp32",
        "1-fp16",
        "-1-bf16",
        "1-int8",
        "-1-int4",
        "1-int4-qdq",
    ),
    "rewrite/test_replace_half.py::test_a_graph_of_other_weights_is_refused": (
        "self_attn.o_proj-(1, 2)-fp16-concat",
        "self_attn.o_proj-(1, 2)-bf16-static",
        "mlp.down_proj-(2,)-fp16-static",
        "mlp.down_proj-(2,)-bf16-concat",
    ),
    "rewrite/test_replace_half.py::test_maps_are_stored_in_the_graphs_precision": (
        "normed-fp16-concat",
        "normed-bf16-static",
        "residual-fp16-static",
        "residual-bf16-concat",
    ),
    "rewrite/test_replace_half.py::test_parity": (
        "(0,)-static-fp32",
        "(1, 2)-concat-fp16",
        "(0, 1, 2, 3, 4)-static-bf16",
        "(1, 2)-static-fp16",
        "(0,)-concat-bf16",
    ),
    "rewrite/test_replace_half.py::test_wrong_activations_are_refused": (
        "probe_u-fp16-static",
        "probe_y-fp16-concat",
        "probe_u-bf16-concat",
        "probe_y-bf16-static",
    ),
    "rewrite/test_routing.py::test_a_router_that_prefers_other_experts_is_refused": ("fp16",),
    "rewrite/test_routing.py::test_a_scaled_w_and_a_dropped_bias_are_refused": ("fp16",),
    "rewrite/test_routing.py::test_another_fine_tune_is_refused": (
        "fp16-",
        "fp16-experts",
        "bf16-self_attn",
        "bf16-mlp.gate.",
    ),
    "rewrite/test_routing.py::test_the_activations_of_a_neighbouring_layer_are_refused": ("bf16",),
    "rewrite/test_routing.py::test_tokens_that_rounding_sends_elsewhere_are_told_where_to_go": ("fp16",),
    "runtime/test_openvino.py::test_every_kind_of_attention": ("gemma2", "gpt_oss", "falcon-alibi"),
    "runtime/test_tensorrt.py::test_an_engine_computes_what_pytorch_does_batch_after_batch": (
        "concat-fp32-()",
        "concat-fp16-(0, 3)",
        "concat-bf16-(0, 1, 2, 3, 4)",
        "static-fp32-(0, 3)",
        "static-fp16-(0, 1, 2, 3, 4)",
        "static-bf16-()",
    ),
    "scripts/test_crash.py::test_the_short_run": ("nothing",),
    "scripts/test_regenerate_graphs.py::test_reference_graphs_are_up_to_date": (
        "genai-int4-llama",
        "optimum-phi",
        "torch-phi3",
    ),
    "stages/select/test_speeds.py::test_graphs_that_do_not_fit_together_are_timed_in_turns_or_not_at_all": (
        "1.5-True",
        "0.5-None",
    ),
    "stages/test_bench_candidates.py::test_forms_take_part_each_with_its_own_base": (
        "llama.cpp-gguf-precisions0-called0",
    ),
    "stages/test_convert.py::test_a_folder_for_openvino_is_proven_with_its_cache_and_its_tokens": ("fp16",),
    "stages/test_convert.py::test_another_precision_is_beside_it": ("q4_k_m",),
    "stages/test_package.py::test_encoders": ("bert",),
    "verify/parity/test_media.py::test_right_and_wrong": ("qwen2.5-vl-static",),
    "verify/parity/test_unmodified.py::test_a_fault_in_a_layer_that_stays_is_refused": (
        "fp16-0-keys and values swapped",
        "fp16-2-KV pairs swapped",
        "bf16-0-KV pairs swapped",
        "bf16-2-one rotary table off",
        "int8-0-a retained attention \\xd7 1.1",
        "int8-2-one rotary table off",
        "int4-2-keys and values swapped",
        "int4-0-a retained attention \\xd7 1.1",
    ),
    "verify/parity/test_unmodified.py::test_a_layer_at_the_wrong_place_is_refused": (
        "fp16-1-layer left out",
        "fp16-3-the u of the layer before",
        "bf16-1-layer added twice",
        "bf16-3-layer left out",
        "int8-1-the u of the layer before",
        "int8-3-layer added twice",
        "int4-1-layer left out",
        "int4-3-the u of the layer before",
    ),
    "verify/parity/test_unmodified.py::test_a_right_graph_is_the_unmodified_one_to_rounding": (
        "fp16",
        "int4",
    ),
    "verify/parity/test_unmodified.py::test_verify_says_so": ("fp16", "int4"),
    "verify/speed/test_savings.py::test_savings_are_those_of_the_rewritten_graph": ("mixtral",),
    "verify/speed/test_savings.py::test_so_it_is_in_foreign_graphs": ("genai-fp32",),
    "verify/test_crossing.py::test_a_graph_that_has_it_passes": ("gemma3-concat", "phi3-static"),
    "verify/test_crossing.py::test_a_graph_without_it_is_refused_and_short_text_would_not_see_it": ("phi3",),
    "verify/test_crossing.py::test_decoding_across_alone_sees_it_too": ("ministral3", "phi3"),
    "verify/test_crossing_encoders.py::test_a_graph_that_has_it_passes": ("modernbert",),
    "verify/test_crossing_encoders.py::test_a_graph_without_it_is_refused_and_short_text_would_not_see_it": (
        "deberta",
    ),
    "verify/test_engines.py::test_speed_of_everyone_at_the_contexts_that_the_engines_hold": ("prefill",),
}


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Skip the variants that are not in the usual run."""
    for item in items:
        test, _, variant = item.nodeid.removeprefix("tests/").partition("[")
        if test in USUAL and variant.removesuffix("]") not in USUAL[test]:
            item.add_marker(exhaustive)
