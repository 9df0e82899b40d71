"""Model + plan → the form of another engine, proven in that engine where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nbl_export.files import TEMPORARY, write_json
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.packages import missing, part
from nbl_export.progress import Listener
from nbl_export.records import MODEL, Check, to_json
from nbl_export.report.assemble import conversions_in, kept_conversion, stage_of
from nbl_export.report.schema import Conversion
from nbl_export.settings import VerifySettings
from nbl_export.settings.graphs import ConvertSettings
from nbl_export.stages.inspection import update_report
from nbl_export.stages.run import Run, opened


def convert(
    out: str | Path | Run,
    settings: ConvertSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Conversion:
    """Write the plan in the form of another engine, and prove it there. A failed gate is in the value (``passed``)."""
    from nbl_export.calibrate.text import load_text
    from nbl_export.stages.forms import FORMS, place_of
    from nbl_export.verify.case import DecoderCase
    from nbl_export.verify.engines import measure_converted

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
    from nbl_export.stages.forms import FORMS, place_of

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
