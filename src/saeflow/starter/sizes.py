"""Sizes of a first run that fit the data and this machine, and the text of the file."""

import math
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from saeflow.config import ROOT, validate
from saeflow.device import has_gpu
from saeflow.errors import UserError
from saeflow.needs import Needs, Rates, count_passes
from saeflow.plan import Plan
from saeflow.starter.data import SHARES
from saeflow.starter.model import Model

_MOST_ROWS = {False: 1_000_000, True: 10_000_000}
"""Rows to train on at most, without a GPU and with one."""
_LEAST_ROWS = 256
_LEAST_CONTEXTS = 4
_HOURS = 1.0
"""Hours that the first run may take by `saeflow plan`."""
_DISK_SHARE = 0.2
"""Share of the free disk that the first run may fill."""
_PASSES = 4
"""Times that training sees each row."""
_STEPS = 500
"""Steps that training has at least, where the batch can be made small enough."""
_KS = (16, 32, 64)
_CE_CONTEXTS = 32
_LINE = 120
"""Characters of a line of the file at most, where there is a choice."""


def fit_rows(source: Mapping[str, Any], model: Model, folder: Path) -> tuple[int, dict[str, Any]]:
    """Rows to train on at most, for this machine's time and disk, and the source with its defaults."""
    near = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    disk = _DISK_SHARE * shutil.disk_usage(near).free
    most = min(_MOST_ROWS[has_gpu()], int(disk / 2 / 2 / model.width))
    plenty = {share: dict.fromkeys(("train", "evaluation"), most) for share in SHARES}
    while True:
        values = validate(yaml.safe_load(render(dict(source), model, plenty, most)))
        if most <= _LEAST_ROWS or hours_of(Plan(values)) <= _HOURS:
            return most, values["sources"][model.name]
        most //= 2


def hours_of(plan: Plan) -> float:
    """Hours of a run by `saeflow plan`, at the rates of a CPU or of a GPU, as this machine has."""
    rates = ROOT / "benchmarks" / "results" / ("rates-h200.yaml" if has_gpu() else "rates.yaml")
    needs = Needs(plan, Rates.read(rates), count_passes(plan, Path("results")))
    return sum(need.hours for need in needs.steps())


def render(
    source: dict[str, Any], model: Model, contexts: Mapping[float, Mapping[str, int]], most: int
) -> str:
    """The parameter file.

    Raises:
        UserError: the data is too little.
    """
    each = model.length - (not model.is_image)
    least = math.ceil(_LEAST_ROWS / each)
    share = next(
        (
            one
            for one, found in contexts.items()
            if found["evaluation"] >= _LEAST_CONTEXTS and found["train"] >= least
        ),
        None,
    )
    if share is None:
        what = "images" if model.is_image else f"contexts of {model.length} tokens"
        found = contexts[SHARES[-1]]
        raise UserError(
            f"init: expected at least {least} {what} to train on and {_LEAST_CONTEXTS} to evaluate on, found "
            f"{found['train']} and {found['evaluation']} when half of the data is held out. Give more data."
        )
    train = min(contexts[share]["train"] * each, most)
    evaluation = min(contexts[share]["evaluation"] * each, max(most // 10, _LEAST_CONTEXTS * each))
    tokens = _PASSES * train
    batch = 1 << max(5, min(11, int(math.log2(max(1, tokens // _STEPS)))))
    d_sae = model.width * (8 if has_gpu() else 4)
    ks = [k for k in _KS if k <= d_sae // 4] or [max(1, d_sae // 8)]
    template = Path(__file__).with_name("params.yaml.in").read_text(encoding="utf-8")
    return template.format(
        name=model.name,
        source="\n".join(_entry(key, value) for key, value in source.items()),
        share=share,
        train=train,
        evaluation=evaluation,
        tokens=tokens,
        passes=_PASSES,
        batch=batch,
        warmup=tokens // batch // 20,
        dead=max(1, tokens // 4),
        store=f"{model.name}/{source['hook_points'][0]}",
        d_sae=d_sae,
        d_in=model.width,
        width=d_sae // model.width,
        ks=_flow(ks),
        k=ks[len(ks) // 2],
        threshold=tokens // batch // 2,
        ce="" if model.is_image else f"\n  ce_contexts: {min(_CE_CONTEXTS, evaluation // each)}",
        figures="fvu_l0, ce_l0, controls" if model.predicts else "fvu_l0, controls",
    )


def _entry(key: str, value: Any) -> str:
    """A key of a source, on one line if it fits there: names of many files stand one below the other."""
    line = f"    {key}: {_flow(value)}"
    if len(line) <= _LINE:
        return line
    text = yaml.safe_dump({key: value}, width=math.inf, sort_keys=False, allow_unicode=True)
    return textwrap.indent(text, "    ").removesuffix("\n")


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
