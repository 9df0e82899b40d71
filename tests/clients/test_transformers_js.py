"""transformers.js generates from a package in its layout, in Node and in a browser, what our own decode loop gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from tests.clients.test_generating import greedy
from tests.conftest import exhaustive
from tests.families import build

pytestmark = pytest.mark.client

COUNT = 24
PROMPT = "Once upon a time"
# The same in both; what stands around it tells it where files are and takes what it found.
GENERATE = """
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained("model");
const model = await AutoModelForCausalLM.from_pretrained("model");
const inputs = tokenizer(PROMPT);
const output = await model.generate({ ...inputs, max_new_tokens: COUNT, do_sample: false });
const ids = (tensor) => tensor.tolist()[0].map(Number);
const found = { prompt: ids(inputs.input_ids), ids: ids(output), inputs: model.sessions.model.inputNames };
"""
NODE = f"""
import {{ AutoModelForCausalLM, AutoTokenizer, env }} from "@huggingface/transformers";
const [PROMPT, COUNT] = [{PROMPT!r}, {COUNT}];
env.localModelPath = "./";
{GENERATE}
console.log(JSON.stringify(found));
"""
PAGE = f"""<!doctype html><script type="module">
const tell = (value) => fetch("/found", {{ method: "POST", body: JSON.stringify(value) }});
try {{
const library = "/node_modules/@huggingface/transformers/dist/transformers.js";
const {{ AutoModelForCausalLM, AutoTokenizer, env }} = await import(library);
const [PROMPT, COUNT] = [{PROMPT!r}, {COUNT}];
env.localModelPath = "/";
env.allowLocalModels = true;
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
{GENERATE}
await tell(found);
}} catch (error) {{ await tell({{ error: String(error) }}); }}
</script>
"""


@pytest.fixture(scope="module")
def modules() -> Path:
    """The folder that has transformers.js, which Node runs."""
    folder = os.environ.get("NBL_EXPORT_TRANSFORMERS_JS", "")
    if not folder or shutil.which("node") is None:
        pytest.skip(
            "needs Node and transformers.js: scripts/test.sh installs it and sets NBL_EXPORT_TRANSFORMERS_JS"
        )
    return Path(folder) / "node_modules"


def packaged(out: Path, folder: Path, modules: Path) -> str:
    """The package of ``out`` in ``folder``, beside the modules; the path of its graph there."""
    api.package(out, folder / "model", layout="web")
    (folder / "node_modules").symlink_to(modules)
    (graph,) = (folder / "model" / "onnx").glob("*.onnx")
    return graph.relative_to(folder).as_posix()


def assert_generated(found: Any, folder: Path, graph: str) -> None:
    assert "error" not in found, found
    count = len(found["prompt"])
    assert found["ids"][:count] == found["prompt"]
    assert found["ids"][count:] == greedy(folder / graph, found["prompt"], COUNT)
    # Two of five layers keep no cache.
    assert sum(name.endswith(".key") for name in found["inputs"]) == 3


def in_node(folder: Path, script: str = NODE) -> Any:
    """What the script finds in Node."""
    (folder / "generate.mjs").write_text(script)
    done = subprocess.run(
        ["node", "generate.mjs"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("precision", "graph"), [("fp32", "model.onnx"), ("fp16", "model_fp16.onnx")])
def test_in_node(stories_copy: Path, tmp_path: Path, modules: Path, precision: str, graph: str) -> None:
    if precision != "fp32":
        api.export(stories_copy, api.ExportSettings(precision))
        api.rewrite(stories_copy)
        assert api.verify(stories_copy, api.VerifySettings(speed=False)).passed
    folder = tmp_path / "web"
    folder.mkdir()
    assert packaged(stories_copy, folder, modules) == f"model/onnx/{graph}"
    assert_generated(in_node(folder), folder, f"model/onnx/{graph}")


@pytest.mark.parametrize("precision", ["int4", pytest.param("int8", marks=exhaustive)])
def test_quantized_in_node(stories_text: Path, tmp_path: Path, modules: Path, precision: str) -> None:
    """Of onnxruntime-genai's builder: a model with heads that its attention takes."""
    pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: pip install '.[genai]'")
    model, out, folder = build("llama-gqa", tmp_path / "tiny"), tmp_path / "out", tmp_path / "web"
    report = api.run(
        model,
        out,
        api.SelectSettings(layers=(1,)),
        api.CalibrateSettings((str(stories_text),), 64, 64, 4, 4),
        api.VerifySettings(speed=False),
        exporting=api.ExportSettings(precision, exporter="genai"),
    )
    assert report.passed
    folder.mkdir()
    graph = packaged(out, folder, modules)
    found = in_node(folder)
    count = len(found["prompt"])
    assert found["ids"][count:] == greedy(folder / graph, found["prompt"], COUNT)
    assert sum(name.endswith(".key") for name in found["inputs"]) == 3


class Served:
    """A folder that is served on this machine, and what a page there has posted."""

    def __init__(self, folder: Path) -> None:
        self.found: list[Any] = []
        self.posted = threading.Event()
        served = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, *_: object) -> None:
                """Nothing is said."""

            def end_headers(self) -> None:
                # Without them a page has no memory that its threads share.
                self.send_header("Cross-Origin-Opener-Policy", "same-origin")
                self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
                super().end_headers()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                served.found.append(json.loads(body))
                self.send_response(204)
                self.end_headers()
                served.posted.set()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "web").mkdir()
    server = Served(tmp_path / "web")
    yield server
    server.close()


def posted(served: Served, tmp_path: Path, page: str) -> Any:
    """What a page of the served folder posts from Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    asked = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    running = subprocess.Popen(
        [browser, *asked, f"{served.address}/{page}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert served.posted.wait(240), "the page has said nothing"
    finally:
        running.kill()
        running.wait()
    return served.found[0]


def test_in_a_browser(stories_copy: Path, tmp_path: Path, modules: Path, served: Served) -> None:
    """onnxruntime-web, WebAssembly."""
    folder = tmp_path / "web"
    api.export(stories_copy, api.ExportSettings(target="web"))
    api.rewrite(stories_copy)
    assert api.verify(stories_copy, api.VerifySettings(speed=False)).passed
    graph = packaged(stories_copy, folder, modules)
    (folder / "page.html").write_text(PAGE)
    assert_generated(posted(served, tmp_path, "page.html"), folder, graph)


def test_a_precision_that_it_does_not_run_is_refused(stories_copy: Path, tmp_path: Path) -> None:
    api.export(stories_copy, api.ExportSettings("bf16"))
    api.rewrite(stories_copy)
    assert api.verify(stories_copy, api.VerifySettings(speed=False)).passed
    with pytest.raises(InputError, match=r"transformers\.js runs no graph in bf16: fp32, fp16, int8, int4"):
        api.package(stories_copy, tmp_path / "model", layout="web")
    assert not (tmp_path / "model").exists()
