"""The names of files in an output folder: no other module spells one."""

from __future__ import annotations

from pathlib import Path

ENGINE_SUFFIX = ".engine"
# Forms of other engines, the first a file; the others are folders, one for each precision.
FORMS = ("gguf", "mlx", "hf", "openvino", "decilm")
FOLDER_PRECISIONS = ("fp32", "fp16", "bf16")


PACKAGE = "package.json"


def is_package(root: Path) -> bool:
    """Whether ``root`` is a package: what a deployment needs of an output folder."""
    return (root / PACKAGE).is_file()


class Places:
    """Where the files of the output folder ``root`` are."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def nbl(self) -> Path:
        return self.root / "nbl"

    @property
    def state_path(self) -> Path:
        return self.nbl / "workspace.json"

    @property
    def digests_file(self) -> Path:
        """The digests of files that have not changed since they were read."""
        return self.nbl / "digests.json"

    @property
    def text(self) -> Path:
        return self.nbl / "text.safetensors"

    @property
    def images(self) -> Path:
        return self.nbl / "images.safetensors"

    @property
    def moments(self) -> Path:
        return self.nbl / "moments"

    @property
    def partial_moments(self) -> Path:
        return self.nbl / "moments.partial"

    @property
    def repair_checkpoint(self) -> Path:
        return self.nbl / "repair.partial.safetensors"

    @property
    def probe(self) -> Path:
        return self.nbl / "probe.safetensors"

    @property
    def candidates(self) -> Path:
        return self.nbl / "candidates.json"

    @property
    def measured(self) -> Path:
        return self.nbl / "measured.json"

    @property
    def costs(self) -> Path:
        return self.nbl / "costs.json"

    @property
    def plan(self) -> Path:
        return self.nbl / "plan.json"

    @property
    def export_summary(self) -> Path:
        return self.nbl / "export.json"

    @property
    def rewrite_summary(self) -> Path:
        return self.nbl / "rewrite.json"

    @property
    def baseline(self) -> Path:
        return self.root / "baseline" / "model.onnx"

    @property
    def embedding(self) -> Path:
        """The embedding of decoders that read embeddings, both of this folder."""
        return self.root / "embedding.onnx"

    @property
    def model(self) -> Path:
        return self.root / "model.onnx"

    @property
    def engine(self) -> Path:
        return self.root / "engine" / f"model{ENGINE_SUFFIX}"

    @property
    def base_engine(self) -> Path:
        return self.root / "engine" / f"baseline{ENGINE_SUFFIX}"

    def gguf(self, kind: str) -> Path:
        """The model as a GGUF file with weights of that ``kind``, as llama.cpp names it."""
        return self.root / "gguf" / f"model-{kind}.gguf"

    def converted(self, form: str, precision: str) -> Path:
        """The folder that is the model in the ``form`` of another engine."""
        return self.root / form / precision

    def conversion(self, form: str, precision: str) -> Path:
        """What was found of that form."""
        return self.nbl / f"conversion.{form}.{precision}.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def bench_cells(self) -> Path:
        """The cells that an interrupted bench has measured."""
        return self.nbl / "bench.partial.json"

    @property
    def evaluations(self) -> Path:
        """The answers of each graph on each task, by key."""
        return self.nbl / "eval"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that is written to."""
        return (
            self.root,
            self.nbl,
            self.moments,
            self.partial_moments,
            self.baseline.parent,
            self.engine.parent,
            *(self.root / form for form in FORMS),
            *(self.converted(form, precision) for form in FORMS[1:] for precision in FOLDER_PRECISIONS),
            self.report,
            self.report / "plots",
            self.evaluations,
        )
