"""Each row of docs/paper-against-code.md: what a setting does, pinned."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from saeflow.batch import Batch
from saeflow.config import ROOT
from saeflow.config.variants import PRESETS as PRESETS_FILE
from saeflow.config.variants import with_defaults, with_options
from saeflow.errors import UserError
from saeflow.exchange.plain import plain_of, sae_of
from saeflow.saes import SAE, Forward, build, load, save
from saeflow.saes.adaptive_k import AdaptiveK

D_IN, D_SAE = 16, 64
PRESETS: dict[str, Any] = yaml.safe_load(PRESETS_FILE.read_text())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def x() -> Tensor:
    return 3 * torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0))


def make(preset: str, x: Tensor, d_sae: int = D_SAE, **changes: Any) -> SAE:
    options = {**PRESETS[preset]["options"], **changes}
    sae = build(PRESETS[preset]["variant"], x.shape[1], d_sae, options)
    sae.initialise(Batch.of(x), torch.Generator().manual_seed(0))
    return sae.train()


def soft(x: Tensor, preset: str = "softsae-paper", **changes: Any) -> SAE:
    small = {"k": 4, "k_max": 8, "k_schedule": {"kind": "constant"}}
    return make(preset, x, **{**small, **changes})


def whole_of(preset: str) -> dict[str, Any]:
    """Return the preset's options with the defaults of its variant for the rest."""
    return with_defaults(PRESETS[preset]["variant"], PRESETS[preset]["options"])


# The presets themselves.


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_whole_set_of_options(name: str) -> None:
    build(PRESETS[name]["variant"], 2304, 16_384, PRESETS[name]["options"])
    entry = {"variant": PRESETS[name]["variant"], "options": {"preset": name}}
    assert with_options({"saes": {"a": entry}})["saes"]["a"]["options"] == whole_of(name)


def test_options_beside_a_preset_replace_its_own() -> None:
    entry = {"variant": "soft_topk", "options": {"preset": "softsae-paper", "k": [16, 32]}}
    options = with_options({"saes": {"a": entry}})["saes"]["a"]["options"]
    assert options == {**whole_of("softsae-paper"), "k": [16, 32]}


