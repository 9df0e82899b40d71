"""The stages in order; the only module that knows all of them.

Each verb works on an output folder and skips what is already done there with the same settings:

    calibrate → select ─┐
    export ─────────────┴→ rewrite → verify → report
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export import __version__
from nbl_export.calibrate.text import TextSettings
from nbl_export.errors import InputError, os_error_in_words
from nbl_export.linearize.lmmse import DEFAULT_RIDGE, FitInput
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.models.source import ModelSource, find_model, same_model
from nbl_export.progress import Listener, Silent
from nbl_export.report.schema import Check, Report, jsonable, load_report
from nbl_export.workspace import Workspace, atomic_path, read_json, sha256_of_json, write_json

if TYPE_CHECKING:
    import torch

    from nbl_export.calibrate.text import CalibrationText
    from nbl_export.graph.rewrite import RewriteResult


# Calibration has no settings of its own but what text to take.
CalibrateSettings = TextSettings


@dataclass(frozen=True)
class SelectSettings:
    """Which layers: the ``k`` best by ``criterion``, or exactly ``layers``; and how they are fitted."""

    k: int | None = None
    layers: tuple[int, ...] | None = None
    criterion: str = "cca"
    fit_input: FitInput = "normed"
    ridge: float = DEFAULT_RIDGE

    def check(self) -> None:
        from nbl_export.linearize.select import CRITERIA, check_k

        if self.k is None and self.layers is None:
            raise InputError("Say how many layers to linearize: --k K (or name them with --layers).")
        if self.k is not None:
            check_k(self.k, None)
        if self.criterion not in CRITERIA:
            raise InputError(
                f"--criterion {self.criterion!r} is unknown; choose one of {', '.join(CRITERIA)}."
            )
        if self.fit_input not in ("normed", "residual"):
            raise InputError(f"--fit-input {self.fit_input!r} is unknown; choose normed or residual.")
        if not 0 <= self.ridge <= 1e-2:
            raise InputError(f"--ridge is {self.ridge:g}; it must be between 0 and 0.01.")


@dataclass(frozen=True)
class VerifySettings:
    """What to verify: decode steps of the parity run, and the optional quality and speed sections.

    ``contexts`` longer than the model's positions are left out, with a note.
    """

    decode_steps: int = 8
    quality: bool = True
    speed: bool = True
    contexts: tuple[int, ...] = (128, 512, 1024)
    rounds: int = 7

    def check(self) -> None:
        if self.decode_steps < 1:
            raise InputError(f"--decode-steps is {self.decode_steps}; it must be at least 1.")
        if self.rounds < 3:
            raise InputError(f"--rounds is {self.rounds}; at least 3 are needed for a spread.")
        if any(c < 2 for c in self.contexts) or not self.contexts:
            raise InputError("--contexts needs lengths of at least 2 tokens.")


class LoadedModel:
    """A model and its tokenizer, loaded when first asked for and then kept for the run."""

    def __init__(self, source: ModelSource, listener: Listener) -> None:
        self.source = source
        self._listener = listener
        self._model: torch.nn.Module | None = None
        self._tokenizer: Any = None

    @property
    def model(self) -> torch.nn.Module:
        if self._model is None:
            from nbl_export.models.load import load_model

            with self._listener.task(f"Loading {Path(self.source.source).name}", 1, "model") as task:
                self._model = load_model(self.source)
                task.advance(1)
        return self._model

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from nbl_export.models.load import load_tokenizer

            self._tokenizer = load_tokenizer(self.source)
        return self._tokenizer


class _Noting:
    """Passes everything on to a listener and keeps the notes, for the stage's record."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.notes: list[str] = []
        self.task = listener.task

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._listener.note(text)


