"""Real stores, a real model in the loop and real SAEs, from folders to tables."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from saeflow.config.variants import with_defaults
from saeflow.errors import UserError
from saeflow.evaluation import evaluate_baselines, evaluate_sae, setups
from saeflow.evaluation.evaluate import measure, row_policy
from saeflow.evaluation.in_model.text import write_clean
from saeflow.evaluation.recovery import Recovery
from saeflow.saes import build, load, read_config
from saeflow.sources.hook_points import splice
from saeflow.stores import open_store
from saeflow.tables.collect import collect

from .conftest import EVALUATION, HOOK_POINT, TEXT, make_stores, reads_in, setup_in, train_sae


def wide(folder: Path) -> pd.DataFrame:
    """One row per run, one column per metric."""
    table = pd.read_csv(folder / "metrics.csv")
    return table.pivot(index="run", columns="metric", values="value")


def test_baselines_of_text_go_through_the_model(results: Path, tmp_path: Path) -> None:
    setup = setup_in(results, "tiny", HOOK_POINT, EVALUATION, "cpu")
    evaluate_baselines([3, 6], [setup], tmp_path)
    table = wide(tmp_path)
    identity, mean, pca3, pca6 = (
        table.loc[f"tiny/{HOOK_POINT}/{name}"]
        for name in ("identity/k12", "mean/k0", "pca/k3", "pca/k6")
    )
    assert identity.fvu == 0
    assert identity.ce_degradation == pytest.approx(0, abs=1e-6)
    assert mean.ce_spliced == pytest.approx(mean.ce_mean, abs=1e-6)
    assert 0 < pca6.fvu < pca3.fvu < mean.fvu
    assert 0 < pca6.kl < pca3.kl < mean.kl
    assert (table.rows == 12 * 15).all()
    assert (table.first_position_excluded == 1).all()
    assert (table.ce_first_position_kept == 1).all()
    assert (table.max_norm_multiple == 10).all()


def test_baselines_of_synthetic_data_have_no_recovery(results: Path, tmp_path: Path) -> None:
    setup = setup_in(results, "synthetic", "features", EVALUATION, "cpu")
    evaluate_baselines([2, 400], [setup], tmp_path)
    table = wide(tmp_path)
    assert list(table.index) == [
        "synthetic/features/identity/k12", "synthetic/features/mean/k0", "synthetic/features/pca/k2",
    ]  # fmt: skip
    assert not {"matched_feature_cosine", "support_f1", "ce_clean"} & set(table.columns)
    assert (table.first_position_excluded == 0).all()  # contexts mean nothing there


class Oracle(torch.nn.Module):
    """The true dictionary as an SAE, with the true coefficients found by lookup."""

    is_signed, b_dec, trains_on = False, None, "all"

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.W_dec = torch.nn.Parameter(features.flip(0))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.W_dec

    def directions(self) -> torch.Tensor:
        return self.W_dec

    def allowed_k(self, x: torch.Tensor) -> None:
        return None


def test_the_true_code_is_recovered_whole(results: Path) -> None:
    """Latents put at the true features give support F1, MMCS and explained variance 1."""
    setup = setup_in(results, "synthetic", "features", EVALUATION, "cpu")
    features = load_file(results / "sources/synthetic/inputs/dictionary.safetensors")["features"]
    store, place = setup.held_out, {}
    indices, values = store.column("true_indices"), store.column("true_values")
    for row, x in enumerate(store.read(0, store.rows)):
        place[x.numpy().tobytes()] = row
    oracle = Oracle(features)

    def encode(x: torch.Tensor) -> torch.Tensor:
        latents = torch.zeros(len(x), 12)
        for i, row in enumerate(place[one.numpy().tobytes()] for one in x):
            on = indices[row] >= 0
            latents[i, 11 - indices[row][on]] = torch.tensor(values[row][on])
        return latents

    oracle.encode = encode
    got = measure(setup, oracle, is_trained=True)[0].metrics
    for name in (
        "matched_feature_cosine",
        "mcc",
        "support_precision",
        "support_recall",
        "support_f1",
    ):
        assert got[name] == pytest.approx(1, abs=1e-6), name
    assert got["spearman_l0_true"] == pytest.approx(1, abs=1e-12)
    assert got["explained_variance"] == pytest.approx(1, abs=1e-9)
    assert got["l0_mean"] == got["true_l0_mean"] == (indices >= 0).sum(1).mean()


def test_an_sae_of_another_store_is_refused(results: Path) -> None:
    setup = setup_in(results, "synthetic", "features", EVALUATION, "cpu")
    config = {"name": "run", "source": "tiny", "hook_point": HOOK_POINT, "d_in": 12}
    with pytest.raises(UserError, match=rf"activations of tiny/{HOOK_POINT}.*found synthetic/feat"):
        setup.check_fits(config)
    config |= {"source": "synthetic", "hook_point": "features", "d_in": 13}
    with pytest.raises(UserError, match=r"width 13, .* found 12"):
        setup.check_fits(config)
    config |= {"d_in": 12, "scale": 2 * setup.train.scale}
    with pytest.raises(UserError, match=r"features.zarr: expected activations of scale"):
        setup.check_fits(config)
    config |= {"scale": setup.train.scale, "model": "0123456789abcdef"}
    with pytest.raises(UserError, match=r"the model 0123456789ab, which SAE run .* found none"):
        setup.check_fits(config)
    setup.check_fits(config | {"model": None})


@pytest.mark.parametrize("variant", ["topk", "batch_topk", "relu"])
def test_trained_saes_go_from_folder_to_tables(results: Path, tmp_path: Path, variant: str) -> None:
    folders = []
    for source, hook_point in (("synthetic", "features"), ("tiny", HOOK_POINT)):
        sae = train_sae(results, source, hook_point, variant)
        out = tmp_path / source
        out.mkdir()
        setup = setup_in(results, source, hook_point, EVALUATION, "cpu")
        evaluate_sae(load(sae), read_config(sae), [setup], out)
        folders.append((out, sae))
    tables = tmp_path / "tables"
    tables.mkdir()
    collect([out for out, _ in folders], [sae for _, sae in folders], [], tables)
    found = wide(tables)
    synthetic = found.loc[f"synthetic/features/{variant}/d24-seed0"]
    text = found.loc[f"tiny/{HOOK_POINT}/{variant}/d24-seed0"]
    features = load_file(results / "sources/synthetic/inputs/dictionary.safetensors")["features"]
    untrained = Recovery(features, torch.randn(24, 12, generator=torch.Generator().manual_seed(0)))
    assert (
        synthetic.matched_feature_cosine
        > untrained.metrics_of_dictionary()["matched_feature_cosine"] + 0.1
    )
    assert synthetic.support_recall > 0.5
    assert np.isnan(synthetic.kl)
    assert np.isnan(text.matched_feature_cosine)
    assert 0 < text.fvu < 0.9
    assert text.ce_tokens == 6 * 15
    if variant == "topk":
        assert text.l0_p95 <= 4
    ids = np.load(results / "sources/tiny/inputs/evaluation.npy")[::2].astype(np.int64)
    sae = load(folders[1][1])
    model = LlamaForCausalLM.from_pretrained(results / "sources/tiny/model")

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1], sae(x[:, 1:])], dim=1)

    with torch.no_grad(), splice(model, HOOK_POINT, reconstruct):
        whole = model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss
    assert text.ce_spliced == pytest.approx(float(whole), abs=2e-6)
    assert text.ce_degradation == pytest.approx(float(whole) - text.ce_clean, abs=2e-6)
    intervals = pd.read_csv(tables / "intervals.csv")
    of_text = intervals[intervals.run == text.name].set_index("metric")
    for metric in ("fvu", "nmse", "cosine", "l0_mean", "ce_degradation", "kl"):
        line = of_text.loc[metric]
        assert line.value == pytest.approx(text[metric], rel=1e-9, abs=1e-12)
        assert line.low <= line.value <= line.high
        assert line.units == 6  # documents of two contexts each; of every second context too
    steps = pd.read_csv(tables / "training.csv")
    assert set(steps.run) == {f"synthetic/features/{variant}/d24-seed0", f"tiny/{HOOK_POINT}/{variant}/d24-seed0"}  # fmt: skip
    assert (steps.groupby("run").tokens_seen.max() == 12800).all()


def test_metrics_of_a_trained_sae_match_a_plain_loop(results: Path) -> None:
    """fvu, cosine and L0 of a saved SAE, written out in float64 from its weights."""
    setup = setup_in(results, "tiny", HOOK_POINT, EVALUATION, "cpu")
    sae = load(train_sae(results, "tiny", HOOK_POINT, "relu"))
    got = measure(setup, sae, is_trained=False)[0].metrics
    x = setup.held_out.read(0, setup.held_out.rows).double().numpy()
    w = {name: value.detach().double().numpy() for name, value in sae.named_parameters()}
    z = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    x_hat = z @ w["W_dec"] + w["b_dec"]
    fvu = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1)
    assert got["fvu"] == pytest.approx(fvu, rel=1e-5)
    assert got["cosine"] == pytest.approx(((x * x_hat).sum(1) / norms).mean(), rel=1e-6)
    assert got["l0_mean"] == pytest.approx((z > 1e-6).sum(1).mean(), rel=1e-2)
    assert got["dead_fraction"] == pytest.approx(((z > 1e-6).sum(0) == 0).mean(), abs=0.05)


@pytest.fixture(scope="module")
def another_source(results: Path) -> Path:
    """Other text for the model of `tiny`: an evaluation split, and its clean side for SAEs of `tiny`."""
    folder = results / "sources" / "another"
    (folder / "inputs").mkdir(parents=True)
    (folder / "model").symlink_to(results / "sources/tiny/model")
    ids = np.random.default_rng(1).integers(0, 12, (8, 16)).astype(np.int32)
    np.save(folder / "inputs/evaluation.npy", ids)
    np.save(folder / "inputs/evaluation_documents.npy", np.arange(8) // 2)
    make_stores(results, "another", TEXT, ["evaluation"])
    clean = results / "evaluations/tiny" / HOOK_POINT / "on/another"
    clean.mkdir(parents=True)
    mean = open_store(results / "stores/tiny/train" / f"{HOOK_POINT}.zarr").mean
    write_clean(TEXT, folder, HOOK_POINT, mean, EVALUATION, {}, "cpu", clean)
    return results


def test_an_sae_is_measured_on_another_sources_rows(another_source: Path, tmp_path: Path) -> None:
    """FVU from the other store's rows, cross-entropies from plain runs of the model on its texts."""
    results = another_source
    evaluation = EVALUATION | {"also_on": {"another": {"dimension": None}}}
    both = setups(
        reads_in(results, "tiny", HOOK_POINT, "another"), "tiny", HOOK_POINT, evaluation, "cpu"
    )
    folder = train_sae(results, "tiny", HOOK_POINT, "topk")
    evaluate_sae(load(folder), read_config(folder), both, tmp_path)
    (tmp_path / "baselines").mkdir()
    evaluate_baselines([3], both, tmp_path / "baselines")
    (tmp_path / "tables").mkdir()
    collect([tmp_path, tmp_path / "baselines"], [folder], [], tmp_path / "tables")
    table = pd.read_csv(tmp_path / "tables/metrics.csv")
    keys = ["run", "evaluated_on"]
    found = table.pivot(index=keys, columns="metric", values="value")
    own, other = (found.loc[(read_config(folder)["name"], on)] for on in ("tiny", "another"))
    assert own.rows == 12 * 15
    x = open_store(results / "stores/another/evaluation" / f"{HOOK_POINT}.zarr").read(0, 120)
    train = open_store(results / "stores/tiny/train" / f"{HOOK_POINT}.zarr")
    x = x[torch.linalg.vector_norm(x.double(), dim=1) <= 10 * train.median_norm]
    assert other.rows == len(x)
    sae = load(folder)
    with torch.no_grad():
        error = (x - sae(x)).double().square().sum()
    assert other.fvu == pytest.approx(float(error / (x - x.mean(0)).double().square().sum()))
    ids = torch.tensor(np.load(results / "sources/another/inputs/evaluation.npy"))
    ids = ids[[i * 8 // 6 for i in range(6)]].long()
    model = LlamaForCausalLM.from_pretrained(results / "sources/tiny/model")

    def loss(replace: Callable[[torch.Tensor], torch.Tensor]) -> float:
        def kept(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :1], replace(x[:, 1:])], dim=1)

        with torch.no_grad(), splice(model, HOOK_POINT, kept):
            return float(model(input_ids=ids, labels=ids).loss)

    assert other.ce_clean == pytest.approx(loss(lambda x: x), abs=2e-6)
    assert other.ce_spliced == pytest.approx(loss(sae), abs=2e-6)
    mean = train.mean.float()  # of the rows that the SAE was trained on
    assert other.ce_mean == pytest.approx(loss(lambda x: mean.expand_as(x)), abs=2e-6)
    pca = found.loc[(f"tiny/{HOOK_POINT}/pca/k3", "another")]
    basis = pca_basis(train.read(0, train.rows), 3)
    centred = (x - mean).double()
    rest = (centred - centred @ basis @ basis.T).square().sum()
    assert pca.fvu == pytest.approx(float(rest / (x - x.mean(0)).double().square().sum()), rel=1e-4)
    summary = pd.read_csv(tmp_path / "tables/summary.csv")
    assert set(summary["evaluated_on"]) == {"tiny", "another"}
    assert f"## tiny on another, {HOOK_POINT}" in (tmp_path / "tables/summary.md").read_text()


