"""Model + plan → the form of another engine, proven in that engine where it is installed."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nbl_export.checks import Check
from nbl_export.errors import MissingDependencyError
from nbl_export.files import TEMPORARY, atomic_path, write_json
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.parts import missing, part
from nbl_export.progress import Listener
from nbl_export.records import to_json
from nbl_export.report.forms import Conversion, conversions_in, kept_conversion, stage_of
from nbl_export.report.schema import load_report
from nbl_export.settings import VerifySettings
from nbl_export.settings.converting import GGUF_TYPES, ConvertSettings
from nbl_export.stage_record import MODEL
from nbl_export.stages.run import Run
from nbl_export.stages.verify import finish_drawing, redrawn
from nbl_export.verify.parity.figures import Parity

if TYPE_CHECKING:
    from nbl_export.runtime.stream import Stream
    from nbl_export.verify.case import DecoderCase
    from nbl_export.workspace import Workspace


@dataclass(frozen=True)
class Form(ABC):
    """A form of the model of a ``run`` in one ``precision``; its ``engine`` comes with a ``package``."""

    run: Run
    precision: str
    engine: ClassVar[str]
    package: ClassVar[str]

    @property
    @abstractmethod
    def place(self) -> Path:
        """Its file or folder."""

    def check_engine(self) -> None:
        """Raise :class:`.MissingDependencyError` if it cannot be written without its engine, which is not here."""
        if not self.written_without:
            raise missing(self.package, self.needing)

    @property
    def written_without(self) -> bool:
        """Whether it can be written where its engine is not."""
        return True

    @property
    def needing(self) -> str:
        """What was asked that needs the engine for its writing."""
        return f"--precision {self.precision}"

    @abstractmethod
    def check_held(self, plan: Plan) -> None:
        """Raise :class:`.InputError` for a model or a plan that it cannot hold."""

    @abstractmethod
    def write(self, place: Path, plan: Plan, listener: Listener) -> list[Path]:
        """Write it; returns its files."""

    def stored(self, place: Path, plan: Plan) -> tuple[Check, ...]:
        """What is found of it without the engine."""
        return ()

    @staticmethod
    @abstractmethod
    def require() -> object:
        """Raise :class:`.MissingDependencyError` without its engine."""

    @classmethod
    def is_here(cls) -> bool:
        """Whether its engine is, and loads."""
        with suppress(MissingDependencyError, OSError):
            cls.require()
            return True
        return False

    @abstractmethod
    def opened(self, place: Path, rows: int, length: int) -> AbstractContextManager[Stream]:
        """It in its engine, for so many rows of so many tokens."""

    def more(self, case: DecoderCase) -> tuple[Check, ...]:
        """What else is found of it in its engine."""
        return ()


class Gguf(Form):
    """A GGUF file for llama.cpp."""

    engine, package = "llama.cpp", "llama-cpp-py-sync"

    @property
    def _kind(self) -> str:
        return GGUF_TYPES[self.precision]

    @property
    def place(self) -> Path:
        return self.run.workspace.gguf(self._kind)

    @property
    def written_without(self) -> bool:
        from nbl_export.convert.gguf import QUANTIZED

        return self._kind not in QUANTIZED or self.is_here()

    def check_held(self, plan: Plan) -> None:
        from nbl_export.convert.llama import check_like_llama

        check_like_llama(self.run.model.model, plan, self.engine)

    def write(self, place: Path, plan: Plan, listener: Listener) -> list[Path]:
        from nbl_export.convert.gguf import QUANTIZED, matrices_of, write_gguf
        from nbl_export.convert.gguf_tokenizer import fields_of, fields_of_gguf
        from nbl_export.runtime.llama_cpp import quantize

        source, model = self.run.model.source, self.run.model.model
        if source.gguf_file is not None:
            tokenizer = fields_of_gguf(Path(source.path) / source.gguf_file)
        else:
            config: Any = model.config
            tokenizer = fields_of(self.run.model.tokenizer, int(config.vocab_size))
        place.parent.mkdir(exist_ok=True)
        if self._kind not in QUANTIZED:
            write_gguf(place, model, plan, tokenizer, self._kind, listener)
            return [place]
        whole = place.with_name(f".float32{TEMPORARY}")
        try:
            write_gguf(whole, model, plan, tokenizer, "F32", listener)
            with (
                listener.task(f"Quantizing to {self._kind}", 1, "file") as task,
                atomic_path(place) as temporary,
            ):
                quantize(whole, temporary, self._kind, matrices_of(plan))
                task.advance(1)
        finally:
            whole.unlink(missing_ok=True)
        return [place]

    def stored(self, place: Path, plan: Plan) -> tuple[Check, ...]:
        from nbl_export.convert.stored import check_stored

        return (check_stored(place, plan),)

    @staticmethod
    def require() -> object:
        from nbl_export.runtime.llama_cpp import require_llama_cpp

        return require_llama_cpp()

    def opened(self, place: Path, rows: int, length: int) -> AbstractContextManager[Stream]:
        from nbl_export.runtime.llama_cpp import LlamaCppStream

        return LlamaCppStream(place, rows, length)

    def more(self, case: DecoderCase) -> tuple[Check, ...]:
        from nbl_export.verify.llama_cpp import check_gguf

        return check_gguf(case, self.place, self.run.model.tokenizer)


class Folder(Form):
    """A folder of weights in a dtype of torch, with a tokenizer; ``name`` is the form's."""

    name: ClassVar[str]

    @property
    def place(self) -> Path:
        return self.run.workspace.converted(self.name, self.precision)

    @property
    @abstractmethod
    def writer(self) -> Callable[..., list[Path]]:
        """What writes it: a function like :func:`nbl_export.convert.hf.write_hf`."""

    def write(self, place: Path, plan: Plan, listener: Listener) -> list[Path]:
        from nbl_export.graph.precision import precision_of

        model, dtype = self.run.model, precision_of(self.precision).gates
        return self.writer(place, model.model, plan, model.tokenizer, dtype, listener)


