"""SAEs of every variant as SAEBench and sae-probes see them: their own code against what saeflow computes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from saeflow.errors import UserError
from saeflow.evaluation.absorption import Words, absorbed, measure
from saeflow.evaluation.measure import measure_rows
from saeflow.evaluation.probing import most_different
from saeflow.evaluation.rows import EvaluatedRows, RowSelection
from saeflow.exchange import adapt
from saeflow.exchange.adapter import Adapter
from saeflow.saes import SAE, VARIANTS, build, load, save

D_IN, D_SAE, K = 12, 40, [1, 2, 5]
CONSTANT = {"kind": "constant"}
TOPK = {"k": 5, "k_schedule": CONSTANT, "auxk_weight": 0.0}
BATCH = {**TOPK, "threshold_start_step": 0}
SHARED = {
    "architecture": "shared", "activation": "weights", "query": "linear", "score_scale": 2.0, "max_rate": None,
    "loss": "squared", "l1": 0.0, "l1_schedule": CONSTANT,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {"l1": 0.1, "l1_schedule": CONSTANT}),
    "p_anneal": (
        "p_anneal",
        {"l1": 0.1, "l1_schedule": CONSTANT, "p_end": 0.2, "p_updates": 10, "anneal_start": 0.5},
    ),
    "topk": ("topk", TOPK),
    "abs_topk": ("abs_topk", TOPK),
    "top_afa": ("top_afa", {"afa_weight": 0.1, "auxk_weight": 0.0}),
    "matching_pursuit": ("matching_pursuit", {"residual_threshold": 0.5, "max_iterations": 4}),
    "batch_topk": ("batch_topk", BATCH),
    "matryoshka": ("matryoshka", {**BATCH, "groups": {"fractions": [0.25, 0.25]}}),
    "feature_choice": ("feature_choice", BATCH),
    "jumprelu": (
        "jumprelu",
        {
            "l0_weight": 1.0, "l0_schedule": CONSTANT, "target_l0": None, "target_schedule": CONSTANT,
            "threshold": 0.1, "bandwidth": 0.1,
        },
    ),
    "gated": ("gated", {"l1": 0.1, "l1_schedule": CONSTANT}),
    "soft_topk": (
        "soft_topk",
        {
            **TOPK, "k_max": 12.0, "estimator_width": 8, "alpha": 0.02, "alpha_schedule": CONSTANT,
            "budget_weight": 1.0, "hard_fraction": 0.2, "hard_phase": "full",
        },
    ),
    "adaptive_k": (
        "adaptive_k",
        {
            "form": "per_token", "complexity": "labels", "k_min": 2, "k_max": 12, "steepness": 6.0,
            "phase_ratio": 0.9, "probe_weight": 0.05, "l1": 0.005, "alpha": None, "auxk_weight": 0.0,
        },
    ),
    "sparsemax": ("sparsemax", SHARED),
    "sparsemax-mlp": ("sparsemax", {**SHARED, "architecture": "mlp", "query": "identity"}),
    "sparsemax-scores": ("sparsemax", {**SHARED, "activation": "scores", "query": "identity"}),
    "entmax": ("entmax", {**SHARED, "alpha": 1.5, "is_alpha_learned": False}),
}  # fmt: skip
SCALED = {"sparsemax", "sparsemax-mlp", "sparsemax-scores", "entmax", "relu"}
"""Whose decoder rows have other norms than 1 here, as such of imported SAEs (relu) may."""
ABSORPTION = {
    "max_k": 3, "f1_jump": 0.03, "l1": 0.01, "min_probe_f1": 0.6, "min_letters": 20, "full_cosine": 0.025,
    "fraction_cosine": 0.1, "projection_share": 0.4, "absorbers": 3, "seed": 0,
}  # fmt: skip
ALL = RowSelection(positions="all", norm_limit=None)


def drawn(case: str) -> SAE:
    """An SAE of random weights."""
    torch.manual_seed(list(CASES).index(case))
    variant, options = CASES[case]
    sae = build(variant, D_IN, D_SAE, options)
    state = {
        name: torch.randn_like(part) * 0.4
        for name, part in sae.state_dict().items()
        if part.ndim and part.is_floating_point()
    }
    if case not in SCALED:
        state["W_dec"] = torch.nn.functional.normalize(state["W_dec"])
    if "threshold" in sae.state_dict():
        state["threshold"] = torch.full_like(sae.threshold, 0.3)
    sae.load_state_dict(sae.state_dict() | state)
    return sae.eval()


def folder_of(case: str, below: Path, hook_point: str = "blocks.1.resid_post") -> Path:
    folder = below / case
    folder.mkdir(parents=True)
    variant, options = CASES[case]
    facts = {"variant": variant, "options": options, "d_in": D_IN, "d_sae": D_SAE, "name": case}
    save(drawn(case).state_dict(), folder, {**facts, "hook_point": hook_point})
    return folder


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(1)) * 2


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    torch.testing.assert_close(
        ours.double(), theirs.double(), atol=tolerance, rtol=tolerance, check_device=False
    )


def test_every_variant_is_adapted() -> None:
    assert {variant for variant, _ in CASES.values()} == set(VARIANTS)


@pytest.mark.parametrize("case", CASES)
def test_decoder_rows_are_unit_and_reconstructions_unchanged(case: str, tmp_path: Path) -> None:
    sae, adapted = drawn(case), adapt(folder_of(case, tmp_path), "tiny")
    x = rows(6, 4)
    with torch.no_grad():
        norms = sae.directions().norm(dim=1)
        assert bool(((norms - 1).abs() > 0.01).any()) == (case in SCALED)
        close(adapted.W_dec.norm(dim=1), torch.ones(D_SAE))
        assert adapted.check_decoder_norms()
        latents = adapted.encode(x)
        assert latents.shape == (6, 4, D_SAE)
        close(latents, sae.encode(x) * norms)
        close(adapted(x), sae(x))
        close(adapted.decode(latents), latents @ adapted.W_dec + adapted.b_dec)


@pytest.mark.parametrize("case", CASES)
def test_the_encoder_is_what_pre_activations_are_linear_in(case: str, tmp_path: Path) -> None:
    """By differences of pre-activations, at unit distance from b_dec."""
    sae, adapted = drawn(case), Adapter(drawn(case), "tiny", "blocks.1.resid_post")
    direction = torch.nn.functional.normalize(rows(7))
    with torch.no_grad():
        found = sae.pre_activations(adapted.b_dec + direction) * sae.directions().norm(dim=1)
    close(direction @ adapted.W_enc + adapted.b_enc, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_input_is_kept_whatever_that_of_the_weights(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    adapted = adapt(folder_of("soft_topk", tmp_path), "tiny")
    x = rows(3, 5).to(dtype)
    before = adapted.encode(x), adapted(x)
    moved = adapted.to(device="cpu", dtype=dtype)
    assert moved is adapted
    assert (moved.dtype, moved.cfg.dtype) == (dtype, str(dtype).removeprefix("torch."))
    assert {moved.W_enc.dtype, moved.W_dec.dtype, moved.b_enc.dtype, moved.b_dec.dtype} == {dtype}
    assert moved.check_decoder_norms()
    for one, other in zip(before, (moved.encode(x), moved(x)), strict=True):
        assert one.dtype == other.dtype == dtype
        assert torch.equal(one, other)  # the SAE itself computes in float32


def test_gradients_reach_the_input_and_no_weight(tmp_path: Path) -> None:
    adapted = adapt(folder_of("topk", tmp_path), "tiny")
    x = rows(4).requires_grad_()
    adapted(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not list(adapted.parameters())


def test_the_config_says_where_it_reads(tmp_path: Path) -> None:
    cfg = adapt(folder_of("topk", tmp_path, "blocks.3.mlp_out"), "gpt2-small").cfg
    assert (cfg.model_name, cfg.d_in, cfg.d_sae) == ("gpt2-small", D_IN, D_SAE)
    assert (cfg.hook_name, cfg.hook_layer, cfg.architecture) == (
        "blocks.3.hook_mlp_out",
        3,
        "saeflow-topk",
    )
    json.dumps(cfg.to_dict())


def test_an_sae_of_images_is_refused(tmp_path: Path) -> None:
    folder = folder_of("topk", tmp_path, "vision.blocks.2.resid_post")
    with pytest.raises(UserError, match=r"topk: hook_point: expected a place of a language model"):
        adapt(folder, "tiny")
    with pytest.raises(UserError, match="none"):
        adapt(tmp_path / "none", "tiny")


def test_a_row_that_is_zero_stays_zero() -> None:
    sae = drawn("topk")
    with torch.no_grad():
        sae.W_dec[3] = 0
    x = rows(9)
    adapted = Adapter(sae, "tiny", "blocks.1.resid_post")
    close(adapted(x), sae(x))
    assert not adapted.W_dec[3].any()
    assert not adapted.check_decoder_norms()


# Their own code.


class Rows:
    """The reading side of a store, over a tensor."""

    columns = ()

    def __init__(self, x: torch.Tensor) -> None:
        self.x, (self.rows, self.d_in), self.mean = x, x.shape, x.double().mean(0)

    def in_order(self, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, self.rows, batch_size):
            yield start, self.x[start : start + batch_size]


SIZES = {"train": 200, "test": 50}  # words of each letter
WIDTH = 26 + 4
OWN = [0, 2, 5]
PROBE = torch.zeros(WIDTH)
for _place, _weight in ((0, 1.0), (1, 0.3), (2, 0.5), (3, -0.2), (26, 0.7), (28, 1.0), (29, 0.8)):
    PROBE[_place] = _weight


def folder_of_letters(folder: Path) -> Path:
    """An SAE with a latent for each first letter, which `a` and `c` leave to other latents on some words.

    Latents 26 and 27 stand for such words of `a`; 28 weakens the latent of `c` and writes a part of it; `b` is
    told by its own latent and by 29, half of its words each. Decoder rows have norm 2.
    """
    folder.mkdir()
    W_enc, W_dec = torch.eye(WIDTH), torch.eye(WIDTH)
    for extra, letter, silences in ((26, 0, 5.0), (27, 0, 5.0), (28, 2, 0.5), (29, 1, 5.0)):
        W_enc[extra, letter] = -silences
        W_dec[extra, letter] = 1.0
    W_dec = torch.nn.functional.normalize(W_dec) * 2
    options = {"l1": 0.1, "l1_schedule": CONSTANT}
    config = {"variant": "relu", "options": options, "d_in": WIDTH, "d_sae": WIDTH}
    b_enc = torch.full((WIDTH,), -0.2)
    state = {"W_enc": W_enc.t().contiguous().t(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": torch.zeros(WIDTH)}  # fmt: skip
    state = build("relu", WIDTH, WIDTH, options).state_dict() | state
    save(state, folder, {**config, "name": "letters", "hook_point": "blocks.1.resid_post"})
    return folder


def spelled(split: str) -> dict[str, torch.Tensor]:
    """Activations of words of every letter, and the letters."""
    count = SIZES[split]
    generator = torch.Generator().manual_seed(count)
    letters = torch.arange(26).repeat_interleave(count)
    x = torch.randn(26 * count, WIDTH, generator=generator) * 0.04
    x[torch.arange(26 * count), letters] += 1
    x[0 : count // 50, 26] += 1
    x[count // 50 : count // 25, 27] += 1
    x[2 * count : 2 * count + count // 2, 28] += 1.2
    x[count : count + count // 2, 29] += 1
    return {"x": x, "letters": letters}


@pytest.fixture(scope="module")
def found(foreign: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of both libraries' functions on every case."""
    folder = tmp_path_factory.mktemp("benchmarks")
    saes = {case: folder_of(case, folder / "saes") for case in CASES}
    few = {case: saes[case] for case in ("topk", "sparsemax", "relu")}
    jobs: list[dict[str, Any]] = [
        {"do": "core", "folder": folder / "core", "saes": saes},
        {"do": "sparse_probing", "folder": folder / "sparse_probing", "saes": few, "k": K},
        {"do": "probes", "folder": folder / "probes", "saes": few, "k": K},
    ]
    for job in jobs:
        job["folder"].mkdir()
    x = {f"{split}.{name}": rows(60, 5) for split in ("train", "test") for name in "ab"}
    for name in ("train.b", "test.b"):
        x[name] = x[name].flip(0) + torch.linspace(-0.5, 0.5, D_IN)
    save_file(x, folder / "sparse_probing" / "x.safetensors")
    letters = folder_of_letters(folder / "saes" / "letters")
    jobs += [
        {"do": "absorption", "folder": folder / "absorption", "saes": {"letters": letters}, "max_k": 3, "own": OWN}
    ]  # fmt: skip
    (folder / "absorption").mkdir()
    held = {f"{split}.{name}": part for split in SIZES for name, part in spelled(split).items()}
    save_file(held | {"probe": PROBE}, folder / "absorption" / "words.safetensors")
    foreign(folder, jobs, "adapted.py")
    return folder


