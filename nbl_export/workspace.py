"""The output folder: its file names, its lock, and the record of finished stages.

A stage is done when ``nbl/workspace.json`` has a record of it with the requested key and its files are
unchanged, byte for byte. The key is a hash of all inputs of the stage (:mod:`nbl_export.stage_record`), so changing
``--k`` repeats selection and the stages after it, never calibration.

It may come from somebody else: every name that a record gives passes :func:`nbl_export.files.member`, folders in it are
no links, and nothing in it makes code run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from os.path import samestat
from pathlib import Path
from typing import Any

from nbl_export.digests import Digests
from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import atomic_path, locked, member, read_json, sweep, write_json
from nbl_export.progress import Listener
from nbl_export.records import T, from_json, part_from_json
from nbl_export.stage_record import MODEL, SIDECARS, STAGES, StageRecord, key_of, kind_of, stale

STATE_VERSION = 1
# The command that makes each stage, where it is not `nbl-export STAGE OUT`.
_COMMANDS = {"calibrate": "nbl-export calibrate MODEL -o {}", "select": "nbl-export select {} --k K"}
# Names that somebody else's files may have, too.
_OWN = ("model.onnx", "config.json", "tokenizer.json", "baseline", "engine", "report")

ENGINE_SUFFIX = ".engine"
# Forms of other engines, the first a file; the others are folders, one for each precision.
FORMS = ("gguf", "mlx", "hf", "openvino", "decilm")
FOLDER_PRECISIONS = ("fp32", "fp16", "bf16")
PACKAGE = "package.json"


class Places:
    """Where the files of the output folder ``root`` are: no other module spells their names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nbl = nbl = root / "nbl"
        self.state_path = nbl / "workspace.json"
        self.digests_file = nbl / "digests.json"
        self.text = nbl / "text.safetensors"
        self.images = nbl / "images.safetensors"
        self.moments = nbl / "moments"
        self.partial_moments = nbl / "moments.partial"
        self.repair_checkpoint = nbl / "repair.partial.safetensors"
        self.probe = nbl / "probe.safetensors"
        self.candidates = nbl / "candidates.json"
        self.measured = nbl / "measured.json"
        self.costs = nbl / "costs.json"
        self.plan = nbl / "plan.json"
        self.export_summary = nbl / "export.json"
        self.rewrite_summary = nbl / "rewrite.json"
        self.bench_cells = nbl / "bench.partial.json"  # of an interrupted bench
        self.evaluations = nbl / "eval"  # the answers of each graph on each task, by key
        self.baseline = root / "baseline" / "model.onnx"
        self.embedding = root / "embedding.onnx"  # of decoders that read embeddings, of both graphs
        self.model = root / "model.onnx"
        self.engine = root / "engine" / f"model{ENGINE_SUFFIX}"
        self.base_engine = root / "engine" / f"baseline{ENGINE_SUFFIX}"
        self.report = root / "report"
        self.drawing = nbl / "report.drawing.json"  # a report that is being drawn

    def gguf(self, kind: str) -> Path:
        return self.root / "gguf" / f"model-{kind}.gguf"

    def converted(self, form: str, precision: str) -> Path:
        return self.root / form / precision

    def conversion(self, form: str, precision: str) -> Path:
        return self.nbl / f"conversion.{form}.{precision}.json"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder that is written to."""
        return (
            *(self.root, self.nbl, self.moments, self.partial_moments, self.evaluations),
            *(self.baseline.parent, self.engine.parent, self.report, self.report / "plots"),
            *(self.root / form for form in FORMS),
            *(self.converted(form, precision) for form in FORMS[1:] for precision in FOLDER_PRECISIONS),
        )


def is_package(root: Path) -> bool:
    """Whether ``root`` is a package: what a deployment needs of an output folder."""
    return (root / PACKAGE).is_file()


def kept_digests(root: Path, rehash: bool = False, listener: Listener | None = None) -> Digests:
    """The digests of files that the output folder ``root`` keeps, which need not be there."""
    return Digests(Places(root).digests_file, rehash, listener)


def is_workspace(root: Path) -> bool:
    """Whether ``root`` is an output folder of nbl-export."""
    return Places(root).state_path.exists()


def check_place(root: Path) -> None:
    """Refuse a file, and a folder that is no output folder and has files of the names that an output folder has."""
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} is a file; --output must be a folder.")
    if is_workspace(root) or not root.is_dir():
        return
    taken = [name for name in _OWN if (root / name).exists()]
    if taken:
        raise InputError(
            f"{root} has a {taken[0]} that nbl-export did not write: choose another --output, or an empty folder."
        )


class Workspace(Places):
    """The output folder of one model.

    All writes are atomic; ``lock`` keeps a second process out while one is running.
    """

    def __init__(self, root: Path, digests: Digests | None = None) -> None:
        super().__init__(root)
        self.digests = digests or kept_digests(root)
        self._state: dict[str, Any] = {}
        self._found: dict[str, Any] | None = None
        self._lock: int | None = None
        self._check_folders()
        if self.state_path.exists():
            self._state = self._read_state()

    def _check_folders(self) -> None:
        # What is written through a link lands in somebody's other folder.
        for folder in self.folders[1:]:
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise InputError(
                    f"{folder} is not a folder of its own (a link or a file): an output folder holds its own files; "
                    "remove it or choose another --output."
                )

    @classmethod
    def create(cls, root: Path, digests: Digests | None = None) -> Workspace:
        """Open ``root``, creating it if needed; refuses a path that is not a folder or cannot be written."""
        try:
            check_place(root)
            (root / "nbl").mkdir(parents=True, exist_ok=True)
            with atomic_path(root / "nbl" / "write-test"):
                pass
            (root / "nbl" / "write-test").unlink(missing_ok=True)
        except OSError as error:
            raise os_error_in_words(error, f"while preparing the output folder {root}") from error
        return cls(root, digests)

    @classmethod
    def open(cls, root: Path, digests: Digests | None = None) -> Workspace:
        """Open an existing output folder; anything else is an :class:`InputError`."""
        if not is_workspace(root):
            raise InputError(
                f"{root} is not an output folder of nbl-export (no nbl/workspace.json): "
                f"start with `nbl-export calibrate MODEL -o {root}`."
            )
        return cls(root, digests)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other nbl-export processes out of this folder within the block."""
        busy = f"Another nbl-export is running in {self.root}: wait for it or choose another --output."
        with locked(self.nbl / ".lock", busy) as handle:
            self._lock = handle
            for folder in self.folders:
                sweep(folder)
            # Another process may have finished stages between opening the folder and taking the lock.
            if self.state_path.exists():
                self._state = self._read_state()
            self.digests.save()  # those of the model, before the long work
            try:
                yield
            finally:
                if self._is_still_there():
                    self.digests.save()
                self._lock = None

    def _is_still_there(self) -> bool:
        """Whether the folder of the held lock is the one of its name."""
        with suppress(OSError):
            return self._lock is not None and samestat(os.fstat(self._lock), (self.nbl / ".lock").lstat())
        return False

    def _check_still_there(self) -> None:
        """Refuse to write into a folder that was moved or deleted meanwhile, or into another one of its name."""
        if self._lock is not None and not self._is_still_there():
            raise InputError(
                f"{self.root} was moved or deleted while it was worked in: run the same command again, on the folder "
                "where it is now."
            )

    def _read_state(self) -> dict[str, Any]:
        remedy = f"delete {self.root} and start again"
        state = read_json(self.state_path, "The record of this output folder", remedy, finite=True)
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise InputError(f"{self.state_path} is not a record of this nbl-export: use another --output.")
        if not isinstance(state.get("stages"), dict):
            raise InputError(f"{self.state_path} is damaged: {remedy}.")
        return state

    def _write_state(self) -> None:
        write_json(self.state_path, {"version": STATE_VERSION, **self._state})

    @property
    def model_info(self) -> dict[str, Any] | None:
        """The recorded model: source, kind, fingerprint; None for a new folder."""
        info = self._state.get("model")
        if info and not isinstance(info, dict):
            raise InputError(
                f"{self.state_path} has a damaged record of the model: delete {self.root} and start again."
            )
        return dict(info) if info else None

    def set_model(self, info: Mapping[str, Any]) -> None:
        """Bind the folder to a model; raises :class:`InputError` if another model is recorded.

        What is recorded is written with the lock held, so that no stage that another process records is lost.
        """
        self._check_same(info)
        self.found_model(info)
        if self.model_info == dict(info):
            return
        with nullcontext() if self._lock is not None else self.lock():
            self._check_same(info)
            self._state["model"] = dict(info)
            self._state.setdefault("stages", {})
            self._write_state()

    def _check_same(self, info: Mapping[str, Any]) -> None:
        known = self.model_info
        if known and known.get("fingerprint") != info["fingerprint"]:
            raise InputError(
                f"{self.root} belongs to another model ({known.get('source')}, fingerprint "
                f"{str(known.get('fingerprint'))[:12]}), not to {info['source']} ({info['fingerprint'][:12]}): "
                "choose another --output or delete that folder."
            )

    def found_model(self, info: Mapping[str, Any]) -> None:
        """Hold the stages to the model as it is now on this machine."""
        self._found = dict(info)

    def record(self, stage: str) -> StageRecord | None:
        """The record of a finished stage, or None; its names are files of this folder."""
        raw = self._state.get("stages", {}).get(stage)
        if raw is None:
            return None
        what = f"The record of stage {stage} in {self.state_path}"
        record = from_json(StageRecord, raw, what, f"delete {self.root} and start again")
        for name in record.files:
            member(self.root, name, f"A file of stage {stage} in {self.state_path}")
        return record

    def asked(self, stage: str, kind: type[T]) -> T:
        """Of what was asked of a stage, the settings that the dataclass ``kind`` has, or its defaults."""
        record = self.record(stage)
        what = f"The record of what was asked of stage {stage} in {self.state_path}"
        return part_from_json(
            kind, record.settings if record else {}, what, f"run `nbl-export {stage}` again"
        )

    def paths(self, record: StageRecord) -> list[Path]:
        """The files of a record."""
        return [member(self.root, name, "A recorded file") for name in record.files]

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage in order, done or not; of `convert` the forms that there are, if there are some."""
        forms = sorted(name for name in self._state.get("stages", {}) if kind_of(name) != name)
        kinds = [[own for own in forms if kind_of(own) == kind] or [kind] for kind in STAGES]
        return tuple(name for names in kinds for name in names)

    def stale(self, stage: str) -> str | None:
        """Why a finished stage is not of what there is now, in words; None if it is."""
        records = {name: r for name in self.stages if (r := self.record(name))}
        found = self._found or self.model_info or {}
        inputs = {name: str(found[name]) for name in (MODEL, SIDECARS) if name in found}
        return stale(records, stage, inputs)

    def finished(self, stage: str) -> StageRecord:
        """The record of a stage that must have been done; raises :class:`InputError` with the command for it."""
        if record := self.record(stage):
            return record
        raise InputError(f"{self.root} has no finished `{stage}` yet: run `{self._command(stage)}` first.")

    def _command(self, stage: str) -> str:
        return _COMMANDS.get(stage, f"nbl-export {stage} {{}}").format(self.root)

    def require(self, stage: str) -> StageRecord:
        """The record of a stage that must be done, of what there is now, and intact.

        Raises :class:`InputError`, which names the command for it, otherwise.
        """
        record, command = self.finished(stage), self._command(stage)
        if why := self.stale(stage):
            raise InputError(f"`{stage}` in {self.root} is out of date ({why}): run `{command}` again.")
        if damaged := self.damaged_file(record):
            raise InputError(
                f"{self.root / damaged} is missing or was changed after `{stage}` wrote it: "
                f"run `{command}` again."
            )
        return record

    def current(self, stage: str) -> StageRecord | None:
        """The record of a stage that is done, of what there is now, and intact; None otherwise."""
        record = self.record(stage)
        return None if record is None or self.stale(stage) or self.damaged_file(record) else record

    def damaged_file(self, record: StageRecord) -> str | None:
        """The first file of a record that is missing or was changed, or None."""
        for name, path in zip(record.files, self.paths(record), strict=True):
            if name in record.dropped and not os.path.lexists(path):
                continue
            if not path.is_file() or self.digests.of(path) != record.files[name]:
                return name
        return None

    def is_done(self, stage: str, key: str) -> bool:
        """Whether ``stage`` was finished with this ``key`` and its files are intact."""
        record = self.record(stage)
        return bool(
            record
            and record.key == key
            and not record.other_inputs(stage, record.settings, record.made_of)
            and self.damaged_file(record) is None
        )

    def why_again(self, stage: str, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> str | None:
        """Why a stage that was finished once is not done with these inputs, in words; None if it never was."""
        if record := self.record(stage):
            why = record.other_inputs(stage, settings, made_of)
            return why or f"{self.damaged_file(record)} is missing or was changed"
        return None

    def redrew(self, stage: str, files: list[Path]) -> None:
        """Record that files of a finished stage were written anew, from what it had found."""
        if record := self.record(stage):
            self._keep(stage, replace(record, files=self._digests_of(files)))

    def finish(
        self,
        stage: str,
        settings: Mapping[str, Any],
        made_of: Mapping[str, str],
        files: list[Path],
        seconds: float,
        notes: list[str],
        device: str = "",
    ) -> None:
        """Record that ``stage`` is done; files that only an earlier run of it wrote are deleted."""
        key, written, read = key_of(stage, settings, made_of), self._digests_of(files), dict(made_of)
        version, took = STAGES[kind_of(stage)], round(seconds, 3)
        self._keep(
            stage, StageRecord(key, dict(settings), written, took, tuple(notes), read, version, device)
        )

    def drop(self, stage: str, files: Sequence[Path]) -> None:
        """Delete ``files`` of a finished stage, which nobody then misses: it stays done."""
        if record := self.record(stage):
            names = (path.relative_to(self.root).as_posix() for path in files)
            self._keep(stage, replace(record, dropped=tuple(names)))
            for path in files:
                path.unlink(missing_ok=True)

    def forget(self, stage: str) -> None:
        """Drop the record of ``stage``; its files stay until it is done again."""
        self._check_still_there()
        if self._state.get("stages", {}).pop(stage, None) is not None:
            self._write_state()

    def _digests_of(self, files: list[Path]) -> dict[str, str]:
        return {p.relative_to(self.root).as_posix(): self.digests.of(p) for p in files}

    def _keep(self, stage: str, record: StageRecord) -> None:
        self._check_still_there()
        before = self.record(stage)
        for name, path in zip(before.files, self.paths(before), strict=True) if before else ():
            if name not in record.files:
                path.unlink(missing_ok=True)
        self._state.setdefault("stages", {})[stage] = asdict(record)
        self._write_state()
        self.digests.save()


class ReadOnly(Workspace):
    """An output folder that is looked at, and need not be there: its record changes in memory alone."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def _write_state(self) -> None:
        pass
