"""Find the language model inside a multimodal checkpoint, by structure; its other towers are left to the user.

A *wrapper* is a model of which the configuration has the configurations of other models in it: a language model's,
and those of towers that turn images into embeddings.

    vision tower ─► projector ─┐
    input_ids ─► embedding ────┴─► language model ─► head ─► logits

For text nothing runs but the language model and the head. So a wrapper is built without the rest, of which no weight is
read (:func:`text_only`), and is handed on as a decoder (:func:`as_decoder`): the language model by its own code, and
the head by the wrapper's, which may scale or cap the logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nbl_export.errors import InputError, first_line
from nbl_export.models.folder import nested, without_choices
from nbl_export.models.layers import language_head
from nbl_export.models.running import accepted_arguments, cache_argument, quiet

_LEFT_OUT = "_nbl_export_left_out"
_WHOLE = "_nbl_export_whole"  # the configuration of the wrapper that a decoder is from
# What a decoder is asked that its language model answers.
_OF_LANGUAGE_MODEL = (
    "get_input_embeddings",
    "set_attn_implementation",
    "set_experts_implementation",
    "_can_set_experts_implementation",
    "_supports_attention_backend",
)


def find_wrapper(source: str, config: Mapping[str, Any], architecture: str) -> tuple[str, tuple[str, ...]]:
    """The class of a wrapper, and its modules that are not its language model; it is built without memory.

    Of an ordinary decoder both are empty. Raises :class:`InputError` for a wrapper without a language model that could
    be exported.
    """
    if config.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"{source}: model_type {config.get('model_type')!r:.100} is not in this version of transformers: install a "
            "later one."
        )
    try:
        with quiet(), torch.device("meta"):
            of_type = CONFIG_MAPPING[config["model_type"]]
            # Infinity has a form of its own.
            numbers = getattr(of_type, "_decode_special_floats", lambda given: given)
            read = of_type.from_dict(numbers(without_choices(config)))
            name = _class_of(read, architecture)
            model = text_only(name)._from_config(read)
            found: tuple[str, ...] = getattr(model, _LEFT_OUT)
            if not found and read.get_text_config(decoder=True) is read:
                return "", ()  # an ordinary decoder, with something in its configuration that nobody reads
            decoder = as_decoder(model)
            if isinstance(decoder, TextDecoder):  # a head may need more than states
                width = decoder.get_input_embeddings().weight.shape[1]
                decoder.logits_of(torch.zeros(1, 2, width))
    except InputError:
        raise
    except Exception as error:  # transformers raises almost anything for a configuration that it cannot read
        reason = first_line(error)[:300]
        raise InputError(
            f"The language model and head of {source} ({architecture}) cannot be built by transformers: {reason}."
        ) from error
    return name, found


def _class_of(config: Any, architecture: str) -> str:
    """The class called ``architecture`` if it has such a configuration, else the one that transformers has for it."""
    mappings = (auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING)
    found = [getattr(transformers, architecture, None), *(each.get(type(config), None) for each in mappings)]
    fits = (kind.__name__ for kind in found if getattr(kind, "config_class", None) is type(config))
    return next(fits, architecture)


def check_alone(source: str, config: Mapping[str, Any], architecture: str) -> None:
    """Refuse what is saved without a head and is several models in one: none of them is *the* model."""
    whole = auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    if len(inner := nested(config)) > 1:
        instead = (
            f"save it with its language-model head, as {whole}"
            if whole
            else "save the one that you want alone"
        )
        raise InputError(
            f"{source} is several models in one ({architecture}: {', '.join(inner)}): {instead}."
        )


def text_only(architecture: str) -> Any:
    """The class ``architecture`` of transformers, of which a model has nothing but its language model and its head.

    It has the same name, by which transformers finds how the tensors of a checkpoint are called.
    """
    return _changed(architecture, False, lambda model, _config: setattr(model, _LEFT_OUT, _leave_out(model)))


def towers_only(architecture: str) -> Any:
    """The class ``architecture`` of transformers, of which a model has all but the blocks of its language model."""

    def without_blocks(model: Any, config: Any) -> None:
        inner = language_model(model)
        # Towers that are a part of the language model put images among its tokens before its first block.
        first = [_Entry()] if type(inner.config) is type(config) else []
        for module in [inner] if first else list(inner.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.ModuleList) and len(child) == inner.config.num_hidden_layers:
                    module._modules[name] = torch.nn.ModuleList(first)

    return _changed(architecture, True, without_blocks)


def _changed(architecture: str, timm: bool, change: Any) -> Any:
    """The class ``architecture`` of transformers, of which each model is changed; ``timm`` may make its towers."""
    whole = getattr(transformers, architecture, None)
    if not isinstance(whole, type) or not issubclass(whole, transformers.PreTrainedModel):
        raise InputError(
            f"The class {architecture} is not in this version of transformers: install a later one."
        )
    begin = vars(whole)["__init__"]

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        with without_timm(timm):
            begin(self, config, *args, **kwargs)
        change(self, config)
        there = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        tied = getattr(self, "all_tied_weights_keys", {})
        self.all_tied_weights_keys = {a: b for a, b in tied.items() if a in there and b in there}

    return type(architecture, (whole,), {"__init__": build, "__module__": whole.__module__})


class _Entry(torch.nn.Module):
    """Stands for the blocks of a language model, of which only the input is asked for."""

    def forward(self, hidden_states: torch.Tensor, **_options: Any) -> torch.Tensor:
        return hidden_states


class Absent(torch.nn.Module):
    """Stands for a tower of a library that is not there or not needed, and whose code may fetch what it is told to."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def entry(model: Any) -> tuple[str, str]:
    """The path of the module of :func:`towers_only` that is handed embeddings of text and images, and as what."""
    found = next((name for name, module in model.named_modules() if isinstance(module, _Entry)), "")
    return (found, "hidden_states") if found else (_paths(model)[0], "inputs_embeds")


