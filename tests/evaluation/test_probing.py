"""Sparse probes on planted answers, and against plain loops."""

from typing import Any

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize
from sklearn.metrics import roc_curve

from saeflow.evaluation.probing import Rows, balanced, most_different, probe, regress

ROWS, LATENTS, NEURONS = 600, 40, 8


def coded(seed: int, answers: np.ndarray, planted: int, strength: float = 1.0) -> np.ndarray:
    """Sparse noise in which one latent fires exactly where the answer is yes."""
    rng = np.random.default_rng(seed)
    z = rng.random((len(answers), LATENTS)) * (rng.random((len(answers), LATENTS)) < 0.2)
    z[:, planted] = strength * answers * rng.uniform(0.5, 1.5, len(answers))
    return z.astype(np.float32)


def rows(seed: int, planted: int = 7, share: float = 0.3, strength: float = 1.0) -> Rows:
    rng = np.random.default_rng(seed)
    answers = rng.random(ROWS) < share
    x = rng.normal(size=(ROWS, NEURONS)).astype(np.float32)
    return Rows(x, sparse.csr_array(coded(seed, answers, planted, strength)), {"planted": answers})


def accuracies(lines: list[dict[str, Any]]) -> dict[tuple[str, int | None], float]:
    return {(line["method"], line["k"]): line["accuracy"] for line in lines}


def test_the_columns_chosen_differ_most_in_their_means_by_hand() -> None:
    values = np.array([[1.0, 0, 5, 2], [3, 0, 5, 2], [0, 4, 5, 1], [0, 8, 5, 0]])
    answers = np.array([True, True, False, False])  # means 2 0 5 2 and 0 6 5 0.5: apart 2 6 0 1.5
    for k, expected in ((1, [1]), (2, [1, 0]), (3, [1, 0, 3]), (4, [1, 0, 3, 2])):
        assert most_different(values, answers, k).tolist() == expected
        assert most_different(sparse.csr_array(values), answers, k).tolist() == expected
    assert most_different(np.ones((4, 3)), answers, 2).tolist() == [0, 1]  # ties: the first


def test_sparse_and_dense_columns_are_chosen_alike_and_as_by_a_loop() -> None:
    rng = np.random.default_rng(0)
    values = (rng.random((200, 60)) * (rng.random((200, 60)) < 0.1)).astype(np.float32)
    values[:, 50:] = 0  # never active
    answers = rng.random(200) < 0.5
    gaps = [
        abs(
            sum(float(v) for v in column[answers]) / answers.sum()
            - sum(float(v) for v in column[~answers]) / (~answers).sum()
        )
        for column in values.T
    ]
    expected = sorted(range(60), key=lambda column: (-gaps[column], column))
    for given in (values, sparse.csr_array(values)):
        assert most_different(given, answers, 60).tolist() == expected


@pytest.mark.parametrize(("limit", "each"), [(40, 20), (41, 20), (10_000, 90)])
def test_a_sample_is_half_yes_and_drawn_from_all_rows(limit: int, each: int) -> None:
    answers = np.arange(300) % 10 < 3
    found = balanced(answers, limit, seed=0)
    assert answers[found].sum() == each
    assert (~answers[found]).sum() == each
    assert (np.diff(found) > 0).all()  # in order, none twice
    assert np.array_equal(found, balanced(answers, limit, seed=0))
    if limit < 100:
        assert not np.array_equal(found, balanced(answers, limit, seed=1))
        seen = np.unique(np.concatenate([balanced(answers, limit, seed) for seed in range(80)]))
        assert len(seen) == 300  # any row can be drawn


def test_a_planted_latent_answers_exactly_and_noise_does_not() -> None:
    lines = probe(rows(0), rows(1), [1, 2, 5], 400, seed=0)
    found = accuracies(lines)
    for k in (1, 2, 5):
        assert found["latents", k] == 1
        assert abs(found["neurons", k] - 0.5) < 0.1
    assert abs(found["activation", None] - 0.5) < 0.1
    assert len({(line["train_rows"], line["test_rows"]) for line in lines}) == 1
    latent = next(line for line in lines if line["k"] == 1 and line["method"] == "latents")
    assert (latent["f1"], latent["auc"]) == (1, 1)


def test_shuffled_answers_fall_to_chance() -> None:
    train, test = rows(0), rows(1)
    rng = np.random.default_rng(2)
    shuffled = {"planted": rng.permutation(train.answers["planted"])}
    found = accuracies(probe(Rows(train.x, train.latents, shuffled), test, [1, 5], 400, seed=0))
    assert max(abs(value - 0.5) for value in found.values()) < 0.12


