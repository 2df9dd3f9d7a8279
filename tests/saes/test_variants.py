"""Every variant: both paths agree with plain autograd, saving keeps what it does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeflow.batch import Batch
from saeflow.config.schema import params_schema
from saeflow.config.variants import with_defaults
from saeflow.errors import UserError
from saeflow.saes import SAE, VARIANTS, build, load, read_config, save
from saeflow.saes.adaptive_k import AdaptiveK
from saeflow.saes.top_afa import reaching

D_IN, D_SAE, BATCH = 12, 40, 32
CONSTANT = {"kind": "constant"}
TOPK = {"k": 5, "k_schedule": CONSTANT, "auxk_weight": 1 / 32}
ATTENTION = {
    "architecture": "shared", "activation": "weights", "query": "linear", "score_scale": 2.0,
    "max_rate": None, "loss": "squared", "l1": 0.0, "l1_schedule": CONSTANT,
}  # fmt: skip
SOFT = {
    **TOPK, "k_max": 12.0, "estimator_width": 8, "alpha": 0.02, "alpha_schedule": CONSTANT,
    "budget_weight": 1.0, "hard_fraction": 0.2, "hard_phase": "full",
}  # fmt: skip
ADAPTIVE = {
    "form": "per_token", "complexity": "labels", "k_min": 2, "k_max": 12, "steepness": 6.0,
    "phase_ratio": 0.9, "probe_weight": 0.05, "l1": 0.005, "alpha": None, "auxk_weight": 1 / 32,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {"l1": 0.3, "l1_schedule": CONSTANT}),
    "relu-norm_weighted": (
        "relu", {"l1": 0.3, "l1_schedule": CONSTANT, "loss": "norm_weighted", "initialisation": "unit"}
    ),
    "topk": ("topk", TOPK),
    "abs_topk": ("abs_topk", TOPK),
    "abs_topk-powers": ("abs_topk", {**TOPK, "budgets": "powers"}),
    "topk-all": ("topk", {**TOPK, "budgets": "all"}),
    "topk-powers": ("topk", {**TOPK, "budgets": "powers"}),
    "batch_topk-pool": ("batch_topk", {**TOPK, "threshold_start_step": 0, "pool": 2.6}),
    "top_afa": ("top_afa", {"afa_weight": 0.3, "auxk_weight": 1 / 32}),
    "matching_pursuit": (
        "matching_pursuit",
        {"residual_threshold": 0.5, "max_iterations": 5, "stop_on_duplicate_support": True},
    ),
    "matching_pursuit-repeats": (
        "matching_pursuit",
        {"residual_threshold": 0.2, "max_iterations": 9, "stop_on_duplicate_support": False},
    ),
    "batch_topk": ("batch_topk", {**TOPK, "threshold_start_step": 0}),
    "feature_choice": ("feature_choice", {**TOPK, "threshold_start_step": 0}),
    "feature_choice-uniform": (
        "feature_choice", {**TOPK, "allocation": "uniform", "mutual_fraction": 0, "threshold_start_step": 0}
    ),
    "feature_choice-mutual": ("feature_choice", {**TOPK, "mutual_fraction": 0.9}),
    "matryoshka": (
        "matryoshka",
        {**TOPK, "threshold_start_step": 0, "groups": {"fractions": [0.125, 0.25]}},
    ),
    "matryoshka-twice": (
        "matryoshka",
        {**TOPK, "threshold_start_step": 0, "groups": {"fractions": [0.125, 0.25]}, "group_mean": "twice"},
    ),
    "gated": ("gated", {"l1": 0.3, "l1_schedule": CONSTANT}),
    "jumprelu": (
        "jumprelu",
        {
            "l0_weight": 0.3, "l0_schedule": CONSTANT, "target_l0": None,
            "target_schedule": CONSTANT, "threshold": 0.3, "bandwidth": 0.25,
        },
    ),
    "jumprelu-target": (
        "jumprelu",
        {
            "l0_weight": 0.3, "l0_schedule": CONSTANT, "target_l0": 4.0,
            "target_schedule": CONSTANT, "threshold": 0.3, "bandwidth": 0.25,
        },
    ),
    "jumprelu-direct": (
        "jumprelu",
        {
            "l0_weight": 0.3, "l0_schedule": CONSTANT, "target_l0": 4.0, "target_schedule": CONSTANT,
            "threshold": 0.3, "bandwidth": 0.25, "form": "dictionary_learning",
        },
    ),
    "p_anneal": (
        "p_anneal",
        {"l1": 0.3, "l1_schedule": CONSTANT, "p_end": 0.5, "p_updates": 5, "anneal_start": 0.2},
    ),
    "soft_topk": ("soft_topk", SOFT),
    "soft_topk-wide": ("soft_topk", {**SOFT, "estimator_width": None, "alpha": 0.5}),
    "soft_topk-reach": ("soft_topk", {**SOFT, "reach": 103}),
    "soft_topk-hard": ("soft_topk", {**SOFT, "hard_fraction": 0.9}),
    "soft_topk-decoder": ("soft_topk", {**SOFT, "hard_fraction": 0.9, "hard_phase": "decoder"}),
    "adaptive_k": ("adaptive_k", ADAPTIVE),
    "adaptive_k-context": ("adaptive_k", {**ADAPTIVE, "form": "per_context"}),
    "adaptive_k-soft": (
        "adaptive_k", {**ADAPTIVE, "form": "soft", "alpha": 0.02, "phase_ratio": 0.0}
    ),
    "sparsemax": ("sparsemax", ATTENTION),
    "sparsemax-scores": (
        "sparsemax",
        {**ATTENTION, "activation": "scores", "query": "identity", "loss": "norm_weighted"},
    ),
    "sparsemax-zeroed": (
        "sparsemax", {**ATTENTION, "activation": "scores", "max_rate": 0.1, "rate_mask": "zeroed"}
    ),
    "sparsemax-relu": ("sparsemax", {**ATTENTION, "activation": "relu", "l1": 0.3}),
    "sparsemax-mlp": (
        "sparsemax",
        {**ATTENTION, "architecture": "mlp", "query": "identity", "score_scale": "learned"},
    ),
    "entmax": ("entmax", {**ATTENTION, "alpha": 1.5, "is_alpha_learned": False}),
    "entmax-learned": (
        "entmax", {**ATTENTION, "alpha": 1.4, "is_alpha_learned": True, "score_scale": "1/sqrt(d)"}
    ),
}  # fmt: skip
HAS_UNIT_NORM = [name for name, (variant, _) in CASES.items() if VARIANTS[variant].has_unit_norm]
STEP, STEPS = 7, 10

Named = dict[str, Tensor]


def squared(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x - x_hat).square().sum(1).mean()


def linear(x: Tensor, p: Named) -> Tensor:
    return (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]


def auxk(
    x: Tensor, x_hat: Tensor, pre_acts: Tensor, p: Named, dead: Tensor, *, is_signed: bool = False
) -> Tensor:
    """The normalised error of the residual, from the largest dead pre-activations."""
    of_dead = pre_acts[:, dead] if is_signed else F.relu(pre_acts[:, dead])
    chosen = of_dead.abs().topk(D_IN // 2, dim=1).indices
    rebuilt = torch.zeros_like(of_dead).scatter(1, chosen, of_dead.gather(1, chosen))
    fixed = (x - x_hat).detach()
    error = (fixed - rebuilt @ p["W_dec"][dead]).square().sum()
    return error / (fixed - fixed.mean(0)).square().sum()


def with_auxk(x: Tensor, latents: Tensor, pre_acts: Tensor, p: Named, dead: Tensor) -> Tensor:
    x_hat = latents @ p["W_dec"] + p["b_dec"]
    return squared(x, x_hat) + auxk(x, x_hat, pre_acts, p, dead) / 32


def largest(values: Tensor, k: Tensor) -> Tensor:
    """1 for the k (B,) largest of each row."""
    rank = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < k[:, None]).double()


def implicit(excess: Any, low: Tensor, high: Tensor) -> Tensor:
    """Root (B,) of a function that falls, by bisection, with its gradient by one Newton step."""
    with torch.no_grad():
        for _ in range(200):
            middle = (low + high) / 2
            is_low = excess(middle) > 0
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    root = ((low + high) / 2).detach().requires_grad_()
    [slope] = torch.autograd.grad(excess(root).sum(), root, retain_graph=True)
    return root.detach() - excess(root.detach()) / slope.detach()


def laplace(t: Tensor) -> Tensor:
    return torch.where(t <= 0, t.clamp(max=0).exp() / 2, 1 - (-t.clamp(min=0)).exp() / 2)


def soft_mask(v: Tensor, k: Tensor, alpha: float) -> Tensor:
    b = implicit(
        lambda b: laplace((v - b[:, None]) / alpha).sum(1) - k,
        v.detach().amin(1) - 1e3,
        v.detach().amax(1) + 1e3,
    )
    return laplace((v - b[:, None]) / alpha)


def entmax_plain(scores: Tensor, alpha: Tensor) -> Tensor:
    x = (alpha - 1) * scores

    def weights(tau: Tensor) -> Tensor:
        excess = x - tau[:, None]
        return torch.where(excess > 0, excess.clamp(min=1e-300), 0) ** (1 / (alpha - 1)) * (
            excess > 0
        )

    top = x.detach().amax(1)
    return weights(implicit(lambda tau: weights(tau).sum(1) - 1, top - 1, top))


def plain_relu(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    latents = F.relu(linear(x, p))
    x_hat = latents @ p["W_dec"] + p["b_dec"]
    if options.get("loss") == "norm_weighted":
        error = ((x - x_hat).square() / x.norm(dim=1, keepdim=True)).mean()
    else:
        error = squared(x, x_hat)
    return error + 0.3 * latents.sum(1).mean()


def plain_p_anneal(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    """At step 7 of 10: four jumps were made at steps 2, 3.6, 5.2, 6.8."""
    latents = F.relu(linear(x, p))
    penalty = latents[latents > 0].pow(1 - 0.5 * 4 / 5).sum() / len(x)
    return squared(x, latents @ p["W_dec"] + p["b_dec"]) + 0.3 * penalty


BUDGETS = {"k": [5], "all": [1, 2, 3, 4, 5], "powers": [1, 2, 4, 5]}


def plain_topk(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    pre_acts = linear(x, p)
    errors = []
    for budget in BUDGETS[options.get("budgets", "k")]:
        latents = F.relu(pre_acts) * largest(pre_acts, torch.full((len(x),), budget))
        x_hat = latents @ p["W_dec"] + p["b_dec"]
        errors.append(squared(x, x_hat))
    return sum(errors) / len(errors) + auxk(x, x_hat, pre_acts, p, dead) / 32


def plain_abs_topk(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    pre_acts = linear(x, p)
    errors = []
    for budget in BUDGETS[options.get("budgets", "k")]:
        latents = pre_acts * largest(pre_acts.abs(), torch.full((len(x),), budget))
        x_hat = latents @ p["W_dec"] + p["b_dec"]
        errors.append(squared(x, x_hat))
    error = sum(errors) / len(errors)
    return error + auxk(x, x_hat, pre_acts, p, dead, is_signed=True) / 32


def plain_top_afa(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    """Every k is tried in turn."""
    pre_acts = linear(x, p)
    v = F.relu(pre_acts)
    lengths = [(v * largest(v, torch.full((len(x),), k))).norm(dim=1) for k in range(1, D_SAE + 1)]
    away = (torch.stack(lengths).detach() - (x - p["b_dec"]).norm(dim=1).detach()).abs()
    best = torch.tensor([int(np.flatnonzero(a <= a.min() + 1e-9)[0]) + 1 for a in away.T.numpy()])
    latents = v * largest(v, best)
    x_hat = latents @ p["W_dec"] + p["b_dec"]
    afa = (latents.norm(dim=1) - x.norm(dim=1)).square().mean()
    error = (x - x_hat).square().mean()
    return error + 0.3 * afa + auxk(x, x_hat, pre_acts, p, dead) / 32


def plain_matching_pursuit(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    """One row after the other, with plain autograd through all steps."""
    x_hats = []
    for row in x - p["b_dec"]:
        left, seen = row, set()
        for _ in range(options["max_iterations"]):
            with torch.no_grad():
                pick = int((p["W_dec"] @ left).argmax())
            left = left - F.relu(left @ p["W_dec"][pick]) * p["W_dec"][pick]
            is_repeat = pick in seen and options["stop_on_duplicate_support"]
            if is_repeat or float(left.detach().norm()) < options["residual_threshold"]:
                break
            seen.add(pick)
        x_hats.append(row - left + p["b_dec"])
    return squared(x, torch.stack(x_hats))


def batch_mask(pre_acts: Tensor) -> Tensor:
    return (pre_acts >= pre_acts.flatten().sort().values[-5 * BATCH]).double()


def plain_batch_topk(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    pre_acts = linear(x, p)
    if options.get("pool") is None:
        return with_auxk(x, F.relu(pre_acts) * batch_mask(pre_acts), pre_acts, p, dead)
    norms = F.relu(pre_acts).norm(dim=0)  # 13 = 2.6 * 5 latents have the largest
    pool = (norms >= norms.sort().values[-13]).double()
    mask = batch_mask(pre_acts - 1e9 * (1 - pool).detach())
    return with_auxk(x, F.relu(pre_acts) * mask, pre_acts, p, dead)


def plain_feature_choice(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    """All shares are alike: 5 entries a row, 160 of the batch, are 4 rows for each of 40 latents."""
    pre_acts = linear(x, p)
    if options.get("mutual_fraction") == 0.9:
        mask = batch_mask(pre_acts)
    else:
        mask = largest(pre_acts.T, torch.full((D_SAE,), 5 * BATCH // D_SAE)).T
    return with_auxk(x, F.relu(pre_acts) * mask, pre_acts, p, dead)


def plain_matryoshka(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    pre_acts = linear(x, p)
    latents = F.relu(pre_acts) * batch_mask(pre_acts)
    errors = [squared(x, latents[:, :n] @ p["W_dec"][:n] + p["b_dec"]) for n in (5, 15, D_SAE)]
    x_hat = latents @ p["W_dec"] + p["b_dec"]
    groups = 3 if options.get("group_mean") == "twice" else 1
    return sum(errors) / 3 / groups + auxk(x, x_hat, pre_acts, p, dead) / 32


def plain_gated(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    u = (x - p["b_dec"]) @ p["W_enc"]
    gate = F.relu(u + p["b_enc"])
    latents = (gate > 0) * F.relu(u * p["r_mag"].exp() + p["b_mag"])
    frozen = gate @ p["W_dec"].detach() + p["b_dec"].detach()
    x_hat = latents @ p["W_dec"] + p["b_dec"]
    return squared(x, x_hat) + 0.3 * gate.sum(1).mean() + squared(x, frozen)


def plain_jumprelu(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    """Straight-through terms are zero, with the gradient that the papers give to theta."""
    if "direct_theta" in p:
        return plain_jumprelu_of_dictionary_learning(x, p)
    pre_acts, theta, width = linear(x, p), p["log_theta"].exp(), 0.25
    kernel = ((pre_acts - theta).abs() < width / 2).double().detach()
    through = kernel * (theta - theta.detach()) / width
    fires = (pre_acts > theta).double()
    latents = pre_acts * fires - theta.detach() * through
    l0 = (fires - through).sum(1).mean()
    term = l0 if options["target_l0"] is None else (l0 / 4 - 1) ** 2
    return squared(x, latents @ p["W_dec"] + p["b_dec"]) + 0.3 * term


def plain_jumprelu_of_dictionary_learning(x: Tensor, p: Named) -> Tensor:
    """The encoder takes x; the penalty's estimator takes z, whose zeros are near a theta that is near 0."""
    pre_acts, theta, width = x @ p["W_enc"] + p["b_enc"], p["direct_theta"], 0.25

    def through(acts: Tensor) -> Tensor:
        kernel = ((acts - theta).abs() < width / 2).double().detach()
        return kernel * (theta - theta.detach()) / width

    fires = (pre_acts > theta).double()
    latents = pre_acts * fires - theta.detach() * through(pre_acts)
    l0 = (fires - through(latents.detach())).sum(1).mean()
    return squared(x, latents @ p["W_dec"] + p["b_dec"]) + 0.3 * (l0 / 4 - 1) ** 2


