"""transformers.js, OpenVINO and Triton take our folders as they stand, and give what our own decode loop gives."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.runtime.clients import cpu
from nbl_export.runtime.ort import OrtModel
from tests.clients.test_generating import greedy
from tests.conftest import exhaustive
from tests.exporters import GRAPH, Graphs
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


# OpenVINO --------------------------------------------------------------------------------

TEXTS = ("Once upon a time", "The little dog was very")


@pytest.mark.parametrize(
    ("precision", "backend"),
    [pytest.param("fp32", "SDPA", marks=exhaustive), ("fp16", "SDPA"), ("fp32", "PA")],
)
def test_genai_generates_what_our_decoder_does(stories_copy: Path, precision: str, backend: str) -> None:
    """Also with paged attention, its default, which takes the cache out of the model."""
    genai = pytest.importorskip("openvino_genai", reason="needs openvino-genai: pip install openvino-genai")
    value = api.convert(stories_copy, api.ConvertSettings("openvino", precision))  # type: ignore[arg-type]
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}  # as docs/convert.md says
    pipeline = genai.LLMPipeline(stories_copy / value.file, "CPU", ATTENTION_BACKEND=backend, **exact)
    asked = genai.GenerationConfig()
    asked.max_new_tokens, asked.ignore_eos, asked.apply_chat_template = COUNT, True, False
    tokenizer = pipeline.get_tokenizer()

    def own(text: str) -> str:
        tokens = greedy(stories_copy / GRAPH, _ids(tokenizer, text), COUNT)
        return str(tokenizer.decode(tokens))

    expected = [own(text) for text in TEXTS]
    assert [pipeline.generate(text, asked) for text in TEXTS] == expected
    if backend == "PA":  # the other one, in 2026.4, goes on differently with one text given twice
        assert list(pipeline.generate(list(TEXTS), asked).texts) == expected, "both texts as one batch"
    asked.num_beams = asked.num_return_sequences = 2
    assert len(pipeline.generate([TEXTS[0]], asked).texts) == 2, "beams, whose rows change places"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer.encode(text).input_ids.data[0]]


def test_a_graph_with_a_shared_cache_is_read_as_it_stands(stories_copy: Path) -> None:
    """One row; of several, OpenVINO 2026.4 takes apart the lengths wrongly."""
    api.export(stories_copy, api.ExportSettings("fp32", "shared"))
    api.rewrite(stories_copy)
    assert_read(stories_copy / GRAPH, 1)


def test_a_graph_of_optimum_is_read_as_it_stands(graphs: Graphs) -> None:
    assert_read(graphs("optimum", "llama-gqa") / GRAPH, 2)


def assert_read(path: Path, rows: int) -> None:
    """OpenVINO computes what onnxruntime does: a prefill, a step and a chunk."""
    pytest.importorskip("openvino", reason="needs openvino: pip install '.[openvino]'")
    model = cpu().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    decoder = OrtModel(path, rounded=False)
    past, begun = decoder.empty_past(rows), 0
    names = ("input_ids", "attention_mask", "position_ids")
    own_names = {port.any_name for port in model.inputs}
    cache = {
        port.any_name: np.zeros((rows, *_heads(port)), np.float32)
        for port in model.inputs
        if "past" in port.any_name
    }
    for tokens in ([1, 43, 47, 26], [37], [42, 21]):
        ids, length = np.tile([tokens], (rows, 1)), begun + len(tokens)
        positions = np.tile(np.arange(begun, length)[None], (rows, 1))
        given = (ids, np.ones((rows, length), np.int64), positions)
        own = decoder(*given, past)
        fed = {name: value for name, value in zip(names, given, strict=True) if name in own_names}
        found = model({**fed, **cache})
        assert np.abs(found["logits"] - own.logits).max() < 1e-4
        past, begun = own.present, length
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}


def _heads(port: Any) -> tuple[int, int, int]:
    """Heads, no tokens, head_dim."""
    shape = port.get_partial_shape()
    return shape[1].get_length(), 0, shape[3].get_length()


# Triton --------------------------------------------------------------------------------

IDS = [1, 403, 407, 261, 378]
TYPES = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64}


@pytest.fixture(scope="module")
def schema() -> Any:
    """The module that reads a configuration."""
    path = os.environ.get("NBL_EXPORT_TRITON_SCHEMA", "")
    if not path:
        pytest.skip("needs Triton's schema: scripts/test.sh fetches it and sets NBL_EXPORT_TRITON_SCHEMA")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # made for an earlier protobuf
        spec.loader.exec_module(module)
    return module


class Repository:
    """A model of the repository as Triton serves it: what its configuration says is all that is known of it."""

    def __init__(self, folder: Path, schema: Any) -> None:
        import onnxruntime
        from google.protobuf import text_format

        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
        self.type_of = schema.DataType.Name
        self._session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
        self._states: dict[str, Any] = {}

    def request(self, start: bool, **given: Any) -> dict[str, Any]:
        states = self.config.sequence_batching.state
        if start:
            self._states = {
                one.input_name: np.zeros((1, *first.dims), TYPES[self.type_of(first.data_type)])
                for one in states
                for first in one.initial_state
            }
        assert {one.name for one in self.config.input} == given.keys()
        names = [one.name for one in (*self.config.output,)] + [one.output_name for one in states]
        for one in self.config.input:
            value = given[one.name]
            assert value.dtype == TYPES[self.type_of(one.data_type)] and len(value.shape) == 1 + len(one.dims)
        found = dict(zip(names, self._session.run(names, given | self._states), strict=True))
        for one in states:
            shape = found[one.output_name].shape[1:]
            assert all(told in (-1, own) for told, own in zip(one.dims, shape, strict=True))
            self._states[one.input_name] = found[one.output_name]
        return found


@pytest.mark.parametrize("cache", ["concat", "shared"])
def test_a_sequence_goes_on_from_its_states(
    stories_copy: Path, tmp_path: Path, schema: Any, cache: str
) -> None:
    if cache != "concat":
        api.export(stories_copy, api.ExportSettings("fp32", cache))
        api.rewrite(stories_copy)
        assert api.verify(stories_copy, api.VerifySettings(speed=False)).passed
    api.package(stories_copy, tmp_path / "package", layout="triton", base=True)
    for role, layers in (("linearized", 3), ("base", 5)):
        folder = tmp_path / "package" / "models" / role
        model = Repository(folder, schema)
        assert len(model.config.sequence_batching.state) == 2 * layers
        tokens, ids = [], np.array([IDS])
        for length in range(len(IDS), len(IDS) + COUNT):
            positions = np.arange(length - ids.shape[1], length)[None]
            mask = np.ones((1, length), np.int64)
            found = model.request(not tokens, input_ids=ids, attention_mask=mask, position_ids=positions)
            tokens.append(int(found["logits"][0, -1].argmax()))
            ids = np.array([tokens[-1:]])
        assert tokens == greedy(folder / "1" / "model.onnx", IDS, COUNT)
    assert sorted(p.name for p in (tmp_path / "package" / "models").iterdir()) == ["base", "linearized"]


def test_the_configuration_of_an_engine_is_of_the_schema(stories_out: Path, schema: Any) -> None:
    from google.protobuf import text_format

    from nbl_export.export.layouts import triton_config
    from nbl_export.graph.io import load_graph

    model = load_graph(stories_out / "model.onnx")
    config = text_format.Parse(triton_config(model, profiles=2), schema.ModelConfig())
    assert config.backend == "tensorrt" and len(config.sequence_batching.state) == 2 * 3
    (group,) = config.instance_group
    assert (group.kind, [*group.profile]) == (schema.ModelInstanceGroup.KIND_GPU, ["0", "1"])
