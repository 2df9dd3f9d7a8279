"""Fronts show the tables' numbers."""

import csv
import dataclasses
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from saeflow.errors import UserError
from saeflow.figures import FIGURES, Drawing, load_tables, style

from .conftest import SYNTHETIC, TEXT, Maker

STRICT = {"allow_unequal_budgets": False}


def values(tables: Path, metric: str) -> dict[str, float]:
    """run -> value, read without pandas."""
    with (tables / "metrics.csv").open() as file:
        return {r["run"]: float(r["value"]) for r in csv.DictReader(file) if r["metric"] == metric}


@pytest.fixture(scope="module")
def drawn(tables: Path) -> dict[str, Drawing]:
    loaded = load_tables(tables)
    with style.context():
        return {
            name: FIGURES[name].draw(loaded, STRICT) for name in ("fvu_l0", "ce_l0", "recovery")
        }


@pytest.mark.parametrize(
    ("figure", "metric", "sources"),
    [
        ("fvu_l0", "fvu", {"smollm2", "toy"}),
        ("ce_l0", "ce_degradation", {"smollm2"}),
        ("recovery", "matched_feature_cosine", {"toy"}),
        ("recovery", "support_f1", {"toy"}),
    ],
)
def test_data_equal_the_tables_numbers(
    figure: str, metric: str, sources: set[str], drawn: dict[str, Drawing], tables: Path
) -> None:
    data = drawn[figure].data
    expected = {r: v for r, v in values(tables, metric).items() if r.split("/")[0] in sources}
    assert dict(zip(data["run"], data[metric], strict=True)) == expected
    l0 = values(tables, "l0_mean")
    assert dict(zip(data["run"], data["l0_mean"], strict=True)) == {
        run: l0[run] for run in expected
    }
    by_setting = defaultdict(list)
    for run, value in expected.items():
        by_setting[run.rpartition("-seed")[0] or run].append(value)
    for row in data.to_dict("records"):
        held = by_setting[row["run"].rpartition("-seed")[0] or row["run"]]
        assert row[f"{metric}_seed_mean"] == pytest.approx(statistics.mean(held), rel=1e-12)
        if len(held) > 1:
            assert row[f"{metric}_seed_sd"] == pytest.approx(statistics.stdev(held), rel=1e-9)


def test_lines_go_through_the_means_and_bars_are_one_deviation(
    drawn: dict[str, Drawing], tables: Path
) -> None:
    fvu, l0 = values(tables, "fvu"), values(tables, "l0_mean")
    ax = drawn["fvu_l0"].figure.axes[0]
    topk = next(
        c
        for c in ax.containers
        if isinstance(c, ErrorbarContainer)
        and c.lines[0].get_color() == style.VARIANTS["topk"].color
    )
    xs, ys = topk.lines[0].get_data()
    for x, y, k in zip(xs, ys, (8, 16, 32, 64), strict=True):
        runs = [f"{'/'.join(TEXT)}/topk/d2304-k{k}-seed{seed}" for seed in range(2)]
        assert x == pytest.approx(statistics.mean(l0[run] for run in runs))
        assert y == pytest.approx(statistics.mean(fvu[run] for run in runs))
    bar = topk.lines[2][1].get_segments()[0]
    run = f"{'/'.join(TEXT)}/topk/d2304-k8-seed"
    deviation = statistics.stdev([fvu[run + "0"], fvu[run + "1"]])
    assert bar[1][1] - bar[0][1] == pytest.approx(2 * deviation)


def test_baselines_are_drawn_and_the_true_l0_is_marked(drawn: dict[str, Drawing]) -> None:
    ax = drawn["fvu_l0"].figure.axes[0]
    levels = [line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1]
    assert 1.0 in levels  # the mean
    colors = {line.get_color() for line in ax.lines}
    assert {style.BASELINES["pca"].color, style.BASELINES["random-decoder"].color} <= colors
    for ax in drawn["recovery"].figure.axes:
        assert 20.0 in [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2]


