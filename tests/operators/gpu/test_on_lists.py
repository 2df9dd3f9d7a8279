"""Row operators on lists, against the operators of whole rows in float64, values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saeflow.operators import entmax as entmax_of_rows
from saeflow.operators import jumprelu, step
from saeflow.operators import soft_topk as soft_topk_of_rows
from saeflow.operators import sparsemax as sparsemax_of_rows
from saeflow.operators.gpu import on_lists
from saeflow.operators.gpu.lists import Lists

COUNTS = [32, 20, 7, 1, 0]
KS = [3.5, 20.0, 0.0, 0.4, 0.0]
Operator = Callable[..., Tensor]


def lists_of_every_kind(path: str) -> tuple[Tensor, Tensor]:
    """(5, 32) values, 0 where not real: any, ties with -0, far apart, one entry, none; and counts."""
    values = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    values[1] = (values[1] * 2).round() / 2
    values[1, :4] = -0.0
    values[2] *= 1e3
    counts = torch.tensor(COUNTS, dtype=torch.int32)
    return values.masked_fill(torch.arange(32) >= counts[:, None], 0).to(path), counts.to(path)


def compare(of_lists: Operator, of_rows: Operator, others: list[Tensor], path: str) -> None:
    """Values, and the gradients of the values and of `others`, which each row has one of."""
    values, counts = lists_of_every_kind(path)
    weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(path)
    leaves = [values.requires_grad_(), *(t.to(path).requires_grad_() for t in others)]
    got = of_lists(leaves[0], counts, *leaves[1:])
    assert got.dtype == torch.float32
    grads = torch.autograd.grad((got * weights).sum(), leaves)
    for row, count in enumerate(COUNTS):
        assert not got[row, count:].any()
        assert not grads[0][row, count:].any()
        assert all(grad.isfinite().all() for grad in grads)
        if count == 0:
            continue
        exact = values.detach()[row, :count].double().cpu().requires_grad_()
        own = [t.detach()[row].double().cpu().requires_grad_() for t in leaves[1:]]
        expected = of_rows(exact, *own)
        torch.testing.assert_close(got[row, :count].double().cpu(), expected, rtol=1e-5, atol=1e-6)
        loss = (expected * weights[row, :count].double().cpu()).sum()
        for ours, reference in zip(grads, torch.autograd.grad(loss, [exact, *own]), strict=True):
            mine = ours[row].reshape(-1)[: reference.numel()].view_as(reference)
            torch.testing.assert_close(mine.double().cpu(), reference, rtol=2e-4, atol=1e-5)


def test_sparsemax(path: str) -> None:
    compare(on_lists.sparsemax, sparsemax_of_rows, [], path)


def test_sparsemax_times_the_size_of_each_row(path: str) -> None:
    compare(
        on_lists.sparsemax,
        lambda row, size: size * sparsemax_of_rows(row),
        [torch.tensor([2.5, 0.3, 1e3, 1.0, 4.0])],
        path,
    )


def test_a_row_of_size_0_has_no_gradient(path: str) -> None:
    values, counts = lists_of_every_kind(path)
    sizes = torch.tensor([0.0, 1, 0, 1, 1], device=path, requires_grad=True)
    leaves = [values.requires_grad_(), sizes]
    found = on_lists.sparsemax(values, counts, sizes)
    of_values, of_sizes = torch.autograd.grad((found * values.detach()).sum(), leaves)
    assert not found[0].any()
    assert not of_values[0].any()
    assert of_sizes[0] == 0 != of_sizes[1]


@pytest.mark.parametrize("alpha", [1.5, 1.2, 2.0])
def test_entmax_of_a_known_alpha(alpha: float, path: str) -> None:
    compare(
        lambda values, counts: on_lists.entmax(values, counts, alpha),
        lambda row: entmax_of_rows(row, alpha),
        [],
        path,
    )


def test_entmax_of_an_alpha_for_each_row_with_its_gradient(path: str) -> None:
    compare(on_lists.entmax, entmax_of_rows, [torch.tensor([1.7, 1.3, 1.5, 1.9, 1.2])], path)


@pytest.mark.parametrize("temperature", [1.0, 0.03])
def test_soft_latents_with_the_gradient_of_k(temperature: float, path: str) -> None:
    compare(
        lambda values, counts, k: on_lists.soft(values, counts, k, temperature),
        lambda row, k: row.relu() * soft_topk_of_rows(row.relu(), k, temperature),
        [torch.tensor(KS)],
        path,
    )


def test_soft_masks_of_near_entries_at_the_papers_temperature(path: str) -> None:
    """Values 1e-4 apart, as far as the mask is wide, around 4."""
    steps = torch.arange(64) * 1e-4
    values = (4 - steps).repeat(2, 1).to(path)
    counts = torch.tensor([64, 64], dtype=torch.int32, device=path)
    k = torch.tensor([7.3, 30.0], device=path)
    mask = on_lists.soft(values, counts, k, torch.tensor(1e-4, device=path)) / values
    expected = soft_topk_of_rows(values.double().cpu(), k.double().cpu(), 1e-4)
    torch.testing.assert_close(mask.double().cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mask.sum(1), k, rtol=1e-5, atol=0)


def test_a_soft_mask_that_reaches_as_far_as_float32_does(path: str) -> None:
    """Entries from 0 to 120 temperatures below the threshold: masks of the dense operator, and its zeros."""
    values = 2.0**8 + torch.cat((torch.ones(4), -torch.arange(124.0))).view(1, -1).to(path)
    counts = torch.tensor([128], dtype=torch.int32, device=path)
    k = torch.tensor([4.0], device=path)
    found = on_lists.soft(values, counts, k, 1.0, 103.0)
    exact = values.double().cpu()
    expected = exact * soft_topk_of_rows(exact, k.double().cpu(), 1.0, reach=103.0)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-4, atol=1e-42)
    near = on_lists.soft(values, counts, k, 1.0, 30.0)
    torch.testing.assert_close(near, found, rtol=0, atol=3e-11)
    assert not near[expected.to(near) < 1e-12].any()
    assert int((found > 0).sum()) > int((near > 0).sum()) + 60


def test_a_k_above_the_number_of_entries_takes_all(path: str) -> None:
    values = torch.tensor([[3.0, 1, 2, 0]], device=path)
    counts = torch.tensor([3], dtype=torch.int32, device=path)
    latents = on_lists.soft(values, counts, torch.tensor([5.0], device=path), 0.1)
    assert latents.tolist() == values.tolist()


D_SAE = 12


def lists_near_thresholds(path: str) -> tuple[Lists, Tensor]:
    """(4, 16) entries of 12 columns: any; ties with thresholds of 1; a spare list's row; no entry. And thresholds (12,)."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(4, D_SAE, generator=generator) < 0.7
    mask[3], mask[:, 5] = False, False  # no entry of a row, and of a column
    dense = torch.randn(4, D_SAE, generator=generator)
    theta = 0.3 * torch.rand(D_SAE, generator=generator) + 0.1
    theta[::3] = 1.0  # which is its log's exponential in any arithmetic
    dense[1] = torch.where(theta == 1, theta, theta + 0.01)
    dense[2, ::2] = -0.0
    lists = Lists.from_mask(dense.to(path), mask.to(path), 4, spare=6)
    return lists, theta.to(path)


