"""Keep the output folder: its file names, its lock, and the record of finished stages.

A stage is done when ``nbl/workspace.json`` has a record of it with the requested key and its files are
unchanged, byte for byte. The key is a hash of all inputs of the stage (:mod:`nbl_export.records`), so changing
``--k`` repeats selection and the stages after it, never calibration.

It may come from somebody else: every name that a record gives passes :func:`nbl_export.files.member` when the record is
read, folders in it are no links, and nothing in it makes code run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import Digests, locked, member, read_json, sweep, write_json
from nbl_export.progress import Listener
from nbl_export.records import STAGES, StageRecord, from_json, input_in_words, key_of, kind_of

STATE_VERSION = 1
# The command that makes each stage, where it is not `nbl-export STAGE OUT`.
_COMMANDS = {"calibrate": "nbl-export calibrate MODEL -o {}", "select": "nbl-export select {} --k K"}
# Names that somebody else's files may have, too.
_OWN = ("model.onnx", "config.json", "tokenizer.json", "baseline", "engine", "report")

ENGINE_SUFFIX = ".engine"
# Forms of other engines, the first a file; the others are folders, one for each precision.
FORMS = ("gguf", "mlx", "hf", "openvino", "decilm")
FOLDER_PRECISIONS = ("fp32", "fp16", "bf16")
# The graph of the unmodified model, and the rewritten one.
BASE, LINEARIZED = "base", "linearized"
PACKAGE = "package.json"
_BUSY = "Another nbl-export is running in {}: wait for it or choose another --output."


class Places:
    """Where the files of the output folder ``root`` are: no other module spells their names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nbl = nbl = root / "nbl"
        self.lock_file = nbl / ".lock"
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


def check_output(root: Path) -> None:
    """Raise :class:`InputError` if ``root`` is no output folder of earlier commands."""
    if not is_workspace(root):
        raise InputError(
            f"{root} is not an output folder of nbl-export (no nbl/workspace.json): "
            f"start with `nbl-export calibrate MODEL -o {root}`."
        )


def check_free(root: Path) -> None:
    """Raise :class:`InputError` if another process works in ``root``, which need not be there: before slow steps."""
    if (lock := Places(root).lock_file).is_file():
        with locked(lock, _BUSY.format(root)):
            pass


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


@dataclass
class _State:
    """The record of an output folder. ``model`` is what is known of it: source, kind, fingerprint and digests."""

    version: int = STATE_VERSION
    model: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, StageRecord] = field(default_factory=dict)


