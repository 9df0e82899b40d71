"""Neural Block Linearization as a pass of Olive: a Hugging Face model in, the verified package of its graph out.

{"passes": {"linearize": {"type": "NeuralBlockLinearization", "options": ["--k", "12"]}}}

Olive finds passes of others in the file that `olive run --package-config FILE` names. ``python -m nbl_export.olive
FILE`` writes it: the passes of the Olive that is installed, and this one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nbl_export.errors import BuildError, InputError, NblError
from nbl_export.files import TEMPORARY, write_json
from nbl_export.packages import missing
from nbl_export.report.render import CARD
from nbl_export.workspace import PACKAGE

try:
    from olive.model import HfModelHandler, ONNXModelHandler
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import PassConfigParam
except ImportError:
    raise missing("olive-ai", "The pass of Olive") from None

NAME = "NeuralBlockLinearization"


class NeuralBlockLinearization(Pass):  # type: ignore[misc]
    """`nbl-export MODEL OPTIONS`, and what a deployment needs of it (`nbl-export package`).

    The output is ``model.onnx`` with ``genai_config.json``, tokenizer files and the report beside it. A model that does
    not pass its checks fails the pass.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return {
            "options": PassConfigParam(
                type_=list[str],
                default_value=[],
                description="Options of `nbl-export`, word by word: ['--k', '12', '--calibration', 'text.jsonl.gz'].",
            )
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        if not isinstance(model, HfModelHandler):
            raise InputError(
                f"{NAME} takes a HfModel, which it calibrates in PyTorch: put it before other passes."
            )
        target = Path(output_model_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".nbl.", suffix=TEMPORARY, dir=target.parent) as folder:
            out = Path(folder) / Path(model.model_name_or_path).name
            _run("run", model.model_name_or_path, "-o", str(out), *config.options)
            _run("package", str(out), "-o", str(target))
        # What a pass after this one takes along: neither the report nor the digests are of its graph.
        beside = [
            path for path in sorted(target.iterdir()) if path.is_file() and path.name not in (PACKAGE, CARD)
        ]
        told = {"additional_files": [str(path) for path in beside if not path.name.startswith("model.onnx")]}
        attributes = {**(model.model_attributes or {}), **told}
        return ONNXModelHandler(str(target), onnx_file_name="model.onnx", model_attributes=attributes)


def _run(*words: str) -> None:
    """A command of this nbl-export; what it shows goes to the terminal, and its answer is read."""
    command = [sys.executable, "-m", "nbl_export", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        told = json.loads(done.stdout or "{}")
        failed = [check["name"] for check in told.get("checks", ()) if check.get("status") == "failed"]
        why = told.get("error") or f"the report says FAIL ({', '.join(failed)})."
        raise BuildError(f"`nbl-export {words[0]}` ended with exit code {done.returncode}: {why}")


def package_config() -> dict[str, Any]:
    """The passes of the Olive that is installed, and this one."""
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    own = {
        "module_path": f"nbl_export.olive.{NAME}",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
    }
    return {**config, "passes": {**config["passes"], NAME: own}}


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise InputError("Say where to write the configuration: python -m nbl_export.olive FILE.")
        write_json(Path(sys.argv[1]), package_config())
    except NblError as error:
        sys.exit(f"error: {error}")