def test_axes_are_named_with_units(drawn: dict[str, Drawing]) -> None:
    ax = drawn["ce_l0"].figure.axes[0]
    assert ax.get_ylabel().replace("\n", " ") == "cross-entropy degradation (nats/token)"
    assert ax.get_xscale() == "log"
    assert "token" in ax.get_xlabel()
    assert "sample" in drawn["recovery"].figure.axes[0].get_xlabel()


def test_captions_say_seeds_rows_and_policy(drawn: dict[str, Drawing]) -> None:
    caption = drawn["ce_l0"].caption
    for part in (
        "2 seeds",
        "11,900 rows",
        "first positions left out",
        "3.214 nats/token",
        "491,520 tokens",
    ):
        assert part in caption
    assert "\n" not in caption


def test_recovery_shows_what_random_directions_reach(drawn: dict[str, Drawing]) -> None:
    drawing = drawn["recovery"]
    lines = [line for line in drawing.figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [float(line.get_ydata()[0]) for line in lines] == [pytest.approx(0.31)]
    assert not [line for line in drawing.figure.axes[1].lines if line.get_linestyle() == ":"]
    assert "random directions, 0.31" in drawing.caption


def test_a_figure_without_rows_says_what_to_change(make_tables: Maker, tmp_path: Path) -> None:
    loaded = load_tables(make_tables(tmp_path / "a", panels=[SYNTHETIC], seeds=1))
    with pytest.raises(
        UserError, match=r"ce_l0 needs SAEs with the metric ce_degradation.*Take ce_l0 out"
    ):
        FIGURES["ce_l0"].draw(loaded, STRICT)
    loaded = load_tables(make_tables(tmp_path / "b", panels=[TEXT], seeds=1))
    with pytest.raises(
        UserError, match="recovery needs SAEs with the metric matched_feature_cosine"
    ):
        FIGURES["recovery"].draw(loaded, STRICT)


def test_one_seed_of_one_setting_can_be_drawn(make_tables: Maker, tmp_path: Path) -> None:
    entries = [("topk", "topk", 1.0, (22,))]
    loaded = load_tables(make_tables(tmp_path, panels=[TEXT], entries=entries, seeds=1))
    with style.context():
        drawing = FIGURES["fvu_l0"].draw(loaded, STRICT)
    assert "Each point is one seed, error bars 95 % bootstrap intervals" in drawing.caption
    none = dataclasses.replace(loaded, intervals=loaded.intervals.assign(low=np.nan, high=np.nan))
    with style.context():
        assert "Each point is one seed. " in FIGURES["fvu_l0"].draw(none, STRICT).caption
    assert drawing.data["fvu_seed_sd"].isna().all()
    bars = drawing.figure.axes[0].collections
    heights = [
        abs(float(bar.get_segments()[0][0][1] - bar.get_segments()[0][1][1])) for bar in bars
    ]
    topk = drawing.data[drawing.data["entry"] == "topk"].iloc[0]
    assert pytest.approx(topk["high"] - topk["low"]) in heights  # 0.9 and 1.1 times the value
    assert drawing.figure.get_size_inches()[0] == style.COLUMN_WIDTH
    ax = drawing.figure.axes[0]
    bottom, top = ax.get_ylim()
    assert bottom <= topk["low"] < topk["high"] <= top
    pca = drawing.data[drawing.data["variant"] == "pca"].sort_values("l0_mean")
    ends = ax.get_xlim()
    assert not pca["l0_mean"].between(*ends).any()  # only their line is on the panel
    crossing = np.interp(np.log(ends), np.log(pca["l0_mean"]), pca["fvu"])
    assert (bottom <= crossing).all()
    assert (crossing <= top).all()


@pytest.mark.parametrize(("k", "is_in_sight"), [(22, True), (2000, False)])
def test_pca_that_does_not_reach_the_saes_is_neither_drawn_nor_named(
    k: int, is_in_sight: bool, make_tables: Maker, tmp_path: Path
) -> None:
    loaded = load_tables(
        make_tables(tmp_path, panels=[TEXT], entries=[("topk", "topk", 1.0, (k,))])
    )
    with style.context():
        drawing = FIGURES["fvu_l0"].draw(loaded, STRICT)
    (legend,) = drawing.figure.legends
    assert ("PCA" in [text.get_text() for text in legend.get_texts()]) is is_in_sight
    assert ("PCA" in drawing.caption) is is_in_sight
    assert ("pca" in set(drawing.data["variant"])) is is_in_sight


def test_error_bars_of_a_figure_mean_one_thing(make_tables: Maker, tmp_path: Path) -> None:
    """One entry has two seeds, the other one: all bars are intervals, none a deviation over seeds."""
    entries = [("topk", "topk", 1.0, (16,)), ("jumprelu", "jumprelu", 0.8, (24,))]
    folder = make_tables(tmp_path, panels=[TEXT], entries=entries, seeds=2)
    for path in folder.glob("*.csv"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "jumprelu/d2304-k24-seed1" not in line))
    with style.context():
        drawing = FIGURES["fvu_l0"].draw(load_tables(folder), STRICT)
    assert "Points are means over 1 to 2 seeds, error bars 95 % bootstrap" in drawing.caption
    assert "standard deviation" not in drawing.caption
    heights = [
        abs(float(bar.get_segments()[0][0][1] - bar.get_segments()[0][1][1]))
        for bar in drawing.figure.axes[0].collections
    ]
    data = drawing.data[drawing.data["entry"].isin(["topk", "jumprelu"])]
    for _, held in data.groupby("entry"):
        assert pytest.approx((held["high"] - held["low"]).mean()) in heights


