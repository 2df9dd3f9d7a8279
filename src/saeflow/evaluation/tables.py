"""Tables: one row per run and metric, and what is made of them for papers and for `dvc`.

Bytes depend on the numbers only: numbers have 12 significant digits, runs are in natural order
(k8 before k32), metrics in the order in which the evaluation computes them.
"""

import csv
import json
import math
import operator
import re
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.files import atomic_file, read_json, write_json

IDS = (
    "run", "source", "hook_point", "entry", "variant", "schedule", "d_sae", "k", "seed", "tokens",
)  # fmt: skip
MEASURED_IDS = (*IDS, "evaluated_on")
"""Of a table of measurements: also the source whose rows were measured, the SAE's own or one of `evaluation.also_on`."""
METRICS = "metrics.csv"
HISTOGRAMS = "histograms.csv"
COMPLEXITY_COLUMNS = (
    "source", "hook_point", "complexity", "split", "context", "score", "predicted",
)  # fmt: skip
PROBE_COLUMNS = (
    "source", "hook_point", "complexity", "split", "contexts", "ridge", "rmse", "r2", "pearson",
    "spearman",
)  # fmt: skip
EXTRA: dict[str, tuple[str, ...]] = {
    "classification": (
        "set", "classes", "images", "clean_accuracy", "protocol", "labels", "concepts", "n", "accuracy",
        "l0",
    ),
    "contexts": ("context", "label", "objects", "l0", "k_hat"),
    "dimension": (
        "estimator", "neighbours", "rows", "dimension", "spearman_l0", "partial_l0", "spearman_k_hat",
        "partial_k_hat",
    ),
    "dimension_bins": ("estimator", "neighbours", "bin", "rows", "dimension", "l0", "k_hat"),
    "intervals": ("metric", "value", "low", "high", "contexts"),
    "controls": (
        "control", "metric", "value", "low", "high", "difference", "difference_low", "difference_high",
    ),
}  # fmt: skip
"""Columns, beside the id columns, of tables that not every source has."""
STABILITY = "stability.csv"
OPTIONS = "options.csv"
OPTION_COLUMNS = (*IDS, "option", "chosen")
STABILITY_COLUMNS = (
    "source", "hook_point", "entry", "variant", "schedule", "d_sae", "k", "tokens", "setting", "seed_a",
    "seed_b", "metric", "value",
)  # fmt: skip
PROBING, DETECTION, ABSORPTION = "probing.csv", "detection.csv", "absorption.csv"
OF_LATENTS: dict[str, tuple[str, ...]] = {
    PROBING: ("task", "method", "k", "train_rows", "test_rows", "accuracy", "f1", "auc"),
    DETECTION: ("latent", "firing", "balanced_accuracy", "auc", "shuffled", "interpretable"),
    ABSORPTION: (
        "letter", "words", "probe_f1", "true_positives", "split_latents", "latents", "sparse_f1", "counted",
        "absorption_fraction", "full_absorption",
    ),
}  # fmt: skip
"""Columns, beside the id columns (the target k is `k_target`), of tables about what latents mean."""
CARDS = "cards"
METRIC_COLUMNS = (*MEASURED_IDS, "metric", "value")
HISTOGRAM_COLUMNS = (*MEASURED_IDS, "histogram", "left", "right", "count")
POLICY = ("rows", "excluded_rows_fraction", "first_position_excluded", "max_norm_multiple")
SUMMARISED = (
    "l0_mean", "nmse", "fvu", "explained_variance", "cosine", "relative_norm", "dead_fraction",
    "dense_fraction", "ce_clean", "ce_spliced", "ce_degradation", "loss_recovered", "kl", "mmcs",
    "mcc", "support_precision", "support_recall", "support_f1", "k_hat_mean", "spearman_l0_true",
    "spearman_k_hat_true", "zero_shot_clean", "zero_shot", "fvu_cls", "fvu_patches", "l0_cls", "l0_patches",
    "spearman_l0_objects", "spearman_k_hat_objects",
)  # fmt: skip
PRINTED = {
    "l0_mean": "L0", "k_hat_mean": "mean k-hat", "nmse": "NMSE", "fvu": "FVU", "cosine": "cosine", "dead_fraction": "dead",
    "dense_fraction": "dense", "ce_degradation": "CE degradation", "loss_recovered": "loss recovered",
    "kl": "KL", "zero_shot": "zero-shot accuracy", "fvu_cls": "FVU of CLS", "fvu_patches": "FVU of patches",
    "spearman_l0_objects": "Spearman of L0, objects", "mmcs": "MMCS", "support_f1": "support F1",
    "spearman_l0_true": "Spearman of L0", "spearman_k_hat_true": "Spearman of k-hat",
}  # fmt: skip
BASELINES = ("identity", "mean", "pca")

