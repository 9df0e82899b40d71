"""Share one piece of work among several processes, as torchrun starts them on one machine or on several.

torchrun gives each process RANK and WORLD_SIZE, and torch.distributed connects them: gloo between CPUs, NCCL between
NVIDIA GPUs. Rank 0, the first, reads, writes, locks and speaks; the others compute their share and hand it over.

1. Without RANK and WORLD_SIZE there is one rank, and nothing here does anything.
2. What is found wrong in work that is shared is raised by every rank, as the same error; one of them says it.
3. A process that is gone ends the others: each collective raises :class:`LostRankError`. One that hangs does after
   :data:`TIMEOUT`, which is longer than the longest work that one rank does while the others wait.
4. Where only the first knows what comes next, it leads: it asks for jobs, of which each rank does its share, and the
   others follow until it is through.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from nbl_export.errors import ENDED, InputError, NblError, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
A = TypeVar("A")
# Does a share of the items; what follows the share is the same for all.
Job = Callable[..., Sequence[Any]]
# The longest that others wait for one: it samples the text of a large model, or repairs its layers.
TIMEOUT = timedelta(hours=6)
_RANK, _COUNT, _HERE, _SAID = "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "nbl-export/said"
AGAIN = "run the same command again to go on from what is done, with as many processes as you like"


class LostRankError(NblError):
    """Another process of the same work is gone, or does not answer."""

    exit_code = ENDED


@dataclass(frozen=True)
class Ranks:
    """The ``count`` processes of which this one is number ``rank``."""

    rank: int = 0
    count: int = 1
    store: Any = field(default=None, compare=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """The share of ``items`` that this rank does: every ``count``-th."""
        return items[self.rank :: self.count]

    def shared(self, make: Callable[[], T]) -> T:
        """What ``make`` gives, called by the first rank alone; every rank gets it, or raises its error."""
        made: T = self.each(make if self.first else _nothing)[0]
        return made

    def each(self, make: Callable[[], T]) -> list[T]:
        """What ``make`` gives on each rank, in their order, on every rank; the first error is raised by all."""
        if self.count == 1:
            return [make()]
        import torch.distributed

        try:
            ours: tuple[T | None, NblError | None] = make(), None
        except NblError as error:
            ours = None, error
        found: list[Any] = [None] * self.count
        with _connected(self.count):
            torch.distributed.all_gather_object(found, ours)
        if refused := [error for _, error in found if error is not None]:
            raise refused[0]
        return [value for value, _ in found]

    def spread(self, items: Sequence[A], work: Callable[[Sequence[A]], Sequence[T]]) -> list[T]:
        """What ``work`` gives for each of ``items``, in their order; each rank does its share at once."""
        parts = self.each(lambda: list(work(self.mine(items))))
        return [parts[number % self.count][number // self.count] for number in range(len(items))]

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add each of ``tensors`` over all ranks in the first one; those of the others are then of no use."""
        if self.count == 1:
            return
        import torch.distributed

        # Objects go by the CPU, where a process that is gone is noticed at once; NCCL would wait for it.
        self.each(_nothing)
        with _connected(self.count):
            for tensor in tensors:
                sent = tensor if _travels(tensor.device) else tensor.cpu()
                torch.distributed.reduce(sent, dst=0)
                if sent is not tensor:
                    tensor.copy_(sent)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Within the block, the first rank may :meth:`ask`; at its end the others are through, with the same error."""
        try:
            yield
        except LostRankError:
            raise
        except NblError as error:
            refused = error  # the name of an except clause ends with it
            self.shared(lambda: refused)
            raise
        self.shared(_nothing)

    def ask(self, jobs: Mapping[str, Job], name: str, items: Sequence[Any], *common: Any) -> list[Any]:
        """What the job ``name`` gives for each of ``items``, from the first rank and from those that follow it."""
        self.shared(lambda: (name, items, common))
        return self.spread(items, lambda share: jobs[name](share, *common))

    def follow(self, jobs: Callable[[], Mapping[str, Job]]) -> None:
        """Do this rank's share of what the first one asks for; ``jobs`` are made when it asks for something."""
        while (asked_for := self.shared(_nothing)) is not None:
            if isinstance(asked_for, NblError):
                raise asked_for
            name, items, common = asked_for
            try:
                self.spread(items, lambda share: jobs()[name](share, *common))  # noqa: B023
            except LostRankError:
                raise
            except NblError:
                pass  # the first rank has it too, and knows what is to be done


