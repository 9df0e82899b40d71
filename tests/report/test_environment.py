"""What is said of a machine is true of this one, and does not name it."""

from __future__ import annotations

import getpass
import platform
import socket
import sys
from importlib.metadata import distributions
from pathlib import Path

from nbl_export.records import from_json, to_json
from nbl_export.report.environment import Environment, environment


def test_packages_are_those_installed() -> None:
    """By what is on the path, not by asking for names."""
    installed = {str(d.metadata["Name"]).lower().replace("_", "-"): d.version for d in distributions()}
    found = environment().packages
    assert {"torch", "transformers", "onnx", "numpy"} <= found.keys()
    for name, version in found.items():
        assert installed[name] == version, name
    # One that is not there is left out, not said to be of no version.
    assert ("tensorrt" in found) is ("tensorrt" in installed)
    assert ("lm-eval" in found) is ("lm-eval" in installed)


def test_the_machine_is_this_one() -> None:
    found = environment()
    assert found.python == sys.version.split()[0]
    assert found.system.split()[0] == platform.system() and found.system.endswith(platform.machine())
    processors = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert found.processor and (
        not processors or "model name" not in processors or found.processor in processors
    )
    assert (found.cores and found.cores == processors.count("processor\t:")) or not processors
    if Path("/proc/meminfo").exists():
        kibibytes = int(Path("/proc/meminfo").read_text().split()[1])
        assert abs(found.memory_gib - kibibytes / 2**20) <= 0.05 + 1e-9


def test_nothing_names_the_machine_or_its_user() -> None:
    text = str(to_json(environment()))
    for name in (socket.gethostname(), str(Path.home()), getpass.getuser()):
        assert name not in text or len(name) < 5


def test_it_comes_back_from_json() -> None:
    found = environment()
    assert from_json(Environment, to_json(found), "it", "do it again") == found
