"""Each released trainer, step by step: this trainer and optimizer on its batches give its losses and weights.

`golden/NAME/trace.npz` holds 100 steps of code that the authors released, `trace.json` says what each array is and
what departs from the released run. The learning rate, k and alpha of a step are the trace's: released code takes
them a step late (docs/paper-against-code.md).
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeflow.batch import Batch
from saeflow.config import SAEConfig, TrainingConfig
from saeflow.config.variants import with_defaults, with_preset
from saeflow.saes import SAE
from saeflow.saes.adaptive_k import AdaptiveK
from saeflow.saes.batch_topk import BatchTopK
from saeflow.saes.soft_topk import SoftTopK
from saeflow.saes.sparsemax import Sparsemax
from saeflow.training.run import Run, Stepped

GOLDEN = Path(__file__).parent / "golden"
D_IN, D_SAE, BATCH, STEPS = 32, 256, 256, 100
CONSTANT = {"kind": "constant"}
K = {"k": 8, "k_schedule": CONSTANT}
UNCLIPPED: dict[str, Any] = {"grad_clip": None}
Arrays = Mapping[str, Tensor]
AtStep = Callable[[Any, int, Arrays], None]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Trace:
    """Inputs and outputs of the released code."""

    def __init__(self, name: str) -> None:
        data = np.load(GOLDEN / "data" / "data.npz")
        self.rows = torch.from_numpy(data["rows"].astype(np.float32))  # (2048, d_in) raw
        self.order = torch.from_numpy(data["batches"].astype(np.int64))  # (100, 256)
        self.complexity = torch.from_numpy(data["scores"].astype(np.float32)) / 10
        with np.load(GOLDEN / name / "trace.npz") as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        info = json.loads((GOLDEN / name / "trace.json").read_text())
        self.rows = (self.rows - self.arrays.get("shift", 0)) / info.get("norm_factor", 1.0)


class Store:
    """The trace's batches, as a store gives them."""

    model, scale, d_in, positions, targets = None, 1.0, D_IN, slice(0, None), None

    def __init__(self, batches: list[Tensor]) -> None:
        self.all = batches

    def batches(self, batch_size: int, seed: int, start_batch: int = 0, **_: Any) -> Iterator[Any]:
        yield from map(Batch.of, self.all[start_batch:])

    def last_rows(self) -> "Store":
        return self


class Traced(Run):
    """A run that takes learning rates, and what `at_step` sets, from a trace."""

    trace: Arrays
    at_step: AtStep

    def set_lr(self) -> None:
        together, *apart = self.optimizer.param_groups
        together["lr"] = float(self.trace["step.lr"][self.step])
        for group in apart:
            group["lr"] = float(self.trace["step.probe_lr"][self.step])
        self.optimizer.tell_rates()

    def one_step(self, batch: Batch) -> Stepped:
        begin = type(self.sae).begin_step

        def begin_step(step: int, total: int) -> None:
            begin(self.sae, step, total)
            self.at_step(self.sae, step, self.trace)

        self.sae.begin_step = begin_step
        return super().one_step(batch)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trace, and the options under which this project does the same.

    Attributes:
        first, final: our parameters from the trace's arrays, before the first step and after the last.
        at_step: sets k, alpha and penalty weights of a step.
        terms: our loss terms and facts, and theirs of each step, of which NaN is not compared.
        rtol, until, rough: relative difference allowed in the first `until` steps, and later: a latent or a
            rate that lies exactly at a threshold goes either way by rounding, and with an alpha of 1e-4 the
            released code departs as fast from itself when its first weights move by 1e-7.
        weights_atol: of the final weights, None where rounding has decided them.
        steps: how many are followed, of 100.
    """

    trace: str
    variant: str
    options: Mapping[str, Any]
    first: Callable[[Arrays], dict[str, Tensor]]
    final: Callable[[Arrays], dict[str, Tensor]]
    at_step: AtStep = lambda sae, step, t: None
    terms: Mapping[str, Callable[[Arrays], Tensor]]
    rtol: float = 1e-5
    until: int = STEPS
    rough: float = 0.0
    weights_atol: float | None = 1e-4
    steps: int = STEPS
    start: int = 0
    batches: Callable[[Trace], list[Tensor]] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole_options(self) -> dict[str, Any]:
        return with_defaults(self.variant, with_preset(self.trace, self.variant, self.options))


# Names of the released arrays.


def linear(t: Arrays, when: str, **others: str) -> dict[str, Tensor]:
    """Encoder and decoder that are nn.Linear, and other parameters by their names there."""
    found = {
        "W_enc": t.get(f"{when}.encoder.weight", t[f"{when}.decoder.weight"].T).T,
        "W_dec": t[f"{when}.decoder.weight"].T,
    }
    return found | named(t, when, **others)


def rows(t: Arrays, when: str, **others: str) -> dict[str, Tensor]:
    """Encoder (d_in, d_sae) and decoder (d_sae, d_in), and other parameters by their names there."""
    W_dec = t[f"{when}.W_dec"]
    found = {"W_enc": t.get(f"{when}.W_enc", W_dec.T), "W_dec": W_dec}
    return found | named(t, when, **others)


def named(t: Arrays, when: str, **others: str) -> dict[str, Tensor]:
    return {ours: t[f"{when}.{theirs}"] for ours, theirs in others.items() if theirs}


def quiet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the encoder's first 32 columns a quarter as long, so that those latents die."""
    W_enc = weights["W_enc"].clone()
    W_enc[:, :32] *= 0.25
    return {**weights, "W_enc": W_enc}


