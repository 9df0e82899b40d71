"""Method loss by criterion, fit and K: the loss of each way to choose and fit layers on held-out text.

    python scripts/bench_quality.py MODEL CALIBRATION --judge NAME=TEXT … [--tasks FOLDER] [--out DIR]

Calibrates once on CALIBRATION. Then for each way and K it selects like `nbl-export select` and measures on every
--judge text (its first --tokens tokens, packed in rows of 512)

excess    ln(perplexity linearized / perplexity original), ± its standard error over documents
÷ paper   that excess divided by that of the paper's method (CCA ranking, plain LMMSE) with the same K and text
KL        of the next token, original to linearized, in nats

and, with --tasks, the mean accuracy over a folder's tasks (--limit rows of each, sampled by a seed), with PyTorch.
With --compare it prints instead what ours and others' ways without training (scripts/quality_methods.py) lose where
they save as many weights as the paper's method with each K, or are as fast in a prefill of 512 tokens and in decode at
--context, as counted from the graph on this machine's roofline; DIR/compare.md and DIR/compare.png. Each way takes its
smallest cut that saves as much, ours that with the smallest KL on the selection text. --repair STEPS repairs
it where speeds are equal; minutes are those of the repair and of one measurement.

The --judge texts are used for evaluation only: layers are chosen on a split of CALIBRATION. Seconds are those of the
selection, including repair; measurements of earlier cells are reused. Results are saved in DIR/quality.json and
reused, so --ways and --k can be extended; the table is DIR/quality.md. Models are run in bfloat16 if the processor
supports it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_methods import ALL, OURS, PAPERS, REPAIRED, WEIGHTS, Cut, Ways

from nbl_export import api
from nbl_export.calibrate.documents import documents
from nbl_export.calibrate.text import end_token
from nbl_export.evaluate.harness import DecoderLM
from nbl_export.evaluate.scoring import Limits
from nbl_export.evaluate.tasks import find_tasks, run_task
from nbl_export.linearize.loss import LossMeter, loss_of_plan
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.layers import positions
from nbl_export.models.load import load_tokenizer
from nbl_export.models.loaded import LoadedModel
from nbl_export.models.source import find_model
from nbl_export.models.weights import dtype_of
from nbl_export.progress import Silent
from nbl_export.report.schema import environment
from nbl_export.runtime.torch import torch_stream

SEQ_LEN = 512
PAPER = "cca, lmmse"
WAYS: Mapping[str, Mapping[str, Any]] = {
    PAPER: {"criterion": "cca"},
    "nmse, lmmse": {"criterion": "nmse"},
    "linearity, lmmse": {"criterion": "linearity"},
    "kl, lmmse": {"criterion": "kl"},
    "greedy, lmmse": {"criterion": "greedy"},
    "greedy, weighted": {"criterion": "greedy", "fit": "weighted"},
    "greedy, sequential": {"criterion": "greedy", "fit": "sequential"},
    "greedy, lmmse, ridge by held-out error": {"criterion": "greedy", "ridge": None},
    **{f"greedy, lmmse, rank {r}": {"criterion": "greedy", "rank": r} for r in (192, 128, 64)},
    "drop, drop": {"criterion": "drop", "fit": "drop"},
    "greedy, lmmse, repaired": {"criterion": "greedy", "repair": 400},
}


class Judge:
    """A held-out text to measure plans and cuts on."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, text: str, tokens: int) -> None:
        rows, owners = packed(tokenizer, text, tokens)
        self.meter = LossMeter(model, rows, owners, "normed")

    def __call__(self, plan: Plan) -> dict[str, float]:
        return loss_of_plan(self.meter, plan).as_json()


