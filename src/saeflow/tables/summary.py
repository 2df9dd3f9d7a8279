"""Summaries over seeds: a line per setting, and what lines of one panel say together."""

import operator
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from saeflow.tables.files import Row
from saeflow.tables.metrics import stated, summarised
from saeflow.tables.numbers import natural, number
from saeflow.tables.runs import is_baseline, measurement, setting_of
from saeflow.tables.schema import MEASURED_IDS

PANEL = ("source", "hook_point", "evaluated_on")


def summarise(metrics: Iterable[Row]) -> list[Row]:
    """Return one line per setting: mean and sample standard deviation (n - 1) over its seeds.

    A standard deviation is empty where there is one seed; a metric is empty where no run has it.

    Args:
        metrics: rows of the table `metrics`.
    """
    runs: dict[str, Row] = {}
    values: dict[str, dict[str, str]] = {}
    for row in metrics:
        runs.setdefault(measurement(row), row)
        values.setdefault(measurement(row), {})[row["metric"]] = row["value"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in runs.items():
        key = (*(row[column] for column in PANEL), row["entry"], setting_of(row["run"]))
        groups.setdefault(key, []).append(name)
    keys = sorted(groups, key=lambda key: [natural(part) for part in key])
    lines = [_line(groups[key], runs, values) for key in keys]
    panel = operator.itemgetter(*PANEL)
    return sorted(lines, key=lambda line: (panel(line), is_baseline(line)))


def _line(
    group: list[str], runs: Mapping[str, Row], values: Mapping[str, Mapping[str, str]]
) -> Row:
    first = runs[group[0]]
    line = {column: first[column] for column in MEASURED_IDS if column not in ("run", "seed")}
    line |= {"setting": setting_of(first["run"]), "seeds": str(len(group))}
    for name in stated():
        line[name] = values[group[0]].get(name, "")
    for name in summarised():
        found = [float(values[run][name]) for run in group if name in values[run]]
        line[f"{name}_mean"] = number(statistics.fmean(found)) if found else ""
        line[f"{name}_sd"] = number(statistics.stdev(found)) if len(found) > 1 else ""
    return line


def policy_note(line: Mapping[str, str]) -> str:
    """Say which rows and tokens the numbers of a summary's line are of."""
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
        text += f" These are {line['ce_contexts']} contexts, {100 * float(line['ce_share']):.3g} % of the split's."
        clean = line.get("ce_clean_mean")
        if clean and float(clean) >= float(line["ce_uniform"]):
            text += (
                f" The model's own loss is no less than that of a uniform guess ({float(clean):.3g} against "
                f"{float(line['ce_uniform']):.3g} nats): these measures say nothing about an SAE."
            )
        if float(line["ce_zero"]) > float(line["ce_uniform"]):
            text += (
                f" Zero in the place of the activations costs more than a uniform guess ({float(line['ce_zero']):.3g} against "
                f"{float(line['ce_uniform']):.3g} nats), which inflates loss recovered against zero."
            )
        for name, what in (("loss_recovered_of_mean", "the mean"), ("loss_recovered", "zero")):
            if line.get(f"{name}_mean") == "":
                text += (
                    f" Loss recovered against {what} is not given: what {what} in the place of the activations costs is not "
                    "clear of 0, by its 95 % interval over documents."
                )
    return text


def accuracies(rows: Iterable[Row]) -> list[tuple[str, list[list[str]]]]:
    """Return title and cells (head first) of each source, labelled set and protocol: configuration x n.

    Args:
        rows: of the table `classification`.
    """
    counts = ("1", "5", "10", "50")
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if not is_baseline(row):
            key = (row["source"], row["hook_point"], row["set"])
            name = f"{row['entry']} {setting_of(row['run'])}"
            groups.setdefault(key, {}).setdefault(name, []).append(row)
    wanted = [("on", n) for n in (*counts, "all")] + [("off", n) for n in counts]
    head = ["entry", "setting", *(n if n == "all" else f"{on} {n}" for on, n in wanted)]
    sections = []
    for (source, hook_point, name), settings in groups.items():
        first = next(iter(settings.values()))[0]
        for protocol in ("leak_free", "paper"):
            title = (
                f"{source}, {hook_point}, {name}, {protocol.replace('_', '-')} protocol: {first['images']} images "
                f"of {first['classes']} classes, {float(first['clean_accuracy']):.3f} without an SAE"
            )
            cells = [_accuracies(held, protocol, wanted) for held in settings.values()]
            sections.append((title, [head, *cells]))
    return sections


def _accuracies(held: list[Row], protocol: str, wanted: list[tuple[str, str]]) -> list[str]:
    found: dict[Any, list[float]] = {}
    for row in held:
        if row["labels"] == "true" and row["protocol"] in (protocol, "all"):
            found.setdefault((row["concepts"], row["n"]), []).append(float(row["accuracy"]))
    means = [f"{statistics.fmean(found[cell]):.3f}" for cell in wanted]
    return [held[0]["entry"], setting_of(held[0]["run"]), *means]
