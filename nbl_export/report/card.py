"""Write the model card of a package: what a reader of a model hub looks for, without paths of a machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

from nbl_export.models.source import ModelIdentity
from nbl_export.report.plots import report_plots
from nbl_export.report.render import filled
from nbl_export.report.schema import Report
from nbl_export.report.summary import headlines, making, model_name, replaced_line

M = TypeVar("M", bound=ModelIdentity)
CARD = "README.md"
UNKNOWN = "That of the base model, which its files do not name."
_GENERATION = """import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=256)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""
_ENCODER = """import onnxruntime as ort

session = ort.InferenceSession("model.onnx")
print([value.name for value in session.get_inputs()], [value.name for value in session.get_outputs()])"""

_WEB = """import {{ pipeline }} from "@huggingface/transformers";

const run = await pipeline("{task}", "OWNER/NAME");
console.log(await run("Once upon a time"));"""

_TRITON = "tritonserver --model-repository models"


def without_paths(report: Report) -> Report:
    """``report`` with the names of files and folders in the place of their paths, which are a machine's own."""
    chosen = report.selection
    sources = tuple(map(_name, chosen.sources))
    settings = {stage: _named(asked) for stage, asked in report.settings.items()}
    return replace(
        report,
        model=_public(report.model),
        selection=replace(chosen, sources=sources),
        settings=settings,
        kept={name: replace(kept, settings=_named(kept.settings)) for name, kept in report.kept.items()},
        bench=report.bench
        and replace(report.bench, settings=_named(report.bench.settings), model=_public(report.bench.model)),
        forms={},  # their files are not in the package
    )


def _public(model: M) -> M:
    """``model`` as it is called elsewhere: by its Hub id, or the name of its folder or file."""
    return model if model.kind == "hub" else replace(model, source=model_name(model))


def _named(asked: Any) -> Any:
    if isinstance(asked, Mapping):
        return {name: _named(value) for name, value in asked.items()}
    if isinstance(asked, (list, tuple)):
        return [_named(value) for value in asked]
    return _name(asked) if isinstance(asked, str) else asked


def _name(text: str) -> str:
    """``text``, or the last part of it if it is a path with folders."""
    path = PurePath(text)
    return path.name if path.is_absolute() or text.startswith(("~", "..")) else text


def license_of(model: Path, gguf_file: str | None = None) -> str | None:
    """The license that the files of a model name: the front matter of its card, or a field of its GGUF file."""
    if gguf_file is not None:
        return _license_of_gguf(model / gguf_file)
    card = model / CARD
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        named = ModelCard.load(card).data.to_dict().get("license")
    except (ValueError, OSError, YAMLError):  # no front matter, or none that is one
        return None
    return named if isinstance(named, str) else None


def _license_of_gguf(path: Path) -> str | None:
    if not path.is_file():
        return None
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.license")
    except (ValueError, OSError):
        return None
    found = field.contents() if field else None
    return found if isinstance(found, str) else None


def model_card(report: Report, license: str | None = None, layout: str = "folder") -> str:
    """The card in Markdown with its front matter; ``report`` names no paths (:func:`without_paths`)."""
    # A report may come from somebody else: what is no Hub id makes no link.
    hub = report.model.kind == "hub" and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", report.model.source) is not None
    task = report.graph.task or "text-generation"
    header: dict[str, object] = {
        **({"license": license} if license else {}),
        **({"base_model": report.model.source} if hub else {}),
        "library_name": "transformers.js" if layout == "web" else "onnx",
        "pipeline_tag": task,
        "tags": ["onnx", "neural-block-linearization", "nbl-export"],
    }
    plots = report_plots(report)
    in_python = _GENERATION if report.graph.task is None else _ENCODER
    language, use = {"web": ("js", _WEB.format(task=task)), "triton": ("bash", _TRITON)}.get(
        layout, ("python", in_python)
    )
    return filled(
        "card.md.j2",
        header={name: json.dumps(value) for name, value in header.items()},
        title=model_name(report.model),
        base=report.model.source,
        link=f"https://huggingface.co/{report.model.source}" if hub else "",
        report=report,
        replaced=replaced_line(report),
        headlines=headlines(report),
        plots={name: plots[name] for name in ("k-curve", "speed") if name in plots},
        language=language,
        use=use,
        making=making(report),
        license=f"{license}, as the base model's files say." if license else UNKNOWN,
    )
