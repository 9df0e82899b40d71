"""Model + plan → the form of another engine, proven in that engine where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.files import TEMPORARY, write_json
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.packages import part
from nbl_export.progress import Listener
from nbl_export.records import Check, to_json
from nbl_export.report.assemble import conversions_in, kept_conversion, stage_of
from nbl_export.report.schema import Conversion
from nbl_export.settings import VerifySettings
from nbl_export.settings.graphs import ConvertSettings
from nbl_export.stage_record import MODEL
from nbl_export.stages.forms import FORMS, Form
from nbl_export.stages.run import Run, opened, update_report
from nbl_export.verify.parity.figures import Parity

if TYPE_CHECKING:
    pass


def convert(
    out: str | Path | Run,
    settings: ConvertSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Conversion:
    """Write the plan in the form of another engine, and prove it there. A failed gate is in the value (``passed``)."""
    asked = settings or ConvertSettings()
    with opened(out, asked, listener, trust_remote_code, rehash) as (run, resolved):
        return _convert(run, resolved)


def _convert(run: Run, settings: ConvertSettings) -> Conversion:
    ws = run.workspace
    selected = ws.require("select")
    made_of = {"select": selected.result, MODEL: run.model.source.model}
    form = FORMS[settings.to](run, settings.precision)
    kept = ws.conversion(settings.to, settings.precision)
    form.check_engine()

    stage = stage_of(settings.to, settings.precision)
    before = ws.current(stage)
    # Once the engine is here, what was not proven is; what was proven stays so where the engine is no more.
    proven = form.is_here() or (before is not None and bool(before.settings.get("proven")))
    with run.stage(stage, settings.as_json() | {"proven": proven}, made_of) as work:
        if work:
            own = load_plan(ws.plan)
            form.check_held(own)
            plan = form.adapted(own)
            files = form.write(form.place, plan, work)
            checks, parity = _verified(form, plan, work)
            found = Conversion(
                form.place.relative_to(ws.root).as_posix(),
                sum(path.stat().st_size for path in files),
                tuple(map(str, plan.blocks)),
                (*form.stored(form.place, plan), *checks),
                parity,
            )
            write_json(kept, to_json(found))
            work.files = [*files, kept]
    update_report(ws, forms=conversions_in(ws, current=True))
    return kept_conversion(ws, settings.to, settings.precision)


def _verified(form: Form, plan: Plan, listener: Listener) -> tuple[tuple[Check, ...], Parity | None]:
    from nbl_export.calibrate.text import load_text
    from nbl_export.verify.case import DecoderCase
    from nbl_export.verify.engines import measure_converted

    if not form.is_here():
        return (Check("parity", "skipped", f"{form.engine} is not here: {part(form.package).pip}"),), None
    run, ws = form.run, form.run.workspace
    text = load_text(ws.text)
    case = DecoderCase(run.model.in_float32, plan, ws.baseline, ws.model, VerifySettings(), listener, text)
    with unmodified_form(form, plan, listener) as unmodified:
        check, parity = measure_converted(
            case, form.place, form.precision, form.engine, form.opened, unmodified
        )
    return (check, *form.more(case)), parity


@contextmanager
def unmodified_form(form: Form, plan: Plan, listener: Listener) -> Iterator[Callable[[], Path]]:
    """What writes the model without linear layers beside the form, which is gone afterwards."""
    beside = form.place.with_name(f".unmodified.{form.precision}{TEMPORARY}")

    def written() -> Path:
        form.write(beside, plan.without_layers(), listener)
        return beside

    try:
        yield written
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        beside.unlink(missing_ok=True)
