"""The report: one HTML page with tables, figures, schedules and where everything came from.

The page holds everything it shows (figures as data URIs, styles inline), needs no script, and forbids
itself to load anything; only its links to the data beside it point outside.
"""

import base64
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.colors import to_hex

from saeflow.errors import UserError
from saeflow.evaluation.tables import Row, natural, policy_note, read_csv
from saeflow.figures import style
from saeflow.figures import tables as read
from saeflow.figures.paper_tables import TABLES, Table
from saeflow.files import atomic_file, read_json

TITLES = {
    "fvu_l0": "Reconstruction against sparsity",
    "ce_l0": "The model's loss against sparsity",
    "training": "Training",
    "schedules": "Schedules",
    "l0_histograms": "Active latents per input",
    "firing_rates": "How often latents fire",
    "recovery": "Recovery of a known dictionary",
    "complexity": "Complexity",
    "top_concepts": "Classification through a few concepts",
    "concepts": "Concepts on images",
    "simple_to_complex": "Images from the simplest to the most complex",
    "adaptivity": "What the number of latents follows",
    "ev_formulas": "One name, many formulas",
    "controls": "What choosing k by input is worth",
    "stability": "What another seed changes",
    "dictionary_size": "The size of the dictionary",
    "k_complexity": "Latents against complexity",
    "k_dimension": "Latents against local dimension",
    "probe_layers": "Reading complexity, by block",
    "table_dictionary_size": "The size of the dictionary, in numbers",
    "table_top_n": "Classification through the top n concepts, in numbers",
    "table_ablation": "Architecture and activation of the Sparsemax SAE",
    "table_guided_k": "TopK at the k that another SAE found",
    "table_probes": "Complexity probes",
    "table_training_cost": "What training costs",
    "probing": "What a few latents tell",
    "table_interpretability": "Latents that a simple model predicts",
    "table_absorption": "Absorption of first letters",
}
JOBS = {
    "fetch": "fetch the model", "prepare": "prepare inputs", "extract": "extract activations",
    "merge": "merge stores", "score": "score complexity", "probe": "fit complexity probes", "train": "train SAEs", "import": "take over SAEs", "clean": "run the clean model",
    "label": "prepare labelled sets", "dimension": "estimate local dimension",
    "evaluate": "evaluate SAEs", "interpret": "probe latents", "latents": "show latents", "baselines": "evaluate baselines", "stability": "compare seeds", "collect": "collect tables",
    "draw": "draw figures", "report": "write the report",
}  # fmt: skip
_METRICS = (
    ("l0_mean", "L0", "per input"), ("k_hat_mean", "k̂", "per input"), ("nmse", "NMSE", ""), ("fvu", "FVU", ""), ("cosine", "cosine", ""),
    ("dead_fraction", "dead", "%"),
    ("dense_fraction", "dense", "%"), ("ce_degradation", "CE degradation", "nats/token"),
    ("loss_recovered", "loss recovered", ""), ("kl", "KL", "nats/token"),
    ("zero_shot", "zero-shot", "accuracy, %"), ("fvu_cls", "FVU", "of CLS"), ("fvu_patches", "FVU", "of patches"),
    ("spearman_l0_objects", "Spearman", "of L0, objects"),
    ("mmcs", "mean max cosine", ""), ("support_f1", "support F1", ""),
    ("spearman_l0_true", "Spearman", "of L0, true count"),
)  # fmt: skip
_SPARK = (150.0, 34.0)  # pixels


@dataclass(frozen=True)
class Line:
    """One polyline of a small drawing."""

    points: str
    color: str


