"""An engine built in a child process: a library that crashes or hangs on a graph costs a sentence, not the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.child_process import Tell, in_child
from nbl_export.engine.build import Built, Job, build_engine, parsable
from nbl_export.engine.library import Library, library_of
from nbl_export.engine.profiles import Limits
from nbl_export.progress import Task
from nbl_export.records import from_json, to_json

# Seconds without progress after which the library hangs. One step of a large model's build may take minutes.
PATIENCE = 1800
_REMEDY = "leave the engines out, or export again with another --kv-cache or --precision"


def build_in_child(
    library: Library,
    graph: Path,
    attention: int,
    limits: Limits,
    capabilities: tuple[str, ...],
    engine: Path,
    timings: Path,
    task: Task,
) -> Built:
    """:func:`.build_engine` for these fields of a :class:`Job`, in a child process.

    Raises what that raises, and :class:`ChildError` if the library crashes or hangs; what is at ``engine`` is then of
    no use.
    """
    with parsable(graph, limits.max_context) as parsed:
        paths = {"graph": graph, "parsed": parsed, "engine": engine, "timings": timings}
        job = {
            **{name: str(path) for name, path in paths.items()},
            "attention": attention,
            "limits": to_json(limits),
            "capabilities": list(capabilities),
        }
        built = in_child(
            work,
            {"package": library.package, "job": job},
            f"The build of an engine of {graph} with {library}",
            _REMEDY,
            PATIENCE,
            task.advance,
        )
    return from_json(Built, built, "What the build of an engine said", _REMEDY)


def work(asked: Any, tell: Tell) -> Any:
    """In the child: build, and tell each piece of progress."""
    job = asked["job"]
    made = Job(
        graph=Path(job["graph"]),
        parsed=Path(job["parsed"]),
        attention=job["attention"],
        limits=Limits(**job["limits"]),
        capabilities=tuple(job["capabilities"]),
        engine=Path(job["engine"]),
        timings=Path(job["timings"]),
    )
    return to_json(build_engine(library_of(asked["package"]), made, _Told(tell)))


class _Told:
    """A task whose progress is told to the parent."""

    def __init__(self, tell: Tell) -> None:
        self.advance = tell

    def part(self, number: int, count: int) -> None:
        """An engine is built as a whole."""
