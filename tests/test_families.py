"""Every family that is supported, in every form: PyTorch with the plan's maps and the graph say the same.

One row of :data:`tests.families.DECODERS` and one of its mixtures of experts each. ``scripts/tables.py families`` makes
the table in docs/families.md of what these tests found; what is refused is in :data:`REFUSED`, with the words it is
refused by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from nbl_export.engine.build import Source, Target, build_in_child
from nbl_export.engine.library import import_library
from nbl_export.engine.manifest import Limits, Manifest
from nbl_export.errors import BuildError, InputError
from nbl_export.export.checks import check_form
from nbl_export.export.experts import DENSE, MOE, check_precision
from nbl_export.export.forms import CONCAT, FORMS
from nbl_export.export.torch import export_torch, save_in_precision
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import precision_of
from nbl_export.models.candidates import check_supported
from nbl_export.models.dummy_run import cache_shapes
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.stages.rewrite import check_states
from nbl_export.verify.measure import Measurement, decoder_parity
from nbl_export.verify.parity.compare import Parity
from tests.conftest import ALL, exhaustive
from tests.end_to_end.test_matrix import CHOSEN, ROWS, crossed, parity, rewritten
from tests.exporters import GRAPH, Graphs
from tests.families import DECODERS, MIXTURES, Calibrated, attention_share
from tests.finished import on_random_text

Recorder = Callable[[str, object], None]
CACHES, PRECISIONS = ("concat", "static"), ("fp32", "fp16", "bf16")
LIMITS = Limits(2, 16, 64)
# The exporters of other projects are tried by the script that makes the table: they take minutes.
OTHERS = ("genai-fp32", "genai-int4", "optimum")
# Families that differ in what conversion to half precision and TensorRT look at: rope, windows, experts, biases and
# LayerNorms, soft-capping, sinks, fused projections, states.
CORE = ("llama", "mixtral", "gemma2", "gemma3n", "phi3", "gpt2", "bloom", "gpt_oss", "bamba", "qwen3_next")
# A half graph is the float32 one converted, whatever its cache; onnxruntime runs shared caches on the CPU, in float32.
# The table has all of them; the usual run has for every family but those alike the cache that every one has.
FORMS_TRIED = (*((c, p) for c in CACHES for p in PRECISIONS), ("shared", "fp32"))


# Of CORE, those whose other caches the usual run has; what is refused costs little.
STATIC, SHARED = ("gemma2", "gpt2"), ("llama", "gemma2")
ENGINES_BUILT = ("gemma2",)
# Of CORE, those whose forms no test of the check of forms, of lengths, or of rotary embeddings looks at.
CHECKED = ("gpt2", "bloom", "gpt_oss", "qwen3_next")
# Those that differ in operators; a bfloat16 graph is made as a float16 one, but for ranges.
FLOAT16 = ("llama", "gemma2", "gpt2", "gpt_oss", "bamba", "qwen3_next")
BFLOAT16 = ("llama", "gemma3n", "mixtral")
# Those that differ from another one by little but their names: the tests of exporters have most of them, too.
ALIKE = (
    "mistral",
    "qwen3",
    "gemma3-text",
    "phi",
    "gpt_neox",
    "falcon",
    "falcon-new",
    "opt-post-norm",
    "olmo2",
    "granite",
    "stablelm",
    "stablelm-parallel",
    "nemotron_h",
    "falcon_h1",
    "minimax",
)


TRIED = (*DECODERS, *MIXTURES)
FAMILIES = [pytest.param(f, marks=exhaustive) if f in (*ALIKE, *MIXTURES) else f for f in TRIED]


def usual(family: str, cache: str, precision: str) -> bool:
    if cache == "concat":
        of: Collection[str] = {"fp32": DECODERS, "fp16": FLOAT16, "bf16": BFLOAT16}[precision]
        return family not in ALIKE and family in of
    return family in (STATIC if cache == "static" else SHARED) and precision != "bf16"


GRAPHS = [
    pytest.param(
        family,
        cache,
        precision,
        id=f"{family}-{cache}-{precision}",
        marks=() if usual(family, cache, precision) else exhaustive,
    )
    for family in TRIED
    for cache, precision in FORMS_TRIED
]
ENGINES = [
    pytest.param(
        family,
        cache,
        id=f"{family}-{cache}",
        marks=() if family in ENGINES_BUILT and cache == "static" else exhaustive,
    )
    for family in TRIED
    for cache in CACHES
]

_NO_POSITIONS = "takes no position_ids, which a static cache needs: use --kv-cache concat"
_NOT_GROUPED = "does not compute: use --kv-cache concat"
_NO_STATES = "has no inputs for their states: use --exporter torch with --kv-cache concat"
HYBRIDS = (
    "lfm2",
    "bamba",
    "nemotron_h",
    "falcon_h1",
    "qwen3_next",
    "minimax",
    "lfm2_moe",
    "granitemoehybrid",
)
EXPERTS = ("mixtral", "gpt_oss", "qwen3_next", "minimax")
# As `--trt` has it, since TensorRT takes experts in this form alone, and as `--precision int4`.
ALL_FORMS = {**FORMS, "dense": replace(CONCAT, experts=DENSE), "moe": replace(CONCAT, experts=MOE)}
# (family, what) → a part of the sentence it is refused with.
REFUSED: Mapping[tuple[str, str], str] = {
    ("bloom", "static"): _NO_POSITIONS,
    ("falcon-alibi", "static"): "use --kv-cache concat",
    **{
        (family, "shared"): _NOT_GROUPED
        for family in (
            "gemma2",
            "gemma3n",
            "gemma4",
            "falcon-alibi",
            "stablelm",
            "stablelm-parallel",
            "bloom",
            "gpt_oss",
            "deepseek_v3",
        )
    },
    **{(family, "static"): _NO_STATES for family in HYBRIDS},
    **{(family, "shared"): _NOT_GROUPED for family in ("bamba", "nemotron_h", "falcon_h1", "qwen3_next")},
    **{(family, "engine concat"): "models with layers that keep a state" for family in HYBRIDS},
    ("falcon-alibi", "engine concat"): "died by SIGSEGV",
    **{("phimoe", precision): "is sent its tokens by no top-k" for precision in ("fp16", "bf16")},
    # Its router moves more than the integers of so small a model explain.
    ("lfm2_moe", "int4"): "choices of experts fall short in its router",
    **{("deepseek_v3", f"engine {form}"): "Key and Value must have the same shape" for form in CACHES},
}


@pytest.fixture(scope="module")
def exported(
    calibrated_of: Callable[[str], Calibrated], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Path]:
    """The unmodified graph of a family with a cache, in a precision; traced once for all precisions."""
    root = tmp_path_factory.mktemp("exported")

    @cache
    def graph(family: str, form: str, precision: str) -> Path:
        path = root / family / form / precision / GRAPH
        path.parent.mkdir(parents=True, exist_ok=True)
        if precision == "fp32":
            if ALL or family in CHECKED or form == "shared":  # it traces the model once more
                check_form(calibrated_of(family).model, ALL_FORMS[form])
            export_torch(calibrated_of(family).model, path, form=ALL_FORMS[form])
        else:
            check_precision(calibrated_of(family).model, precision)
            source = load_graph(graph(family, form, "fp32"))
            save_in_precision(source, path, precision_of(precision), ROWS)
        return path

    return graph


def refused(family: str, what: str, act: Callable[[], object], record_property: Recorder) -> bool:
    """Whether ``act`` is refused, as the table of refusals says; then with its sentence, which is recorded."""
    words = REFUSED.get((family, what))
    if words is None:
        return False
    with pytest.raises((InputError, BuildError)) as caught:
        act()
    assert words in str(caught.value) and "\n" not in str(caught.value)
    record_property("refused", said(caught.value))
    return True


def said(error: Exception) -> str:
    """The sentence without where the model or the graph lay, and what a library says after the latter."""
    sentence = re.sub(r"The /\S+ model", "The model", str(error))
    sentence = re.sub(r" of /\S+ with \S+ \S+ (?=died)", " ", sentence)
    return re.sub(r"( of)? /\S+.*", "", sentence).rstrip(".:") + "."


def assert_passes(found: Parity) -> None:
    assert found.failures() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_matters(family: str, calibrated_of: Callable[[str], Calibrated]) -> None:
    """A graph without its attention, or with the fitted maps in its place, would not pass for the model."""
    without, linear = attention_share(calibrated_of(family))
    assert without > 0.3
    assert linear > 0.01


@pytest.mark.parametrize(("family", "form", "precision"), GRAPHS)
def test_graph(
    family: str,
    form: str,
    precision: str,
    exported: Callable[[str, str, str], Path],
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    record_property: Recorder,
) -> None:
    """Ragged prefill and decode, half the layers linear, and in float32 one layer, and spans of layers."""
    for what in (form, precision):
        if refused(family, what, lambda: exported(family, form, precision), record_property):
            return
    case, source = calibrated_of(family), exported(family, form, precision)
    lengths = crossed(case.model)
    assert not [one.why for one in lengths if one.why and one.reached]
    record_property("crosses", ", ".join(one.length.name for one in lengths if one.reached))
    for k in ("one", "half", "spans") if precision == "fp32" and (ALL or family in CORE) else ("half",):
        plan = case.plan(CHOSEN[k])
        result = rewrite_file(source, plan, tmp_path / k / GRAPH)
        cached = cache_shapes(case.model)
        assert result.before.kv_pairs - result.after.kv_pairs == len(set(plan.chosen) & set(cached))
        if family in MIXTURES and precision != "fp32":  # where PyTorch is told the graph's choices of experts
            found = Measurement()
            decoder_parity(on_random_text(case.model, plan, source, tmp_path / k / GRAPH), found)
            assert {check.status for check in found.checks} == {"passed"}, found.checks
            continue
        dtype = precision_of(precision).gates
        assert_passes(parity(case.model, plan, tmp_path / k / GRAPH, dtype))


@pytest.mark.parametrize("precision", ["int4"])
@pytest.mark.parametrize(
    "family", [f if f in ("gpt2", "qwen3_moe-64") else pytest.param(f, marks=exhaustive) for f in TRIED]
)
def test_integers(
    family: str,
    precision: str,
    exported: Callable[[str, str, str], Path],
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    record_property: Recorder,
) -> None:
    """By our own quantizer, with experts in one operator.

    In models this small the integers of W cost more than those of the attention that it stands for: up to three times.
    """

    model, plan = calibrated_of(family).model, calibrated_of(family).plan(CHOSEN["half"])

    def linear() -> Path:
        base = exported(family, "moe" if family in (*EXPERTS, *MIXTURES) else "concat", precision)
        rewrite_file(base, plan, tmp_path / GRAPH)
        return base

    if refused(family, precision, linear, record_property):
        return
    base = linear()
    found = decoder_parity(on_random_text(model, plan, base, tmp_path / GRAPH), Measurement())
    assert found.base_graph is not None
    own = [step.mean_abs for step in found.base_graph]
    assert found.mean_abs < 3 * sum(own) / len(own)


@pytest.mark.parametrize(("family", "form"), ENGINES)
def test_engine(
    family: str,
    form: str,
    exported: Callable[[str, str, str], Path],
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    record_property: Recorder,
) -> None:
    """A float16 engine of the graph with half its layers linear, built ahead of time."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'nbl-export[rtx]'")
    for what in (form, "fp16"):
        if refused(family, what, lambda: exported(family, form, "fp16"), record_property):
            return
    plan = calibrated_of(family).plan(CHOSEN["half"])
    graph = tmp_path / GRAPH
    experts = form == "concat" and family in (*EXPERTS, *MIXTURES)
    rewrite_file(exported(family, "dense" if experts else form, "fp16"), plan, graph)
    target = Target(import_library("tensorrt-rtx"), None, LIMITS, ("SM86",))
    source = Source("linearized", graph, len(plan.attention_layers), tmp_path / "model.engine")

    def build() -> Manifest:
        check_states(calibrated_of(family).model)  # as the stage does, before any work
        return build_in_child(target, source, tmp_path / "timings", lambda _steps: None)

    if refused(family, f"engine {form}", build, record_property):
        return
    built = build()
    record_property("fused", built.attention == "fused")
    assert built.size > 0


@exhaustive
@pytest.mark.parametrize("exporter", OTHERS)
@pytest.mark.parametrize("family", TRIED)
def test_other_exporter(
    family: str,
    exporter: str,
    graphs: Graphs,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    record_property: Recorder,
) -> None:
    """What another project exports, or our proof takes, is for the table to say; a graph that is rewritten is right."""
    case = calibrated_of(family)
    plan = case.plan(CHOSEN["half"])
    try:
        check_supported(case.model)  # as the stage does, before any work
        out, _ = rewritten(graphs(exporter, family), plan, tmp_path)
    except (InputError, BuildError) as refusal:
        record_property("refused", said(refusal))
        return
    assert_passes(parity(case.model, plan, out / GRAPH, "int4" if "int4" in exporter else "float32"))