def plain_soft_topk(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    pre_acts = linear(x, p)
    selected = pre_acts.detach() if options["hard_phase"] == "decoder" else pre_acts
    hidden = F.relu((x - p["b_dec"]) @ p["hidden.weight"].T + p["hidden.bias"])
    k = 12 * torch.sigmoid(hidden @ p["output.weight"][0] + p["output.bias"])
    k, v = k.clamp(1, D_SAE), F.relu(selected)
    if options["hard_fraction"] > 0.5:
        return with_auxk(x, v * largest(v, k.detach().floor()), pre_acts, p, dead)
    budget = (1 + (5 * (k.mean() - 5)).exp()).log() / 5
    return with_auxk(x, v * soft_mask(v, k, options["alpha"]), pre_acts, p, dead) + budget


def plain_adaptive_k(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    pre_acts = linear(x, p)
    v, score = F.relu(pre_acts), (x @ p["probe_w"] + p["probe_b"]).clamp(0, 10)
    k = 2 + 10 * torch.sigmoid(6 * (score / 10 - 0.5))
    is_soft = options["form"] == "soft"
    latents = v * (soft_mask(v, k, 0.02) if is_soft else largest(v, k.round()))
    x_hat = latents @ p["W_dec"] + p["b_dec"]
    penalty = latents.sum(1).mean() / x.norm(dim=1).mean()
    error = (x - x_hat).square().mean()
    return error + 0.005 * penalty + auxk(x, x_hat, pre_acts, p, dead) / 32


def plain_attention(x: Tensor, p: Named, dead: Tensor, options: Any) -> Tensor:
    scale = {"learned": p["score_scale"], "1/sqrt(d)": D_IN**-0.5}
    scale = scale.get(options["score_scale"], options["score_scale"])
    centred = x - p["b_dec"] if options["architecture"] == "mlp" else x
    norm = centred.norm(dim=1, keepdim=True)
    if options["architecture"] == "mlp":
        scores = scale * (centred / norm @ p["W_enc"] + p["b_enc"])
    else:
        query = centred / norm @ p["W_Q"] if options["query"] == "linear" else centred / norm
        scores = scale * query @ (p["W_dec"] @ p["W_K"]).T
    alpha = torch.tensor(float(options.get("alpha", 2.0)), dtype=torch.float64)
    if options.get("is_alpha_learned"):
        alpha = 1 + torch.sigmoid(p["raw_alpha"])
    z = F.relu(scores)
    if options["activation"] == "weights":
        z = entmax_plain(scores, alpha)
    elif options["activation"] == "scores":
        z = scores * (entmax_plain(scores.detach(), alpha) > 0)
    if options["architecture"] == "mlp":
        x_hat = norm * (z @ p["W_dec"]) + p["b_dec"]
    else:
        x_hat = norm * (z @ (p["W_dec"] @ p["W_V"]))
    error = (x - x_hat).square()
    if options["loss"] == "norm_weighted":
        return 10 * (error / x.norm(dim=1, keepdim=True)).mean()
    return error.sum(1).mean() + options["l1"] * z.abs().sum(1).mean()


PLAIN_LOSS = {
    "abs_topk": plain_abs_topk,
    "adaptive_k": plain_adaptive_k,
    "batch_topk": plain_batch_topk,
    "entmax": plain_attention,
    "feature_choice": plain_feature_choice,
    "gated": plain_gated,
    "jumprelu": plain_jumprelu,
    "matching_pursuit": plain_matching_pursuit,
    "matryoshka": plain_matryoshka,
    "p_anneal": plain_p_anneal,
    "relu": plain_relu,
    "soft_topk": plain_soft_topk,
    "sparsemax": plain_attention,
    "top_afa": plain_top_afa,
    "topk": plain_topk,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(20, D_IN, generator=generator)
    active = torch.rand(BATCH, 20, generator=generator) * (
        torch.rand(BATCH, 20, generator=generator) < 0.2
    )
    return active @ features + 0.5


def make(case: str, x: Tensor) -> SAE:
    """An SAE early in training: parameters a little off their start, at step 7 of 10."""
    variant, options = CASES[case]
    sae = build(variant, D_IN, D_SAE, options)
    sae.initialise(Batch.of(x), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in ("W_enc", "W_dec", "b_dec", "score_scale", "raw_alpha"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if isinstance(sae, AdaptiveK):
            sae.probe_b.fill_(4)
            sae.probe_w.mul_(20)
    sae.begin_step(STEP, STEPS)
    return sae.train()


def trained(sae: SAE) -> dict[str, Tensor]:
    return {name: p for name, p in sae.named_parameters() if p.requires_grad}


def test_the_options_of_every_variant_are_here_and_in_the_schema() -> None:
    assert {variant for variant, _ in CASES.values()} == set(VARIANTS) == set(PLAIN_LOSS)
    trained = params_schema()["properties"]["saes"]["additionalProperties"]["else"]
    assert set(trained["properties"]["variant"]["enum"]) == set(VARIANTS)
    by_variant = {
        branch["if"]["properties"]["variant"]["const"]: branch["then"]["properties"]["options"]
        for branch in trained["allOf"]
    }
    for variant, options in CASES.values():
        whole = set(with_defaults(variant, options))
        assert set(by_variant[variant]["properties"]) == whole
        assert set(by_variant[variant]["required"]) == whole


@pytest.mark.parametrize("case", CASES)
class TestEveryVariant:
    def test_initialisation(self, case: str, x: Tensor) -> None:
        variant, options = CASES[case]
        sae = build(variant, D_IN, D_SAE, options)
        sae.initialise(Batch.of(x), torch.Generator().manual_seed(0))
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
        if sae.W_enc is None:
            assert torch.equal(sae.directions(), sae.W_dec)
            return
        assert torch.equal(sae.W_enc, sae.W_dec.t())
        assert not sae.b_enc.any()
        # The geometric median is where the unit vectors to the points cancel.
        away = x - sae.b_dec
        pull = (away / away.norm(dim=1, keepdim=True)).mean(0).norm().detach()
        assert float(pull) < 1e-3

    def test_both_paths_give_equal_losses_and_gradients(self, case: str, x: Tensor) -> None:
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        dead[::3] = True
        found = []
        for is_sparse in (False, True):
            sae = make(case, x)
            fwd = sae.run(Batch.of(x), is_sparse=is_sparse)
            assert fwd.is_sparse == is_sparse
            losses = sae.losses(fwd, dead)
            sum(losses.values()).backward()
            found.append((fwd, losses, {n: p.grad for n, p in trained(sae).items()}))
        (dense, *of_dense), (sparse, *of_sparse) = found
        torch.testing.assert_close(sparse.x_hat, dense.x_hat)
        assert torch.equal(sparse.l0(), dense.l0())
        assert torch.equal(sparse.fired(), dense.fired())
        assert not sparse.pre_acts.requires_grad
        torch.testing.assert_close(of_sparse, of_dense, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("is_sparse", [False, True])
    def test_gradients_are_those_of_plain_autograd(
        self, case: str, is_sparse: bool, x: Tensor
    ) -> None:
        """Against the formulas written out below, in float64, every loss term included."""
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        dead[::3] = True
        sae = make(case, x)
        losses = sae.losses(sae.run(Batch.of(x), is_sparse=is_sparse), dead)
        sum(losses.values()).backward()
        variant, options = CASES[case]
        plain = {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}
        expected = PLAIN_LOSS[variant](x.double(), plain, dead, options)
        expected.backward()
        torch.testing.assert_close(sum(losses.values()), expected.float(), rtol=1e-5, atol=1e-5)
        for name, parameter in trained(sae).items():
            reference = plain[name].grad
            if parameter.grad is None:
                assert reference is None or not reference.any(), name
                continue
            size = float(reference.abs().max())
            torch.testing.assert_close(
                parameter.grad, reference.float(), rtol=1e-3, atol=1e-4 * max(size, 0.1), msg=name
            )

    def test_training_lowers_the_loss_and_keeps_unit_rows(self, case: str, x: Tensor) -> None:
        sae = make(case, x)
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        errors = []
        for step in range(60):
            sae.begin_step(step, 60)
            fwd = sae.run(Batch.of(x))
            losses = sae.losses(fwd, torch.zeros(D_SAE, dtype=torch.bool))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            sae.project_grad()
            if sae.has_unit_norm:
                along = (sae.W_dec.grad * sae.W_dec.detach()).sum(1)
                assert float(along.abs().max()) < 1e-4
            optimizer.step()
            if sae.has_unit_norm:
                with torch.no_grad():
                    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
            sae.end_step(fwd)
            assert all(isinstance(fact, float | int) for fact in sae.facts(fwd).values())
            errors.append(float((x - fwd.x_hat).square().mean().detach()))
        assert errors[-1] < 0.9 * errors[0]
        if sae.has_unit_norm:
            torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))

    def test_a_trained_sae_is_the_same_on_both_paths(self, case: str, x: Tensor) -> None:
        sae = make(case, x)
        sae.begin_step(0, 1)
        sae.end_step(sae.run(Batch.of(x)))
        sae.eval()
        torch.testing.assert_close(sae.run(Batch.of(x), is_sparse=True).x_hat, sae(x))

    def test_a_saved_sae_is_the_same_sae(self, case: str, x: Tensor, tmp_path: Path) -> None:
        sae = make(case, x)
        sae.end_step(sae.run(Batch.of(x)))
        variant, options = CASES[case]
        config = {"variant": variant, "options": options, "d_in": D_IN, "d_sae": D_SAE}
        save(sae.state_dict(), tmp_path, config)
        loaded = load(tmp_path)
        sae.eval()
        assert torch.equal(loaded.encode(x), sae.encode(x))
        assert torch.equal(loaded(x), sae(x))
        assert loaded.encode(x[None]).shape == (1, BATCH, D_SAE)
        assert loaded.decode(loaded.encode(x[None])).shape == (1, BATCH, D_IN)
        assert loaded.W_enc is None or loaded.W_enc.t().is_contiguous()
        assert not loaded.training
        assert read_config(tmp_path)["variant"] == variant

    @pytest.mark.parametrize("is_shifted", [False, True])
    def test_a_folded_sae_takes_and_returns_raw_activations(
        self, case: str, is_shifted: bool, x: Tensor
    ) -> None:
        sae = make(case, x).double()
        if is_shifted and sae.b_dec is None:  # the trainer refuses it: test_trainer.py
            return
        x = x.double()
        sae.end_step(sae.run(Batch.of(x)))
        sae.eval()
        latents, x_hat, allowed = sae.encode(x), sae(x), sae.allowed_k(x)
        scale, shift = 37.0, torch.linspace(-20, 30, D_IN, dtype=torch.float64)
        sae.fold_scale(scale)
        if is_shifted:
            sae.fold_shift(shift)
        raw = scale * x + (shift if is_shifted else 0)
        torch.testing.assert_close(sae.encode(raw), scale * latents)
        torch.testing.assert_close(sae(raw), raw - scale * (x - x_hat))
        torch.testing.assert_close(sae.allowed_k(raw), allowed)

    def test_an_unknown_option_is_refused(self, case: str) -> None:
        variant, options = CASES[case]
        with pytest.raises(UserError, match=f"{variant}: expected the options .*, found .*unknown"):
            build(variant, D_IN, D_SAE, {**options, "unknown": 1})


@pytest.mark.parametrize(
    ("variant", "stated"),
    [
        ("abs_topk", {"k": 5}),
        ("adaptive_k", {"complexity": "labels", "k_max": 30}),
        ("batch_topk", {"k": 5}),
        ("entmax", {"alpha": 1.5}),
        ("feature_choice", {"k": 5}),
        ("gated", {"l1": 0.3}),
        ("jumprelu", {"l0_weight": 0.3}),
        ("matching_pursuit", {}),
        ("matryoshka", {"k": 5}),
        ("p_anneal", {"l1": 0.3, "anneal_start": 0.1}),
        ("relu", {"l1": 0.3}),
        ("soft_topk", {"k": 5, "k_max": 10}),
        ("sparsemax", {}),
        ("top_afa", {}),
        ("topk", {"k": 5}),
    ],
)
def test_options_that_are_not_stated_have_the_variants_defaults(
    variant: str, stated: dict[str, Any]
) -> None:
    whole = with_defaults(variant, stated)
    assert whole.items() >= stated.items()
    if variant == "matryoshka":  # the paper's groups need 32 latents in the first
        build(variant, D_IN, 64, stated)
    else:
        build(variant, D_IN, D_SAE, stated)
    for name in set(stated) - {"k_max"}:
        needed = {key: value for key, value in stated.items() if key != name}
        with pytest.raises(UserError, match=f"{variant}: expected the options"):
            build(variant, D_IN, D_SAE, needed)


@pytest.mark.parametrize("variant", ["topk", "batch_topk"])
@pytest.mark.parametrize("k", [0, D_SAE + 1])
def test_a_k_out_of_range_is_refused(variant: str, k: int) -> None:
    with pytest.raises(UserError, match=f"1..{D_SAE}"):
        build(variant, D_IN, D_SAE, {**CASES[variant][1], "k": k})


def test_a_k_that_is_not_whole_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"topk: k: expected a whole number or a mapping, found 2\.5"
    ):
        build("topk", D_IN, D_SAE, {**TOPK, "k": 2.5})


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(UserError, match="topq"):
        build("topq", D_IN, D_SAE, {})


def test_abs_topk_keeps_the_k_of_largest_size_with_their_signs(x: Tensor) -> None:
    sae = make("abs_topk", x)
    arrays = {name: p.detach().numpy().astype(np.float64) for name, p in sae.named_parameters()}
    scores = (x.numpy() - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"]
    latents = sae.encode(x).detach().numpy()
    for row, found in zip(scores, latents, strict=True):
        order = np.argsort(-np.abs(row), kind="stable")[:5]
        assert set(np.flatnonzero(found)) == set(order)
        np.testing.assert_allclose(found[order], row[order], rtol=1e-4, atol=1e-5)
    assert (latents < 0).any()


def test_the_k_of_top_afa_is_nearest_to_the_norm_of_the_input(x: Tensor) -> None:
    sae = make("top_afa", x).eval()
    positive = encode_by_hand(sae, x)
    norms = np.linalg.norm(x.numpy() - sae.b_dec.detach().numpy(), axis=1)
    k = sae.allowed_k(x)
    assert k is not None
    assert len(set(k.tolist())) > 3
    for row, norm, found, latents in zip(positive, norms, k.tolist(), sae.encode(x), strict=True):
        lengths = np.sqrt(np.cumsum(np.sort(row)[::-1] ** 2))
        away = np.abs(lengths - norm)
        assert away[found - 1] <= away.min() + 1e-5
        assert int((latents != 0).sum()) == min(found, int((row > 0).sum()))


def test_top_afa_has_at_least_one_latent_and_the_fewest_of_equal_ones() -> None:
    active = torch.tensor([[3.0, 4.0, 0.0, 0.0], [3.0, 4.0, 0.0, 12.0], [0.0, 0.0, 0.0, 0.0]])
    chosen = reaching(active, torch.tensor([5.1, 0.0, 1.0]))
    expected = [
        [True, True, False, False],
        [False, False, False, True],
        [True, False, False, False],
    ]
    assert chosen.tolist() == expected


def encode_by_hand(sae: SAE, x: Tensor) -> np.ndarray:
    """relu of (x - b_dec) W_enc + b_enc in float64."""
    arrays = {name: p.detach().numpy().astype(np.float64) for name, p in sae.named_parameters()}
    pre_acts = (x.numpy() - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"]
    return np.maximum(pre_acts, 0)


def test_topk_keeps_the_k_largest_of_each_row(x: Tensor) -> None:
    sae = make("topk", x)
    positive = encode_by_hand(sae, x)
    for row, latents in zip(positive, sae.encode(x).detach().numpy(), strict=True):
        order = np.argsort(-row, kind="stable")[:5]
        assert set(np.flatnonzero(latents)) == {i for i in order if row[i] > 0}
        np.testing.assert_allclose(latents[order], row[order], rtol=1e-4, atol=1e-5)


def test_batch_topk_keeps_the_largest_of_the_batch_in_training(x: Tensor) -> None:
    sae = make("batch_topk", x)
    positive = encode_by_hand(sae, x)
    smallest = np.sort(positive.ravel())[-BATCH * 5]
    latents = sae.run(Batch.of(x), is_sparse=False).latents
    assert isinstance(latents, Tensor)
    np.testing.assert_allclose(
        latents.detach().numpy(), np.where(positive >= smallest, positive, 0), rtol=1e-4, atol=1e-5
    )


def test_batch_topk_threshold_is_the_running_mean_of_the_smallest_kept(x: Tensor) -> None:
    sae = make("batch_topk", x)
    smallest = []
    for scale in (1.0, 2.0, 0.5):
        sae.begin_step(1, 2)
        fwd = sae.run(Batch.of(x * scale))
        sae.end_step(fwd)
        positive = encode_by_hand(sae, x * scale)
        smallest.append(np.sort(positive.ravel())[-BATCH * 5])
    weights = 0.999 ** np.arange(3)[::-1]
    expected = np.average(smallest, weights=weights)
    assert float(sae.get_buffer("threshold")) == pytest.approx(expected, rel=1e-4)
    sae.eval()
    positive = encode_by_hand(sae, x)
    np.testing.assert_array_equal(sae.encode(x).detach().numpy() > 0, positive > expected)


def test_batch_topk_threshold_starts_afresh_when_k_changes(x: Tensor) -> None:
    """Also with a schedule that ends with the run, and so is never at its target."""
    schedule = {"kind": "linear", "from": 20, "until": 1.0}
    sae = build("batch_topk", D_IN, D_SAE, {**CASES["batch_topk"][1], "k_schedule": schedule})
    sae.initialise(Batch.of(x), torch.Generator().manual_seed(0))
    for step in range(3):
        sae.begin_step(step, 3)
        sae.end_step(sae.run(Batch.of(x)))
    positive = encode_by_hand(sae, x)
    assert float(sae.get_buffer("threshold")) == pytest.approx(
        np.sort(positive.ravel())[-BATCH * 10], rel=1e-4
    )


def test_relu_loss_is_error_plus_l1(x: Tensor) -> None:
    sae = make("relu", x)
    losses = sae.losses(sae.run(Batch.of(x)), torch.zeros(D_SAE, dtype=torch.bool))
    latents = encode_by_hand(sae, x)
    x_hat = latents @ sae.W_dec.detach().numpy() + sae.b_dec.detach().numpy()
    error = ((x.numpy() - x_hat) ** 2).sum(1).mean()
    assert float(losses["reconstruction"].detach()) == pytest.approx(error, rel=1e-5)
    assert float(losses["l1"].detach()) == pytest.approx(0.3 * latents.sum(1).mean(), rel=1e-5)


def test_auxk_rebuilds_the_residual_from_dead_latents(x: Tensor) -> None:
    sae = make("topk", x)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[10:30] = True
    fwd = sae.run(Batch.of(x))
    loss = sae.losses(fwd, dead)["auxk"]
    residual = (x - fwd.x_hat.detach()).numpy()
    candidates = np.where(dead.numpy(), encode_by_hand(sae, x), 0)
    chosen = np.zeros_like(candidates)
    for row, kept in zip(candidates, chosen, strict=True):
        top = np.argsort(-row, kind="stable")[: D_IN // 2]
        kept[top] = row[top]
    error = ((residual - chosen @ sae.W_dec.detach().numpy()) ** 2).sum()
    spread = ((residual - residual.mean(0)) ** 2).sum()
    assert float(loss.detach()) == pytest.approx(error / spread / 32, rel=1e-4)


def test_weights_that_are_not_trained_stay_as_they_were(x: Tensor) -> None:
    sae = make("topk", x)
    sae.W_dec.requires_grad_(False)
    before = sae.W_dec.clone()
    loss = F.mse_loss(sae.run(Batch.of(x)).x_hat, x)
    loss.backward()
    sae.project_grad()
    assert torch.equal(sae.W_dec, before)
    assert sae.W_dec.grad is None
    assert float(sae.W_enc.grad.abs().sum()) > 0


@pytest.fixture
def saved(x: Tensor, tmp_path: Path) -> Path:
    config = {"variant": "topk", "options": TOPK, "d_in": D_IN, "d_sae": D_SAE}
    save(make("topk", x).state_dict(), tmp_path, config)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 41}, "b_enc"),
        ({"variant": "batch_topk"}, "threshold"),
        ({"variant": "topq"}, "topq"),
        ({"format": "other"}, r"config\.json"),
        ({"format_version": 99}, "99"),
        ({"d_in": "12"}, "d_in: expected a whole number"),
        ({"d_sae": 10**12}, r"expected float32 \[1000000000000\], found float32 \[40\]"),
        (
            {"options": {"k": 50, "k_schedule": CONSTANT, "auxk_weight": 0}},
            r"config\.json: topk: k: ",
        ),
        ({"options": [1]}, "expected the options auxk_weight, auxk_latents, k, k_schedule"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(saved, **changes)
    with pytest.raises(UserError, match=message):
        load(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    path = saved / "weights.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-7], whole[:5], b""):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"weights\.safetensors"):
            load(saved)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("b_dec"), r"b_dec \(expected float32 \[12\], found nothing"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), r"extra \(expected nothing"),
        (lambda tensors: tensors.update(b_dec=torch.ones(12).half()), r"found float16 \[12\]"),
        (lambda tensors: tensors.update(W_enc=torch.ones(40, 12)), r"found float32 \[40, 12\]"),
    ],
)
def test_weights_of_another_sae_are_refused(
    saved: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = load_file(saved / "weights.safetensors")
    change(tensors)
    save_file(tensors, saved / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        load(saved)


def test_weights_that_are_not_finite_are_refused(saved: Path, x: Tensor) -> None:
    sae = load(saved)
    with torch.no_grad():
        sae.b_dec[3] = float("nan")
    save(sae.state_dict(), saved, read_config(saved))
    with pytest.raises(UserError, match="b_dec is not finite"):
        load(saved)


@pytest.mark.parametrize("variant", ["relu", "gated", "p_anneal", "jumprelu"])
def test_the_path_follows_the_density(variant: str, x: Tensor) -> None:
    sae = make(variant, x)
    assert not sae.run(Batch.of(x)).is_sparse
    with torch.no_grad():
        sae.b_enc.sub_(100)
        sae.b_enc[3] = 50
    sae.end_step(sae.run(Batch.of(x)))
    fwd = sae.run(Batch.of(x))
    assert fwd.is_sparse
    assert 0 < float(sae.get_buffer("density")) <= 1 / D_SAE + 1e-6
