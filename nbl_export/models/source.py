"""Find a model: a local folder, a GGUF file, or the Hugging Face Hub.

Only files are read; no weights are loaded. Pickled weights are never read, remote code runs only on request, and
nothing is downloaded unless the user gives a Hub id.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from nbl_export.batch import PIXELS, TOKENS
from nbl_export.errors import InputError
from nbl_export.files import (
    JSON_LIMIT,
    Digests,
    member,
    open_data,
    overlap,
    parse_json,
    read_bytes,
    sha256_of_json,
    user_path,
)
from nbl_export.models.folder import (
    AGAIN,
    FEATURES,
    GENERATION,
    INDEX,
    WEIGHTS,
    Task,
    check_keys,
    find_pooling,
    nested,
    task_named,
    task_of,
    tasks,
    weight_files,
    weight_names,
)
from nbl_export.records import from_json

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_HUB_FILES = ("*.json", WEIGHTS, "*.model", "*.jinja", "*.txt")
_TRUST = "trust_remote_code"
# A configuration with one of these keys is of a vision model, if its task is also one of text.
_OF_IMAGES = ("image_size", "num_channels")
# Files of a model folder that are no weights and that loading, or a client of the graph, reads.
_READ = ("*.json", "*.model", "*.jinja", "*.py", "*.tiktoken", "vocab.txt", "merges.txt")
_SIDECARS = ("generation_config.json", "*.jinja", "chat_template*")


@dataclass(frozen=True)
class ModelIdentity:
    """What identifies a model, wherever it lies.

    ``gguf_file`` is the name of a GGUF file; ``fingerprint`` a SHA-256 over the configuration and every weight
    file. ``task`` is a row of ``tasks.toml``, ``reads`` its main input. ``trust_remote_code`` says that the model's own
    code was allowed to run. ``wrapper`` is the class of a multimodal model, of which the language model alone is used,
    and ``towers`` are the parts that are left out; both are empty for any other model.
    """

    source: str
    kind: Literal["folder", "gguf", "hub"]
    gguf_file: str | None
    fingerprint: str
    trust_remote_code: bool = False
    task: str = GENERATION
    reads: str = TOKENS
    wrapper: str = ""
    towers: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSource(ModelIdentity):
    """A model that was found; ``path`` is the local folder (of a GGUF file: its folder).

    ``model`` and ``sidecars`` are the inputs of stages: SHA-256 of everything that loading reads (weights,
    configuration, tokenizer, code), and of what only travels with a graph (generation configuration, chat template).
    """

    path: str = field(kw_only=True)
    model: str = field(kw_only=True)
    sidecars: str = field(kw_only=True)

    @property
    def identity(self) -> ModelIdentity:
        """The model without its place on this machine."""
        return ModelIdentity(**{f.name: getattr(self, f.name) for f in fields(ModelIdentity)})

    def as_json(self) -> dict[str, Any]:
        """For the record of an output folder, which never says that code may run."""
        return {name: value for name, value in asdict(self).items() if name != _TRUST}


# Is told of a model before any of its weights is read, and may refuse it.
Early = Callable[["ModelSource"], object]


def find_model(
    source: str,
    trust_remote_code: bool = False,
    digests: Digests | None = None,
    early: Early = lambda _found: None,
) -> ModelSource:
    """Find ``source`` and compute its fingerprint; files whose ``digests`` are known are not read for it.

    An existing path has priority over a Hub id with the same name. ``early`` is told of the model before its weights
    are read, when its digests are empty, and may refuse it. Raises :class:`InputError` for anything that is not a
    decoder or encoder with safetensors or GGUF weights.
    """
    if not source.strip():
        raise InputError("MODEL is empty: give a folder, a .gguf file, or a Hub id.")
    path, kind = user_path(source, "MODEL"), "folder"
    if path.is_dir() and not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) != 1:
            many = (
                f"{len(ggufs)} .gguf files, name one of them"
                if ggufs
                else "neither config.json nor a .gguf file"
            )
            raise InputError(f"The folder {source} is not a model: it has {many}.")
        path = ggufs[0]
    if not path.is_file() and not path.is_dir():
        if not _HUB_ID.match(source) or source.endswith(".gguf"):
            raise InputError(f"{source} does not exist: MODEL is a folder, a .gguf file, or a Hub id.")
        path, kind = _hub_snapshot(source, trust_remote_code), "hub"
    return _read(source, path, kind, trust_remote_code, digests or Digests(), early)


def check_apart(source: ModelSource, out: Path) -> None:
    """Refuse an output folder that is, holds, or lies in the model: their files would replace each other."""
    place = Path(source.path)
    clash = overlap(user_path(str(out), "--output"), place / source.gguf_file if source.gguf_file else place)
    if clash:
        raise InputError(
            f"The output folder {out} {clash} the model {source.source}, whose files it would change: choose another "
            "--output."
        )


def same_model(
    info: dict[str, Any],
    trust_remote_code: bool = False,
    digests: Digests | None = None,
    early: Early = lambda _found: None,
    at: str | None = None,
) -> ModelSource:
    """Find the model recorded in an output folder, on this machine; refuse it if its bytes changed.

    With ``at``, it is there now, wherever it was. The folder may come from elsewhere: nothing is fetched for it, and
    that code may run is never taken from it. ``digests`` and ``early`` are those of :func:`find_model`.
    """
    remedy = "start again with another --output"
    told = {name: value for name, value in info.items() if name != _TRUST}
    recorded = from_json(ModelSource, told, "The record of the model", remedy)
    if at is not None:
        return expected(find_model(at, trust_remote_code, digests, early), recorded)
    folder = Path(recorded.path)
    if recorded.kind == "hub" and not folder.is_dir():
        folder = _hub_snapshot(recorded.source, trust_remote_code, fetch=False)
    place = member(folder, recorded.gguf_file or "config.json", "The recorded model")
    there = place if recorded.gguf_file else folder
    if not place.is_file():
        raise InputError(
            f"The model {there} is not there any more: put it back, say where it is now (`nbl-export verify --model`), "
            f"or {remedy}."
        )
    found = _read(recorded.source, there, recorded.kind, trust_remote_code, digests or Digests(), early)
    return expected(found, recorded)


def expected(found: ModelSource, recorded: ModelIdentity) -> ModelSource:
    """``found``, which must be the ``recorded`` model."""
    if found.fingerprint != recorded.fingerprint:
        raise InputError(
            f"{found.source} is not the model that this was made from, or has changed since ({recorded.source}, "
            f"fingerprint {recorded.fingerprint[:12]}; here {found.fingerprint[:12]}): name that one with --model, or "
            "start again with another --output."
        )
    return found


def _hub_snapshot(repo: str, code: bool, fetch: bool = True) -> Path:
    """The folder of a model of the Hub: its small files, and those of its weights that loading opens."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    def get(*patterns: str) -> Path:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=not fetch))

    try:
        folder = get(*_HUB_FILES, *(("*.py",) if code else ()))
        if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
            folder = get(*map(str, weight_names(folder)))
        return folder
    except (RepositoryNotFoundError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not fetch:
            raise InputError(
                f"The model {repo} of the Hugging Face Hub is not on this machine: fetch it with `hf download {repo}`."
            ) from None
        raise InputError(
            f"{repo} is not a local path, and no model that you can read on the Hugging Face Hub, or that cannot be "
            f"reached ({type(error).__name__}): check the spelling and the network, or log in with `hf auth login`."
        ) from None


def _read(source: str, path: Path, kind: str, trust: bool, digests: Digests, early: Early) -> ModelSource:
    """The model of a folder or a GGUF file at ``path``; arguments and errors are those of :func:`find_model`."""
    folder, config, weights = path, {"gguf": path.name}, [path]
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{source} is not a .gguf file: MODEL is a folder with config.json and safetensors, "
                "a .gguf file, or a Hub id."
            )
        with open_data(path) as file:
            if (magic := file.read(4)) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file (it starts with {magic!r}): download it again.")
        folder, identity = path.parent, ModelIdentity(source, "gguf", path.name, "")
    else:
        try:
            config = parse_json(read_bytes(path / "config.json", JSON_LIMIT))
            if not isinstance(config, dict):
                raise ValueError("it is not a JSON object")
        except (OSError, ValueError) as error:
            raise InputError(f"{source}: config.json cannot be read ({error}): {AGAIN}.") from None
        task = check_config(source, config)
        if find_pooling(path):
            task = task_named(FEATURES)  # pooling uses the hidden states, whatever head was saved
        check_keys(source, path, config)
        if not (weights := weight_files(path)):
            raise InputError(
                f"{source} has no .safetensors weights: pickled weights (.bin) are not loaded; convert them with "
                "`save_pretrained` of transformers."
            )
        pixels = len(task.reads) > 1 and not config.keys().isdisjoint(_OF_IMAGES)
        main, wrapper = PIXELS if pixels else task.reads[0], _wrapper(source, config, task)
        identity = ModelIdentity(source, kind, None, "", trust, task.name, main, *wrapper)  # type: ignore[arg-type]
    found = ModelSource(**vars(identity), path=str(folder.resolve()), model="", sidecars="")
    early(found)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for weight, content in digests.of_all(weights, f"Reading {folder.name}").items():
        digest.update(f"{weight.relative_to(folder).as_posix()}:{content};".encode())
    found = replace(found, fingerprint=digest.hexdigest(), model=digest.hexdigest())
    if found.gguf_file:
        return found
    beside = {f for pattern in _READ for place in ("", "*/") for f in path.glob(place + pattern)}
    others = {f.relative_to(path).as_posix(): digests.of(f) for f in sorted(beside) if f.is_file()}
    del others["config.json"]  # is in the fingerprint
    sidecars = {n: others.pop(n) for n in list(others) if any(fnmatch(n, pattern) for pattern in _SIDECARS)}
    return replace(
        found, model=sha256_of_json([found.fingerprint, others]), sidecars=sha256_of_json(sidecars)
    )


