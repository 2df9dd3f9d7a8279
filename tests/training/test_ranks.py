"""Two processes train one SAE: the weights that one process trains, within rounding."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from saeflow.training import train
from saeflow.training.checkpoints import checkpoints, read_checkpoint

from .conftest import OPTIONS, Samples
from .on_ranks import (
    ALIGNED,
    BREAKS_AT,
    EVERY_STEP,
    PENALISED,
    QUIET,
    UNDERUSED,
    acting_as_gpu,
    breaks,
    setting,
)

SPLITS = ("batch", "latents")
UNDIVIDED = ("top_afa", "matching_pursuit", "soft_topk", "sparsemax", "entmax")
ATOL = {"top_afa": 5e-3}
"""Tolerance of weights, 2e-4 for others: where two numbers of latents reach the norm alike, rounding decides, and the step differs."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two ranks do, in one start of them."""
    root = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    for split in SPLITS:
        (root / split / "moved").mkdir(parents=True)
        with pytest.raises(OSError, match="the disk is gone"):
            train(
                Samples(on_batch=breaks), setting("batch_topk"), EVERY_STEP, root / split / "moved"
            )
    script = Path(__file__).parent / "on_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(root)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    for variant in OPTIONS:
        (root / variant).mkdir()
        train(Samples(), setting(variant), QUIET, root / variant)
    return root


def assert_same_sae(found: Path, expected: Path, atol: float = 2e-4) -> None:
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (found / "config.json").read_bytes() == (expected / "config.json").read_bytes()


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_train_the_sae_of_one(
    split: str, variant: str, together: Path, alone: Path
) -> None:
    if split == "latents" and variant in UNDIVIDED:
        refused = (together / split / variant / "refused").read_text()
        assert refused.startswith("runtime.ranks.split: latents of")
        return
    atol = ATOL.get(variant, 2e-4)
    assert_same_sae(together / split / variant, alone / variant, atol)


def test_two_ranks_count_the_penalty_on_directions_once(together: Path, tmp_path: Path) -> None:
    train(Samples(), setting(PENALISED), QUIET, tmp_path)
    assert_same_sae(together / "batch" / PENALISED, tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_keep_encoder_and_decoder_aligned(
    split: str, together: Path, tmp_path: Path
) -> None:
    train(Samples(), setting(ALIGNED), QUIET, tmp_path)
    assert_same_sae(together / split / ALIGNED, tmp_path)
    found = load_file(together / split / ALIGNED / "weights.safetensors")
    products = (found["W_enc"].T.double() * found["W_dec"].double()).sum(1)
    torch.testing.assert_close(products, torch.ones_like(products), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_agree_on_which_latents_are_underused(
    split: str, together: Path, tmp_path: Path
) -> None:
    train(Samples(), setting(UNDERUSED), QUIET, tmp_path)
    losses = pd.read_csv(tmp_path / "steps.csv").auxk
    assert not losses[losses.index < 10].any()  # no latent is dead
    assert losses.iloc[-1] > 0
    assert_same_sae(together / split / UNDERUSED, tmp_path)


def test_latents_with_a_penalty_on_directions_are_not_divided(together: Path) -> None:
    refused = (together / "latents" / PENALISED / "refused").read_text()
    assert refused.startswith(
        "saes.topk.options.orthogonality_weight: expected 0 where runtime.ranks.split"
    )


@pytest.mark.parametrize("variant", OPTIONS)
def test_two_ranks_that_act_as_gpus_train_the_sae_of_one(
    variant: str, together: Path, tmp_path: Path
) -> None:
    with acting_as_gpu():
        train(Samples(), setting(variant), QUIET, tmp_path)
    assert_same_sae(together / "as_gpu" / variant, tmp_path, ATOL.get(variant, 2e-4))


@pytest.mark.parametrize("split", SPLITS)
def test_one_process_goes_on_from_the_checkpoint_of_two(
    split: str, together: Path, alone: Path
) -> None:
    folder = together / split / "broken"
    (left,) = checkpoints(folder)
    assert read_checkpoint(left)[1]["step"] == BREAKS_AT
    train(Samples(), setting("batch_topk"), QUIET, folder)
    assert_same_sae(folder, alone / "batch_topk")


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_go_on_from_the_checkpoint_of_one(
    split: str, together: Path, alone: Path
) -> None:
    assert_same_sae(together / split / "moved", alone / "batch_topk")
