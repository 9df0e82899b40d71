"""Define the settings of the stages that make graphs, engines and other forms: export, build, convert."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from nbl_export.errors import InputError
from nbl_export.settings import choices
from nbl_export.settings.definition import (
    AUTO,
    GRAPH,
    MORE,
    Must,
    Settings,
    Task,
    one_of,
    options,
    refuse,
    setting,
)

_NO_PROGRAM = Must(lambda _: False, "names a program to run: say it on the command line", of_file=True)


@options
@dataclass(frozen=True)
class ExportSettings(Settings):
    """Who exports the graph, its precision, and how it keeps its KV cache; None is what suits target, task and engines.

    target: What is fastest on onnxruntime, genai, tensorrt, optimum or web.
    precision: fp32, fp16, bf16; int4, int8 for onnxruntime.
    kv_cache: concat, shared (onnxruntime alone), static, none.
    exporter: torch, genai (its model builder) or optimum.
    inputs: What the decoder reads: ids (token ids), or embeds (their embeddings, among which those of images can be;
        the embedding is then a graph of its own).
    exporter_python: Python of the environment that has optimum-onnx.
    opset: ONNX opset of the graph, for engines that do not know the newest: from 18 on. Before 23, norms, rotary
        embeddings and attention are basic operators.
    """

    unrecorded = ("target",)  # which is what the others say

    precision: str | None = setting(None, GRAPH, shown="fp32; fp16 with --trt", offered=choices.PRECISIONS)
    kv_cache: str | None = setting(None, GRAPH, shown="by target", offered=choices.CACHES)
    exporter: str | None = setting(None, GRAPH, one_of(choices.EXPORTERS), shown="torch")
    inputs: Literal["ids", "embeds"] = setting("ids", MORE, metavar="ids|embeds")
    exporter_python: str | None = setting(
        None, MORE, _NO_PROGRAM, metavar="PATH", shown="$NBL_EXPORT_OPTIMUM_PYTHON"
    )

    # After the others, which are given by their place, too.
    target: str | None = setting(None, GRAPH, one_of(choices.TARGETS))
    opset: int | None = setting(None, MORE, shown="23; 24 with a static cache")

    @property
    def offered(self) -> choices.Choices:
        return choices.EXPORTERS[self.exported_by]

    @property
    def exported_by(self) -> str:
        """The exporter that was asked for, or suits the target."""
        return self.exporter or self._suits(engines=False).exporter

    def check(self) -> None:
        super().check()
        choices.check_offered(self.exported_by, "--precision", self.precision, self.offered.precisions)
        choices.check_offered(self.exported_by, "--kv-cache", self.kv_cache, self.offered.caches)
        other = self.exported_by != "torch"
        rest = f"is for --exporter torch, not for {self.exported_by}: leave one of them out."
        refuse(
            (other and self.embeds, f"--inputs embeds {rest}"),
            (other and self.opset is not None, f"--opset {rest}"),
        )

    @property
    def embeds(self) -> bool:
        """Whether the decoder reads embeddings."""
        return self.inputs == "embeds"

    @property
    def quantized(self) -> bool:
        """Whether weights are integers."""
        return self.precision in choices.QUANTIZED

    def reads_calibration(self, task: Task) -> bool:
        """Whether calibration is needed: it gives the ranges for float16, and the inputs of an encoder."""
        return not task.causal or (self.exported_by == "torch" and self.precision == "fp16")

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"exporter": self.exported_by}

    @property
    def experts(self) -> str | None:
        """The form of a mixture's experts that suits the target; None for that of the cache."""
        return choices.TARGETS[self.target].experts if self.target else None

    def _suits(self, engines: bool) -> choices.Target:
        return choices.TARGETS[self.target or "tensorrt"] if self.target or engines else choices.ANYWHERE

    def _of_target(self, engines: bool) -> ExportSettings:
        """With what suits the target where nothing was asked for; engines without a target are one themselves."""
        suits, offered = self._suits(engines), self.offered
        precision = suits.precision if suits.precision in offered.precisions else offered.precisions[0]
        cache = suits.cache if suits.cache in offered.caches else offered.caches[0]
        return replace(
            self,
            exporter=self.exported_by,
            precision=self.precision or precision,
            kv_cache=self.kv_cache or cache,
            target=self.target or ("tensorrt" if engines else None),
        )

    def resolve(self, task: Task, engines: bool = False) -> ExportSettings:
        """With exporter, precision and cache for ``task`` and target; ``engines`` where some are to be built."""
        resolved = self._of_target(engines)
        if not task.causal:
            self._check_encoder(task, engines)
            resolved = replace(resolved, kv_cache="none")
        if self.opset is not None:
            choices.check_opset(self.opset, str(resolved.kv_cache))
        return resolved

    def _check_encoder(self, task: Task, engines: bool) -> None:
        """Raise :class:`InputError` for what is for decoders alone."""
        asked = {
            "--inputs embeds": self.embeds,
            self._asked_exporter: self.exported_by != "torch",
            f"--kv-cache {self.kv_cache}": self.kv_cache not in (None, "none"),
            f"--precision {self.precision}": self.quantized,
            "--trt": engines,
        }
        rest = f" is for decoders; this model is an encoder ({task.name}): leave it out."
        refuse(*((given, name + rest) for name, given in asked.items()))

    def check_tensorrt(self) -> None:
        """Raise :class:`InputError` if TensorRT does not take the graphs that these settings make."""
        refuse(
            (
                self.embeds,
                "Engines are built of decoders that read token ids: leave --inputs embeds or --trt out.",
            ),
            (
                self.quantized,
                f"Weights of --precision {self.precision} are for onnxruntime's own operators, which TensorRT does not "
                "take: use --precision fp16 or bf16.",
            ),
        )
        if self._of_target(engines=True).kv_cache in self.offered.fused:
            cache = f"--kv-cache {self.kv_cache}" if self.kv_cache else f"--target {self.target}"
            whose = cache if self.exported_by == "torch" else self._asked_exporter
            raise InputError(
                f"TensorRT does not take the graphs of {whose}: their operators, such as GroupQueryAttention, are "
                "onnxruntime's own. Build engines with --exporter torch and --kv-cache static or concat."
            )

    @property
    def _asked_exporter(self) -> str:
        return f"--exporter {self.exporter}" if self.exporter else f"--target {self.target}"