def first_linear(t: Arrays) -> dict[str, Tensor]:
    return {**quiet(linear(t, "init")), "b_dec": t["first.b_dec"]}


def first_rows(t: Arrays) -> dict[str, Tensor]:
    return {**quiet(rows(t, "init")), "b_dec": t["first.b_dec"]}


def final_linear(t: Arrays, b_dec: str = "b_dec", **others: str) -> dict[str, Tensor]:
    return linear(t, "final", b_enc="encoder.bias", b_dec=b_dec, **others)


def first_penalty(t: Arrays) -> dict[str, Tensor]:
    biases = named(t, "init", b_enc="encoder.bias") if "init.encoder.bias" in t else {}
    return {**linear(t, "init"), "b_dec": t["first.b_dec"], **biases}


ESTIMATOR = {"output.weight": "k_estimator.2.weight", "output.bias": "k_estimator.2.bias"}


def first_soft(t: Arrays) -> dict[str, Tensor]:
    hidden = t["init.decoder.weight"].T
    return {**first_linear(t), **named(t, "init", **ESTIMATOR), "hidden.weight": hidden}


def final_soft(t: Arrays) -> dict[str, Tensor]:
    hidden = {"hidden.weight": "k_estimator.0.weight", "hidden.bias": "k_estimator.0.bias"}
    return final_linear(t, **ESTIMATOR, **hidden)


def concepts(when: str) -> Callable[[Arrays], dict[str, Tensor]]:
    return lambda t: named(t, when, W_dec="concept", W_K="k", W_V="v")


# What a step takes from the trace.


def k_of_step(sae: Any, step: int, t: Arrays) -> None:
    sae.k = int(t["step.ae_k"][step])


def warm(name: str, weight: float) -> AtStep:
    """A penalty's warm-up over 20 steps, 0 at the first."""
    return lambda sae, step, t: setattr(sae, name, weight * min(step / 20, 1))


def soft(hard_from: int) -> AtStep:
    def at_step(sae: Any, step: int, t: Arrays) -> None:
        sae.is_fixed = step >= hard_from
        sae.k = float(t["step.ae_k"][step])
        sae.temperature = 0.0 if sae.is_fixed else float(t["step.ae_alpha"][step])

    return at_step


def in_order(trace: Trace) -> list[Tensor]:
    """AdaptiveK reads rows in order."""
    return [trace.rows[at] for at in torch.arange(2048).view(8, BATCH)] * 13


def step_of(name: str, factor: float = 1.0) -> Callable[[Arrays], Tensor]:
    return lambda t: factor * t[f"step.{name}"].double()


def only(name: str, steps: slice) -> Callable[[Arrays], Tensor]:
    """A term of some steps alone."""

    def found(t: Arrays) -> Tensor:
        values = torch.full((STEPS,), torch.nan, dtype=torch.float64)
        values[steps] = t[f"step.{name}"].double()[steps]
        return values

    return found


