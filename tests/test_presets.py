"""The presets are the papers: they hold the figures, the sizes and the units that the documents say."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from saeflow.config import expand_runs, load_params, read_yaml, validate
from saeflow.errors import UserError
from saeflow.figures import FIGURES, TABLES
from saeflow.figures.needs import TRAINED
from saeflow.preflight import checked_plan

ROOT = Path(__file__).parents[1]
PRESETS = {path.stem: load_params(path) for path in sorted((ROOT / "presets").glob("*.yaml"))}
PARAMS = load_params(ROOT / "params.yaml")


def assigned() -> dict[str, set[str]]:
    """By preset: the targets that docs/figures.md assigns to it."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "docs/figures.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4 or not cells[0].startswith("`"):
            continue
        for preset in re.findall(r"`([^`]+)`", cells[3]):
            found.setdefault(preset, set()).update(re.findall(r"`([^`]+)`", cells[0]))
    return found


def test_every_paper_preset_has_figures_assigned() -> None:
    assert set(assigned()) == set(PRESETS) - {"tiny"}


@pytest.mark.parametrize("name", sorted(assigned()))
def test_a_preset_draws_what_the_document_assigns_to_it(name: str) -> None:
    names = PRESETS[name]["figures"]["names"]
    assert assigned()[name] <= set(names)
    assert len(names) == len(set(names))
    assert "stability" in names


@pytest.mark.parametrize("name", sorted(assigned()))
def test_a_preset_has_seeds_intervals_and_equal_budgets(name: str) -> None:
    params = PRESETS[name]
    assert params["evaluation"]["bootstrap"]["resamples"] >= 1000
    assert not params["figures"]["allow_unequal_budgets"]
    budgets = {(run.training.tokens, run.training.batch_size) for run in expand_runs(params)}
    assert len(budgets) == 1
    settings: dict[str, set[int]] = {}
    for run in expand_runs(params):
        settings.setdefault(run.name.rsplit("seed", 1)[0], set()).add(run.seed)
    assert {0, 1, 2} in settings.values()


def swept(name: str, variant: str, option: str) -> set[Any]:
    return {r.options[option] for r in expand_runs(PRESETS[name]) if r.variant == variant}


def test_presets_sweep_what_the_papers_sweep() -> None:
    for name in ("softsae-text", "softsae-text-released"):
        assert swept(name, "soft_topk", "k") == {20, 40, 80, 160, 320, 640}
        models = {s["model"]["hub"] for s in PRESETS[name]["sources"].values()}
        assert models == {"EleutherAI/pythia-70m", "EleutherAI/pythia-160m", "google/gemma-2-2b"}
        for run in expand_runs(PRESETS[name]):
            width = {"pythia-70m": 512, "pythia-160m": 768, "gemma-2-2b": 2304}[run.source]
            if run.variant in ("soft_topk", "topk", "batch_topk", "matryoshka"):
                assert run.options["k_schedule"]["from"] == width
    for name in ("softsae-vision", "softsae-vision-released"):
        assert swept(name, "soft_topk", "k") == {60, 100, 140, 180, 220, 260}
    assert swept("softsae-vision-released", "soft_topk", "k_max") == {1024}
    sizes: dict[str, set[int]] = {}
    for run in expand_runs(PRESETS["sparsemax-text"]):
        sizes.setdefault(run.variant, set()).add(run.d_sae)
    for variant in ("relu", "jumprelu", "gated", "topk", "batch_topk", "sparsemax"):
        assert sizes[variant] == {3072, 6144, 12288, 24576}
    for name in ("adaptivek-text", "adaptivek-text-released"):
        variants = {run.variant for run in expand_runs(PRESETS[name])}
        assert variants == {
            "adaptive_k", "relu", "topk", "batch_topk", "gated", "jumprelu", "p_anneal", "matryoshka"
        }  # fmt: skip
        assert {320, 480, 640} <= swept(name, "adaptive_k", "k_max")


def test_images_are_classified_on_eleven_sets_with_80_templates() -> None:
    for name in ("sparsemax-vision", "sparsemax-vision-released"):
        sets = PRESETS[name]["evaluation"]["labelled_sets"]
        assert len(sets) == 11
        for labelled in sets.values():
            assert len(set(labelled["templates"])) == 80
            assert all(template.count("{}") == 1 for template in labelled["templates"])


def test_input_scales_are_those_of_the_papers() -> None:
    scales = {
        name: {(run.variant, run.training.input_scale) for run in expand_runs(params)}
        for name, params in PRESETS.items()
    }
    for name in ("softsae-text", "softsae-text-released"):
        assert {scale for _, scale in scales[name]} == {"unit"}
    for name in ("softsae-vision", "softsae-vision-released"):
        assert {scale for _, scale in scales[name]} == {"centred"}
    for name in ("adaptivek-text-released", "sparsemax-vision-released"):
        assert {scale for variant, scale in scales[name] if variant != "topk"} == {"raw"}
    assert ("adaptive_k", "raw") in scales["adaptivek-text"]
    assert ("jumprelu", "dimension") in scales["sparsemax-text"]


def test_what_is_pinned_is_a_commit() -> None:
    for path in (ROOT / "presets").glob("*.yaml"):
        for revision in re.findall(r"revision: (\S+?)[,}\s]", path.read_text()):
            assert re.fullmatch("[0-9a-f]{40}", revision), (path, revision)


NEEDY = sorted(
    name for name, figure in {**FIGURES, **TABLES}.items() if figure.needs not in (None, TRAINED)
)


@pytest.mark.parametrize("figure", NEEDY)
def test_a_figure_without_what_it_needs_is_refused_before_any_job(figure: str) -> None:
    """One synthetic TopK SAE allows hardly any figure."""
    params: Any = copy.deepcopy(read_yaml(ROOT / "tests/workflow/synthetic.yaml"))
    (name, entry), *_ = params["saes"].items()
    params["saes"] = {
        name: entry | {"seed": 0, "d_sae": 128, "variant": "topk", "options": {"k": 4}}
    }
    params["complexity"] = {}
    params["evaluation"] |= {"bootstrap": {"resamples": 100, "seed": 0}, "dimension": None}
    for part in ("latents", "interpretability"):
        params["evaluation"].pop(part, None)
    params["figures"]["names"] = ["fvu_l0", "training"]
    checked_plan(validate(params))
    if figure == "recovery":
        return
    params["figures"]["names"] = [figure]
    with pytest.raises(
        UserError, match=rf"figures\.names: {figure} needs .*; these parameters have"
    ):
        checked_plan(validate(params))
