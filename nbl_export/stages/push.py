"""Package → a repository of the Hugging Face Hub, once that is asked for."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbl_export.errors import InputError, first_line
from nbl_export.files import TEMPORARY
from nbl_export.places import PACKAGE, is_package
from nbl_export.progress import Listener
from nbl_export.report.card import CARD
from nbl_export.stages.package import package, whole_package
from nbl_export.workspace import Workspace, is_workspace

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")
_CLIENTS = ("httpx", "httpx2", "requests")


@dataclass(frozen=True)
class Pushed:
    """What is in the repository ``to``, or would be: the bytes of each of ``files``; without a ``url`` nothing is."""

    to: str
    files: dict[str, int]
    url: str = ""


def check_repository(to: str) -> None:
    """Raise :class:`InputError` for what cannot be the name of a repository."""
    if not _REPOSITORY.match(to):
        raise InputError(f"--to {to!r:.120} is no repository of the Hugging Face Hub: say OWNER/NAME.")


def push(root: Path, to: str, upload: bool, public: bool, listener: Listener) -> Pushed:
    """The package in ``root``, or of the output folder that is there, in the repository ``to`` of the Hub.

    Nothing is uploaded, and the Hub is not asked, unless ``upload`` is True. A repository that is made for it is
    private unless it is to be ``public``. Raises :class:`InputError` for a package that is not whole, and if the Hub
    refuses.
    """
    check_repository(to)
    with _package_of(root, listener) as folder:
        known = whole_package(folder)
        names = [*known.files, PACKAGE, *([CARD] if (folder / CARD).is_file() else [])]
        files = {name: (folder / name).stat().st_size for name in sorted(names)}
        if not upload:
            return Pushed(to, files)
        message = f"{known.model.source} with {len(known.layers)} linear blocks, by nbl-export"
        return Pushed(to, files, _uploaded(folder, list(files), to, public, message, listener))


@contextmanager
def _package_of(root: Path, listener: Listener) -> Iterator[Path]:
    if not is_workspace(root):
        if not is_package(root):
            raise InputError(f"{root} is neither an output folder nor a package of one: name one of them.")
        yield root
        return
    with tempfile.TemporaryDirectory(prefix=".push.", suffix=TEMPORARY, dir=root.resolve().parent) as beside:
        to = Path(beside) / "package"
        ws = Workspace.open(root)
        with ws.lock():
            package(ws, to, listener)
        yield to


def _uploaded(folder: Path, names: list[str], to: str, public: bool, message: str, listener: Listener) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    hub = HfApi(library_name="nbl-export")
    try:
        with listener.task(f"Uploading to {to}", len(names), "files") as task:
            hub.create_repo(to, private=not public, exist_ok=True)
            found = hub.upload_folder(
                repo_id=to, folder_path=folder, allow_patterns=names, commit_message=message
            )
            task.advance(len(names))
    except LocalTokenNotFoundError:
        raise InputError(f"{to} is not written to without a token: log in with `hf auth login`.") from None
    except Exception as error:
        if not _is_refusal(error):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"The Hugging Face Hub does not let you write to {to} ({status}): log in with `hf auth login` as "
                "somebody who may."
            ) from None
        raise InputError(
            f"The upload to {to} failed ({first_line(error)}); what was uploaded is not in the repository until all of "
            "it is: run the same command again."
        ) from None
    return str(found.commit_url)


def _is_refusal(error: Exception) -> bool:
    """Whether the Hub or the network says no, and not this code.

    Which library the Hub's client calls changes with its version.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    library = type(error).__module__.partition(".")[0]
    return isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, OSError)) or library in _CLIENTS
