"""The packages that nbl-export uses, as data: what each is for, and what brings it.

The version of each stands in ``pyproject.toml`` alone, and so does what else an extra brings.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbl_export.errors import MissingDependencyError, first_line
from nbl_export.installed import pip_command, pip_line

ALWAYS = ""  # in place of an extra: whoever installs nbl-export has it


@dataclass(frozen=True)
class Part:
    """A ``package`` by its name on the index, the ``module`` that shows whether it can be used, and what it is for.

    ``extra`` of this package brings it: :data:`ALWAYS` for what is there without one, None for what no extra has.
    """

    package: str
    module: str
    extra: str | None
    use: str

    @property
    def pip(self) -> str:
        """The command that installs it."""
        if self.extra is None:
            return f"{pip_command('install')} {self.package}"
        return pip_line(self.extra) if self.extra else pip_line()


PARTS = (
    Part("torch", "torch", ALWAYS, "runs and exports models"),
    Part("transformers", "transformers.modeling_utils", ALWAYS, "the models' code"),
    Part("onnx", "onnx", ALWAYS, "checks graphs"),
    Part("onnx-ir", "onnx_ir", ALWAYS, "reads, rewrites and writes graphs"),
    Part("onnxscript", "onnxscript", ALWAYS, "the exporter of torch"),
    Part("safetensors", "safetensors", ALWAYS, "weights, moments, plans"),
    Part("gguf", "gguf", ALWAYS, "GGUF files"),
    Part("accelerate", "accelerate", ALWAYS, "models whose weights are not in memory"),
    Part("numpy", "numpy", ALWAYS, "arrays"),
    Part("scipy", "scipy.linalg", ALWAYS, "fits W and b"),
    Part("ml-dtypes", "ml_dtypes", ALWAYS, "bfloat16 in arrays"),
    Part("cattrs", "cattrs", ALWAYS, "records"),
    Part("psutil", "psutil", ALWAYS, "memory of this machine"),
    Part("packaging", "packaging.requirements", ALWAYS, "versions of packages"),
    Part("cyclopts", "cyclopts", ALWAYS, "the command line"),
    Part("rich", "rich", ALWAYS, "what the terminal shows"),
    Part("jinja2", "jinja2", ALWAYS, "pages of reports"),
    Part("matplotlib", "matplotlib.figure", ALWAYS, "plots of reports"),
    Part("junitparser", "junitparser", ALWAYS, "junit.xml"),
    Part("tomli", "tomli", ALWAYS, "TOML files, before Python 3.11"),
    Part("onnxruntime", "onnxruntime", "cpu", "runs graphs on the CPU"),
    Part("onnxruntime-gpu", "onnxruntime", "gpu", "runs graphs on an NVIDIA GPU"),
    Part("tensorrt", "tensorrt", "trt", "TensorRT engines, built on the GPU that runs them"),
    Part("tensorrt-rtx", "tensorrt_rtx", "rtx", "TensorRT engines, built ahead of time on any Linux machine"),
    Part("onnxruntime-genai", "onnxruntime_genai", "genai", "--exporter genai; generating text"),
    Part("llama-cpp-py-sync", "llama_cpp_py_sync", "llamacpp", "runs GGUF files of `convert`"),
    Part("mlx", "mlx.core", "mlx", "arrays of mlx-lm, on a CPU, too"),
    Part("mlx-lm", "mlx_lm.utils", "mlx", "runs folders of `convert --to mlx`"),
    Part("openvino", "openvino", "openvino", "writes and runs folders of `convert --to openvino`"),
    Part("openvino-tokenizers", "openvino_tokenizers", "openvino", "tokenizers of those folders"),
    Part("olive-ai", "olive", "olive", "Neural Block Linearization as a pass of Olive"),
    Part("lm-eval", "lm_eval", "eval", "tasks of lm-evaluation-harness"),
    Part("datasets", "datasets", "hub", "data sets of the Hugging Face Hub"),
    Part("pyarrow", "pyarrow.parquet", "text", "calibration text from .parquet"),
    Part("backports.zstd", "backports.zstd", "text", "calibration text from .zst, before Python 3.14"),
    Part("pillow", "PIL.Image", "vision", "calibration images"),
    Part("soundfile", "soundfile", "audio", "calibration sounds"),
    Part("torchvision", "torchvision", None, "processors of most multimodal models"),
    Part("timm", "timm", None, "the image tower of Gemma 3n"),
)
_BY_NAME = {part.package: part for part in PARTS}


def part(package: str) -> Part:
    """The part whose package has this name."""
    return _BY_NAME[package]


def missing(package: str, what: str) -> MissingDependencyError:
    """The error that ``what`` needs ``package``, with its pip line."""
    return MissingDependencyError(f"{what} needs {package}: {part(package).pip}.")


def import_in_words(error: ImportError) -> MissingDependencyError | None:
    """The ``error`` as one of a package that is missing or broken; None for a module of nbl-export itself."""
    top = (error.name or "").partition(".")[0]
    if not top or top == __name__.partition(".")[0]:
        return None
    if isinstance(error, ModuleNotFoundError):
        return MissingDependencyError(f"{top} is not installed, which nbl-export needs: {pip_line()}.")
    return MissingDependencyError(
        f"{top} cannot be imported ({first_line(error)}): nbl-export doctor says what is wrong with it."
    )