def write_report(
    tables: Path,
    figures: list[Path],
    records: list[Path],
    out: Path,
    pages: Mapping[str, Path] | None = None,
    mark: str = "",
) -> None:
    """Write the report.

    Args:
        tables: folder of the tables.
        figures: folders of drawn figures, in the report's order.
        records: provenance records of the results that the figures were made from.
        out: written: one HTML file. Its links to the figures' files are relative to it.
        pages: folders of the runs' pages of latent cards.
        mark: printed in the report's head, such as REHEARSAL.

    Raises:
        UserError: a table, a figure or a record is missing or damaged.
    """
    found = sorted((_record(path, out.parent) for path in records), key=_record_order)
    summary = read_csv(tables / "summary.csv")
    page = template("report.html.j2").render(
        mark=mark,
        sources=_sources(found),
        saes=_saes(found),
        sections=_sections(summary),
        figures=[_figure(folder, out.parent) for folder in figures],
        pages=[
            {"run": run, "href": _href(folder / "latents.html", out.parent)}
            for run, folder in (pages or {}).items()
        ],
        schedules=_schedules(read.load_tables(tables).training),
        records=found,
        jobs=_jobs(found),
        total=duration(sum(record["seconds"] for record in found)),
        versions=_versions(found),
        commits=sorted({record["commit"] for record in found}),
        latest=max((record["started"] for record in found), default=""),
    )
    with atomic_file(out) as staged:
        staged.write_text(page, encoding="utf-8")


def template(name: str) -> Any:
    """A page's template; what is put in is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


# Numbers as a reader wants them.


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def digits(metric: str, value: float) -> str:
    """A metric's value with the digits that mean something."""
    if metric in ("l0_mean", "k_hat_mean"):
        return f"{value:.1f}" if abs(value) < 999.95 else f"{value:,.0f}"
    if metric in ("dead_fraction", "dense_fraction", "zero_shot"):
        return f"{100 * value:.1f}"
    text = f"{value:.3f}" if abs(value) < 99.9995 else f"{value:.1f}"
    return text.replace("-0.000", "0.000").replace("-", "−")


def plain(value: Any) -> str:
    """A parameter as one line: lists and mappings without their brackets."""
    if isinstance(value, Mapping) and "kind" in value:
        rest = {key: part for key, part in value.items() if key != "kind"}
        return " ".join(filter(None, [str(value["kind"]), plain(rest)]))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# What was run.


def _record(path: Path, root: Path) -> dict[str, Any]:
    """The facts of one provenance record.

    Raises:
        UserError: it lacks one.
    """
    values = read_json(path)
    name = path.name.removesuffix("provenance.json").removesuffix(".")
    result = path.with_name(name) if name else path.parent
    try:
        commit = values["code"]["commit"]
        return {
            "path": path,
            "result": Path(os.path.relpath(result, root)).as_posix(),
            "name": values["job"],
            "digest": values["digest"],
            "commit": (commit[:10] if commit else "no commit")
            + (" + changes" if values["code"]["dirty"] else ""),
            "device": values["device"],
            "started": re.sub(r"T(\d\d:\d\d:\d\d).*", r" \1", str(values["started"])),
            "seconds": float(values["duration_s"]),
            "duration": duration(float(values["duration_s"])),
            "params": values["params"],
            "external": values["external"],
            "versions": values["versions"],
        }
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a provenance record, found one without {error}. Delete the result and "
            "rerun its step."
        ) from None


def _record_order(record: Mapping[str, Any]) -> tuple[int, Any]:
    known = list(JOBS)
    name = record["name"]
    return (known.index(name) if name in known else len(known), natural(record["result"]))