Row = dict[str, str]


def number(value: float | int | str | None) -> str:
    """A value as it is written: integers whole, other numbers with 12 significant digits."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number for a table, got {value}")
    return f"{value + 0.0:.12g}"  # + 0.0: no negative zero


def identify(config: Mapping[str, Any]) -> dict[str, Any]:
    """The id columns of a trained SAE, from its config.json."""
    options = config["options"]
    return {
        "run": config["name"],
        "source": config["source"],
        "hook_point": config["hook_point"],
        "entry": config["entry"],
        "variant": config["variant"],
        "schedule": describe_schedule(options),
        "d_sae": config["d_sae"],
        "k": options.get("k"),
        "seed": config["seed"],
        "tokens": config["training"]["tokens"],
    }


def describe_schedule(options: Mapping[str, Any]) -> str:
    """`constant`, or the schedule among the options, such as `linear 576 until 0.01`."""
    schedules = [options[key] for key in sorted(options) if key.endswith("_schedule")]
    changing = [schedule for schedule in schedules if schedule and schedule["kind"] != "constant"]
    return " + ".join(_describe(schedule) for schedule in changing) or "constant"


def _describe(schedule: Mapping[str, Any]) -> str:
    steps = f" in {schedule['steps']} steps" if "steps" in schedule else ""
    return f"{schedule['kind']} {schedule['from']:g} until {schedule['until']:g}{steps}"


@dataclass(frozen=True)
class Evaluation:
    """What was found of one run on one source."""

    evaluated_on: str
    metrics: Mapping[str, float]
    histograms: Mapping[str, Any]
    """By name: (left, right, count) of each bin."""
    tables: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Lines of some tables of EXTRA."""


def write_evaluation(folder: Path, results: Iterable[tuple[Mapping[str, Any], Evaluation]]) -> None:
    """Write metrics.csv, histograms.csv and the tables of EXTRA of one or several runs.

    Args:
        folder: where the files go.
        results: id columns of each run, and what was found; a run comes once for each source it is measured on.
    """
    metrics, histograms = [], []
    extra: dict[str, list[Row]] = {name: [] for name in EXTRA}
    for ids, found in results:
        known = {key: number(ids[key]) for key in IDS} | {"evaluated_on": found.evaluated_on}
        metrics += [
            {**known, "metric": name, "value": number(float(value))}
            for name, value in found.metrics.items()
        ]
        for name, lines in found.tables.items():
            extra[name] += [
                known | {key: number(value) for key, value in line.items()} for line in lines
            ]
        histograms += [
            {
                **known, "histogram": name,
                "left": number(left), "right": number(right), "count": number(count),
            }
            for name, counted in found.histograms.items()
            for left, right, count in counted
        ]  # fmt: skip
    write_csv(folder / METRICS, METRIC_COLUMNS, metrics)
    write_csv(folder / HISTOGRAMS, HISTOGRAM_COLUMNS, histograms)
    for name, rows in extra.items():
        write_csv(folder / f"{name}.csv", (*MEASURED_IDS, *EXTRA[name]), rows)


