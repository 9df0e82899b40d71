"""Define what a setting is. Each is defined once: a field of a frozen dataclass, and its help, a line of the docstring.

samples: int = setting(128, TEXT, at_least(1))      # the field, the option --samples, the file's key samples
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import cleandoc
from types import UnionType
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from nbl_export.errors import InputError

# The word for a value that is found out, and the source of values that a configuration file gives as JSON.
AUTO, FILE = "auto", "file"
# The panels in the order of their keys: what most users never need comes last.
LAYERS, COST = Group("Which layers", sort_key=2), Group("What it may cost", sort_key=3)
TEXT, GRAPH = Group("Calibration text", sort_key=4), Group("Graph and engines", sort_key=5)
CHECKS, ANSWERS = Group("What is measured", sort_key=6), Group("What is generated", sort_key=7)
MORE = Group("Advanced", sort_key=9)
_WANTED = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}
_METAVARS = {int: "N", float: "X", str: "NAME", bool: ""}
S = TypeVar("S", bound="Settings")
C = TypeVar("C", bound=type)


class UsageError(InputError):
    """Words on the command line that cannot be read (exit code 2)."""


class Task(Protocol):
    """What a model is for, as far as settings depend on it: a row of :mod:`nbl_export.models.tasks`."""

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

    holds: Callable[[Any], bool]
    words: str
    of_file: bool = False
    known: tuple[str, ...] = ()


def at_least(least: float, words: str = "") -> Must:
    return Must(lambda value: value >= least, f"is {{value}}; it must be {words or f'at least {least}'}")


def one_of(known: Iterable[str], words: str = "choose one of") -> Must:
    """Refuses any other value; ``words`` are those before the list, or the sentence if they begin with "is"."""
    said = words if words.startswith("is ") else f"{{value!r}} is unknown; {words}"
    every = tuple(known)
    return Must(lambda value: value in every, f"{said} {', '.join(every)}", known=every)


@dataclass(frozen=True)
class Setting:
    """One setting: ``key`` is its option without the dashes, ``shown`` its default in words where the field's own does
    not say it; ``auto``: that word is a value, too; ``repeated``: a list by repetition, where others have commas;
    ``read`` makes a value of text that is no plain value, as ``like`` it is written. ``offered`` are the values that a
    shell completes; those of a :class:`Must` need not be said.

    ``path`` leads to the field; ``kind`` is the type of one value, of which there may be ``many``.
    """

    panel: Group
    musts: tuple[Must, ...]
    metavar: str = ""
    key: str = ""
    shown: str | None = None
    auto: bool = False
    repeated: bool = False
    read: Callable[[str], Any] | None = None
    like: str = "whole numbers with commas, as 3,7,12"
    offered: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    help: str = ""
    kind: type = str
    many: bool = False

    @property
    def parameter(self) -> Parameter:
        """The option, for the library that reads the command line."""
        metavar = (
            self.metavar or ("LIST" if self.many else _METAVARS.get(self.kind, "NAME")) + "|auto" * self.auto
        )
        more: dict[str, Any] = {"metavar": metavar}
        if self.kind is not bool:
            more |= {"converter": self._from_words, "n_tokens": 1, "json_list": False}
            more |= {"allow_repeating": True, "negative_iterable": ()}
        name, show = f"--{self.key}", self._default
        return Parameter(name=name, help=self.help, group=self.panel, show_default=show, **more)

    def check(self, value: Any, name: str, of_file: bool = False) -> None:
        """Raise :class:`InputError`, beginning with ``name``, for a value that is refused; None is no value.

        No setting is empty text, which would be read as this folder, or infinite, which no record can hold.
        """
        for must in self.musts if value is not None else ():
            for one in value if self.repeated else (value,):
                if must.of_file <= of_file and not must.holds(one):
                    shown = f"{one:g}" if isinstance(one, float) else one
                    raise InputError(f"{name} {must.words.format(value=shown)}.")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str) and not one:
                raise InputError(f"{name} is empty; give some text.")
            if isinstance(one, float) and not math.isfinite(one):
                raise InputError(f"{name} is {one}; give a finite number.")

    def from_file(self, value: Any, name: str) -> Any:
        """A value of a TOML file as the field has it; raises :class:`InputError` for one that is refused."""
        if self.auto and value == AUTO:
            return value
        is_list = isinstance(value, list)
        types = {type(one) for one in (value if is_list else [value])}
        allowed = {int, float} if self.kind is float else {int, str} if self.read else {self.kind}
        if is_list != self.many or not types <= allowed:
            raise InputError(f"{name} is {json.dumps(value, default=str)}; give {self._wanted}.")
        try:
            found = (
                tuple(self._one(str(one) if self.read else one) for one in value)
                if self.many
                else self.kind(value)
            )
        except ValueError:
            raise InputError(f"{name} is {json.dumps(value)}; give {self._wanted}.") from None
        except OverflowError:  # a whole number of more than 308 digits
            raise InputError(f"{name} is too large; give a finite number.") from None
        self.check(found, name, of_file=True)
        return found

    def _from_words(self, tokens: Sequence[Any]) -> Any:
        option, text = tokens[-1].keyword, tokens[-1].value
        if tokens[-1].source == FILE:
            return tuple(json.loads(text)) if self.many else json.loads(text)
        if self.repeated:
            return tuple(token.value for token in tokens)
        if self.auto and text == AUTO:
            return AUTO
        try:
            return tuple(map(self._one, text.split(","))) if self.many else self.kind(text)
        except ValueError:
            wanted = self.like if self.many else self._wanted
            raise UsageError(f"{option} is {text!r}; give {wanted}.") from None

    def _one(self, value: Any) -> Any:
        return self.read(value) if self.read else self.kind(value)

    @property
    def _wanted(self) -> str:
        if self.read:
            return f"a list in brackets: {self.like}"
        wanted = _WANTED[self.kind] + " or auto" * self.auto
        return f"a list in brackets, each {wanted}" if self.many else wanted

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


def settings_of(cls: type) -> Iterator[Setting]:
    """Every setting of a class, those of a nested one included; an inherited one is explained where it is defined."""
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
            kind = [part for part in parts if part is not type(None)][-1]
            many, musts = get_origin(kind) is tuple, one.musts
            if get_origin(kind) is Literal:
                kind, musts = str, (*musts, one_of(get_args(kind)))
            elif many:
                kind = get_args(kind)[0]
            known = [word for must in musts for word in must.known]
            words = tuple(dict.fromkeys((*one.offered, *known, *((AUTO,) if one.auto else ()))))
            key, text = one.key or each.name.replace("_", "-"), " ".join(helps[each.name].split())
            yield replace(
                one, key=key, path=(each.name,), kind=kind, many=many, musts=musts, help=text, offered=words
            )


@dataclass(frozen=True)
class Settings:
    """What a stage can be asked: a frozen dataclass of settings."""

    def check(self) -> None:
        """Raise :class:`InputError` for the first value that is refused; needs no model and no package."""
        for one in settings_of(type(self)):
            value: Any = self
            for name in one.path:
                value = getattr(value, name)
            one.check(value, f"--{one.key}")

    def resolve(self: S, _task: Task) -> S:
        """With what depends on the model's task filled in; raises :class:`InputError` for what it cannot be asked."""
        return self

    def as_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload, no-any-return]


