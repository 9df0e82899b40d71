"""Where a model comes from: a local folder, a GGUF file, or the Hugging Face Hub.

Resolving reads files only; no weights are loaded. Pickled weights are never read, remote code runs only on request,
and nothing is downloaded unless the user gives a Hub id.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from nbl_export.batch.names import TOKENS
from nbl_export.digests import Digests
from nbl_export.errors import InputError
from nbl_export.files import (
    JSON_LIMIT,
    member,
    overlap,
    parse_json,
    read_bytes,
    sha256_of_json,
    user_path,
)
from nbl_export.models.config_keys import QUANTIZED, check_beside, check_keys, quantized_by
from nbl_export.models.limits import check_folder, check_gguf, weight_files
from nbl_export.models.pooling import find_pooling
from nbl_export.models.tasks import FEATURES, GENERATION, Task, heads, nests, reads, task_named, task_of
from nbl_export.records import from_json

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_TRUST = "trust_remote_code"
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
    path, digests = user_path(source, "MODEL"), digests or Digests()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{source} is not a .gguf file: MODEL is a folder with config.json and safetensors, "
                "a .gguf file, or a Hub id."
            )
        return _from_gguf(source, path, digests, early)
    if path.is_dir():
        if (path / "config.json").exists():
            return _from_folder(source, path, "folder", trust_remote_code, digests, early)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _from_gguf(source, ggufs[0], digests, early)
        found = (
            f"{len(ggufs)} .gguf files, name one of them" if ggufs else "neither config.json nor a .gguf file"
        )
        raise InputError(f"The folder {source} is not a model: it has {found}.")
    if not _HUB_ID.match(source) or source.endswith(".gguf"):
        raise InputError(f"{source} does not exist: MODEL is a folder, a .gguf file, or a Hub id.")
    folder = _hub_snapshot(source, trust_remote_code)
    return _from_folder(source, folder, "hub", trust_remote_code, digests, early)


def check_apart(source: ModelSource, out: Path) -> None:
    """Refuse an output folder that is, holds, or lies in the model: their files would replace each other."""
    place = Path(source.path)
    clash = overlap(user_path(str(out), "--output"), place / source.gguf_file if source.gguf_file else place)
    if clash:
        raise InputError(
            f"The output folder {out} {clash} the model {source.source}, whose files it would change: choose another "
            "--output."
        )


@dataclass(frozen=True)
class _Recorded:
    """The model that an output folder names. The folder may come from elsewhere: nothing is fetched or run for it."""

    source: str
    kind: Literal["folder", "gguf", "hub"]
    gguf_file: str | None
    fingerprint: str
    path: str
    task: str = GENERATION
    reads: str = TOKENS
    model: str = ""
    sidecars: str = ""
    wrapper: str = ""
    towers: tuple[str, ...] = ()


def same_model(
    info: dict[str, Any],
    trust_remote_code: bool = False,
    digests: Digests | None = None,
    early: Early = lambda _found: None,
    at: str | None = None,
) -> ModelSource:
    """Find the model recorded in an output folder, on this machine; refuse it if its bytes changed.

    With ``at``, it is there now, wherever it was.
    Files whose ``digests`` are known are not read for it; ``early`` is that of :func:`find_model`.

    A record of an earlier release says whether the model's code may run; that is not obeyed.
    """
    digests = digests or Digests()
    remedy = "start again with another --output"
    recorded = from_json(
        _Recorded, {k: v for k, v in info.items() if k != _TRUST}, "The record of the model", remedy
    )
    if at is not None:
        return expected(
            find_model(at, trust_remote_code, digests, early), recorded.source, recorded.fingerprint
        )
    folder = Path(recorded.path)
    if not folder.is_absolute():
        raise InputError(f"The record of the model is damaged (path {recorded.path!r}): {remedy}.")
    gone = (
        f"is not there any more: put it back, say where it is now (`nbl-export verify --model`), or {remedy}."
    )
    if recorded.kind == "gguf":
        gguf = member(folder, recorded.gguf_file, "The recorded GGUF file")
        if not gguf.is_file():
            raise InputError(f"The model {gguf} {gone}")
        found = _from_gguf(recorded.source, gguf, digests, early)
    else:
        if recorded.kind == "hub" and not _HUB_ID.match(recorded.source):
            raise InputError(f"The record of the model is damaged (source {recorded.source!r}): {remedy}.")
        if recorded.kind == "hub" and not folder.is_dir():
            folder = _hub_snapshot(recorded.source, trust_remote_code, fetch=False)
        if not (folder / "config.json").is_file():
            raise InputError(f"The model {folder} {gone}")
        found = _from_folder(recorded.source, folder, recorded.kind, trust_remote_code, digests, early)
    if found.fingerprint != recorded.fingerprint:
        raise InputError(
            f"The model {recorded.source} has changed since this output folder was made from it: "
            "choose another --output."
        )
    return found


def expected(found: ModelSource, source: str, fingerprint: str) -> ModelSource:
    """``found``, which must be the model of that ``fingerprint``; ``source`` is what it was called."""
    if found.fingerprint != fingerprint:
        raise InputError(
            f"{found.source} is not the model that this was made from ({source}, fingerprint {fingerprint[:12]}; here "
            f"{found.fingerprint[:12]}): name that one with --model."
        )
    return found


def _hub_snapshot(repo: str, code: bool, fetch: bool = True) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [*_HUB_FILES, *(["*.py"] if code else [])]
    if not fetch:
        try:
            return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            raise InputError(
                f"The model {repo} of the Hugging Face Hub is not on this machine: fetch it with `hf download {repo}`."
            ) from None
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"{repo} is neither a local path nor a model on the Hugging Face Hub that you can read: "
            "check the spelling, or log in with `hf auth login`."
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{repo} is not a local path, and the Hugging Face Hub cannot be reached "
            f"({type(error).__name__}): check the spelling and the network, or give a folder or a .gguf file."
        ) from None


def _from_gguf(source: str, path: Path, digests: Digests, early: Early) -> ModelSource:
    check_gguf(path)
    where = str(path.parent.resolve())
    found = ModelSource(source, "gguf", path.name, "", path=where, model="", sidecars="")
    early(found)
    fingerprint = _fingerprint(path.parent, [path], {"gguf": path.name}, digests)
    return replace(found, fingerprint=fingerprint, model=fingerprint)


def _from_folder(
    source: str, path: Path, kind: Literal["folder", "hub"], trust: bool, digests: Digests, early: Early
) -> ModelSource:
    try:
        config = parse_json(read_bytes(path / "config.json", JSON_LIMIT))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source}: config.json cannot be read ({error}): download the model again."
        ) from None
    if not isinstance(config, dict):
        raise InputError(
            f"{source}: config.json cannot be read (it is not a JSON object): download the model again."
        )
    task = check_config(source, config)
    if find_pooling(path):
        task = task_named(FEATURES)  # pooling uses the hidden states, whatever head was saved
    check_keys(source, config, towers=task.causal and nests(config) and "auto_map" not in config)
    check_beside(source, path)
    weights = weight_files(path)
    if not weights:
        raise InputError(
            f"{source} has no .safetensors weights: pickled weights (.bin) are not loaded; convert them with "
            "`save_pretrained` of transformers."
        )
    check_folder(source, path, config)
    wrapper, towers = _wrapper(source, config, task)
    found = ModelSource(
        source,
        kind,
        None,
        "",
        trust,
        task.name,
        reads(task, config),
        wrapper,
        towers,
        path=str(path.resolve()),
        model="",
        sidecars="",
    )
    early(found)
    fingerprint = _fingerprint(path, weights, config, digests)
    loaded, sidecars = _other_files(path, digests)
    return replace(
        found,
        fingerprint=fingerprint,
        model=sha256_of_json([fingerprint, loaded]),
        sidecars=sha256_of_json(sidecars),
    )


def _wrapper(source: str, config: dict[str, Any], task: Task) -> tuple[str, tuple[str, ...]]:
    """The class of a multimodal model and its towers; nothing for any other, and for one that comes with its code."""
    architectures = config.get("architectures") or [""]
    if not nests(config) or "auto_map" in config:
        return "", ()
    if not task.causal and task != task_named(FEATURES):
        return "", ()
    from nbl_export.models.multimodal import check_alone, find_wrapper

    if not task.causal:
        check_alone(source, config, architectures[0])
        return "", ()
    return find_wrapper(source, config, architectures[0])


def _other_files(folder: Path, digests: Digests) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of the files beside the weights: those that loading reads, and those that only travel with a graph."""
    files = sorted(
        {f for pattern in _READ for place in ("", "*/") for f in folder.glob(place + pattern) if f.is_file()}
    )
    found = {f.relative_to(folder).as_posix(): digests.of(f) for f in files}
    found.pop("config.json", None)  # is in the fingerprint
    travels = {name for name in found if any(fnmatch(name, pattern) for pattern in _SIDECARS)}
    return {n: d for n, d in found.items() if n not in travels}, {n: found[n] for n in travels}


