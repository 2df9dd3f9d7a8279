"""Every variant on data whose truth is known: does it find the dictionary, does its k follow the truth?

    python benchmarks/truth.py
    python benchmarks/truth.py --saes soft_topk-paper adaptive_k-paper --seeds 0 1 --laws varying --name truth_papers

Synthetic worlds of equal mean number of active features: constant in one and varying in another, where the norm of a
row grows with its number; varying at norms that tell nothing of it on average (balanced) or at all (equal); and constant at norms
that vary (rescaled). Every SAE is trained at several settings of its sparsity, with several seeds; the table shows the
setting whose mean L0 is nearest to the true mean. `oracle` is TopK told each row's true number, in
training and in use; `NAME-paper` has the weights of its paper, in the units of its paper; `topk-all` is HierarchicalTopK
and `batch_topk-pool` Sampled-SAE; `shuffled k`,
`k by norm` and `mean k` are the trained SAE with its own k permuted over the rows, handed out by the rank of their norms, or
replaced by its mean. Each run is kept in benchmarks/results/truth_runs.jsonl by a key of its settings, and is
computed again only with --again; the tables are of all kept runs of today's settings that are asked for, and say when
and by which commit each was made. A run of earlier code is not thrown away by itself. Written to
benchmarks/results/truth.md, .csv, .svg and .png, or under another name.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from tables import RESULTS, write
from torch import Tensor
from truth_runs import REFERENCE, keep, key_of, read, verdicts
from truth_settings import (
    D_IN,
    D_SAE,
    ENTRIES,
    LAWS,
    MEAN_L0,
    MOST,
    N_FEATURES,
    PROBE_ROWS,
    ROWS,
    RUNTIME,
    SCALES,
    SEEDS,
    SOURCE,
    TRAINING,
)

from saeflow.batch import Batch
from saeflow.complexity.files import PROBE
from saeflow.config import SAEConfig, TrainingConfig
from saeflow.evaluation.controls import by_norm
from saeflow.evaluation.reconstruction import Reconstruction
from saeflow.evaluation.recovery import Recovery
from saeflow.figures.style import COLUMN_WIDTH, Look, context, look, new_figure, save
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


def draw(law: Mapping[str, Any], *, with_count: bool) -> Data:
    """Sample a data set; with the true number of active features as a last column for the oracle."""
    params = {**SOURCE, **law}
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        prepare_inputs(params, ROWS, Path(name) / "model", inputs)
        source = open_source(params, Path(name), "cpu")
        blocks = {split: source.block(split, 0, source.n_contexts(split)) for split in ROWS}
        features = load_file(inputs / "dictionary.safetensors")["features"]
    rows = {split: block.activations["features"] for split, block in blocks.items()}
    scale = math.sqrt(float(rows["train"].square().sum(1).mean()) / D_IN)
    if with_count:
        for split, block in blocks.items():
            count = torch.from_numpy((block.columns["true_indices"] >= 0).sum(1))
            rows[split] = torch.cat([rows[split], count[:, None].float()], 1)
    truth = blocks["evaluation"].columns["true_indices"]
    count = torch.from_numpy((blocks["train"].columns["true_indices"] >= 0).sum(1))
    return Data(features, rows["train"], rows["evaluation"], truth, count, D_IN, scale)


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


def variant_of(name: str) -> str:
    return "topk" if name == "oracle" else name.partition("-")[0]


def training_of(name: str) -> TrainingConfig:
    """Return the budget of an SAE, in its own input scale."""
    return replace(TRAINING, input_scale=SCALES.get(name, TRAINING.input_scale))


def settings_of(law: str, name: str, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return all that decides a run besides the code."""
    return {
        "source": {**SOURCE, **LAWS[law]}, "rows": ROWS, "d_sae": D_SAE, "sae": name, "options": options,
        "seed": seed, "training": dataclasses.asdict(training_of(name)), "probe_rows": PROBE_ROWS,
    }  # fmt: skip


