"""Figures as a reader of a journal sees them: one look for a series, pages, names, nothing cut or hidden."""

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from saeflow.figures import FIGURES, Drawing, draw, load_tables, style
from saeflow.figures.report import write_report
from saeflow.tables.files import read_csv
from saeflow.tables.render import best, summary_latex, summary_markdown
from saeflow.tables.runs import setting_words, settings_words

from .conftest import ENTRIES, SYNTHETIC, TEXT, Maker

STRICT = {"allow_unequal_budgets": False}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("d1536-k32", "k = 32"),
        ("d1536-target_l016", "target L0 = 16"),
        ("d1536-k_max30", "k_max = 30"),
        ("d1536-l11.0", "l1 = 1.0"),
        ("d1536-l10.104", "l1 = 0.104"),
        ("d1536-score_scale4.0-k_max30", "score_scale = 4.0, k_max = 30"),
        ("d1536", ""),
        ("imported-saelens", "imported-saelens"),
        ("d256-k-of-varying-adaptive-k-d256-seed0", "k = L0 of varying-adaptive-k"),
        ("d1536-k-of-soft-topk-d1536-k32-seed0", "k = L0 of soft-topk, k = 32"),
        ("d1536-k-of-adaptive-k-d1536-k-max60-seed0", "k = L0 of adaptive-k, k_max = 60"),
        ("d64-alpha0.1-k-of-relu-d128-l10.5-seed2", "alpha = 0.1, k = L0 of relu, l1 = 0.5"),
    ],
)
def test_settings_are_written_as_people_write_them(setting: str, words: str) -> None:
    assert setting_words(setting) == words


def test_settings_of_one_table_state_their_sizes_where_these_differ() -> None:
    assert settings_words(["d64-k8", "d64"]) == ["k = 8", ""]
    assert settings_words(["d64-k8", "d1024"]) == ["64 latents, k = 8", "1,024 latents"]


def lines_of(drawing: Drawing) -> dict[str, tuple[object, ...]]:
    """Look of each label of a figure's legend."""
    legends = [*drawing.figure.legends, *(ax.get_legend() for ax in drawing.figure.axes)]
    return {
        text.get_text(): (line.get_marker(), line.get_linestyle(), line.get_color(), line.get_markerfacecolor())
        for legend in legends
        if legend is not None
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }  # fmt: skip


def told_apart(folder: Path) -> Path:
    """Give each entry an option of its own, so that it is a series of its own."""
    options = pd.read_csv(folder / "options.csv", dtype=str)
    entries = sorted(options["entry"].unique())
    chosen = options["option"] == "score_scale"
    options.loc[chosen, "chosen"] = [str(entries.index(e)) for e in options.loc[chosen, "entry"]]
    options.to_csv(folder / "options.csv", index=False)
    return folder


def test_a_series_looks_the_same_in_figures_that_show_others_beside_it(
    make_tables: Maker, tmp_path: Path
) -> None:
    """One entry of four has no cross-entropy: the markers of those after it moved up once."""
    entries = [("topk", "topk", 1.0, (8, 16))]
    entries += [(f"topk-{name}", "topk", 1.0, (8, 16)) for name in ("bare", "cold", "deep")]
    folder = told_apart(make_tables(tmp_path, panels=[TEXT], entries=entries))
    table = pd.read_csv(folder / "metrics.csv")
    gone = (table["entry"] == "topk-bare") & (table["metric"] == "ce_degradation")
    assert gone.any()
    table[~gone].to_csv(folder / "metrics.csv", index=False)
    loaded = load_tables(folder)
    with style.context():
        fvu, ce = (lines_of(FIGURES[name].draw(loaded, STRICT)) for name in ("fvu_l0", "ce_l0"))
    assert set(fvu) - set(ce) == {"TopK (bare)"}
    assert ce == {label: fvu[label] for label in ce}
    assert len({look for label, look in fvu.items() if "TopK" in label}) == 4


def test_a_mark_under_another_is_drawn_around_it(make_tables: Maker, tmp_path: Path) -> None:
    entries = [("topk", "topk", 1.0, (8, 16)), ("relu", "relu", 1.2, None)]
    folder = make_tables(tmp_path, panels=[TEXT], entries=entries, seeds=1)
    table = pd.read_csv(folder / "metrics.csv")
    values = table.pivot(index="run", columns="metric", values="value")
    one, other = (
        f"{'/'.join(TEXT)}/{name}-seed0" for name in ("topk/d2304-k16", "relu/d2304-l10.5")
    )
    for metric in ("fvu", "l0_mean"):
        where = (table["run"] == other) & (table["metric"] == metric)
        table.loc[where, "value"] = values.loc[one, metric]
    table.to_csv(folder / "metrics.csv", index=False)
    with style.context():
        (ax,) = FIGURES["fvu_l0"].draw(load_tables(folder), STRICT).figure.axes
    rings = [line for line in ax.lines if line.get_markersize() > 7 and len(line.get_xdata())]
    points = [(x, y) for line in rings for x, y in zip(*line.get_data(), strict=True)]
    assert points == [(values.loc[one, "l0_mean"], values.loc[one, "fvu"])]