def said(found: Path, job: str) -> Any:
    return json.loads((found / job / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_saebench_measures_what_saeflow_measures(found: Path, case: str) -> None:
    x = load_file(found / "core" / "x.safetensors")["x"]
    flat, sae = x.reshape(-1, D_IN), drawn(case)
    store = Rows(flat)
    ours = measure_rows(sae, EvaluatedRows(store, ALL, 64, "cpu"))
    theirs = said(found, "core")[case]
    groups = theirs["metrics"]
    metrics = {name: value for group in groups.values() for name, value in group.items()}
    for their_name, our_name in (
        ("l0", "l0_mean"), ("cossim", "cosine"), ("explained_variance", "ev_saelens_6_18"),
        ("explained_variance_legacy", "ev_legacy_saelens"),
    ):  # fmt: skip
        assert metrics[their_name] == pytest.approx(ours.metrics[our_name], rel=1e-4), their_name
    per_token = ours.metrics["nmse"] * float(flat.square().sum(1).mean())
    assert metrics["mse"] * len(flat) == pytest.approx(per_token, rel=1e-4)
    assert metrics["ce_loss_with_sae"] == pytest.approx(theirs["loss_by_saeflow"], rel=1e-5)
    with torch.no_grad():
        rate = (sae.encode(flat) > 0).double().mean(0)
    close(rate, theirs["by_latent"]["feature_density"])
    assert theirs["config"]["hook_name"] == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("case", ["topk", "sparsemax", "relu"])
def test_saebench_probes_latents_of_saeflow(found: Path, case: str) -> None:
    x = load_file(found / "sparse_probing" / "x.safetensors")
    means = load_file(found / "sparse_probing" / f"{case}.safetensors")
    sae = drawn(case)
    with torch.no_grad():
        for name in "ab":
            latents = sae.encode(x[f"test.{name}"]) * sae.directions().norm(dim=1)
            close(latents.mean(1), means[name])
    accuracy = said(found, "sparse_probing")[case]
    assert {f"sae_top_{k}_test_accuracy" for k in K} <= set(accuracy)
    assert all(0 <= accuracy[f"sae_top_{k}_test_accuracy"] <= 1 for k in K)


@pytest.mark.parametrize("case", ["topk", "sparsemax", "relu"])
def test_sae_probes_chooses_the_latents_that_saeflow_chooses(found: Path, case: str) -> None:
    split = load_file(found / "probes" / "split.safetensors")
    sae = drawn(case)
    with torch.no_grad():
        latents = (sae.encode(split["x_train"]) * sae.directions().norm(dim=1)).numpy()
    answers = np.asarray(split["y_train"]) == 1
    for line in said(found, "probes")[case]:
        assert line["indices"] == most_different(latents, answers, line["k"]).tolist()
        assert 0.5 < line["test_auc"] <= 1


def words_of_split(split: str, sae: SAE) -> Words:
    held = spelled(split)
    with torch.no_grad():
        latents = sae.encode(held["x"]) * sae.directions().norm(dim=1)
    return Words(held["x"].numpy(), sparse.csr_array(latents.numpy()), np.asarray(held["letters"]))


def test_saebench_finds_the_absorption_that_saeflow_finds(found: Path) -> None:
    theirs = {line["letter"]: line for line in said(found, "absorption")["letters"]}
    sae = load(found / "saes" / "letters")
    directions = torch.nn.functional.normalize(sae.directions().detach()).numpy()
    train, test = (words_of_split(split, sae) for split in SIZES)
    *lines, mean = measure(train, test, directions, ABSORPTION)
    assert mean["counted"] == len(lines) == len(theirs) == 26
    for line in lines:
        other = theirs[line["letter"]]
        assert line["probe_f1"] == pytest.approx(other["f1_probe"], abs=0.02)
        assert line["true_positives"] == other["num_probe_true_positives"]
        assert set(line["latents"].split()) == {str(latent) for latent in other["split_feats"]}
        assert line["full_absorption"] == pytest.approx(other["full_absorption_rate"], abs=1e-9)
        fraction = other["mean_absorption_fraction"]
        assert line["absorption_fraction"] == pytest.approx(fraction, abs=0.02)
    by_letter = {line["letter"]: line for line in lines}
    assert by_letter["a"]["full_absorption"] == pytest.approx(0.04)
    assert by_letter["b"]["split_latents"] == 2
    assert by_letter["c"]["absorption_fraction"] > 0.1
    assert by_letter["c"]["full_absorption"] == 0
    assert by_letter["z"]["absorption_fraction"] == 0


def test_with_one_probe_each_word_is_absorbed_as_much_as_in_saebench(found: Path) -> None:
    sae = load(found / "saes" / "letters")
    directions = torch.nn.functional.normalize(sae.directions().detach()).numpy()
    words = words_of_split("test", sae)
    fractions, full = absorbed(words.x, words.latents, directions, PROBE.numpy(), OWN, ABSORPTION)
    theirs = said(found, "absorption")["words"]
    assert full.tolist() == [is_full for _, is_full in theirs]
    assert full.sum() > 10
    assert ((fractions > 0) & (fractions < 1)).sum() > 10
    assert (fractions == 1).sum() > 10
    np.testing.assert_allclose(fractions, [fraction for fraction, _ in theirs], atol=1e-5)


def test_what_is_adapted_is_what_is_loaded(tmp_path: Path) -> None:
    folder = folder_of("gated", tmp_path)
    x = rows(5)
    with torch.no_grad():
        close(adapt(folder, "tiny")(x), load(folder)(x))
