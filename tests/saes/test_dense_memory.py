"""Dense steps on a GPU hold few tensors of the size of the scores; counted in bytes, after every operation."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from saeflow.batch import Batch
from saeflow.operators import native, rows, sparse
from saeflow.saes import SAE, build

from .test_variants import CASES

B, D_IN, D_SAE = 64, 4, 8192  # all else is small beside (B, D_SAE)
INTERPRETED = 32, 2, 2048
"""The same of the hot soft top-k, whose kernels Triton interprets."""


class Held(TorchDispatchMode):
    """Adds up, after every operation, the bytes of what operations made and what is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_flatten(args)[0] if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.made[StorageWeakRef(storage)] = storage.nbytes()
        self.made = {ref: size for ref, size in self.made.items() if not ref.expired()}
        self.most = max(self.most, sum(self.made.values()))
        return out


def peak(step: Callable[[], object], b: int = B, d_sae: int = D_SAE) -> float:
    """Return the most that a step held at once of what it made, in float32 tensors (b, d_sae)."""
    with Held() as held:
        step()
    return held.most / (b * d_sae * 4)


def made(variant: str, d_in: int, d_sae: int, position: float, **changes: Any) -> SAE:
    options = next(options for name, options in CASES.values() if name == variant)
    sae = build(variant, d_in, d_sae, {**options, **changes}).train()
    generator = torch.Generator().manual_seed(0)
    sae.initialise(Batch.of(torch.randn(64, d_in, generator=generator)), generator)
    sae.begin_step(round(position * 100), 100)
    return sae


DENSE: dict[str, tuple[str, float, dict[str, Any]]] = {
    "relu": ("relu", 0.2, {}),
    "p_anneal, p 1": ("p_anneal", 0.1, {}),
    "p_anneal, p below 1": ("p_anneal", 0.9, {}),
    "jumprelu": ("jumprelu", 0.2, {}),
    "jumprelu of dictionary_learning": ("jumprelu", 0.2, {"form": "dictionary_learning"}),
    "gated": ("gated", 0.2, {}),
    "soft_topk, hot": ("soft_topk", 0.2, {"alpha": 1.0, "estimator_width": 8}),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", DENSE)
def test_a_dense_step_holds_three_tensors_of_its_scores_size(
    case: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_on", False)
    monkeypatch.setattr(sparse, "is_padded", True)
    variant, position, changes = DENSE[case]
    b, d_in, d_sae = INTERPRETED if variant == "soft_topk" else (B, D_IN, D_SAE)
    monkeypatch.setitem(rows.BLOCK, "cpu", d_sae)  # a row at a time
    if variant == "soft_topk":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # there is no plain form
    sae = made(variant, d_in, d_sae, position, **changes)
    x = torch.randn(b, d_in, generator=torch.Generator().manual_seed(1))
    dead = torch.zeros(d_sae, dtype=torch.bool)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            fwd = sae.run(Batch.of(x), is_sparse=False)
        losses = sae.losses(fwd, dead)
        fwd.forget_scores(with_latents=sae.forgets_latents)
        gc.collect()  # Triton's interpreter leaves cycles that hold tensors
        torch.stack(list(losses.values())).sum().backward()
        sae.end_step(fwd)

    step()  # gradients and copies of weights are there from now on
    held = peak(step, b, d_sae)
    # The gate's latents are decoded beside the others: two tensors and their gradients, and the scores.
    most = 5 if variant == "gated" else 3
    most = most / 2 if precision == "bf16" else most
    assert 1 < held < most + 0.2, held


def test_what_is_held_is_counted() -> None:
    def step() -> None:
        first = torch.ones(B, D_SAE)
        second = first.half()
        first.view(-1).mul_(2)  # a view, in place
        del first
        torch.cat((second.float(), torch.ones(1, D_SAE))).exp()

    assert peak(step) == pytest.approx(0.5 + 2 * (1 + 1 / B), abs=0.01)

    def one() -> None:
        for _ in range(3):
            torch.ones(B, D_SAE)

    assert peak(one) == pytest.approx(1)
