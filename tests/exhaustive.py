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
        "fp32-in place-half",
        "int4-to a new folder-half",
        "int4-in place-one",
    ),
    "end_to_end/test_matrix.py::test_a_trained_model": (
        "ours-concat-one",
        "ours-concat-half",
        "dynamo-18-sdpa-half",
        "optimum-all",
        "optimum+ort-half",
        "optimum+slim-one",
    ),
    "end_to_end/test_moved.py::test_a_folder_that_went_away_is_not_made_anew": (
        "calibrate-moved",
        "select-deleted",
        "export-moved",
        "export in halves-deleted",
        "verify-moved",
        "eval-deleted",
        "bench-moved",
    ),
    "evaluate/test_harness.py::test_a_task_of_the_hub_is_asked_as_its_rows_in_a_file_are": (
        "winogrande",
        "lambada_openai",
    ),
    "export/test_embeds.py::test_a_decoder_of_embeddings_is_the_model": (
        "gemma3-concat-layers0",
        "qwen2.5-vl-static-layers2",
        "llava-shared-layers3",
        "gemma3n-concat-layers5",
        "gemma4-static-layers6",
        "gpt_neox-concat-layers7",
    ),
    "export/test_grouped.py::test_windows_are_found_by_what_the_masks_are": (
        "qwen2-expected1",
        "gemma3-text-expected2",
    ),
    "export/test_half.py::test_a_cache_beyond_float16_is_refused_by_its_layer": (
        "static-value",
        "shared-key",
    ),
    "export/test_half.py::test_a_cache_that_float16_just_holds_is_finite": ("key",),
    "export/test_lengths.py::test_doge_that_keeps_all_keys_is_served": ("static", "none"),
    "export/test_lm_head.py::test_other_heads": ("gpt2", "gemma2"),
    "export/test_on_copy.py::test_a_form_without_it_is_refused_before_any_work": (
        "mistral",
        "phi3",
        "llama4",
    ),
    "export/test_ropes.py::test_both_ways_are_in_the_graph": ("phi3-none", "phimoe-static", "dynamic-concat"),
    "export/test_ropes.py::test_decoding_across_it_is_transformers_own": (
        "phi3-static",
        "phimoe-concat",
        "dynamic-static",
    ),
    "export/test_ropes.py::test_a_short_row_has_the_frequencies_of_the_longest": (
        "phi3-static",
        "dynamic-concat",
    ),
}


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Skip the variants that are not in the usual run."""
    for item in items:
        test, _, variant = item.nodeid.removeprefix("tests/").partition("[")
        if test in USUAL and variant.removesuffix("]") not in USUAL[test]:
            item.add_marker(exhaustive)
