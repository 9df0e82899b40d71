"""Write model + plan as a folder that transformers, mlx-lm (``nemotron-nas``) or readers of DeciLM load.

transformers: the checkpoint with linear layers, and their classes. Its model type is ``nbl_`` and that of the original.
It loads with ``trust_remote_code``, or without it after ``import nbl_export.transformers``. The attentions that are
linear have no entry in the KV cache.

mlx-lm: each layer has an attention, a matrix in its place, or nothing, and an MLP likewise. Biases are of all layers or
of none: where one has a bias, the others get zeros. The inner width of its MLPs is a multiple of 256: a narrower one
gets zeros, which change nothing. DeciLM has other names, and no biases anywhere: the plan's b must be in its W already
(:mod:`nbl_export.linearize.fits`). Source: tensorrt_llm/_torch/models/modeling_nemotron_nas.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nbl_export.batch import F32
from nbl_export.blocks import Block, Mlp
from nbl_export.errors import InputError
from nbl_export.files import atomic_path, json_text, write_json, write_text
from nbl_export.linearize.plan import DROPPED, Plan
from nbl_export.models.candidates import blocks_of
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.folder import save_tokenizer
from nbl_export.models.modeling_nbl import ATTENTION, FILE, MLP, PREFIX, TYPES, classes_of
from nbl_export.models.weights import all_finite, held
from nbl_export.progress import Listener

# Model types of transformers whose layers are those of Llama: RMS norms before attention and MLP, a gated MLP.
LIKE_LLAMA = ("llama", "mistral", "qwen2")
LAYERS = "model.layers"
_SHARD = 1 << 30  # bytes of one file of weights
_FILE, _INDEX = "model-{:05}.safetensors", "model.safetensors.index.json"
ARCHITECTURE = "nemotron-nas"
_MULTIPLE = 256  # of the inner width of an MLP
# The projections of each module, by which a bias is found.
_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# What W is called in the place of a module, and how mlx-lm is told of DeciLM's names.
_IN_MLX = {"self_attn": "linear", "mlp": "linear"}
_IN_DECILM = {"self_attn": "linear_attn", "mlp": "linear_mlp"}
IN_MLX = {f"{module}.{name}.": f"{module}.linear." for module, name in _IN_DECILM.items()}
_DECILM_FILE = "configuration_decilm.py"
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


def numbers(model: torch.nn.Module, plan: Plan, name: str) -> F32:
    """A parameter of ``model`` in float32, with what a repair changed."""
    with held(model, [name]), torch.inference_mode():
        found: F32 = model.get_parameter(name).detach().float().cpu().numpy()
    adapter = plan.adapters.get(name)
    return found if adapter is None else found + adapter.change()


def write_folder(
    folder: Path,
    tensors: Mapping[str, Callable[[], F32]],
    dtype: str,
    made_by: str,
    tokenizer: Any,
    texts: Mapping[str, str],
    config: Mapping[str, Any],
    listener: Listener,
) -> list[Path]:
    """Write ``tensors``, each what gives its numbers, a tokenizer, ``texts`` and ``config`` into ``folder``.

    Returns the files, of which ``config.json`` is the last: without it nothing loads the folder. Weights are in a
    ``dtype`` of torch such as ``float16``, in files ``made_by`` such as ``mlx``, of which memory has one at a time.
    Raises :class:`InputError` for numbers that the dtype does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    shards: list[list[str]] = []
    kept: dict[str, torch.Tensor] = {}
    total = 0

    def write() -> None:
        shards.append(list(kept))
        with atomic_path(folder / _FILE.format(len(shards))) as temporary:
            save_file(kept, temporary, metadata={"format": made_by})
        kept.clear()

    with listener.task("Writing weights", len(tensors), "tensors") as task:
        for name, read in tensors.items():
            tensor = torch.tensor(read(), dtype=getattr(torch, dtype))
            if not all_finite(tensor):
                raise InputError(f"{name} has numbers that {dtype} does not have: use --precision bf16.")
            if kept and sum(other.nbytes for other in kept.values()) + tensor.nbytes > _SHARD:
                write()
            kept[name] = tensor
            total += tensor.nbytes
            task.advance(1)
        write()
    places = {name: _FILE.format(number) for number, names in enumerate(shards, 1) for name in names}
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    written = [*(folder / _FILE.format(n + 1) for n in range(len(shards))), folder / _INDEX]
    written += save_tokenizer(tokenizer, folder)
    for name, text in {**texts, "config.json": json_text(config)}.items():
        write_text(folder / name, text)
        written.append(folder / name)
    return written


