"""The command line as a process of its own: what it says, how it ends, and interrupts."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbl_export import cli

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
for _name in ("NBL_EXPORT_DEBUG", "PYTEST_CURRENT_TEST"):
    ENVIRONMENT.pop(_name, None)
SMALL = ["--samples", "16", "--seq-len", "64", "--heldout-samples", "4"]
FAST = ["--decode-steps", "2", "--contexts", "8", "--rounds", "3"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def nbl(*arguments: object, cwd: Path | None = None, limit: int | None = None) -> Done:
    """`nbl-export ARGUMENTS` in this process; ``limit`` is the largest file in bytes that it may write."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["nbl-export", *map(str, arguments)])
        patch.delenv("NBL_EXPORT_DEBUG", raising=False)
        if cwd is not None:
            patch.chdir(cwd)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited[0] if limit is None else limit, unlimited[1]))
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return Done(code, out.getvalue(), err.getvalue())


def assert_refused(done: Done, code: int, *words: str, quietly: bool = True) -> None:
    """One sentence on stderr, nothing on stdout, the exit code; ``quietly``: and nothing else at all."""
    assert done.code == code, done
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.err
    assert done.err.rstrip().endswith(errors[0]), done.err
    assert "Traceback" not in done.err and "Internal error" not in done.err
    assert done.out == ""
    for word in words:
        assert word in errors[0], errors[0]
    if quietly:
        assert done.err.splitlines() == errors


def no_leftovers(out: Path) -> None:
    assert [
        p for p in out.rglob("*") if p.name.endswith(".tmp") or p.name.startswith((".onnx", ".taps"))
    ] == []


def interrupted(pattern: str, *arguments: object, delay: float = 0.0) -> Done:
    """Run, send SIGINT ``delay`` seconds after ``pattern`` shows on the terminal, wait for the end."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nbl_export", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    os.close(slave)
    seen = b""
    sent = False
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while block := os.read(master, 65536):
            seen += block
            if not sent and re.search(pattern.encode(), seen):
                sent = True
                time.sleep(delay)
                process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=120)
    os.close(master)
    assert sent, seen.decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode(errors="replace"))
    return Done(process.returncode, stdout.decode(), text)


def assert_interrupted(done: Done) -> None:
    assert done.code == 130, done
    assert "Traceback" not in done.err and "Internal error" not in done.err
    errors = [line.strip() for line in re.split(r"[\r\n]+", done.err) if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith("error: Interrupted"), errors
    assert done.out == ""