class Mlx(Folder):
    """A folder for mlx-lm."""

    name, engine, package = "mlx", "mlx-lm", "mlx-lm"

    def check_held(self, plan: Plan) -> None:
        from nbl_export.convert.mlx import check_held

        check_held(self.run.model.model, plan)

    @property
    def writer(self) -> Callable[..., list[Path]]:
        from nbl_export.convert.mlx import write_mlx

        return write_mlx

    @staticmethod
    def require() -> object:
        from nbl_export.runtime.mlx import require_mlx

        return require_mlx()

    def opened(self, place: Path, rows: int, length: int) -> AbstractContextManager[Stream]:
        from nbl_export.runtime.mlx import MlxStream

        return nullcontext(MlxStream(place))


class Hf(Folder):
    """A folder for transformers."""

    name, engine, package = "hf", "transformers", "transformers"

    def check_held(self, plan: Plan) -> None:
        from nbl_export.convert.hf import check_held

        check_held(self.run.model.model, plan)

    @property
    def writer(self) -> Callable[..., list[Path]]:
        from nbl_export.convert.hf import write_hf

        return write_hf

    @staticmethod
    def require() -> None:
        """Without it nothing could have been calibrated."""

    def opened(self, place: Path, rows: int, length: int) -> AbstractContextManager[Stream]:
        from nbl_export.runtime.transformers import TransformersStream

        return nullcontext(TransformersStream(place))


class OpenVino(Folder):
    """A folder for openvino-genai."""

    name, engine, package = "openvino", "OpenVINO", "openvino"

    @property
    def written_without(self) -> bool:
        return self.is_here()  # its own writer makes the file

    @property
    def needing(self) -> str:
        return "--to openvino"

    def check_held(self, plan: Plan) -> None:
        from nbl_export.convert.openvino import check_held

        check_held(self.run.model.model)

    @property
    def writer(self) -> Callable[..., list[Path]]:
        from nbl_export.convert.openvino import write_openvino

        return write_openvino

    @staticmethod
    def require() -> object:
        from nbl_export.runtime.openvino import require_openvino

        return require_openvino()

    def opened(self, place: Path, rows: int, length: int) -> AbstractContextManager[Stream]:
        from nbl_export.runtime.openvino import OpenVinoStream

        return nullcontext(OpenVinoStream(place))

    def more(self, case: DecoderCase) -> tuple[Check, ...]:
        from nbl_export.runtime.openvino import TOKENIZERS, tokenize
        from nbl_export.verify.converted import check_tokens

        if not (self.place / TOKENIZERS[0]).exists():
            return (Check("tokens", "skipped", "it has no tokenizer of OpenVINO's: give it token ids"),)
        tokenizer = self.run.model.tokenizer
        return (check_tokens(case, tokenizer, partial(tokenize, self.place), self.engine),)


FORMS: dict[str, type[Form]] = {"gguf": Gguf, "mlx": Mlx, "hf": Hf, "openvino": OpenVino}


def convert(run: Run, settings: ConvertSettings) -> Conversion:
    """The model with the plan of the folder in the form of another engine, and what that computes with it.

    A gate that fails is in the value, not an exception.
    """
    ws = run.workspace
    selected = ws.require("select")
    made_of = {"select": selected.result, MODEL: run.model.source.model}
    form = FORMS[settings.to](run, settings.precision)
    kept = ws.conversion(settings.to, settings.precision)
    form.check_engine()

    def work(listener: Listener) -> list[Path]:
        plan = load_plan(ws.plan)
        form.check_held(plan)
        files = form.write(form.place, plan, listener)
        proven, parity = _verified(form, plan, listener)
        found = Conversion(
            form.place.relative_to(ws.root).as_posix(),
            sum(path.stat().st_size for path in files),
            tuple(map(str, plan.blocks)),
            (*form.stored(form.place, plan), *proven),
            parity,
        )
        write_json(kept, to_json(found))
        return [*files, kept]

    # Once the engine is here, what was not proven is.
    stage = stage_of(settings.to, settings.precision)
    run.stage(stage, settings.as_json() | {"proven": form.is_here()}, made_of, work)
    _add_to_report(ws)
    return kept_conversion(ws, settings.to, settings.precision)


def _add_to_report(ws: Workspace) -> None:
    """Give the report of the same plan what was found of each form, if there is a report."""
    finish_drawing(ws)
    if ws.current("verify") is None:
        return
    report = load_report(ws.report / "report.json")
    if report.forms != (forms := conversions_in(ws, current=True)):
        redrawn(ws, replace(report, forms=forms))


def _verified(form: Form, plan: Plan, listener: Listener) -> tuple[tuple[Check, ...], Parity | None]:
    from nbl_export.calibrate.text import load_text
    from nbl_export.verify.case import DecoderCase
    from nbl_export.verify.converted import measure_converted

    if not form.is_here():
        return (Check("parity", "skipped", f"{form.engine} is not here: {part(form.package).pip}"),), None
    run, ws = form.run, form.run.workspace
    text = load_text(ws.text)
    case = DecoderCase(run.model.in_float32, plan, ws.baseline, ws.model, VerifySettings(), listener, text)
    with unmodified_form(form, plan, listener) as unmodified:
        checks, parity = measure_converted(
            case, form.place, form.precision, form.engine, form.opened, unmodified
        )
    return (*checks, *form.more(case)), parity


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