def after_step(name: str) -> Callable[[Arrays], Tensor]:
    """Return the trace's state after a step, as the next step uses it."""
    return lambda t: torch.cat((torch.full((1,), torch.nan), t[f"step.{name}"][:-1])).double()


def probe_term(t: Arrays) -> Tensor:
    deviation = t["step.deviation_weight"] * t["step.deviation"]
    term = 0.9 * (t["step.probe_mse"] + t["step.probe_l2"] + deviation).double()
    return term.where(torch.arange(STEPS) >= 90, torch.nan)  # the joint phase


def masked(t: Arrays) -> Tensor:
    """Share of concepts that a step leaves out of the next."""
    return torch.cat((t["step.masked"][1:] / D_SAE, torch.full((1,), torch.nan))).double()


WITH_AUXK = {"reconstruction": step_of("l2_loss"), "auxk": step_of("auxk_loss", 1 / 32)}
THRESHOLD = {**WITH_AUXK, "threshold": only("ae_threshold", slice(41, None))}


def softsae(trace: str, hard_from: int, **changes: Any) -> Case:
    options = {
        "preset": "softsae-released",
        **K,
        "hard_fraction": 0.0,
        **changes.pop("options", {}),
    }
    exact = slice(changes.get("until", hard_from))
    terms = {
        **WITH_AUXK,
        "k_hat": only("avg_k", slice(hard_from)),
        "budget": only("k_loss", exact),
    }
    return Case(
        trace=trace, variant="soft_topk", options=options, first=first_soft, final=final_soft,
        at_step=soft(hard_from), terms=terms, rtol=1e-4, **changes,
    )  # fmt: skip


CASES = [
    Case(
        trace="topk", variant="topk", options=K, first=first_linear, final=final_linear,
        at_step=k_of_step, terms=WITH_AUXK,
    ),
    Case(
        trace="batch-topk", variant="batch_topk", first=first_linear, final=final_linear,
        options={"preset": "batch-topk-released", **K, "threshold_start_step": 41},
        at_step=k_of_step, terms=THRESHOLD,
    ),
    Case(
        trace="matryoshka", variant="matryoshka", first=first_rows,
        final=lambda t: rows(t, "final", b_enc="b_enc", b_dec="b_dec"),
        options={"preset": "matryoshka-released", **K, "threshold_start_step": 41},
        at_step=k_of_step, terms=THRESHOLD,
    ),
    Case(
        trace="standard", variant="relu", options={"preset": "relu-released"}, first=first_penalty,
        final=lambda t: final_linear(t, "bias"), at_step=warm("l1", 0.04),
        terms={"reconstruction": step_of("mse_loss"), "loss": step_of("loss")},
        rtol=5e-4, weights_atol=6e-3, training=UNCLIPPED,
    ),
    Case(
        trace="gated", variant="gated", options={"preset": "gated-released"}, first=first_penalty,
        final=lambda t: linear(
            t, "final", b_enc="gate_bias", b_mag="mag_bias", r_mag="r_mag", b_dec="decoder_bias"
        ),
        at_step=warm("l1", 0.04), rtol=3e-5, training=UNCLIPPED,
        terms={"reconstruction": step_of("mse_loss"), "gate": step_of("aux_loss")},
    ),
    Case(
        trace="p-anneal", variant="p_anneal", options={"preset": "p-anneal-released"},
        first=first_penalty, final=lambda t: final_linear(t, "bias"), at_step=warm("l1", 0.015),
        terms={
            "reconstruction": step_of("mean_square_error"), "penalty": step_of("scaled_lp_loss"),
            "p": after_step("p"),
        },
        rtol=8e-4, weights_atol=6e-3, training=UNCLIPPED,
    ),
    Case(
        trace="jumprelu", variant="jumprelu", options={"preset": "jumprelu-released"},
        first=lambda t: {**rows(t, "init"), "b_dec": t["first.b_dec"], "direct_theta": t["init.threshold"]},
        final=lambda t: rows(t, "final", b_enc="b_enc", b_dec="b_dec", direct_theta="threshold"),
        at_step=warm("weight", 1.0),
        terms={"reconstruction": step_of("l2_loss"), "loss": step_of("loss")},
        until=60, rough=5e-3, weights_atol=6e-3,
    ),
    softsae("softsae-lm-warm", 91),
    softsae("softsae-lm", 91, until=8, rough=0.05, weights_atol=None, steps=40),
    softsae("softsae-lm-constant", STEPS, until=12, rough=0.05, weights_atol=None, steps=40),
    softsae(
        "softsae-clip", 86, until=10, rough=0.05, weights_atol=None, options={"k_max": 2 * D_IN}
    ),
    Case(
        trace="adaptivek", variant="adaptive_k",
        options={"preset": "adaptivek-released", "complexity": "scores", "k_min": 4, "k_max": 64},
        first=lambda t: {**first_linear(t), **named(t, "probe", probe_w="weights", probe_b="bias")},
        final=lambda t: final_linear(t, probe_w="probe.weights", probe_b="probe.bias"),
        terms={
            "reconstruction": step_of("recon_loss"), "l1": step_of("sparsity_loss", 0.005),
            "auxk": step_of("auxk_loss", 1 / 32), "k_hat": step_of("k_mean"), "probe": probe_term,
        },
        rtol=3e-4, until=90, rough=2e-3, weights_atol=3e-3, start=1, batches=in_order,
        training={"dead_after_tokens": 10_000},
    ),
    Case(
        trace="sparsemax-no-mask", variant="sparsemax", final=concepts("final"),
        first=lambda t: concepts("init")(Trace("sparsemax-mask").arrays),
        options={"preset": "sparsemax-released", "max_rate": None}, training=UNCLIPPED,
        terms={"reconstruction": step_of("mse_loss")}, until=20, rough=1e-3, weights_atol=2e-3,
    ),
    Case(
        trace="sparsemax-mask", variant="sparsemax", first=concepts("init"), final=concepts("final"),
        options={"preset": "sparsemax-released"}, training=UNCLIPPED,
        terms={"reconstruction": step_of("mse_loss"), "masked": masked},
        until=20, rough=0.2, weights_atol=None,
    ),
    Case(
        trace="sparsemax-relu-baseline", variant="relu", options={"preset": "relu-sparsemax-released"},
        first=lambda t: {**rows(t, "init"), "b_dec": t["first.b_dec"]},
        final=lambda t: rows(t, "final", b_enc="b_enc", b_dec="b_dec"),
        terms={"reconstruction": step_of("mse_loss"), "l1": step_of("l1_loss")},
        rtol=3e-5, training=UNCLIPPED,
    ),
]  # fmt: skip

