"""The command line's verbs that measure finished graphs: ``eval`` and ``bench``."""

from __future__ import annotations

import typer

from nbl_export import given
from nbl_export.errors import GATE_FAILED
from nbl_export.options import (
    AgainstOpt,
    BatchesOpt,
    BenchContextsOpt,
    BenchRoundsOpt,
    ChatTemplateOpt,
    DeviceOpt,
    EvalBatchOpt,
    EvalSeedOpt,
    FewShotOpt,
    LimitOpt,
    MemoryOpt,
    MinRecoveryOpt,
    OutArg,
    PeerOpt,
    RetrievalContextsOpt,
    RetrievalOpt,
    RetrievalSamplesOpt,
    SecondsOpt,
    TasksOpt,
)


def evaluate(
    out: OutArg,
    tasks: TasksOpt = None,
    limit: LimitOpt = None,
    few_shot: FewShotOpt = None,
    chat_template: ChatTemplateOpt = False,
    seed: EvalSeedOpt = 0,
    batch_size: EvalBatchOpt = 16,
    min_recovery: MinRecoveryOpt = None,
    retrieval: RetrievalOpt = True,
    retrieval_contexts: RetrievalContextsOpt = None,
    retrieval_samples: RetrievalSamplesOpt = 24,
) -> None:
    """Ask tasks and long-context retrieval of both graphs: recovery in percent; exit 1 if its gate fails."""
    from nbl_export import api
    from nbl_export.settings import EvalSettings
    from nbl_export.terminal import TerminalListener, show_evaluation

    contexts = (
        given.numbers("--retrieval-contexts", retrieval_contexts) if retrieval_contexts is not None else None
    )
    settings = EvalSettings(
        tuple(tasks or ()),
        limit,
        few_shot,
        seed,
        chat_template,
        batch_size,
        retrieval,
        contexts,
        retrieval_samples,
        min_recovery,
    )
    value = api.evaluate(out, settings, TerminalListener())
    show_evaluation(value, out)
    if not value.passed:
        raise typer.Exit(GATE_FAILED)


def bench(
    out: OutArg,
    against: AgainstOpt = None,
    peers: PeerOpt = None,
    batches: BatchesOpt = "1,4",
    contexts: BenchContextsOpt = "128,512,2048,8192",
    rounds: BenchRoundsOpt = 7,
    seconds: SecondsOpt = 120.0,
    device: DeviceOpt = "cpu",
    memory: MemoryOpt = True,
) -> None:
    """Time base, linearized and others in turn, beside what the machine allows; exit 1 if suspect or slower."""
    from nbl_export import api
    from nbl_export.settings import BenchSettings
    from nbl_export.terminal import TerminalListener, show_bench

    settings = BenchSettings(
        tuple(against or ()),
        tuple(peers or ()),
        given.numbers("--batches", batches),
        given.numbers("--contexts", contexts),
        rounds,
        seconds=seconds,
        device=device,
        memory=memory,
    )
    value = api.bench(out, settings, TerminalListener())
    show_bench(value, out)
    if not value.passed:
        raise typer.Exit(GATE_FAILED)
