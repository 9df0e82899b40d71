"""onnxruntime-genai as a row of tokens: it keeps the KV cache and runs the graph; the tokens are chosen here.

Its configuration may come from somebody else, and can ask for more than running a graph: for libraries
(``custom_ops_library``, execution providers), for other graphs and files. One that says more than what a decoder is, is
not given to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.errors import InputError, first_line
from nbl_export.export.sidecars import GENAI
from nbl_export.files import read_json
from nbl_export.graph.io import load_graph
from nbl_export.runtime.bounds import bounded
from nbl_export.runtime.session import bounds_of_graph

# What our exporters and onnxruntime-genai's builder write of a decoder. Names of inputs and outputs are not looked at.
_KNOWN = {
    "": {"model", "search"},
    "model": {
        *("bos_token_id", "eos_token_id", "pad_token_id", "context_length", "type", "vocab_size", "decoder"),
    },
    "decoder": {
        *("session_options", "filename", "head_size", "hidden_size", "inputs", "outputs", "layer_types"),
        *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "sliding_window"),
    },
    "session_options": {"log_id", "provider_options", "intra_op_num_threads"},
}


def is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime_genai") is not None


def has_config(graph: Path) -> bool:
    return graph.with_name(GENAI).is_file()


def why_not(graph: Path) -> str | None:
    """Why onnxruntime-genai is not given the folder of ``graph``, in words; None if it can be."""
    path = graph.with_name(GENAI)
    if not has_config(graph):
        return f"{graph.parent} has no {GENAI}"
    try:
        config = _configuration(path)
        model, search = config["model"], config["search"]
        decoder = model["decoder"]
        options = decoder["session_options"]
        for part, value in (
            ("", config),
            ("model", model),
            ("decoder", decoder),
            ("session_options", options),
        ):
            if more := sorted(set(value) - _KNOWN[part]):
                return f"{path} has {more[0]!r}, which is more than a decoder needs"
        if options.get("provider_options"):
            return f"{path} asks for another execution provider than the CPU's"
        if decoder["filename"] != graph.name:
            return f"{path} names another graph than {graph.name}"
        if (
            not isinstance(search["past_present_share_buffer"], bool)
            or type(model["context_length"]) is not int
        ):
            return f"{path} is no configuration of a decoder"
    except InputError as error:
        return str(error).rstrip(".")
    except (AttributeError, KeyError, TypeError):
        return f"{path} is no configuration of a decoder"
    return None


def _configuration(path: Path) -> Any:
    return read_json(path, "The configuration of the graph", "export the model again", finite=True)


class GenaiRow:
    """The decoder at ``graph`` as a row; raises :class:`InputError` if onnxruntime-genai does not load it.

    ``positions`` are those that its configuration allows. :func:`why_not` must have been asked before.
    """

    extends = True

    def __init__(self, graph: Path) -> None:
        import onnxruntime_genai

        self._genai, self._graph = onnxruntime_genai, graph
        self._bounds = bounds_of_graph(graph, load_graph(graph))
        told = _configuration(graph.with_name(GENAI))
        self.positions = int(told["model"]["context_length"])
        # A shared buffer has all its room from the beginning.
        self.grows = not told["search"]["past_present_share_buffer"]
        with self._working("load"):
            self._model = onnxruntime_genai.Model(str(graph.parent))
        self._generator: Any = None

    def begin(self, tokens: Sequence[int], room: int) -> NDArray[Any]:
        self._generator = None  # its memory is free before another takes some
        with self._working("run", len(tokens)):
            parameters = self._genai.GeneratorParams(self._model)
            parameters.set_search_options(
                max_length=min(room, self.positions), do_sample=False, batch_size=1, num_beams=1
            )
            self._generator = self._genai.Generator(self._model, parameters)
        return self.go_on(tokens)

    def go_on(self, tokens: Sequence[int]) -> NDArray[Any]:
        with self._working("run", self._generator.token_count() + len(tokens)):
            self._generator.append_tokens(np.array(tokens, dtype=np.int32))
            logits: NDArray[Any] = np.asarray(self._generator.get_logits())[0, -1]
        return logits

    @contextmanager
    def _working(self, verb: str, tokens: int = 0) -> Iterator[None]:
        feeds: Mapping[str, Any] = {"input_ids": np.zeros((1, tokens), dtype=np.int64)} if tokens else {}
        try:
            with bounded(self._bounds.fed(feeds), f"{verb} {self._graph}"):
                yield
        except (RuntimeError, ValueError) as error:  # those of onnxruntime-genai
            raise InputError(
                f"onnxruntime-genai does not {verb} {self._graph}: {first_line(error)}."
            ) from None
