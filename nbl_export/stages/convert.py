"""Model + plan → the form of another engine, proven in that engine where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.checks import Check
from nbl_export.files import TEMPORARY, read_json, write_json
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.progress import Listener
from nbl_export.records import from_json, to_json
from nbl_export.settings import VerifySettings
from nbl_export.settings.converting import GGUF_TYPES, ConvertSettings
from nbl_export.stage_record import MODEL
from nbl_export.stages.run import Run
from nbl_export.verify.parity.figures import Parity

if TYPE_CHECKING:
    from nbl_export.convert.gguf_tokenizer import TokenizerFields


@dataclass(frozen=True)
class Conversion:
    """A file for another engine: its path in the output folder, its bytes, the layers that are linear in it, and what
    that engine computes with it against PyTorch.
    """

    file: str
    bytes: int
    layers: tuple[str, ...]
    checks: tuple[Check, ...]
    parity: Parity | None = None

    @property
    def passed(self) -> bool:
        return not any(check.status == "failed" for check in self.checks)


def convert(run: Run, settings: ConvertSettings) -> Conversion:
    """The model with the plan of the folder as ``OUT/gguf/model-F16.gguf``, and what llama.cpp computes with it.

    A gate that fails is in the value, not an exception.
    """
    from nbl_export.convert.deci import check_held
    from nbl_export.convert.stored import check_stored

    ws = run.workspace
    selected = ws.require("select")
    made_of = {"select": selected.result, MODEL: run.model.source.model}
    target = ws.gguf(GGUF_TYPES[settings.precision])

    def work(listener: Listener) -> list[Path]:
        plan = load_plan(ws.plan)
        check_held(run.model.model, plan)
        target.parent.mkdir(exist_ok=True)
        tokenizer = _tokenizer(run)
        _write(run, plan, tokenizer, settings, target, listener)
        proven, parity = _verified(run, plan, tokenizer, settings, target, listener)
        checks = (check_stored(target, plan), *proven)
        name = target.relative_to(ws.root).as_posix()
        layers = tuple(map(str, plan.blocks))
        found = Conversion(name, target.stat().st_size, layers, checks, parity)
        write_json(ws.conversion, to_json(found))
        return [target, ws.conversion]

    run.stage("convert", settings.as_json() | _engine(), made_of, work)
    return from_json(Conversion, read_json(ws.conversion, "The conversion", ""), str(ws.conversion), "")


def _engine() -> dict[str, Any]:
    """Whether the engine is here: once it is, what was not proven is."""
    from nbl_export.runtime.llama_cpp import is_here

    return {"proven": is_here()}


def _tokenizer(run: Run) -> TokenizerFields:
    from nbl_export.convert.gguf_tokenizer import fields_of, fields_of_gguf

    source = run.model.source
    if source.gguf_file is not None:
        return fields_of_gguf(Path(source.path) / source.gguf_file)
    model: Any = run.model.model
    return fields_of(run.model.tokenizer, int(model.config.vocab_size))


def _write(
    run: Run,
    plan: Plan,
    tokenizer: TokenizerFields,
    settings: ConvertSettings,
    path: Path,
    listener: Listener,
) -> None:
    from nbl_export.convert.gguf import write_gguf

    write_gguf(path, run.model.model, plan, tokenizer, GGUF_TYPES[settings.precision], listener)


def _verified(
    run: Run,
    plan: Plan,
    tokenizer: TokenizerFields,
    settings: ConvertSettings,
    path: Path,
    listener: Listener,
) -> tuple[tuple[Check, ...], Parity | None]:
    from nbl_export.calibrate.text import load_text
    from nbl_export.parts import part
    from nbl_export.runtime.llama_cpp import PACKAGE, is_here
    from nbl_export.verify.case import DecoderCase
    from nbl_export.verify.llama_cpp import measure_gguf

    if not is_here():
        return (Check("parity", "skipped", f"llama.cpp is not here: {part(PACKAGE).pip}"),), None
    ws = run.workspace
    text = load_text(ws.text)
    case = DecoderCase(run.model.in_float32, plan, ws.baseline, ws.model, VerifySettings(), listener, text)
    beside = path.with_name(f".unmodified{TEMPORARY}")
    unmodified = partial(_write, run, plan.without_layers(), tokenizer, settings, beside, listener)
    try:
        return measure_gguf(
            case, path, settings.precision, run.model.tokenizer, lambda: (unmodified(), beside)[1]
        )
    finally:
        beside.unlink(missing_ok=True)
