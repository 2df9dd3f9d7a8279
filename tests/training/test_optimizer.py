"""Adam on every path, against torch's own, where a parameter has no gradient in some of the steps."""

import pytest
import torch

from saeflow.operators import native, sparse
from saeflow.saes import build
from saeflow.training.optimizer import Optimizer

from .conftest import D_IN, OPTIONS, config

RATE, STEPS = 1e-2, 4
RESTS = {"b_dec": (1, 2), "W_enc": (0,)}  # steps without a gradient
PATHS = {"native": (True, False), "torch": (False, False), "gpu": (False, True)}


@pytest.mark.parametrize("path", PATHS)
def test_a_parameter_counts_the_steps_that_it_takes(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_native, is_padded = PATHS[path]
    monkeypatch.setattr(native, "is_on", is_native)
    monkeypatch.setattr(sparse, "is_padded", is_padded)
    generator = torch.Generator().manual_seed(0)
    sae = build("topk", D_IN, 32, OPTIONS["topk"])
    sae.has_unit_norm = False
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    settings = config("topk", lr=RATE, grad_clip=None).training
    optimizer = Optimizer(sae, settings)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    adam = torch.optim.Adam(leaves.values(), lr=RATE, betas=settings.betas)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for step in range(STEPS):
        optimizer.tell_rates()
        for name, parameter in sae.named_parameters():
            parameter.grad = leaves[name].grad = None
            if step not in RESTS.get(name, ()):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                leaves[name].grad = parameter.grad.clone()
        optimizer.update(optimizer.measure(), torch.tensor(False))
        adam.step()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter, leaves[name], rtol=1e-5, atol=1e-6)
        assert int(optimizer.state[parameter]["step"]) == STEPS - len(RESTS.get(name, ()))