def train_sae(data: Data, name: str, options: Mapping[str, Any], seed: int) -> SAE:
    """Train one SAE with the trainer, folded to raw units."""
    training = training_of(name)
    variant = variant_of(name)
    config = SAEConfig(
        name=name, entry=name, variant=variant, source="truth", hook_point="features", d_sae=D_SAE,
        seed=seed, options=options, training=training,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if name == "oracle":
            plain = replace_rows(data)
            run = Run(plain, config, RUNTIME, Path(folder))
            oracle = Oracle(data.d_in, D_SAE, Oracle.Options.read(options, D_SAE))
            oracle.load_state_dict(run.sae.state_dict())
            oracle.unit = run.inputs.scale
            run.sae, run.store, run.rows_of = oracle.train(), data, data
            run.optimizer = Optimizer(oracle, TRAINING)
        else:
            probe = fit(data, Path(folder)) if variant == "adaptive_k" else None
            run = Run(data, config, RUNTIME, Path(folder), probe)
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


def replace_rows(data: Data) -> Data:
    """The same data without the oracle's column."""
    return replace(data, train=data.train[:, : data.d_in])


def with_k(sae: SAE, x: Tensor, k: Tensor) -> Tensor:
    """Latents (rows, d_sae) with the k largest of each row, for any k (rows,)."""
    return keep_topk(sae.pre_activations(x).relu(), k.clamp(1, sae.d_sae))


def measure(sae: SAE, data: Data, latents: Tensor, k_hat: Tensor | None) -> dict[str, float]:
    """Reconstruction and recovery of the held-out rows."""
    x = data.held_out[:, : data.d_in]
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


def options_of(name: str) -> list[dict[str, Any]]:
    """Return the settings of an SAE's options; the oracle has TopK's."""
    return ENTRIES["topk" if name == "oracle" else name]


def run(
    law: str, data: Data, name: str, options: Mapping[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Train one SAE and measure it: a row for the SAE as it is, and one for each control of its own k."""
    sae = train_sae(data, name, options, seed)
    with torch.inference_mode():
        latents = sae.encode(data.held_out)
        x = data.held_out[:, : data.d_in]
        k_hat = sae.allowed_k(x)
        ways = {"": (latents, k_hat)}
        if k_hat is not None:
            k = k_hat.floor().long()
            order = torch.randperm(len(k), generator=torch.Generator().manual_seed(seed))
            mean = torch.full_like(k, round(float(k.double().mean())))
            placed = torch.from_numpy(by_norm(k.numpy(), x.double().norm(dim=1).numpy()))
            ways["shuffled k"] = (with_k(sae, x, k[order]), None)
            ways["k by norm"] = (with_k(sae, x, placed), None)
            ways["mean k"] = (with_k(sae, x, mean), None)
        return [
            {
                "law": law, "sae": name, "control": control, "seed": seed,
                **measure(sae, data, active, allowed),
                "calibration": calibration((active != 0).sum(1), data),
            }
            for control, (active, allowed) in ways.items()
        ]  # fmt: skip


METRICS = [
    "l0_mean", "fvu", "matched_feature_cosine", "support_f1", "spearman_l0_true", "spearman_k_hat_true",
    "spearman_norm_true", "partial_l0_true", "partial_k_hat_true",
]  # fmt: skip


def nearest(rows: pd.DataFrame) -> pd.DataFrame:
    """Choose, for each SAE and law, the setting whose mean L0 is nearest to the true mean."""
    own = rows[rows.control == ""].groupby(["law", "sae", "setting"]).l0_mean.mean()
    distance = (own - MEAN_L0).abs()
    best = {key[:2]: key[2] for key in distance.groupby(["law", "sae"]).idxmin()}
    kept = [best[law, name] == n for law, name, n in rows[["law", "sae", "setting"]].values]
    return rows[kept]


def summary(rows: pd.DataFrame, law: str) -> pd.DataFrame:
    """Means over the seeds, with the spread from the least to the largest."""
    lines = []
    for (name, control), group in rows[rows.law == law].groupby(["sae", "control"], sort=False):
        line: dict[str, Any] = {
            "SAE": f"{name}, {control}" if control else name,
            "setting": ", ".join(sorted(set(group.stated))) or "–",
        }
        for metric in METRICS:
            values = group[metric].dropna() if metric in group else pd.Series(dtype=float)
            half = (values.max() - values.min()) / 2 if len(values) else 0.0
            line[metric] = f"{values.mean():.3f} ± {half:.3f}" if len(values) else "–"
        line["made"] = ", ".join(sorted(set(group.made)))
        lines.append(line)
    return pd.DataFrame(lines)


def look_of(name: str) -> Look:
    if name == "oracle":
        return Look("Oracle k", "#222222", "d")
    known = look(variant_of(name))
    setting = name.partition("-")[2]
    return replace(known, label=f"{known.label}, {setting}") if setting else known


def draw_calibration(rows: pd.DataFrame, file: str) -> None:
    """Mean L0 against the true number of active features, on the varying data."""
    own = rows[(rows.law == "varying") & (rows.control == "")]
    with context():
        figure = new_figure(COLUMN_WIDTH, 3.2)
        ax = figure.subplots()
        ax.plot([1, MOST], [1, MOST], color="#BBBBBB", linewidth=0.8, zorder=0)
        for name, group in own.groupby("sae", sort=False):
            curves = pd.DataFrame(list(group.calibration)).mean()
            curves.index = curves.index.astype(int)
            style = look_of(str(name))
            ax.plot(curves.index, curves, color=style.color, marker=style.marker, label=style.label)
        ax.set_xlabel("true active features")
        ax.set_ylabel("mean L0")
        ax.grid()
        figure.legend(loc="outside lower center", ncols=3)
        save(figure, RESULTS / file)


def main() -> None:
    known = ["oracle", *ENTRIES]
    parser = argparse.ArgumentParser(description="SAEs on data whose truth is known.")
    parser.add_argument("--saes", nargs="+", choices=known, default=known, metavar="SAE")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--laws", nargs="+", choices=list(LAWS), default=list(LAWS), metavar="LAW")
    parser.add_argument("--name", default="truth", help="of the files in benchmarks/results")
    parser.add_argument("--again", action="store_true", help="compute runs that are kept already")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found, kept = [], read()
    for law, name in itertools.product(asked.laws, asked.saes):
        data = None
        for number, options in enumerate(options_of(name)):
            for seed in asked.seeds:
                key = key_of(settings_of(law, name, options, seed))
                if asked.again or key not in kept:
                    data = data or draw(LAWS[law], with_count=name == "oracle")
                    kept[key] = keep(key, run(law, data, name, options, seed))
                made = f"{kept[key]['date']} {kept[key]['commit']}"
                for row in kept[key]["rows"]:
                    found.append(
                        {**row, "setting": number, "stated": stated(name, number), "made": made}
                    )
                    shown = {m: round(row[m], 3) for m in METRICS if row.get(m) is not None}
                    print(law, name, number, seed, row["control"], shown, flush=True)
    every = pd.DataFrame(found)
    rows = nearest(every)
    RESULTS.mkdir(exist_ok=True)
    if "varying" in asked.laws:
        draw_calibration(rows, asked.name)
    tables = {}
    for law in asked.laws:
        if REFERENCE in asked.saes:
            tables[f"World: {law}. Verdicts"] = verdicts(rows, every, law)
        tables[f"World: {law}"] = summary(rows, law)
    write(
        asked.name,
        tables,
        f"{N_FEATURES} features in {D_IN} dimensions, {MEAN_L0} active in the mean (constant and rescaled: in every "
        f"row; varying, balanced and equal: uniform in 1..{MOST}), d_sae {D_SAE}, {TRAINING.tokens} rows of training, {ROWS['evaluation']} held out, "
        f"{len(asked.seeds)} seeds (± half of their range). Of several settings of an SAE the one whose mean L0 is nearest to the true mean; "
        "no other choice was made from results, and every setting that was tried is in truth_settings.py. A verdict is of the difference in FVU, "
        "paired by seed, with a 95 % interval by Student's t over the seeds: against BatchTopK at the same L0 (linear between BatchTopK's own settings) "
        "and against the SAE with its own k's shuffled, handed out by norm, or replaced by their mean; below 0 is better. `made`: day and commit of the code.",
        command=" ".join(["truth.py", *sys.argv[1:]]),
    )


def stated(name: str, number: int) -> str:
    """Return the options of a setting by which it differs from the SAE's first one, or where it has one setting ''."""
    settings = options_of(name)
    differing = [key for key in settings[0] if any(s[key] != settings[0][key] for s in settings)]
    return " ".join(f"{key} {settings[number][key]}" for key in differing)


if __name__ == "__main__":
    main()
