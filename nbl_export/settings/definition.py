"""Define what a setting is. Each is defined once: a field of a frozen dataclass, and its help, a line of the docstring.

samples: int = setting(128, TEXT, at_least(1))      # the field, the option --samples, the file's key samples
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import cleandoc
from types import UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from cyclopts import Group, Parameter

from nbl_export.errors import InputError
from nbl_export.files import jsonable

AUTO = "auto"  # the word for a value that is found out
# The panels in the order of their keys: what most users never need comes last, and is shown if all is asked for.
ALL_HELP = "--help-all"
LAYERS, COST = Group("Which layers", sort_key=2), Group("What it may cost", sort_key=3)
TEXT, GRAPH = Group("Calibration text", sort_key=4), Group("Graph and engines", sort_key=5)
CHECKS, ANSWERS = Group("What is measured", sort_key=6), Group("What is generated", sort_key=7)
MORE = Group("Advanced", sort_key=9, show=ALL_HELP in sys.argv)
_WANTED = {int: "a whole number", float: "a number", str: "some text", bool: "true or false"}
_METAVARS = {int: "N", float: "X", str: "NAME", bool: ""}
S = TypeVar("S", bound="Settings")
C = TypeVar("C", bound=type)


class UsageError(InputError):
    """Words on the command line that cannot be read (exit code 2)."""


class Task(Protocol):
    """What a model is for, as far as settings depend on it: a row of :mod:`nbl_export.models.folder`."""

    @property
    def name(self) -> str: ...
    @property
    def causal(self) -> bool: ...


@dataclass(frozen=True)
class Must:
    """Refuses values for which ``holds`` is false: the option's name, then ``words`` with {value} filled in.

    ``of_file``: only values of a configuration file, which is data and must not make code run. ``known`` are the values
    that pass, where they can be listed.
    """

    holds: Callable[[Any], object]
    words: str
    of_file: bool = False
    known: tuple[str, ...] = ()


def at_least(least: float, words: str = "") -> Must:
    return Must(lambda value: value >= least, f"is {{value}}; it must be {words or f'at least {least}'}")


def one_of(known: Iterable[str]) -> Must:
    every = tuple(known)
    return Must(
        lambda value: value in every, f"{{value!r}} is unknown; choose one of {', '.join(every)}", known=every
    )


# No setting is empty text, which would be read as this folder, or infinite, which no record can hold.
_ALWAYS = (
    Must(
        lambda value: "" not in (value if isinstance(value, tuple) else (value,)), "is empty; give some text"
    ),
    Must(
        lambda value: not isinstance(value, float) or math.isfinite(value), "is {value}; give a finite number"
    ),
)


@dataclass(frozen=True)
class Setting:
    """One setting: ``key`` is its option without the dashes, ``shown`` its default in words where the field's own does
    not say it; ``auto``: that word is a value, too; ``repeated``: a list by repetition, where others have commas;
    ``read`` makes a value of one word, which is written as ``like`` says. ``offered`` are the values that a shell
    completes; those of a :class:`Must` need not be said.

    ``path`` leads to the field; ``kind`` is the type of one value, of which there may be ``many``, or none where it is
    ``optional``.
    """

    panel: Group
    musts: tuple[Must, ...]
    metavar: str = ""
    key: str = ""
    shown: str | None = None
    auto: bool = False
    repeated: bool = False
    read: Callable[[str], Any] | None = None
    like: str = ""
    offered: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    help: str = ""
    kind: type = str
    many: bool = False
    optional: bool = False

    @property
    def parameter(self) -> Parameter:
        """The option, for the library that reads the command line."""
        kind = "LIST" if self.many else _METAVARS.get(self.kind, "NAME")
        more: dict[str, Any] = {"metavar": self.metavar or kind + "|auto" * self.auto}
        if self.kind is not bool:
            more |= {"converter": self._from_tokens, "n_tokens": 1, "json_list": False}
            more |= {"allow_repeating": True, "negative_iterable": ()}
        return Parameter(
            name=f"--{self.key}", help=self.help, group=self.panel, show_default=self._default, **more
        )

    def check_type(self, value: Any, name: str) -> None:
        """Raise :class:`InputError`, beginning with ``name``, for a value of Python that has another type."""
        if (value is None and self.optional) or (self.auto and value == AUTO):
            return
        kinds = get_args(self.kind) or ((int, float) if self.kind is float else (self.kind,))
        each = value if self.many else (value,)
        if isinstance(each, tuple) and all(
            isinstance(one, kinds) and isinstance(one, bool) <= (self.kind is bool) for one in each
        ):
            return
        one = _WANTED.get(self.kind, "a layer")
        wanted = f"a tuple, each of it {one}" if self.many else one
        raise InputError(f"{name} is {value!r}; give {wanted}{f' or {AUTO!r}' * self.auto}.")

    def check(self, value: Any, name: str, of_file: bool = False) -> None:
        """Raise :class:`InputError`, beginning with ``name``, for a value that is refused; None is no value."""
        for must in (*self.musts, *_ALWAYS) if value is not None else ():
            for one in value if self.repeated else (value,):
                if must.of_file <= of_file and not must.holds(one):
                    shown = f"{one:g}" if isinstance(one, float) else one
                    raise InputError(f"{name} {must.words.format(value=shown)}.")

    def of_words(self, words: Sequence[str], name: str) -> Any:
        """The value that ``words`` of the command line or of a file say; raises :class:`UsageError` for none."""
        if self.auto and words[-1] == AUTO:
            return AUTO
        try:
            each = words if self.repeated else words[-1].split(",") if self.many and words[-1] else words[-1:]
            found = tuple((self.read or self.kind)(word if self.repeated else word.strip()) for word in each)
        except ValueError:
            one = _WANTED[self.kind]
            several = f"{one.removeprefix('a ')}s with commas, as 3,7,12"
            wanted = self.like if self.read else several if self.many else one
            raise UsageError(f"{name} is {words[-1]!r}; give {wanted}{' or auto' * self.auto}.") from None
        return found if self.many else found[0]

    def _from_tokens(self, tokens: Sequence[Any]) -> Any:
        return self.of_words([token.value for token in tokens], tokens[-1].keyword)

    def _default(self, value: Any) -> str | None:
        if self.shown or value is None or isinstance(value, bool):
            return self.shown or (None if value is None else "yes" if value else "no")
        if isinstance(value, float):
            return f"{value:g}".replace("e-0", "e-")
        return ",".join(map(str, value)) or None if isinstance(value, tuple) else str(value)


def setting(default: Any, panel: Group, *musts: Must, **how: Any) -> Any:
    """A field with its option; ``how`` are fields of :class:`Setting`, from ``metavar`` to ``repeated``."""
    return field(default=default, metadata={"setting": Setting(panel, musts, **how)})


def options(cls: C) -> C:
    """A dataclass whose settings are options, too: each annotation gets what the command line needs to know."""
    hints = get_type_hints(cls)
    for one in settings_of(cls):
        if len(one.path) == 1:
            hint = hints[one.path[0]]
            if one.offered:  # the library completes the words of a Literal, and reads values by our converter
                hint = Union[Literal[one.offered], hint]  # noqa: UP007, since the words are not known before
            cls.__annotations__[one.path[0]] = Annotated[hint, one.parameter]
    return Parameter(name="*")(cls)


_KNOWN: dict[type, tuple[Setting, ...]] = {}


def settings_of(cls: type) -> tuple[Setting, ...]:
    """Every setting of a class, those of a nested one included; an inherited one is explained where it is defined."""
    if cls not in _KNOWN:
        _KNOWN[cls] = tuple(_settings_of(cls))
    return _KNOWN[cls]


def _settings_of(cls: type) -> Iterator[Setting]:
    hints = get_type_hints(cls)
    # From Python 3.13 on a docstring has no indentation of its own.
    docs = "\n".join(cleandoc(base.__doc__ or "") for base in reversed(cls.__mro__) if base is not object)
    helps = dict(re.findall(r"^(\w+): (.+(?:\n {4}.+)*)", docs, re.M))
    for each in fields(cls):
        hint, one = hints[each.name], each.metadata.get("setting")
        if isinstance(hint, type) and issubclass(hint, Settings):
            yield from (replace(inner, path=(each.name, *inner.path)) for inner in settings_of(hint))
        elif one:
            parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            # The last one: words that a shell completes stand before it.
            kind, musts = [part for part in parts if part is not type(None)][-1], one.musts
            many, of = get_origin(kind) is tuple, get_args(kind)
            if get_origin(kind) is Literal:
                kind, musts = str, (*musts, one_of(of))
            known = [word for must in musts for word in must.known]
            yield replace(
                one,
                key=one.key or each.name.replace("_", "-"),
                path=(each.name,),
                kind=of[0] if many else kind,
                many=many,
                optional=type(None) in parts,
                musts=musts,
                help=" ".join(helps[each.name].split()),
                offered=tuple(dict.fromkeys((*one.offered, *known, *[AUTO] * one.auto))),
            )


def refuse(*cases: tuple[object, str]) -> None:
    """Raise :class:`InputError` with the sentence of the first of ``cases`` that holds."""
    for holds, sentence in cases:
        if holds:
            raise InputError(sentence)


@dataclass(frozen=True)
class Settings:
    """What a stage can be asked: a frozen dataclass of settings.

    ``of_decoders`` says why an encoder cannot be asked it, where none can, and ``instead`` what to do. ``unrecorded``
    changes no result. Raises :class:`InputError`, which names the field, for a value of another type.
    """

    of_decoders: ClassVar[str] = ""
    instead: ClassVar[str] = "leave it out"
    unrecorded: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for one in settings_of(type(self)):
            if len(one.path) == 1:
                one.check_type(getattr(self, one.path[0]), f"{type(self).__name__}.{one.path[0]}")

    def check(self) -> None:
        """Raise :class:`InputError` for the first value that is refused; needs no model and no package."""
        for one in settings_of(type(self)):
            value: Any = self
            for name in one.path:
                value = getattr(value, name)
            one.check(value, f"--{one.key}")

    def resolve(self: S, task: Task) -> S:
        """With what depends on the model's task filled in; raises :class:`InputError` for what it cannot be asked."""
        if self.of_decoders and not task.causal:
            raise InputError(f"{self.of_decoders}; this model is an encoder ({task.name}): {self.instead}.")
        return self

    def as_json(self) -> dict[str, Any]:
        """What is asked for, without what is ``unrecorded``."""
        return {name: value for name, value in jsonable(self).items() if name not in self.unrecorded}