@dataclass
class Run:
    """One invocation on one output folder: the workspace, the model, and who listens."""

    workspace: Workspace
    model: LoadedModel
    listener: Listener = field(default_factory=Silent)

    @classmethod
    def start(
        cls, model: str, out: Path, listener: Listener | None = None, trust_remote_code: bool = False
    ) -> Run:
        """Begin with a model: an existing output folder must be of the same one."""
        source = find_model(model, trust_remote_code)
        workspace = Workspace.create(out)
        workspace.set_model(source.as_json())
        return cls(workspace, LoadedModel(source, listener or Silent()), listener or Silent())

    @classmethod
    def resume(cls, out: Path, listener: Listener | None = None) -> Run:
        """Go on in an existing output folder with the model recorded there."""
        workspace = Workspace.open(out)
        info = workspace.model_info
        if info is None:
            raise InputError(f"{out} records no model: start with `nbl-export calibrate MODEL -o {out}`.")
        source = same_model(info)
        return cls(workspace, LoadedModel(source, listener or Silent()), listener or Silent())

    def stage(
        self, name: str, key: str, settings: dict[str, Any], work: Callable[[Listener], list[Path]]
    ) -> None:
        """Do ``work`` unless it is done; its files and notes are recorded when it succeeds."""
        if self.workspace.is_done(name, key):
            self.listener.note(f"{name}: done already, kept.")
            return
        listener = _Noting(self.listener)
        start = time.perf_counter()
        try:
            files = work(listener)
        except OSError as error:
            raise os_error_in_words(error, f"in stage `{name}`") from error
        self.workspace.finish(name, key, settings, files, time.perf_counter() - start, listener.notes)


# calibrate ---------------------------------------------------------------------------------------


def calibrate(run: Run, settings: CalibrateSettings) -> None:
    """Text → moments and probe."""
    from nbl_export.calibrate.collect import Checkpoint, collect_moments
    from nbl_export.calibrate.moments import save_moments
    from nbl_export.calibrate.probe import probe_model, save_probe
    from nbl_export.calibrate.text import load_text, save_text
    from nbl_export.models.layers import check_served

    settings.check()
    ws, fingerprint = run.workspace, run.model.source.fingerprint
    key = sha256_of_json({"model": fingerprint, "text": asdict(settings), "files": _stamps(settings.sources)})

    def work(listener: Listener) -> list[Path]:
        model = run.model.model
        check_served(model)
        _check_room(ws, model)
        if _text_key(ws) != key:
            save_text(ws.text, _read_text(run, settings, listener))
            write_json(ws.text.with_suffix(".json"), {"key": key})
        tokens = load_text(ws.text).calibration
        _check_enough(tokens.size, model)
        moments = collect_moments(model, tokens, fingerprint, Checkpoint(ws.checkpoint), listener)
        save_moments(ws.moments, moments, {"model": fingerprint, "tokens": int(tokens.size)})
        save_probe(ws.probe, probe_model(model, tokens))
        ws.checkpoint.unlink(missing_ok=True)
        return [ws.text, ws.moments, ws.probe]

    run.stage("calibrate", key, asdict(settings), work)


def _text_key(ws: Workspace) -> str | None:
    path = ws.text.with_suffix(".json")
    if not (path.exists() and ws.text.exists()):
        return None
    key: str | None = read_json(path, "The record of the calibration text", f"delete {path}").get("key")
    return key


def _read_text(run: Run, text: TextSettings, listener: Listener) -> CalibrationText:
    from nbl_export.calibrate.text import SELF, documents, pack, sample_from_model

    if text.sources == (SELF,):
        return sample_from_model(run.model.model, run.model.tokenizer, text, listener)
    return pack(documents(text.sources, text.field), run.model.tokenizer, text, listener)


