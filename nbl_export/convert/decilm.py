"""Model + plan → a folder in DeciLM's form, which TensorRT-LLM reads: a matrix without b in the place of an attention.

The form is that of mlx-lm's (:mod:`.mlx`) with other names, and without biases anywhere: the plan's b must be in its W
already (:mod:`nbl_export.linearize.no_bias`). Source: tensorrt_llm/_torch/models/modeling_nemotron_nas.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.convert import mlx
from nbl_export.convert.shards import Shards
from nbl_export.errors import InputError
from nbl_export.files import atomic_path
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Listener

if TYPE_CHECKING:
    import torch

_MATRICES = {"self_attn": "linear_attn", "mlp": "linear_mlp"}
# The same in mlx-lm.
IN_MLX = {f"{module}.{name}.": f"{module}.linear." for module, name in _MATRICES.items()}
FILE = "configuration_decilm.py"
# Its readers take the parts of a block by attribute, which JSON does not have.
_CONFIGURATION = '''"""DeciLM's configuration: each block says what stands in the place of its attention and its MLP."""

from transformers import PretrainedConfig


class Named(dict):
    """A dict whose values are attributes, too; what is missing is None."""

    __getattr__ = dict.get


ATTENTION = {"n_heads_in_group": None, "no_op": False, "replace_with_linear": False}
MLP = {"ffn_mult": None, "no_op": False, "replace_with_linear": False}


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **others):
        self.block_configs = [
            Named(
                attention=Named({**ATTENTION, **block["attention"]}),
                ffn=Named({**MLP, **block["ffn"]}),
            )
            for block in block_configs
        ]
        super().__init__(**others)
'''


def write_decilm(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """Write ``model``, a decoder like Llama, with ``plan``, whose b are zero, into ``folder``, in a dtype of torch.

    Returns the files, of which the configuration is written last: without it nothing loads the folder. Raises
    :class:`InputError`, before anything is written, for what the form cannot hold.
    """
    check_held(model, plan)
    if biased := [block for block, one in plan.layers.items() if one.b.any()]:
        raise InputError(f"Layer {biased[0]} has a bias, and DeciLM has none: take it into W first.")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / FILE) as temporary:
        temporary.write_text(_CONFIGURATION, encoding="utf-8")
    told = {
        "auto_map": {"AutoConfig": f"{Path(FILE).stem}.DeciLMConfig"},
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    files = Shards(folder, dtype, "pt")
    return [
        folder / FILE,
        *mlx.write_folder(folder, model, plan, tokenizer, files, _MATRICES, listener, told),
    ]


def check_held(model: torch.nn.Module, plan: Plan) -> None:
    """Raise :class:`InputError` for a model, or a plan, that the form cannot hold."""
    mlx.check_held(model, plan)
    if biased := [name for name, _ in model.named_parameters() if name.endswith("_proj.bias")]:
        raise InputError(
            f"DeciLM has no biases, and {type(model).__name__} has {biased[0]}: convert it --to mlx."
        )
