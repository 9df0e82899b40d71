"""Layers chosen for a workload against attention alone at the same loss: which become linear, and how fast that is.

    python scripts/bench_workloads.py MODEL TEXT [--max-ppl-ratio 1.10] [--workload NAME=WORK …] [--out DIR]

Calibrates MODEL on TEXT twice, attention alone and both attention and MLPs, and exports it. Then it selects within the
same bound of loss: attention alone by its loss (as without --workload), and both for each workload, with what blocks
save measured (--counted: counted) and with the other ways beside it. Each plan is rewritten, and its loss measured on
the held-out text. Last, each workload's graph races with the graph of attention alone and the original, in turns in one
process, at --contexts; every session is made anew in every round, since where one lies in memory costs more than a few
layers save.

speed   how many times as fast the workload's graph is as that of attention alone: median over rounds, 95 % interval

The table is DIR/workloads.md. Calibrations, exports and losses that are in DIR are used again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nbl_export import api
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.blocks import counted
from nbl_export.cli.terminal import TerminalListener
from nbl_export.linearize.plan import Plan
from nbl_export.report.environment import environment
from nbl_export.verify.loss.figures import MethodLoss
from nbl_export.verify.speed.candidates import graph_candidate
from nbl_export.verify.speed.race import Harness, Rounds
from nbl_export.verify.speed.roofline import cpu_machine
from nbl_export.verify.speed.values import DECODE, PREFILL, Ratio, Speed

WORKLOADS = ("short=prefill=64,decode=256@128", "long=prefill=4000,decode=16@4000")
ATTENTION = "attention"
LISTENER = TerminalListener()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--max-ppl-ratio", type=float, default=1.10)
    parser.add_argument("--workload", action="append", metavar="NAME=WORK")
    parser.add_argument("--criterion", default="greedy")
    parser.add_argument("--kv-cache", default="shared")
    parser.add_argument(
        "--contexts", type=lambda text: tuple(map(int, text.split(","))), default=(128, 512, 2048, 8192)
    )
    parser.add_argument("--phases", nargs="+", choices=(PREFILL, DECODE), default=(PREFILL, DECODE))
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each cell, at most")
    parser.add_argument("--counted", action="store_true")
    parser.add_argument("--repair", type=int, default=0, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("workloads"))
    asked = parser.parse_args()
    named = dict(one.split("=", 1) for one in asked.workload or WORKLOADS)
    lines = [*header(asked, named), *table(asked, named)]
    (asked.out / "workloads.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def header(asked: argparse.Namespace, named: dict[str, str]) -> list[str]:
    words = "; ".join(f"{name}: `{work}`" for name, work in named.items())
    here = environment()
    return [
        f"{Path(asked.model).name}, perplexity ratio ≤ {asked.max_ppl_ratio:g}, {asked.criterion}; {words}.",
        f"{here.processor}, {here.cores} cores.",
        "",
    ]


def table(asked: argparse.Namespace, named: dict[str, str]) -> Iterator[str]:
    base = selected(asked, ATTENTION, ())
    yield f"- {ATTENTION}: {summary(asked.out / ATTENTION, base)}"
    for name, work in named.items():
        plan = selected(asked, name, (work,))
        yield f"- {name}: {summary(asked.out / name, plan)}"
    yield ""
    yield f"| workload | phase | context | speed over {ATTENTION} alone | over the original | {ATTENTION} over it |"
    yield "|---|---|---|---|---|---|"
    for name in named:
        for cell in raced(asked, name).cells:
            other, own = cell.of(ATTENTION), cell.of(LINEARIZED)
            if own and other:
                yield (
                    f"| {name} | {cell.phase} | {cell.context:,} | {interval(other.linearized_over)} | "
                    f"{interval(own.over_base)} | {interval(other.over_base)} |"
                )


def raced(asked: argparse.Namespace, name: str) -> Speed:
    """The original, attention alone, and the plan for the workload ``name``."""
    graphs = {BASE: "baseline/model.onnx", LINEARIZED: "model.onnx"}
    candidates = [
        graph_candidate(BASE, asked.out / name / graphs[BASE], kept=False),
        graph_candidate(ATTENTION, asked.out / ATTENTION / graphs[LINEARIZED], BASE, kept=False),
        graph_candidate(LINEARIZED, asked.out / name / graphs[LINEARIZED], BASE, kept=False),
    ]
    rounds = Rounds(asked.rounds, 3 * asked.rounds, asked.seconds)
    harness = Harness(candidates, cpu_machine(), rounds, asked.phases, strict=True, anew=True)
    return harness.measure([(1, context) for context in asked.contexts], LISTENER)


def interval(ratio: Ratio | None) -> str:
    return "–" if ratio is None else f"{ratio.value:.3f} ({ratio.least:.3f} to {ratio.most:.3f})"


def calibrated(asked: argparse.Namespace, blocks: Literal["attention", "both"]) -> Path:
    """A folder that is calibrated on these ``blocks`` and exported."""
    out: Path = asked.out / f"calibrated-{blocks}"
    text = api.CalibrateSettings((asked.text,), asked.samples, 512, heldout_samples=16, blocks=blocks)
    api.calibrate(asked.model, out, text, LISTENER)
    api.export(out, api.ExportSettings(kv_cache=asked.kv_cache), LISTENER)
    return out


def selected(asked: argparse.Namespace, name: str, workload: tuple[str, ...]) -> Plan:
    """The plan for a workload, or of attention alone, rewritten and verified in a folder of its own."""
    source, out = calibrated(asked, "both" if workload else "attention"), asked.out / name
    if not out.exists():
        shutil.copytree(source, out, copy_function=shutil.copy2)
    budget = api.Budget(max_perplexity_ratio=asked.max_ppl_ratio)
    both = bool(workload)
    settings = api.SelectSettings(
        criterion=asked.criterion,
        workload=workload,
        measure_cost=both and not asked.counted,
        frontier=both,
        repair=asked.repair,
        budget=budget,
    )
    plan = api.select(out, settings, LISTENER)
    # The next workload measures only sets that are new.
    shutil.copy2(out / "nbl" / "measured.json", source / "nbl" / "measured.json")
    api.rewrite(out, LISTENER)
    api.verify(out, api.VerifySettings(speed=False), LISTENER)
    return plan


def summary(out: Path, plan: Plan) -> str:
    """Which blocks are linear, and their loss on the held-out text."""
    loss = api.report(out).method_loss
    assert isinstance(loss, MethodLoss)
    ratio = f"{loss.perplexity_ratio:.4f} ± {loss.perplexity_ratio_se:.4f}"
    return f"{counted(plan.chosen)} ({', '.join(map(str, plan.chosen))}); held-out perplexity ratio {ratio}"


if __name__ == "__main__":
    main()
