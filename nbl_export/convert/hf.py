"""Write model + plan as a folder that transformers loads: the checkpoint with linear layers, and their classes.

Its model type is ``nbl_`` and that of the original, so that no reader takes it for the original. It loads with
``trust_remote_code``, or without it after ``import nbl_export.transformers``. The attentions that are linear have no
entry in the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Block, Mlp
from nbl_export.convert.llama import numbers, write_folder
from nbl_export.errors import InputError
from nbl_export.linearize.plan import DROPPED, Plan
from nbl_export.models.candidates import blocks_of
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.modeling_nbl import ATTENTION, FILE, MLP, PREFIX, TYPES, classes_of
from nbl_export.progress import Listener


def write_hf(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """Write ``model`` with ``plan`` into ``folder``, in a ``dtype`` of torch such as ``float16``.

    Returns the files. Raises :class:`InputError`, before anything is written, for a model or a plan that such a folder
    cannot hold.
    """
    check_held(model, plan)
    told, paths = configuration(model, plan, dtype), _paths(model)
    gone = tuple(f"{path}." for path in told["nbl"]["modules"])
    names = [name for name, _ in model.named_parameters() if not name.startswith(gone)]
    tensors: dict[str, Callable[[], F32]] = {name: partial(numbers, model, plan, name) for name in names}
    for block, linear in plan.layers.items():
        for end, side in (("weight", "w"), ("bias", "b")):
            tensors[f"{paths[block]}.linear.{end}"] = partial(getattr, linear, side)
    own: Any = model
    generation = getattr(own, "generation_config", None)
    texts = {} if generation is None else {"generation_config.json": generation.to_json_string()}
    texts[FILE] = classes_of(own.config.model_type)[1].source()
    return write_folder(folder, tensors, dtype, "pt", tokenizer, texts, told, listener)


def check_held(model: torch.nn.Module, plan: Plan) -> None:
    """Raise :class:`InputError` for a model, or a plan, that such a folder cannot hold."""
    config: Any = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    if config.model_type not in TYPES:
        raise InputError(f"--to hf takes {', '.join(TYPES)}, and {name} is none of them.")
    if plan.fit_input != "normed":
        raise InputError(
            "--to hf multiplies W with what an attention reads, and this plan's W reads the residual stream: select "
            "again without --fit-input residual."
        )
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise InputError(
            f"The layers of {name} attend in several ways, which a KV cache without the linear ones would mix up: "
            "--to hf takes models whose layers attend alike."
        )
    if not plan.attention_layers:
        raise InputError(
            "--to hf keeps the positions of a text in its KV cache, and this plan keeps none: select fewer "
            "layers."
        )
    kept = {block: path.rpartition(".")[2] for block, path in _paths(model).items()}
    if odd := [b for b in plan.chosen if kept.get(b) != (MLP if isinstance(b, Mlp) else ATTENTION)]:
        raise InputError(f"--to hf does not know the module of layer {odd[0]} of {name}.")


def configuration(model: torch.nn.Module, plan: Plan, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of the folder."""
    config: Any = model.config
    returns, paths = dummy_run(model).returns, _paths(model)
    modules = {  # what becomes of each that is not kept, by its path
        paths[block]: {"linear": one is not DROPPED, "returns": returns[block]}
        for block, one in sorted(plan.replacements.items())
    }
    told = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "torch_dtype")}
    return {
        **told,
        "architectures": ["NblForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{Path(FILE).stem}.NblConfig",
            "AutoModelForCausalLM": f"{Path(FILE).stem}.NblForCausalLM",
        },
        "model_type": f"{PREFIX}{config.model_type}",
        "dtype": dtype,
        "torch_dtype": dtype,  # of transformers 4
        "nbl": {"attention": ATTENTION, "modules": modules},
    }


def _paths(model: torch.nn.Module) -> dict[Block, str]:
    """The dotted path of the module of each attention and MLP."""
    return {one.index: one.module for one in blocks_of(model)}