def _wrapper(source: str, config: dict[str, Any], task: Task) -> tuple[str, tuple[str, ...]]:
    """The class of a multimodal model and its towers; nothing for any other, and for one that comes with its code."""
    if not nested(config) or "auto_map" in config or not (task.causal or task.name == FEATURES):
        return "", ()
    from nbl_export.models.multimodal import check_alone, find_wrapper

    architecture = (config.get("architectures") or [""])[0]
    if task.causal:
        return find_wrapper(source, config, architecture)
    check_alone(source, config, architecture)
    return "", ()


def check_config(source: str, config: Mapping[str, Any]) -> Task:
    """The task of a model; refuses, before any work, a model that is not supported, with the reason."""
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str | None) or not all(isinstance(a, str) for a in architectures):
        raise InputError(
            f"{source}: config.json cannot be read (model_type {kind!r:.100}, architectures {architectures!r:.100}): "
            f"{AGAIN}."
        )
    if config.get("is_encoder_decoder"):
        part = "the encoder of " if any(a.endswith("EncoderModel") for a in architectures) else ""
        raise InputError(
            f"{source} is {part}an encoder-decoder model ({kind}): only decoder-only language models and encoders are "
            "supported."
        )
    task = task_of(architectures)
    if task is None and nested(config) and "auto_map" not in config:
        task = task_named(GENERATION)  # unless its structure says otherwise
    if task is None:
        raise InputError(
            f"{source} is for a task that is not supported (architecture {', '.join(architectures)}): supported are "
            f"{', '.join(f'…{ending}' for row in tasks().values() for ending in row.architectures)}."
        )
    for part in (config, *(config[key] for key in nested(config))):
        given = part.get("quantization_config") or part.get("compression_config")
        if not isinstance(given, Mapping):
            continue
        bits = given.get("load_in_8bit") or given.get("load_in_4bit")
        method = "bitsandbytes" if bits else given.get("quant_method")
        if method not in (None, "gguf"):  # what is read from GGUF has ordinary weights
            raise InputError(
                f"{source} is a quantized checkpoint ({method!s:.100}): dequantize it first, or use the original or a "
                "GGUF file."
            )
    return task
