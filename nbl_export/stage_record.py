"""What a finished stage was made of, and the key that says so.

A stage's key is the hash of all its inputs: its settings, the results of the stages it reads, digests of other inputs,
and its own version. A stage's result is the hash of its key and of the files it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbl_export.files import sha256_of_json

# The version of each stage, in the order of the stages. It is raised whenever the same inputs give another result, as
# after a corrected fit: what an earlier version made is then made again.
STAGES = {
    "calibrate": 3,
    "select": 2,
    "export": 2,
    "rewrite": 3,
    "build": 1,
    "verify": 2,
    "eval": 1,
    "bench": 1,
    "convert": 1,
}


def kind_of(stage: str) -> str:
    """The one of :data:`STAGES` that ``stage`` is: each form of ``convert`` is one, as ``convert gguf fp16``."""
    return stage.partition(" ")[0]


# Inputs that are no stages: the model as it is loaded, and its files that only travel with a graph.
MODEL, SIDECARS = "model", "sidecars"
_INPUTS = {
    MODEL: "the model's tokenizer, code or other files have changed",
    SIDECARS: "the model's generation configuration or chat template has changed",
}


@dataclass(frozen=True)
class StageRecord:
    """The record of a finished stage.

    ``files`` maps paths relative to the output folder to their SHA-256; ``seconds`` is its wall time; ``notes`` are the
    lines shown to the user (fallbacks, shortages), recorded for the report. ``made_of`` is what it read: results of
    other stages by their names, and digests of other inputs. ``version`` 0 is that of folders that do not record it.
    ``dropped`` are those of its files that were deleted later on purpose.

    ``device`` is what PyTorch ran on, empty where it ran no model or an older version did. It is no input: what was
    made on a GPU is used where there is none, so ``select`` and all after it go on from moments of any device. What
    only measures (``verify``, ``eval``) is of its device, which then is one of its settings.
    """

    key: str
    settings: dict[str, Any]
    files: dict[str, str]
    seconds: float
    notes: tuple[str, ...] = ()
    made_of: dict[str, str] = field(default_factory=dict)
    version: int = 0
    device: str = ""
    dropped: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """SHA-256 of its inputs and of what it wrote: what a stage that reads it is made of."""
        return sha256_of_json([self.key, self.files])

    def other_inputs(self, stage: str, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> str | None:
        """In words, which inputs are others than ``settings`` and ``made_of``; None if none are."""
        if self.version != STAGES[kind_of(stage)]:
            return "it was made by another version of nbl-export"
        if key_of(stage, self.settings, self.made_of) != self.key:
            return "its record was changed"
        changed = sorted(k for k in {*self.made_of, *made_of} if self.made_of.get(k) != made_of.get(k))
        if changed:
            return _input_in_words(changed[0])
        asked = sorted(
            k for k in {*self.settings, *settings} if _as_read(self.settings, k) != _as_read(settings, k)
        )
        return f"it was made with another {asked[0]}" if asked else None


def key_of(stage: str, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> str:
    """The key of ``stage`` with these inputs."""
    return sha256_of_json(
        {
            "stage": stage,
            "version": STAGES[kind_of(stage)],
            "settings": dict(settings),
            "made_of": dict(made_of),
        }
    )


def _input_in_words(name: str) -> str:
    if name in STAGES:
        return f"`{name}` was done again"
    return _INPUTS.get(name, f"its {name} changed")


def _as_read(settings: Mapping[str, Any], name: str) -> str:
    # A tuple comes back from JSON as a list.
    return sha256_of_json(settings.get(name))


def stale(stages: Mapping[str, StageRecord], stage: str, inputs: Mapping[str, str]) -> str | None:
    """Why what ``stage`` made is not of what there is now, in words; None if it is.

    ``stages`` are the records there are, ``inputs`` the digests of :data:`MODEL` and :data:`SIDECARS` where they are
    known.
    """
    record = stages[stage]
    above = [name for name in record.made_of if name in STAGES]
    if gone := [name for name in above if name not in stages]:
        return _input_in_words(gone[0])
    known = {name: digest for name, digest in inputs.items() if name in record.made_of}
    now = {**record.made_of, **known, **{name: stages[name].result for name in above}}
    if why := record.other_inputs(stage, record.settings, now):
        return why
    for name in above:
        if why := stale(stages, name, inputs):
            return f"of `{name}`, {why}"
    return None