def test_a_negative_degradation_is_shown_on_a_linear_axis(
    make_tables: Maker, tmp_path: Path
) -> None:
    folder = make_tables(
        tmp_path, panels=[TEXT], entries=[("topk", "topk", 1.0, (16, 32))], seeds=1
    )
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines = [
        ",".join([*line.split(",")[:-1], "-0.002"])
        if "k32-seed0" in line and "ce_degr" in line
        else line
        for line in lines
    ]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    with style.context():
        ax = FIGURES["ce_l0"].draw(load_tables(folder), STRICT).figure.axes[0]
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim()[0] < -0.002


def test_entries_named_for_their_source_are_one_line_of_the_legend(
    make_tables: Maker, tmp_path: Path
) -> None:
    folder = make_tables(tmp_path, entries=[("topk", "topk", 1.0, (8, 32))], seeds=1)
    for path in folder.glob("*.csv"):
        text = path.read_text().replace("features/topk/", "features/toy-topk/")
        path.write_text(text.replace("toy,features,topk,", "toy,features,toy-topk,"))
    loaded = load_tables(folder)
    assert {"topk", "toy-topk"} <= set(loaded.wide["entry"])
    with style.context():
        legend = FIGURES["fvu_l0"].draw(loaded, STRICT).figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["TopK", "PCA", "Mean"]


def test_a_second_entry_of_a_variant_has_its_colour_and_another_line(
    make_tables: Maker, tmp_path: Path
) -> None:
    entries = [("topk", "topk", 1.0, (8, 32)), ("topk-annealed", "topk", 0.9, (8, 32))]
    loaded = load_tables(make_tables(tmp_path, panels=[TEXT], entries=entries, seeds=1))
    with style.context():
        first, second = FIGURES["fvu_l0"].draw(loaded, STRICT).figure.legends[0].get_lines()[:2]
    assert first.get_color() == second.get_color() == style.VARIANTS["topk"].color
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_markerfacecolor() != second.get_markerfacecolor()


def test_points_of_many_entries_of_a_variant_can_be_told_apart(
    make_tables: Maker, tmp_path: Path
) -> None:
    entries = [
        (f"sparsemax{suffix}", "sparsemax", 1.0, None)
        for suffix in ("", "-mlp", "-relu", "-dense", "-scores", "-wide")
    ]
    loaded = load_tables(make_tables(tmp_path, panels=[TEXT], entries=entries, seeds=1))
    with style.context():
        lines = FIGURES["fvu_l0"].draw(loaded, STRICT).figure.legends[0].get_lines()[: len(entries)]
    assert {line.get_color() for line in lines} == {style.VARIANTS["sparsemax"].color}
    assert len({(line.get_marker(), line.get_markerfacecolor()) for line in lines}) == len(entries)
