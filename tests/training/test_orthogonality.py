from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import D_IN, OPTIONS, Samples, config

from saeflow.config import SAEConfig
from saeflow.errors import UserError
from saeflow.saes import SAE, Ranks, build
from saeflow.training.orthogonality import Orthogonality
from saeflow.training.run import Run
from saeflow.training.trainer import train

RUNTIME = {"device": "cpu", "precision": "fp32", "checkpoint_every_s": 1e9}


def penalised(
    variant: str, weight: float, chunk: int = 8192, steps: int = 60, **changes: Any
) -> SAEConfig:
    plain = config(variant, steps, **changes)
    added = {"orthogonality_weight": weight, "orthogonality_chunk": chunk}
    return replace(plain, options={**plain.options, **added})


def largest_cosines(directions: np.ndarray) -> np.ndarray:
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -1)
    return cosines.max(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("variant", [name for name in OPTIONS if name != "adaptive_k"])
def test_every_variant_takes_the_penalty(variant: str, tmp_path: Path) -> None:
    run = Run(Samples(), penalised(variant, 0.7), RUNTIME, tmp_path)
    run.begin()
    directions = run.sae.directions().detach().double().numpy()
    batch = run.scaled(next(run.raw_batches()))
    terms = run.judge(run.sae.run(batch))
    expected = 0.7 * np.square(np.maximum(largest_cosines(directions), 0)).mean()
    assert terms["orthogonality"].item() == pytest.approx(expected, rel=1e-5)
    others = sum(term for name, term in terms.items() if name not in ("loss", "orthogonality"))
    assert terms["loss"].item() == pytest.approx(float(others) + expected, rel=1e-5)
    run.sae.zero_grad()
    terms["orthogonality"].backward()
    assert run.sae.W_dec.grad is not None
    assert run.sae.W_dec.grad.abs().sum() > 0


def test_a_penalty_makes_latents_less_alike_and_steps_csv_says_it(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 30.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        train(Samples(), penalised("topk", weight, steps=120), RUNTIME, folder)
        directions = load_file(folder / "weights.safetensors")["W_dec"].double().numpy()
        found[weight] = largest_cosines(directions).mean()
        assert ("orthogonality" in pd.read_csv(folder / "steps.csv")) == (weight > 0)
    assert found[30.0] < found[0.0] - 0.02


def made(chunk: int, variant: str = "topk") -> SAE:
    added = {"orthogonality_weight": 1.0, "orthogonality_chunk": chunk}
    return build(variant, D_IN, 32, {**OPTIONS[variant], **added})


def test_chunks_are_drawn_anew_in_every_step_and_again_alike() -> None:
    sae = made(10)
    penalty = Orthogonality(sae, seed=3)
    assert penalty.size == 8  # four chunks of equal size instead of three of 10 and one of 2
    orders = []
    for step in (0, 1, 0):
        penalty.begin(step)
        orders.append(penalty.order.tolist())
        assert sorted(orders[-1]) == list(range(32))
    assert orders[0] == orders[2] != orders[1]
    other = Orthogonality(sae, seed=4)
    other.begin(0)
    assert other.order.tolist() != orders[0]


def test_a_run_goes_on_from_its_checkpoint_with_the_chunks_of_its_step(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    told = penalised("batch_topk", 3.0, chunk=10, steps=30)
    expected = train(Samples(), told, RUNTIME, whole)

    def breaks(number: int) -> None:
        if number == 17:
            raise OSError("the disk is gone")

    every_step = {**RUNTIME, "checkpoint_every_s": 0}
    with pytest.raises(OSError, match="gone"):
        train(Samples(on_batch=breaks), told, every_step, resumed)
    assert train(Samples(), told, every_step, resumed) == expected


def test_without_a_weight_there_is_no_penalty() -> None:
    assert Orthogonality.of(build("topk", D_IN, 32, OPTIONS["topk"]), config("topk")) is None


def test_latents_that_are_divided_among_processes_are_refused() -> None:
    sae = made(10)
    sae.ranks = Ranks("latents", 0, 2)
    with pytest.raises(
        UserError, match=r"orthogonality_weight: expected 0 where runtime.ranks.split is latents"
    ):
        Orthogonality.of(sae, config("topk"))