def check_config(source: str, config: dict[str, Any]) -> Task:
    """The task of a model; refuses, before any work, a model that is not supported, with the reason."""
    kind = config.get("model_type")
    if not isinstance(kind, str | None) or not isinstance(config.get("is_encoder_decoder"), bool | None):
        raise InputError(
            f"{source}: config.json cannot be read (model_type is {kind!r:.100}, is_encoder_decoder is "
            f"{config.get('is_encoder_decoder')!r:.100}): download the model again."
        )
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise InputError(
            f"{source}: config.json cannot be read (architectures is {architectures!r}): download the model again."
        )
    if config.get("is_encoder_decoder"):
        part = "the encoder of " if any(a.endswith("EncoderModel") for a in architectures) else ""
        raise InputError(
            f"{source} is {part}an encoder-decoder model ({config.get('model_type')}): only decoder-only language "
            "models and encoders are supported."
        )
    task = task_of(architectures)
    if task is None and nests(config) and "auto_map" not in config:
        task = task_named(GENERATION)  # unless its structure says otherwise
    if task is None:
        raise InputError(
            f"{source} is for a task that is not supported (architecture {', '.join(architectures)}): supported are "
            f"{heads()}."
        )
    quantization = config.get("quantization_config")
    method = quantized_by(quantization) if isinstance(quantization, dict) else None
    if method is not None:
        raise InputError(f"{source} is {QUANTIZED.format(method=method)}.")
    return task


def _fingerprint(folder: Path, weights: Iterable[Path], config: dict[str, Any], digests: Digests) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path, content in digests.of_all(weights, f"Reading {folder.name}").items():
        digest.update(f"{path.relative_to(folder).as_posix()}:{content};".encode())
    return digest.hexdigest()
