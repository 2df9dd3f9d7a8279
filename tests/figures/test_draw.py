"""Every figure as files."""

import re
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import pandas as pd
import pytest

from saeflow.errors import UserError
from saeflow.figures import FIGURES, draw, style

from .conftest import SYNTHETIC, TEXT, Maker, in_its_environment

STRICT = {"allow_unequal_budgets": False}
ENTRIES = [("topk", "topk", 0.9, (8, 32)), ("relu", "relu", 1.2, None)]


@pytest.fixture(scope="module")
def small(make_tables: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return make_tables(
        folder, panels=[TEXT, SYNTHETIC], entries=ENTRIES, seeds=2, sizes=(1152, 2304)
    )


WITH_DETAILS = ("training", "schedules")
PICTURES = ("concepts", "simple_to_complex")
OF_RUNS = [name for name in FIGURES if name not in ("complexity", "probe_layers")]
COMPARED = [name for name in OF_RUNS if name not in PICTURES]
VARYING = ("simple_to_complex", "adaptivity", "controls", "k_complexity", "k_dimension", "headline")
OF_SYNTHETIC = ("recovery", "top_concepts", "probing", *VARYING)


@pytest.fixture(scope="module")
def drawn(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("figures")
    for name in FIGURES:
        draw(name, small, STRICT, root / name)
    return root


@pytest.mark.parametrize("name", list(FIGURES))
def test_a_figure_is_four_files_and_a_caption(name: str, drawn: Path) -> None:
    files = sorted(path.name for path in (drawn / name).iterdir())
    details = {file for file in files if "-details-" in file}
    assert bool(details) == (name in WITH_DETAILS)
    assert len(details) % 3 == 0
    assert set(files) - details == {
        "caption.md", f"{name}.csv", f"{name}.pdf", f"{name}.png", f"{name}.svg"
    }  # fmt: skip
    assert (drawn / name / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    height, width = matplotlib.image.imread(drawn / name / f"{name}.png").shape[:2]
    assert width in (round(300 * style.COLUMN_WIDTH), round(300 * style.TEXT_WIDTH))
    assert height > 300
    assert len(pd.read_csv(drawn / name / f"{name}.csv")) > 0
    caption = (drawn / name / "caption.md").read_text()
    assert caption.endswith(".\n")
    assert "tokens" in caption or name not in OF_RUNS


@pytest.mark.heavy
def test_the_same_tables_give_the_same_bytes_in_another_process_with_its_packages_alone(
    small: Path, drawn: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from saeflow.figures import FIGURES, draw\n"
        "for name in FIGURES:\n"
        f"    draw(name, Path(sys.argv[1]), {STRICT!r}, Path(sys.argv[2]) / name)"
    )
    in_its_environment(code, str(small), str(tmp_path), PYTHONHASHSEED="123", TZ="Pacific/Auckland")
    files = sorted(path for path in drawn.rglob("*") if path.is_file())
    assert len([path for path in files if "-details-" not in path.name]) == 5 * len(FIGURES)
    for path in files:
        assert path.read_bytes() == (tmp_path / path.relative_to(drawn)).read_bytes(), path.name


@pytest.mark.parametrize("name", list(FIGURES))
def test_no_file_holds_a_date_or_machine(name: str, drawn: Path, small: Path) -> None:
    svg = (drawn / name / f"{name}.svg").read_text()
    assert "<dc:date>" not in svg
    assert str(small) not in svg
    assert b"CreationDate" not in (drawn / name / f"{name}.pdf").read_bytes()


@pytest.mark.parametrize("name", [name for name in OF_RUNS if name != "ev_formulas"])
def test_a_variant_has_its_colour_in_every_figure(name: str, drawn: Path) -> None:
    svg = (drawn / name / f"{name}.svg").read_text()
    used = {color.lower() for color in re.findall(r"#[0-9a-fA-F]{6}", svg)}
    assert (style.VARIANTS["topk"].color.lower() in used) == (name not in VARYING)
    assert style.VARIANTS["relu"].color.lower() in used
    absent = [look for key, look in style.VARIANTS.items() if key not in ("topk", "relu")]
    assert not used & {look.color.lower() for look in absent}


@pytest.mark.parametrize("name", COMPARED)
def test_unequal_budgets_are_refused_and_nothing_is_left(
    name: str, make_tables: Maker, tmp_path: Path
) -> None:
    tables = make_tables(
        tmp_path / "tables", panels=[SYNTHETIC if name in OF_SYNTHETIC else TEXT], entries=ENTRIES,
        tokens=lambda entry, seed: 100_000 + 50_000 * seed, sizes=(1152, 2304),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"d(1152|2304)-(k8|l10.1)-seed0.*allow_unequal_budgets"):
        draw(name, tables, STRICT, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_unequal_budgets_can_be_drawn_on_request_and_the_caption_says_so(
    make_tables: Maker, tmp_path: Path
) -> None:
    tables = make_tables(
        tmp_path / "tables", panels=[TEXT], entries=ENTRIES,
        tokens=lambda entry, seed: 100_000 + 50_000 * seed,
    )  # fmt: skip
    draw("fvu_l0", tables, {"allow_unequal_budgets": True}, tmp_path)
    caption = (tmp_path / "caption.md").read_text()
    assert "Budgets differ: SAEs were trained on 100,000 and 150,000 tokens." in caption


def test_an_unknown_figure_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown figure 'fvu'.*Known: .*, fvu_l0"):
        draw("fvu", small, STRICT, tmp_path)