_FORM = re.compile(r"auto|cpu|xpu|cuda(:\d{1,4})?")
_NO_MPS = Must(
    lambda device: device != "mps",
    "is mps: an Apple GPU has no float64, in which moments are summed; say cpu, or leave it out",
)
_KNOWN = Must(
    lambda device: _FORM.fullmatch(device) is not None,
    "is {value!r}; it must be auto, cpu, cuda, cuda:N (as cuda:1) or xpu",
)


@dataclass(frozen=True, kw_only=True)
class OnDevice(Settings):
    """What is asked of a stage that runs the model.

    device: Where the model runs, and the graphs if ONNX Runtime has CUDA: cpu, cuda, cuda:N, xpu. auto: a GPU if
        there is one.
    """

    device: str = setting(AUTO, MORE, _NO_MPS, _KNOWN, metavar="DEVICE")

    def as_json(self) -> dict[str, Any]:
        """Without the device: what was made on one is used on machines that have another, or none.

        Sums on a GPU differ in their last bits, so the record of a stage says where it ran; but they are no other
        result, which everything made of them would have to follow.
        """
        return {name: value for name, value in super().as_json().items() if name != "device"}


_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMGT])(i?)B", re.IGNORECASE)


def bytes_of(size: str) -> int:
    """The bytes of a ``size`` such as 4GiB or 500MB; raises ``ValueError`` for anything else."""
    found = _SIZE.fullmatch(size)
    if found is None:
        raise ValueError(size)
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))


def _is_size(size: str) -> bool:
    try:
        return bytes_of(size) > 0
    except ValueError:
        return False


SIZE = Must(_is_size, "is {value!r}; give a size, as 4GiB or 500MB")
