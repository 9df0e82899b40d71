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
    "models/test_attention.py::test_the_temperature_follows_each_rows_positions": ("concat",),
}


def leave_out(items: Iterable[pytest.Item]) -> None:
    """Skip the variants that are not in the usual run."""
    for item in items:
        test, _, variant = item.nodeid.removeprefix("tests/").partition("[")
        if test in USUAL and variant.removesuffix("]") not in USUAL[test]:
            item.add_marker(exhaustive)
