"""Run the language model of a multimodal model with its head as one decoder: see :mod:`.multimodal`."""

from __future__ import annotations

from typing import Any

import torch

from nbl_export.models.libraries import accepted_arguments, cache_argument

# What a decoder is asked that its language model answers.
_OF_LANGUAGE_MODEL = (
    "get_input_embeddings",
    "set_attn_implementation",
    "set_experts_implementation",
    "_can_set_experts_implementation",
    "_supports_attention_backend",
)


class Given(torch.nn.Module):
    """Stands for the body of a wrapper while that runs its head: gives the states that it is given."""

    def forward(self, *_args: Any, inputs_embeds: torch.Tensor, **_options: Any) -> Any:
        return _States((inputs_embeds,))


class _States(tuple):  # type: ignore[type-arg]
    """What a body returns: the states, and nothing that comes from images or sound."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        states: torch.Tensor = self[0]
        return states

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Embedded(torch.nn.Module):
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
        embedded = self.body.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        return self.body(
            inputs_embeds=embedded,
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

    def __init__(
        self, language_model: Any, body: torch.nn.Module, head: Any, output: torch.nn.Module
    ) -> None:
        super().__init__()
        self.model = body
        self.head = head
        self.config = language_model.config
        self._inner, self._output = (
            next(name for name, found in self.named_modules() if found is module)
            for module in (language_model, output)
        )

    @property
    def base_model(self) -> torch.nn.Module:
        return self.model

    @property
    def language_model(self) -> Any:
        return self.get_submodule(self._inner)

    def get_output_embeddings(self) -> Any:
        return self.get_submodule(self._output)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_LANGUAGE_MODEL:
            return getattr(self.language_model, name)
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
        from transformers.modeling_outputs import ModelOutput

        given = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if per_layer_inputs is not None:
            given["per_layer_inputs"] = per_layer_inputs
        found = self.model(
            **given,
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
