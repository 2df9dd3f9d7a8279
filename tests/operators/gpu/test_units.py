"""Unit rows and their norms, against torch's normalize and autograd in float64."""

import pytest
import torch
from torch.nn.functional import normalize

from saeflow.operators.gpu import units


@pytest.mark.parametrize("is_centred", [True, False])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 1), (21, 600), (3, 9000)])
def test_unit_rows_and_norms_with_the_gradients_of_centre_and_scale(
    is_centred: bool, n_rows: int, width: int, path: str
) -> None:
    """Rows of two or more programs; one at its centre, whose norm is 0 and has no gradient."""
    generator = torch.Generator().manual_seed(width)
    x, at_unit = torch.randn(2, n_rows, width, generator=generator)
    centre, scale = torch.randn(width, generator=generator), torch.tensor(1.7)
    if n_rows > 1:
        x[1] = centre if is_centred else 0
        at_unit[1] *= 1e-12  # where the slope is 1e12
    at_norm = torch.randn(n_rows, generator=generator)
    single = [t.to(path).requires_grad_() for t in (scale, centre)]
    exact = [t.double().requires_grad_() for t in (scale, centre)]
    unit, norm = units.unit_rows(x.to(path), single[1] if is_centred else None, single[0])
    off = x.double() - exact[1] if is_centred else x.double()
    norms, expected = off.norm(dim=1), normalize(off, eps=1e-12) * exact[0]
    torch.testing.assert_close(unit.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.cpu().double(), norms, rtol=1e-5, atol=1e-6)
    loss = (unit * at_unit.to(path)).sum() + (norm * at_norm.to(path)).sum()
    reference = (expected * at_unit).sum() + (norms * at_norm).sum()
    found = torch.autograd.grad(loss, single[: 1 + is_centred])
    theirs = torch.autograd.grad(reference, exact[: 1 + is_centred])
    for ours, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours.cpu().double(), other, rtol=1e-5, atol=1e-5)
