"""Detection by hand on a few windows, and on texts whose latents are planted."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import balanced_accuracy_score
from sklearn.naive_bayes import CategoricalNB

from saeflow.errors import UserError
from saeflow.evaluation.detection import Text, Window, balanced_accuracy, by_tokens, detect

VOCABULARY, CONTEXTS, LENGTH = 30, 60, 20
SETTINGS: dict[str, Any] = {
    "latents": 50, "examples": 20, "windows": 15, "before": 3, "after": 1, "threshold": 0.8, "seed": 0,
}  # fmt: skip

Fires = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def text(seed: int, *latents: Fires, vocabulary: int = VOCABULARY) -> Text:
    """Shuffled rows of random tokens (position 0 left out); a latent fires as its function says."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (CONTEXTS, LENGTH))
    context, position = (part.ravel() for part in np.mgrid[:CONTEXTS, 1:LENGTH])
    order = rng.permutation(len(context))
    context, position = context[order], position[order]
    here, before = tokens[context, position], tokens[context, position - 1]
    fires = np.stack([latent(here, before, rng) for latent in latents], 1)
    strength = fires * rng.uniform(0.5, 2, fires.shape)
    return Text(sparse.csr_array(strength), context, position, tokens, lambda token: f"<{token}>")


def on_token(here: np.ndarray, before: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return here == 4


def after_token(here: np.ndarray, before: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return before == 2


def at_random(here: np.ndarray, before: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.random(len(here)) < 0.1


def of_share(share: float) -> Fires:
    return lambda here, before, rng: np.arange(len(here)) < share * len(here)


def lines_of(*latents: Fires, **settings: Any) -> list[dict[str, Any]]:
    return detect(text(0, *latents), text(1, *latents), SETTINGS | settings, by_tokens)


def windows(tokens: Sequence[tuple[int, int]], fires: Sequence[bool | None]) -> list[Window]:
    """Windows of a token and the one before it."""
    return [Window(pair, 1, yes) for pair, yes in zip(tokens, fires, strict=True)]


def test_scores_of_naive_bayes_by_hand() -> None:
    examples = windows([(1, 5), (2, 5), (1, 6), (3, 6)], [True, True, True, False])
    got = by_tokens(examples, windows([(1, 5), (3, 6), (1, 7), (8, 9)], [None] * 4))
    # of 3 that fire: token 5 twice, 6 once, before it 1 twice; of 1 that does not: token 6, before it 3
    yes = {n: (n + 0.5) / 4 for n in range(4)}
    no = {n: (n + 0.5) / 2 for n in range(2)}
    assert got == pytest.approx(
        [
            math.log(yes[2] / no[0]) + math.log(yes[2] / no[0]),
            math.log(yes[1] / no[1]) + math.log(yes[0] / no[1]),
            math.log(yes[0] / no[0]) + math.log(yes[2] / no[0]),
            2 * math.log(yes[0] / no[0]),
        ]
    )


def test_scores_of_balanced_examples_are_scikit_learns() -> None:
    """Categorical naive Bayes with alpha = 1/2, where every token can occur: the normalisers are equal."""
    rng = np.random.default_rng(0)
    pairs, asked = rng.integers(0, 5, (2, 40, 2))
    fires = np.arange(40) < 20
    model = CategoricalNB(alpha=0.5, min_categories=5).fit(pairs, fires)
    logs = model.predict_log_proba(asked)
    got = by_tokens(
        windows([tuple(p) for p in pairs.tolist()], fires.tolist()),
        windows([tuple(p) for p in asked.tolist()], [None] * 40),
    )
    assert got == pytest.approx((logs[:, 1] - logs[:, 0]).tolist())


def test_a_window_without_a_token_before_knows_none() -> None:
    examples = [Window((5,), 0, True), Window((6,), 0, False)]
    assert by_tokens(examples, [Window((5,), 0), Window((6,), 0)]) == pytest.approx(
        [math.log(3), -math.log(3)]
    )


def test_balanced_accuracy_is_scikit_learns_and_a_score_of_zero_says_no() -> None:
    rng = np.random.default_rng(1)
    scores, answers = rng.normal(size=50), np.arange(50) < 12
    expected = balanced_accuracy_score(answers, scores > 0)
    assert balanced_accuracy(scores, answers) == pytest.approx(expected)
    assert balanced_accuracy(np.zeros(4), np.array([True, False, False, False])) == 0.5


def test_a_latent_of_one_token_is_told_perfectly_and_one_of_the_token_before_too() -> None:
    """Six tokens, all of which the examples show."""
    train, test = (text(seed, on_token, after_token, vocabulary=6) for seed in (0, 1))
    for line in detect(train, test, SETTINGS | {"examples": 80}, by_tokens):
        assert (line["balanced_accuracy"], line["auc"], line["interpretable"]) == (1, 1, 1)


def test_random_latents_are_at_chance_and_so_are_shuffled_answers() -> None:
    lines = lines_of(*[at_random] * 30)
    assert len(lines) == 30
    means = {name: np.mean([line[name] for line in lines]) for name in lines[0]}
    assert means["balanced_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert means["auc"] == pytest.approx(0.5, abs=0.06)
    assert means["shuffled"] == pytest.approx(0.5, abs=0.05)
    told = lines_of(*[on_token] * 30)
    assert np.mean([line["shuffled"] for line in told]) == pytest.approx(0.5, abs=0.05)


def test_latents_that_fire_too_rarely_or_too_often_are_not_judged() -> None:
    rows = CONTEXTS * (LENGTH - 1)
    exactly = {n: of_share((n - 0.5) / rows) for n in (19, 20)}
    latents = [exactly[19], exactly[20], of_share(0.5), of_share(0.51), of_share(1), of_share(0)]
    found = lines_of(*latents)
    assert [(line["latent"], line["firing"]) for line in found] == [(1, 20), (2, rows // 2)]
    assert [line["latent"] for line in lines_of(*latents, windows=21)] == [2]
    few = detect(text(0, on_token), text(1, of_share(0.001)), SETTINGS, by_tokens)
    assert few == []


def test_some_of_the_latents_are_a_sample() -> None:
    latents = [at_random] * 12
    sample = [line["latent"] for line in lines_of(*latents, latents=5)]
    assert len(sample) == 5
    assert sample == sorted(set(sample))
    assert sample != [line["latent"] for line in lines_of(*latents, latents=5, seed=1)]
    assert lines_of(*latents, latents=5) == lines_of(*latents, latents=5)


class Recorder:
    """A scorer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[Sequence[Window], Sequence[Window]]] = []

    def __call__(self, examples: Sequence[Window], asked: Sequence[Window]) -> list[float]:
        self.given.append((examples, asked))
        return [1.0] * len(asked)


def test_a_scorer_sees_examples_of_training_text_and_is_asked_about_held_out_text() -> None:
    """Token ids of the splits are disjoint here: nothing of one split is in a window of the other."""
    train, test = text(0, on_token, at_random), text(1, on_token, at_random)
    test = Text(test.latents, test.context, test.position, test.tokens + 100, lambda token: "")
    recorder = Recorder()
    lines = detect(train, test, SETTINGS, recorder)
    assert len(recorder.given) == len(lines) == 2
    for examples, asked in recorder.given:
        assert [len(examples), len(asked)] == [40, 30]
        assert sum(bool(one.fires) for one in examples) == 20
        assert {one.fires for one in asked} == {None}
        assert {t < 100 for one in examples for t in one.tokens if t >= 0} == {True}
        assert {t >= 100 for one in asked for t in one.tokens if t >= 0} == {True}
    assert [line["balanced_accuracy"] for line in lines] == [0.5, 0.5]  # it always says yes


def test_the_order_of_the_windows_does_not_give_the_answers_away() -> None:
    def by_order(examples: Sequence[Window], asked: Sequence[Window]) -> list[float]:
        return [1.0 if i < len(asked) / 2 else -1.0 for i in range(len(asked))]

    lines = detect(text(0, *[at_random] * 20), text(1, *[at_random] * 20), SETTINGS, by_order)
    assert np.mean([line["balanced_accuracy"] for line in lines]) == pytest.approx(0.5, abs=0.06)


def test_answers_are_those_of_the_rows_asked_about() -> None:
    """A scorer that knows where the planted latent fires is right everywhere, told from held-out text."""
    train, test = text(0, after_token), text(1, after_token)

    def knows(examples: Sequence[Window], asked: Sequence[Window]) -> list[float]:
        for one in examples:
            assert one.fires is (one.tokens[one.mark - 1] == 2)
        return [1.0 if one.tokens[one.mark - 1] == 2 else -1.0 for one in asked]

    assert detect(train, test, SETTINGS, knows)[0]["balanced_accuracy"] == 1


def test_windows_end_where_their_context_does() -> None:
    tokens = np.array([[10, 11, 12], [20, 21, 22]])
    held = Text(
        sparse.csr_array(np.ones((3, 1))), np.array([1, 0, 0]), np.array([2, 0, 1]), tokens,
        lambda token: chr(token + 55),
    )  # fmt: skip
    assert held.window(0, 1, 2, True) == Window((21, 22, -1, -1), 1, True, ("L", "M", "", ""))
    assert held.window(1, 2, 1, None) == Window((-1, -1, 10, 11), 2, None, ("", "", "A", "B"))
    assert held.window(2, 1, 1, False) == Window((10, 11, 12), 1, False, ("A", "B", "C"))
    assert held.window(2, 0, 0, False).tokens == (11,)


def test_the_share_of_interpretable_latents_by_hand() -> None:
    """Told on 15 + 15, 15 + 9 and 15 + 8 of 30 windows: accuracies 1, 0.8 and 0.7667."""
    rights = iter([15, 9, 8])

    def scorer(examples: Sequence[Window], asked: Sequence[Window]) -> list[float]:
        right, scores = next(rights), []
        for one in asked:  # the latents fire on token 4: all yes right, so many no right
            if one.tokens[one.mark] == 4:
                scores.append(1.0)
            else:
                scores.append(-1.0 if right > 0 else 1.0)
                right -= 1
        return scores

    lines = detect(text(0, *[on_token] * 3), text(1, *[on_token] * 3), SETTINGS, scorer)
    assert [line["balanced_accuracy"] for line in lines] == pytest.approx([1, 0.8, 23 / 30])
    assert [line["interpretable"] for line in lines] == [1, 1, 0]


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda n: [0.0] * (n - 1), r"expected 30 finite numbers, one a window, found an array of shape \(29,\)"),
        (lambda n: np.zeros((n, 1)), r"found an array of shape \(30, 1\)"),
        (lambda n: None, "found None"),
        (lambda n: ["yes"] * n, r"found \['yes'"),
        (lambda n: [1.0] * 7 + [math.nan] * (n - 7), "found nan for window 7"),
        (lambda n: [math.inf] * n, "found inf for window 0"),
    ],
)  # fmt: skip
def test_scores_that_are_no_finite_number_a_window_are_one_clear_line(
    gives: Callable[[int], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        detect(text(0, on_token), text(1, on_token), SETTINGS, lambda shown, asked: gives(len(asked)))  # fmt: skip
    assert str(caught.value).startswith("evaluation.interpretability.detection.scorer: latent 0: ")
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)