@contextmanager
def without_timm(but_its_own: bool) -> Iterator[None]:
    """Within the block no model of timm is built; with ``but_its_own`` those that timm, if it is there, has itself.

    For any other name it would ask the Hub.
    """
    plain = transformers.AutoModel.__dict__["from_config"]

    def from_config(config: Any, **options: Any) -> Any:
        of_timm = getattr(auto.MODEL_MAPPING.get(type(config), None), "__name__", "").startswith("Timm")
        if of_timm and not (
            but_its_own
            and find_spec("timm")
            and re.fullmatch(r"\w+(\.\w+)?", str(config.architecture))
            and not config.model_args
        ):
            return Absent(config)
        return plain.__get__(None, transformers.AutoModel)(config, **options)

    transformers.AutoModel.from_config = staticmethod(from_config)
    try:
        yield
    finally:
        transformers.AutoModel.from_config = plain


# structure ---------------------------------------------------------------------------------------


def _is_model(module: torch.nn.Module) -> bool:
    return isinstance(module, transformers.PreTrainedModel)


def language_model(model: Any) -> Any:
    """The language model in a wrapper of transformers' own class."""
    return model.get_submodule(_paths(model)[0])


def _paths(model: Any) -> tuple[str, str]:
    """The paths of the language model in ``model``, and of the model that has its head; both may be the same.

    The language model is the first that has the text's configuration; if that is the whole model's own, its body.
    """
    text, kind = model.config.get_text_config(decoder=True), type(model).__name__
    path = next((n for n, m in model.named_modules() if _is_model(m) and type(m.config) is type(text)), None)
    owners = [] if path is None else [p for p in _above(path) if _is_model(model.get_submodule(p))]
    owner = next((p for p in owners if language_head(model.get_submodule(p)) is not None), None)
    if path is None or owner is None:
        raise InputError(
            f"{kind} has no language model with a head that gives logits: there is no decoder in it."
        )
    if path == "" and owner == "":
        path = next((n for n, m in model.named_modules() if n and m is model.base_model), "")
        if not path:
            raise InputError(f"{kind} has its blocks beside its head: it is not supported.")
    return path, owner


def _above(path: str) -> list[str]:
    """``path`` and the paths of the modules that it is in, from the innermost."""
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _leave_out(model: Any) -> tuple[str, ...]:
    """Remove from ``model`` what is neither its language model nor its head; returns the names of what is removed."""
    path, owner = _paths(model)
    order = [name for name, _ in model.named_modules()]
    head = None if path == owner else language_head(model.get_submodule(owner))
    kept = {path, *(name for name, module in model.named_modules() if module is head)}
    ancestors = {above for name in kept for above in _above(name)[1:]}
    found: list[str] = []
    for prefix in [name for name in order if name in ancestors - kept]:
        module = model.get_submodule(prefix)
        for name, child in list(module.named_children()):
            inner = f"{prefix}.{name}".lstrip(".")
            weighted = isinstance(child, Absent) or _is_model(child) or any(True for _ in child.parameters())
            if inner not in ancestors | kept and weighted:
                module._modules[name] = None
                found.append(inner)
    body = model.get_submodule(path)
    # A model with one configuration for everything has its towers among the parts of its body.
    for name, child in list(body.named_children()) if type(body.config) is type(model.config) else ():
        if any(_is_model(inner) for inner in child.modules()):
            body._modules[name] = None
            found.append(f"{path}.{name}")
    return tuple(sorted(found, key=order.index))


