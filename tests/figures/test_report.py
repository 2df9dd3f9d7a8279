"""The report: complete, self-contained, and safe from what names contain."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from saeflow.errors import UserError
from saeflow.figures import draw
from saeflow.figures.report import write_report
from saeflow.figures.report.records import duration, plain
from saeflow.figures.report.results import _parts
from saeflow.tables.numbers import significant

from ..browser import document, title
from .conftest import ENTRIES, SYNTHETIC, TEXT, Maker, record, write_records

STRICT = {"allow_unequal_budgets": False}
NAMES = ("fvu_l0", "ce_l0", "recovery")
EVIL = '<script>document.title = "run"</script>'


class Page(HTMLParser):
    """Text, tags, and everything a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def results(make_tables: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with tables, figures and records."""
    root = tmp_path_factory.mktemp("results")
    entries = [ENTRIES[0], ENTRIES[2], ENTRIES[3]]
    make_tables(root / "tables", panels=[TEXT, SYNTHETIC], entries=entries)
    for name in NAMES:
        draw(name, root / "tables", STRICT, root / "figures" / name)
    write_records(root, entries, 2)
    return root


def write(results: Path) -> str:
    records = sorted(results.rglob("provenance.json"))
    folders = [results / "figures" / name for name in NAMES]
    write_report(results / "tables", folders, records, results / "report.html")
    return (results / "report.html").read_text()


@pytest.fixture(scope="module")
def page(results: Path) -> Page:
    return Page(write(results))


def test_every_element_is_closed_and_every_link_inside_the_page_has_its_place(page: Page) -> None:
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    inside = [a["href"] for tag, a in page.tags if tag == "a" and str(a["href"]).startswith("#")]
    assert len(inside) > 8
    assert {str(href)[1:] for href in inside} <= set(ids)


def test_nothing_is_loaded_from_outside(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "srcset", "data", "poster", "background", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert "url(" not in (attributes.get("style") or "")
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page.text
    assert "url(" not in page.text
    policy = [a for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy[0]["content"]).startswith("default-src 'none'")
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{}]  # its own, which the policy names by digest
    assert re.search("script-src 'sha256-[^' ]+'$", str(policy[0]["content"]))


def test_every_figure_is_there_with_its_caption_and_data(page: Page, results: Path) -> None:
    images = [str(a["src"]) for tag, a in page.tags if tag == "img"]
    links = [str(a["href"]) for tag, a in page.tags if tag == "a"]
    assert len(images) == len(NAMES)
    for name, image in zip(NAMES, images, strict=True):
        svg = results / "figures" / name / f"{name}.svg"
        assert base64.b64decode(image.partition("base64,")[2]) == svg.read_bytes()
        assert (results / "figures" / name / "caption.md").read_text().strip() in page.text
        for kind in ("svg", "pdf", "png", "csv"):
            link = f"figures/{name}/{name}.{kind}"
            assert link in links
            assert (results / link).is_file()


def test_tables_hold_the_summary_with_baselines(page: Page, results: Path) -> None:
    import csv

    with (results / "tables" / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        assert significant(float(line["fvu_mean"])) in page.text
    for name in (
        "PCA",
        "Mean",
        "Identity",
        "random-decoder",
        "smollm2, blocks.19.resid_post",
        "toy",
    ):
        assert name in page.text
    assert "11900" in page.text.replace(",", "")


def test_every_result_is_listed_with_digest_commit_and_time(page: Page, results: Path) -> None:
    for path in results.rglob("provenance.json"):
        values = json.loads(path.read_text())
        assert path.parent.relative_to(results).as_posix() in page.text
        assert values["digest"][:12] in page.text
    assert "3841ee7aaa + changes" in page.text
    assert "42 s" in page.text
    assert "2.13.0+cpu" in page.text
    assert "context length" in page.text


def test_what_was_read_and_left_out_is_counted(page: Page) -> None:
    assert (
        "part3.jsonl: 13 documents, 20,003 tokens; 2 other files: 29 documents, 40,009 tokens"
        in page.text
    )
    assert "7: null; 1: empty" in page.text
    assert "text is split as by GPT-2" in page.text
    assert "790 contexts of 210 documents, 100,330 tokens" in page.text
    assert (
        "95 contexts of 31 documents, 12,065 tokens; 12 contexts left out for a run of 13 tokens that stands in train too"
    ) in page.text
    assert "pets (labelled, for scenes)" in page.text
    assert "train 74 images, test 111 images" in page.text
    assert "5: an image of train" in page.text
    assert "3 images of test" in page.text


def test_schedules_are_drawn(page: Page) -> None:
    lines = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert (
        len(lines) == 2 * (4 + 1 + 4) + 2 * 3
    )  # topk, relu, random decoder on two sources: see below
    first = [tuple(map(float, p.split(","))) for p in str(lines[4]["points"]).split()]
    assert first[0][1] < first[-1][1]  # k falls


def evil_report(results: Path, copy: Path) -> str:
    """A report of tables, captions and records that hold EVIL in every place."""
    shutil.copytree(results, copy)
    for name in ("summary.csv", "metrics.csv", "training.csv"):
        path = copy / "tables" / name
        quoted = '"' + EVIL.replace('"', '""') + '"'
        path.write_text(path.read_text().replace(",random-decoder,", f",{quoted},"))
    (copy / "figures" / "fvu_l0" / "caption.md").write_text(f"A figure. {EVIL}\n")
    values = record("train", {"run": None, "source": {EVIL: EVIL}}, 1.0, device=EVIL, digest=EVIL)
    values |= {"job": "prepare", "versions": {EVIL: EVIL}, "started": EVIL}
    values["code"]["commit"] = EVIL
    (copy / "sources" / "smollm2" / "inputs" / "provenance.json").write_text(json.dumps(values))
    return write(copy)


def test_names_and_values_are_escaped(results: Path, tmp_path: Path) -> None:
    text = evil_report(results, tmp_path / "results")
    assert text.count("<script") == 1  # the page's own, which names no title
    assert "document.title" not in text.partition("<script>")[2].partition("</script>")[0]
    page = Page(text)
    assert page.text.count("document.title") >= 6


def test_a_browser_shows_what_names_hold_and_runs_none_of_it(results: Path, tmp_path: Path) -> None:
    text = evil_report(results, tmp_path / "results")
    unguarded = re.sub(r"<meta http-equiv[^>]*>", "", text)  # escaping alone has to do
    assert unguarded != text
    page = tmp_path / "page.html"
    for body, expected in (
        (text, "saeflow report"),
        (unguarded, "saeflow report"),
        (unguarded.replace("</main>", f"</main>{EVIL}"), "run"),  # this browser would run it
    ):
        page.write_text(body)
        shown = document(page, tmp_path / "profile")
        assert title(shown) == expected
        assert Page(shown).text.count("document.title") >= 6


WIDEST = """<script>
document.title = [...document.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth + 1)
  .map((one) => one.innerText.slice(0, 80)).join(" | ") || "all whole";
</script>"""


def test_no_table_is_cut_in_a_window_of_a_laptop(results: Path, tmp_path: Path) -> None:
    """More metrics than a window has room for are divided into tables."""
    unguarded = re.sub(r"<meta http-equiv[^>]*>", "", write(results))
    page = tmp_path / "page.html"
    page.write_text(unguarded.replace("</body>", f"{WIDEST}</body>"))
    assert title(document(page, tmp_path / "profile", "--window-size=1400,1000")) == "all whole"
    narrow = title(document(page, tmp_path / "profile", "--window-size=500,1000"))
    assert narrow != "all whole"  # the script sees what is cut


@pytest.mark.parametrize("columns", [0, 1, 13, 14, 27, 40])
def test_metrics_are_divided_whole_and_evenly(columns: int) -> None:
    parts = _parts(columns)
    sizes = [len(range(columns)[part]) for part in parts]
    assert [n for part in parts for n in range(columns)[part]] == list(range(columns))
    assert max(sizes) <= 13
    assert max(sizes) - min(sizes) < len(sizes)


def test_what_is_missing_is_named(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    (copy / "figures" / "ce_l0" / "ce_l0.pdf").unlink()
    with pytest.raises(UserError, match=r"ce_l0\.pdf: no such file\. Draw the figure again"):
        write(copy)
    (copy / "figures" / "fvu_l0" / "provenance.json").write_text('{"job": "draw"}')
    with pytest.raises(UserError, match=r"fvu_l0/provenance\.json: expected a provenance record"):
        write(copy)
    assert not list(copy.glob(".report*"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"kind": "linear", "from": 576, "until": 0.01}, "linear from 576, until 0.01"),
        ([8, 32], "8, 32"), (True, "yes"), (None, "none"), (100_000, "100,000"), (1e-3, "0.001"),
    ],
)  # fmt: skip
def test_parameters_are_written_for_readers(value: object, text: str) -> None:
    assert plain(value) == text