def _sources(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name and parameters of every source whose inputs were prepared."""
    found = []
    for record in records:
        source = record["params"].get("source")
        if record["name"] == "prepare" and source:
            facts = [(key.replace("_", " "), plain(value)) for key, value in source.items()]
            rows = record["params"].get("rows")
            facts += [("rows", plain(rows))] if rows else []
            found.append({"name": Path(record["result"]).parent.name, "facts": facts})
    return found


def _saes(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per entry of `saes`, each parameter with all its values."""
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        run = record["params"].get("run")
        if record["name"] == "train" and run:
            entries.setdefault(run["entry"], []).append(run)
    lines = []
    for entry, runs in entries.items():
        look = style.look(runs[0]["variant"], entry)
        options = {
            key: _values(run["options"].get(key) for run in runs) for key in runs[0]["options"]
        }
        training = [run["training"] for run in runs]
        lines.append(
            {
                "color": look.color,
                "rank": style.rank(runs[0]["variant"], entry),
                "entry": entry,
                "label": look.label,
                "stores": _values(f"{run['source']}/{run['hook_point']}" for run in runs),
                "d_sae": _values(run["d_sae"] for run in runs),
                "options": [
                    f"{key} = {text}" for key, text in options.items() if text != "constant"
                ],
                "seeds": _values(run["seed"] for run in runs),
                "tokens": _values(values["tokens"] for values in training),
                "batch": _values(values["batch_size"] for values in training),
                "input_scale": _values(values["input_scale"] for values in training),
                "lr": _values(values["lr"] for values in training),
                "runs": len(runs),
            }
        )
    return sorted(lines, key=lambda line: (line["rank"], natural(line["entry"])))


def _values(values: Iterable[Any]) -> str:
    """All the values of a parameter in natural order, each once."""
    return ", ".join(sorted({plain(value) for value in values}, key=natural))


# Results.


def _sections(summary: Sequence[Row]) -> list[dict[str, Any]]:
    """One table per panel: SAEs first, then baselines."""
    panels: dict[read.Panel, list[Row]] = {}
    for line in summary:
        panels.setdefault(read.Panel(*(line[name] for name in read.Panel._fields)), []).append(line)
    sections = []
    for panel, lines in panels.items():
        shown = [
            metric for metric in _METRICS if any(line.get(f"{metric[0]}_mean") for line in lines)
        ]
        ordered = sorted(lines, key=_line_order)
        saes = [line for line in lines if line["variant"] not in read.UNTRAINED]
        sections.append(
            {
                "title": read.panel_title(panel),
                "has_sizes": len({line["d_sae"] for line in saes}) > 1,
                "has_schedules": any(line["schedule"] != "constant" for line in saes),
                "columns": [{"name": name, "unit": unit} for _, name, unit in shown],
                "lines": [_line(line, [name for name, _, _ in shown]) for line in ordered],
                "note": _note(lines),
            }
        )
    return sections


def _note(lines: Sequence[Row]) -> str:
    """Which rows a table is of, and what ± means."""
    note = policy_note(lines[0]) if lines[0].get("rows") else ""
    if any(line.get("fvu_sd") for line in lines) and "deviation" not in note:
        note += " Means over seeds, ± one sample standard deviation."
    return note


def _line_order(line: Row) -> tuple[Any, ...]:
    is_baseline = line["variant"] in read.UNTRAINED
    return (
        is_baseline,
        style.rank(line["variant"], line["entry"]),
        natural(line["entry"]),
        natural(line["setting"]),
    )


def _line(line: Row, metrics: Sequence[str]) -> dict[str, Any]:
    look = style.look(line["variant"], line["entry"])
    is_baseline = line["variant"] in read.UNTRAINED
    cells = []
    for metric in metrics:
        mean, spread = line.get(f"{metric}_mean", ""), line.get(f"{metric}_sd", "")
        cells.append(
            {
                "mean": digits(metric, float(mean)) if mean else "",
                "sd": digits(metric, float(spread)) if spread else "",
            }
        )
    return {
        "color": look.color,
        "entry": look.label if is_baseline else line["entry"],
        "setting": "" if line["variant"] in ("identity", "mean") else _setting(line["setting"]),
        "d_sae": "" if is_baseline else plain(int(line["d_sae"])),
        "schedule": "" if is_baseline else line["schedule"],
        "seeds": "" if is_baseline else line["seeds"],
        "is_baseline": is_baseline,
        "cells": cells,
    }


def _setting(setting: str) -> str:
    """A setting without its number of latents: k = 8; l1 = 0.5."""
    rest = re.sub(r"^d\d+-?", "", setting)
    return re.sub(r"(^|-)(k|l1)(?=[\d.])", r"\1\2 = ", rest)


def _figure(folder: Path, root: Path) -> dict[str, Any]:
    """A figure or a table as the page shows it.

    Raises:
        UserError: one of its files is missing.
    """
    name = folder.name
    kinds = ("csv", "md", "tex") if name in TABLES else ("svg", "pdf", "png", "csv")
    files = {kind: folder / f"{name}.{kind}" for kind in kinds}
    for path in (*files.values(), folder / "caption.md"):
        if not path.exists():
            raise UserError(
                f"{path}: no such file. Draw the figure again (snakemake {folder}/provenance.json)."
            )
    caption = (folder / "caption.md").read_text(encoding="utf-8").strip()
    shown: dict[str, Any]
    if name in TABLES:
        table = Table(pd.read_csv(files["csv"]), caption)
        shown = {"head": table.head, "words": table.words, "body": table.body}
    else:
        svg = files["svg"].read_bytes()
        width = re.search(rb'<svg[^>]* width="([\d.]+)pt"', svg)
        shown = {
            "data": base64.b64encode(svg).decode(),
            "width": round(float(width.group(1)) * 1.75) if width else 600,
        }
    return {
        "name": name,
        "title": TITLES.get(name, name.replace("_", " ")),
        **shown,
        "caption": caption,
        "alt": caption.partition(". ")[0],
        "links": [
            {"kind": kind.upper(), "href": _href(path, root)} for kind, path in files.items()
        ],
    }


def _href(path: Path, root: Path) -> str:
    return quote(Path(os.path.relpath(path, root)).as_posix())


# Schedules.


def _schedules(steps: pd.DataFrame) -> list[dict[str, Any]]:
    """What every series' k (or penalty weight) did over training, with a small drawing."""
    found = []
    for panel in read.panels_of(steps):
        for series in read.series_of(read.one_panel(steps, panel)):
            column = _scheduled(series.rows)
            if column is None:
                continue
            settings = [held for _, held in read.each_setting(series.rows)]
            runs = [held[held["run"] == held["run"].iloc[0]] for held in settings]
            colors = [to_hex(shade) for shade in style.shades(series.look.color, len(runs))]
            found.append(
                {
                    "panel": read.panel_title(panel),
                    "label": series.label,
                    "what": column.replace("_", " "),
                    "schedule": series.rows["schedule"].iloc[0],
                    "starts": _values(float(run[column].iloc[0]) for run in runs),
                    "ends": _values(float(run[column].iloc[-1]) for run in runs),
                    "lines": _spark(runs, column, colors),
                }
            )
    return found


def _scheduled(steps: pd.DataFrame) -> str | None:
    """The logged column that a schedule drives: k, else a weight."""
    weights = [column for column in steps.columns if str(column).endswith("_weight")]
    for column in ["k", *weights]:
        if column in steps and steps[column].notna().all():
            return str(column)
    return None


def _spark(runs: Sequence[pd.DataFrame], column: str, colors: Sequence[str]) -> list[Line]:
    """Polylines of a logarithmic drawing of _SPARK pixels."""
    width, height = _SPARK
    values = np.concatenate([run[column].to_numpy(dtype=float) for run in runs])
    positive = values[values > 0]
    if not len(positive):
        return []
    low, high = np.log(positive.min()), np.log(positive.max())
    last = max(float(run["tokens_seen"].max()) for run in runs)
    lines = []
    for run, color in zip(runs, colors, strict=True):
        x = width * run["tokens_seen"].to_numpy(dtype=float) / last
        level = np.log(np.maximum(run[column].to_numpy(dtype=float), positive.min()))
        share = (level - low) / (high - low) if high > low else np.full(len(level), 0.5)
        y = 2 + (height - 4) * (1 - share)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        lines.append(Line(points, color))
    return lines


# Where it came from.


def _jobs(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Count and times of each kind of job."""
    kinds: dict[str, list[float]] = {}
    for record in records:
        kinds.setdefault(record["name"], []).append(record["seconds"])
    most = max((sum(times) for times in kinds.values()), default=0.0) or 1.0
    return [
        {
            "name": JOBS.get(kind, kind),
            "count": len(times),
            "total": duration(sum(times)),
            "mean": duration(sum(times) / len(times)),
            "longest": duration(max(times)),
            "share": round(100 * sum(times) / most, 1),
        }
        for kind, times in kinds.items()
    ]


def _versions(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record["versions"].items():
            found.setdefault(package, set()).add(version)
    return [(package, ", ".join(sorted(found[package], key=natural))) for package in sorted(found)]
