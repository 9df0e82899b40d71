"""Name the packages that are used: what each is for, and the pip line that brings it beside this copy.

The version of each stands in ``pyproject.toml`` alone, and so does what else an extra brings.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nbl_export.errors import MissingDependencyError, first_line

NAME = "nbl-export"
ALWAYS = ""  # in place of an extra: whoever installs nbl-export has it
_CLONE = Path(__file__).resolve().parents[1]


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
    Part("datasets", "datasets", ALWAYS, "calibration text from .parquet and the Hub"),
    Part("backports.zstd", "backports.zstd", ALWAYS, "calibration text from .zst, before Python 3.14"),
    Part("cattrs", "cattrs", ALWAYS, "records"),
    Part("psutil", "psutil", ALWAYS, "memory of this machine"),
    Part("packaging", "packaging.requirements", ALWAYS, "versions of packages"),
    Part("cyclopts", "cyclopts", ALWAYS, "the command line"),
    Part("rich", "rich", ALWAYS, "what the terminal shows"),
    Part("jinja2", "jinja2", ALWAYS, "pages of reports"),
    Part("matplotlib", "matplotlib.figure", ALWAYS, "plots of reports"),
    Part("junitparser", "junitparser", ALWAYS, "junit.xml"),
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
    Part("pillow", "PIL.Image", "vision", "calibration images"),
    Part("torchvision", "torchvision", None, "processors of most multimodal models"),
    Part("timm", "timm", None, "the image tower of Gemma 3n"),
)


def part(package: str) -> Part:
    """The part whose package has this name."""
    return next(one for one in PARTS if one.package == package)


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


def check_system(platform: str = sys.platform) -> None:
    """Raise :class:`MissingDependencyError` on Windows, which has neither POSIX file locks nor its signals."""
    if platform == "win32":
        raise MissingDependencyError(
            "nbl-export runs on Linux, and this is Windows: run it in WSL (wsl --install) or in a Linux container."
        )


def pip_line(*extras: str) -> str:
    """The command that installs ``extras`` beside this copy, quoted for a shell."""
    named = f"[{','.join(extras)}]" if extras else ""
    where, editable = origin()
    what = f"{NAME}{named} @ {where}" if "://" in where else f"{where or NAME}{named}"
    return f"{pip_command('install')} {'-e ' * editable}{shlex.quote(what)}"


def pip_command(verb: str) -> str:
    """The command that does ``verb`` in the environment that this runs in, which may be one of pipx or uv."""
    environment = Path(sys.prefix)
    if (environment / "pipx_metadata.json").is_file():
        return f"pipx runpip {shlex.quote(environment.name)} {verb}"
    if find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip {verb} --python {shlex.quote(sys.executable)}"
    return f"pip {verb}"


def origin(clone: Path = _CLONE) -> tuple[str, bool]:
    """Where this copy came from, and whether it is editable: a path that is there, a URL, or "" for an index."""
    try:
        direct = json.loads(distribution(NAME).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        direct = {}
    url = str(direct.get("url", ""))
    place = Path(url2pathname(urlsplit(url).path)) if url.startswith("file:") else None
    if (clone / "pyproject.toml").is_file():
        return str(clone), place == clone and bool(direct.get("dir_info", {}).get("editable"))
    if place:
        return (str(place) if place.exists() else ""), False
    if vcs := direct.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs.get('requested_revision') or vcs['commit_id']}"
    return url, False
