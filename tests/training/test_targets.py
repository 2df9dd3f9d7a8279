"""Targets that are not the inputs: a transcoder of another width, and variants at equal width."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.errors import UserError
from saeflow.operators import SparseLatents, keep_topk, sparse, topk_sparse
from saeflow.saes import SAE, VARIANTS, Forward, load
from saeflow.saes.input_scale import KINDS
from saeflow.saes.topk import TopKOptions
from saeflow.training import train
from saeflow.training.run import Run
from saeflow.training.stacked import shape_of
from saeflow.training.trainer import advance

from .conftest import D_IN, FEATURES, RUNTIME, Samples, config

D_OUT, D_SAE = 10, 32
QUIET = {**RUNTIME, "checkpoint_every_s": 1e9}


class Transcoder(SAE):
    """y_hat = TopK_k(relu(x W_enc + b_enc)) W_dec + b_dec (Dunefsky et al. 2024, arXiv:2406.11944, with TopK)."""

    Options = TopKOptions

    def __init__(self, d_in: int, d_sae: int, options: TopKOptions) -> None:
        super().__init__(d_in, d_sae, d_out=D_OUT)
        self.k, self.auxk_weight = options.k, options.auxk_weight

    @property
    def centre(self) -> Tensor:
        return self.b_enc.new_zeros(self.d_in)

    @property
    def is_sparse(self) -> bool:
        return True

    @property
    def most(self) -> int:
        return self.k

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return keep_topk(pre_acts.relu(), self.k)

    def select(
        self, pre_acts: Tensor, condition: Tensor | None, margin: Tensor | float
    ) -> SparseLatents:
        return self.largest_of_rows(topk_sparse(pre_acts, self.k, self.room), self.k)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        return super().losses(fwd, dead) | {"auxk": self.auxk_weight * self.auxk(fwd, dead)}


class Moments:
    """Width, scale and mean of some rows."""

    def __init__(self, rows: Tensor) -> None:
        self.d_in, self.mean = rows.shape[1], rows.double().mean(0)
        self.scale = float(rows.double().square().mean().sqrt())


class Pairs(Samples):
    """The samples, and as targets the same features along other directions, in another unit and around another mean."""

    def __init__(self, d_out: int) -> None:
        super().__init__(scale=3.0)
        drawn = torch.randn(FEATURES, d_out, generator=torch.Generator().manual_seed(6))
        self.written = 5 * drawn / drawn.norm(dim=1, keepdim=True)
        many = self.pair(4096, 99_998)
        self.scale, self.mean = Moments(many.x).scale, Moments(many.x).mean
        self.targets = Moments(many.target)

    def pair(self, batch_size: int, number: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 + number)
        chosen = torch.rand(batch_size, FEATURES, generator=generator).topk(3).indices
        values = 1 + torch.rand(batch_size, 3, 1, generator=generator)
        x, y = ((values * of[chosen]).sum(1) for of in (self.features, self.written))
        return Batch(3 * x + 1, y + 2)

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Batch]:
        for number in itertools.count(start_batch):
            yield self.pair(batch_size, number)


@pytest.fixture
def transcoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "topk", Transcoder)


def by_definition(run: Run, batch: Batch, dead: Tensor) -> dict[str, Tensor]:
    """The gradients of a transcoder's loss in float64: mean |y - y_hat|^2, and AuxK of its residual."""
    weights = {n: p.detach().double().requires_grad_() for n, p in run.sae.named_parameters()}
    W_enc, b_enc, W_dec, b_dec = (weights[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    x, y = batch.x.double(), batch.target.double()
    acts = (x @ W_enc + b_enc).relu()
    z = torch.where(acts >= acts.topk(3).values[:, -1:], acts, 0)
    error = y - (z @ W_dec + b_dec)
    of_dead = acts[:, dead]
    best = of_dead.topk(min(D_OUT // 2, of_dead.shape[1])).values[:, -1:]
    e_hat = torch.where(of_dead >= best, of_dead, 0) @ W_dec[dead]
    residual = error.detach()
    variance = (residual - residual.mean(0)).square().sum()
    auxk = (residual - e_hat).square().sum() / variance
    (error.square().sum(1).mean() + auxk / 32).backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


@pytest.mark.usefixtures("transcoder")
@pytest.mark.parametrize("path", ["dense", "sparse", "as on a GPU"])
def test_gradients_are_those_of_the_definition(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Pairs(D_OUT), config("topk", input_scale="centred"), QUIET, tmp_path)
    monkeypatch.setattr(sparse, "is_padded", path == "as on a GPU")
    batch, dead = next(run.batches()), torch.zeros(D_SAE, dtype=torch.bool)
    dead[:9] = True
    run.sae.settle_dead(9)
    with torch.no_grad():
        run.sae.b_enc.add_(0.1)
    fwd = run.sae.run(batch, is_sparse=path != "dense")
    losses = run.sae.losses(fwd, dead)
    sum(losses.values()).backward()
    assert fwd.x_hat.shape == batch.target.shape
    assert float(losses["auxk"].detach()) > 0
    expected = by_definition(run, batch, dead)
    assert set(expected) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    for name, parameter in run.sae.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].float(), rtol=1e-4, atol=1e-5, msg=name
        )


@pytest.mark.usefixtures("transcoder")
def test_a_transcoder_of_another_width_trains_and_takes_raw_activations(tmp_path: Path) -> None:
    store = Pairs(D_OUT)
    train(store, config("topk", steps=600, input_scale="unit"), QUIET, tmp_path)
    sae = load(tmp_path)
    held_out = store.pair(1024, 10_000_000)
    error = (held_out.target - sae(held_out.x)).square().sum()
    whole = (held_out.target - held_out.target.mean(0)).square().sum()
    assert float((error / whole).detach()) < 0.5  # of the mean: 1
    assert sae.encode(held_out.x).shape == (1024, D_SAE)


FREE = [name for name, variant in VARIANTS.items() if variant.takes_own_targets]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", FREE)
def test_a_saved_sae_maps_raw_inputs_to_raw_targets(
    variant: str, kind: str, tmp_path: Path
) -> None:
    """At equal width every variant that may have targets of its own keeps its encoder, `b_dec` as centre included."""
    store = Pairs(D_IN)
    run = Run(store, config(variant, steps=12, input_scale=kind), QUIET, tmp_path)
    advance([run])
    sae, raw = run.sae.eval(), store.pair(256, 10_000_000)
    scaled = run.scaled(raw)
    latents, out = sae.encode(scaled.x), sae(scaled.x)
    shift = 0 if run.targets.shift is None else run.targets.shift
    run.finish()
    saved = load(tmp_path)
    unit = run.targets.scale
    same = torch.isclose(saved.encode(raw.x), unit * latents, rtol=1e-3, atol=1e-4 * unit).all(1)
    assert float(same.double().mean()) > 0.98  # rounding may move a latent across a threshold
    torch.testing.assert_close(
        saved(raw.x)[same], (unit * out + shift)[same], rtol=1e-3, atol=1e-3 * unit
    )


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(FREE)))
def test_a_variant_with_more_readers_of_the_input_refuses_targets(
    variant: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"saes.{variant}.variant: .*targets"):
        Run(Pairs(D_IN), config(variant), QUIET, tmp_path)


def test_targets_of_a_width_that_the_sae_does_not_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"saes.topk: expected targets of width 16, found 10"):
        Run(Pairs(D_OUT), config("topk"), QUIET, tmp_path)


def test_one_tensor_serves_as_input_and_target(tmp_path: Path) -> None:
    run = Run(Samples(), config("topk"), QUIET, tmp_path)
    batch = next(run.raw_batches())
    assert batch.target is batch.x
    scaled = run.scaled(batch.map(run.ranks.own_rows))
    assert scaled.target is scaled.x
    assert run.targets is run.inputs
    assert run.sae.run(scaled).target is scaled.x


@pytest.mark.usefixtures("transcoder")
def test_a_transcoder_steps_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "is_padded", True)
    assert shape_of(Run(Pairs(D_OUT), config("topk"), QUIET, tmp_path)) is None
