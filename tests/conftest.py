"""Models and data that tests share. Real ones are skipped, with the reason, where they are missing."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# A shell's background job ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Nothing in the tests may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# What commands draw has this width, as wide as the paths of a run of tests need.
os.environ["COLUMNS"] = "120"
# Models this small are faster on one thread, and far faster beside another process.
torch.set_num_threads(1)

# Helpers whose assertions say what differs, as those of test files do.
pytest.register_assert_rewrite("tests.end_to_end.oracle", "tests.finished", "tests.rewrite.by_hand")
pytest_plugins = [
    "tests.once",
    "tests.fixtures_graph",
    "tests.families",
    "tests.exporters",
    "tests.multimodal",
    "tests.finished",
]

ROOT = Path(__file__).parent.parent
# Variants that take minutes and seldom say something new are left out of the usual run.
_ALL = "NBL_EXPORT_ALL_TESTS"
ALL = _ALL in os.environ
exhaustive = pytest.mark.skipif(not ALL, reason=f"only with {_ALL}=1")

SHARED = Path(os.environ.get("NBL_EXPORT_SHARED", ROOT.parent / "shared")) / "data"


# The virtual device must be there before the first backward pass of its process. The others take minutes each: begun
# last, one of them would run while the other processes have nothing left to do.
FIRST = (
    "test_virtual_device.py",
    "test_smollm2.py",
    "test_random_decoders.py",
    "test_families.py",
    "test_matrix.py",
)


# What is beside the unit tests and one small model: other families, exporters, clients, whole commands.
SLOW = (
    "clients/",
    "end_to_end/",
    "hostile/",
    "cli/test_process.py",
    "convert/",
    "engine/",
    "evaluate/test_scoring.py",
    "export/test_checks.py",
    "export/test_others.py",
    "export/test_sidecars.py",
    "export/test_traced.py",
    "rewrite/test_weights.py",
    "runtime/test_engines.py",
    "runtime/test_forms.py",
    "scripts/test_scripts.py",
    "stages/test_bench.py",
    "stages/test_convert.py",
    "stages/test_evaluate.py",
    "test_api.py",
    "test_docs.py",
    "test_families.py",
    "test_olive.py",
    "test_packages.py",
    "verify/speed/",
    "verify/test_crossing.py",
    "verify/test_parity.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and run the files that go first, the others in their order."""
    for item in items:
        if item.path.relative_to(ROOT / "tests").as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """Look seldom for cycles, and not in what is there now: a trace makes millions of objects, and frees few."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def every_report_is_of_its_schema() -> Iterator[None]:
    """Each report that a test writes is held to the schema that is published."""
    from jsonschema import Draft202012Validator

    from nbl_export.report.schema import Header
    from scripts.json_schemas import schema_of

    real, validators = Header.as_json, {}

    def checked(self: Header) -> dict[str, Any]:
        found, kind = real(self), type(self)
        if kind not in validators:
            validators[kind] = Draft202012Validator(schema_of(kind))
        validators[kind].validate(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Header, "as_json", checked)
        yield


class Failures:
    """Says each failure when it happens: a run that does not come to its end would not say any."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal: Any = self._plugins.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            why = [line for line in report.longreprtext.splitlines() if line.startswith("E ")][:1]
            terminal.write_line("")
            terminal.write_line(f"FAILED {report.nodeid} ({report.when}) {''.join(why)}")


def pytest_configure(config: pytest.Config) -> None:
    """Follow the failures of all processes in the first one."""
    if not hasattr(config, "workerinput"):  # those of other processes are told to this one
        config.pluginmanager.register(Failures(config))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public test data; the test is skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared test data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def stories_text(shared_data: Path) -> Path:
    """TinyStories documents, what stories260K was trained on."""
    return shared_data / "text" / "tinystories_exllamav2.jsonl.gz"


@pytest.fixture(scope="session")
def stories_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K, a real Llama with GQA (5 layers, width 64), as a Hugging Face folder."""
    from tests.tiny import build_stories

    return build_stories(
        shared_data / "models" / "stories260K", tmp_path_factory.mktemp("models") / "stories260K"
    )


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a GGUF file in Q4_1, as scripts/test.sh fetches it."""
    path = Path(os.environ.get("NBL_EXPORT_SMOLLM2", ""))
    if not path.is_file():
        pytest.skip("needs SmolLM2: scripts/test.sh fetches it and sets NBL_EXPORT_SMOLLM2")
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-layer Llama with GQA, width 32, whose attention matters, with a byte-level tokenizer.

    Freshly initialized attention moves a model too little to notice when it is wrong; these weights
    are scaled up.
    """
    from tests.tiny import build

    return build(tmp_path_factory.mktemp("models") / "tiny")