def _stamps(sources: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the local files named: changed text is another calibration."""
    stamps = []
    for source in sources:
        path = Path(source).expanduser()
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            status = file.stat()
            stamps.append((str(file), status.st_size, status.st_mtime_ns))
    return stamps


def _check_enough(tokens: int, model: torch.nn.Module) -> None:
    from nbl_export.models.layers import hidden_size

    d = hidden_size(model)
    if tokens < d + 1:
        raise InputError(
            f"{tokens:,} calibration tokens are too few for a model of width {d}: at least {d + 1:,} are needed, "
            f"{20 * d:,} or more are advised; give more text, or raise --samples or --seq-len."
        )


def _check_room(ws: Workspace, model: torch.nn.Module) -> None:
    """Refuse early what the disk cannot hold: two float32 graphs, the moments and one checkpoint."""
    from nbl_export.models.layers import hidden_size, layer_count

    weights = 4 * sum(p.numel() for p in model.parameters())
    moments = 8 * 5 * hidden_size(model) ** 2 * layer_count(model)
    have = sum(f.stat().st_size for f in ws.root.rglob("*") if f.is_file())
    need = 2 * weights + 2 * moments - have
    free = shutil.disk_usage(ws.root).free
    if free < need:
        raise InputError(
            f"{ws.root} has {free / 2**20:,.0f} MiB free; this model needs about {need / 2**20:,.0f} MiB: "
            "free some space or choose another --output."
        )


# select ------------------------------------------------------------------------------------------


def select(run: Run, settings: SelectSettings) -> Plan:
    """Moments → plan: score every layer, choose K, keep their W and b with the proof's evidence."""
    from nbl_export.calibrate.moments import load_moments
    from nbl_export.calibrate.probe import load_probe
    from nbl_export.linearize.plan import LinearLayer, save_plan
    from nbl_export.linearize.select import choose_layers, fit_layer, score_layers

    settings.check()
    ws = run.workspace
    calibrated = ws.require("calibrate", f"nbl-export calibrate MODEL -o {ws.root}")
    key = sha256_of_json({"calibrate": calibrated.key, "select": asdict(settings)})

    def work(listener: Listener) -> list[Path]:
        moments, metadata = load_moments(ws.moments)
        candidates = score_layers(moments, settings.fit_input, settings.ridge, listener)
        chosen = choose_layers(candidates, settings.k, settings.criterion, settings.layers)
        layers = {}
        for layer in chosen:
            fit = fit_layer(moments, layer, settings.fit_input, settings.ridge)
            layers[layer] = LinearLayer(fit.w.astype("float32"), fit.b.astype("float32"))
        probe = load_probe(ws.probe)
        u = probe.x if settings.fit_input == "normed" else probe.h
        plan = Plan(
            model=run.model.source.fingerprint,
            hidden_size=len(next(iter(moments.layers.values())).x),
            layer_count=len(candidates),
            fit_input=settings.fit_input,
            criterion=settings.criterion if settings.layers is None else "by hand",
            ridge=settings.ridge,
            calibration_tokens=metadata["tokens"],
            layers=layers,
            probe={n: getattr(probe, n) for n in ("input_ids", "attention_mask", "position_ids")},
            probe_u=u,
            probe_y=probe.y,
        )
        save_plan(ws.plan, plan)
        write_json(ws.candidates, {"candidates": [c.as_json() for c in candidates]})
        return [ws.plan, ws.plan.with_suffix(".safetensors"), ws.candidates]

    run.stage("select", key, asdict(settings), work)
    return load_plan(ws.plan)


# export ------------------------------------------------------------------------------------------


def export(run: Run) -> None:
    """Model → ``baseline/model.onnx`` with configuration and tokenizer files beside it."""
    from nbl_export.export.torch import OPSET, export_torch
    from nbl_export.models.layers import check_served

    ws = run.workspace
    settings = {"exporter": "torch", "opset": OPSET, "dtype": "float32"}
    key = sha256_of_json({"model": run.model.source.fingerprint, "export": settings, "version": __version__})

    def work(listener: Listener) -> list[Path]:
        check_served(run.model.model)
        files = export_torch(run.model.model, ws.baseline, listener)
        return files + _save_configs(run, ws.baseline.parent)

    run.stage("export", key, settings, work)


def _save_configs(run: Run, folder: Path) -> list[Path]:
    from nbl_export.export.genai_config import NAME as GENAI
    from nbl_export.export.genai_config import genai_config
    from nbl_export.models.layers import layer_count
    from nbl_export.models.load import quiet
    from nbl_export.runtime.torch import kv_shape

    with quiet():
        config: Any = run.model.model.config
        config.save_pretrained(folder)
        generation: Any = getattr(run.model.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        run.model.tokenizer.save_pretrained(folder)
    heads, size = kv_shape(run.model.model)
    layers = layer_count(run.model.model)
    write_json(folder / GENAI, genai_config(config.get_text_config(), layers, heads, size))
    graph = run.workspace.baseline.name
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(graph))


# rewrite -----------------------------------------------------------------------------------------


def rewrite(run: Run) -> None:
    """Baseline graph + plan → ``model.onnx``, proven and counted, loadable as it stands."""
    from nbl_export.graph.prove import proofs_as_json
    from nbl_export.graph.rewrite import rewrite_file

    ws = run.workspace
    selected = ws.require("select", f"nbl-export select {ws.root} --k K")
    exported = ws.require("export", f"nbl-export export {ws.root}")
    key = sha256_of_json({"select": selected.key, "export": exported.key})

    def work(listener: Listener) -> list[Path]:
        plan = load_plan(ws.plan)
        if plan.model != run.model.source.fingerprint:
            raise InputError(
                f"{ws.plan} is the plan of another model: run `nbl-export select {ws.root}` again."
            )
        with listener.task("Rewriting the graph", 1, "graph") as task:
            result: RewriteResult = rewrite_file(ws.baseline, plan, ws.model)
            task.advance(1)
        summary = {
            "before": result.before.as_json(),
            "after": result.after.as_json(),
            "kv_layers": list(plan.kept),
            "proofs": proofs_as_json(result.proofs),
        }
        write_json(_rewrite_summary(ws), jsonable(summary))
        beside = [ws.root / name for name in exported.files if not Path(name).name.startswith(ws.model.name)]
        return [*result.files, _rewrite_summary(ws), *(_copy_config(path, ws.root, plan) for path in beside)]

    run.stage("rewrite", key, {}, work)


def _copy_config(source: Path, folder: Path, plan: Plan) -> Path:
    """Copy a file that lies beside the baseline graph; configurations are told what was linearized."""
    from nbl_export.export.genai_config import NAME as GENAI

    target = folder / source.name
    if source.name in (GENAI, "config.json"):
        config = read_json(source, "The baseline's configuration", "run `nbl-export export` again")
        if source.name == GENAI:
            config["model"]["decoder"]["num_hidden_layers"] = len(plan.kept)
        else:
            config["nbl_export"] = {"linearized_layers": list(plan.chosen), "kv_layers": list(plan.kept)}
        write_json(target, config)
    else:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    return target


def _rewrite_summary(ws: Workspace) -> Path:
    return ws.nbl / "rewrite.json"


# verify ------------------------------------------------------------------------------------------


def verify(run: Run, settings: VerifySettings) -> Report:
    """Parity, method loss and speed → ``report/``; a failed gate is in the report, not an exception."""
    from nbl_export.report.render import write_report

    settings.check()
    ws = run.workspace
    selected = ws.require("select", f"nbl-export select {ws.root} --k K")
    exported = ws.require("export", f"nbl-export export {ws.root}")
    rewritten = ws.require("rewrite", f"nbl-export rewrite {ws.root}")
    if rewritten.key != sha256_of_json({"select": selected.key, "export": exported.key}):
        raise InputError(
            f"The plan or the baseline changed after `rewrite`: run `nbl-export rewrite {ws.root}` first."
        )
    key = sha256_of_json({"rewrite": rewritten.key, "verify": asdict(settings)})

    def work(listener: Listener) -> list[Path]:
        return write_report(ws.report, _measure(run, settings, listener))

    run.stage("verify", key, asdict(settings), work)
    return load_report(ws.report / "report.json")


def _measure(run: Run, settings: VerifySettings, listener: Listener) -> Report:
    from nbl_export.calibrate.text import load_text
    from nbl_export.report.environment import environment
    from nbl_export.verify.quality import measure_method_loss
    from nbl_export.verify.speed import measure_speed

    ws = run.workspace
    plan, text = load_plan(ws.plan), load_text(ws.text)
    checks = [
        Check(
            "graph rewrite",
            "passed",
            f"{len(plan.layers)} attention layers and KV pairs gone, every region proven, ONNX checker passed",
        )
    ]
    parity, divergence = _parity(run, plan, text, settings.decode_steps, checks, listener)
    loss = speed = None
    if settings.quality:
        loss = measure_method_loss(
            run.model.model, plan, text.heldout, text.heldout_document, listener
        ).as_json()
    else:
        checks.append(Check("method loss", "skipped", "--no-quality"))
    if settings.speed:
        contexts = _contexts(run, settings.contexts, listener)
        speed = measure_speed(ws.baseline, ws.model, contexts, settings.rounds, listener).as_json()
    else:
        checks.append(Check("speed", "skipped", "--no-speed"))
    records = {name: r for name in ("calibrate", "select", "export", "rewrite") if (r := ws.record(name))}
    rewritten = read_json(_rewrite_summary(ws), "The record of the rewrite", "run `nbl-export rewrite` again")
    scores = read_json(ws.candidates, "The layers' scores", "run `nbl-export select` again")
    return Report(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool_version=__version__,
        model={k: v for k, v in run.model.source.as_json().items() if k != "path"}
        | {"hidden_size": plan.hidden_size, "layers": plan.layer_count},
        environment=environment(),
        settings={name: dict(r.settings) for name, r in records.items()} | {"verify": asdict(settings)},
        hashes={
            "model": run.model.source.fingerprint,
            **{name: digest for r in records.values() for name, digest in r.files.items()},
        },
        stage_seconds={name: r.seconds for name, r in records.items()},
        selection={
            "criterion": plan.criterion,
            "fit_input": plan.fit_input,
            "ridge": plan.ridge,
            "calibration_tokens": plan.calibration_tokens,
            "layers": list(plan.chosen),
            **scores,
        },
        graph=rewritten,
        parity=parity,
        divergence=divergence,
        method_loss=loss,
        speed=speed,
        checks=checks,
        notes=[note for r in records.values() for note in r.notes],
    )


def _parity(
    run: Run, plan: Plan, text: CalibrationText, steps: int, checks: list[Check], listener: Listener
) -> tuple[dict[str, Any], str | None]:
    from nbl_export.linearize.swap import linearized
    from nbl_export.runtime.ort import OrtDecoder
    from nbl_export.runtime.torch import TorchDecoder
    from nbl_export.verify.localize import first_divergence
    from nbl_export.verify.noise import rounding_noise
    from nbl_export.verify.parity import compare_decoders, gates_for

    model = run.model.model
    # Prompts begin with the beginning-of-text token, as in use: without it the attention sinks of a
    # linearized model settle on chance tokens, which can amplify rounding a hundredfold.
    ends = np.cumsum([prompt + steps for prompt in _PROMPTS])
    rows = [
        np.concatenate([text.start, row])
        for row in np.split(np.resize(text.heldout.reshape(-1), ends[-1]), ends[:-1])
    ]
    with linearized(model, plan):
        reference = TorchDecoder(model, plan.chosen)
        result = compare_decoders(
            reference, OrtDecoder(run.workspace.model), rows, steps, gates_for("float32"), listener
        )
        noise = rounding_noise(model, rows)
    failures = result.failures()
    if not failures:
        worst = max(s.max_abs for s in result.steps)
        detail = f"max |Δlogit| {worst:.2g} over a prefill and {steps} decode steps, within all float32 gates"
        checks.append(Check("parity", "passed", detail))
        return {**result.as_json(), "rounding_noise": noise}, None
    first = first_divergence(model, plan, run.workspace.model)
    divergence = str(first)
    if first.layer is None and noise > result.gates.max_abs_logit / 4:
        divergence = (
            "every attention layer agrees, but the linearized PyTorch model's own logits move by "
            f"{noise:.1e} when its embeddings change in the last bit: this plan amplifies rounding; "
            "try other layers or another criterion"
        )
    checks.append(Check("parity", "failed", "; ".join([*failures, divergence])))
    return {**result.as_json(), "rounding_noise": noise}, divergence


# Ragged on purpose: the batch must be padded on the left, by different amounts.
_PROMPTS = (64, 41, 23)


def _contexts(run: Run, contexts: Sequence[int], listener: Listener) -> list[int]:
    config: Any = run.model.model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    fitting = [c for c in contexts if limit is None or c + 1 <= limit]
    if dropped := sorted(set(contexts) - set(fitting)):
        listener.note(
            f"Speed at {', '.join(map(str, dropped))} tokens is left out: the model has {limit} positions."
        )
    return fitting or [max(2, (limit or 16) // 2)]


# report ------------------------------------------------------------------------------------------


def report(ws: Workspace) -> Report:
    """Draw ``report.md`` and ``junit.xml`` anew from ``report.json``; needs no model."""
    from nbl_export.report.render import write_report

    value = load_report(ws.report / "report.json")
    write_report(ws.report, value)
    return value


# all ---------------------------------------------------------------------------------------------


def run_all(
    run: Run, calibration: CalibrateSettings, selection: SelectSettings, verification: VerifySettings
) -> Report:
    """Every stage in order; what is done already with the same settings is kept."""
    from nbl_export.linearize.select import check_k
    from nbl_export.models.layers import layer_count
    from nbl_export.runtime.ort import require_onnxruntime

    require_onnxruntime()  # before the first minute of work, not after it
    if selection.k is not None and run.workspace.record("calibrate") is None:
        check_k(selection.k, layer_count(run.model.model))
    calibrate(run, calibration)
    select(run, selection)
    export(run)
    rewrite(run)
    return verify(run, verification)
