"""The probe, against ridge regression written out, and what is trained with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.model_selection import GroupKFold

from saeflow.batch import Batch
from saeflow.complexity.files import read_probe
from saeflow.complexity.probe import agreement, fit_probe, scored_rows
from saeflow.config import SAEConfig, TrainingConfig
from saeflow.errors import UserError
from saeflow.saes import InputScale, build, load
from saeflow.training import train
from saeflow.training.run import Run

WHERE = {"source": "tiny", "hook_point": "blocks.2.resid_post", "complexity": "labels"}


@pytest.fixture
def scores(stores: dict[str, Any], tmp_path: Path) -> Path:
    """Scores that are nearly linear in each context's last activation."""
    direction = torch.randn(stores["train"].d_in, generator=torch.Generator().manual_seed(0))
    noise = np.random.default_rng(0)
    tables = []
    for split, store in stores.items():
        rows = store.read(0, store.rows) @ direction / store.scale
        last = store.column("position") == 31
        context = store.column("context")[last]
        score = rows.numpy()[last] + noise.normal(0, 0.3, last.sum())
        tables.append(
            pd.DataFrame(
                {
                    "split": split,
                    "context": context,
                    "unit": context // 3,
                    "position": 31,
                    "score": score,
                }
            )
        )
    path = tmp_path / "scores.csv"
    pd.concat(tables).to_csv(path, index=False)
    return path


