"""Classes of linearized models for transformers' Auto classes: what `import nbl_export.transformers` registers."""

from __future__ import annotations

from functools import cache
from typing import Any

from nbl_export.models.modeling_nbl import Linearized

# Model types of transformers whose attention and MLP are modules by these names, which read the states and keep their
# keys and values under their number. tests/convert/test_hf.py runs each.
TYPES = ("gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")
ATTENTION, MLP = "self_attn", "mlp"
PREFIX = "nbl_"


@cache
def classes_of(model_type: str) -> tuple[Any, Any]:
    """The classes of the configuration and of the model that is like one of ``model_type`` with linear layers."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    plain = CONFIG_MAPPING[model_type]
    model = MODEL_FOR_CAUSAL_LM_MAPPING[plain]
    config = type("NblConfig", (plain,), {"model_type": PREFIX + model_type, "__module__": __name__})
    members = {
        "config_class": config,
        "source": classmethod(lambda _cls: source_of(model_type)),
        "__module__": __name__,
    }
    return config, type("NblForCausalLM", (Linearized, model), members)


def source_of(model_type: str) -> str:
    """The text of ``modeling_nbl.py`` in a folder: classes of the same names, as code of its own."""
    config, model = classes_of(model_type)
    plain, base = config.__mro__[1].__name__, model.__mro__[2].__name__
    return f'''{Linearized.source()}

from transformers import {plain}, {base}  # noqa: E402


class NblConfig({plain}):
    model_type = "{PREFIX}{model_type}"


class NblForCausalLM(Linearized, {base}):
    config_class = NblConfig
'''


def register() -> None:
    """Make transformers' Auto classes know the linearized models of every one of :data:`TYPES` that it has."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    for model_type in TYPES:
        if model_type in CONFIG_MAPPING:
            config, model = classes_of(model_type)
            AutoConfig.register(config.model_type, config, exist_ok=True)
            AutoModelForCausalLM.register(config, model, exist_ok=True)