def _check_normed(plan: Plan, reader: str) -> None:
    if plan.fit_input != "normed":
        raise InputError(
            f"{reader} multiplies W with the normed stream, and this plan's W reads the residual stream: select again "
            "without --fit-input residual."
        )


def write_hf(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """Write ``model`` with ``plan`` into ``folder``, in a ``dtype`` of torch such as ``float16``.

    Returns the files. Raises :class:`InputError`, before anything is written, for a model or a plan that such a folder
    cannot hold.
    """
    check_hf(model, plan)
    told, paths = hf_configuration(model, plan, dtype), _paths(model)
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


def check_hf(model: torch.nn.Module, plan: Plan) -> None:
    """Raise :class:`InputError` for a model, or a plan, that such a folder cannot hold."""
    config: Any = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    if config.model_type not in TYPES:
        raise InputError(f"--to hf takes {', '.join(TYPES)}, and {name} is none of them.")
    _check_normed(plan, "--to hf")
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


def hf_configuration(model: torch.nn.Module, plan: Plan, dtype: str) -> dict[str, Any]:
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


def check_like_llama(model: torch.nn.Module, plan: Plan, engine: str) -> None:
    """Raise :class:`InputError` for a model that is not like Llama, or a plan that ``engine`` cannot hold."""
    config: Any = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    if config.model_type not in LIKE_LLAMA:
        raise InputError(
            f"{engine} has linear attention for models like Llama alone, and {name} is none: convert takes "
            f"{', '.join(LIKE_LLAMA)}."
        )
    _check_normed(plan, engine)
    if config.hidden_act != "silu":
        raise InputError(f"{engine} gates with SiLU, and {name} with {config.hidden_act}.")
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (config.model_type == "mistral" and config.sliding_window):
        raise InputError(
            f"{name} has a sliding window, which {engine} does not have beside linear attention."
        )
    rotary: Any = model.get_submodule("model").rotary_emb
    if rotary.rope_type not in ("default", "linear", "llama3") or rotary.attention_scaling != 1:
        raise InputError(
            f"{name} has rotary embeddings of the kind {rotary.rope_type!r}: convert takes default, linear, llama3."
        )


def rope_base(model: torch.nn.Module) -> float:
    """θ of the rotary embeddings."""
    config: Any = model.config
    told: Any = getattr(config, "rope_parameters", None) or {}
    found: Any = told.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return float(found)


def write_mlx(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """Write ``model``, a decoder like Llama, with ``plan`` into ``folder``, in a dtype of torch such as ``float16``.

    Returns the files. Raises :class:`InputError`, before anything is written, for what the architecture cannot hold.
    """
    _check_mlx(model, plan)
    tensors, told = dict(_tensors(model, plan, _IN_MLX)), mlx_configuration(model, plan)
    return write_folder(folder, tensors, dtype, "mlx", tokenizer, {}, told, listener)


def write_decilm(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """:func:`write_mlx` of a model without biases and a ``plan`` whose b are zero, in DeciLM's form."""
    _check_mlx(model, plan)
    if biased := [name for name, _ in model.named_parameters() if name.endswith("_proj.bias")]:
        raise InputError(
            f"DeciLM has no biases, and {type(model).__name__} has {biased[0]}: convert it --to mlx."
        )
    if learned := [block for block, one in plan.layers.items() if one.b.any()]:
        raise InputError(f"Layer {learned[0]} has a bias, and DeciLM has none: take it into W first.")
    loads = {"AutoConfig": f"{Path(_DECILM_FILE).stem}.DeciLMConfig"}
    told = mlx_configuration(model, plan) | {"auto_map": loads, "torch_dtype": dtype, "dtype": dtype}
    tensors = dict(_tensors(model, plan, _IN_DECILM))
    texts = {_DECILM_FILE: _CONFIGURATION}
    return write_folder(folder, tensors, dtype, "pt", tokenizer, texts, told, listener)


def _check_mlx(model: torch.nn.Module, plan: Plan) -> None:
    check_like_llama(model, plan, "mlx-lm")
    config: Any = model.config
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    if head_dim not in (None, config.hidden_size // heads):
        raise InputError(
            f"mlx-lm has heads of {config.hidden_size // heads} in such a model, and {type(model).__name__} of "
            f"{head_dim}: convert it --to gguf."
        )


def mlx_configuration(model: torch.nn.Module, plan: Plan) -> dict[str, Any]:
    """The ``config.json`` of the folder."""
    config: Any = model.config
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    names = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "vocab_size",
        "hidden_act",
    ]
    names += ["max_position_embeddings", "tie_word_embeddings"]
    kept = {
        "attention": {"n_heads_in_group": config.num_attention_heads // config.num_key_value_heads},
        "ffn": {"ffn_mult": 3 * _inner(config) / (2 * config.hidden_size)},
    }

    def stands(block: Block, part: str) -> dict[str, Any]:
        if block in plan.layers:
            return {"replace_with_linear": True}
        return {"no_op": True} if block in plan.dropped else kept[part]

    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": ARCHITECTURE,
        **{name: getattr(config, name) for name in names},
        "attention_bias": _has_bias(model, plan, "self_attn"),
        "mlp_bias": _has_bias(model, plan, "mlp"),
        "rope_theta": rope_base(model),
        "rope_scaling": None
        if rope.get("rope_type", "default") == "default"
        else {k: v for k, v in rope.items() if k != "rope_theta"},
        "block_configs": [
            {"attention": stands(layer, "attention"), "ffn": stands(Mlp(layer), "ffn")}
            for layer in range(plan.layer_count)
        ],
        "eos_token_id": config.eos_token_id,
        "bos_token_id": config.bos_token_id,
    }


def _inner(config: Any) -> int:
    """The inner width of the MLPs in the folder."""
    return -(-int(config.intermediate_size) // _MULTIPLE) * _MULTIPLE


def _has_bias(model: torch.nn.Module, plan: Plan, module: str) -> bool:
    ends = tuple(f".{module}.{name}.bias" for name in _PROJECTIONS[module])
    linear = (
        one.b.any() for block, one in plan.layers.items() if isinstance(block, Mlp) == (module == "mlp")
    )
    return any(linear) or any(name.endswith(ends) for name, _ in model.named_parameters())


def _tensors(
    model: torch.nn.Module, plan: Plan, names: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], F32]]]:
    """Those of the folder, each a name and what gives its numbers; of what is dropped there is none."""
    config: Any = model.config
    d, wide = plan.hidden_size, _inner(config)
    inner = {"gate_proj": (wide, d), "up_proj": (wide, d), "down_proj": (d, wide)}

    def own(name: str, shape: Sequence[int] | None = None) -> tuple[str, Callable[[], F32]]:
        """A parameter of the model, with zeros behind it up to ``shape``; zeros alone where it has none."""

        def read() -> F32:
            found = (
                numbers(model, plan, name)
                if name in parameters
                else np.zeros([0] * len(shape or ()), np.float32)
            )
            grown = [(0, wanted - had) for wanted, had in zip(shape or found.shape, found.shape, strict=True)]
            return np.pad(found, grown)

        return name, read

    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    biased = {module: _has_bias(model, plan, module) for module in _PROJECTIONS}
    yield own("model.embed_tokens.weight")
    for layer in range(plan.layer_count):
        at = f"{LAYERS}.{layer}"
        blocks: tuple[tuple[Block, str, str], ...] = (
            (layer, "input_layernorm", "self_attn"),
            (Mlp(layer), "post_attention_layernorm", "mlp"),
        )
        for block, norm, module in blocks:
            if block in plan.dropped:
                continue
            yield own(f"{at}.{norm}.weight")
            if (linear := plan.layers.get(block)) is not None:
                name = f"{at}.{module}.{names[module]}"
                yield f"{name}.weight", partial(getattr, linear, "w")
                if biased[module]:
                    yield f"{name}.bias", partial(getattr, linear, "b")
                continue
            for projection in _PROJECTIONS[module]:
                name = f"{at}.{module}.{projection}"
                shape = inner.get(projection, parameters[f"{name}.weight"])
                yield own(f"{name}.weight", shape)
                if biased[module]:
                    yield own(f"{name}.bias", shape[:1])
    yield own("model.norm.weight")
    if not config.tie_word_embeddings:
        yield own("lm_head.weight")
