"""One definition of a setting: its field, its option and what is refused, compared with a class made here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from cyclopts import App

from nbl_export import settings
from nbl_export.errors import InputError
from nbl_export.settings.definition import (
    TEXT,
    Must,
    Settings,
    UsageError,
    at_least,
    one_of,
    options,
    setting,
    settings_of,
)
from nbl_export.settings.file import TABLES

Colour = Literal["red", "blue"]


@options
@dataclass(frozen=True)
class Inner(Settings):
    """A part.

    depth: How deep.
    """

    depth: float | None = setting(None, TEXT, at_least(0, "0 m or more"), key="max-depth")


@options
@dataclass(frozen=True)
class Sample(Settings):
    """All kinds.

    count: How many,
        in two lines.
    width: How wide.
    sizes: Some sizes.
    names: Some names.
    colour: One of two.
    fast: Whether it hurries.
    """

    count: int = setting(3, TEXT, at_least(1))
    width: float | None = setting(
        0.5, TEXT, Must(lambda x: x < 9, "is {value}; it must be less than 9"), auto=True
    )
    sizes: tuple[int, ...] = setting((1, 2), TEXT)
    names: tuple[str, ...] = setting((), TEXT, one_of(("a", "b")), key="name", repeated=True)
    colour: Colour = setting("red", TEXT)
    fast: bool = setting(True, TEXT)
    inner: Inner = Inner()


def parsed(*words: str) -> Any:
    found = []
    app = App(result_action="return_value")

    @app.default
    def command(*, sample: Sample = Sample()) -> None:
        found.append(sample)

    app(list(words), exit_on_error=False, print_error=False)
    return found[0]


def test_a_field_is_an_option_and_a_key() -> None:
    known = {one.key: one for one in settings_of(Sample)}
    assert list(known) == ["count", "width", "sizes", "name", "colour", "fast", "max-depth"]
    assert known["max-depth"].path == ("inner", "depth")
    assert known["count"].help == "How many, in two lines."
    assert [(one.kind, one.many, one.auto) for one in known.values()] == [
        (int, False, False),
        (float, False, True),
        (int, True, False),
        (str, True, False),
        (str, False, False),
        (bool, False, False),
        (float, False, False),
    ]


def test_words_become_values() -> None:
    assert parsed() == Sample()
    words = ["--count=4", "--width", "2", "--sizes", "5,6", "--name", "b", "--name", "a"]
    assert parsed(*words, "--colour", "blue", "--no-fast", "--max-depth", "1e3") == Sample(
        4, 2.0, (5, 6), ("b", "a"), "blue", False, Inner(1000.0)
    )
    assert parsed("--count", "4", "--count", "5").count == 5  # the last one counts
    assert parsed("--width", "auto").width == "auto"
    assert parsed("--count", "-4").count == -4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "x"], "--count is 'x'; give a whole number."),
        (["--count", "1.5"], "--count is '1.5'; give a whole number."),
        (["--count", "auto"], "--count is 'auto'; give a whole number."),
        (["--width", ""], "--width is ''; give a number or auto."),
        (["--sizes", "1;2"], "--sizes is '1;2'; give whole numbers with commas, as 3,7,12."),
    ],
)
def test_words_that_are_no_value(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(*words)
    assert str(caught.value) == said and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (Sample(count=0), "--count is 0; it must be at least 1."),
        (Sample(width=9.5), "--width is 9.5; it must be less than 9."),
        (Sample(width=float("nan")), "--width is nan; it must be less than 9."),
        (Sample(names=("a", "c")), "--name 'c' is unknown; choose one of a, b."),
        (Sample(colour="green"), "--colour 'green' is unknown; choose one of red, blue."),  # type: ignore[arg-type]
        (Sample(inner=Inner(-1.0)), "--max-depth is -1; it must be 0 m or more."),
        (Sample(inner=Inner(float("inf"))), "--max-depth is inf; give a finite number."),
        (Sample(width=float("-inf")), "--width is -inf; give a finite number."),
    ],
)
def test_values_that_are_refused(sample: Sample, said: str) -> None:
    with pytest.raises(InputError) as caught:
        sample.check()
    assert str(caught.value) == said


INFINITE = (float("inf"), float("-inf"), float("nan"))
NUMBERS = [(cls, one) for cls in TABLES.values() for one in settings_of(cls) if one.kind is float]
TEXTS = [(cls, one) for cls in TABLES.values() for one in settings_of(cls) if one.kind is str]


@pytest.mark.parametrize(("cls", "one"), NUMBERS, ids=lambda part: getattr(part, "key", ""))
@pytest.mark.parametrize("value", INFINITE)
def test_no_number_is_infinite(cls: type[Settings], one: Any, value: float) -> None:
    """A record is JSON, which has no infinity: what runs for hours must not end there."""
    with pytest.raises(InputError, match=f"--{one.key} is {value}"):
        one.check(value, f"--{one.key}")
    with pytest.raises(InputError, match=rf"\[x\] {one.key} is {value}"):
        one.from_file(value, f"[x] {one.key}")
    assert cls in TABLES.values()


@pytest.mark.parametrize(("cls", "one"), TEXTS, ids=lambda part: getattr(part, "key", ""))
def test_no_text_is_empty(cls: type[Settings], one: Any) -> None:
    """An empty word would be read as this folder."""
    with pytest.raises(InputError, match=f"--{one.key} "):
        one.check(("",) if one.many else "", f"--{one.key}")
    assert cls in TABLES.values()


@dataclass(frozen=True)
class Task:
    name: str
    causal: bool


def test_a_run_is_resolved_once_for_its_task() -> None:
    asked = settings.RunSettings(settings.SelectSettings(k=1))
    decoder = asked.resolve(Task("text-generation", True))
    assert (decoder.exporting.precision, decoder.exporting.kv_cache) == ("fp32", "concat")
    assert decoder.selection.criterion == "greedy"
    assert decoder.resolve(Task("text-generation", True)) == decoder
    encoder = asked.resolve(Task("feature-extraction", False))
    assert (encoder.exporting.precision, encoder.exporting.kv_cache) == ("fp32", "none")
    assert encoder.selection.criterion == "cca"
    engines = settings.RunSettings(settings.SelectSettings(k=1), engines=settings.EngineSettings())
    built = engines.resolve(Task("text-generation", True)).exporting
    assert (built.precision, built.kv_cache) == ("fp16", "static")
    with pytest.raises(InputError, match="TensorRT engines are built of decoders only"):
        engines.resolve(Task("feature-extraction", False))
    repair = settings.SelectSettings(k=1, repair=5)
    int4 = settings.ExportSettings("int4", exporter="genai")
    with pytest.raises(InputError, match="add --repair-rank 0"):
        settings.RunSettings(repair, exporting=int4).check()
    shared = settings.ExportSettings(kv_cache="shared")
    with pytest.raises(InputError, match="TensorRT does not take the graphs of --kv-cache shared"):
        settings.RunSettings(asked.selection, exporting=shared, engines=settings.EngineSettings()).check()
