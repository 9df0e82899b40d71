"""A form in which a model is another one is refused; a graph traced without the weights is that of one in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from nbl_export.errors import InputError
from nbl_export.export import checks as module
from nbl_export.export import torch as exporting
from nbl_export.export.checks import _error, check_form, crossed_on_copy
from nbl_export.export.forms import CONCAT, FORMS, NONE, SHARED, STATIC, Branches, encoder_form
from nbl_export.export.functions import exportable
from nbl_export.export.tidy import StandIns
from nbl_export.export.torch import export_torch, trace
from nbl_export.graph.summary import OnCopy
from nbl_export.models import weights
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.folder import task_named
from nbl_export.models.lengths import Room
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from tests import families
from tests.families import unsaved
from tests.models.test_weights import absent, reads, stored_in
from tests.tiny import build as build_tiny
from tests.tiny_types import BEYOND, ENCODERS, tiny_model


@pytest.mark.parametrize(
    ("model_type", "form"),
    [("llama", SHARED), ("gemma2", STATIC), ("opt", NONE), ("lfm2", CONCAT)],
)
def test_every_form_is_the_model(model_type: str, form: Any) -> None:
    check_form(tiny_model(model_type), form)


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("gpt_oss", "GptOssAttention has attention sinks"),
        ("bloom", "Layer 0 has attention that is not one Attention"),
        ("gemma2", "Gemma2Attention caps its scores"),
    ],
)
def test_other_attention_than_the_operators_is_refused_before_any_work(model_type: str, found: str) -> None:
    with pytest.raises(InputError, match=f"^{found}.* does not compute: use --kv-cache concat"):
        check_form(unsaved(model_type, num_hidden_layers=1), SHARED)


def test_a_window_over_places_is_no_window_over_positions() -> None:
    # GPT-Neo takes its own local mask by the length of the cache, which a static buffer has from the start.
    attention = [[["global", "local"], 1]]
    model = tiny_model("gpt_neo", num_layers=2, num_hidden_layers=2, attention_types=attention)
    check_form(model, CONCAT)  # whose table is as long as the model, which is no branch
    with pytest.raises(
        InputError, match=r"GPTNeoForCausalLM computes other logits with --kv-cache static.*concat"
    ):
        check_form(model, STATIC)


def test_positions_that_count_padding_are_refused() -> None:
    config = AutoConfig.for_model(
        "bart", vocab_size=60, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.ndim > 1 else 1)
    for form, remedy in ((CONCAT, "try --kv-cache none"), (NONE, "this architecture is not supported yet")):
        with pytest.raises(InputError, match=rf"padded rows: {remedy}\.$"):
            check_form(model, form)


@pytest.mark.parametrize(
    ("name", "form"), [*((name, CONCAT) for name in BEYOND), ("gemma3", STATIC), ("phi3", NONE)]
)
def test_what_begins_at_a_length_is_rehearsed(name: str, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BEYOND[name].model()
    assert _error(model, form) < 1e-3
    # A form that computes another model is seen beyond the length alone.
    off = BEYOND[name].model(off=True)
    dummy_run(off)
    other = replace(form, module=lambda _model: form.module(off))
    monkeypatch.setattr(module, "exportable", lambda _model, *functions: exportable(off, *functions))
    assert _error(model, other) > 0.1
    monkeypatch.setattr(module, "crossed_by", lambda *_: ())
    assert _error(model, other) < 1e-3


# What cannot be traced ----------------------------------------------------------------------------


def changed(monkeypatch: pytest.MonkeyPatch, mlp: Callable[[Any, Any, torch.Tensor], torch.Tensor]) -> Any:
    """A Llama with another MLP, which is given its own."""
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: mlp(own, self, x))
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("mlp", "found"),
    [
        (
            lambda own, self, x: torch.cat([own(self, x[:, i : i + 1]) for i in range(x.shape[1])], dim=1),
            "takes a step for each token of a text, and a graph",
        ),
        (
            lambda own, self, x: own(self, x * 2 if x.mean() > 1000 else x),
            "goes one of two ways by a number that it computes",
        ),
    ],
)
def test_what_torch_cannot_trace_is_refused_in_our_words(
    monkeypatch: pytest.MonkeyPatch, mlp: Any, found: str
) -> None:
    with pytest.raises(InputError, match=f"^LlamaForCausalLM {found}"):
        check_form(changed(monkeypatch, mlp), CONCAT)


def test_a_trace_without_end_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def forward(own: Any, self: Any, x: torch.Tensor) -> torch.Tensor:
        while torch.compiler.is_exporting():
            x = self.act_fn(x)
        return own(self, x)

    model = changed(monkeypatch, forward)
    monkeypatch.setattr(exporting, "_BASE", 0.5)
    monkeypatch.setattr(exporting, "_OF_BLOCK", 0.0)
    for work in (lambda: check_form(model, CONCAT), lambda: export_torch(model, tmp_path / "model.onnx")):
        with pytest.raises(InputError, match=r"^Tracing LlamaForCausalLM takes longer than 0 s"):
            work()
    assert list(tmp_path.iterdir()) == [] and model.config._attn_implementation == "sdpa"


def branching(monkeypatch: pytest.MonkeyPatch, longer: Callable[[Any], bool]) -> Any:
    """A Llama whose MLP doubles the states of a text that is ``longer`` than those that are traced."""
    return changed(monkeypatch, lambda own, self, x: own(self, x) * 2 if longer(x.shape[1]) else own(self, x))


@pytest.mark.parametrize("form", [CONCAT, STATIC, NONE], ids=lambda form: form.name)
def test_a_branch_on_the_number_of_new_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, form: Any) -> None:
    model = branching(monkeypatch, lambda tokens: tokens > 60)
    with pytest.raises(
        Branches, match=r"^LlamaForCausalLM computes texts of more than 6\d tokens in another"
    ):
        check_form(model, form)


# On a copy ----------------------------------------------------------------------------------------


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every model were large."""
    monkeypatch.setattr(module, "REHEARSAL", Room(0.0))


