"""The page: well-formed, whole, on its own, and deaf to what names and notes would have it do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nbl_export.checks import Check
from nbl_export.records import from_json
from nbl_export.report.drawing import Table
from nbl_export.report.page import anchor, numeric_columns, page
from nbl_export.report.plots import report_plots
from nbl_export.report.schema import Report
from nbl_export.report.tables import checks_table, report_tables
from nbl_export.verify.loss.figures import MethodLoss

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Reads a page and refuses one whose elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        elif tag == "tr":
            self.tables.setdefault(self.headings[-1][1], []).append([])
        elif tag in ("td", "th"):
            self.tables[self.headings[-1][1]][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> outside a drawing"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.words.append(data)
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)
        elif {"td", "th"} & set(self.open):
            self.tables[self.headings[-1][1]][-1][-1] += data

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(report: Report) -> Reader:
    return Reader(page(report, report_plots(report)))


def test_every_table_is_there_in_full(full: Report) -> None:
    reader = read(full)
    tables = [checks_table(full), *report_tables(full)]
    assert list(reader.tables) == [t.title for t in tables]
    assert "Loss and speed by K" in reader.tables
    for table in tables:
        rows = [list(table.columns), *(list(row) for row in table.rows)]
        assert reader.tables[table.title] == [[cell.strip() for cell in row] for row in rows]


def test_the_page_is_read_in_order(full: Report) -> None:
    reader = read(replace(full, notes=["a note"]))
    assert [level for level, _ in reader.headings] == [1] + [2] * (len(reader.headings) - 1)
    assert [title for _, title in reader.headings[-2:]] == ["Notes", "How it was made"]
    assert reader.attributes("html") == [{"lang": "en"}]
    assert any(m.get("name") == "viewport" for m in reader.attributes("meta"))
    assert len(reader.attributes("main")) == len(reader.attributes("h1")) == 1
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in reader.attributes("a")]
    assert len(links) == len(reader.headings) - 1
    assert all(link and link.startswith("#") and link[1:] in ids for link in links)
    for _, attributes in reader.tags:
        named = attributes.get("aria-labelledby")
        assert named is None or named in ids


def test_tables_are_accessible(full: Report) -> None:
    reader = read(full)
    scopes = [a.get("scope") for a in reader.attributes("th")]
    rows = sum(len(t.rows) for t in (checks_table(full), *report_tables(full)))
    assert scopes.count("row") == rows and set(scopes) == {"row", "col"}
    regions = [a for a in reader.attributes("div") if a.get("class") == "scroll"]
    # A region that scrolls can be reached by the keyboard and has a name.
    assert regions and all(a["tabindex"] == "0" and a["aria-labelledby"] for a in regions)


def test_plots_say_what_they_show(full: Report) -> None:
    reader, plots = read(full), report_plots(full)
    said = [a["aria-label"] for a in reader.attributes("div") if a.get("role") == "img"]
    assert said == [plots[name].text for name in ("k-curve", "frontier", "speed", "engines", "layers")]
    assert plots["layers"].text.endswith("replaced: 2, 3.")
    assert (
        "chosen: K = 2, perplexity ratio 1.080, KL 0.160, prefill 1.20×, decode 1.10×"
        in plots["k-curve"].text
    )
    assert full.speed is not None
    cell, _, over = full.speed.speedups()[0]
    assert cell.name == "prefill 16" and f"prefill 16 {over.value:.2f}×" in plots["speed"].text
    assert len(reader.attributes("svg")) == 2 * len(plots)  # for a page and for a phone
    assert all(plot.caption in reader.text() for plot in plots.values())


def test_nothing_is_fetched_and_nothing_runs(full: Report) -> None:
    text = page(full, report_plots(full))
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & {
        tag for tag, _ in reader.tags
    }
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    policy = [m["content"] for m in reader.attributes("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_light_dark_print_and_phone(full: Report) -> None:
    text = page(full, report_plots(full))
    for wanted in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", "overflow-x: auto"):
        assert wanted in text
    defined = set(re.findall(r"--(\w+):", text))
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= defined


# The page in a frame of a phone's and of a desk's width, and what the browser made of it.
MEASURED = """<!doctype html><meta charset="utf-8"><body><script>
const found = [];
let left = 2;
for (const width of [390, 1280]) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  frame.srcdoc = PAGE;
  frame.onload = () => {
    const page = frame.contentDocument, inside = (e) => e.closest(".scroll, svg");
    const all = (what) => [...page.querySelectorAll(what)];
    const right = (e) => e.getBoundingClientRect().right;
    found.push({
      width,
      page: page.documentElement.scrollWidth,
      outside: all("body *").filter((e) => !inside(e) && right(e) > width + 1).map((e) => e.outerHTML),
      scrolling: all(".scroll").filter((e) => e.scrollWidth > e.clientWidth).length,
      drawings: all("svg").map((e) => e.getBoundingClientRect().width).filter((w) => w),
      small: all(".headlines dd").filter((e) => parseFloat(getComputedStyle(e).fontSize) < 12).length,
    });
    if (--left === 0) document.body.textContent = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script>"""


def test_on_a_phone_tables_scroll_and_the_page_does_not(full: Report, tmp_path: Path) -> None:
    """Also with names that nothing breaks, and figures that no page was made for."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: `apt-get install chromium`")
    assert isinstance(full.method_loss, MethodLoss)
    long = "m" * 120
    wide = replace(
        full,
        model=replace(full.model, source=f"/models/{long}"),
        method_loss=replace(full.method_loss, perplexity_ratio=1.23456e15),
        checks=(*full.checks, Check(long, "failed", long)),
        notes=(long,),
        divergence=long,
    )
    text = json.dumps(page(wide, report_plots(wide))).replace("</", "<\\/")
    (tmp_path / "measured.html").write_text(MEASURED.replace("PAGE", text), encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,900",
            "--virtual-time-budget=20000",
            "--dump-dom",
            str(tmp_path / "measured.html"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    body = re.search(r"<body>(\[.*\])</body>", done.stdout, re.S)
    assert body, done.stderr[-500:]
    phone, desk = sorted(json.loads(unescape(body[1])), key=lambda one: one["width"])
    for one in (phone, desk):
        assert one["page"] <= one["width"] and one["outside"] == []
        assert len(one["drawings"]) == len(report_plots(wide)) and one["small"] == 0
    assert phone["scrolling"] >= 3  # in themselves
    assert all(330 < width <= 390 for width in phone["drawings"])


def test_every_table_is_in_what_scrolls(full: Report) -> None:
    text = page(full, report_plots(full))
    assert text.count("<table>") == len(re.findall(r'<div class="scroll"[^>]*>\s*<table>', text)) > 5


NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</style></title>&amp;{{ 7 * 7 }}"


def everywhere(value: Any, known: frozenset[str]) -> Any:
    """Every text of a report made hostile, but for the words that decide how it is drawn."""
    if isinstance(value, dict):
        return {k: v if k in known else everywhere(v, known) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v, known) for v in value]
    number = value in ("nan", "inf", "-inf")  # as JSON has them
    return f"{NASTY}{value}" if isinstance(value, str) and not number else value


def test_texts_of_the_report_are_only_text(full: Report) -> None:
    known = frozenset({"criterion", "phase", "status"})
    raw = everywhere(json.loads(json.dumps(full.as_json())), known)
    fields = {k: v for k, v in raw.items() if k not in ("schema", "verdict")}
    checks = [Check(NASTY, "failed", NASTY), Check("b", "skipped", NASTY)]
    fields["model"]["kind"] = "folder"
    fields["graph"]["before"]["ops"][NASTY] = 1
    fields["environment"]["packages"] = {NASTY: NASTY}
    fields["selection"]["others"] = {NASTY: NASTY}
    hostile = from_json(Report, fields, "The report", "make it again")
    hostile = replace(hostile, checks=checks, notes=[NASTY], divergence=NASTY)
    text = page(hostile, report_plots(hostile))
    reader = Reader(text)
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    assert not [a for _, a in reader.tags if any(name.startswith("on") for name in a)]
    assert "<script" not in text and "{{ 7 * 7 }}" in text
    # It is there to be read: title, head, check, note, operator, package, engine.
    assert reader.text().count("<script>alert(1)</script>") >= 10
    assert len(reader.attributes("title")) == 1 and len(reader.attributes("style")) == 1
    assert reader.tables["Checks"][1] == [NASTY, "failed", NASTY]


@pytest.mark.parametrize("verdict", ["PASS", "FAIL"])
def test_the_verdict_is_a_word_and_a_colour(full: Report, verdict: str) -> None:
    checks = [Check("good", "passed", "fine"), Check("left out", "skipped", "--no-speed")]
    if verdict == "FAIL":
        checks.append(Check("bad", "failed", "why"))
    reader = read(replace(full, checks=checks, divergence="layer 7" if verdict == "FAIL" else None))
    strong = reader.attributes("strong")
    assert strong[0] == {"class": f"status {'passed' if verdict == 'PASS' else 'failed'}"}
    assert reader.text().startswith(f"{verdict}: stories")
    decided = "bad" if verdict == "FAIL" else "good"
    assert f"{verdict} ({decided}); perplexity × " in reader.text()
    assert "no bound asked; skipped: left out." in reader.text()
    assert ("Where parity is lost: layer 7" in reader.text()) == (verdict == "FAIL")
    marks = [a["class"] for a in reader.attributes("span") if (a.get("class") or "").startswith("status")]
    assert marks == [f"status {c.status}" for c in checks]


def test_sections_that_were_not_run_are_left_out(report: Report) -> None:
    reader = read(replace(report, method_loss=None, speed=None, parity=None, notes=[]))
    titles = [title for _, title in reader.headings[1:]]
    assert titles == ["Checks", "Graph", "Layers by cca", "How it was made"]
    assert len(reader.attributes("svg")) == 2
    text = reader.text()
    for word in ("Perplexity", "Prefill", "Parity", "None", "Notes"):
        assert word not in text, word


def test_without_plots_the_page_is_whole(report: Report) -> None:
    reader = Reader(page(report, {}))
    assert not reader.attributes("svg") and not reader.attributes("figure")
    assert list(reader.tables) == [t.title for t in (checks_table(report), *report_tables(report))]


def test_chosen_rows_are_marked(full: Report) -> None:
    text = page(full, report_plots(full))
    marked = re.findall(r'<tr class="marked"><th scope="row">([^<]*)', text)
    assert marked[0] == "2, chosen" and sorted(marked[1:]) == ["2", "3", "both"]


def test_the_same_report_gives_the_same_page(full: Report) -> None:
    assert page(full, report_plots(full)) == page(full, report_plots(full))


def test_figures_are_set_flush_right() -> None:
    rows = (
        (
            "a",
            "1,280",
            "-40.0%",
            "text",
            "± 0.1",
            "1.06×",
            "",
            "1 more",
            "12.0 MiB",
            "=",
            "0, 5-7",
            "nan",
            "1.0 ± 0.1",
        ),
        ("3", "768", "=", "1", "", "1.02–1.07 not resolved", "", "2", "0.1 MiB", "+3%", "2", "1.2e-5", ""),
    )
    table = Table("t", tuple("abcdefghijklm"), rows)
    assert numeric_columns(table) == {1, 2, 4, 5, 6, 8, 9, 11, 12}
    assert numeric_columns(Table("t", ("a", "b"), ())) == set()


def test_anchors_are_plain() -> None:
    assert anchor("Speed on A <GPU>, batch 1") == "speed-on-a-gpu-batch-1"
