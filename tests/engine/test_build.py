"""Building: what comes out for which graph, progress, and the timing cache."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbl_export.engine.build import Built, Job, Progress, TimingCache, build_engine, parsable
from nbl_export.engine.library import Library
from nbl_export.engine.profiles import Limits
from nbl_export.errors import BuildError
from tests.engine.conftest import Graphs, converted
from tests.listening import Notes

LIMITS = Limits(2, 32, 64)


def build(
    library: Library, path: Path, attention: int, folder: Path, task: Any = None, limits: Limits = LIMITS
) -> Built:
    with parsable(path, limits.max_context) as parsed:
        engine, timings = folder / "model.engine", folder / "timing.cache"
        job = Job(path, parsed, attention, limits, ("SM86",), engine, timings)
        return build_engine(library, job, task or Notes())


# what is built -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["concat", "static"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_precision_and_cache_is_built(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path, precision: str, form: str
) -> None:
    task = Notes()
    path = graphs(precision, form).linearized
    before = {p.name for p in path.parent.iterdir()}
    built = build(rtx, path, 3, tmp_path, task)
    assert not built.fused  # heads of size 8 have no fused kernel, and float32 has none at all
    assert built.facts.attention == 3
    engine = tmp_path / "model.engine"
    assert engine.read_bytes()[:4] != bytes(4) and built.size == engine.stat().st_size
    assert sum(task.advanced) == 1000
    assert [p.name for p in built.profiles] == ["prefill", "decode"]
    assert {p.name for p in path.parent.iterdir()} == before
    assert list(tmp_path.iterdir()) == [engine]


@pytest.mark.parametrize("form", ["concat", "static"])
def test_without_any_attention_there_still_is_an_engine(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path, form: str
) -> None:
    built = build(rtx, graphs("fp16", form).bare, 0, tmp_path)
    assert (built.facts.attention, built.facts.kv_cache_updates) == (0, 0)
    assert [t.name for t in built.facts.outputs] == ["logits"]
    assert not built.fused
    assert built.size > built.facts.weight_bytes["HALF"]


@pytest.mark.parametrize(("precision", "fused"), [("fp16", True), ("bf16", True), ("fp32", False)])
def test_attention_is_fused_where_there_is_a_kernel(
    rtx: Library, fusible: Path, tmp_path: Path, precision: str, fused: bool
) -> None:
    path = converted(fusible, tmp_path / "model.onnx", precision)
    task = Notes()
    assert build(rtx, path, 1, tmp_path, task).fused is fused
    assert sum(task.advanced) == 1000


def test_attention_without_a_kernel_takes_a_second_attempt_within_the_same_bar(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []
    from nbl_export.engine import build as module

    real = module._serialize

    def counted(*arguments: Any) -> Any:
        attempts.append(real(*arguments))
        return attempts[-1]

    monkeypatch.setattr(module, "_serialize", counted)
    task = Notes()
    built = build(rtx, graphs("fp16", "static").base, 5, tmp_path, task)
    assert [a is None for a in attempts] == [True, False]
    assert not built.fused
    assert sum(task.advanced) == 1000 and all(a >= 0 for a in task.advanced)


def test_a_graph_with_other_counts_than_the_plan_is_not_built(
    rtx: Library, graphs: Callable[[str, str], Graphs], tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match="6 KV inputs, expected 4"):
        build(rtx, graphs("fp16", "static").linearized, 2, tmp_path)


@pytest.mark.parametrize(
    ("form", "limits", "words"),
    [
        ("concat", Limits(1, 1, 1), ("refuses the decode profile", "past_key_values")),
        ("static", Limits(1, 32, 16), ("does not build {path}", "less than or equal to `cache`")),
    ],
)
def test_what_the_library_does_not_build_is_told_with_its_reason(
    rtx: Library,
    graphs: Callable[[str, str], Graphs],
    tmp_path: Path,
    form: str,
    limits: Limits,
    words: tuple[str, ...],
) -> None:
    """Limits that only a caller past the settings can have: no step fits, and a prompt beyond the cache."""
    path = graphs("fp16", form).linearized
    before = {p.name for p in path.parent.iterdir()}
    with pytest.raises(BuildError) as caught:
        build(rtx, path, 3, tmp_path, limits=limits)
    message = str(caught.value)
    for word in (str(rtx), *words):
        assert word.format(path=path) in message, message
    assert "\n" not in message and message.endswith(".")
    assert {p.name for p in path.parent.iterdir()} == before


# progress ----------------------------------------------------------------------------------------


def told(*calls: tuple[Any, ...]) -> list[int]:
    """The thousandths done after each call, a name of a method and its arguments."""
    task = Notes()
    progress = Progress(task)
    states = []
    for name, *arguments in calls:
        getattr(progress, name)(*arguments)
        states.append(sum(task.advanced))
    assert all(a >= 0 for a in task.advanced), "time does not run backwards"
    return states


def test_a_phase_within_a_phase_is_one_step_of_it() -> None:
    assert told(
        ("start", "whole", None, 4),
        ("step", "whole", 0),  # 1 of 4
        ("start", "part", "whole", 5),
        ("step", "part", 0),  # and 1/5 of the second
        ("start", "piece", "part", 2),
        ("step", "piece", 0),  # and half of the part's second step
        ("end", "piece"),
        ("step", "part", 1),
        ("step", "part", 4),
        ("end", "part"),
        ("step", "whole", 1),
        ("step", "whole", 3),
        ("end", "whole"),
        ("finish",),
    ) == [0, 250, 250, 300, 300, 325, 325, 350, 500, 500, 500, 1000, 1000, 1000]


def test_phases_of_one_name_follow_each_other() -> None:
    part = [("start", "part", "whole", 2), ("step", "part", 0), ("step", "part", 1), ("end", "part")]
    states = told(("start", "whole", None, 2), *part, ("step", "whole", 0), *part, ("step", "whole", 1))
    assert states == [0, 0, 250, 500, 500, 500, 500, 750, 1000, 1000, 1000]


def test_what_makes_no_sense_does_no_harm() -> None:
    assert told(
        ("step", "unknown", 3),
        ("end", "unknown"),
        ("start", "empty", None, 0),
        ("step", "empty", 7),
        ("finish",),
        ("finish",),
        ("start", "late", None, 2),
        ("step", "late", 1),
    ) == [0, 0, 0, 1000, 1000, 1000, 1000, 1000]


_NAMES = st.sampled_from(["a", "b", "c"])


@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.just("start"), _NAMES, st.sampled_from([None, "x", "y"]), st.integers(-1, 9)
            ),  # parents that never began
            st.tuples(st.just("step"), _NAMES, st.integers(0, 12)),
            st.tuples(st.just("end"), _NAMES),
        ),
        max_size=40,
    )
)
def test_whatever_the_library_says_the_bar_only_grows_and_ends_full(calls: list[Any]) -> None:
    states = told(*calls, ("finish",))
    assert states == sorted(states) and states[-1] == 1000


def test_a_second_attempt_never_passes_the_end() -> None:
    attempt = [("start", "whole", None, 3), *(("step", "whole", i) for i in range(3)), ("end", "whole")]
    states = told(*attempt, *attempt, ("finish",))
    assert max(states) == 1000 and states[-1] == 1000


# the timing cache --------------------------------------------------------------------------------


class Config:
    """A builder's configuration that takes caches beginning with its own mark."""

    def __init__(self, mark: bytes) -> None:
        self.mark = mark
        self.cache: Any = None

    def create_timing_cache(self, data: bytes) -> Any:
        if data == b"not a cache":
            return None
        return types.SimpleNamespace(data=bytes(data), serialize=lambda: self.mark + b" measured")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False  # timings of another GPU would be wrong ones
        if cache.data and not cache.data.startswith(self.mark):
            return False
        self.cache = cache
        return True