def gradients_on_lists(
    operator: Operator, lists: Lists, others: list[Tensor], at: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of an operator of values, and the gradients of a weighted sum of them."""
    leaves = [t.detach().requires_grad_() for t in (lists.values, *others)]
    found = operator(lists.with_values(leaves[0]), *leaves[1:])
    outputs = list(found) if isinstance(found, tuple) else [found]
    loss = torch.stack([(o * w).sum() for o, w in zip(outputs, at, strict=True)]).sum()
    return [o.detach() for o in outputs], list(torch.autograd.grad(loss, leaves))


def compare_with_rows(
    operator: Operator, by_rows: Operator, others: Callable[[Tensor], list[Tensor]], path: str
) -> None:
    """Values and gradients against autograd of the whole rows in float64, at the entries that are real."""
    lists, theta = lists_near_thresholds(path)
    of_columns = others(theta)
    real, column = lists.real, lists.columns.long()
    exact = [t.double() for t in of_columns]
    out = operator(lists, *of_columns)
    shapes = [part.shape for part in (out if isinstance(out, tuple) else (out,))]
    generator = torch.Generator().manual_seed(1)
    at = [torch.randn(shape, generator=generator).to(path) for shape in shapes]

    def of_entries(own: Lists, *vectors: Tensor) -> object:
        out = by_rows(own.values.double(), *(v[column] for v in vectors))
        kept = [p.where(real, 0) for p in (out if isinstance(out, tuple) else (out,))]
        return tuple(p if shape else p.sum() for p, shape in zip(kept, shapes, strict=True))

    found, grads = gradients_on_lists(operator, lists, of_columns, at)
    expected, references = gradients_on_lists(of_entries, lists, exact, at)
    for ours, reference in zip((*found, *grads), (*expected, *references), strict=True):
        torch.testing.assert_close(ours.double(), reference.double(), rtol=1e-5, atol=1e-6)


def test_jumprelu_and_its_number_of_latents(path: str) -> None:
    compare_with_rows(
        lambda lists, logs: on_lists.jumprelu(lists, logs, 0.5),
        lambda a, logs: (jumprelu(a, logs.exp(), 0.5), step(a, logs.exp(), 0.5)),
        lambda theta: [theta.log()],
        path,
    )


def test_gated_with_its_gate_and_its_sum(path: str) -> None:
    def by_rows(a: Tensor, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor) -> tuple[Tensor, ...]:
        return ((a - b_enc) * r_mag.exp() + b_mag).relu() * (a > 0), a.relu(), a.relu()

    compare_with_rows(
        on_lists.gated, by_rows, lambda theta: [theta - 0.5, theta.flip(0), 0.2 - theta], path
    )
