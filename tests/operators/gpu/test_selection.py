"""Selections as lists of a fixed size, against sorted rows; on plain torch and on Triton's kernels."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from saeflow.operators.gpu import selection
from saeflow.operators.gpu.lists import NAN, OVERFLOW, Lists, spread

ODD = 4603  # columns: more than are looked at together, a multiple of no block
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scores_of_every_kind(dtype: torch.dtype, path: str) -> Tensor:
    """(6, ODD): continuous, one value throughout, many ties with -0, none positive, few finite, NaN."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, ODD, generator=generator)
    rows[1] = 0
    rows[2] = rows[2].round() * rows[2].sign()
    rows[2, ::3] = -0.0
    rows[3] = -rows[3].abs() - 0.1
    rows[4, 5:-2] = -torch.inf
    rows[5, 400] = torch.nan
    return rows.to(dtype).to(path)


def largest(row: np.ndarray, k: int) -> list[int]:
    """Independent reference: columns of the k largest by a stable sort; -inf and NaN are none."""
    order = np.argsort(-np.where(np.isnan(row), -np.inf, row), kind="stable")
    return sorted(int(i) for i in order[:k] if row[i] > -np.inf)


def entries(lists: Lists) -> list[list[int]]:
    """The columns of each row, once the rest of the list is known to be empty."""
    assert not lists.columns[~lists.real].any()
    assert not lists.values[~lists.real].any()
    rows = zip(lists.columns.tolist(), lists.counts.tolist(), strict=True)
    return [columns[:count] for columns, count in rows]


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_chooses_what_a_stable_sort_chooses(dtype: torch.dtype, path: str) -> None:
    scores = scores_of_every_kind(dtype, path)
    found = selection.topk(scores, torch.tensor(9, device=path), 16)
    assert entries(found) == [largest(row, 9) for row in scores.float().cpu().numpy()]
    assert found.status.tolist() == [0, 0, 0, 0, 0, NAN]
    taken = scores.float().gather(1, found.columns.long())
    assert torch.equal(found.values, taken.where(found.real, 0))


def test_a_k_of_its_own_for_each_row_and_one_that_does_not_fit(path: str) -> None:
    scores = scores_of_every_kind(torch.bfloat16, path)
    k = torch.tensor([0, 1, 16, 5, 12, 17], device=path)
    found = selection.topk(scores, k, 16)
    wanted = zip(scores.float().cpu().numpy(), k.tolist(), strict=True)
    assert entries(found) == [largest(row, n)[:16] for row, n in wanted]
    assert found.status.tolist() == [0, 0, 0, 0, 0, NAN | OVERFLOW]


def test_only_allowed_and_only_positive_entries_are_chosen(path: str) -> None:
    scores = scores_of_every_kind(torch.float32, path)
    allowed = torch.arange(ODD, device=path) % 40 == 3
    found = selection.topk(scores, 20, 32, allowed=allowed, is_positive=True)
    possible = scores.masked_fill(~allowed | (scores <= 0), -torch.inf)
    assert entries(found) == [largest(row, 20) for row in possible.cpu().numpy()]
    assert found.counts[1] == found.counts[3] == 0


def test_a_million_columns(path: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, 2**20 - 3, generator=generator).to(path, torch.bfloat16)
    found = selection.topk(scores, 3, 4)
    assert entries(found) == [largest(row, 3) for row in scores.float().cpu().numpy()]


def test_entries_above_a_threshold_and_the_first_of_those_that_do_not_fit(path: str) -> None:
    scores = scores_of_every_kind(torch.bfloat16, path)
    for threshold in (torch.tensor(0.5), torch.linspace(0, 2, ODD)):
        found = selection.above(scores, threshold.to(path), 128)
        hits = (scores.float() > threshold.to(path)).cpu()
        assert entries(found) == [row.nonzero()[:, 0].tolist()[:128] for row in hits]
        is_full = hits.sum(1) > 128
        assert ((found.status & OVERFLOW) > 0).tolist() == is_full.tolist()
        assert found.status[5] & NAN


