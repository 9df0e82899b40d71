"""Where the files of an output folder are: inside it, each at a place of its own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from nbl_export.places import FOLDER_PRECISIONS, FORMS, Places
from nbl_export.settings.graphs import ConvertSettings

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


def test_every_form_that_can_be_asked_for_has_a_place_that_is_checked() -> None:
    places = Places(Path("out"))
    hints = get_type_hints(ConvertSettings)
    assert get_args(hints["to"]) == FORMS and {*FOLDER_PRECISIONS, "q8_0", "q4_k_m"} == set(
        get_args(hints["precision"])
    )
    assert {field.name for field in fields(ConvertSettings)} == {"to", "precision"}
    assert places.gguf("F16").parent in places.folders
    found = [places.converted(form, p) for form in FORMS[1:] for p in FOLDER_PRECISIONS]
    assert len(set(found)) == 12 and {*found, *(path.parent for path in found)} <= set(places.folders)
    kept = {places.conversion(form, p) for form in FORMS for p in get_args(hints["precision"])}
    assert len(kept) == 25 and {path.parent for path in kept} == {places.nbl}