IDS = [case.trace for case in CASES]


def run_of(case: Case, trace: Trace) -> Traced:
    """A run at the trace's first weights, before its first step."""
    chosen = {
        "tokens": STEPS * BATCH, "batch_size": BATCH, "lr": 1e-3, "betas": (0.9, 0.999), "lr_warmup_steps": 0,
        "lr_decay_fraction": 0.0, "grad_clip": 1.0, "dead_after_tokens": 2000, "train_decoder": True,
        "log_every_steps": 100, "input_scale": "raw", **case.training,
    }  # fmt: skip
    config = SAEConfig(
        name=case.trace, entry=case.trace, variant=case.variant, source="golden", hook_point="golden",
        d_sae=D_SAE, seed=0, options=case.whole_options, training=TrainingConfig(**chosen),
    )  # fmt: skip
    batches = case.batches(trace) if case.batches else [trace.rows[at] for at in trace.order]
    runtime = {"device": "cpu", "precision": "fp32", "checkpoint_every_s": 1e9}
    run = Traced(Store(batches), config, runtime, Path("/nonexistent"))
    run.trace, run.at_step, run.step = trace.arrays, case.at_step, case.start
    put(run.sae, case.first(trace.arrays))
    if isinstance(run.sae, AdaptiveK):
        run.at_step = give_probe(run.sae, trace)
    return run


@torch.no_grad()
def put(sae: SAE, weights: Mapping[str, Tensor]) -> None:
    own = sae.state_dict(keep_vars=True)
    for name, value in weights.items():
        own[name].copy_(value.reshape(own[name].shape))