def test_an_encoder_is_crossed_on_a_copy_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ENCODERS["modernbert"].model()
    rows = {name: np.ones((2, 40), np.int64) for name in ("input_ids", "attention_mask")}
    form = encoder_form(model, task_named("feature-extraction"), None, rows)
    (found,) = crossed_on_copy(model, form)
    assert found.key == ENCODERS["modernbert"].key and not found.why
    monkeypatch.setattr(module, "_error_of_copy", lambda *_: 9.0)
    with pytest.raises(InputError, match=r"^The graph of \w+ computes other outputs than PyTorch beyond "):
        crossed_on_copy(ENCODERS["modernbert"].model(), form)


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize(("name", "form"), [("phi3", "static"), ("mistral", "shared")])
def test_a_right_form_is_crossed_and_says_with_what(name: str, form: str) -> None:
    assert crossed_on_copy(BEYOND[name].model(), FORMS[form]) == (OnCopy(BEYOND[name].key, 100, 16),)


@pytest.mark.usefixtures("no_room")
def test_a_graph_without_it_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mistral"

    def export(copy: torch.nn.Module, path: Any, form: Any) -> Any:
        fields: Any = {**copy.config.to_dict(), **BEYOND[name].off}  # type: ignore[operator, union-attr]
        other = type(copy)(type(copy.config).from_dict(fields)).float().eval()  # type: ignore[union-attr]
        other.load_state_dict(copy.state_dict())
        return export_torch(other, path, form=form)

    monkeypatch.setattr(module, "export_torch", export)
    with pytest.raises(
        InputError,
        match=rf"^\w+ with --kv-cache concat computes other logits than PyTorch beyond {BEYOND[name].key} 100 \(error "
        r".* where that is 16\): use another --kv-cache, or another --exporter\.$",
    ):
        crossed_on_copy(BEYOND[name].model(), CONCAT)


@pytest.mark.usefixtures("no_room")
def test_what_a_copy_cannot_show_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("It cannot be made smaller.\nAnd more")

    monkeypatch.setattr(module, "small_copy", refuse)
    found = crossed_on_copy(BEYOND["mistral"].model(), CONCAT)
    assert found == (OnCopy("sliding_window", 100, why="It cannot be made smaller"),)


# weights that are not in memory ------------------------------------------------------------------