def library(ahead_of_time: bool) -> Library:
    return Library("fake", "1.0", None, ahead_of_time=ahead_of_time, own_cuda_graphs=False)


def test_timings_are_shared_between_builds_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "engine" / "timing.cache"
    timings = TimingCache(library(False), path)
    assert timings.save() == [] and not path.exists()
    first, second = Config(b"gpu"), Config(b"gpu")
    timings.attach(first)
    assert first.cache.data == b""
    timings.collect()
    timings.attach(second)
    assert second.cache.data == b"gpu measured"
    assert not path.exists()
    assert timings.save() == [path]
    assert path.read_bytes() == b"gpu measured"
    later = Config(b"gpu")
    TimingCache(library(False), path).attach(later)
    assert later.cache.data == b"gpu measured"


@pytest.mark.parametrize("found", [b"another gpu's", b"not a cache"])
def test_a_refused_cache_is_replaced_by_an_empty_one(tmp_path: Path, found: bytes) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(found)
    timings, config = TimingCache(library(False), path), Config(b"gpu")
    timings.attach(config)
    assert config.cache is not None and config.cache.data == b""
    timings.collect()
    assert timings.save() == [path] and path.read_bytes() == b"gpu measured"


def test_ahead_of_time_nothing_is_measured_nor_claimed(tmp_path: Path) -> None:
    """A cache that lies there is another library's: it is no file of this build."""
    path = tmp_path / "timing.cache"
    path.write_bytes(b"of tensorrt")
    before = path.stat().st_mtime_ns
    timings, config = TimingCache(library(True), path), Config(b"gpu")
    timings.attach(config)
    timings.collect()
    assert config.cache is None
    assert timings.save() == []
    assert path.read_bytes() == b"of tensorrt" and path.stat().st_mtime_ns == before
