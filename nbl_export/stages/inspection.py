"""Show a file or an output folder as tables, and draw its report again; imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.blocks import Block
from nbl_export.errors import InputError, NblError, first_line
from nbl_export.files import member, read_json, sha256_of_file, write_json
from nbl_export.linearize.plan import load_plan
from nbl_export.models.source import ModelIdentity
from nbl_export.records import StageRecord, from_json
from nbl_export.report.assemble import conversions_in, rewrite_of, selection_of
from nbl_export.report.drawing import Table, mebibytes
from nbl_export.report.render import write_report
from nbl_export.report.schema import Report, load_report
from nbl_export.report.selection import layers_table
from nbl_export.report.tables import engines_table, forms_table, graph_table, report_tables
from nbl_export.tensorfile import format_of
from nbl_export.workspace import ENGINE_SUFFIX, PACKAGE, Workspace, is_package, is_workspace

if TYPE_CHECKING:
    import onnx_ir as ir

SCHEMA = "nbl-export/package/1"
REMEDY = "get the package again, or make it with `nbl-export package`"


def inspect(path: str | Path) -> list[Table]:
    """What an ONNX file, an engine, a plan, moments, a report, an output folder, a package of one, or what `convert`
    wrote holds, as tables.

    Raises :class:`InputError` for anything else.
    """
    from nbl_export.export.sidecars import graph_in

    path, kind = Path(path), ""
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path.")
    if path.is_dir():
        if is_workspace(path) or is_package(path):
            return _folder(path) if is_workspace(path) else _package(path)
        files = sorted(path.glob("*.safetensors"))
        if bool(files) and format_of(files[0]).startswith(_MOMENTS):
            return _moments(path)
        of_weights = [*files, *path.glob("openvino_model.bin")]
        graphs = [*path.glob("*.onnx")] or not (path / "config.json").is_file() or not of_weights
        return _onnx(graph_in(path)) if graphs else _model_folder(path, of_weights)
    if path.suffix == ".safetensors":
        kind = format_of(path)
    elif path.suffix == ".json" and isinstance(header := read_json(path, "The file", "check its path"), dict):
        kind = str(header.get("format") or header.get("schema") or "")
    for known, shown in _KINDS.items():
        if path.suffix == known or kind.startswith(known):
            return shown(path)
    raise InputError(
        f"{path} is not an ONNX or GGUF file, engine, plan, moments file, report or folder of nbl-export: check the "
        "path."
    )


@dataclass(frozen=True)
class Package:
    """A package: of which model, which ``layers`` are linear, in which precision, and the SHA-256 of its ``files``, of
    which one is the ``graph``.
    """

    created: str
    tool_version: str
    model: ModelIdentity
    layers: tuple[Block, ...]
    precision: str
    files: Mapping[str, str]
    graph: str = "model.onnx"


def load_package(root: Path) -> Package:
    """What ``package.json`` in ``root`` says; raises :class:`InputError` for anything else."""
    path = root / PACKAGE
    raw = read_json(path, "The package", REMEDY)
    if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
        raise InputError(f"{path} is not of a package of this version ({SCHEMA}): {REMEDY}.")
    found = from_json(Package, raw, str(path), REMEDY)
    for name in (found.graph, *found.files):
        member(root, name, f"A file in {path}")
    return found


def _package(path: Path) -> list[Table]:
    found = load_package(path)
    facts = (
        ("model", found.model.source),
        ("fingerprint of the model", found.model.fingerprint),
        ("linear", ", ".join(map(str, found.layers)) or "none"),
        ("precision", found.precision),
        ("files", f"{len(found.files)}, with their SHA-256"),
        ("made", f"{found.created} with nbl-export {found.tool_version}"),
    )
    return [Table(f"Package {path}", ("", "value"), facts), *_onnx(path / found.graph)]


def _onnx(path: Path) -> list[Table]:
    from nbl_export.graph.cache import LAYERS_KEY, state_pairs
    from nbl_export.graph.facts import summarize
    from nbl_export.graph.io import load_graph

    model = load_graph(path)
    s, states = summarize(model, path), len(state_pairs(model))
    facts = (
        ("size on disk", mebibytes(s.file_bytes)),
        ("parameters", f"{s.parameters:,}"),
        ("opsets", ", ".join(f"{k or 'ai.onnx'} {v}" for k, v in sorted(model.opset_imports.items()))),
        ("producer", f"{model.producer_name or ''} {model.producer_version or ''}".strip() or "not said"),
        ("nodes", f"{s.nodes:,}"),
        ("inputs / outputs", f"{s.inputs} / {s.outputs}"),
        ("KV pairs", str(s.kv_pairs)),
        *[("states", str(states))] * bool(states),
        ("rewritten by nbl-export", "yes" if LAYERS_KEY in model.metadata_props else "no"),
    )
    ops = tuple((op, f"{count:,}") for op, count in s.ops.items())
    return [Table(str(path), ("", "value"), facts), Table("Ops", ("op", "count"), ops), _regions(model)]


def _regions(model: ir.Model) -> Table:
    """The attention layers of a graph, and those that were linearized."""
    from nbl_export.graph.cache import LAYERS_KEY, kv_layers, kv_pairs, metadata_list
    from nbl_export.graph.operators import weight_format
    from nbl_export.graph.regions import Region, find_regions
    from nbl_export.graph.summary import DescribedLayer

    described = metadata_list(model, LAYERS_KEY, DescribedLayer)
    rows: dict[Block, tuple[str, ...]] = {
        one.layer: (str(one.layer), one.kind, "", "none", "done already")
        for one in described
        if one.kind in ("linear", "dropped")
    }
    pairs, found = {pair.index: pair for pair in kv_pairs(model)}, find_regions(model)
    # Without a cache, and where layers attend to another's, the retained attention layers are numbered from 0.
    left = (i for i in range(len(found) + len(rows)) if i not in rows)
    every = len(pairs) == len(found) > 0
    layers: dict[Block, Block] = dict(zip(pairs, kv_layers(model), strict=True) if every else enumerate(left))
    for region in found:
        layer = layers.get(region.layer, region.layer)
        pair = pairs.get(region.pair) if region.pair is not None else None
        cache = str(pair.past[0].name) if pair else "none"
        if isinstance(region, Region):
            how = f"{region.style}, {region.ops} nodes"
            rows[layer] = (str(layer), how, weight_format(region.projection), cache, "yes")
        else:
            rows[layer] = (str(layer), "", "", cache, f"no: {region.check} (found: {region.found})")
    header = ("layer", "attention", "weights", "KV cache", "rewritable")
    return Table("Attention", header, tuple(rows[layer] for layer in sorted(rows)))


def _engine(path: Path) -> list[Table]:
    from nbl_export.engine.library import find_gpu
    from nbl_export.engine.manifest import check_runs, load_manifest

    path = path.with_suffix(ENGINE_SUFFIX)
    manifest = load_manifest(path)
    try:
        here = f"yes, on {check_runs(manifest, gpu := find_gpu()) and gpu and gpu.name}"
    except NblError as reason:
        here = f"no: {reason}"
    facts = (
        ("role", manifest.role),
        ("linearized layers", ", ".join(map(str, manifest.linear_layers)) or "none"),
        ("KV pairs are of layers", ", ".join(map(str, manifest.kv_layers)) or "none"),
        ("built by", f"{manifest.created_by} with {manifest.library} {manifest.library_version}"),
        ("runs here", here),
        *((f"SHA-256 of {name}", digest) for name, digest in manifest.hashes.items()),
    )
    shapes = tuple(
        (f"{profile.name}: {name}", *("×".join(map(str, shape)) for shape in three))
        for profile in manifest.profiles
        for name, three in profile.shapes.items()
        if not name.startswith("past_key_values.") or name == "past_key_values.0.key"
    )
    tensors = tuple(
        (t.name, t.dtype, "×".join("?" if d < 0 else str(d) for d in t.shape))
        for t in (*manifest.network.inputs, *manifest.network.outputs)
    )
    return [
        engines_table([manifest]),
        Table(str(path), ("", "value"), facts),
        Table("Profiles", ("", "least", "optimum", "most"), shapes),
        Table("Inputs and outputs", ("", "dtype", "shape"), tensors),
    ]


def _plan(path: Path) -> list[Table]:
    plan = load_plan(path)
    ranks = ", ".join(f"{layer}: {rank}" for layer, rank in plan.ranks.items())
    facts = (
        ("model fingerprint", plan.model[:16]),
        ("layers", str(plan.layer_count)),
        ("hidden size", str(plan.hidden_size)),
        ("linearized", ", ".join(map(str, plan.blocks)) or "none"),
        ("criterion", plan.criterion),
        ("fit input", plan.fit_input),
        ("fit", plan.fit),
        ("ridge", "by held-out error" if plan.ridge is None else f"{plan.ridge:g}"),
        ("repair", f"{plan.repair:,} steps" if plan.repair else "none"),
        ("rank", ranks or ("full" if plan.rank is None else str(plan.rank))),
        ("calibration tokens", f"{plan.calibration_tokens:,}"),
    )
    return [Table(str(path), ("", "value"), facts)]


def _moments(path: Path) -> list[Table]:
    from nbl_export.calibrate.moments import load_moments

    moments, metadata = load_moments(path)
    rows = tuple(
        (str(i), f"{m.n:,}", *(f"{one.trace() / m.n:.4g}" for one in (m.xx, m.hh, m.yy)))
        for i, m in moments.layers.items()
    )
    note = f"Of the model {metadata['model'][:16]}. Energies are mean squared norms per token."
    columns = ("layer", "tokens", "energy of x (normed)", "energy of h (stream)", "energy of y (output)")
    return [Table(str(path), columns, rows, note)]


def _model_folder(path: Path, weights: Sequence[Path]) -> list[Table]:
    """A folder that other engines load, as `convert` writes it: of transformers, mlx-lm or OpenVINO."""
    config = read_json(path / "config.json", "The configuration of the model", "convert it again")
    if not isinstance(config, dict):
        raise InputError(f"{path / 'config.json'} is not a configuration of a model: convert it again.")
    blocks, nbl = config.get("block_configs") or (), config.get("nbl") or {}
    of_blocks = [f"{i}.{part}" for i, b in enumerate(blocks) for part in b if set(b[part]) & _NO_MODULE]
    facts = (
        ("model type", str(config.get("model_type", "not said"))),
        ("layers", str(config.get("num_hidden_layers", "not said"))),
        ("linear or dropped", ", ".join(of_blocks or nbl.get("modules", ())) or "not said"),
        ("dtype", str(config.get("dtype") or config.get("torch_dtype") or "not said")),
        ("files of weights", f"{len(weights)}, {mebibytes(sum(file.stat().st_size for file in weights))}"),
    )
    return [Table(str(path), ("", "value"), facts)]


def _gguf(path: Path) -> list[Table]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path} is no readable GGUF file ({first_line(error)}): get it again.") from None

    def said(name: str) -> Any:
        return field.contents() if (field := reader.get_field(name)) else "not said"

    family, types = said("general.architecture"), Counter(t.tensor_type.name for t in reader.tensors)
    heads, kv = (said(f"{family}.attention.head_count{end}") for end in ("", "_kv"))
    # As llama.cpp has it: heads without keys are one matrix, and a block without heads is an MLP alone.
    each = isinstance(heads, list) and isinstance(kv, list)
    linear = sum(h > 0 and not k for h, k in zip(heads, kv, strict=True)) if each else 0
    facts = (
        ("architecture", family),
        ("name", said("general.name")),
        ("blocks", str(said(f"{family}.block_count"))),
        ("blocks whose attention is one matrix", str(linear)),
        ("tensors", ", ".join(f"{count:,} {name}" for name, count in types.most_common())),
        ("size on disk", mebibytes(path.stat().st_size)),
    )
    return [Table(str(path), ("", "value"), facts)]


def _folder(path: Path) -> list[Table]:
    ws = Workspace.open(path)
    info, rows, tables = ws.model_info or {}, [], list[Table]()
    for stage in ws.stages:
        if record := ws.record(stage):
            damaged, stale = ws.damaged_file(record), ws.stale(stage)
            done = "done, deleted" if record.dropped else "done"
            state = f"out of date: {stale}" if stale else f"damaged: {damaged}" if damaged else done
            asked = ((key, _shown(value)) for key, value in record.settings.items())
            rows.append((stage, state, f"{record.seconds:.1f}", " ".join(f"{k}={v}" for k, v in asked if v)))
        else:
            rows.append((stage, "not yet", "", ""))
    rewritten = rewrite_of(ws) if ws.record("rewrite") and ws.rewrite_summary.exists() else None
    if rewritten:
        tables.append(graph_table(rewritten.before, rewritten.after))
    if ws.record("select"):
        proofs = rewritten.proofs if rewritten else ()
        tables.append(layers_table(selection_of(ws, load_plan(ws.plan)), proofs))
    if forms := conversions_in(ws):
        tables.append(forms_table(forms))
    inside = f", the language model of {info['wrapper']}" if info.get("wrapper") else ""
    title = f"{path}: {info.get('source', '?')}{inside}"
    return [Table(title, ("stage", "state", "seconds", "settings"), tuple(rows)), *tables]


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}:{v}" for k, v in value.items() if v is not None)
    return ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


_MOMENTS = "nbl-export/moments"
_NO_MODULE = {"replace_with_linear", "no_op"}
# By the suffix of a file, or by the format that it says.
_KINDS: dict[str, Callable[[Path], list[Table]]] = {
    ".onnx": _onnx,
    ".gguf": _gguf,
    "nbl-export/report/": lambda path: report_tables(load_report(path)),
    ENGINE_SUFFIX: _engine,
    "nbl-export/engine": _engine,
    "nbl-export/plan": _plan,
    _MOMENTS: _moments,
}

# the report ---------------------------------------------------------------------------------------


def report(out: str | Path) -> Report:
    """Read the report and redraw every other file of it from ``report.json``; needs no model.

    Raises :class:`InputError` for figures that are not those that were measured.
    """
    ws = Workspace.open(Path(out))
    path = ws.report / "report.json"
    with ws.lock():
        finish_drawing(ws)
        if ws.record("verify") and path.is_file() and recorded_report(ws) is None:
            raise InputError(
                f"{path} was changed after `verify` wrote it: run `nbl-export verify {ws.root}` again."
            )
        ws.check_measured("select", "export", "rewrite")
        return redrawn(ws, load_report(path))


def recorded_report(ws: Workspace) -> StageRecord | None:
    """The record of the last verification, if ``report.json`` is as that wrote it."""
    record, path = ws.record("verify"), ws.report / "report.json"
    digest = record.files.get(path.relative_to(ws.root).as_posix()) if record else None
    return record if digest and path.is_file() and digest == sha256_of_file(path) else None


def update_report(ws: Workspace, **parts: Any) -> None:
    """Give the report of the folder's graphs other ``parts``, if there is one."""
    if ws.current("verify") is None:
        return
    report = load_report(ws.report / "report.json")
    if (changed := replace(report, **parts)) != report:
        redrawn(ws, changed)


def redrawn(ws: Workspace, value: Report) -> Report:
    """Write every file of the report, which the record of the verification then knows.

    What is drawn is written down first: after a kill, :func:`finish_drawing` takes the new ``report.json`` for no edit.
    """
    write_json(ws.drawing, value.as_json())
    ws.redrew("verify", write_report(ws.report, value))
    ws.drawing.unlink()
    return value


def finish_drawing(ws: Workspace) -> None:
    """Go on with a drawing of the report that a kill has stopped after its first file, ``report.json``."""
    path = ws.report / "report.json"
    if not ws.drawing.is_file():
        return
    if path.is_file() and sha256_of_file(path) == sha256_of_file(ws.drawing):
        redrawn(ws, load_report(path))
    else:
        ws.drawing.unlink()