_NO_MPS = Must(
    lambda device: device != "mps",
    "is mps: an Apple GPU has no float64, in which moments are summed; say cpu, or leave it out",
)
_DEVICE = Must(
    re.compile(r"auto|cpu|xpu|cuda(:\d{1,4})?").fullmatch,
    "is {value!r}; it must be auto, cpu, cuda, cuda:N (as cuda:1) or xpu",
)


@dataclass(frozen=True, kw_only=True)
class OnDevice(Settings):
    """What is asked of a stage that runs the model.

    device: Where the model runs, and the graphs if ONNX Runtime has CUDA: cpu, cuda, cuda:N, xpu. auto: a GPU if
        there is one.
    """

    # Sums on a GPU differ in their last bits, so the record of a stage says where it ran; but they are no other result,
    # which everything made of them would have to follow: it is used on machines that have another device, or none.
    unrecorded: ClassVar[tuple[str, ...]] = ("device",)

    device: str = setting(AUTO, MORE, _NO_MPS, _DEVICE, metavar="DEVICE")


_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMGT])(i?)B", re.IGNORECASE)


def bytes_of(size: str) -> int:
    """The bytes of a ``size`` such as 4GiB or 500MB; 0 for anything else."""
    if (found := _SIZE.fullmatch(size)) is None:
        return 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1))


SIZE = Must(bytes_of, "is {value!r}; give a size, as 4GiB or 500MB")
