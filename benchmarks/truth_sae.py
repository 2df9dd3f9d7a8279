"""One run of `truth.py`: rows of a world, an SAE trained on them, and what it finds of their truth."""

import functools
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from torch import Tensor
from truth_settings import (
    D_IN,
    D_SAE,
    LAWS,
    MEAN_L0,
    MOST,
    ORACLE,
    PROBE_ROWS,
    ROWS,
    RUNTIME,
    SOURCE,
    TRAINING,
    Task,
    variant_of,
)

from saeflow.batch import Batch
from saeflow.complexity.files import PROBE
from saeflow.config import SAEConfig
from saeflow.evaluation.controls import by_norm
from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.recovery import Recovery
from saeflow.operators import keep_topk
from saeflow.saes import SAE
from saeflow.saes.forward import Forward
from saeflow.saes.topk import TopK
from saeflow.sources import open_source, prepare_inputs
from saeflow.training.optimizer import Optimizer
from saeflow.training.run import Run
from saeflow.training.trainer import advance


@dataclass
class Data:
    """One synthetic data set in memory: what the trainer needs of a store, and the truth."""

    targets = None  # rows are their own

    features: Tensor
    train: Tensor
    held_out: Tensor
    true_indices: np.ndarray
    train_count: Tensor
    d_in: int
    scale: float

    @property
    def true_count(self) -> Tensor:
        return torch.from_numpy((self.true_indices >= 0).sum(1))

    def batches(self, batch_size: int, seed: int, start_batch: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches."""
        per_epoch = len(self.train) // batch_size
        for number in itertools.count(start_batch):
            epoch, place = divmod(number, per_epoch)
            if place == 0 or number == start_batch:
                generator = torch.Generator().manual_seed(1000 * seed + epoch)
                order = torch.randperm(len(self.train), generator=generator)
            yield Batch.of(self.train[order[place * batch_size : (place + 1) * batch_size]])

    def with_count(self) -> "Data":
        """The same data with the true number of active features as a last column, for the oracle."""

        def joined(x: Tensor, count: Tensor) -> Tensor:
            return torch.cat([x, count[:, None].float()], 1)

        return replace(
            self,
            train=joined(self.train, self.train_count),
            held_out=joined(self.held_out, self.true_count),
        )


@functools.lru_cache(maxsize=1)  # runs of one world follow each other
def draw(law: str) -> Data:
    """Sample the data set of a world."""
    params = {**SOURCE, **LAWS[law]}
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        prepare_inputs(params, ROWS, Path(name) / "model", inputs)
        source = open_source(params, Path(name), "cpu")
        blocks = {split: source.block(split, 0, source.n_contexts(split)) for split in ROWS}
        features = load_file(inputs / "dictionary.safetensors")["features"]
    train, held_out = (blocks[split].activations["features"] for split in ("train", "evaluation"))
    scale = math.sqrt(float(train.square().sum(1).mean()) / D_IN)
    truth = blocks["evaluation"].columns["true_indices"]
    count = torch.from_numpy((blocks["train"].columns["true_indices"] >= 0).sum(1))
    return Data(features, train, held_out, truth, count, D_IN, scale)


class Oracle(TopK):
    """TopK with each row's true k, which stands in the column after the activations."""

    unit = 1.0  # what the column was divided by

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.d_in], (x[:, self.d_in] * self.unit).round().long()

    def run(self, batch: Batch, *, is_sparse: bool | None = None) -> Forward:
        x, count = self.split(batch.x)
        self.k_of_rows = (count * self.k / MEAN_L0).round().long()  # the schedule of the others
        return super().run(Batch.of(x), is_sparse=False)

    def condition(self, x: Tensor) -> Tensor | None:
        return self.k_of_rows

    def activate(self, pre_acts: Tensor, condition: Tensor | None) -> Tensor:
        return keep_topk(pre_acts.relu(), condition)

    def encode(self, x: Tensor) -> Tensor:
        x, self.k_of_rows = self.split(x)
        return super().encode(x)


