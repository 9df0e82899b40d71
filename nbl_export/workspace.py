"""The output folder: its file names, its lock, and the record of finished stages.

A stage is done when ``nbl/workspace.json`` has a record of it with the requested key and its files are
unchanged, byte for byte. The key is a hash of the stage's settings and of the keys of the stages it depends
on, so changing ``--k`` repeats selection and the stages after it, never calibration.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.files import TEMPORARY, atomic_path, read_json, sha256_of_file, write_json

STATE_VERSION = 1
ENGINE_SUFFIX = ".engine"
STAGES = ("calibrate", "select", "export", "rewrite", "build", "verify", "eval", "bench")


@dataclass(frozen=True)
class StageRecord:
    """The record of a finished stage.

    ``key`` identifies its settings and everything it depends on; ``files`` maps paths relative to the
    output folder to their SHA-256; ``seconds`` is its wall time; ``notes`` are the lines shown to the user
    (fallbacks, shortages), recorded for the report.
    """

    key: str
    settings: dict[str, Any]
    files: dict[str, str]
    seconds: float
    notes: tuple[str, ...] = ()


def is_workspace(root: Path) -> bool:
    """Whether ``root`` is an output folder of nbl-export."""
    return (root / "nbl" / "workspace.json").exists()


class Workspace:
    """The output folder of one model.

    Paths are properties, so that no other module spells a file name. All writes are atomic; ``lock`` keeps
    a second process out while one is running.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._state: dict[str, Any] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}
        if self.state_path.exists():
            self._state = self._read_state()

    # names -----------------------------------------------------------------------------------
    @property
    def nbl(self) -> Path:
        return self.root / "nbl"

    @property
    def state_path(self) -> Path:
        return self.nbl / "workspace.json"

    @property
    def text(self) -> Path:
        return self.nbl / "text.safetensors"

    @property
    def images(self) -> Path:
        return self.nbl / "images.safetensors"

    @property
    def moments(self) -> Path:
        return self.nbl / "moments.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.nbl / "moments.partial.safetensors"

    @property
    def repair_checkpoint(self) -> Path:
        return self.nbl / "repair.partial.safetensors"

    @property
    def probe(self) -> Path:
        return self.nbl / "probe.safetensors"

    @property
    def candidates(self) -> Path:
        return self.nbl / "candidates.json"

    @property
    def measured(self) -> Path:
        return self.nbl / "measured.json"

    @property
    def plan(self) -> Path:
        return self.nbl / "plan.json"

    @property
    def export_summary(self) -> Path:
        return self.nbl / "export.json"

    @property
    def rewrite_summary(self) -> Path:
        return self.nbl / "rewrite.json"

    @property
    def baseline(self) -> Path:
        return self.root / "baseline" / "model.onnx"

    @property
    def model(self) -> Path:
        return self.root / "model.onnx"

    @property
    def engine(self) -> Path:
        return self.root / "engine" / f"model{ENGINE_SUFFIX}"

    @property
    def base_engine(self) -> Path:
        return self.root / "engine" / f"baseline{ENGINE_SUFFIX}"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def bench_cells(self) -> Path:
        """The cells that an interrupted bench has measured."""
        return self.nbl / "bench.partial.json"

    @property
    def evaluations(self) -> Path:
        """The answers of each graph on each task, by key."""
        return self.nbl / "eval"

    # opening ---------------------------------------------------------------------------------
    @classmethod
    def create(cls, root: Path) -> Workspace:
        """Open ``root``, creating it if needed; refuses a path that is not a folder or cannot be written."""
        try:
            if root.exists() and not root.is_dir():
                raise InputError(f"{root} is a file; --output must be a folder.")
            (root / "nbl").mkdir(parents=True, exist_ok=True)
            with atomic_path(root / "nbl" / "write-test"):
                pass
            (root / "nbl" / "write-test").unlink(missing_ok=True)
        except OSError as error:
            raise os_error_in_words(error, f"while preparing the output folder {root}") from error
        return cls(root)

    @classmethod
    def open(cls, root: Path) -> Workspace:
        """Open an existing output folder; anything else is an :class:`InputError`."""
        if not root.is_dir():
            raise InputError(
                f"{root} is not a folder: name the output folder of an earlier nbl-export run, "
                f"or start with `nbl-export calibrate MODEL -o {root}`."
            )
        if not is_workspace(root):
            raise InputError(
                f"{root} is not an output folder of nbl-export (no nbl/workspace.json): "
                f"start with `nbl-export calibrate MODEL -o {root}`."
            )
        return cls(root)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other nbl-export processes out of this folder within the block."""
        import fcntl

        path = self.nbl / ".lock"
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"Another nbl-export is running in {self.root}: wait for it or choose another --output."
                ) from None
            self._remove_leftovers()
            # Another process may have finished stages between opening the folder and taking the lock.
            if self.state_path.exists():
                self._state = self._read_state()
            yield

    def _remove_leftovers(self) -> None:
        # A killed process cannot clean up. Under the lock no other process uses these files.
        for folder in (
            self.root,
            self.nbl,
            self.baseline.parent,
            self.engine.parent,
            self.report,
            self.report / "plots",
            self.evaluations,
        ):
            for leftover in folder.glob(f".*{TEMPORARY}"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)

    # state -----------------------------------------------------------------------------------
    def _read_state(self) -> dict[str, Any]:
        remedy = f"delete {self.root} and start again"
        state = read_json(self.state_path, "The record of this output folder", remedy)
        if not isinstance(state, dict) or not isinstance(state.get("stages"), dict):
            raise InputError(f"{self.state_path} is not a record of nbl-export: {remedy}.")
        if state.get("version") != STATE_VERSION:
            raise InputError(
                f"{self.state_path} has version {state.get('version')!r}, this nbl-export reads "
                f"{STATE_VERSION}: use another --output."
            )
        return state

    def _write_state(self) -> None:
        write_json(self.state_path, {"version": STATE_VERSION, **self._state})

    @property
    def model_info(self) -> dict[str, Any] | None:
        """The recorded model: source, kind, fingerprint; None for a new folder."""
        info = self._state.get("model")
        return dict(info) if info else None

    def set_model(self, info: Mapping[str, Any]) -> None:
        """Bind the folder to a model; raises :class:`InputError` if another model is recorded."""
        known = self.model_info
        if known and known.get("fingerprint") != info["fingerprint"]:
            raise InputError(
                f"{self.root} belongs to another model ({known.get('source')}, fingerprint "
                f"{str(known.get('fingerprint'))[:12]}), not to {info['source']} ({info['fingerprint'][:12]}): "
                "choose another --output or delete that folder."
            )
        if known == dict(info):
            return  # nothing to write, and another process may hold the lock
        self._state["model"] = dict(info)
        self._state.setdefault("stages", {})
        self._write_state()

    def record(self, stage: str) -> StageRecord | None:
        """The record of a finished stage, or None."""
        raw = self._state.get("stages", {}).get(stage)
        if raw is None:
            return None
        try:
            record = StageRecord(**{**raw, "notes": tuple(raw.get("notes", ()))})
            if not isinstance(record.files, dict) or not isinstance(record.settings, dict):
                raise TypeError
        except (TypeError, AttributeError):
            raise InputError(
                f"{self.state_path} has a damaged record of stage {stage}: delete {self.root} and start again."
            ) from None
        return record

    def require(self, stage: str, command: str) -> StageRecord:
        """The record of a stage that must be done and intact; raises an error naming the ``command`` otherwise."""
        record = self.record(stage)
        if record is None:
            raise InputError(f"{self.root} has no finished `{stage}` yet: run `{command}` first.")
        if damaged := self.damaged_file(record):
            raise InputError(
                f"{self.root / damaged} is missing or was changed after `{stage}` wrote it: "
                f"run `{command}` again."
            )
        return record

    def damaged_file(self, record: StageRecord) -> str | None:
        """The first file of a record that is missing or was changed, or None."""
        for name, digest in record.files.items():
            path = self.root / name
            if not path.is_file() or self._digest(path) != digest:
                return name
        return None

    def _digest(self, path: Path) -> str:
        # Every stage checks the same large files; an unchanged file is hashed once per run.
        status = path.stat()
        identity = (path, status.st_size, status.st_mtime_ns)
        if identity not in self._digests:
            self._digests[identity] = sha256_of_file(path)
        return self._digests[identity]

    def is_done(self, stage: str, key: str) -> bool:
        """Whether ``stage`` was finished with this ``key`` and its files are intact."""
        record = self.record(stage)
        return record is not None and record.key == key and self.damaged_file(record) is None

    def finish(
        self,
        stage: str,
        key: str,
        settings: Mapping[str, Any],
        files: list[Path],
        seconds: float,
        notes: list[str],
    ) -> None:
        """Record that ``stage`` is done; files that only an earlier run of it wrote are deleted."""
        before = self.record(stage)
        written = {str(p.relative_to(self.root)): self._digest(p) for p in files}
        for stale in (before.files.keys() - written.keys()) if before else ():
            (self.root / stale).unlink(missing_ok=True)
        self._state.setdefault("stages", {})[stage] = {
            "key": key,
            "settings": dict(settings),
            "files": written,
            "seconds": round(seconds, 3),
            "notes": notes,
        }
        self._write_state()