def rows_of(lists: Lists) -> list[list[int]]:
    """Return the columns of each row, over all of its lists."""
    rows = torch.arange(len(lists.status), device=lists.columns.device)
    owners = lists.of_lists(rows).tolist()
    found: list[list[int]] = [[] for _ in lists.status]
    for owner, columns in zip(owners, entries(lists), strict=True):
        found[owner] += columns
    return found


def test_rows_with_more_entries_go_on_in_spare_lists(path: str) -> None:
    scores = scores_of_every_kind(torch.bfloat16, path)
    for threshold in (torch.tensor(0.5), torch.linspace(0, 2, ODD)):
        hits = (scores.float() > threshold.to(path)).cpu()
        expected = [row.nonzero()[:, 0].tolist() for row in hits]
        needed = sum((len(row) - 1) // 64 for row in expected if row)
        found = selection.above(scores, threshold.to(path), 64, needed + 2)
        assert rows_of(found) == expected
        assert found.status.tolist() == [0, 0, 0, 0, 0, NAN]
        assert not found.counts[-2:].any()
        taken = found.of_lists(scores.float()).gather(1, found.columns.long())
        assert torch.equal(found.values, taken.where(found.real, 0))
        short = selection.above(scores, threshold.to(path), 64, needed - 2)
        last = max(i for i, row in enumerate(expected) if len(row) > 64)
        assert rows_of(short)[:last] == expected[:last]
        assert ((short.status & OVERFLOW) > 0).tolist() == [i == last for i in range(6)]


@pytest.mark.parametrize(("dtype", "capacity"), [(torch.float32, 16), (torch.bfloat16, 64)])
@pytest.mark.parametrize("total", [0, 1, 60, 700, 100000])
def test_batch_topk_takes_the_largest_of_all_rows(
    total: int, dtype: torch.dtype, capacity: int, path: str
) -> None:
    """Rows are ordinary ones, one of many ties, one of -inf, one with most of the answer, one with NaN."""
    scores = torch.randn(6, 300, generator=torch.Generator().manual_seed(2)).to(dtype)
    scores[2] = scores[2].round()
    scores[3] = -torch.inf
    scores[4] += 3
    scores[5, 7:9] = torch.tensor([torch.nan, torch.inf])
    exact = scores.float().where(scores == scores, -torch.inf).reshape(-1).numpy()
    flat = [i for i in np.argsort(-exact, kind="stable")[:total] if exact[i] > -np.inf]
    expected = [sorted(int(i) % 300 for i in flat if i // 300 == row) for row in range(6)]
    number = torch.tensor(total, device=path)
    found = selection.batch_topk(scores.to(path), number, capacity, 100)
    assert rows_of(found) == expected
    assert found.status.tolist() == [0, 0, 0, 0, 0, NAN]
    taken = found.of_lists(scores.float().to(path)).gather(1, found.columns.long())
    assert torch.equal(found.values, taken.where(found.real, 0))


def test_batch_topk_of_ties_keeps_those_with_the_lower_flat_index(path: str) -> None:
    scores = torch.zeros(3, 40, device=path)
    scores[0, ::2], scores[1, ::3] = -1, -0.0
    for dtype in DTYPES:
        found = selection.batch_topk(scores.to(dtype), 50, 16, 8)
        assert rows_of(found) == [list(range(1, 40, 2)), list(range(30)), []]
        assert not found.status.any()


@pytest.mark.parametrize("spare", [0, 5, 40])
def test_spare_lists_go_to_rows_in_their_order(spare: int, path: str) -> None:
    found = torch.tensor([9, 4, 0, 23, 8, 5, 200], dtype=torch.int32, device=path)
    status = torch.tensor([0, NAN, 0, NAN, 0, OVERFLOW, 0], dtype=torch.int32, device=path)
    counts, new, spill = spread(found, status, 4, spare)
    expected, owners, is_cut = [min(n, 4) for n in found.tolist()], list(range(7)), []
    for row, left in enumerate(found.tolist()):
        more = range(4, left, 4)
        is_cut.append(len(more) > 7 + spare - len(owners))
        had = more[: 7 + spare - len(owners)]
        assert spill.parts[row] == 1 + len(had)
        assert not had or spill.first[row] == len(owners)
        owners += [row] * len(had)
        expected += [min(left - begin, 4) for begin in had]
    unused = [0] * (7 + spare - len(owners))
    assert spill.owners.tolist() == owners + unused
    assert counts.tolist() == expected + unused
    assert (new & OVERFLOW).tolist() == [OVERFLOW * cut for cut in is_cut]
    assert torch.equal(new & NAN, status & NAN)


def test_batch_topk_says_which_row_has_more_than_there_is_room_for(path: str) -> None:
    scores = torch.randn(3, 200, generator=torch.Generator().manual_seed(3))
    scores[1] += 10
    found = selection.batch_topk(scores.to(path), 40, 16, 1)
    assert found.status.tolist() == [0, OVERFLOW, 0]
    assert len(rows_of(found)[1]) == 32


def test_equal_scores_overflow_where_all_are_wanted_and_not_where_few_are(path: str) -> None:
    scores = torch.full((3, 300), -0.0, device=path)
    whole = {
        "above": selection.above(scores, torch.tensor(-1.0, device=path), 64, 2),
        "soft": selection.near_rank(scores, 2.0, 64, 0.1, 30),
        "simplex": selection.near_simplex(scores, 1.0, 64, 0.0),
    }
    for name, found in whole.items():
        assert (found.status & OVERFLOW).bool().all(), name
    exact = selection.topk(scores, 20, 32)  # of which the answer is as long as it may be
    assert entries(exact) == [list(range(20))] * 3
    of_all = selection.batch_topk(scores, 350, 64, 4)
    assert rows_of(of_all) == [list(range(300)), list(range(50)), []]
    assert not exact.status.any()
    assert not of_all.status.any()


def soft_threshold(row: np.ndarray, k: float, temperature: float) -> float:
    """Independent reference: b of the soft top-k by root finding, infinite for no or every entry."""
    t = (row - row.max()) / temperature
    if k in (0, len(row)):
        return np.inf if k == 0 else -np.inf
    total = lambda b: (np.exp(-abs(t - b)) / 2 - (t > b) * np.expm1(-abs(t - b))).sum() - k  # noqa: E731
    far = 40 + np.log(len(t))
    return row.max() + temperature * brentq(total, t.min() - far, t.max() + far, xtol=1e-12)


@pytest.mark.parametrize(("temperature", "error"), [(1e-4, 0.0), (1e-3, 0.004)])
def test_near_rank_has_every_entry_with_a_soft_mask(
    temperature: float, error: float, path: str
) -> None:
    """Also where scores are off by an error; and few others, where entries lie apart."""
    scores = scores_of_every_kind(torch.float32, path)
    k = torch.tensor([20.5, 0, 3, 2.2, 4, 7], device=path)
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)).to(path)
    rounded = scores + (2 * noise - 1) * error
    found = selection.near_rank(rounded, k, 256, temperature, 30, 2 * error)
    exact = scores.double().cpu().numpy()
    for row, got, of_row in zip(exact, entries(found), k.tolist(), strict=True):
        finite = np.flatnonzero(row > -np.inf)
        b = soft_threshold(row[finite], round(of_row, 6), temperature)
        assert set(finite[row[finite] > b - 30 * temperature].tolist()) <= set(got)
    assert found.status[1] == OVERFLOW
    assert not (found.status[[0, 2, 3, 4]]).any()
    if not error:
        assert found.counts[0] <= 26  # 2 ceil(k) are 42


@pytest.mark.parametrize("of_relu", [False, True])
def test_near_rank_of_a_k_up_to_all_entries(of_relu: bool, path: str) -> None:
    values = torch.linspace(-1, 3, 40)[
        torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ]
    k = torch.tensor([0, 0.3, 1, 20, 38.2, 39, 39.5, 40], device=path)
    scores = values.repeat(len(k), 1).to(path)
    found = selection.near_rank(scores, k, 64, 0.01, 30, of_relu=of_relu)
    row = (values.relu() if of_relu else values).double().numpy()
    for got, of_row in zip(entries(found), k.tolist(), strict=True):
        reached = row > soft_threshold(row, round(of_row, 6), 0.01) - 30 * 0.01
        assert set(np.flatnonzero(reached).tolist()) <= set(got)


def test_near_rank_solves_again_a_row_with_too_many_near_its_floor(path: str) -> None:
    scores = torch.zeros(1, ODD, device=path)  # groups alone would take all of them
    scores[0, 5::1024] = torch.tensor([50.0, 49, 48, 40, 25], device=path)
    for temperature, kept in ((1e-3, 3), (4.0, 4)):  # of the third, 48, less log 3 + 1 temperatures
        found = selection.near_rank(scores, 2.0, 16, temperature, 1)
        assert entries(found) == [list(range(5, ODD, 1024))[:kept]]
        assert not found.status.any()


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("is_known", [True, False])
def test_near_simplex_has_the_support(scale: float, is_known: bool, path: str) -> None:
    scores = scores_of_every_kind(torch.float32, path)[[0, 2, 3, 4]] * 3
    scores[3, :5] = torch.tensor([2e4, 2e4 + 0.25, 2e4 - 3, 1e4, 0], device=path)
    given = scale if is_known else torch.full((4,), scale, device=path)
    found = selection.near_simplex(scores, given, 1024, 0.0)
    for row, got in zip(scores.double().cpu().numpy(), entries(found), strict=True):
        finite = (row[row > -np.inf] - row.max()) * scale
        total = lambda tau, e=finite: (np.maximum(e - tau, 0) ** (1 / scale)).sum() - 1  # noqa: E731
        tau = brentq(total, -1.0, 0.0, xtol=1e-12)
        support = np.flatnonzero((row - row.max()) * scale > tau)
        assert set(support.tolist()) <= set(got)
        assert len(got) <= 2 * len(support) + 60


def test_near_simplex_solves_again_a_row_with_too_many_near_its_floor(path: str) -> None:
    scores = torch.full((1, 4000), -0.5, device=path)  # groups alone would take all of them
    scores[0, 17::40] = 0.1
    found = selection.near_simplex(scores, 1.0, 128, 0.0)
    assert entries(found) == [list(range(17, 4000, 40))]
    assert not found.status.any()


def test_near_simplex_of_some_columns_is_that_of_the_rest_at_minus_infinity(path: str) -> None:
    """A row whose largest entries are not allowed, one with too many near the floor of its groups, and any other."""
    scores = torch.randn(3, 4000, generator=torch.Generator().manual_seed(6))
    allowed = torch.rand(4000, generator=torch.Generator().manual_seed(7)) < 0.5
    scores[0, ~allowed] += 10
    scores[1] = -0.5
    scores[1, ::20] = 0.1
    found = selection.near_simplex(scores.to(path), 1.0, 128, 0.0, allowed.to(path))
    hidden = scores.masked_fill(~allowed, -torch.inf)
    expected = selection.near_simplex(hidden.to(path), 1.0, 128, 0.0)
    assert entries(found) == entries(expected)
    assert entries(found)[1] == [at for at in range(0, 4000, 20) if allowed[at]]
    assert not found.status.any()


def test_lists_keep_and_transpose_and_return_to_rows(path: str) -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(4)).to(path)
    lists = Lists.from_mask(scores, scores > 0.3, 32)
    kept = lists.keep(lists.values > 1, 4)
    hits = [row.nonzero()[:, 0].tolist() for row in (scores > 1).cpu()]
    assert entries(kept) == [row[:4] for row in hits]
    assert ((kept.status & OVERFLOW) > 0).tolist() == [len(row) > 4 for row in hits]
    order, offsets = lists.transposed
    dense = lists.dense()
    assert torch.equal(dense, scores.where(scores > 0.3, 0))
    for column in range(50):
        places = order[offsets[column] : offsets[column + 1]]
        rows = dense[:, column].nonzero()[:, 0]
        assert torch.equal(places // 32, rows)
        assert torch.equal(lists.values.view(-1)[places], dense[rows, column])
    assert offsets[-1] == lists.counts.sum()
    assert lists.with_values(lists.values * 2).transposed is lists.transposed
