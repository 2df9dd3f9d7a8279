"""Helpers of the benchmarks: timing in turns, and a table written as CSV and Markdown."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from saeflow.config import ROOT

RESULTS = Path(__file__).parent / "results"


def in_turns(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each piece of work, `repeats` times, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats):
        names = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in names:
            began = clock()
            works[name]()
            times[name].append(clock() - began)
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of two lists of seconds, turn by turn."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def peak_memory(work: Callable[[], object]) -> float:
    """MiB by which work raises the memory of this process at its peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    def mib(field: str) -> float:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))

    before = mib("VmRSS:")
    work()
    return mib("VmHWM:") - before


def project_of(path: Path | None, source: str) -> Path:
    """A project, this one unless another is given, that holds the model and the texts of a source of the demo."""
    project = path or ROOT
    folder = project / "results" / "sources" / source
    if not (folder / "inputs" / "train.npy").exists():
        raise SystemExit(f"{folder}: not there. Run `make demo` first.")
    return project


def last_tables(name: str, folder: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """The tables that `write` wrote last, by their titles, for those that are not made anew; their cells as they read."""
    path = folder / f"{name}.md"
    found: dict[str, list[list[str]]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("## "):
            title = line.removeprefix("## ")
            found[title] = []
        elif line.startswith("| "):
            found[title].append(line.removeprefix("| ").removesuffix(" |").split(" | "))
    return {title: pd.DataFrame(rows, columns=head) for title, (head, *rows) in found.items()}


def replaced(
    old: Mapping[str, pd.DataFrame], new: Mapping[str, pd.DataFrame]
) -> dict[str, pd.DataFrame]:
    """Tables with new ones in the place of old ones; titles are the same up to their first comma, and end with the day."""
    tables = {title.partition(",")[0]: (title, table) for title, table in old.items()}
    for title, table in new.items():
        tables[title.partition(",")[0]] = f"{title}, {datetime.date.today()}", table
    return dict(tables.values())


def write(
    name: str,
    tables: Mapping[str, pd.DataFrame],
    notes: str,
    folder: Path = RESULTS,
    command: str | None = None,
) -> None:
    """Write NAME.md with every table, and NAME.csv with all their rows; by NAME.py or another command."""
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("torch", "numpy", "zarr", "numcodecs")
    )
    lines = [
        f"# {name.capitalize()}",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}. "
        f"By `python benchmarks/{command or f'{name}.py'}`. {notes}",
    ]
    for title, table in tables.items():
        lines += ["", f"## {title}", "", "| " + " | ".join(table.columns) + " |"]
        lines += ["|---" * len(table.columns) + "|"]
        lines += [
            "| " + " | ".join(map(str, values)) + " |" for values in table.astype(object).to_numpy()
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    long = [table.astype(object).assign(table=title) for title, table in tables.items()]
    pd.concat(long).to_csv(folder / f"{name}.csv", index=False)
    print("\n".join(lines))