def write_lines(path: Path, config: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one of OF_LATENTS for one run.

    Args:
        path: its name says which.
        config: the run's config.json.
        lines: the columns beside the id columns.
    """
    known = {name: number(value) for name, value in with_target(identify(config)).items()}
    rows = [known | {name: number(value) for name, value in line.items()} for line in lines]
    write_csv(path, (*with_target(dict.fromkeys(IDS)), *OF_LATENTS[path.name]), rows)


def measurement(row: Mapping[Any, Any]) -> str:
    """The name of a measurement: the run's, with the source where that is not its own."""
    own = row["evaluated_on"] == row["source"]
    return str(row["run"]) if own else f"{row['run']} on {row['evaluated_on']}"


def with_target(ids: Mapping[str, Any]) -> dict[str, Any]:
    """Id columns of a table that has a k of its own: the target k is `k_target`."""
    return {"k_target" if name == "k" else name: value for name, value in ids.items()}


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write a CSV file (RFC 4180 but for line ends, which are newlines), atomically."""
    with atomic_file(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """Read a CSV file as text.

    Raises:
        UserError: it is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. Run the step that makes it (snakemake {path})."
        ) from None


def collect(
    evaluations: Iterable[Path],
    saes: Iterable[Path],
    probes: Iterable[Path],
    folder: Path,
    stabilities: Iterable[Path] = (),
    interpreted: Iterable[Path] = (),
) -> None:
    """Gather the tables of all runs.

    Args:
        evaluations: folders with metrics.csv and histograms.csv.
        saes: folders of trained SAEs (config.json, steps.csv).
        probes: folders of complexity probes (predictions.csv, quality.json).
        folder: written: metrics.csv and histograms.csv (all runs), metrics.json (run -> metric ->
            value; `RUN on SOURCE` of another source than its own), summary.csv, summary.md and summary.tex (one line per setting, mean and sample
            standard deviation over seeds), training.csv (the logged steps of all runs), options.csv,
            complexity.csv and probes.csv (scores, predictions and quality of all probes), stability.csv.
        stabilities: folders with the stability.csv of a setting.
        interpreted: folders with the tables of OF_LATENTS of a run.

    Raises:
        UserError: a file is missing, or two folders hold one run.
    """
    folders = list(evaluations)
    metrics = _all_runs(folder / METRICS for folder in folders)
    write_csv(folder / METRICS, METRIC_COLUMNS, metrics)
    histograms = _all_runs(folder / HISTOGRAMS for folder in folders)
    write_csv(folder / HISTOGRAMS, HISTOGRAM_COLUMNS, histograms)
    for name, columns in EXTRA.items():
        rows = _all_runs(folder / f"{name}.csv" for folder in folders)
        write_csv(folder / f"{name}.csv", (*MEASURED_IDS, *columns), rows)
    accuracies = read_csv(folder / "classification.csv")
    _write_text(folder / "classification.md", classification_markdown(accuracies))
    _write_text(folder / "classification.tex", classification_latex(accuracies))
    _copy_cards(folders, folder / CARDS)
    by_run: dict[str, dict[str, float]] = {}
    for row in metrics:
        by_run.setdefault(measurement(row), {})[row["metric"]] = float(row["value"])
    write_json(folder / "metrics.json", by_run)
    lines = summarise(metrics)
    write_csv(folder / "summary.csv", _summary_columns(), lines)
    _write_text(folder / "summary.md", as_markdown(lines))
    _write_text(folder / "summary.tex", as_latex(lines))
    _write_training(saes, folder)
    _write_probes(list(probes), folder)
    about = list(interpreted)
    for name, columns in OF_LATENTS.items():
        rows = _all_runs(held / name for held in about)
        write_csv(folder / name, (*with_target(dict.fromkeys(IDS)), *columns), rows)
    of_settings = [row for stability in stabilities for row in read_csv(stability / STABILITY)]
    order = ("source", "hook_point", "entry", "setting")
    of_settings.sort(
        key=lambda row: [natural(row[key]) for key in order]
    )  # stable: pairs stay in order
    write_csv(folder / STABILITY, STABILITY_COLUMNS, of_settings)