def give_probe(sae: AdaptiveK, trace: Trace) -> AtStep:
    """The fitted probe, and at each step the scores of the batch's own rows."""
    sae.first_w, sae.first_b = sae.probe_w.detach().clone(), sae.probe_b.detach().clone()
    sae.ridge = trace.arrays["probe.lambda"]

    def at_step(sae: Any, step: int, t: Arrays) -> None:
        of_batch = slice(step % 8 * BATCH, (step % 8 + 1) * BATCH)
        sae.examples, sae.scores = trace.rows[of_batch], trace.complexity[of_batch]

    return at_step


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_training_follows_the_released_code(case: Case, is_sparse: bool) -> None:
    trace = Trace(case.trace)
    run = run_of(case, trace)
    sae, t = run.sae, trace.arrays
    sae.run = functools.partial(type(sae).run, sae, is_sparse=is_sparse)  # type: ignore[method-assign]
    found: list[dict[str, float]] = []
    for batch in run.batches(case.start):
        fwd, losses = run.one_step(batch)
        run.step += 1
        facts = {**{name: float(term) for name, term in losses.items()}, **sae.facts(fwd)}
        found.append({**facts, "l0": float(fwd.l0().double().mean())})
        if run.step == case.steps:
            break
    numbers = np.arange(case.start, case.steps)
    is_exact = numbers < case.until
    l0 = "l0" if "step.l0" in t else "l0_not_zero"
    for name, theirs in {**case.terms, "l0": step_of(l0)}.items():
        expected = theirs(t).numpy()[case.start : case.steps]
        mine = np.array([row.get(name, np.nan) for row in found])
        rtol = max(case.rtol, 1e-3) if name == "l0" else case.rtol  # counted at a threshold
        allowed = np.where(is_exact, rtol, case.rough) * np.abs(expected) + 1e-8
        is_given = np.isfinite(expected)
        assert is_given.any()
        off = is_given & ~(np.abs(mine - expected) <= allowed)
        assert not off.any(), (
            f"{name} at step {numbers[off][0]}: {mine[off][0]}, not {expected[off][0]}"
        )
    if case.weights_atol is not None:
        own = sae.state_dict()
        for name, theirs in case.final(t).items():
            if (
                name == "W_dec" and sae.has_unit_norm
            ):  # PatchSAE makes rows unit before a step, not after
                theirs = torch.nn.functional.normalize(theirs)
            torch.testing.assert_close(
                own[name], theirs.reshape(own[name].shape), rtol=0, atol=case.weights_atol, msg=name
            )


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_forward_pass_is_that_of_the_released_code(case: Case) -> None:
    """At the released weights before the first step and after the last."""
    trace = Trace(case.trace)
    sae, t, x = run_of(case, trace).sae, trace.arrays, trace.rows[:64]
    for when, weights in (("first", case.first(t)), ("last", {**case.first(t), **case.final(t)})):
        if f"forward.{when}.x_hat" not in t:
            continue
        put(sae, weights)
        # They select over these 64 rows together, as in training; the mask was made by passes of their own.
        sae.train(isinstance(sae, BatchTopK))
        if isinstance(sae, Sparsemax):
            sae.max_rate = None
        with torch.no_grad():
            latents, x_hat = sae.encode(x), sae(x)
        if isinstance(sae, Sparsemax):
            latents = latents / x.norm(dim=1, keepdim=True)
        atol = 1e-6 * float(t[f"forward.{when}.x_hat"].abs().max())
        torch.testing.assert_close(x_hat, t[f"forward.{when}.x_hat"], rtol=1e-5, atol=atol)
        if f"forward.{when}.latents" in t:
            atol = 1e-6 * float(latents.abs().max())
            torch.testing.assert_close(latents, t[f"forward.{when}.latents"], rtol=1e-5, atol=atol)
        if isinstance(sae, SoftTopK):
            torch.testing.assert_close(sae.allowed_k(x), t[f"forward.{when}.k_hat"])


def test_masked_concepts_have_the_score_0_in_the_released_code() -> None:
    case = next(case for case in CASES if case.trace == "sparsemax-mask")
    trace = Trace(case.trace)
    run, t, x = run_of(case, trace), trace.arrays, trace.rows[:64]
    sae = run.sae.eval()
    put(sae, {"firing_rate": t["forward.second_pass.masked"].float()})
    with torch.no_grad():
        for latents in (sae.encode(x), sae.run(Batch.of(x), is_sparse=True).latents.dense()):
            expected = t["forward.second_pass.latents"] * x.norm(dim=1, keepdim=True)
            torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sae(x), t["forward.second_pass.x_hat"], rtol=1e-5, atol=1e-4)