def test_no_page_is_taller_than_a_page_and_columns_are_one_or_two(
    make_tables: Maker, tmp_path: Path
) -> None:
    """With twelve entries at two sources, whose rows were 27 inches."""
    names = [f"topk-{letter}" for letter in "abcdefghijkl"]
    entries = [(name, "topk", 1.0, (8,)) for name in names]
    folder = make_tables(tmp_path, panels=[TEXT, SYNTHETIC], entries=entries, seeds=1)
    loaded = load_tables(told_apart(folder))
    with style.context():
        drawings = {
            name: FIGURES[name].draw(loaded, STRICT) for name in ("training", "schedules", "fvu_l0")
        }
    for drawing in drawings.values():
        for page in (drawing.figure, *drawing.details):
            width, height = page.get_size_inches()
            assert height <= style.PAGE_HEIGHT + 1e-9
            assert width in (style.COLUMN_WIDTH, style.TEXT_WIDTH)
    assert len(drawings["training"].details) == 4  # two of each source
    shown = [ax for page in drawings["training"].details for ax in page.axes]
    titles = [ax.get_legend().get_title().get_text() for ax in shown if ax.get_legend()]
    assert sum(title.startswith("TopK\n(") for title in titles) == 2 * len(names)


def test_details_are_files_and_an_appendix_of_the_report(
    make_tables: Maker, tmp_path: Path
) -> None:
    tables = make_tables(
        tmp_path / "tables", panels=[TEXT, SYNTHETIC], entries=ENTRIES[:2], seeds=1
    )
    folders = [tmp_path / name for name in ("training", "table_training_cost", "fvu_l0")]
    for folder in folders:
        draw(folder.name, tables, STRICT, folder)
    pages = sorted((tmp_path / "training").glob("training-details-*.svg"))
    assert len(pages) == 2
    assert all(page.with_suffix(".pdf").is_file() for page in pages)
    write_report(tables, folders, [], tmp_path / "report.html")
    report = (tmp_path / "report.html").read_text()
    assert 'id="appendix"' in report
    for page in pages:
        assert base64.b64encode(page.read_bytes()).decode() in report
    numbers = re.findall(r"<figcaption><b>((?:Figure|Table) \d)\.</b>", report)
    assert numbers == ["Figure 1", "Table 1", "Figure 2"]
    (script,) = re.findall(r"<script>(.*?)</script>", report, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in report


def test_fonts_are_embedded_in_pdf(make_tables: Maker, tmp_path: Path) -> None:
    tables = make_tables(tmp_path / "tables", panels=[TEXT], entries=ENTRIES[:1], seeds=1)
    draw("fvu_l0", tables, STRICT, tmp_path / "fvu_l0")
    content = (tmp_path / "fvu_l0/fvu_l0.pdf").read_bytes()
    assert b"/FontFile2" in content  # TrueType, whole outlines
    assert b"/Type3" not in content


def test_a_cross_entropy_below_the_models_own_is_seen(make_tables: Maker, tmp_path: Path) -> None:
    entries = [("topk", "topk", 1.0, (8,))]
    folder = make_tables(tmp_path, panels=[TEXT], entries=entries, seeds=1, sizes=(256, 512))
    table = pd.read_csv(folder / "metrics.csv")
    where = (
        (table["metric"] == "ce_degradation")
        & (table["d_sae"] == 512)
        & (table["variant"] == "topk")
    )
    table.loc[where, "value"] = -0.3
    table.to_csv(folder / "metrics.csv", index=False)
    loaded = load_tables(folder)
    with style.context():
        for name in ("dictionary_size",):
            axes = FIGURES[name].draw(loaded, STRICT).figure.axes
            (ax,) = [ax for ax in axes if "entropy" in ax.get_ylabel()]
            assert ax.get_ylim()[0] < -0.3


def test_the_best_of_the_saes_is_marked_alike_in_all_three_forms(
    make_tables: Maker, tmp_path: Path
) -> None:
    tables = make_tables(tmp_path / "tables", panels=[TEXT], entries=ENTRIES[:3])
    lines = read_csv(tables / "summary.csv")
    with (tables / "summary.csv").open() as file:
        fvu = pd.read_csv(file)
    saes = fvu[fvu["variant"].isin(["topk", "batch_topk", "relu"])]
    wanted = saes.loc[saes["fvu_mean"].idxmin()]
    marked = [lines[number] for number in best(lines, "fvu")]
    assert [(line["entry"], line["setting"]) for line in marked] == [
        (wanted["entry"], wanted["setting"])
    ]
    write_report(tables, [], [], tmp_path / "report.html")
    texts = {
        r"\*\*([^*]+?)(?: ±[^*]*)?\*\*": summary_markdown(lines),
        r"\\textbf\{([^}]+?)(?: \$\\pm\$[^}]*)?\}": summary_latex(lines),
        r'<td class="number"><b>([^<]+)</b>': (tmp_path / "report.html").read_text(),
    }
    found = [sorted(re.findall(pattern, text)) for pattern, text in texts.items()]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) >= 3


