"""The table of families: every row is of models that transformers has, and its paths lead to modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from nbl_export.datafile import read_table
from nbl_export.models import layers
from nbl_export.models.layers import Family
from tests.conftest import ROOT

TABLE = read_table(ROOT / "nbl_export" / "models" / "families.toml")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def family_of_type(model_type: str) -> Family:
    text = type("Config", (), {"model_type": model_type})
    return layers.family_of(type("Model", (), {"config": type("Whole", (), {"get_text_config": text})()})())  # type: ignore[arg-type]


def test_a_family_without_a_row_is_built_the_common_way() -> None:
    for model_type in ("llama", "of-nobody", ""):
        assert family_of_type(model_type) == Family()


def test_every_row_is_read_whole() -> None:
    for row in TABLE.values():
        for model_type in row["models"]:
            found = family_of_type(model_type)
            assert {n: getattr(found, n) for n in row if n != "models"} == {
                n: v for n, v in row.items() if n != "models"
            }
            assert found.models == tuple(row["models"])


def test_a_model_type_is_of_one_row_and_known_to_transformers() -> None:
    names = [name for row in TABLE.values() for name in row["models"]]
    assert len(names) == len(set(names))
    assert not set(names) - set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "bloom", "mpnet"])
def test_paths_lead_from_a_block_to_modules(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **SIZES, n_layer=2, n_head=4)
    model: Any = AutoModel.from_config(config)
    block = model.h[0] if model_type == "bloom" else model.encoder.layer[0]
    family = family_of_type(model_type)
    attention = block.get_submodule(family.attention or "self_attention")
    assert any("query" in name or name == "q" for name, _ in attention.named_children())
    if family.output:
        # What writes y maps to the stream's width.
        assert tuple(block.get_submodule(family.output).weight.shape) == (16, 16)


def test_an_unknown_field_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in the table is found at once, not by a model that is served wrongly."""
    (tmp_path / "families.toml").write_text('[x]\nmodels = ["x"]\natention = "self"\n')
    monkeypatch.setattr(layers, "__file__", str(tmp_path / "layers.py"))
    layers._families.cache_clear()
    try:
        with pytest.raises(TypeError, match="atention"):
            family_of_type("x")
    finally:
        monkeypatch.undo()
        layers._families.cache_clear()
    assert family_of_type("bert").attention == "attention.self"
