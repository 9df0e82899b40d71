"""Windows is refused in one sentence, by the command line and by the Python API, before it fails in another way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nbl_export.errors import MissingDependencyError
from nbl_export.supported import check_system

# A Python as Windows has it: what it lacks is not there, and what asks for the system hears win32.
WINDOWS = (
    "import signal, sys; sys.platform = 'win32'; sys.argv = ['nbl-export', *sys.argv[1:]]; "
    "[sys.modules.__setitem__(name, None) for name in ('fcntl', 'resource', 'pty', 'termios')]; "
    "[delattr(signal, name) for name in ('SIGHUP', 'SIGKILL', 'SIGALRM')]; "
)


@pytest.mark.parametrize("platform", ["linux", "darwin", "freebsd14", None])
def test_a_posix_system_is_taken(platform: str | None) -> None:
    check_system(platform)


def test_windows_is_refused() -> None:
    with pytest.raises(MissingDependencyError, match=r"Linux.*Windows.*WSL") as caught:
        check_system("win32")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("words", [[], ["--help"], ["doctor"], ["model", "--k", "8"]])
@pytest.mark.parametrize(
    "how",
    [
        "from nbl_export.cli import main; main()",
        "import runpy; runpy.run_module('nbl_export', run_name='__main__')",
    ],
    ids=["script", "module"],
)
def test_the_command_line_says_so_in_one_sentence(how: str, words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WINDOWS + how, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert (
        done.stderr.startswith("error: nbl-export runs on Linux, and this is Windows")
        and done.stderr.count("\n") == 1
    )


CALLS = """
for call in (
    lambda: api.run('model', 'out', api.SelectSettings(k=1)),
    lambda: api.calibrate('model', 'out'),
    lambda: api.select('out', api.SelectSettings(k=1)),
    lambda: api.report('out'),
):
    try:
        call()
    except MissingDependencyError as error:
        print(error)
"""


def test_the_api_raises_it(tmp_path: Path) -> None:
    (tmp_path / "out" / "nbl").mkdir(parents=True)
    (tmp_path / "out" / "nbl" / "workspace.json").write_text('{"version": 1, "stages": {}}')
    before = sorted(tmp_path.rglob("*"))
    # What works there, and what this Python cannot import as Windows, is imported before.
    imports = "from nbl_export import api; from nbl_export.errors import MissingDependencyError"
    code = f"{imports}; import nbl_export.stages.calibration_data; {WINDOWS}{CALLS}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    said = done.stdout.splitlines()
    assert len(said) == 4 and done.returncode == 0, done
    assert all(line.startswith("nbl-export runs on Linux") for line in said), said
    assert sorted(tmp_path.rglob("*")) == before
