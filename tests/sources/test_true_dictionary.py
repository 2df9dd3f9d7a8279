"""The true dictionary has unit rows and the coherence that was asked for."""

import numpy as np
import pytest

from saeflow.errors import UserError
from saeflow.sources.true_dictionary import mean_max_cosine, true_dictionary


def brute_force(features: np.ndarray) -> float:
    """Mean over features of the largest |cosine| to another, pair by pair."""
    maxima = [
        max(abs(float(a @ b)) for j, b in enumerate(features) if i != j)
        for i, a in enumerate(features)
    ]
    return float(np.mean(maxima))


@pytest.mark.parametrize("coherence", [None, 0.25, 0.5, 0.8])
def test_coherence_is_the_mean_largest_cosine(coherence: float | None) -> None:
    features = true_dictionary(100, 32, coherence, np.random.default_rng(0))
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    assert mean_max_cosine(features) == pytest.approx(brute_force(features), abs=1e-6)
    if coherence is None:
        assert (
            0.35 < brute_force(features) < 0.5
        )  # about sqrt(2 log 100 / 32), less as rows are few
    elif coherence < 0.4:
        assert 0.7 * coherence < brute_force(features) <= coherence + 1e-6
    else:
        assert brute_force(features) == pytest.approx(coherence, abs=1e-3)


def test_many_rows_are_compared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    features = true_dictionary(100, 32, None, np.random.default_rng(1))
    monkeypatch.setattr("saeflow.sources.true_dictionary._ROWS_AT_ONCE", 7)
    assert mean_max_cosine(features) == pytest.approx(brute_force(features), abs=1e-6)


def test_directions_without_room_are_refused() -> None:
    with pytest.raises(UserError, match=r"64 features in 8 dimensions .* found 0\.1\."):
        true_dictionary(64, 8, 0.1, np.random.default_rng(0))


def test_fewer_features_than_dimensions_can_be_nearly_orthogonal() -> None:
    features = true_dictionary(16, 32, 0.02, np.random.default_rng(0))
    assert brute_force(features) <= 0.02 + 1e-6
