"""The classes of linearized models; tests/convert/test_hf.py loads models by them."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from nbl_export.models.modeling_nbl import Linearized
from nbl_export.models.registered import PREFIX, TYPES, classes_of, register, source_of


@pytest.mark.parametrize("model_type", TYPES)
def test_the_classes_are_those_of_the_type_with_linear_layers(model_type: str) -> None:
    config, model = classes_of(model_type)
    plain = CONFIG_MAPPING[model_type]
    assert issubclass(config, plain) and config.model_type == PREFIX + model_type
    assert issubclass(model, Linearized) and model.config_class is config
    text = source_of(model_type)
    assert f"from transformers import {plain.__name__}, {model.__mro__[2].__name__}" in text
    compile(text, "modeling_nbl.py", "exec")
    assert model.source() == text


def test_they_are_registered_again_without_an_error() -> None:
    register()
    register()
    assert isinstance(AutoConfig.for_model("nbl_llama"), classes_of("llama")[0])
