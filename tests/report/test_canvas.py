"""The two forms of a plot: the same bytes every time, colours left to the page and readable there."""

from __future__ import annotations

import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from nbl_export.printable import printable
from nbl_export.report.canvas import COLOURS, as_png, as_svg, legend, level, panels, style
from nbl_export.report.plots import Plot, report_plots
from nbl_export.report.schema import Report


@pytest.fixture
def plots(full: Report) -> list[Plot]:
    return list(report_plots(full).values())


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_readable(scheme: str) -> None:
    """WCAG 2.1: 4.5 for text, 3 for what is drawn."""
    shown = {role: getattr(colour, scheme) for role, colour in COLOURS.items()}
    assert min(contrast(shown[role], shown["paper"]) for role in ("ink", "muted", "linear")) >= 4.5
    assert min(contrast(shown[role], shown["paper"]) for role in ("base", "decode")) >= 3


# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB.
BLINDNESS = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}  # fmt: skip


def lab(rgb: Iterator[float] | list[float]) -> tuple[float, ...]:
    """CIE L*a*b* of linear sRGB, white D65."""
    r, g, b = (min(1.0, max(0.0, v)) for v in rgb)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", BLINDNESS)
def test_series_differ_to_every_eye(kind: str, scheme: str) -> None:
    seen = {}
    for role in ("base", "linear", "decode"):
        colour = getattr(COLOURS[role], scheme)
        rgb = [((int(colour[i : i + 2], 16) / 255 + 0.055) / 1.055) ** 2.4 for i in (1, 3, 5)]
        seen[role] = lab([sum(m * c for m, c in zip(row, rgb, strict=True)) for row in BLINDNESS[kind]])
    for a, b in combinations(seen, 2):
        distance = sum((p - q) ** 2 for p, q in zip(seen[a], seen[b], strict=True)) ** 0.5
        assert distance > 15, (a, b, distance)  # a difference of 2 is just noticeable


def test_an_svg_leaves_its_colours_to_the_page(plots: list[Plot]) -> None:
    assert [p.name for p in plots] == ["k-curve", "frontier", "layers", "speed", "engines"]
    for plot in plots:
        for narrow in (False, True):
            svg = plot.svg(narrow)
            root = ElementTree.fromstring(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))
            assert "width" not in root.attrib and "viewBox" in root.attrib
            # Hidden from readers: the page says in words what it shows.
            assert root.attrib["aria-hidden"] == "true"
            roles = set(re.findall(r"var\(--(\w+)\)", svg))
            assert {"ink", "muted", "linear"} <= roles <= set(COLOURS)
            assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour of its own"
            assert not {"metadata", "style", "script"} & {e.tag.rpartition("}")[2] for e in root.iter()}
            assert "font-family" not in svg and "Date" not in svg


def test_text_stays_text(plots: list[Plot]) -> None:
    words = re.findall(r"<text[^>]*>([^<]+)</text>", plots[0].svg(False))
    assert {"Perplexity ratio", "K = 2", "budget: at most 1.2", "prefill", "decode"} <= set(words)


def test_several_svgs_share_no_id(plots: list[Plot]) -> None:
    found: list[str] = []
    for plot in plots:
        for narrow in (False, True):
            svg = plot.svg(narrow)
            own = re.findall(r' id="([^"]+)"', svg)
            used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
            assert used == set(own), "every id is used, and what is used is there"
            found += own
    assert len(found) == len(set(found))


def named(text: str) -> Callable[[], Figure]:
    def draw() -> Figure:
        figure = Figure()
        figure.subplots().set_title(text)
        return figure

    return draw


def test_names_in_a_plot_are_text() -> None:
    svg = as_svg(named("<script>alert('$x$ & $y$')</script>"), "p")
    assert "<script" not in svg and "&lt;script&gt;" in svg
    assert "$x$ &amp; $y$" in svg  # and no formula


@pytest.mark.parametrize(
    "name", ["\x1b[2J", "a\x00\udc80\u202eb", "漢字", "\N{GRINNING FACE}", "\u0628\u0627"], ids=ascii
)
def test_odd_letters_in_a_name_warn_nobody_and_are_shown_as_text(
    name: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    def draw() -> Figure:
        figure, (panel,) = panels(1, narrow=False)
        (line,) = panel.plot([1, 2])
        panel.set_title(f"{name}\nand more")
        legend(figure, {name: line})
        return figure

    svg = as_svg(draw, "p")
    assert as_png(draw).startswith(b"\x89PNG")
    assert printable(name) in svg and "and more" in svg
    assert ElementTree.fromstring(svg) is not None
    assert not recwarn.list and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("points", "at", "place"),
    [
        ([1.0, 1.1, 1.2, 3.0], 1.5, ("left", "bottom")),  # above the line, before the curve gets there
        ([1.0, 2.0, 3.0, 4.0], 1.4, ("right", "top")),  # which it does at once
        ([4.0, 3.0, 2.0, 1.0], 2.5, ("left", "top")),
        ([2.0, 2.0, 2.0, 2.0], 2.0, ("left", "bottom")),  # nowhere: as was asked for
        ([math.nan, math.nan], 1.0, ("left", "bottom")),
        ([], 1.0, ("left", "bottom")),
    ],
)
def test_words_beside_a_level_meet_no_curve(points: list[float], at: float, place: tuple[str, str]) -> None:
    with style():
        _, (panel,) = panels(1, narrow=True)
        panel.errorbar(range(len(points)), points, yerr=0.01)
        level(panel, at, "budget", (False, False))
        (words,) = panel.texts
        assert (words.get_ha(), words.get_va()) == place


def test_a_png_tells_no_time_and_no_program(plots: list[Plot]) -> None:
    data = plots[1].png()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    kinds, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kinds.append(data[at + 4 : at + 8].decode())
        at += size + 12
    assert not {"tEXt", "iTXt", "zTXt", "tIME", "eXIf"} & set(kinds)
    assert struct.unpack(">2I", data[16:24]) == (1600, 464)


def test_the_user_s_settings_change_nothing_and_are_kept(plots: list[Plot]) -> None:
    before = (plots[0].png(), plots[0].svg(False))
    with matplotlib.rc_context(
        {"font.size": 20, "axes.grid": False, "svg.fonttype": "path", "lines.color": "red"}
    ):
        assert (plots[0].png(), plots[0].svg(False)) == before
        assert matplotlib.rcParams["font.size"] == 20
    with style():
        assert matplotlib.rcParams["font.size"] == 8.5


DRAW = """
import sys
from hashlib import sha256
from nbl_export.report.canvas import as_png, as_svg
from tests.report.test_canvas import named
print(sha256(as_png(named("a"))).hexdigest(), sha256(as_svg(named("a"), "p").encode()).hexdigest())
"""


def test_another_process_draws_the_same_bytes() -> None:
    seeds = ("1", "2")
    runs = [
        subprocess.run(
            [sys.executable, "-c", DRAW],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in seeds
    ]
    assert runs[0] == runs[1] and len(runs[0].split()) == 2