def placeholders(model: Any) -> dict[str, int]:
    """The tokens in the places of images and of sounds, by "image" and "audio", as far as the wrapper has them."""
    found: dict[str, int] = {}
    whole = whole_config(model) or model.config
    for kind, tower in (("image", "vision_config"), ("audio", "audio_config")):
        places = [place for place in (whole, getattr(whole, tower, None)) if place is not None]
        names = (f"{kind}_token_id", f"{kind}_token_index")
        ids = [getattr(place, name, None) for place in places for name in names]
        if (token := next((i for i in ids if isinstance(i, int) and i >= 0), None)) is not None:
            found[kind] = token
    return found


# the decoder --------------------------------------------------------------------------------------


def as_decoder(model: Any) -> Any:
    """The decoder in a model that was built by :func:`text_only`, which is used up."""
    path, owner_path = _paths(model)
    inner, owner = model.get_submodule(path), model.get_submodule(owner_path)
    generation = getattr(model, "generation_config", None)
    if path == owner_path:  # it has a head of its own
        decoder = inner
    else:
        # The whole body of the wrapper gives way, of which the language model may be a part.
        first = path.removeprefix(f"{owner_path}.").split(".")[0]
        body = _Embedded(inner) if type(inner.config) is type(model.config) else inner
        output = language_head(owner)
        owner._modules[first] = _Given()
        decoder = type(type(model).__name__, (TextDecoder,), {})(inner, body, owner, output)
    if generation is not None:
        decoder.generation_config = generation
    setattr(decoder, _WHOLE, model.config)
    decoder.of_config = plain = auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(decoder.config), None)
    decoder.config.architectures = None if plain is None else [plain.__name__]
    return decoder


def whole_config(decoder: Any) -> Any:
    """The configuration of the wrapper that ``decoder`` was found in; None for a model that is in none."""
    return getattr(decoder, _WHOLE, None)


class _Given(torch.nn.Module):
    """Stands for the body of a wrapper while that runs its head: gives the states that it is given."""

    def forward(self, *_args: Any, inputs_embeds: torch.Tensor, **_options: Any) -> Any:
        return _States((inputs_embeds,))


class _States(tuple):  # type: ignore[type-arg]
    """What a body returns: the states, and nothing that comes from images or sound."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


class _Embedded(torch.nn.Module):
    """A body that would put images among the embeddings of its tokens, for text alone."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        return self.body(
            inputs_embeds=self.body.get_input_embeddings()(input_ids)
            if inputs_embeds is None
            else inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{cache_argument(self.body): cache},
        )


class TextDecoder(torch.nn.Module):
    """The language model of a wrapper with its head, as a decoder of transformers is used.

    ``of_config`` is transformers' own class for such a configuration, if it has one.
    """

    main_input_name = "input_ids"
    of_config: Any = None

    def __init__(self, inner: Any, body: torch.nn.Module, head: Any, output: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.head, self.config = body, head, inner.config
        paths = {module: name for name, module in self.named_modules()}
        self._inner, self._output = paths[inner], paths[output]

    @property
    def base_model(self) -> torch.nn.Module:
        return self.model

    def get_output_embeddings(self) -> Any:
        return self.get_submodule(self._output)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_LANGUAGE_MODEL:
            return getattr(self.get_submodule(self._inner), name)
        return super().__getattr__(name)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        per_layer_inputs: torch.Tensor | None = None,
    ) -> Any:
        tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        found = self.model(
            **tokens,
            **({} if per_layer_inputs is None else {"per_layer_inputs": per_layer_inputs}),
            attention_mask=attention_mask,
            use_cache=use_cache,
            **accepted_arguments(self.model, position_ids=position_ids),
            **{cache_argument(self.model): cache},
        )
        logits = self.logits_of(found[0], logits_to_keep)
        return ModelOutput(logits=logits, cache=found.get(cache_argument(self.model)))

    def logits_of(self, states: torch.Tensor, logits_to_keep: int = 0) -> torch.Tensor:
        """The logits of the last ``logits_to_keep`` ``states``, or of all."""
        kept = accepted_arguments(self.head, logits_to_keep=logits_to_keep, use_cache=False)
        logits: torch.Tensor = self.head(inputs_embeds=states, **kept).logits
        return logits
