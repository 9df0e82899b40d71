"""Write the plan in the form of another engine, and prove it in that engine where it is installed.

Each form is a row of :data:`FORMS`: who writes it, and who opens it there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nbl_export.calibrate.moments import load_moments
from nbl_export.calibrate.text import load_text
from nbl_export.convert.folders import IN_MLX, write_decilm, write_hf, write_mlx
from nbl_export.convert.gguf import (
    QUANTIZED,
    check_stored,
    fields_of,
    fields_of_gguf,
    matrices_of,
    write_gguf,
)
from nbl_export.convert.openvino import write_openvino
from nbl_export.errors import MissingDependencyError
from nbl_export.files import TEMPORARY, atomic_path, write_json
from nbl_export.graph.precision import precision_of
from nbl_export.linearize.fits import without_bias
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.models.load import LoadedModel
from nbl_export.packages import missing, part
from nbl_export.progress import Listener
from nbl_export.records import MODEL, Check, to_json
from nbl_export.report.assemble import conversions_in, kept_conversion, stage_of
from nbl_export.report.schema import Conversion
from nbl_export.runtime.clients import (
    TOKENIZERS,
    LlamaCppStream,
    MlxStream,
    OpenVinoStream,
    quantize,
    require_llama_cpp,
    require_mlx,
    require_openvino,
    tokenize,
)
from nbl_export.runtime.stream import Stream
from nbl_export.runtime.torch import TransformersStream
from nbl_export.settings import VerifySettings
from nbl_export.settings.graphs import GGUF_TYPES, ConvertSettings
from nbl_export.stages.inspection import update_report
from nbl_export.stages.run import Run, opened
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.engines import check_gguf, check_tokens, measure_converted
from nbl_export.verify.loss import measure_method_loss
from nbl_export.workspace import Workspace


def convert(
    out: str | Path | Run,
    settings: ConvertSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Conversion:
    """Write the plan in the form of another engine, and prove it there. A failed gate is in the value (``passed``)."""
    with opened(out, settings or ConvertSettings(), listener, trust_remote_code, rehash) as (run, asked):
        ws, to, precision = run.workspace, asked.to, asked.precision
        form, place, kept = FORMS[to], place_of(ws, to, precision), ws.conversion(to, precision)
        made_of = {"select": ws.require("select").result, MODEL: run.model.source.model}
        here, stage = form.is_here(), stage_of(to, precision)
        if form.needed(precision) and not here:
            raise missing(form.package, f"--to {to} --precision {precision}")
        before = ws.current(stage)
        # Once the engine is here, what was not proven is; what was proven stays so where the engine is no more.
        proven = here or (before is not None and bool(before.settings.get("proven")))
        with run.stage(stage, asked.as_json() | {"proven": proven}, made_of) as work:
            if work:
                plan = form.adapted(ws, load_plan(ws.plan))
                files = form.write(run.model, place, plan, precision, work)
                checks, parity = form.stored(place, plan), None
                if here:
                    text, model = load_text(ws.text), run.model.in_dtype("float32")
                    case = DecoderCase(model, plan, ws.baseline, ws.model, VerifySettings(), work, text)
                    with unmodified_form(run, to, precision, plan, work) as unmodified:
                        check, parity = measure_converted(
                            case, place, precision, form.engine, form.open, unmodified
                        )
                    checks += [check, *form.more(case, place, run.model, ws)]
                else:
                    said = f"{form.engine} is not here: {part(form.package).pip}"
                    checks.append(Check("parity", "skipped", said))
                size = sum(path.stat().st_size for path in files)
                where, layers = place.relative_to(ws.root).as_posix(), tuple(map(str, plan.blocks))
                write_json(kept, to_json(Conversion(where, size, layers, tuple(checks), parity)))
                work.files = [*files, kept]
        update_report(ws, forms=conversions_in(ws, current=True))
        return kept_conversion(ws, to, precision)


@contextmanager
def unmodified_form(
    run: Run, to: str, precision: str, plan: Plan, listener: Listener
) -> Iterator[Callable[[], Path]]:
    """What writes the model without linear layers beside its form, which is gone afterwards."""
    place = place_of(run.workspace, to, precision)
    beside = place.with_name(f".unmodified.{precision}{TEMPORARY}")

    def written() -> Path:
        FORMS[to].write(run.model, beside, plan.without_layers(), precision, listener)
        return beside

    try:
        yield written
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)


Write = Callable[[LoadedModel, Path, Plan, str, Listener], list[Path]]


@dataclass(frozen=True)
class Form:
    """A form of a model for an ``engine``, which comes with a ``package``; ``require`` raises without it.

    ``write`` writes a model with a plan in a precision; it refuses what the form cannot hold before it writes. ``open``
    opens it there, for so many rows of so many tokens. ``needed`` says in which precisions the engine writes it.
    ``adapted`` is the plan as the form can hold it, which is what its engine is compared with; ``stored`` is found of
    it without the engine, ``more`` in it beside parity.
    """

    engine: str
    package: str
    require: Callable[[], object]
    write: Write
    open: Callable[[Path, int, int], AbstractContextManager[Stream]]
    needed: Callable[[str], bool] = lambda _precision: False
    adapted: Callable[[Workspace, Plan], Plan] = lambda _ws, plan: plan
    stored: Callable[[Path, Plan], list[Check]] = lambda _place, _plan: []
    more: Callable[[DecoderCase, Path, LoadedModel, Workspace], list[Check]] = lambda *_: []

    def is_here(self) -> bool:
        """Whether its engine is, and loads."""
        with suppress(MissingDependencyError, OSError):
            self.require()
            return True
        return False


def place_of(ws: Workspace, to: str, precision: str) -> Path:
    """The file or folder of a form."""
    return ws.gguf(GGUF_TYPES[precision]) if to == "gguf" else ws.converted(to, precision)


def _folder(write: Callable[[Path, Any, Plan, Any, str, Listener], list[Path]]) -> Write:
    return lambda model, place, plan, precision, listener: write(
        place, model.model, plan, model.tokenizer, precision_of(precision).gates, listener
    )


def _gguf(model: LoadedModel, place: Path, plan: Plan, precision: str, listener: Listener) -> list[Path]:
    source, kind = model.source, GGUF_TYPES[precision]
    if source.gguf_file is not None:
        tokenizer = fields_of_gguf(Path(source.path) / source.gguf_file)
    else:
        tokenizer = fields_of(model.tokenizer, int(model.model.config.vocab_size))  # type: ignore[union-attr, arg-type]
    place.parent.mkdir(exist_ok=True)
    if kind not in QUANTIZED:
        write_gguf(place, model.model, plan, tokenizer, kind, listener)
        return [place]
    whole = place.with_name(f".float32{TEMPORARY}")
    try:
        write_gguf(whole, model.model, plan, tokenizer, "F32", listener)
        with listener.task(f"Quantizing to {kind}", 1, "file") as task, atomic_path(place) as temporary:
            quantize(whole, temporary, kind, matrices_of(plan))
            task.advance(1)
    finally:
        whole.unlink(missing_ok=True)
    return [place]


def _loss_without_b(case: DecoderCase, _place: Path, _model: LoadedModel, ws: Workspace) -> list[Check]:
    text = case.text
    with_b, without = (
        measure_method_loss(case.model, plan, text.heldout, text.heldout_document, case.listener)
        for plan in (load_plan(ws.plan), case.plan)
    )
    said = (
        f"perplexity ratio {without.perplexity_ratio:.4f} (± {without.perplexity_ratio_se:.4f}), with b "
        f"{with_b.perplexity_ratio:.4f}, on {without.tokens:,} held-out tokens"
    )
    return [Check("without b", "passed", said)]


def _openvino_tokens(case: DecoderCase, place: Path, model: LoadedModel, _ws: Workspace) -> list[Check]:
    if not (place / TOKENIZERS[0]).exists():
        return [Check("tokens", "skipped", "it has no tokenizer of OpenVINO's: give it token ids")]
    return [check_tokens(case, model.tokenizer, partial(tokenize, place), "OpenVINO")]


FORMS = {
    "gguf": Form(
        "llama.cpp",
        "llama-cpp-py-sync",
        require_llama_cpp,
        _gguf,
        LlamaCppStream,
        needed=lambda precision: GGUF_TYPES[precision] in QUANTIZED,
        stored=lambda place, plan: [check_stored(place, plan)],
        more=lambda case, place, model, _ws: [*check_gguf(case, place, model.tokenizer)],
    ),
    "mlx": Form(
        "mlx-lm", "mlx-lm", require_mlx, _folder(write_mlx), lambda place, *_: nullcontext(MlxStream(place))
    ),
    "hf": Form(
        "transformers",
        "transformers",
        lambda: None,  # without it nothing could have been calibrated
        _folder(write_hf),
        lambda place, *_: nullcontext(TransformersStream(place)),
    ),
    "openvino": Form(
        "OpenVINO",
        "openvino",
        require_openvino,
        _folder(write_openvino),
        lambda place, *_: nullcontext(OpenVinoStream(place)),
        needed=lambda _precision: True,
        more=_openvino_tokens,
    ),
    # Without any b, whose mean W has taken in.
    "decilm": Form(
        "mlx-lm",
        "mlx-lm",
        require_mlx,
        _folder(write_decilm),
        lambda place, *_: nullcontext(MlxStream(place, IN_MLX)),
        adapted=lambda ws, plan: without_bias(plan, load_moments(ws.moments)[0]),
        more=_loss_without_b,
    ),
}