@pytest.mark.parametrize("kept", ["objects", "dimension"])
def test_adaptivity_has_no_panel_for_what_was_not_measured(
    kept: str, make_tables: Maker, tmp_path: Path
) -> None:
    """Photographs have no count of objects: their panel was drawn empty."""
    loaded = load_tables(make_tables(tmp_path, panels=[SYNTHETIC], seeds=1))
    if kept == "objects":
        loaded = replace(loaded, dimension=loaded.dimension[:0])
    else:
        loaded = replace(loaded, contexts=loaded.contexts.assign(objects=-1))
    with style.context():
        figure = FIGURES["adaptivity"].draw(loaded, STRICT).figure
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert labels == (["objects in the scene"] if kept == "objects" else ["neighbours"] * 2)
    assert all(ax.lines for ax in figure.axes)
    assert figure.axes[0].get_title(loc="left").startswith(SYNTHETIC[0])


def test_pictures_of_one_vector_an_image_have_no_maps(make_tables: Maker, tmp_path: Path) -> None:
    """An SAE on the embedding of whole images has no patches: their maps were lines of one dark colour."""
    folder = make_tables(
        tmp_path, panels=[SYNTHETIC], entries=[("relu", "relu", 1.2, None)], seeds=1
    )
    with style.context():
        of_patches = FIGURES["simple_to_complex"].draw(load_tables(folder), STRICT).figure
    for path in (folder / "cards").rglob("cards.safetensors"):
        arrays = load_file(path)
        save_file(arrays | {"shown_l0": np.zeros_like(arrays["shown_l0"])}, path)
    with style.context():
        drawing = FIGURES["simple_to_complex"].draw(load_tables(folder), STRICT)
    assert len(of_patches.axes) == 2 * len(drawing.figure.axes)
    assert "patches" not in drawing.caption


@pytest.mark.parametrize("name", ["firing_rates", "l0_histograms"])
def test_titles_of_ridges_stay_on_the_page_and_apart(
    name: str, make_tables: Maker, tmp_path: Path
) -> None:
    panels = [(f"openwebtext-{i}-wikitext-103", "blocks.8.resid_post") for i in range(4)]
    folder = make_tables(
        tmp_path, panels=panels, entries=[("random-decoder", "topk", 1.0, (8, 16))], seeds=1
    )
    with style.context():
        figure = FIGURES[name].draw(load_tables(folder), STRICT).figure
        figure.draw_without_rendering()
    shown = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert len(shown) == len(panels)
    titles = [ax._left_title.get_window_extent() for ax in shown]
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in titles)
    others = [ax.get_tightbbox() for ax in shown]
    assert not any(
        t.overlaps(o) for i, t in enumerate(titles) for j, o in enumerate(others) if i != j
    )


def test_concepts_of_many_labelled_sets_fit_a_page(make_tables: Maker, tmp_path: Path) -> None:
    """The eleven sets of the Sparsemax paper took 21 inches, each line with its own label of the axis."""
    loaded = load_tables(make_tables(tmp_path, panels=[SYNTHETIC], seeds=1))
    sets = [loaded.classification.assign(set=f"set-{i:02}") for i in range(11)]
    loaded = replace(loaded, classification=pd.concat(sets))
    with style.context():
        figure = FIGURES["top_concepts"].draw(loaded, STRICT).figure
        figure.draw_without_rendering()
    assert figure.get_size_inches()[1] <= style.PAGE_HEIGHT
    assert len(figure.axes) == 22
    assert [ax.get_xlabel() for ax in figure.axes] == [""] * 20 + ["concepts kept"] * 2
    assert all(ax.get_window_extent().height > 0.3 * figure.dpi for ax in figure.axes)


def test_cards_of_many_variants_fit_a_page_with_their_titles(
    make_tables: Maker, tmp_path: Path
) -> None:
    """With two images a card, the first titles were cut off and eight lines took 13 inches."""
    variants = ("relu", "topk", "batch_topk", "matryoshka", "gated", "jumprelu", "sparsemax")
    entries = [(f"{name.replace('_', '-')}", name, 1.0, None) for name in variants]
    folder = make_tables(tmp_path, panels=[SYNTHETIC], entries=entries, seeds=1)
    for path in (folder / "cards").rglob("cards.safetensors"):
        arrays = load_file(path)
        two = {name: arrays[name][:, :2].copy() for name in ("pixels", "masks")}
        save_file(arrays | two, path)
    with style.context():
        figure = FIGURES["concepts"].draw(load_tables(folder), STRICT).figure
        figure.draw_without_rendering()
    assert figure.get_size_inches()[1] <= style.PAGE_HEIGHT
    titles = [text for ax in figure.axes for text in ax.texts]
    assert len(titles) == 2 * len(variants)
    assert all(text.get_window_extent().y1 <= figure.bbox.y1 for text in titles)
    ticks = [ax.get_xticklabels() for ax in figure.axes if ax.patches]
    assert ticks
    for start, end in ticks:
        assert not start.get_window_extent().overlaps(end.get_window_extent())
