"""What generate and chat can be asked."""

from __future__ import annotations

import pytest

from nbl_export.errors import InputError
from nbl_export.settings import ChatSettings, GenerateSettings
from nbl_export.settings.definition import settings_of


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (GenerateSettings(graph="other"), "--graph 'other' is unknown; choose one of linearized, base, both"),
        (GenerateSettings(max_tokens=0), "--max-tokens is 0; it must be at least 1"),
        (GenerateSettings(temperature=-0.1), "--temperature is -0.1; it must be at least 0"),
        (GenerateSettings(top_p=0.0), "--top-p is 0; it must be more than 0 and at most 1"),
        (GenerateSettings(top_p=1.01), "--top-p is 1.01; it must be more than 0 and at most 1"),
        (GenerateSettings(seed=-1), "--seed is -1; it must be at least 0"),
        (
            GenerateSettings(runtime="trt"),
            "--runtime 'trt' is unknown; choose one of auto, genai, onnxruntime",
        ),
        (ChatSettings(raw=True, system="x"), "--raw uses no chat template, and --system is a part of it"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: GenerateSettings, message: str) -> None:
    with pytest.raises(InputError) as caught:
        asked.check()
    assert str(caught.value).startswith(message)


def test_a_chat_is_with_both_graphs_and_longer() -> None:
    ChatSettings().check(), GenerateSettings().check()
    assert (GenerateSettings().graph, ChatSettings().graph) == ("linearized", "both")
    assert ChatSettings().max_tokens > GenerateSettings().max_tokens == 128
    keys = [one.key for one in settings_of(GenerateSettings)]
    assert [one.key for one in settings_of(ChatSettings)] == keys and len(keys) == 8
