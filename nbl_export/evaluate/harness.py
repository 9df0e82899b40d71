"""A decoder stream as a language model of lm-evaluation-harness.

Tokenization is the same as in the harness's own Hugging Face model, so that the scores are comparable. Importing this
module needs the extra ``eval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from nbl_export.evaluate.answer import in_chat_template
from nbl_export.evaluate.scoring import Limits, Pair, greedy, log_likelihoods
from nbl_export.progress import Listener
from nbl_export.runtime.stream import Stream


class DecoderLM(TemplateLM):  # type: ignore[misc]
    """The language-model interface of lm-evaluation-harness over a stream.

    ``limits`` are the model's positions and the batch size; ``title`` is the title of the progress reported to the
    ``listener``.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: Any,
        limits: Limits,
        listener: Listener,
        title: str = "",
    ) -> None:
        super().__init__()
        self.stream, self.tokenizer, self.limits = stream, tokenizer, limits
        self.listener, self.title = listener, title
        self.max_gen_toks = min(256, limits.positions // 2)

    # interface of the base class -----------------------------------------------------------------
    @property
    def max_length(self) -> int:
        return self.limits.positions

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        """Tokenize by the tokenizer's own rules; a text that starts with the prefix token gets no second one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(t) for t in self.tokenizer(string, verbose=False, **special)["input_ids"]]

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the tokenizer's chat template, as text."""
        return in_chat_template(
            self.tokenizer, chat_history, "leave out --chat-template", add_generation_prompt
        )

    # requests ------------------------------------------------------------------------------------
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        with self.listener.task(self.title, len(pairs), "requests") as task:
            scores = log_likelihoods(self.stream, pairs, self.limits, task.advance)
        return [(s.log_likelihood, s.greedy) for s in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of full texts: each token is predicted once, from as much context as fits."""
        how = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        windows = [
            [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(self.tok_encode(request.args[0]), **how)
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([("", *pair) for text in windows for pair in text]))
        return [float(sum(next(scores)[0] for _ in text)) for text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first stop sequence of each request, or its number of tokens."""
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        asked: list[tuple[int, list[str]]] = []
        for request in requests:
            kwargs = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stops = handle_stop_sequences(list(kwargs["until"]), eos=end)
            # A prompt must still fit.
            asked.append((max(1, min(kwargs["max_gen_toks"], self.max_length - 1)), stops))

        def finished(number: int, tokens: list[int]) -> bool:
            most, stops = asked[number]
            if len(tokens) >= most or tokens[-1] == self.eot_token_id:
                return True
            text = self.tok_decode(tokens)
            return any(stop and stop in text for stop in stops)

        prompts = [tuple(self.tok_encode(r.args[0])) or (self.prefix_token_id,) for r in requests]
        with self.listener.task(self.title, len(requests), "answers") as task:
            most = max(number for number, _ in asked)
            written = greedy(self.stream, prompts, most, finished, self.limits, task.advance)
        return [
            postprocess_generated_text(self.tok_decode(tokens), stops, None)
            for tokens, (_, stops) in zip(written, asked, strict=True)
        ]
