"""A rehearsal has the entries, figures, rules and references of what it rehearses, in sizes that fit together."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeflow.config import expand_runs, load_params, validate
from saeflow.errors import UserError
from saeflow.plan import Plan
from saeflow.rehearsal import MARK, Rehearsal, rehearsal_of
from saeflow.rehearsal.scale import D_SAE, spread

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def placed(rehearsal: Rehearsal, folder: Path) -> None:
    """Something at the path of every stand-in: validation asks whether it is there."""
    for one in rehearsal.stand_ins:
        (folder / one.path).mkdir(parents=True)


@each_file
@pytest.mark.parametrize("every_run", [False, True], ids=["ends-of-sweeps", "every-run"])
def test_a_rehearsal_is_valid_and_asks_for_the_same(
    path: Path, every_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = load_params(path)
    rehearsal = rehearsal_of(full, every_run=every_run)
    small = rehearsal.params
    placed(rehearsal, tmp_path)
    monkeypatch.chdir(tmp_path)
    validate(small)
    assert list(small["saes"]) == list(full["saes"])
    assert small["figures"] == {**full["figures"], "mark": MARK}
    asked, had = Plan(small), Plan(full)
    assert asked.stores == had.stores
    assert asked.probes == had.probes
    assert {run.variant for run in asked.runs.values()} == {v.variant for v in had.runs.values()}
    assert len(asked.pages) == len(had.pages)
    assert len(asked.interpreted) == len(had.interpreted)
    assert [asked.labelled(source) for source in asked.sources] == [
        had.labelled(source) for source in had.sources
    ]
    if every_run:
        assert set(rehearsal.runs) == set(had.runs)
        assert len(asked.seeds) == len(had.seeds)
    assert set(rehearsal.runs) <= set(had.runs)
    assert set(rehearsal.runs.values()) == set(asked.runs)


@pytest.mark.parametrize(("window_rows", "windows"), [(None, 1), (30000, 2), (1000, 3)])
def test_a_rehearsal_has_several_windows_where_the_run_has(
    window_rows: int | None, windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(ROOT / "params.yaml")
    params["stores"]["smollm2"]["window_rows"] = window_rows
    rehearsal = rehearsal_of(params)
    placed(rehearsal, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Plan(validate(rehearsal.params)).windows("smollm2", "train") == windows


@each_file
def test_runs_keep_their_order_in_size_and_their_equal_budgets(path: Path) -> None:
    full = load_params(path)
    rehearsal = rehearsal_of(full, every_run=True)
    had, has = Plan(full).runs, Plan(rehearsal.params).runs
    pairs = [(had[old], has[new]) for old, new in rehearsal.runs.items()]
    for old, new in pairs:
        assert (old.entry, old.source, old.hook_point, old.seed) == (
            new.entry, new.source, new.hook_point, new.seed,
        )  # fmt: skip
        assert set(old.options) == set(new.options)
        assert new.d_sae <= D_SAE
        if isinstance(old.options.get("k"), int):
            assert 1 <= new.options["k"] <= new.d_sae
        assert new.training.steps >= 1
        assert new.training.dead_after_tokens >= 1
    for sizes in (lambda run: run.d_sae, lambda run: run.training.tokens):
        ordered = sorted((sizes(old), sizes(new)) for old, new in pairs)
        assert [small for _, small in ordered] == sorted(small for _, small in ordered)
    assert len({old.d_sae for old, _ in pairs}) == len({new.d_sae for _, new in pairs})


def test_nothing_of_a_hub_is_left(tmp_path: Path) -> None:
    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from (key, *strings(part))
        elif isinstance(value, list):
            for part in value:
                yield from strings(part)
        elif isinstance(value, str):
            yield value

    for path in FILES:
        rehearsal = rehearsal_of(load_params(path))
        made = {one.path for one in rehearsal.stand_ins}
        for source in rehearsal.params["sources"].values():
            assert not {"hub", "wheel"} & set(strings(source.get("model", {})))
            assert source.get("text", {}).get("dataset", None) in {None, *made}


def test_sweeps_keep_their_ends_and_what_is_referred_to() -> None:
    params = load_params(ROOT / "params.yaml")
    params["saes"]["sized-topk"] |= {"d_sae": [384, 500, 768, 1000, 1536], "seed": [0, 1, 2, 3]}
    params["saes"]["topk"]["seed"] = 0
    params["saes"]["random-decoder"]["seed"] = [
        4,
        5,
        6,
    ]  # a second entry of topk with several seeds
    params["saes"]["sparsemax"]["d_sae"] = [384, 768, 1536]
    params["saes"]["topk-guided"]["options"]["k"] = {"mean_l0_of": "sparsemax/d768-seed0"}
    params["evaluation"]["latents"]["runs"] = ["python/blocks.19.resid_post/sized-topk/d500-seed2"]
    rehearsal = rehearsal_of(params)
    kept = {old.split("/", 2)[2] for old in rehearsal.runs}
    sizes = {name.split("-")[1][1:] for name in kept if name.startswith("sized-topk/")}
    assert {name for name in kept if name.startswith("sized-topk/")} == {
        f"sized-topk/d{size}-seed{seed}" for size in (384, 500, 1536) for seed in (0, 2, 3)
    }, sizes
    assert {n.rpartition("-")[2] for n in kept if n.startswith("random-decoder/")} == {"seed4"}
    assert "sparsemax/d768-seed0" in kept
    new = rehearsal.runs["smollm2/blocks.19.resid_post/sparsemax/d768-seed0"].split("/", 2)[2]
    small = rehearsal.params
    assert small["saes"]["topk-guided"]["options"]["k"] == {"mean_l0_of": new}
    assert small["evaluation"]["latents"]["runs"] == [
        rehearsal.runs["python/blocks.19.resid_post/sized-topk/d500-seed2"]
    ]


def test_the_parameters_that_are_rehearsed_stay_as_they_are() -> None:
    params = load_params(ROOT / "params.yaml")
    before = copy.deepcopy(params)
    rehearsal_of(params)
    assert params == before


def test_a_labelled_set_of_one_collection_has_images_for_both_splits() -> None:
    params = load_params(ROOT / "presets/sparsemax-vision.yaml")
    name, labelled = next(iter(params["evaluation"]["labelled_sets"].items()))
    labelled["test"] = labelled["train"]
    rehearsal = rehearsal_of(params)
    small = rehearsal.params["evaluation"]["labelled_sets"][name]
    assert small["train"] == small["test"]
    (made,) = (one for one in rehearsal.stand_ins if one.path == small["train"]["dataset"])
    wanted = sum(small["per_class"].values())
    assert made.recipe["count"] == wanted * len(made.recipe["classes"])


def test_sources_of_one_model_share_its_stand_in() -> None:
    params = load_params(ROOT / "params.yaml")
    sources = rehearsal_of(params).params["sources"]
    assert sources["smollm2"]["model"] == sources["python"]["model"]


def test_a_model_of_unknown_family_is_refused_in_one_line() -> None:
    params = load_params(ROOT / "params.yaml")
    params["sources"]["smollm2"]["model"] = {"hub": "someone/something", "revision": "0" * 40}
    with pytest.raises(UserError, match="the family of someone/something is not known") as caught:
        rehearsal_of(params)
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=30),
    st.integers(1, 600),
    st.integers(1, 9),
)
def test_spread_keeps_order_and_difference(values: list[int], largest: int, least: int) -> None:
    small = spread(values, largest, least)
    found = [small(value) for value in sorted(set(values))]
    assert found == sorted(set(found))
    assert found[0] >= least
    assert found[-1] <= max(largest, least + len(found) - 1)


def test_a_run_is_described_by_the_same_fields() -> None:
    params = load_params(ROOT / "params.yaml")
    old, new = expand_runs(params)[0], expand_runs(rehearsal_of(params).params)[0]
    assert set(dataclasses.asdict(old)) == set(dataclasses.asdict(new))


def test_worlds_become_small_and_keep_their_laws() -> None:
    """A saved one, which cannot be read before it is fetched, becomes a drawn one."""
    full = load_params(ROOT / "presets/synthsaebench.yaml")
    (source,) = rehearsal_of(full).params["sources"].values()
    laws, small = full["sources"]["synthsaebench"]["world"], source["world"]
    changed = {key for key in laws if laws[key] != small[key]}
    assert changed == {"n_features", "hierarchy"}
    assert small["hierarchy"] == laws["hierarchy"] | {"roots": 2, "branching": 3}
    pin = {"hub": "someone/world", "revision": "0" * 40}
    full["sources"]["synthsaebench"]["world"] = pin
    (source,) = rehearsal_of(full).params["sources"].values()
    assert source["world"].keys() == laws.keys()
