"""An option is stated once, in its variant's file; checks, defaults and documents follow."""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from saeflow.config import ROOT
from saeflow.config.options import VariantOptions, defaults, option, options_schema
from saeflow.config.variants import variants
from saeflow.errors import UserError
from saeflow.operators.soft_topk import FAR, FAR_SINGLE
from saeflow.saes import VARIANTS
from saeflow.saes.schedules import ScheduleForm


@dataclass(frozen=True, kw_only=True)
class Options(VariantOptions):
    """One option of each type."""

    count: int = option("A count.", unit="latents", counts_latents=True)
    weight: float = option("A weight.", default=1.0, low=0, high=2)
    word: Literal["a", "b"] = option("A word.", default="a")
    perhaps: float | None = option("A number, or null.", default=None, above=0)
    flag: bool = option("A switch.", default=False)
    schedule: ScheduleForm = option(
        "How count gets there.", default={"kind": "constant"}, counts_latents=True
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {},
            "expected the options count, weight, word, perhaps, flag, schedule, orthogonality_weight, "
            "orthogonality_chunk, aligned, found none",
        ),
        ({"count": 1, "other": 2}, "expected the options .*, found count, other"),
        (7, "expected the options .*, found 7"),
        ({"count": 0}, r"count: expected 1\.\.8 \(d_sae\), found 0"),
        ({"count": 9}, r"count: expected 1\.\.8 \(d_sae\), found 9"),
        ({"count": 1.0}, "count: expected a whole number, found 1.0"),
        ({"count": True}, "count: expected a whole number, found True"),
        ({"count": 1, "weight": -0.5}, "weight: expected at least 0, found -0.5"),
        ({"count": 1, "weight": 2.5}, "weight: expected at most 2, found 2.5"),
        ({"count": 1, "weight": float("nan")}, "weight: expected a number, found nan"),
        ({"count": 1, "weight": "1"}, "weight: expected a number, found '1'"),
        ({"count": 1, "word": "c"}, "word: expected one of a, b, found 'c'"),
        ({"count": 1, "perhaps": 0}, "perhaps: expected above 0, found 0"),
        ({"count": 1, "perhaps": "x"}, "perhaps: expected a number or null, found 'x'"),
        ({"count": 1, "flag": 1}, "flag: expected true or false, found 1"),
        ({"count": 1, "schedule": {"kind": "zigzag"}}, "schedule"),
        (
            {"count": 1, "schedule": {"kind": "linear", "from": 9, "until": 0.5}},
            r"schedule\.from: expected 1\.\.8 \(d_sae\), found 9",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Options.read(values, 8)
    assert "\n" not in str(caught.value)


def test_all_that_does_not_fit_is_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Options.read({"count": "x", "weight": 3, "word": "c"}, 8)
    assert [line.split(":")[0] for line in caught.value.lines] == ["count", "weight", "word"]


def test_what_is_not_stated_has_its_default_and_numbers_the_type_that_is_stated() -> None:
    made = Options.read({"count": 8, "weight": 2}, 8)
    assert made == Options(
        count=8, weight=2.0, word="a", perhaps=None, flag=False, schedule={"kind": "constant"}
    )
    assert type(made.weight) is float
    assert type(made.count) is int


def test_a_default_is_no_object_that_two_runs_share() -> None:
    first, second = Options.read({"count": 1}, 8), Options.read({"count": 1}, 8)
    assert first.schedule is not second.schedule


def test_options_that_are_read_without_torch_are_the_variants_own() -> None:
    assert list(variants()) == sorted(VARIANTS)
    for name, read in variants().items():
        own = VARIANTS[name].Options
        assert options_schema(read) == options_schema(own)
        assert defaults(read) == defaults(own)
        assert own.__name__ == read.__name__


def test_the_bounds_of_reach_are_those_of_the_operator() -> None:
    bounds = options_schema(variants()["soft_topk"])["properties"]["reach"]
    assert (bounds["minimum"], bounds["maximum"]) == (FAR, FAR_SINGLE)


TOY = '''"""Toy SAE: a latent is active above a floor, and costs its square."""

from dataclasses import dataclass

from torch import Tensor

from saeflow.config.options import VariantOptions, option
from saeflow.saes.base import SAE
from saeflow.saes.forward import Forward


@dataclass(frozen=True, kw_only=True)
class ToyOptions(VariantOptions):
    """Options of `toy`."""

    floor: float = option(
        "Pre-activation at which a latent becomes active.", default=0.5, unit="scaled activations", low=0
    )


class Toy(SAE):
    """z = a 1[a > floor]; the loss adds sum_i z_i^2, the mean over the batch."""

    Options = ToyOptions

    def __init__(self, d_in: int, d_sae: int, options: ToyOptions) -> None:
        super().__init__(d_in, d_sae)
        self.floor = options.floor

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return pre_acts * (pre_acts > self.floor)

    def losses(self, fwd: Forward, dead: Tensor) -> dict[str, Tensor]:
        penalty = self.sum_over_entries(fwd.values.square().sum()) / self.rows(fwd.x)
        return super().losses(fwd, dead) | {"penalty": penalty}
'''


@pytest.fixture(scope="module")
def with_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a variant more: its file, and its line in the table."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copytree(
        ROOT / "src" / "saeflow",
        folder / "src" / "saeflow",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (folder / "src/saeflow/saes/toy.py").write_text(TOY)
    table = folder / "src/saeflow/saes/variants.py"
    text = table.read_text().replace("\nVARIANTS", "\nfrom saeflow.saes.toy import Toy\n\nVARIANTS")
    table.write_text(text.replace('    "topk": TopK,\n', '    "topk": TopK,\n    "toy": Toy,\n'))
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_new_variant_is_one_file_and_its_line_in_the_table(with_toy: Path) -> None:
    params: Any = yaml.safe_load((ROOT / "tests/workflow/synthetic.yaml").read_text())
    store = next(iter(params["saes"].values()))["store"]
    params["figures"]["names"] = ["fvu_l0"]
    params["evaluation"].pop("latents", None)
    params["evaluation"].pop("interpretability", None)
    params["saes"] = {
        "toy": {"variant": "toy", "store": store, "d_sae": 64, "options": {"floor": [0.1, 1]}}
    }
    (with_toy / "good.yaml").write_text(yaml.safe_dump(params))
    done = run(with_toy, "-m", "saeflow", "validate", "--params", "good.yaml")
    assert done.returncode == 0, done.stderr
    assert "2 SAEs" in done.stdout
    params["saes"]["toy"]["options"] = {"floor": -1, "flor": 1}
    (with_toy / "bad.yaml").write_text(yaml.safe_dump(params))
    done = run(with_toy, "-m", "saeflow", "validate", "--params", "bad.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: bad.yaml: saes.toy.options: unknown key flor. Known keys: aligned, floor, orthogonality_chunk, orthogonality_weight.",
        "error: bad.yaml: saes.toy.options.floor: expected at least 0, found -1.",
    ]


def test_the_options_of_a_new_variant_are_described(with_toy: Path) -> None:
    done = run(with_toy, "-m", "saeflow", "parameters", "toy")
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "floor",
        "    Pre-activation at which a latent becomes active.",
        "    number at least 0; scaled activations; default 0.5",
    ]
    every = [line for line in lines[3:] if not line.startswith(" ")]
    assert every == [
        "orthogonality_weight",
        "orthogonality_chunk",
        "aligned",
    ]  # options of every variant
    page = run(
        with_toy, "-c", "from saeflow.config.describe import as_markdown; print(as_markdown())"
    )
    assert "### toy\n" in page.stdout
    assert (
        "| `floor` | Pre-activation at which a latent becomes active. | number at least 0 |"
        in page.stdout
    )


