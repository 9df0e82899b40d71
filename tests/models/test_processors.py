"""Whether a folder has what makes a model's inputs, and that a tokenizer of no files is none that is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbl_export.errors import InputError
from nbl_export.models import load
from nbl_export.models.processors import PREPROCESSOR, check_processor, load_image_processor
from nbl_export.models.source import find_model
from tests.encoders import build, vision_encoder
from tests.models.spoiled import one_sentence


def test_a_folder_with_a_vocabulary_is_not_looked_at_further(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.models.processors.load_tokenizer", lambda _: pytest.fail("it was loaded"))
    check_processor(find_model(str(folder)))


def test_a_folder_without_a_vocabulary_has_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    source = find_model(str(folder))
    with pytest.raises(InputError) as caught:
        check_processor(source)
    assert one_sentence(caught) == (
        f"{folder} has no tokenizer: put the tokenizer.json, or the tokenizer.model, of the model into {folder}."
    )
    with pytest.raises(InputError, match="has no tokenizer"):
        load.load_tokenizer(source)


def test_a_tokenizer_of_characters_needs_no_file(tmp_path: Path) -> None:
    """CANINE's has the code points of Unicode: nothing of it is in the folder."""
    folder = build(
        tmp_path / "m",
        "canine",
        "CanineModel",
        max_position_embeddings=64,
        num_hash_buckets=64,
        upsampling_kernel_size=4,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))
    source = find_model(str(folder))
    check_processor(source)
    assert load.load_tokenizer(source)("ab")["input_ids"][1:3] == [ord("a"), ord("b")]


def test_an_image_processor_that_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs pillow: pip install 'nbl-export[vision]'")
    folder = vision_encoder(tmp_path / "vit")
    source = find_model(str(folder))
    check_processor(source)
    assert load_image_processor(source).size["height"] == 32
    (folder / PREPROCESSOR).unlink()
    for refused in (check_processor, load_image_processor):
        with pytest.raises(InputError, match=r"has no preprocessor_config\.json, which says how its images"):
            refused(source)
