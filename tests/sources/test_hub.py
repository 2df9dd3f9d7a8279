"""A hub that hangs, drops, errs, answers garbage or other bytes: one line, and nothing taken for the model."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from saeflow.files import read_json

from .fake_hub import NAME, SHA, serving

FAULTS = [
    ("hang", ""), ("garbage", ""), ("hang", "config.json"), ("drop", "config.json"),
    ("error", "config.json"), ("garbage", "config.json"), ("hang", "model.safetensors"),
    ("drop", "model.safetensors"), ("rot", "model.safetensors"), ("rot", "tokenizer.json"),
]  # fmt: skip

IMPATIENT = """
import time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.05))  # the waits of the hub's library between its tries
from saeflow.cli import main
main()
"""


def fetch(address: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """`saeflow fetch` from a hub at an address, with a cache of its own."""
    model = {"model": {"hub": NAME, "revision": SHA}, "hook_points": ["blocks.1.resid_post"]}
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", IMPATIENT, "fetch", "--out", str(folder / "model")]
    return subprocess.run(
        [*command, "--model", json.dumps(model)],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def disturbed(folder: Path, model_folder: Path, fault: str, file: str) -> tuple[str, int]:
    """Return the output of a try on a failing hub, and the exit code of the next try on a working one."""
    folder.mkdir()
    with serving(model_folder, fault, file) as address:
        done = fetch(address, folder)
    assert done.returncode == 2, (fault, file, done.stderr[-3000:])
    assert not (folder / "model").exists()
    if "Delete " in done.stderr:
        Path(done.stderr.split("Delete ")[1].split(" and run")[0]).unlink()
    with serving(model_folder, "none", "") as address:
        return done.stderr, fetch(address, folder).returncode


def test_a_model_comes_from_a_hub(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder, "none", "") as address:
        done = fetch(address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in read_json(tmp_path / "model" / "model.json")["files"]


@pytest.mark.heavy
def test_a_hub_that_fails_is_one_line_and_the_next_try_goes_on(
    model_folder: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(len(FAULTS)) as pool:
        waiting = {
            (fault, file): pool.submit(
                disturbed, tmp_path / f"{fault}-{file}", model_folder, fault, file
            )
            for fault, file in FAULTS
        }
    for case, result in waiting.items():
        said, code = result.result()
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, case
        assert "Traceback" not in said
        assert NAME in lines[0] or SHA in lines[0], case
        assert code == 0, case


def test_a_hub_that_cannot_be_reached_is_one_line_after_one_more_try(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = fetch(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "the hub cannot be reached: " in done.stderr
    assert f"{NAME} at {SHA}" in done.stderr


@pytest.mark.parametrize("faults", [1, 2])
def test_an_unreached_hub_is_asked_twice(model_folder: Path, tmp_path: Path, faults: int) -> None:
    with serving(model_folder, "error", "config.json", times=faults) as address:
        assert fetch(address, tmp_path).returncode == (0 if faults == 1 else 2)