@pytest.mark.parametrize(
    ("variant", "preset", "message"),
    [
        ("soft_topk", "nothing", "expected one of"),
        ("topk", "softsae-paper", "of the variant soft_topk"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(variant: str, preset: str, message: str) -> None:
    with pytest.raises(UserError, match=f"saes.a.options.preset: .*{message}"):
        with_options({"saes": {"a": {"variant": variant, "options": {"preset": preset}}}})


def test_the_ledger_names_tests_that_are_there_and_every_preset() -> None:
    text = (ROOT / "docs" / "paper-against-code.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert named
    assert all(re.search(rf"def {name}\(", tests) for name in named)
    assert all(f"`{name}`" in text for name in PRESETS)


# SoftSAE.


def test_k_max_bounds_k_hat_which_starts_at_its_half(x: Tensor) -> None:
    for k_max in (8, 40):
        k_hat = soft(x, k_max=k_max).allowed_k(x)
        assert bool((k_hat < k_max).all())
        assert float(k_hat.detach().mean()) == pytest.approx(k_max / 2, rel=0.3)


def test_k_hat_is_no_bfloat16_under_autocast(x: Tensor) -> None:
    """The hidden units are rounded, k_hat itself is not: it would be 2 apart near 256."""
    sae = soft(x, k=30, k_max=60)
    expected = sae.allowed_k(x)
    with torch.autocast("cpu", torch.bfloat16):
        fwd = sae.run(Batch.of(x))
    assert fwd.condition.dtype == torch.float32
    assert bool((fwd.condition != fwd.condition.bfloat16().float()).all())
    torch.testing.assert_close(fwd.condition, expected, rtol=0.02, atol=0)


def test_encode_changes_no_input_and_forward_returns_its_units(x: Tensor) -> None:
    sae = soft(x).eval()
    before = x.clone()
    x_hat = sae(x)
    assert torch.equal(x, before)
    sae.fold_scale(4.0)
    torch.testing.assert_close(sae(4 * x), 4 * x_hat, rtol=1e-4, atol=1e-4)


def test_the_budget_is_one_sided_and_on_the_batch_mean(x: Tensor) -> None:
    sae = soft(x, k=4, k_max=8)
    fwd, dead = sae.run(Batch.of(x)), torch.zeros(D_SAE, dtype=torch.bool)
    for k, expected in ((40.0, 0.0), (1.0, float(fwd.condition.detach().mean()) - 1.0)):
        sae.k = k
        assert float(sae.losses(fwd, dead)["budget"].detach()) == pytest.approx(expected, abs=1e-3)


def test_the_hard_phase_is_the_floor_of_k_hat_without_budget(x: Tensor) -> None:
    sae = soft(x)
    sae.begin_step(99, 100)
    fwd = sae.run(Batch.of(x))
    assert bool((fwd.l0() <= fwd.condition.floor()).all())
    assert "budget" not in sae.losses(fwd, torch.zeros(D_SAE, dtype=torch.bool))
    latents = sae.eval().encode(x)
    assert torch.equal((latents != 0).sum(1), fwd.l0())


@pytest.mark.parametrize(
    ("preset", "learns"), [("softsae-paper", True), ("softsae-released", False)]
)
def test_who_learns_in_the_hard_phase(preset: str, learns: bool, x: Tensor) -> None:
    sae = soft(x, preset)
    sae.begin_step(99, 100)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:20] = True
    sum(sae.losses(sae.run(Batch.of(x)), dead).values()).backward()
    assert bool(sae.W_dec.grad.any())
    trained = sae.W_enc.grad.any(0)  # AuxK trains dead latents in both
    assert bool(trained[dead].any())
    assert bool(trained[~dead].any()) == learns
    assert sae.hidden.weight.grad is None


def test_zeros_in_a_hard_topk_are_not_active(x: Tensor) -> None:
    sae = soft(x, k_max=64, k=32).eval()
    sae.k_max = 200
    latents = sae.encode(x)
    k_hat = sae.allowed_k(x)
    positive = (sae.pre_activations(x) > 0).sum(1)
    assert bool((k_hat > positive).any())
    assert torch.equal((latents != 0).sum(1), torch.minimum(positive, k_hat.floor().long()))


def test_no_gradient_reaches_k_hat_beyond_the_positive_latents(x: Tensor) -> None:
    """More k than positive pre-activations adds only zeros: the budget alone moves k_hat then."""
    sae = soft(x, k_max=64, k=60, alpha=1e-4)
    sae.k_max = 400
    fwd = sae.run(Batch.of(x), is_sparse=False)
    fwd.condition.retain_grad()
    (fwd.x - fwd.x_hat).square().sum().backward()
    beyond = fwd.condition > (fwd.pre_acts > 0).sum(1) + 1
    assert bool(beyond.all())
    assert float(fwd.condition.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("k_max", "message"),
    [
        (3, r"k_max: expected a number in 4\.\.64"),
        (0.5, r"k_max: expected 1\.\.64"),
        ({"times_k": 0.9}, r"k_max\.times_k: expected at least 1, found 0\.9"),
        ({"times_k": 20}, r"k_max\.times_k: expected a number in 4\.\.64"),
        ({"of_d": 2}, "k_max: unknown key of_d"),
        ("2k", "k_max: expected a number or a mapping, found '2k'"),
    ],
)
def test_a_k_max_out_of_range_is_refused(k_max: Any, message: str, x: Tensor) -> None:
    with pytest.raises(UserError, match=message):
        soft(x, k=4, k_max=k_max)
    assert soft(x, k=4, k_max={"times_k": 2.5}).k_max == 10


def test_every_positive_latent_counts_as_alive_while_alpha_is_large(x: Tensor) -> None:
    released = {"alpha_schedule": {"kind": "linear", "from": 1.0, "until": 0.5}}
    sae = soft(x, "softsae-released", **released)
    sae.begin_step(0, 100)
    fwd = sae.run(Batch.of(x))
    assert torch.equal(fwd.l0(), (fwd.pre_acts > 0).sum(1))
    sae.begin_step(60, 100)
    fwd = sae.run(Batch.of(x))
    near = float(soft(x, reach=30).run(Batch.of(x)).l0().double().mean())
    assert float(fwd.l0().double().mean()) < 12
    assert near <= float(fwd.l0().double().mean())


# AdaptiveK.


@pytest.mark.parametrize("preset", ["adaptivek-paper", "adaptivek-released"])
def test_the_map_reaches_34_to_306_with_170_in_the_middle(preset: str, x: Tensor) -> None:
    sae = make(preset, x, d_sae=400)
    assert isinstance(sae, AdaptiveK)
    with torch.no_grad():
        sae.probe_w.zero_()
        found = []
        for score in (0.0, 5.0, 10.0, 99.0):
            sae.probe_b.fill_(score)
            found.append(int(sae.eval().allowed_k(x)[0]))
    assert found == [34, 170, 306, 306]  # 80, the paper's base, is nowhere


def test_released_adaptivek_trains_on_last_rows_and_the_papers_on_all(x: Tensor) -> None:
    assert make("adaptivek-released", x, d_sae=400).trains_on == "last"
    assert make("adaptivek-paper", x, d_sae=400).trains_on == "all"


def test_a_rounded_k_is_whole_and_a_soft_one_real(x: Tensor) -> None:
    released = make("adaptivek-released", x, d_sae=400)
    paper = make("adaptivek-paper", x, d_sae=400)
    for sae in (released, paper):
        with torch.no_grad():
            sae.probe_w.normal_(generator=torch.Generator().manual_seed(1))
            sae.probe_b.fill_(5.0)
        sae.begin_step(99, 100)
    assert torch.equal(released.allowed_k(x), released.allowed_k(x).round())
    assert not released.allowed_k(x).requires_grad
    assert not torch.equal(paper.allowed_k(x), paper.allowed_k(x).round())
    assert paper.allowed_k(x).requires_grad
    assert torch.equal(paper.eval().allowed_k(x), released.allowed_k(x))  # in use both are rounded


def test_adaptivek_averages_the_error_over_dimensions(x: Tensor) -> None:
    sae = make("adaptivek-released", x, d_sae=400)
    fwd = sae.run(Batch.of(x))
    losses = sae.losses(fwd, torch.zeros(400, dtype=torch.bool))
    error = float((x - fwd.x_hat).square().sum(1).mean().detach()) / D_IN
    assert float(losses["reconstruction"].detach()) == pytest.approx(error, rel=1e-5)
    z, norms = fwd.values.detach(), x.norm(dim=1)
    expected = 0.005 * float(z.sum() / len(x) / norms.mean())
    assert float(losses["l1"].detach()) == pytest.approx(expected, rel=1e-5)


# Sparsemax.


def test_weights_sum_to_the_norm_and_scores_do_not(x: Tensor) -> None:
    paper = make("sparsemax-paper", x)
    released = make("sparsemax-released", x, initialisation="unit")
    norms = x.norm(dim=1)
    torch.testing.assert_close(paper.encode(x).sum(1), norms)
    scores = (x / norms[:, None]) @ released.W_dec.t()
    latents = released.encode(x)
    kept = latents != 0
    torch.testing.assert_close(latents, (scores * norms[:, None]) * kept)
    assert bool((latents.sum(1) > norms).any())


def test_scores_pass_no_gradient_through_the_threshold(x: Tensor) -> None:
    """A mask: each kept score has the gradient of its own latent, 1, the others none."""
    released = make("sparsemax-released", x)
    scores = released.pre_activations(x).detach().requires_grad_()
    latents = released.activate(scores, torch.ones(len(x)))
    latents.sum().backward()
    assert torch.equal(scores.grad, (latents != 0).float())
    paper = make("sparsemax-paper", x)
    scores = paper.pre_activations(x).detach().requires_grad_()
    paper.activate(scores, torch.ones(len(x)))[:, 0].sum().backward()
    assert bool((scores.grad < 0).any())  # the weights of others fall


def test_the_score_scale_decides_the_first_sparsity(x: Tensor) -> None:
    l0 = [
        float((make("sparsemax-paper", x, score_scale=scale).encode(x) != 0).sum(1).float().mean())
        for scale in ("1/sqrt(d)", 1, 4)
    ]
    assert l0[0] > l0[1] > l0[2]


def test_negative_scores_in_the_support_count_as_active() -> None:
    """If the scores sum to less than 1, tau is negative and negative scores take part."""
    x = torch.eye(4)[:1]
    sae = make("sparsemax-released", x, d_sae=4, max_rate=None, initialisation="unit")
    with torch.no_grad():
        sae.W_dec.copy_(
            torch.tensor([[0.2, 1, 0, 0], [0.1, 0, 1, 0], [-0.05, 0, 0, 1], [-0.9, 0, 0, 0.1]])
        )
    latents = sae.encode(x)
    torch.testing.assert_close(latents, torch.tensor([[0.2, 0.1, -0.05, 0.0]]))
    assert sae.run(Batch.of(x)).l0().tolist() == [3]


def test_the_rate_mask_is_learned_in_training_saved_and_used_everywhere(
    x: Tensor, tmp_path: Path
) -> None:
    sae = make("sparsemax-released", x)
    for _ in range(300):
        sae.end_step(sae.run(Batch.of(x)))
    rate = sae.firing_rate.clone()
    masked = rate > 0.1
    assert bool(masked.any())
    sae.eval()
    latents = sae.encode(x)
    assert not bool(latents[:, masked].any())
    assert torch.equal(sae.firing_rate, rate)  # use changes nothing
    options = PRESETS["sparsemax-released"]["options"]
    save(
        sae.state_dict(),
        tmp_path,
        {"variant": "sparsemax", "options": options, "d_in": D_IN, "d_sae": D_SAE},
    )
    assert torch.equal(load(tmp_path).encode(x), latents)
    assert make("sparsemax-paper", x).max_rate is None


def test_the_released_loss_is_over_the_norm(x: Tensor) -> None:
    sae = make("sparsemax-released", x)
    fwd = sae.run(Batch.of(x))
    losses = sae.losses(fwd, torch.zeros(D_SAE, dtype=torch.bool))
    expected = 10 * ((x - fwd.x_hat).square() / x.norm(dim=1, keepdim=True)).mean()
    assert float(losses["reconstruction"].detach()) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )
    assert set(losses) == {"reconstruction"}


def test_shared_concepts_have_no_unused_weights(x: Tensor) -> None:
    names = {name for name, _ in make("sparsemax-released", x).named_parameters()}
    assert names == {"W_dec", "W_K", "W_V", "score_scale"}
    linear = make("sparsemax-released", x, query="linear")
    assert "W_Q" in dict(linear.named_parameters())


def test_the_sparsemax_family_has_the_papers_betas(x: Tensor) -> None:
    assert make("sparsemax-paper", x).betas == (0.9, 0.99)
    assert make("sparsemax-released", x).betas == (0.9, 0.999)


# First weights.


@pytest.mark.parametrize(
    ("preset", "length", "has_median", "has_biases"),
    [
        ("gated-released", 1.0, False, False),
        ("jumprelu-released", 1.0, False, False),
        ("relu-released", 0.1, False, True),
        ("p-anneal-released", 0.1, False, True),
        ("batch-topk-released", 1.0, True, False),
        ("relu-sparsemax-released", 1.0, True, False),
    ],
)
def test_released_first_weights(
    preset: str, length: float, has_median: bool, has_biases: bool, x: Tensor
) -> None:
    sae = make(preset, x + 2, d_sae=400, **({"k": 8} if preset.startswith("batch") else {}))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((400,), length))
    assert bool(sae.b_dec.any()) == has_median
    assert bool(sae.b_enc.any()) == has_biases
    if has_biases:  # uniform: a third of the bound squared
        bound = D_IN**-0.5
        assert float(sae.b_enc.detach().abs().max()) <= bound
        assert float(sae.b_enc.detach().square().mean()) == pytest.approx(bound**2 / 3, rel=0.15)
    if preset != "relu-sparsemax-released":
        assert torch.equal(sae.W_enc, sae.W_dec.t())
        return
    assert float(sae.W_enc.detach().square().mean()) == pytest.approx(2 / 400, rel=0.05)
    along = (sae.W_enc * sae.W_dec.t()).sum(0) / sae.W_enc.norm(dim=0)
    assert float(along.detach().mean()) == pytest.approx(0, abs=0.1)  # drawn on its own


def test_released_first_scores_have_a_standard_deviation_of_2_over_the_root_of_the_width() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    sae = make("sparsemax-released", x, d_sae=3000)
    scores = sae.pre_activations(x).detach()
    assert float(scores.std()) == pytest.approx(2 / 3000**0.5, rel=0.05)


# Baselines.


def test_the_first_batch_is_the_released_threshold() -> None:
    for start, expected in (
        ("first_batch", [1.0, 1.001, 1.00299900]),
        ("unbiased", [1.0, 1.5, 2.0]),
    ):
        sae = build(
            "batch_topk", 4, 8, {"k": 1, "threshold_start_step": 0, "threshold_start": start}
        )
        sae.begin_step(0, 10)
        found = []
        for least in (1.0, 2.0, 3.0):
            latents = torch.tensor([[least, least + 1, 0, 0]])
            sae.end_step(Forward(Batch.of(latents), None, latents, latents, latents, latents))
            found.append(float(sae.threshold))
        assert found == pytest.approx(expected, rel=1e-3)


def test_when_p_jumps() -> None:
    def p_of(first_jump: str, updates: int) -> list[float]:
        options = {"l1": 1, "anneal_start": 0.3, "p_updates": updates, "first_jump": first_jump}
        sae = build("p_anneal", 4, 8, options)
        return [sae.p_after(sae.jumps_at(step, 100)) for step in range(100)]

    ours, released = p_of("at_start", 10), p_of("after_interval", 9)
    # dictionary_learning's own list: 10 values of p from 1 to 0.2, at int(linspace(30, 100, 10)), a step late
    values, at = np.linspace(1, 0.2, 10), np.linspace(30, 100, 10).astype(int)
    expected = [values[max(0, (at < step).sum() - 1)] for step in range(100)]
    assert released == pytest.approx(expected)
    assert min(released) > 0.28  # never at p_end
    assert ours[29] == 1
    assert ours[30] == pytest.approx(0.92)
    assert ours[93:] == pytest.approx([0.2] * 7)


def test_a_penalty_beside_a_mean_error_is_d_times_as_large_beside_a_sum(x: Tensor) -> None:
    """1e-3 beside an error that is a mean over d (bartbussmann/BatchTopK) is d 1e-3 here: the ratio counts."""
    sae = make("relu-released", x, l1=D_IN * 1e-3)
    fwd = sae.run(Batch.of(x))
    losses = sae.losses(fwd, torch.zeros(D_SAE, dtype=torch.bool))
    theirs = (x - fwd.x_hat).square().mean() + 1e-3 * fwd.latents.sum(1).mean()
    assert float(sum(losses.values()).detach()) == pytest.approx(
        D_IN * float(theirs.detach()), rel=1e-5
    )


def test_jumprelu_without_b_dec_in_its_encoder_is_read_and_exported_as_it_encodes(
    x: Tensor, tmp_path: Path
) -> None:
    """A theta that training took below 0 is 0 in use, as in dictionary_learning."""
    sae = make("jumprelu-released", x, l0_weight=0.1)
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        sae.direct_theta.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
    sae.eval()
    pre_acts = x @ sae.W_enc + sae.b_enc
    expected = (pre_acts * (pre_acts > sae.direct_theta)).relu()
    torch.testing.assert_close(sae.encode(x), expected)
    matrix, bias = sae.readers()
    torch.testing.assert_close((x - sae.b_dec) @ matrix + bias, pre_acts)
    _, _, back = sae_of(plain_of(sae))
    torch.testing.assert_close(back.encode(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back(x), sae(x), rtol=1e-4, atol=1e-4)
