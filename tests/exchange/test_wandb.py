"""Weights & Biases, offline: the library itself takes the steps of a real training run."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeflow.config import ROOT

CODE = """
import sys
from pathlib import Path

sys.path.append(sys.argv[1])  # behind this environment's own packages
sys.path.append(sys.argv[2])
from training_conftest import RUNTIME, Samples, config
from saeflow.training import train_group

wandb = {"folder": "logs", "tensorboard": False, "wandb": {"project": "saes"}}
tasks = [(config(v, steps=30), Path(v), None) for v in ("topk", "relu")]
for _, folder, _ in tasks:
    folder.mkdir()
train_group(Samples(), tasks, {**RUNTIME, "checkpoint_every_s": 1e9, "logging": wandb})
"""


def test_offline_runs_hold_every_logged_step(foreign: Callable[..., Any], tmp_path: Path) -> None:
    from environments import EXCHANGE, environment

    site = next((environment(EXCHANGE).parents[1] / "lib").glob("python*/site-packages"))
    conftest = ROOT / "tests" / "training" / "conftest.py"
    (tmp_path / "training_conftest.py").write_text(conftest.read_text())
    alone = {**os.environ, "WANDB_SILENT": "true", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(site), str(tmp_path)],
        cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    files = sorted((tmp_path / "logs" / "wandb").rglob("*.wandb"))
    assert len(files) == 2
    for variant in ("topk", "relu"):
        with (tmp_path / variant / "steps.csv").open() as file:
            rows = list(csv.DictReader(file))
        held = [read(file, site) for file in files]
        logged = next(steps for name, steps in held if variant in name)
        assert [step["_step"] for step in logged] == [int(row["step"]) for row in rows]
        for step, row in zip(logged, rows, strict=True):
            assert step["loss"] == pytest.approx(float(row["loss"]))


READ = """
import json, struct, sys
sys.path.append(sys.argv[1])
from wandb.proto import wandb_internal_pb2 as pb

data, at, held, name, steps = open(sys.argv[2], "rb").read(), 7, b"", "", []
while at + 7 <= len(data):
    if 32768 - at % 32768 < 7:  # records do not begin in the last bytes of a block
        at += 32768 - at % 32768
        continue
    _, length, kind = struct.unpack("<IHB", data[at : at + 7])
    held += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or the last part
        record, held = pb.Record.FromString(held), b""
        if record.WhichOneof("record_type") == "run":
            name = record.run.display_name
        if record.WhichOneof("record_type") == "history":
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            steps.append(items | {"_step": record.history.step.num})
print(json.dumps([name, steps]))
"""


def read(path: Path, site: Path) -> tuple[str, list[dict[str, Any]]]:
    """Name and history of an offline run: the library's records in blocks as LevelDB's logs have them."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(site), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    name, steps = json.loads(done.stdout)
    return name, steps
