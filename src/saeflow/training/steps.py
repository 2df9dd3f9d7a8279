"""steps.csv: a line for each logged step of a run."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from saeflow.files import atomic_file, json_digest
from saeflow.saes import Forward, Ranks

STEPS = "steps.csv"
_TIMED = ("tokens_per_s",)


def write_steps(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write steps.csv: a line per logged step."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as staged:
        staged.write_text(text.getvalue())


def steps_digest(rows: Sequence[Mapping[str, float]]) -> str:
    """Digest of all that the lines say besides speed."""
    return json_digest([{k: v for k, v in row.items() if k not in _TIMED} for row in rows])


def batch_fvu(fwd: Forward, ranks: Ranks) -> float:
    """Fraction of variance unexplained of a batch, by the pass before the update; 1 where rows are equal."""
    total, target = ranks.over_batch, fwd.target.float()
    mean = total(target.sum(0)) / ranks.rows(target)
    spread = float(total((target - mean).square().sum()))
    return float(total(fwd.residual.float().square().sum())) / spread if spread else 1.0