def test_latents_are_chosen_on_training_rows_alone() -> None:
    """Another latent answers the held-out rows exactly; a probe that knew it would be right."""
    found = accuracies(probe(rows(0, planted=7), rows(1, planted=8), [1], 400, seed=0))
    assert abs(found["latents", 1] - 0.5) < 0.1


def test_two_latents_tell_what_neither_does_alone() -> None:
    def both(seed: int) -> Rows:
        rng = np.random.default_rng(seed)
        a, b = rng.random((2, 800)) < 0.5
        z = np.zeros((800, LATENTS), np.float32)
        z[:, 3], z[:, 4] = a, b
        return Rows(z[:, :NEURONS], sparse.csr_array(z), {"both": a & b})

    found = accuracies(probe(both(0), both(1), [1, 2], 400, seed=0))
    assert found["latents", 1] < 0.9
    assert found["latents", 2] == 1
    assert found["neurons", 2] == 1


def test_a_question_with_few_answers_or_not_asked_of_both_splits_is_left_out() -> None:
    train, test = rows(0), rows(1)
    few = np.arange(ROWS) < 49
    enough = np.arange(ROWS) < 50
    asked = {"few": few, "enough": enough, "in training only": enough}
    lines = probe(
        Rows(train.x, train.latents, asked),
        Rows(test.x, test.latents, {"few": few, "enough": enough}),
        [1], 400, seed=0,
    )  # fmt: skip
    assert {line["task"] for line in lines} == {"enough"}
    assert {(line["train_rows"], line["test_rows"]) for line in lines} == {(100, 100)}


def test_no_probe_has_more_columns_than_there_are() -> None:
    lines = probe(rows(0), rows(1), [1, NEURONS, NEURONS + 1, LATENTS + 1], 200, seed=0)
    assert [(line["method"], line["k"]) for line in lines] == [
        ("latents", 1), ("latents", NEURONS), ("latents", NEURONS + 1),
        ("neurons", 1), ("neurons", NEURONS), ("activation", None),
    ]  # fmt: skip


def test_columns_that_never_vary_change_nothing() -> None:
    rng = np.random.default_rng(0)
    y = rng.random((2, 200)) < 0.5
    x = [rng.normal(size=(200, 3)) + answers[:, None] for answers in y]
    wide = [np.concatenate([part, np.zeros((200, 2)), np.full((200, 1), 7.0)], 1) for part in x]
    wide[1][:, 3] = rng.normal(size=200)  # never active in training
    assert regress(*wide, *y) == pytest.approx(regress(*x, *y))


def test_quality_is_that_of_a_logistic_regression_written_out() -> None:
    """Penalised likelihood minimised by scipy; accuracy, F1 and area counted by hand."""
    rng = np.random.default_rng(3)
    y_train, y_test = rng.random((2, 150)) < 0.5
    train, test = (5 + 3 * (rng.normal(size=(150, 4)) + y[:, None]) for y in (y_train, y_test))
    mean, spread = train.mean(0), train.std(0)
    u, v = (train - mean) / spread, (test - mean) / spread
    sign = np.where(y_train, 1, -1)

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -sign * (u @ w[:4] + w[4])).sum() + 0.5 * w[:4] @ w[:4])

    w = minimize(loss, np.zeros(5), tol=1e-12).x
    scores = v @ w[:4] + w[4]
    said = scores > 0
    tp, fp, fn = (said & y_test).sum(), (said & ~y_test).sum(), (~said & y_test).sum()
    above = scores[y_test][:, None] > scores[~y_test][None]
    got = regress(train, test, y_train, y_test)
    assert got["accuracy"] == (said == y_test).mean()
    assert got["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert got["auc"] == pytest.approx(above.mean(), abs=1e-4)
    rates = roc_curve(y_test, scores)
    assert got["auc"] == pytest.approx(np.trapezoid(rates[1], rates[0]), abs=1e-4)


def test_the_same_seed_gives_the_same_lines_and_the_scale_changes_none() -> None:
    first = probe(rows(0), rows(1), [1, 2], 200, seed=4)
    assert first == probe(rows(0), rows(1), [1, 2], 200, seed=4)
    scaled = [Rows(1000 * r.x, 1000 * r.latents, r.answers) for r in (rows(0), rows(1))]
    for one, other in zip(first, probe(*scaled, [1, 2], 200, seed=4), strict=True):
        assert one == pytest.approx(other, abs=0.011)