def packed(tokenizer: Any, text: str, tokens: int) -> tuple[Any, Any]:
    """The first ``tokens`` of a text in rows, and the document number of each token."""
    ids: list[int] = []
    owners: list[int] = []
    for number, document in enumerate(t for t in documents((text,), "text") if t.strip()):
        own = [
            *tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"],
            end_token(tokenizer),
        ]
        ids += own
        owners += [number] * len(own)
        if len(ids) >= tokens:
            break
    length = min(len(ids), tokens) // SEQ_LEN * SEQ_LEN
    return tuple(np.array(a[:length], dtype=np.int32).reshape(-1, SEQ_LEN) for a in (ids, owners))  # type: ignore[return-value]


def task_accuracy(
    model: torch.nn.Module, tokenizer: Any, plan: Plan | None, folder: str, limit: int
) -> dict[str, float]:
    """The mean over the tasks of their scored metric, and its standard error over documents."""
    settings = api.EvalSettings(limit=limit)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    means, variances = [], []
    for task in find_tasks((folder,), settings):
        stream = torch_stream(model, plan.linear_attention if plan else ())
        lm = DecoderLM(stream, tokenizer, Limits(positions(model) or 2048, vocabulary), Silent())
        if plan:
            with linearized(model, plan):
                outcome = run_task(lm, task, settings)
        else:
            outcome = run_task(lm, task, settings)
        if outcome.scored:
            scores = np.array(outcome.scores[outcome.scored])
            means.append(scores.mean())
            variances.append(scores.var(ddof=1) / len(scores))
    return {"accuracy": float(np.mean(means)), "accuracy_se": math.sqrt(sum(variances)) / len(means)}


