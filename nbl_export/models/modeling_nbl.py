"""A model of transformers with linear layers in the place of attentions and MLPs (Neural Block Linearization).

This file lies in the folder of a model that `nbl-export convert --to hf` has written, with the classes of that model at
its end, and needs torch and transformers alone. In nbl-export it is a module of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FILE = "modeling_nbl.py"


class LinearBlock(torch.nn.Module):
    """W u + b in the place of an attention or an MLP, or zeros in the place of one that was left out.

    ``returns`` is the length of the tuple that the original returns, None for a bare tensor. It keeps no cache.
    """

    def __init__(self, width: int, linear: bool, returns: int | None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width) if linear else None
        self.returns = returns

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        y = torch.zeros_like(hidden_states) if self.linear is None else self.linear(hidden_states)
        return y if self.returns is None else (y, *[None] * (self.returns - 1))


class Linearized:
    """Goes before the class of a causal language model, whose ``config.nbl`` says what becomes of which module.

    ``config.nbl`` has ``modules``, by dotted path ``linear`` and ``returns`` of :class:`LinearBlock`, and the name of
    an ``attention`` in its layer. The attentions that are left are numbered one after the other, so that a KV cache has
    them alone, and its first entry is one of them.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        for path, place in config.nbl["modules"].items():
            parent, _, name = path.rpartition(".")
            block = LinearBlock(config.hidden_size, place["linear"], place["returns"])
            setattr(model.get_submodule(parent), name, block)
        kept = (
            module
            for path, module in model.named_modules()
            if path.rpartition(".")[2] == config.nbl["attention"] and not isinstance(module, LinearBlock)
        )
        for number, module in enumerate(kept):
            module.layer_idx = number

    @classmethod
    def source(cls) -> str:
        """The text of this file with the classes of the model at its end."""
        return Path(__file__).read_text(encoding="utf-8")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any model, with this file."""
        found = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / FILE).write_text(self.source(), encoding="utf-8")
        return found


# in nbl-export only -------------------------------------------------------------------------------

# Model types of transformers whose attention and MLP are modules by these names, which read the states and keep their
# keys and values under their number. tests/convert/test_hf.py runs each.
TYPES = ("gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")
ATTENTION, MLP = "self_attn", "mlp"
PREFIX = "nbl_"


def classes_of(model_type: str) -> tuple[Any, Any]:
    """The classes of the configuration and of the model that is like one of ``model_type`` with linear layers."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    plain = CONFIG_MAPPING[model_type]
    model = MODEL_FOR_CAUSAL_LM_MAPPING[plain]
    config = type("NblConfig", (plain,), {"model_type": PREFIX + model_type, "__module__": __name__})
    shipped = Linearized.source().partition("# in nbl-export only")[0]
    text = f'''{shipped}from transformers import {plain.__name__}, {model.__name__}  # noqa: E402


class NblConfig({plain.__name__}):
    model_type = "{PREFIX}{model_type}"


class NblForCausalLM(Linearized, {model.__name__}):
    config_class = NblConfig
'''
    members = {"config_class": config, "source": classmethod(lambda _cls: text), "__module__": __name__}
    return config, type("NblForCausalLM", (Linearized, model), members)


def register() -> None:
    """Make transformers' Auto classes know the linearized models of every one of :data:`TYPES` that it has."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    for model_type in TYPES:
        if model_type in CONFIG_MAPPING and PREFIX + model_type not in CONFIG_MAPPING:
            config, model = classes_of(model_type)
            AutoConfig.register(config.model_type, config)
            AutoModelForCausalLM.register(config, model)
