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
    "models/test_attention.py::test_the_temperature_follows_each_rows_positions": ("concat",),
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
}


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Skip the variants that are not in the usual run."""
    for item in items:
        test, _, variant = item.nodeid.removeprefix("tests/").partition("[")
        if test in USUAL and variant.removesuffix("]") not in USUAL[test]:
            item.add_marker(exhaustive)