def _copy_cards(evaluations: Iterable[Path], folder: Path) -> None:
    """Concept cards of the runs that have them, in folders named after the measurements."""
    folder.mkdir()
    for evaluation in evaluations:
        for cards in sorted(evaluation.rglob("cards.json")):
            name = read_csv(evaluation / METRICS)[0]["run"]
            if cards.parent != evaluation:  # of a source of evaluation.also_on
                name += f" on {cards.parent.name}"
            (folder / name).mkdir(parents=True)
            for path in cards.parent.glob("cards.*"):
                shutil.copyfile(path, folder / name / path.name)


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def _all_runs(paths: Iterable[Path]) -> list[Row]:
    """Rows of all files, runs in natural order, rows of a run as they were."""
    by_run: dict[str, list[Row]] = {}
    for path in paths:
        rows = read_csv(path)
        found = {row["run"] for row in rows}
        if twice := sorted(found & set(by_run)):
            raise UserError(f"{path}: run {twice[0]} is in another evaluation too. Delete one.")
        for row in rows:
            by_run.setdefault(row["run"], []).append(row)
    return [row for run in sorted(by_run, key=natural) for row in by_run[run]]


def natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key that puts k8 before k32."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts)]


def _write_training(saes: Iterable[Path], folder: Path) -> None:
    """The options of all runs, and their logged steps; there the target k is `k_target`, since `k` is the step's own."""
    ids = tuple(with_target(dict.fromkeys(IDS)))
    runs: dict[str, list[Row]] = {}
    columns: dict[str, None] = dict.fromkeys(ids)
    options: dict[str, list[Row]] = {}
    for sae in saes:
        config = read_json(sae / "config.json")
        own = {key: number(value) for key, value in identify(config).items()}
        chosen = {**config["options"], "guide": config.get("guide")}
        chosen |= {f"training.{name}": value for name, value in config["training"].items()}
        options[own["run"]] = [
            {
                **own,
                "option": name,
                "chosen": value if isinstance(value, str) else json.dumps(value),
            }
            for name, value in sorted(chosen.items())
        ]
        known = with_target(own)
        runs[known["run"]] = [{**known, **row} for row in read_csv(sae / "steps.csv")]
    ordered = [row for run in sorted(runs, key=natural) for row in runs[run]]
    for row in ordered:
        columns.update(dict.fromkeys(row))
    write_csv(folder / "training.csv", list(columns), ordered)
    chosen_by_run = [row for run in sorted(options, key=natural) for row in options[run]]
    write_csv(folder / OPTIONS, OPTION_COLUMNS, chosen_by_run)


def _write_probes(probes: list[Path], folder: Path) -> None:
    predictions = [row for probe in probes for row in read_csv(probe / "predictions.csv")]
    write_csv(folder / "complexity.csv", COMPLEXITY_COLUMNS, predictions)
    qualities = []
    for probe in probes:
        quality = read_json(probe / "quality.json")
        first = read_csv(probe / "predictions.csv")[0]
        for split in ("train", "evaluation"):
            known = {name: first[name] for name in PROBE_COLUMNS[:3]}
            values = {**quality[split], "ridge": quality["ridge"]}
            numbers = {name: number(value) for name, value in values.items()}
            qualities.append({**known, "split": split, **numbers})
    write_csv(folder / "probes.csv", PROBE_COLUMNS, qualities)


def setting_of(row: Mapping[str, str]) -> str:
    """What runs that differ in the seed only have in common: the run's name without the seed."""
    return re.sub(r"-?seed\d+$", "", row["run"].rsplit("/", 1)[-1])


def _summary_columns() -> list[str]:
    spread = [f"{metric}_{part}" for metric in SUMMARISED for part in ("mean", "sd")]
    ids = [column for column in MEASURED_IDS if column not in ("run", "seed")]
    return [*ids, "setting", "seeds", *POLICY, "ce_first_position_kept", "ce_tokens", *spread]


