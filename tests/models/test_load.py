"""Loading: what is refused, in which precision and on which device a model comes, and what it is for."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.models import load
from nbl_export.models.folder import PREPROCESSOR, Pooling, find_pooling, task_named, task_of
from nbl_export.models.forward import last_token, pool
from nbl_export.models.load import (
    LoadedModel,
    check_processor,
    exact_float32,
    find_device,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from nbl_export.models.source import find_model
from nbl_export.models.weights import dtype_of
from nbl_export.progress import Silent
from tests.models.test_source import edit_config, one_sentence
from tests.processes import Notes
from tests.tiny import as_sentence_transformer, save_tokenizer, vision_encoder
from tests.tiny_types import tiny_model


def dropped(weights: dict[str, torch.Tensor]) -> object:
    return weights.pop("model.layers.1.self_attn.o_proj.weight")


def spoiled(weights: dict[str, torch.Tensor]) -> object:
    return weights["model.layers.1.mlp.up_proj.weight"][2, 3].fill_(float("inf"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            dropped,
            "has no weights for model.layers.1.self_attn.o_proj.weight and 0 more, which LlamaForCausalLM",
        ),
        (spoiled, "the weight model.layers.1.mlp.up_proj.weight is NaN or infinite"),
    ],
)
def test_weights_that_are_missing_or_no_numbers(folder: Path, spoil: Any, said: str) -> None:
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_model(find_model(str(folder)))
    assert said in one_sentence(caught)


def test_what_transformers_does_not_read(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    source = find_model(str(folder))
    with pytest.raises(InputError, match=rf"^No tokenizer can be loaded from {folder}"):
        load_tokenizer(source)
    edit_config(folder, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    known = f"has an architecture that transformers {transformers.__version__} does not know: install "
    with pytest.raises(InputError, match=known):
        load_model(find_model(str(folder)))


# processors --------------------------------------------------------------------------------------


def test_a_folder_without_a_vocabulary_has_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    source = find_model(str(folder))
    with pytest.raises(InputError) as caught:
        check_processor(source)
    assert one_sentence(caught) == (
        f"{folder} has no tokenizer: put the tokenizer.json, or the tokenizer.model, of the model into {folder}."
    )
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(source)


def test_an_image_processor_that_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs pillow: pip install 'nbl-export[vision]'")
    folder = vision_encoder(tmp_path / "vit")
    source = find_model(str(folder))
    check_processor(source)
    assert load_image_processor(source).size["height"] == 32
    (folder / PREPROCESSOR).unlink()
    for refused in (check_processor, load_image_processor):
        with pytest.raises(InputError, match=r"has no preprocessor_config\.json, which says how its images"):
            refused(source)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of every function of loading that runs."""
    ran: list[str] = []
    for name in ("load_model", "load_tokenizer", "load_image_processor", "in_precision"):
        plain = getattr(load, name)

        def counting(*args: Any, name: str = name, plain: Any = plain) -> Any:
            ran.append(name)
            return plain(*args)

        monkeypatch.setattr(load, name, counting)
    return ran


def test_nothing_is_loaded_before_it_is_asked_for_and_then_once(
    tiny_folder: Path, counted: list[str]
) -> None:
    listener = Notes()
    model = LoadedModel(find_model(str(tiny_folder)), listener)
    assert model.task.name == "text-generation" and model.pooling is None
    assert counted == [] and listener.tasks == []
    assert model.model is model.model and model.tokenizer is model.tokenizer
    assert counted == ["load_model", "load_tokenizer"]
    assert listener.tasks == [(f"Loading {tiny_folder.name}", 1, "MiB", 0)] and listener.advanced == [1]


def test_a_copy_is_shared_while_somebody_has_it(tiny_folder: Path, counted: list[str]) -> None:
    model = LoadedModel(find_model(str(tiny_folder)), Silent())
    assert model.in_dtype("float32") is model.model
    half = model.in_dtype("bfloat16")
    assert half is model.in_dtype("bfloat16") and half is not model.model
    assert counted.count("in_precision") == 1
    assert dtype_of(half) == "bfloat16" and {p.dtype for p in model.model.parameters()} == {torch.float32}
    del half
    gc.collect()
    model.in_dtype("bfloat16")
    assert counted.count("in_precision") == 2, "the first copy was not kept for nobody"


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that keeps a table in float32, on a machine that is fastest in bfloat16."""
    monkeypatch.setattr(load, "fast_dtype", lambda *_: "bfloat16")
    tiny_model("xglm").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_whose_code_does_not_run_fast_is_run_in_float32(mixed: Path, tiny_folder: Path) -> None:
    listener = Notes()
    model = LoadedModel(find_model(str(mixed)), listener)
    assert dtype_of(model.in_dtype("auto")) == "float32" == model.fast_dtype
    assert [note for note in listener.notes if "does not run in bfloat16" in note] == listener.notes[-1:]
    with pytest.raises(InputError, match=r"does not run in bfloat16 .*: use --calibration-dtype float32\.$"):
        model.in_dtype("bfloat16")
    other = LoadedModel(find_model(str(tiny_folder)), Silent())
    assert dtype_of(other.in_dtype("auto")) == "bfloat16" == other.fast_dtype


# devices ------------------------------------------------------------------------------------------


CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a machine with so many devices of each kind, of which some have no float64."""

    real = torch.ones

    def make(cuda: int = 0, xpu: int = 0, without_float64: tuple[str, ...] = ()) -> None:
        for name, count in {"cuda": cuda, "xpu": xpu}.items():
            own = SimpleNamespace(
                is_available=lambda count=count: count > 0, device_count=lambda count=count: count
            )
            monkeypatch.setattr(torch, name, own)

        def ones(*shape: int, device: torch.device, **more: Any) -> torch.Tensor:
            if device.type in without_float64:
                raise RuntimeError("no float64 here.\nand more")
            return real(*shape, **more)

        monkeypatch.setattr(torch, "ones", ones)

    return make