@options
@dataclass(frozen=True)
class FolderSettings(Settings):
    """What stays in the output folder of a run.

    keep_baseline: Keep the unmodified graph. no: delete it once verified.
    """

    keep_baseline: Literal["yes", "no"] = setting("yes", GRAPH, metavar="yes|no")

    @property
    def keeps(self) -> bool:
        return self.keep_baseline == "yes"


def _library(default: str | None) -> Any:
    known = choices.LIBRARIES
    return setting(default, GRAPH, one_of(known), metavar="|".join(known), key="trt")


@options
@dataclass(frozen=True)
class EngineSettings(Settings):
    """Which TensorRT builds the engines, for which shapes and which GPUs; None and () are the usual ones.

    library: Build engines by tensorrt (on this GPU), rtx (no GPU needed), auto.
    max_batch: Largest batch of the engines.
    max_seq: Most tokens in one prefill of the engines, as far as the model goes.
    max_context: Most tokens of context of the engines, as far as the model goes.
    sm: Compute capabilities to build for with rtx: 86,89.
    """

    of_decoders = "TensorRT engines are built of decoders only"
    instead = "use its ONNX graph"

    library: str = _library(AUTO)
    max_batch: int = setting(4, MORE)
    max_seq: int | None = setting(None, MORE, shown=str(choices.MAX_SEQ))
    max_context: int | None = setting(None, MORE, shown=str(choices.MAX_CONTEXT))
    sm: tuple[str, ...] = setting((), MORE, shown="all from 80 on")


@options
@dataclass(frozen=True)
class OptionalEngines(EngineSettings):
    __doc__ = EngineSettings.__doc__  # the same, but only where a library is named
    library: str | None = _library(None)  # type: ignore[assignment]

    @property
    def asked(self) -> EngineSettings | None:
        return EngineSettings(**asdict(self)) if self.library else None


# Each precision by the name that llama.cpp has for it.
GGUF_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_k_m": "Q4_K_M"}
_HALVES = ("fp32", "fp16", "bf16")
# What each form can have. OpenVINO's own writer shortens weights to float16 alone.
PRECISIONS = {
    "gguf": tuple(GGUF_TYPES),
    "mlx": _HALVES,
    "hf": _HALVES,
    "openvino": ("fp32", "fp16"),
    "decilm": _HALVES,
}


@options
@dataclass(frozen=True)
class ConvertSettings(Settings):
    """Which form, and how its weights are stored.

    to: The form: gguf (a file for llama.cpp), mlx (a folder for mlx-lm), hf (a folder for transformers), openvino (a
        folder for openvino-genai), decilm (a folder for TensorRT-LLM, without b).
    precision: fp32, fp16, bf16; gguf: q8_0 (8 bits, a scale for each 32 weights), q4_k_m (by llama.cpp).
    """

    of_decoders = "Other engines' forms are of decoders"
    instead = "use its ONNX graph"

    to: Literal["gguf", "mlx", "hf", "openvino", "decilm"] = setting(
        "gguf", GRAPH, metavar="|".join(PRECISIONS)
    )
    precision: Literal["fp32", "fp16", "bf16", "q8_0", "q4_k_m"] = setting("fp16", GRAPH)

    def check(self) -> None:
        super().check()
        if self.precision not in (offered := PRECISIONS[self.to]):
            able = " or ".join(
                form for form, precisions in PRECISIONS.items() if self.precision in precisions
            )
            raise InputError(
                f"--precision {self.precision} is of --to {able}, not of --to {self.to}: choose "
                f"{' or '.join(offered)}, and quantize with the engine's own."
            )