def train_sae(data: Data, task: Task) -> SAE:
    """Train one SAE with the trainer, folded to raw units."""
    variant = variant_of(task.sae)
    config = SAEConfig(
        name=task.sae, entry=task.sae, variant=variant, source="truth", hook_point="features", d_sae=D_SAE,
        seed=task.seed, options=task.options, training=task.training,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        probe = fit(data, Path(folder)) if variant == "adaptive_k" else None
        run = Run(data, config, RUNTIME, Path(folder), probe)
        if task.sae == ORACLE:
            told = Oracle(data.d_in, D_SAE, Oracle.Options.read(task.options, D_SAE))
            told.load_state_dict(run.sae.state_dict())
            told.unit = run.inputs.scale
            run.sae, run.store = told.train(), data.with_count()
            run.rows_of = run.store
            run.optimizer = Optimizer(told, TRAINING)
        advance([run])
    run.sae.fold(run.inputs, run.targets)
    if isinstance(run.sae, Oracle):
        run.sae.unit = 1.0
    return run.sae.eval()


def fit(data: Data, folder: Path) -> Path:
    """A probe of the true count, k = count / MOST * 10, from the first training rows."""
    x, count = data.train[:PROBE_ROWS], data.train_count[:PROBE_ROWS]
    score = (count.double() / (MOST + 1) * 10).numpy()
    found = Ridge(1.0).fit(x.double().numpy() / data.scale, score)
    tensors = {
        "weight": torch.tensor(found.coef_ / data.scale, dtype=torch.float32),
        "bias": torch.tensor(found.intercept_, dtype=torch.float32),
        "ridge": torch.tensor(1.0 / PROBE_ROWS), "scale": torch.tensor(data.scale), "examples": x,
        "scores": torch.tensor(score, dtype=torch.float32),
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / PROBE)
    return folder


def with_k(sae: SAE, x: Tensor, k: Tensor) -> Tensor:
    """Latents (rows, d_sae) with the k largest of each row, for any k (rows,)."""
    return keep_topk(sae.pre_activations(x).relu(), k.clamp(1, sae.d_sae))


def measure(sae: SAE, data: Data, latents: Tensor, k_hat: Tensor | None) -> dict[str, float]:
    """Reconstruction and recovery of the held-out rows."""
    x = data.held_out
    rebuilt = Reconstruction(x.double().mean(0))
    rebuilt.add(x, sae.decode(latents))
    recovery = Recovery(data.features, sae.directions(), is_signed=sae.is_signed)
    recovery.add(latents, data.true_indices, k_hat, x.double().norm(dim=1))
    metrics = {"fvu": rebuilt.metrics()["fvu"], **recovery.metrics()}
    return {**metrics, "l0_mean": float((latents != 0).sum(1).double().mean())}


def calibration(l0: Tensor, data: Data) -> dict[int, float]:
    """Mean L0 of the rows of each true count."""
    counts = data.true_count
    return {int(c): float(l0[counts == c].double().mean()) for c in counts.unique()}


def run(task: Task) -> list[dict[str, Any]]:
    """Train one SAE and measure it: a row for the SAE as it is, and one for each control of its own k."""
    torch.set_num_threads(1)  # each process its core
    data = draw(task.law)
    sae = train_sae(data, task)
    with torch.inference_mode():
        x = data.held_out
        latents = sae.encode(data.with_count().held_out if task.sae == ORACLE else x)
        k_hat = sae.allowed_k(x)
        ways = {"": (latents, k_hat)}
        if k_hat is not None:
            k = k_hat.floor().long()
            order = torch.randperm(len(k), generator=torch.Generator().manual_seed(task.seed))
            mean = torch.full_like(k, round(float(k.double().mean())))
            placed = torch.from_numpy(by_norm(k.numpy(), x.double().norm(dim=1).numpy()))
            ways["shuffled k"] = (with_k(sae, x, k[order]), None)
            ways["k by norm"] = (with_k(sae, x, placed), None)
            ways["mean k"] = (with_k(sae, x, mean), None)
        return [
            {
                "law": task.law, "sae": task.sae, "control": control, "seed": task.seed,
                **measure(sae, data, active, allowed),
                "calibration": calibration((active != 0).sum(1), data),
            }
            for control, (active, allowed) in ways.items()
        ]  # fmt: skip
