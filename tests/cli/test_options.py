"""The options of every command are options of every command, and none is explained twice."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from nbl_export.cli import options
from nbl_export.cli.help import EVERYWHERE
from nbl_export.cli.main import COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_what_every_command_takes(name: str) -> None:
    parameters = inspect.signature(COMMANDS[name]).parameters
    assert "said" in parameters and parameters["said"].default == options.Said()


def test_the_help_names_all_of_them() -> None:
    hints = options.Said.__annotations__
    assert {f"--{field.replace('_', '-')}" for field in hints} == set(EVERYWHERE)


def test_no_two_are_explained_alike() -> None:
    found = [value for value in vars(options).values() if hasattr(value, "__metadata__")]
    texts = [one.help for value in found for one in get_args(value)[1:]]
    assert len(texts) > 10 and len(set(texts)) == len(texts)
    assert all(text.endswith(".") for text in texts)
