"""Where the files of an output folder are: inside it, each at a place of its own."""

from __future__ import annotations

from pathlib import Path

from nbl_export.places import Places

FOLDERS = {"nbl", "moments", "partial_moments", "report", "evaluations"}


def test_every_name_is_in_the_folder_and_is_nobody_elses() -> None:
    places = Places(Path("out"))
    names = [n for n, v in vars(Places).items() if isinstance(v, property) and n != "folders"]
    found = {name: getattr(places, name) for name in names}
    assert all(path.is_relative_to("out") and ".." not in path.parts for path in found.values())
    assert len(set(found.values())) == len(found) > 15
    # A folder that is written to is checked for being a link; a file's folder must be among them.
    assert {found[name] for name in FOLDERS} <= set(places.folders)
    assert {path.parent for name, path in found.items() if name not in FOLDERS} <= set(places.folders)