def summarise(metrics: Iterable[Row]) -> list[Row]:
    """One line per setting: mean and sample standard deviation (n - 1) over its seeds.

    A standard deviation is empty where there is one seed; a metric is empty where no run has it.
    """
    runs: dict[str, Row] = {}
    values: dict[str, dict[str, str]] = {}
    for row in metrics:
        runs.setdefault(measurement(row), row)
        values.setdefault(measurement(row), {})[row["metric"]] = row["value"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in runs.items():
        key = (*(row[column] for column in _PANEL), row["entry"], setting_of(row))
        groups.setdefault(key, []).append(name)
    lines = [_summary_line(groups[key], runs, values) for key in sorted(groups, key=_group_order)]
    panel = operator.itemgetter(*_PANEL)
    return sorted(lines, key=lambda line: (panel(line), _is_baseline(line)))


_PANEL = ("source", "hook_point", "evaluated_on")


def _group_order(key: tuple[str, ...]) -> list[list[tuple[int, float, str]]]:
    return [natural(part) for part in key]


def _is_baseline(line: Mapping[str, str]) -> bool:
    return line["variant"] in BASELINES


def _summary_line(
    group: list[str], runs: Mapping[str, Row], values: Mapping[str, Mapping[str, str]]
) -> Row:
    first = runs[group[0]]
    line = {column: first[column] for column in MEASURED_IDS if column not in ("run", "seed")}
    line |= {"setting": setting_of(first), "seeds": str(len(group))}
    for name in (*POLICY, "ce_first_position_kept", "ce_tokens"):
        line[name] = values[group[0]].get(name, "")
    for name in SUMMARISED:
        found = [float(values[run][name]) for run in group if name in values[run]]
        line[f"{name}_mean"] = number(statistics.fmean(found)) if found else ""
        line[f"{name}_sd"] = number(statistics.stdev(found)) if len(found) > 1 else ""
    return line


def _sections(lines: list[Row]) -> list[tuple[str, list[Row], list[str]]]:
    """Title, lines and printed metrics of each source, hook point and source evaluated on."""
    sections: dict[str, list[Row]] = {}
    for line in lines:
        where = line["source"]
        where += "" if line["evaluated_on"] == where else f" on {line['evaluated_on']}"
        sections.setdefault(f"{where}, {line['hook_point']}", []).append(line)
    return [
        (title, held, [name for name in PRINTED if any(line[f"{name}_mean"] for line in held)])
        for title, held in sections.items()
    ]


_HEAD = ("entry", "setting", "schedule", "seeds")


def policy_note(line: Mapping[str, str]) -> str:
    """Which rows and tokens the numbers are of."""
    first = "left out" if line["first_position_excluded"] == "1" else "included"
    multiple = line["max_norm_multiple"]
    norm = f"above {multiple} x the median training norm left out" if multiple else "of any norm"
    if line["hook_point"].startswith("vision."):
        text = f"Rows: {line['rows']} tokens of images, rows {norm}"
    else:
        text = f"Rows: {line['rows']}, first positions {first}, rows {norm}"
    text += f" ({100 * float(line['excluded_rows_fraction']):.3g} % of the split)."
    if line["ce_tokens"]:
        kept = "keeping" if line["ce_first_position_kept"] == "1" else "replacing"
        text += (
            f" Cross-entropy and KL: {line['ce_tokens']} predicted tokens, in nats, {kept} the "
            "activation of each first position."
        )
    return text


def _notes(lines: Iterable[Mapping[str, str]]) -> str:
    """The row policies of some lines (one, where all were measured alike)."""
    policies = dict.fromkeys(policy_note(line) for line in lines)
    return " ".join([*policies, "Mean and standard deviation over seeds."])


def _cell(line: Mapping[str, str], name: str, plus_minus: str) -> str:
    if not line[f"{name}_mean"]:
        return ""
    text = f"{float(line[f'{name}_mean']):.4g}"
    spread = line[f"{name}_sd"]
    return text + (f" {plus_minus} {float(spread):.2g}" if spread else "")


def as_markdown(lines: list[Row]) -> str:
    """The summary as one Markdown table per source, hook point and source evaluated on, with its row policy."""
    parts = []
    for title, held, names in _sections(lines):
        head = [*_HEAD, *(PRINTED[name] for name in names)]
        lines_of = [
            [*(line[column] for column in _HEAD), *(_cell(line, name, "±") for name in names)]
            for line in held
        ]
        body = markdown_table(head, len(_HEAD), lines_of)
        parts.append(f"## {title}\n\n{body}\n\n{_notes(held)}\n")
    return "\n".join(parts)


def markdown_table(head: Sequence[str], left: int, body: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first `left` columns are words."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    rows = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, rule, *body))
    return "\n".join(f"| {row} |" for row in rows)


def _classification_sections(rows: list[Row]) -> list[tuple[str, list[list[str]]]]:
    """Title and table (head first) of each source, labelled set and protocol: configuration x n."""
    counts = ("1", "5", "10", "50")
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if not _is_baseline(row):
            key = (row["source"], row["hook_point"], row["set"])
            groups.setdefault(key, {}).setdefault(f"{row['entry']} {setting_of(row)}", []).append(
                row
            )
    sections = []
    for (source, hook_point, name), settings in groups.items():
        first = next(iter(settings.values()))[0]
        for protocol in ("leak_free", "paper"):
            title = (
                f"{source}, {hook_point}, {name}, {protocol.replace('_', '-')} protocol: {first['images']} images "
                f"of {first['classes']} classes, {float(first['clean_accuracy']):.3f} without an SAE"
            )
            head = [
                "entry",
                "setting",
                *(f"on {n}" for n in counts),
                "all",
                *(f"off {n}" for n in counts),
            ]
            table = [head]
            for held in settings.values():
                found: dict[tuple[str, str], list[float]] = {}
                for row in held:
                    if row["labels"] == "true" and row["protocol"] in (protocol, "all"):
                        cell = (row["concepts"], row["n"])
                        found.setdefault(cell, []).append(float(row["accuracy"]))
                cells = [("on", n) for n in (*counts, "all")] + [("off", n) for n in counts]
                values = [f"{statistics.fmean(found[cell]):.3f}" for cell in cells]
                table.append([held[0]["entry"], setting_of(held[0]), *values])
            sections.append((title, table))
    return sections


def classification_markdown(rows: list[Row]) -> str:
    """Accuracy through the top n concepts as one Markdown table a set and protocol."""
    parts = []
    for title, (head, *lines) in _classification_sections(rows):
        parts.append(f"## {title}\n\n{markdown_table(head, 2, lines)}\n")
    return "\n".join(parts)


def classification_latex(rows: list[Row]) -> str:
    """The same as booktabs tables; needs \\usepackage{booktabs}."""
    parts = []
    for title, (head, *lines) in _classification_sections(rows):
        body = [" & ".join(map(escape_latex, row)) + r" \\" for row in lines]
        parts.append(latex_table(escape_latex(title) + ".", head, 2, body))
    return "\n".join(parts)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text for LaTeX: its special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def as_latex(lines: list[Row]) -> str:
    """The summary as one booktabs table per source and hook point; needs \\usepackage{booktabs}."""
    parts = []
    for title, held, names in _sections(lines):
        head = [*_HEAD, *(PRINTED[name] for name in names)]
        rows = [
            [escape_latex(line[column]) for column in _HEAD]
            + [_cell(line, name, r"$\pm$") for name in names]
            for line in held
        ]
        split = next((i for i, line in enumerate(held) if _is_baseline(line)), len(held))
        body = [" & ".join(row) + r" \\" for row in rows]
        if 0 < split < len(body):
            body.insert(split, r"\midrule")
        caption = f"{escape_latex(title)}. {escape_latex(_notes(held))}"
        parts.append(latex_table(caption, head, len(_HEAD), body))
    return "\n".join(parts)


def latex_table(caption: str, head: list[str], left: int, body: list[str]) -> str:
    """A table whose first `left` columns are words."""
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(head) - left)}}}",
            r"\toprule",
            " & ".join(map(escape_latex, head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
