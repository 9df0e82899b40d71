"""How every plot looks, and its two forms: SVG that takes its colours from the page, PNG for a file.

A figure is drawn in the light colours. In the SVG each of them becomes a variable of CSS, so that one
drawing serves light and dark pages and paper. The same report gives the same bytes.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from nbl_export.printable import printable
from nbl_export.report.drawing import finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Colour:
    """One role on a light and on a dark page; the light one is what figures are drawn with."""

    light: str
    dark: str


# Blue, orange and grey differ to every kind of colour vision, and in lightness; series differ in shape too.
COLOURS = {
    "paper": Colour("#ffffff", "#171b21"),
    "ink": Colour("#1c2128", "#e8ebef"),
    "muted": Colour("#5b6570", "#9da7b3"),
    "rule": Colour("#e2e6ea", "#2c333b"),
    "base": Colour("#84909d", "#8491a0"),
    "linear": Colour("#0069a8", "#58b4ee"),
    "decode": Colour("#c2500c", "#f39a5b"),
}
PAPER, INK, MUTED, RULE, BASE, LINEAR, DECODE = (c.light for c in COLOURS.values())

# Inches: the text column of a page, and a phone.
_WIDE, _NARROW = 10.0, 4.2
_DPI = 160
_WORDS = (0.5, 0.1)  # width and height of what stands beside a level, as shares of a panel
# What matplotlib says of a letter that its font does not have, which is drawn as a box.
_ODD_LETTERS = r"Glyph |Matplotlib currently does not support"
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same widths on every machine
    "font.size": 8.5,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.6,
    "legend.frameon": False,
    "legend.handletextpad": 0.6,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",  # text stays text: it is read aloud, found and selected
    "svg.hashsalt": "nbl-export",
    "text.color": INK,
    "text.parse_math": False,  # a name with dollar signs is a name
    "xtick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@contextmanager
def style() -> Iterator[None]:
    """Our settings of matplotlib instead of the user's, for the length of the block."""
    # It announces the building of its font cache, once on each machine.
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import matplotlib
        from cycler import cycler

        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.filterwarnings("ignore", _ODD_LETTERS)
            matplotlib.rcdefaults()
            # Even what is not seen has no colour of matplotlib's own, which a page would not know.
            matplotlib.rcParams["axes.prop_cycle"] = cycler(color=[INK])
            matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
            yield
    finally:
        logger.setLevel(level)


def panels(count: int, narrow: bool, height: float = 2.9, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels beside each other, in ``rows`` of that ``height``; ``narrow``: below each other."""
    from matplotlib.figure import Figure

    rows, columns = (count, 1) if narrow else (rows, count // rows)
    figure = Figure(figsize=(_NARROW, 2.5 * rows) if narrow else (_WIDE, height * rows))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.09 if narrow else 0.05, wspace=0, hspace=0)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def drawable(value: Any) -> float:
    """What matplotlib leaves out where there is no number."""
    return float("nan") if (known := finite(value)) is None else known


def saved(figure: Figure, buffer: IO[Any], **how: Any) -> None:
    """Write ``figure`` to ``buffer``; its names may be anybody's, and are shown as text that no reader obeys."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    figure.savefig(buffer, **how)


def legend(figure: Figure, entries: Mapping[str, Any]) -> None:
    """The legend of a whole figure, above its panels, in as many columns as its width holds."""
    for columns in range(len(entries), 0, -1):
        drawn = figure.legend(
            list(entries.values()), [printable(e) for e in entries], loc="outside upper left", ncols=columns
        )
        if columns == 1 or drawn.get_window_extent().width < 0.97 * figure.bbox.width:
            return
        drawn.remove()


def level(panel: Axes, at: float, words: str, first: tuple[bool, bool]) -> None:
    """A dashed line across the ``panel`` with ``words`` beside it, where they meet no curve.

    ``first`` is the place that is tried first: on the right or not, below the line or not. Curves are those drawn
    before this, with error bars.
    """
    panel.axhline(at, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
    panel.margins(y=0.12)
    right, below = _free_corner(panel, at, first)
    panel.annotate(
        words,
        (1 if right else 0, at),
        (-2 if right else 2, -3 if below else 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top" if below else "bottom",
    )


def _free_corner(panel: Axes, at: float, first: tuple[bool, bool]) -> tuple[bool, bool]:
    """Where words beside a line meet no curve of the ``panel``; ``first`` where there is no such place."""
    import numpy as np
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    panel.autoscale_view()
    place = panel.transScale + panel.transLimits
    drawn = [place.transform(c.lines[0].get_xydata()) for c in panel.containers]  # type: ignore[attr-defined]
    curves = [Path(points[np.isfinite(points).all(axis=1)]) for points in drawn if len(points)]
    y = float(place.transform((panel.get_xlim()[0], at))[1])
    width, height = _WORDS
    corners = [
        first,
        (not first[0], not first[1]),
        (False, True),
        (True, False),
        (False, False),
        (True, True),
    ]
    for right, below in corners:
        x0, y0 = (1 - width if right else 0.0), (y - height if below else y)
        corner = Bbox.from_bounds(x0, y0, width, height)
        inside = y0 >= 0 and y0 + height <= 1
        if inside and not any(curve.intersects_bbox(corner, filled=False) for curve in curves):
            return right, below
    return first


def as_png(draw: Callable[[], Figure]) -> bytes:
    """The figure on white, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with style():
        saved(draw(), buffer, format="png", dpi=_DPI, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def as_svg(draw: Callable[[], Figure], prefix: str) -> str:
    """The figure as an ``<svg>`` element to stand in a page that names the colours ``--ink`` and so on.

    ``prefix`` begins every id in it, so that several may stand in one page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style():
        saved(draw(), buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    # What stands before the element is a file's, not a page's.
    text = text[text.index("<svg") :]
    # A style inside an element holds for the whole page; ours has these rules itself.
    text = re.sub(r"<(metadata|style).*?</\1>\s*", "", text, flags=re.S)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' * (m[1] in used), text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for role, colour in COLOURS.items():
        text = text.replace(colour.light, f"var(--{role})")
    # The page's own type, whose size follows the drawing's.
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: (?:bold |700 )?([\d.]+px) [^;\"]*", _font, text)
    # A page scales it to its column.
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (?:width|height|version|xmlns)="[^"]*"', "", opening)
    return f'{opening} aria-hidden="true" focusable="false">{rest.strip()}'


def _font(found: re.Match[str]) -> str:
    return f"font-size: {found[1]}" + "; font-weight: bold" * ("bold" in found[0] or "700" in found[0])