ALONE = Ranks()
_current: Ranks | None = None


def asked() -> Ranks:
    """What the environment says of this process and the others; raises :class:`InputError` for what is no rank."""
    said = {name: os.environ.get(name) for name in (_RANK, _COUNT)}
    if None in said.values():
        return ALONE
    try:
        rank, count = (int(str(said[name])) for name in (_RANK, _COUNT))
    except ValueError:
        rank, count = -1, 0
    if not 0 <= rank < count:
        raise InputError(
            f"The environment has {_RANK}={said[_RANK]} and {_COUNT}={said[_COUNT]}, which is not one of several "
            "processes: start them with torchrun, or unset both."
        )
    return Ranks(rank, count)


def place() -> Ranks:
    """As :func:`asked`; what is no rank is refused where the work begins."""
    try:
        return asked()
    except InputError:
        return ALONE


def on_this_machine() -> int:
    """How many of the processes share this machine's memory."""
    here = os.environ.get(_HERE, "")
    return max(1, int(here)) if place().count > 1 and here.isdecimal() else 1


def begin() -> Ranks:
    """Connect with the processes that the environment names, once; raises :class:`InputError` if they are not there.

    A process group that the calling program has begun is used as it is.
    """
    global _current
    if _current is not None:
        return _current
    here = asked()
    if here.count > 1:
        import torch
        from torch.distributed.rendezvous import rendezvous

        if not torch.distributed.is_initialized():
            # NCCL wants a GPU for each process.
            gpus = torch.cuda.device_count() if torch.distributed.is_nccl_available() else 0
            backend = "cpu:gloo,cuda:nccl" if gpus and gpus >= on_this_machine() else "gloo"
            try:
                store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
                torch.distributed.init_process_group(
                    backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT
                )
            except (RuntimeError, ValueError, OSError) as error:
                raise InputError(
                    f"The {here.count} processes do not find each other ({first_line(error)}): start them with "
                    "torchrun."
                ) from error
            here = Ranks(rank, count, store)
    _current = here
    return here


def end() -> None:
    """Leave what :func:`begin` began."""
    global _current
    begun, _current = _current, None
    if begun is not None and begun.store is not None:
        import torch.distributed

        torch.distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[Ranks]:
    """Within the block, this process is connected with the others; one that was before stays so."""
    outer = _current is not None
    try:
        yield begin()
    finally:
        if not outer:
            end()


def speaks() -> bool:
    """Whether this process says what went wrong: the first that asks, of all, since the others know no better."""
    ranks = _current
    if ranks is None or ranks.store is None:
        return place().first
    try:
        return bool(ranks.store.add(_SAID, 1) == 1)
    except RuntimeError:  # it was in the first process, which is gone
        return ranks.rank <= 1


def check_alone() -> None:
    """Refuse to be one of several processes."""
    if (count := asked().count) > 1:
        raise InputError(
            f"This command works in one process, and was started in {count}: start only calibrate and select "
            "with torchrun, and this one without it; it goes on from what is made."
        )


def _travels(device: torch.device) -> bool:
    """Whether tensors on ``device`` are added up from there; gloo adds up those on a CPU only."""
    from torch.distributed.distributed_c10d import get_backend_config

    backends = dict(pair.split(":") for pair in get_backend_config().split(","))  # as cpu:gloo,cuda:nccl
    return device.type == "cpu" or backends.get(device.type, "gloo") != "gloo"


def _nothing() -> Any:
    return None


@contextmanager
def _connected(count: int) -> Iterator[None]:
    """Say in one sentence that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(f"One of the {count} processes ended, or does not answer: {AGAIN}.") from error
