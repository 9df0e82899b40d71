"""The layout that transformers.js reads: the graph in onnx/, named by its precision, and what it wants said of it.

onnx/model.onnx, onnx/model.onnx_data     fp32; model_fp16, model_int8 and model_q4 are the others; base.onnx is the
                                          unmodified graph, where it is wanted
                                          heads of a fixed size in the inputs of the cache
config.json                               with ``transformers.js_config``: the precision, and that weights lie apart
tokenizer_config.json                     with the chat template in it, and padding on the left of decoders
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from nbl_export.errors import InputError
from nbl_export.files import read_json, write_json
from nbl_export.graph.cache import kv_pairs

MODEL, BASE = "model", "base"  # ``model_file_name`` of transformers.js
# Precision → what transformers.js calls it, and how the name of its graph ends.
_CALLED = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16"), "int8": ("int8", "_int8"), "int4": ("q4", "_q4")}
_AGAIN = "run `nbl-export export` again"


def web_names(precision: str, graph: str = MODEL) -> tuple[str, str]:
    """The path of a ``graph`` in the folder, and the name of its data file.

    Raises :class:`InputError` for what transformers.js does not run.
    """
    if precision not in _CALLED:
        raise InputError(
            f"transformers.js runs no graph in {precision}: {', '.join(_CALLED)} are what it takes."
        )
    name = f"{graph}{_CALLED[precision][1]}.onnx"
    return f"onnx/{name}", f"{name}_data"


def size_cache(model: ir.Model) -> None:
    """Say how large a head of each cache input is: transformers.js makes the first, empty cache by that, in place."""
    for pair in kv_pairs(model):
        for side, values in enumerate(zip(pair.past, pair.present, strict=True)):
            heads, size = pair.geometry(side)
            for value in values:
                if value.shape is not None:
                    value.shape = ir.Shape([value.shape[0], heads, value.shape[2], size])


def adapt_configs(folder: Path, precision: str, generates: bool) -> None:
    """Say in the configurations of ``folder`` what transformers.js reads there; what others read stays.

    Rows are padded on the left only where a model ``generates``.
    """
    called, suffix = _CALLED[precision]
    path = folder / "config.json"
    config = read_json(path, "The configuration", _AGAIN)
    lying_apart = {f"{graph}{suffix}.onnx": 1 for graph in (MODEL, BASE)}
    told: dict[str, object] = {"dtype": called, "use_external_data_format": lying_apart}
    if precision == "fp16":
        told["kv_cache_dtype"] = {"fp16": "float16"}
    write_json(path, {**config, "transformers.js_config": told})
    tokenizer, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if tokenizer.is_file():
        settings = dict(read_json(tokenizer, "The tokenizer's configuration", _AGAIN))
        if generates:
            settings["padding_side"] = "left"
        if template.is_file():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        write_json(tokenizer, settings)