TRAIN_TOY = """
import sys
from pathlib import Path
import torch
from saeflow import load
from saeflow.batch import Batch
from saeflow.config import SAEConfig, TrainingConfig
from saeflow.training import train


class Store:
    d_in, scale, mean, model, positions, targets = 8, 1.0, torch.zeros(8), None, slice(0, None), None

    def batches(self, size, seed, start=0, *, pin=False):
        while True:
            yield Batch.of(torch.randn(size, 8, generator=torch.Generator().manual_seed(start)))
            start += 1


training = TrainingConfig(
    tokens=640, batch_size=32, input_scale="raw", lr=1e-2, betas=(0.9, 0.999), lr_warmup_steps=0, lr_decay_fraction=0.0,
    grad_clip=1.0, dead_after_tokens=1000, train_decoder=True, log_every_steps=10,
)
config = SAEConfig(
    name="toy", entry="toy", variant="toy", source="drawn", hook_point="drawn", d_sae=16, seed=0, options={"floor": 0.1},
    training=training,
)
folder = Path(sys.argv[1])
train(Store(), config, {"device": "cpu", "precision": "fp32", "checkpoint_every_s": 1e9}, folder)
print(load(folder).floor)
"""


def test_a_new_variant_trains_with_its_loss(with_toy: Path, tmp_path: Path) -> None:
    done = run(with_toy, "-c", TRAIN_TOY, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.1\n"
    with (tmp_path / "steps.csv").open() as file:
        first, last = csv.DictReader(file)
    for row in (first, last):
        assert float(row["loss"]) == pytest.approx(
            float(row["reconstruction"]) + float(row["penalty"])
        )
    assert float(last["loss"]) < float(first["loss"])


def test_a_new_variant_encodes_with_its_default(with_toy: Path) -> None:
    code = (
        "import torch; from saeflow.saes import build; sae = build('toy', 3, 3, {});"
        "sae.W_enc.data.copy_(torch.eye(3)); print(sae.encode(torch.tensor([0.4, 0.6, -1.0])).tolist())"
    )
    done = run(with_toy, "-c", code)
    assert done.returncode == 0, done.stderr
    assert [round(value, 6) for value in yaml.safe_load(done.stdout)] == [0, 0.6, 0]