def test_the_probe_is_ridge_regression(stores: Any, scores: Path, tmp_path: Path) -> None:
    """The normal equations of the chosen penalty, with an intercept that is not penalised."""
    fit_probe(scores, stores, None, WHERE, tmp_path)
    probe, quality = read_probe(tmp_path), json.loads((tmp_path / "quality.json").read_text())
    table = pd.read_csv(scores)
    y = table[table.split == "train"].set_index("context").score
    low, high = np.percentile(y, (1, 99))
    store = stores["train"]
    last = store.column("position") == 31
    x = store.read(0, store.rows).double().numpy()[last] / store.scale
    target = (y.loc[store.column("context")[last]].to_numpy() - low) / (high - low)
    target = target.clip(0, 1) * 10
    centred = x - x.mean(0)
    w = np.linalg.solve(
        centred.T @ centred + quality["ridge"] * np.eye(x.shape[1]), centred.T @ target
    )
    np.testing.assert_allclose(probe["weight"] * store.scale, w, rtol=1e-4, atol=1e-6)
    assert float(probe["bias"]) == pytest.approx(target.mean() - x.mean(0) @ w, rel=1e-4)
    np.testing.assert_allclose(probe["examples"] / store.scale, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(probe["scores"], target, rtol=1e-5, atol=1e-5)
    assert quality["range"] == pytest.approx([low, high])


def test_without_training_rows_half_of_the_held_out_documents_are_fitted(
    stores: Any, scores: Path, tmp_path: Path
) -> None:
    """The normal equations of the documents that predictions.csv calls trained on; no document is on both sides."""
    store = stores["evaluation"]
    fit_probe(scores, {"evaluation": store}, None, WHERE, tmp_path)
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    documents = {s: set(of["context"] // 3) for s, of in predictions.groupby("split")}
    assert not documents["train"] & documents["evaluation"]
    assert len(documents["train"]) - len(documents["evaluation"]) in (0, 1)
    table = pd.read_csv(scores)
    held_out = table[table["split"] == "evaluation"]
    assert sorted(predictions["context"]) == sorted(held_out["context"])
    probe, quality = read_probe(tmp_path), json.loads((tmp_path / "quality.json").read_text())
    last = np.isin(store.column("context") // 3, list(documents["train"]))
    last &= store.column("position") == 31
    x = store.read(0, store.rows).double().numpy()[last] / store.scale
    y = held_out.set_index("context").score.loc[store.column("context")[last]].to_numpy()
    low, high = np.percentile(y, (1, 99))
    target = ((y - low) / (high - low)).clip(0, 1) * 10
    centred = x - x.mean(0)
    gram = centred.T @ centred + quality["ridge"] * np.eye(x.shape[1])
    w = np.linalg.solve(gram, centred.T @ target)
    np.testing.assert_allclose(probe["weight"] * store.scale, w, rtol=1e-4, atol=1e-6)


def test_the_penalty_has_the_least_error_on_held_out_folds(
    stores: Any, scores: Path, tmp_path: Path
) -> None:
    fit_probe(scores, stores, None, WHERE, tmp_path)
    quality = json.loads((tmp_path / "quality.json").read_text())
    probe = read_probe(tmp_path)
    x = (probe["examples"] / stores["train"].scale).double().numpy()
    y = probe["scores"].double().numpy()
    train = pd.read_csv(scores).query("split == 'train'").set_index("context").unit
    store = stores["train"]
    documents = train.loc[store.column("context")[store.column("position") == 31]].to_numpy()
    folds = [test for _, test in GroupKFold(5, shuffle=True, random_state=0).split(x, y, documents)]
    assert all(len(np.unique(documents[fold])) >= 2 for fold in folds)
    errors = {}
    for ridge in len(y) * 10.0 ** np.arange(-8, 3):
        of_folds = []
        for fold in folds:
            rest = np.setdiff1d(np.arange(len(y)), fold)
            assert not set(documents[rest]) & set(documents[fold])
            mean, offset = x[rest].mean(0), y[rest].mean()
            c = x[rest] - mean
            w = np.linalg.solve(c.T @ c + ridge * np.eye(x.shape[1]), c.T @ (y[rest] - offset))
            error = y[fold] - offset - (x[fold] - mean) @ w
            of_folds.append((error**2).mean() ** 0.5)
        errors[ridge] = np.mean(of_folds)
    assert quality["ridge"] == pytest.approx(min(errors, key=errors.__getitem__))
    assert quality["at_edge"] == (quality["ridge"] in (min(errors), max(errors)))
    assert quality["cross_validated_rmse"] == pytest.approx(min(errors.values()), rel=1e-6)


def test_quality_is_that_of_the_predictions(stores: Any, scores: Path, tmp_path: Path) -> None:
    fit_probe(scores, stores, None, WHERE, tmp_path)
    table = pd.read_csv(tmp_path / "predictions.csv")
    quality = json.loads((tmp_path / "quality.json").read_text())
    probe = read_probe(tmp_path)
    for split in ("train", "evaluation"):
        of_split = table[table.split == split]
        assert quality[split] == pytest.approx(
            agreement(
                of_split.score.to_numpy(),
                of_split.predicted.to_numpy(),
                of_split.context.to_numpy() // 3,
            )
        )
        assert of_split.predicted.between(0, 10).all()
    held_out = table[table.split == "evaluation"]
    _, x, _, _ = scored_rows(
        stores["evaluation"], pd.read_csv(scores).query("split == 'evaluation'")
    )
    expected = (x @ probe["weight"] + probe["bias"]).clamp(0, 10)
    np.testing.assert_allclose(held_out.predicted, expected, rtol=1e-4, atol=1e-4)
    assert quality["evaluation"]["spearman"] == pytest.approx(
        spearmanr(held_out.score, held_out.predicted)[0]
    )


def test_agreement_by_hand() -> None:
    found = agreement(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3]), np.zeros(4, int))
    assert (found.pop("r2_low"), found.pop("r2_high"), found.pop("units")) == (None, None, 1)
    assert found == pytest.approx(
        {"contexts": 4, "rmse": 0.5**0.5, "r2": 1 - 2 / 5, "pearson": 0.8, "spearman": 0.8}
    )
    assert agreement(np.ones(3), np.arange(3.0), np.arange(3))["pearson"] is None


def test_the_interval_of_r2_is_drawn_by_documents() -> None:
    """Against rows copied out, document by document; noise that a document shares widens it."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(30), 20)
    score = rng.normal(size=30)[units] + rng.normal(size=600)
    predicted = score + 0.8 * rng.normal(size=30)[units]
    found = agreement(score, predicted, units)
    drawn = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(units == u) for u in rng.integers(30, size=30)])
        error = np.square(score - predicted)[rows].sum()
        drawn.append(1 - error / np.square(score - score.mean())[rows].sum())
    expected = np.quantile(drawn, [0.025, 0.975])
    width = expected[1] - expected[0]
    assert [found["r2_low"], found["r2_high"]] == pytest.approx(expected.tolist(), abs=0.1 * width)
    alone = agreement(score, predicted, np.arange(600))
    assert alone["r2_high"] - alone["r2_low"] < 0.6 * width


def test_scores_of_one_document_are_refused(stores: Any, scores: Path, tmp_path: Path) -> None:
    table = pd.read_csv(scores).assign(unit=0)
    table.to_csv(scores, index=False)
    with pytest.raises(UserError, match="two or more documents"):
        fit_probe(scores, stores, None, WHERE, tmp_path)


def test_rows_that_the_store_left_out_are_left_out(stores: Any) -> None:
    table = pd.DataFrame(
        {"context": [*range(20), 1000], "unit": range(21), "position": 31, "score": range(21)}
    )
    context, x, score, unit = scored_rows(stores["train"], table)
    assert set(context) <= set(range(20))
    assert x.shape == (len(context), stores["train"].d_in)
    np.testing.assert_array_equal(score, context)
    np.testing.assert_array_equal(unit, context)


def test_too_few_or_equal_scores_are_refused(stores: Any, tmp_path: Path) -> None:
    few = pd.DataFrame({"context": range(5), "unit": 0, "position": 31, "score": range(5)})
    with pytest.raises(UserError, match="at least 10 rows"):
        scored_rows(stores["train"], few)
    rows = [("train", c, c, 31, 1.0) for c in range(40)] + [
        ("evaluation", c, c, 31, 1.0) for c in range(12)
    ]
    path = tmp_path / "scores.csv"
    pd.DataFrame(rows, columns=["split", "context", "unit", "position", "score"]).to_csv(
        path, index=False
    )
    with pytest.raises(UserError, match="all contexts have the score 1"):
        fit_probe(path, stores, None, WHERE, tmp_path)


ADAPTIVE: dict[str, Any] = {
    "form": "per_token", "complexity": "labels", "k_min": 2, "k_max": 12, "steepness": 6.0,
    "phase_ratio": 0.5, "probe_weight": 0.05, "l1": 0.005, "alpha": None, "auxk_weight": 0.0,
}  # fmt: skip


def adaptive(stores: Any, scores: Path, tmp_path: Path, **changes: Any) -> Any:
    fit_probe(scores, stores, None, WHERE, tmp_path)
    store = stores["train"]
    sae = build("adaptive_k", store.d_in, 40, {**ADAPTIVE, **changes})
    sae.take_probe(tmp_path, InputScale(store.scale))
    sae.initialise(Batch.of(store.read(0, 256) / store.scale), torch.Generator().manual_seed(0))
    return sae.train(), store.read(0, 64) / store.scale


def test_k_follows_the_probe(stores: Any, scores: Path, tmp_path: Path) -> None:
    sae, x = adaptive(stores, scores, tmp_path)
    probe, scale = read_probe(tmp_path), stores["train"].scale
    score = (scale * x @ probe["weight"] + probe["bias"]).clamp(0, 10)
    expected = (2 + 10 / (1 + (-6 * (score / 10 - 0.5)).exp())).round()
    torch.testing.assert_close(sae.allowed_k(x).detach(), expected)
    assert len(expected.unique()) > 3
    sae.fold_scale(scale)
    torch.testing.assert_close(sae.eval().allowed_k(scale * x).detach(), expected)


@pytest.mark.parametrize("form", ["per_token", "soft"])
def test_the_probe_rests_then_learns(form: str, stores: Any, scores: Path, tmp_path: Path) -> None:
    """In phase 2 nothing reaches it; in phase 3 its own loss does, and through a real k the SAE's."""
    alpha = 0.05 if form == "soft" else None
    sae, x = adaptive(stores, scores, tmp_path, form=form, alpha=alpha)
    sae.begin_step(4, 10)
    losses = sae.losses(sae.run(Batch.of(x)), torch.zeros(40, dtype=torch.bool))
    assert "probe" not in losses
    sum(losses.values()).backward()
    assert sae.probe_w.grad is None
    sae.begin_step(5, 10)
    losses = sae.losses(sae.run(Batch.of(x)), torch.zeros(40, dtype=torch.bool))
    losses.pop("probe")
    sum(losses.values()).backward()
    assert (sae.probe_w.grad is not None) == (form == "soft")


def test_the_joint_phase_starts_at_rest(stores: Any, scores: Path, tmp_path: Path) -> None:
    """The fitted probe is where its own loss has no gradient (but for scores at the ends of 0..10)."""
    fit_probe(scores, stores, [-50.0, 50.0], WHERE, tmp_path)
    store = stores["train"]
    sae = build("adaptive_k", store.d_in, 40, ADAPTIVE)
    sae.take_probe(tmp_path, InputScale(store.scale))
    sae.probe_loss().backward()
    moved = build("adaptive_k", store.d_in, 40, ADAPTIVE)
    moved.take_probe(tmp_path, InputScale(store.scale))
    with torch.no_grad():
        moved.probe_w.mul_(1.1)
    moved.deviation.zero_()
    moved.probe_loss().backward()
    assert float(sae.probe_w.grad.norm()) < 0.02 * float(moved.probe_w.grad.norm())


def test_the_joint_loss_is_the_papers(stores: Any, scores: Path, tmp_path: Path) -> None:
    sae, x = adaptive(stores, scores, tmp_path)
    with torch.no_grad():
        sae.probe_w.add_(0.01)
        sae.probe_b.add_(-0.2)
    probe, scale = read_probe(tmp_path), stores["train"].scale
    w, b = scale * probe["weight"] + 0.01, probe["bias"] - 0.2
    predicted = (probe["examples"] / scale @ w + b).clamp(0, 10)
    error = (predicted - probe["scores"]).square().mean()
    distance = (0.01**2 * len(w)) ** 0.5 + 0.2
    expected = error + probe["ridge"] * w.square().sum() / len(probe["scores"]) + 0.2 * distance
    sae.begin_step(8, 10)
    losses = sae.losses(sae.run(Batch.of(x)), torch.zeros(40, dtype=torch.bool))
    assert float(losses["probe"].detach()) == pytest.approx(0.05 * float(expected), rel=1e-4)


def test_the_deviation_weight_adapts(stores: Any, scores: Path, tmp_path: Path) -> None:
    """Times 0.8 where the loss fell by more than 5 % over 3 steps, else times 1.2, within 0.01..0.5."""
    sae, _ = adaptive(stores, scores, tmp_path)
    found = []
    for loss in (1.0, 1.0, 1.0, 0.96, 0.94, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9):
        sae.adapt(torch.tensor(loss))
        found.append(float(sae.deviation))
    expected, c = [0.2, 0.2, 0.2], 0.2
    for factor in (1.2, 0.8, 0.8, 0.8, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2):
        c = min(0.5, max(0.01, c * factor))
        expected.append(c)
    assert found[:8] == pytest.approx(expected[:8], rel=1e-5)
    for _ in range(30):
        sae.adapt(torch.tensor(1.0))
    assert float(sae.deviation) == pytest.approx(0.5)


def test_the_released_joint_phase(stores: Any, scores: Path, tmp_path: Path) -> None:
    """The ridge term is the paper's; c follows the loss of 2 steps before and acts a step later."""
    sae, x = adaptive(stores, scores, tmp_path, joint_phase="released")
    probe, scale = read_probe(tmp_path), stores["train"].scale
    assert sae.apart == ("probe_w", "probe_b")
    assert sae.apart_from(10) == 5
    with torch.no_grad():
        sae.probe_b.add_(-0.2)
    w, b = scale * probe["weight"], probe["bias"] - 0.2
    predicted = (probe["examples"] / scale @ w + b).clamp(0, 10)
    loss = (predicted - probe["scores"]).square().mean() + probe["ridge"] * w.square().sum() / 2
    c = 0.2
    for step in range(5, 10):
        sae.begin_step(step, 10)
        losses = sae.losses(sae.run(Batch.of(x)), torch.zeros(40, dtype=torch.bool))
        expected = 0.05 * float(loss + c * 0.2)
        assert float(losses["probe"].detach()) == pytest.approx(expected, rel=1e-4)
        c = min(0.5, c * 1.2) if step > 6 else c  # the same loss twice before
    found = []
    for lower in (0.99, 0.94, 0.94):
        sae.adapt(lower * loss)
        found.append(float(sae.deviation))
    assert found == pytest.approx([c * 1.2, c * 1.2 * 0.8, c * 1.2 * 0.8 * 0.8], rel=1e-4)


def test_a_probe_of_another_width_is_refused(stores: Any, scores: Path, tmp_path: Path) -> None:
    fit_probe(scores, stores, None, WHERE, tmp_path)
    sae = build("adaptive_k", stores["train"].d_in + 1, 40, ADAPTIVE)
    with pytest.raises(UserError, match="expected 17"):
        sae.take_probe(tmp_path, 1.0)
    with pytest.raises(UserError, match="no such file"):
        sae.take_probe(tmp_path / "nothing", 1.0)
    (tmp_path / "probe.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="damaged"):
        sae.take_probe(tmp_path, 1.0)


def test_last_rows_are_each_contexts_last(stores: Any) -> None:
    store = stores["train"]
    last = store.column("position") == 31
    expected = store.read(0, store.rows)[torch.from_numpy(last)]
    count = len(expected)
    assert store.n_last == count
    batches = store.last_rows().batches(count, 0)
    seen = [next(batches).x for _ in range(2)]
    for batch in seen:  # an epoch each, in different orders
        assert {row.tobytes() for row in batch.numpy()} == {r.tobytes() for r in expected.numpy()}
    assert not torch.equal(*seen)
    resumed = store.last_rows().batches(7, 3, start_batch=9)
    whole = store.last_rows().batches(7, 3)
    for _ in range(9):
        next(whole)
    assert torch.equal(next(resumed).x, next(whole).x)


RUNTIME = {"device": "cpu", "precision": "fp32", "checkpoint_every_s": 1e9}


def run_config(form: str, alpha: float | None) -> SAEConfig:
    training = TrainingConfig(
        tokens=32 * 40, batch_size=32, input_scale="dimension", lr=3e-3, betas=(0.9, 0.999),
        lr_warmup_steps=5, lr_decay_fraction=0.2, grad_clip=1.0, dead_after_tokens=500, train_decoder=True,
        log_every_steps=10,
    )  # fmt: skip
    return SAEConfig(
        name="a/b/c/d", entry="c", variant="adaptive_k", source="a", hook_point="b", d_sae=40,
        seed=0, options={**ADAPTIVE, "form": form, "alpha": alpha}, training=training,
    )  # fmt: skip


@pytest.mark.parametrize(("form", "alpha"), [("per_context", None), ("soft", 0.05)])
def test_a_run_goes_on_within_its_joint_phase(
    form: str, alpha: float | None, stores: Any, scores: Path, tmp_path: Path
) -> None:
    """Probe, its distance weight and its losses come back from a checkpoint."""
    folders = [tmp_path / name for name in ("probe", "whole", "broken")]
    for folder in folders:
        folder.mkdir()
    probe, whole, broken = folders
    fit_probe(scores, stores, None, WHERE, probe)
    config = run_config(form, alpha)
    expected = train(stores["train"], config, RUNTIME, whole, probe)
    run = Run(stores["train"], config, RUNTIME, broken, probe)
    batches = run.batches()
    for _ in range(27):
        run.one_step(next(batches))
        run.step += 1
    batches.close()
    run.checkpoint()
    found = train(stores["train"], config, RUNTIME, broken, probe)
    assert found["weights"] == expected["weights"]
    sae = load(broken)
    weight = read_probe(probe)["weight"]
    assert not torch.equal(sae.get_parameter("probe_w").detach(), weight)  # it learned


def test_per_context_sees_last_rows_alone(stores: Any, scores: Path, tmp_path: Path) -> None:
    fit_probe(scores, stores, None, WHERE, tmp_path)
    store = stores["train"]
    (tmp_path / "run").mkdir()
    run = Run(store, run_config("per_context", None), RUNTIME, tmp_path / "run", tmp_path)
    last = store.read(0, store.rows)[torch.from_numpy(store.column("position") == 31)]
    known = {row.tobytes() for row in (last / store.scale).numpy()}
    batches = run.batches()
    assert all(row.tobytes() in known for _ in range(5) for row in next(batches).x.numpy())
    batches.close()