# Blocks are alike, and each takes seconds.
LAYERS = 2
# More numbers than onnx_ir compares to find equal constants.
LARGE = 1025


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of tiny models are worth a stand-in, too, but those that the exporter compares by their numbers."""
    monkeypatch.setattr("nbl_export.models.weights._LARGE", 4 * LARGE)


@contextmanager
def traced() -> Iterator[list[Any]]:
    """Within the block, the models that are traced."""
    found: list[Any] = []
    plain = exporting._traced

    def counted(model: Any, *rest: Any) -> Any:
        found.append(model)
        return plain(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_traced", counted)
        yield found


def streaming(folder: Path) -> Any:
    model = load_model(find_model(str(folder)))
    assert absent(model)
    return model


def in_memory(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def tiny(folder: Path, **changes: Any) -> Path:
    return build_tiny(folder / "m", num_hidden_layers=LAYERS, **changes)


def files(model: Any, folder: Path, form: str = "concat") -> list[bytes]:
    folder.mkdir()
    return [path.read_bytes() for path in export_torch(model, folder / "model.onnx", form=FORMS[form])]


@pytest.mark.usefixtures("all_are_large")
def test_every_kind_of_weight(tmp_path: Path) -> None:
    """Transposed matrices, and projections in one."""
    folder = stored_in(families.build("phi3", tmp_path / "phi3", num_hidden_layers=LAYERS), torch.bfloat16)
    model = streaming(folder)
    with traced() as calls:
        found = files(model, tmp_path / "streaming", "shared")
    assert calls == [model], "the first trace is the last"
    assert found == files(in_memory(folder), tmp_path / "memory", "shared")
    assert absent(model)


@pytest.mark.usefixtures("all_are_large")
def test_a_matrix_is_read_when_it_is_written(tmp_path: Path) -> None:
    model = streaming(stored_in(tiny(tmp_path, tie_word_embeddings=False), torch.bfloat16))
    dummy_run(model)
    small = sorted(n for n, p in model.named_parameters() if p.numel() < LARGE)
    with traced() as calls, reads() as found:
        graph = trace(model, FORMS["concat"])
        assert len(calls) == 1 and sorted(found) == small
        assert absent(model)
        (value,) = (v for n, v in graph.graph.initializers.items() if "layers.1.mlp.up_proj" in n)
        assert value.const_value is not None
        found.clear()
        array = value.const_value.numpy()
    assert found == ["model.layers.1.mlp.up_proj.weight"]
    with weights.resident(model):
        assert np.array_equal(array.T, model.model.layers[1].mlp.up_proj.weight.numpy())


@pytest.mark.usefixtures("all_are_large")
def test_a_weight_that_was_computed_with_is_there_when_it_is_traced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored_in(tiny(tmp_path), torch.bfloat16)
    plain = exporting.tidy

    def scaled(model: ir.Model, *rest: Any) -> ir.Model:
        """As an optimizer that merges a factor into a matrix."""
        graph = plain(model, *rest)
        value = next(v for n, v in graph.graph.initializers.items() if "down_proj" in n)
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)
        return graph

    monkeypatch.setattr(exporting, "tidy", scaled)
    model = streaming(folder)
    with traced() as calls:
        found = files(model, tmp_path / "streaming")
    assert len(calls) == 2 and absent(model)
    assert found == files(in_memory(folder), tmp_path / "memory")


@pytest.mark.usefixtures("all_are_large")
def test_stand_ins_are_compared_by_what_they_stand_for(tmp_path: Path) -> None:
    model = streaming(stored_in(tiny(tmp_path), torch.bfloat16))
    with weights.standing_in(model) as found:
        stand_ins = StandIns(found)
        one, other = [s.tensor.numpy() for s in found if s.tensor is not None and s.empty.shape == (64, 32)][
            :2
        ]
        assert stand_ins.equal(one, one) and stand_ins.equal(one.T, one.T)
        assert not stand_ins.equal(one, other), "other numbers, although neither has any"
        assert not stand_ins.equal(one, one.T) and not stand_ins.equal(one[1:], one[:-1])
        zeros = np.zeros((64, 32), np.float32)
        assert not stand_ins.equal(one, zeros) and not stand_ins.equal(zeros, one)
        assert stand_ins.equal(zeros, zeros.copy()) and not stand_ins.equal(zeros, zeros + 1)