def pca_basis(rows: torch.Tensor, k: int) -> torch.Tensor:
    """(d, k) leading directions of rows."""
    x = rows.double() - rows.double().mean(0)
    return torch.linalg.svd(x, full_matrices=False).Vh[:k].T


@pytest.mark.parametrize("batch_size", [5, 37, 1000])
def test_batch_size_does_not_change_a_metric_of_a_trained_sae(
    results: Path, batch_size: int
) -> None:
    """Beyond the rounding of float32 matrix products, whose kernels depend on the shape."""
    for source, hook_point in (("synthetic", "features"), ("tiny", HOOK_POINT)):
        sae = load(train_sae(results, source, hook_point, "topk"))
        expected, got = (
            measure(
                setup_in(results, source, hook_point, EVALUATION | {"batch_size": size}, "cpu"),
                sae,
                is_trained=True,
            )[0].metrics
            for size in (100, batch_size)
        )
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_rows_of_training_are_those_that_an_sae_learns_from(results: Path) -> None:
    """Each context's last row, for AdaptiveK per context: 40 contexts of 16 positions, the first left out."""
    setup = setup_in(results, "tiny", HOOK_POINT, EVALUATION, "cpu")
    given = {"complexity": "scores", "k_min": 1, "k_max": 4}
    expected = {"per_token": setup.train.rows, "per_context": 40}
    assert setup.train.rows == 40 * 15
    for form, rows in expected.items():
        sae = build("adaptive_k", 12, 24, with_defaults("adaptive_k", given | {"form": form}))
        assert row_policy(setup, sae, is_trained=True)["train_rows"] == rows
    assert row_policy(setup, object(), is_trained=False)["train_rows"] == 600  # a baseline
