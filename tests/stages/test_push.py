"""What is pushed is a package that is whole, and only if it is asked for: against a stand-in of the Hub's API."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from tests.command_line import ENVIRONMENT, Done
from tests.hub import LARGE, Hub, standing_in

NAME = "somebody/stories-nbl"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standing_in() as found:
        yield found


@pytest.fixture(scope="module")
def packaged(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("packages") / "stories"
    api.package(stories_out, to)
    return to


def push(hub: Hub, *arguments: object, **environment: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "nbl_export", "push", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **hub.environment, **environment},
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_without_the_flag_nothing_is_uploaded_and_nobody_is_asked(hub: Hub, packaged: Path) -> None:
    done = push(hub, packaged, "--to", NAME)
    assert done.code == 0 and "Nothing was uploaded: say --upload" in done.out
    assert hub.asked == [] and "model.onnx.data" in done.out
    done = push(hub, packaged, "--to", NAME, "--json")
    answer = json.loads(done.out)
    assert answer["files"] == {name: len(data) for name, data in contents(packaged).items()}
    assert answer["url"] == "" and hub.asked == []


def test_a_package_is_uploaded_whole(hub: Hub, packaged: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(packaged, tmp_path / "package"))
    (root / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")  # a card may be edited
    (root / "letter.txt").write_text("mine")  # and what else lies there is not pushed
    done = push(hub, root, "--to", NAME, "--upload")
    assert done.code == 0, done.err
    assert f"Uploaded: {hub.address}/{NAME}/commit/1" in done.out
    expected = {name: data for name, data in contents(root).items() if name != "letter.txt"}
    assert hub.files == {NAME: expected} and hub.private == {NAME: True}
    assert hub.messages == ["stories260K with 2 linear blocks, by nbl-export"]
    large = {name for name, data in expected.items() if len(data) > LARGE}
    assert "model.onnx.data" in large and len(hub.large) == len(large)
    # Once more: the repository is there.
    assert push(hub, root, "--to", NAME, "--upload").code == 0


def test_the_package_of_an_output_folder_is_made_and_gone(hub: Hub, stories_copy: Path) -> None:
    done = push(hub, stories_copy, "--to", NAME, "--upload", "--public")
    assert done.code == 0, done.err
    assert hub.private == {NAME: False}
    assert {"model.onnx", "model.onnx.data", "package.json", "README.md"} <= hub.files[NAME].keys()
    assert not any(name.startswith(("baseline", "nbl/moments")) for name in hub.files[NAME])
    assert [path.name for path in stories_copy.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("fault", ["nobody", "forbidden", "broken", "away"])
def test_what_the_hub_refuses_is_one_sentence(hub: Hub, packaged: Path, tmp_path: Path, fault: str) -> None:
    environment = {"HF_HOME": str(tmp_path)}
    words = "does not let you write to somebody/stories-nbl"
    if fault == "nobody":
        environment["HF_TOKEN"] = ""
        words = "log in with `hf auth login`"
    elif fault == "away":
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
        words = "The upload to somebody/stories-nbl failed"
    elif fault == "broken":
        hub.broken = True
        words = "The upload to somebody/stories-nbl failed"
    else:
        hub.forbidden = True
    done = push(hub, packaged, "--to", NAME, "--upload", **environment)
    assert done.code == 2 and words in done.err and "Traceback" not in done.err
    assert hub.files == {}


def test_what_is_not_whole_or_no_package_is_refused(packaged: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(packaged, tmp_path / "package"))
    (root / "model.onnx").write_bytes(b"another")
    with pytest.raises(InputError, match=r"model\.onnx is missing or was changed after it was packaged"):
        api.push(root, NAME)
    with pytest.raises(InputError, match="neither an output folder nor a package"):
        api.push(tmp_path, NAME)
    for to in ("stories", "a/b/c", "../b", "a b/c", ""):
        with pytest.raises(InputError, match="is no repository of the Hugging Face Hub: say OWNER/NAME"):
            api.push(packaged, to)


def test_no_package_names_a_path_of_this_machine(packaged: Path) -> None:
    """It is made to be given away."""
    for name, data in contents(packaged).items():
        for place in (str(packaged.parents[1]), f"{Path.home()}/", "/pytest-of-"):
            assert place.encode() not in data, (name, place)