class Workspace(Places):
    """The output folder of one model.

    All writes are atomic; ``lock`` keeps a second process out while one is running.
    """

    def __init__(self, root: Path, digests: Digests | None = None) -> None:
        super().__init__(root)
        self.digests = digests or kept_digests(root)
        self._state = _State()
        self._found: dict[str, Any] | None = None
        # What is written through a link lands in somebody's other folder.
        for folder in self.folders[1:]:
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise InputError(
                    f"{folder} is not a folder of its own (a link or a file): an output folder holds its own files; "
                    "remove it or choose another --output."
                )
        self._read_state()

    @classmethod
    def create(cls, root: Path, digests: Digests | None = None) -> Workspace:
        """Open ``root``, creating it if needed; refuses a path that is not a folder or cannot be written."""
        try:
            check_place(root)
            (root / "nbl").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root / "nbl").close()
        except OSError as error:
            raise os_error_in_words(error, f"while preparing the output folder {root}") from error
        return cls(root, digests)

    @classmethod
    def open(cls, root: Path, digests: Digests | None = None) -> Workspace:
        """Open an existing output folder; anything else is an :class:`InputError`."""
        check_output(root)
        return cls(root, digests)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other nbl-export processes out of this folder within the block."""
        with locked(self.lock_file, _BUSY.format(self.root)):
            for folder in self.folders:
                sweep(folder)
            self._read_state()  # another process may have finished stages since the folder was opened
            self.digests.save()  # those of the model, before the long work
            try:
                yield
            finally:
                self.digests.save()

    def _read_state(self) -> None:
        if self.state_path.exists():
            what, remedy = "The record of this output folder", f"delete {self.root} and start again"
            raw = read_json(self.state_path, what, remedy)
            if not isinstance(raw, dict) or raw.get("version") != STATE_VERSION:
                raise InputError(
                    f"{self.state_path} is not a record of this nbl-export: use another --output."
                )
            self._state = from_json(_State, raw, f"{what}, {self.state_path},", remedy)
            for record in self._state.stages.values():
                self.paths(record)

    def _write_state(self) -> None:
        write_json(self.state_path, asdict(self._state))

    @property
    def model_info(self) -> dict[str, Any] | None:
        """The recorded model: source, kind, fingerprint; None for a new folder."""
        return dict(self._state.model) or None

    def set_model(self, info: Mapping[str, Any]) -> None:
        """Bind the folder, whose lock is held, to a model; raises :class:`InputError` if another one is recorded."""
        known = self._state.model
        if known and known.get("fingerprint") != info["fingerprint"]:
            raise InputError(
                f"{self.root} belongs to another model ({known.get('source')}, fingerprint "
                f"{str(known.get('fingerprint'))[:12]}), not to {info['source']} ({info['fingerprint'][:12]}): "
                "choose another --output or delete that folder."
            )
        self.found_model(info)
        if known != dict(info):
            self._state.model = dict(info)
            self._write_state()

    def found_model(self, info: Mapping[str, Any]) -> None:
        """Hold the stages to the model as it is now on this machine."""
        self._found = dict(info)

    def record(self, stage: str) -> StageRecord | None:
        """The record of a finished stage, or None; its names are files of this folder."""
        return self._state.stages.get(stage)

    def paths(self, record: StageRecord) -> list[Path]:
        """The files of a record."""
        return [member(self.root, name, f"A file in {self.state_path}") for name in record.files]

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage in order, done or not; of `convert` the forms that there are, if there are some."""
        forms = sorted(name for name in self._state.stages if kind_of(name) != name)
        kinds = [[own for own in forms if kind_of(own) == kind] or [kind] for kind in STAGES]
        return tuple(name for names in kinds for name in names)

    def stale(self, stage: str) -> str | None:
        """Why a finished stage is not of what there is now, in words; None if it is."""
        record = self._state.stages[stage]
        inputs = self._found or self._state.model
        now = {name: str(inputs.get(name, digest)) for name, digest in record.made_of.items()}
        above = {name: self.record(name) for name in record.made_of if name in STAGES}
        for name, made in above.items():
            if made is None:
                return input_in_words(name)
            now[name] = made.result
        own = record.other_inputs(stage, record.settings, now)
        of_above = (f"of `{name}`, {why}" for name in above if (why := self.stale(name)))
        return own or next(of_above, None)

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

    def check_measured(self, *stages: str) -> None:
        """Raise :class:`InputError` for a file of ``stages``, as far as they are done, that is no longer as it was."""
        for stage in stages:
            record = self.record(stage)
            if record is not None and (damaged := self.damaged_file(record)):
                raise InputError(
                    f"{self.root / damaged} is missing or was changed after it was measured: run `nbl-export {stage} "
                    f"{self.root}` and then `nbl-export verify {self.root}` again."
                )

    def undone(self, stage: str, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> str | None:
        """None if ``stage`` was finished with these inputs and its files are intact; why not otherwise, in words.

        They are empty for one that was never finished.
        """
        if (record := self.record(stage)) is None:
            return ""
        damaged = self.damaged_file(record)
        why = f"{damaged} is missing or was changed" if damaged else None
        return record.other_inputs(stage, settings, made_of) or why

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
        self._keep(
            stage,
            StageRecord(
                key_of(stage, settings, made_of),
                dict(settings),
                self._digests_of(files),
                round(seconds, 3),
                tuple(notes),
                dict(made_of),
                STAGES[kind_of(stage)],
                device,
            ),
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
        if self._state.stages.pop(stage, None) is not None:
            self._write_state()

    def _digests_of(self, files: list[Path]) -> dict[str, str]:
        return {p.relative_to(self.root).as_posix(): self.digests.of(p) for p in files}

    def _keep(self, stage: str, record: StageRecord) -> None:
        before = self.record(stage)
        for name in before.files if before else ():
            if name not in record.files:
                (self.root / name).unlink(missing_ok=True)
        self._state.stages[stage] = record
        self._write_state()
        self.digests.save()


class ReadOnly(Workspace):
    """An output folder that is looked at, and need not be there: its record changes in memory alone."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def _write_state(self) -> None:
        pass
