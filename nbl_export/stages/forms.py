"""The forms of other engines: who writes each, and who opens it there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nbl_export.errors import MissingDependencyError
from nbl_export.files import TEMPORARY, atomic_path
from nbl_export.linearize.plan import Plan
from nbl_export.packages import missing
from nbl_export.progress import Listener
from nbl_export.records import Check
from nbl_export.settings.graphs import GGUF_TYPES
from nbl_export.stages.run import Run

if TYPE_CHECKING:
    from nbl_export.runtime.stream import Stream
    from nbl_export.verify.case import DecoderCase


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

    def adapted(self, plan: Plan) -> Plan:
        """The plan as the form can hold it, which is what its engine is compared with."""
        return plan

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
        from nbl_export.convert.gguf import QUANTIZED, fields_of, fields_of_gguf, matrices_of, write_gguf
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
        from nbl_export.convert.gguf import check_stored

        return (check_stored(place, plan),)

    @staticmethod
    def require() -> object:
        from nbl_export.runtime.llama_cpp import require_llama_cpp

        return require_llama_cpp()

    def opened(self, place: Path, rows: int, length: int) -> AbstractContextManager[Stream]:
        from nbl_export.runtime.llama_cpp import LlamaCppStream

        return LlamaCppStream(place, rows, length)

    def more(self, case: DecoderCase) -> tuple[Check, ...]:
        from nbl_export.verify.engines import check_gguf

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
        from nbl_export.runtime.rows import require_mlx

        return require_mlx()

    def opened(self, place: Path, rows: int, length: int) -> AbstractContextManager[Stream]:
        from nbl_export.runtime.rows import MlxStream

        return nullcontext(MlxStream(place))


class DeciLm(Mlx):
    """A folder for what reads DeciLM, as TensorRT-LLM: without any b, whose mean W has taken in."""

    name = "decilm"

    def check_held(self, plan: Plan) -> None:
        from nbl_export.convert.mlx import check_held_by_decilm as check_held

        check_held(self.run.model.model, plan)

    def adapted(self, plan: Plan) -> Plan:
        from nbl_export.calibrate.moments import load_moments
        from nbl_export.linearize.fits import without_bias

        return without_bias(plan, load_moments(self.run.workspace.moments)[0])

    @property
    def writer(self) -> Callable[..., list[Path]]:
        from nbl_export.convert.mlx import write_decilm

        return write_decilm

    def opened(self, place: Path, rows: int, length: int) -> AbstractContextManager[Stream]:
        from nbl_export.convert.mlx import IN_MLX
        from nbl_export.runtime.rows import MlxStream

        return nullcontext(MlxStream(place, IN_MLX))

    def more(self, case: DecoderCase) -> tuple[Check, ...]:
        from nbl_export.linearize.plan import load_plan
        from nbl_export.verify.loss import measure_method_loss

        text = case.text
        with_b, without = (
            measure_method_loss(case.model, plan, text.heldout, text.heldout_document, case.listener)
            for plan in (load_plan(self.run.workspace.plan), case.plan)
        )
        return (
            Check(
                "without b",
                "passed",
                f"perplexity ratio {without.perplexity_ratio:.4f} (± {without.perplexity_ratio_se:.4f}), with b "
                f"{with_b.perplexity_ratio:.4f}, on {without.tokens:,} held-out tokens",
            ),
        )


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
        from nbl_export.runtime.rows import TransformersStream

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
        from nbl_export.verify.engines import check_tokens

        if not (self.place / TOKENIZERS[0]).exists():
            return (Check("tokens", "skipped", "it has no tokenizer of OpenVINO's: give it token ids"),)
        tokenizer = self.run.model.tokenizer
        return (check_tokens(case, tokenizer, partial(tokenize, self.place), self.engine),)


FORMS: dict[str, type[Form]] = {"gguf": Gguf, "mlx": Mlx, "hf": Hf, "openvino": OpenVino, "decilm": DeciLm}
