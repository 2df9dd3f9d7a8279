"""Margins of rounded scores and lowered thresholds, against float64 by hand."""

import math

import pytest
import torch

from saeflow.operators.gpu import margins


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_by_columns", [True, False])
@pytest.mark.parametrize(("n_rows", "d", "M"), [(1, 1, 1), (7, 48, 300), (500, 33, 260)])
def test_a_margin_is_the_product_of_two_norms(
    kind: torch.dtype, is_by_columns: bool, n_rows: int, d: int, M: int, path: str
) -> None:
    """Values in up to three pieces, and a column that is far from 0 before it is centred."""
    generator = torch.Generator().manual_seed(d)
    x, centre = torch.randn(n_rows, d, generator=generator), torch.randn(d, generator=generator)
    x[:, 0], centre[0] = x[:, 0] + 50, 50.0
    matrix = torch.randn(M, d, generator=generator).to(kind).to(path).t()
    if not is_by_columns:
        matrix = matrix.contiguous()
    found = margins.of_norms(x.to(path), centre.to(path), matrix, 0.25)
    off, entries = x.double() - centre.double(), matrix.cpu().double()
    expected = 0.25 * math.sqrt(float(off.square().sum())) * math.sqrt(float((entries**2).sum()))
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("of_log", [True, False])
@pytest.mark.parametrize("shape", [(), (1500,)])
def test_a_threshold_is_lowered_by_its_share_and_the_margin(
    of_log: bool, shape: tuple[int, ...], path: str
) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    margin = torch.tensor(0.01, device=path)
    found = margins.lowered(given.to(path), margin, 2**-7, 0.3, of_log=of_log)
    t = (given.double().exp() if of_log else given.double()) - 0.3
    assert (t < 0).any() or not shape
    expected = t - t.abs() / 128 - 0.01
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-6)
