"""What a configuration claims is what the built model has: for every family, and for a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.errors import InputError
from nbl_export.models.claims import Claims, claims_of
from nbl_export.models.layers import hidden_size, layer_count
from nbl_export.models.load import load_model, load_skeleton
from nbl_export.models.source import find_model
from tests import families, multimodal
from tests.encoders import text_encoder, vision_encoder
from tests.models.spoiled import edit_config
from tests.models.test_load import small_gguf

BUILDERS: dict[str, Callable[[Path], Path]] = {
    **{name: lambda path, n=name: families.build(n, path) for name in families.DECODERS},  # type: ignore[misc]
    **{name: lambda path, n=name: multimodal.build(n, path) for name in multimodal.WRAPPERS},  # type: ignore[misc]
    "a text encoder": text_encoder,
    "a vision encoder": vision_encoder,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_layers_and_width_are_those_of_the_model(tmp_path: Path, name: str) -> None:
    source = find_model(str(BUILDERS[name](tmp_path / "model")))
    model = load_skeleton(source)
    assert claims_of(source) == Claims(layer_count(model), hidden_size(model))


def test_a_gguf_file_says_it_in_its_header(tmp_path: Path) -> None:
    source = find_model(str(small_gguf(tmp_path / "m.gguf", 0)))
    model = load_model(source)
    assert claims_of(source) == Claims(layer_count(model), hidden_size(model)) == Claims(1, 32)


@pytest.mark.parametrize("value", [None, True, [4], {"a": 4}])
def test_what_is_no_number_is_not_claimed(folder: Path, value: object) -> None:
    """transformers may refuse it; what it takes is left to the model."""
    source = find_model(str(folder))
    edit_config(folder, num_hidden_layers=value)
    try:
        assert claims_of(source).layers is None
    except InputError as error:
        assert str(error).startswith("transformers cannot load")
