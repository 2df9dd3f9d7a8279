"""An exported SAE goes to a hub by the hub's own client, whole and with a token."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saeflow
from saeflow import provenance
from saeflow.batch import Batch
from saeflow.exchange import export_sae
from saeflow.saes import build
from saeflow.saes.files import save

from ..sources.fake_hub import NAME, SHA, TOKEN, serving


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae")
    sae = build("topk", 12, 40, {"k": 3})
    sae.initialise(Batch.of(torch.randn(64, 12)), torch.Generator().manual_seed(0))
    config = {
        "variant": "topk", "options": {"k": 3}, "d_in": 12, "d_sae": 40, "seed": 0, "source": "gpt2",
        "hook_point": "blocks.1.resid_post", "name": "gpt2/blocks.1.resid_post/topk/d40-seed0", "scale": 1.0,
        "training": {"tokens": 1000, "batch_size": 10, "input_scale": "unit"}, "model": None,
    }  # fmt: skip
    with provenance.job(folder / "own", name="train", params={"run": config}) as job:
        save(sae.state_dict(), job.path, config)
    with provenance.job(folder / "hub", name="export", inputs=[folder / "own"]) as job:
        export_sae(folder / "own", "hub", job.path, None, None)
    return folder / "hub"


def push(
    address: str, folder: Path, home: Path, token: str, *more: str
) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "saeflow", "push", str(folder), NAME, *more]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def test_the_hub_gets_what_was_exported(exported: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    with serving(there, "none", "") as address:
        done = push(address, exported, tmp_path, TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"/{NAME}/commit/{SHA}")
    assert {path.name for path in there.iterdir()} == {
        "README.md", "config.json", "weights.safetensors", "created.json"
    }  # fmt: skip
    assert '"visibility": "private"' in (there / "created.json").read_text()
    assert TOKEN not in done.stdout + done.stderr
    x = torch.randn(5, 12)
    assert torch.equal(saeflow.load(there)(x), saeflow.load(exported)(x))


def test_what_is_no_export_and_a_hub_that_refuses_are_one_line(
    exported: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    with serving(there, "none", "") as address:
        refused = push(address, exported, tmp_path, "hf_wrong")
        wrong = push(address, tmp_path, tmp_path, TOKEN)
    for done, said in (
        (refused, "cannot be written on the hub"),
        (wrong, "found no weights.safetensors"),
    ):
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert said in line
        assert "Traceback" not in done.stderr
    assert not list(there.iterdir())
