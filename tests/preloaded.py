"""`python -m nbl_export` as a copy of a process that has imported its libraries, and nothing of ours.

Most commands in the tests spend more time importing torch and transformers than doing anything else. A server imports
them once; asked over a socket, it forks. The child has the streams, the folder and the arguments that it is given, runs
the package as ``python -m`` does, and ends as an interpreter does, but for what C++ tidies up: some of it would wait
for threads, which a child does not have. Graphs and the machine's rates are those that the run has found, where the
test takes them, too (``tests/traced_once.py``, ``tests/measured_once.py``). How long a command takes, how it is
interrupted, and what it imports is tested with processes of their own.

Run as a program, it is the server; its argument is the number of the socket's descriptor.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.machinery
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.kept import keep_in

LIBRARIES = (
    *("cyclopts", "jinja2", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "numpy"),
    *("onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich.progress", "safetensors", "scipy.stats"),
    *("torch", "torch.export", "torch.onnx", "transformers", "transformers.modeling_utils", "pytest"),
)
# What has a module's results from those of the run, once it is imported.
ONCE = {
    "nbl_export.export.torch": "tests.traced_once",
    "nbl_export.verify.speed.roofline": "tests.measured_once",
}
_LONGEST = 1 << 20  # bytes of a request


def run(
    arguments: list[str],
    environment: dict[str, str],
    folder: Path | None,
    limit: int | None,
    kept: Path | None,
    timeout: float,
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``nbl-export ARGUMENTS``; ``limit`` is the largest file that it may write.

    ``kept`` is the folder of the run's results, from which some are taken; None: nothing is.

    Raises :class:`subprocess.TimeoutExpired` when it has not ended in ``timeout`` seconds; it is killed then.
    """
    server = _server(tuple(sorted(environment.items())))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Path(os.devnull).open() as nothing:
        asked = {
            "arguments": arguments,
            "folder": str(folder or Path.cwd()),
            "limit": limit,
            "kept": kept and str(kept),
        }
        socket.send_fds(server, [json.dumps(asked).encode()], [nothing.fileno(), out.fileno(), err.fileno()])
        child = int(server.recv(32))
        server.settimeout(timeout)
        try:
            status = int(server.recv(32))
        except TimeoutError:
            os.kill(child, signal.SIGKILL)
            server.settimeout(None)
            server.recv(32)
            raise subprocess.TimeoutExpired(arguments, timeout) from None
        found = []
        for stream in (out, err):
            stream.seek(0)
            found.append(stream.read().decode())
    return os.waitstatus_to_exitcode(status), found[0], found[1]


@cache
def _server(environment: tuple[tuple[str, str], ...]) -> socket.socket:
    """A server whose libraries were imported in this ``environment``; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.run(
            [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=Path(__file__).parent.parent,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return ours


def _serve(peer: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each request: in a child, the request and its streams; None in the server when nobody asks any more."""
    while True:
        message, streams, _, _ = socket.recv_fds(peer, _LONGEST, 3)
        if not message:
            return None
        child = os.fork()
        if not child:
            return json.loads(message), streams
        for stream in streams:
            os.close(stream)
        peer.send(str(child).encode())
        _, status = os.waitpid(child, 0)
        with suppress(OSError):
            peer.send(str(status).encode())


def _become(asked: dict[str, Any], streams: list[int]) -> int:
    """The exit code of ``python -m nbl_export`` with these streams."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["folder"])
    if asked["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["limit"], asked["limit"]))
    if asked["kept"] is not None:
        keep_in(Path(asked["kept"]))
        sys.meta_path.insert(0, _Once())
    sys.path[0] = asked["folder"]
    sys.argv[1:] = asked["arguments"]
    try:
        runpy.run_module("nbl_export", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else bool(ended.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Once:
    """Finds the modules of :data:`ONCE` as Python does, and has what they are to keep replaced once they are there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in ONCE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(ONCE[name]).install()

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if __name__ == "__main__":
    if os.fork():  # no child of whoever started it: tests count what a process leaves behind
        os._exit(0)
    for library in LIBRARIES:
        importlib.import_module(library)
    assert not any(name.split(".")[0] == "nbl_export" for name in sys.modules)
    gc.freeze()  # a child's collections leave the libraries alone
    with socket.socket(fileno=int(sys.argv[1])) as peer:
        request = _serve(peer)
    if request is not None:
        code = _become(*request)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