class Compared:
    """Ways at equal weights and at equal speed, in tables and a plot; what was measured is kept in ``compare.json``."""

    def __init__(
        self, arguments: argparse.Namespace, model: torch.nn.Module, judges: Mapping[str, Judge]
    ) -> None:
        self._path = arguments.out / "compare.json"
        self._known: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._judges, self._ks, self._repair = judges, arguments.k, arguments.repair
        context = arguments.context
        workloads = (f"prefill={min(SEQ_LEN, context)}", f"decode=128@{context}")
        self._ways = ways = Ways(arguments.out / ALL, model, arguments.k, workloads, self._selection_kl)
        self._cuts: dict[str, list[Cut]] = {}
        compared = {PAPERS, *(arguments.compared or ways.by_name.keys() - {ALL})}
        for name in ways.by_name:
            for cut in ways.by_name[name]() if name in compared else ():
                self._cuts.setdefault(cut.way, []).append(cut)
        # What is saved, and the excess on the first text with its error, by what is equal and by way.
        self._shown: dict[str, dict[str, list[tuple[float, float, float]]]] = {}

    def lines(self) -> Iterator[str]:
        """The tables in Markdown."""
        for by in self._ways.compared_by:
            yield f"\nAs good as the paper's method in {by}:\n"
            columns = [
                "K",
                "way",
                "cut",
                by,
                *(f"{judge} {what}" for judge in self._judges for what in ("excess", "÷ paper")),
            ]
            yield "| " + " | ".join(columns) + " |"
            yield "|---" * len(columns) + "|"
            for k in self._ks:
                own = self._cuts[PAPERS][k - 1]
                paper = self._losses(own)
                for way, picked in self._taken(own, by).items():
                    if picked is None:
                        yield f"| {k} | {way} | – |" + " – |" * (1 + 2 * len(self._judges))
                    else:
                        yield self._row(k, way, picked, by, paper)

    def _taken(self, own: Cut, by: str) -> dict[str, Cut | None]:
        """Of each way's cuts that gain as much as the paper's ``own``, the smallest, or the one that loses least on the
        selection text, where that was measured.
        """
        least = self._ways.gain(own, by) * (1 - 1e-9)
        taken: dict[str, Cut | None] = {PAPERS: own}
        for way, every in self._cuts.items():
            if way != PAPERS and (not way.startswith(f"{ALL}, by") or way == f"{ALL}, by {by}"):
                enough = [cut for cut in every if self._ways.gain(cut, by) >= least]
                taken[way] = min(enough, key=lambda cut: cut.kl, default=None)
        # Whichever loses least on the selection text.
        taken[OURS] = ours = min((c for c in taken.values() if c), key=lambda c: c.kl)
        if self._repair and by != WEIGHTS:
            taken[REPAIRED] = self._ways.repaired(ours, self._repair)
        return taken

    def _row(self, k: int, way: str, cut: Cut, by: str, paper: Mapping[str, Any]) -> str:
        found, gain = self._losses(cut), self._ways.gain(cut, by)
        what = f"{cut.what}, {found['seconds'] / 60:.0f} min" if way == REPAIRED else cut.what
        line = [str(k), way, what, f"{gain / 1e6:.2f} M" if by == WEIGHTS else f"{gain:.3f}×"]
        for judge in self._judges:
            loss = found[judge]
            line.append(f"{loss['excess']:.4f} ± {loss['excess_se']:.4f}")
            line.append(f"{loss['excess'] / paper[judge]['excess']:.2f}")
        first = found[next(iter(self._judges))]
        points = self._shown.setdefault(by, {}).setdefault(way.split(", by")[0], [])
        points.append((gain, first["excess"], first["excess_se"]))
        return "| " + " | ".join(line) + " |"

    def _selection_kl(self, name: str, measure: Callable[[], float]) -> float:
        kept: dict[str, float] = self._known.setdefault("KL of the selection text", {})
        if name not in kept:
            kept[name] = measure()
            self._save()
        return kept[name]

    def _losses(self, cut: Cut) -> dict[str, Any]:
        """The losses of ``cut`` on each text, by its name, and the ``seconds`` that the first took."""
        found = self._known.setdefault(f"{cut.way}|{cut.what}", {})
        for name, judge in self._judges.items():
            if name not in found:
                start = time.perf_counter()
                found[name] = cut.loss(judge.meter).as_json()
                found.setdefault("seconds", time.perf_counter() - start)
                self._save()
                print(f"{cut.way}, {cut.what}, {name}: excess {found[name]['excess']:.4f}", flush=True)
        return dict(found)

    def _save(self) -> None:
        self._path.write_text(json.dumps(self._known, indent=1))

    def plot(self, path: Path) -> None:
        """Excess by what is saved, a panel for each."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(self._shown), sharey=True)
        styles = {way: (f"C{n}", "os^vDPX*h"[n % 9]) for n, way in enumerate(self._drawn())}
        for panel, (by, ways) in zip(panels, self._shown.items(), strict=True):
            for way in self._drawn():
                if points := ways.get(way):
                    color, marker = styles[way]
                    x, y, error = (np.array(values) for values in zip(*sorted(points), strict=True))
                    panel.errorbar(
                        x / 1e6 if by == WEIGHTS else x, y, yerr=error, marker=marker, color=color, label=way
                    )
            panel.set_yscale("log")
            panel.set_xlabel("million weights saved" if by == WEIGHTS else f"times as fast: {by}")
        panels[0].set_ylabel(f"excess on {next(iter(self._judges))}, nats per token")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(path, dpi=110)

    def _drawn(self) -> list[str]:
        """The ways of the plot; ours, whichever it is, is drawn as what it is."""
        return [way for way in next(iter(self._shown.values())) if way != OURS]


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    for way in arguments.ways or WAYS:
        for k in arguments.k:
            yield way, k


def table(results: Mapping[str, Any], judges: list[str]) -> str:
    """The results as Markdown."""
    columns = ["way", "K", *(f"{j} {c}" for j in judges for c in ("excess", "÷ paper", "KL"))]
    columns += ["tasks", "seconds", "layers"]
    lines = [columns, ["---"] * len(columns)]
    done = [key.split("|") for key in results if "|" in key]
    for way, k in sorted(done, key=lambda at: (list(WAYS).index(at[0]), int(at[1]))):
        cell = results[f"{way}|{k}"]
        line = [way, k]
        for judge in judges:
            loss = cell["losses"][judge]
            paper = results.get(f"{PAPER}|{k}", {}).get("losses", {}).get(judge)
            line += [
                f"{loss['excess']:.4f} ± {loss['excess_se']:.4f}",
                f"{loss['excess'] / paper['excess']:.2f}" if paper else "–",
                f"{loss['kl']:.4f} ± {loss['kl_se']:.4f}",
            ]
        accuracy = cell.get("accuracy")
        line.append(f"{accuracy:.1%} ± {cell['accuracy_se']:.1%}" if accuracy is not None else "–")
        line += [f"{cell['seconds']:.0f}", " ".join(map(str, cell["layers"]))]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration", nargs="+")
    parser.add_argument("--judge", action="append", required=True, metavar="NAME=TEXT")
    parser.add_argument("--tokens", type=int, default=12288, help="held-out tokens of each text")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--samples", type=int, default=256, help="calibration rows of 512 tokens, at most")
    parser.add_argument("--selection-samples", type=int, default=16)
    parser.add_argument(
        "--heldout-samples", type=int, default=1, help="rows that the folder keeps for verify"
    )
    parser.add_argument("--tasks", help="a folder of .jsonl tasks")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("out/bench-quality"))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--compared", nargs="+", metavar="WAY", help="of --compare: these ways and NBL alone")
    parser.add_argument("--context", type=int, default=4096, help="tokens before a decode of --compare")
    parser.add_argument("--repair", type=int, default=0, help="steps of repair of ours in --compare")
    arguments = parser.parse_args()
    text = api.CalibrateSettings(
        tuple(arguments.calibration),
        arguments.samples,
        SEQ_LEN,
        arguments.heldout_samples,
        arguments.selection_samples,
    )
    if arguments.compare:
        api.calibrate(arguments.model, arguments.out / ALL, replace(text, blocks="all"))
        api.export(arguments.out / ALL)
    else:
        api.calibrate(arguments.model, arguments.out, text)
    path = arguments.out / "quality.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    source = find_model(arguments.model)
    tokenizer = load_tokenizer(source)
    model = LoadedModel(source, Silent()).in_dtype("auto")
    judges = dict(j.split("=", 1) for j in arguments.judge)
    opened = {name: Judge(model, tokenizer, text, arguments.tokens) for name, text in judges.items()}
    machine = environment()
    where = (
        f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB; torch "
        f"{machine.packages['torch']}."
    )
    caption = (
        f"{Path(arguments.model).name}, calibrated on {', '.join(Path(t).name for t in arguments.calibration)}, "
        f"{arguments.samples} rows at most; {arguments.tokens} tokens of each text; {dtype_of(model)}. "
    )
    if arguments.compare:
        ways = Compared(arguments, model, opened)
        report = f"{caption}{where}\n" + "\n".join(ways.lines()) + "\n"
        ways.plot(arguments.out / "compare.png")
        (arguments.out / "compare.md").write_text(report, encoding="utf-8")
        print(report)
        return
    if arguments.tasks and "original" not in results:
        results["original"] = task_accuracy(model, tokenizer, None, arguments.tasks, arguments.limit)
    for way, k in cells(arguments):
        cell = results.setdefault(f"{way}|{k}", {})
        if "losses" in cell and ("accuracy" in cell or not arguments.tasks):
            continue
        start = time.perf_counter()
        plan = api.select(arguments.out, api.SelectSettings(k=k, **WAYS[way]))
        if "losses" not in cell:
            cell |= {"seconds": time.perf_counter() - start, "layers": list(plan.chosen)}
            cell["losses"] = {name: judge(plan) for name, judge in opened.items()}
        if arguments.tasks:
            cell |= task_accuracy(model, tokenizer, plan, arguments.tasks, arguments.limit)
        path.write_text(json.dumps(results, indent=1))
        print(f"{way}, K = {k}: {cell}", flush=True)
    if original := results.get("original"):
        caption += f"Tasks, original: {original['accuracy']:.1%} ± {original['accuracy_se']:.1%}. "
    written = f"{table(results, list(judges))}\n\n{caption}{where}\n"
    (arguments.out / "quality.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