def test_auto_is_the_first_gpu_that_has_float64(machine: Any) -> None:
    machine(cuda=2, xpu=1)
    assert find_device("auto") == torch.device("cuda", 0)
    machine(xpu=1)
    assert find_device("auto") == torch.device("xpu", 0)
    machine(cuda=1, xpu=1, without_float64=("cuda",))
    assert find_device("auto") == torch.device("xpu", 0)
    machine(xpu=1, without_float64=("xpu",))
    assert find_device("auto") == CPU
    with pytest.raises(MissingDependencyError, match=r"float64 \(no float64 here\): say --device cpu"):
        find_device("xpu")
    machine()
    assert find_device("auto") == find_device("cpu") == CPU


def test_each_of_several_processes_has_its_own(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(cuda=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cuda") == torch.device("cuda:0")  # torchrun did not start this one
    for name, value in {"RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert find_device("cuda") == find_device("auto") == torch.device("cuda:1")
    assert find_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert find_device("cuda") == torch.device("cuda:0")


@pytest.mark.parametrize("asked", ["cuda", "cuda:9", "xpu"])
def test_a_device_that_is_not_there_is_refused(machine: Any, asked: str) -> None:
    machine(cuda=4)
    assert find_device("cuda:3") == torch.device("cuda:3")
    with pytest.raises(
        MissingDependencyError, match=r"^--device cuda:4: torch sees only cuda:0 to cuda:3 here"
    ):
        find_device("cuda:4")
    machine()
    with pytest.raises(MissingDependencyError, match=rf"^--device {asked}: .*: say --device cpu") as raised:
        find_device(asked)
    assert raised.value.exit_code == 3 and str(raised.value).count(". ") == 0


PLACES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def precisions() -> list[str]:
    return [place.fp32_precision for place in PLACES]


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_is_multiplied_as_such(allowed: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = allowed
        before = precisions()
        with pytest.raises(ZeroDivisionError), exact_float32():
            assert "tf32" not in precisions() and not matmul.allow_tf32 and not cudnn.allow_tf32
            raise ZeroDivisionError
        assert precisions() == before
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = False, True  # torch's own defaults


# tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),  # it ends in Model too: the longest ending counts
        ("BertModel", "feature-extraction"),
        ("ViTModel", "feature-extraction"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("ViTForImageClassification", "image-classification"),
    ],
)
def test_a_head_says_what_a_model_is_for(architecture: str, task: str) -> None:
    found = task_of([architecture])
    assert found and found.name == task and found == task_named(task)
    assert hasattr(transformers, found.loads)
    assert found.causal == (task == "text-generation")


# pooling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("left", [True, False])
def test_pooling_passes_over_padding(tmp_path: Path, mode: str, left: bool) -> None:
    as_sentence_transformer(tmp_path, f"{mode}_token{'' if mode == 'cls' else 's'}", left)
    pooling = find_pooling(tmp_path)
    assert pooling == Pooling(mode, left, ("modules.json", "1_Pooling/config.json"))
    generator = np.random.default_rng(0)
    states = generator.standard_normal((3, 6, 5)) - 4  # zeros would be the largest
    rows = [slice(6 - n, 6) if left else slice(0, n) for n in (6, 3, 1)]
    mask = np.zeros((3, 6), dtype=np.int64)
    expected = []
    for i, row in enumerate(rows):
        mask[i, row] = 1
        kept = states[i, row]
        vector = {"mean": kept.mean(0), "cls": kept[0], "max": kept.max(0)}[mode]
        expected.append(vector / np.linalg.norm(vector) if left else vector)
    found = pool(pooling, torch.from_numpy(states).float(), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found, np.array(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "config", "said"),
    [
        (
            ["Transformer", "Dense", "Pooling"],
            "{}",
            "has the modules Transformer, Dense, Pooling: supported are a Transformer",
        ),
        (["Pooling", "Transformer"], "{}", "has the modules Pooling, Transformer: supported are"),
        (["Transformer"], "{}", "has the modules Transformer: supported are"),
        (
            ["Transformer", "Pooling"],
            "{}",
            "asks for the pooling none: supported is one of mean, cls, max and lasttoken",
        ),
        (
            ["Transformer", "Pooling"],
            '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}',
            "asks for the pooling mean, cls",
        ),
        (["Transformer", "Pooling"], "[]", "asks for the pooling none"),
        (["Transformer", "Pooling"], "{", "The pooling's configuration is damaged"),
        (None, "{}", "is not a list of modules"),
    ],
)
def test_a_pooling_that_is_not_served(
    tmp_path: Path, modules: list[str] | None, config: str, said: str
) -> None:
    as_sentence_transformer(tmp_path)
    listed = [{"type": f"sentence_transformers.models.{m}", "path": "1_Pooling"} for m in modules or ()]
    (tmp_path / "modules.json").write_text(json.dumps(listed if modules else {"type": 1}))
    (tmp_path / "1_Pooling" / "config.json").write_text(config)
    with pytest.raises(InputError, match=said) as told:
        find_pooling(tmp_path)
    assert "\n" not in str(told.value)


def test_the_last_token_is_the_last_that_is_no_padding() -> None:
    states = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    torch.testing.assert_close(last_token(states, mask), torch.stack([states[0, 3], states[1, 1]]))
    torch.testing.assert_close(pool(Pooling("lasttoken", False, ()), states, mask), last_token(states, mask))
