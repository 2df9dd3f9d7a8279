"""Schedules reach their target, along hand-worked values."""

import pytest

from saeflow.errors import UserError
from saeflow.saes.schedules import make_schedule


def schedule(kind: str, start: float = 100, target: float = 20, **more: float) -> list[float]:
    params = {"kind": kind, "from": start, "until": 0.5, **more}
    made = make_schedule("k", target, params, 1, 1000)
    return [made(step, 20) for step in (0, 5, 9, 10, 19)]


def test_linear_moves_by_equal_differences() -> None:
    assert schedule("linear") == pytest.approx([100, 60, 28, 20, 20])


def test_cosine_is_half_way_in_the_middle_and_flat_at_the_ends() -> None:
    first, middle, late, end, last = schedule("cosine")
    assert (first, middle, end, last) == pytest.approx((100, 60, 20, 20))
    assert 20 < late < 28


def test_exponential_moves_by_equal_ratios() -> None:
    assert schedule("exponential", 80, 20)[:2] == pytest.approx([80, 40])
    assert schedule("exponential", 80, 20)[3:] == pytest.approx([20, 20])


def test_step_jumps_at_equal_intervals() -> None:
    made = make_schedule("k", 20, {"kind": "step", "from": 100, "until": 1.0, "steps": 4}, 1, 1000)
    assert [made(step, 8) for step in range(8)] == [100, 100, 80, 80, 60, 60, 40, 40]
    assert made(8, 8) == 20


def test_constant_is_at_its_target_from_the_first_step() -> None:
    made = make_schedule("k", 20, {"kind": "constant"}, 1, 1000)
    assert [made(0, 10), made(9, 10)] == [20, 20]


@pytest.mark.parametrize(
    "params",
    [
        {"kind": "zigzag"},
        {},
        {"kind": "linear"},
        {"kind": "linear", "from": 0, "until": 0.5},
        {"kind": "linear", "from": 1001, "until": 0.5},
        {"kind": "constant", "from": 3},
        {"kind": "step", "from": 10, "until": 0.5},
        {"kind": "step", "from": 10, "until": 0.5, "steps": 0},
        {"kind": "linear", "from": 10, "until": 1.5},
        {"kind": "linear", "from": 10, "until": -0.1},
        {"kind": "linear", "from": "10", "until": 0.5},
        {"kind": "linear", "from": float("nan"), "until": 0.5},
    ],
)
def test_a_wrong_schedule_is_one_line(params: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"^k_schedule(\.\w+)?: "):
        make_schedule("k", 20, params, 1, 1000)


def test_an_exponential_schedule_from_zero_is_refused() -> None:
    params = {"kind": "exponential", "from": 0, "until": 0.5}
    with pytest.raises(UserError, match="above 0"):
        make_schedule("l1", 2.0, params, 0, 1000)
