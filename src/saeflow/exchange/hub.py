"""A folder for the Hugging Face hub: the SAE as `saeflow.load` reads it, and a model card from its records."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from saeflow.errors import UserError
from saeflow.files import atomic_file
from saeflow.provenance import read_record
from saeflow.saes.files import CONFIG, WEIGHTS, read_config
from saeflow.tables.files import read_csv
from saeflow.tables.metrics import METRICS
from saeflow.tables.render import Printed
from saeflow.tables.schema import heading

CARD = "README.md"


def write(sae: Path, evaluation: Path | None, folder: Path) -> None:
    """Write weights, config and model card into an existing folder; any variant goes.

    Args:
        sae: its folder, with its record.
        evaluation: the folder of its metrics; None leaves them out of the card.
        folder: gets the files.

    Raises:
        UserError: the evaluation is another SAE's.
    """
    config, record = read_config(sae), read_record(sae)
    metrics = [] if evaluation is None else _metrics(evaluation, str(config.get("name")))
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(sae / name, folder / name)
    with atomic_file(folder / CARD) as staged:
        staged.write_text(_card(config, record, _source(record), metrics), encoding="utf-8")


def _metrics(evaluation: Path, run: str) -> list[tuple[str, str]]:
    """Return the metrics of a run on its own source, as the table `metrics` has them."""
    path = evaluation / "metrics.csv"
    found = [
        (line["metric"], line["value"])
        for line in read_csv(path)
        if line["run"] == run and line["evaluated_on"] == line["source"]
    ]
    if not found:
        raise UserError(
            f"{path}: expected metrics of {run}, found none. Give the folder that `saeflow evaluate` wrote for this SAE."
        )
    if unknown := [name for name, _ in found if name not in METRICS]:
        raise UserError(
            f"{path}: expected metrics of this version, found {unknown[0]}. Evaluate the SAE again."
        )
    return found


def _source(record: Mapping[str, Any]) -> dict[str, Any]:
    """The source's parameters, from the record of the store that an SAE was trained on, if it is there."""
    for path in record["inputs"]:
        if Path(path).exists() and (source := read_record(Path(path))["params"].get("source")):
            return dict(source)
    return {}


def _card(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    source: Mapping[str, Any],
    metrics: list[tuple[str, str]],
) -> str:
    model = source.get("model", {})
    facts = {
        "library_name": "saeflow",
        "tags": ["sparse-autoencoder", "interpretability", config["variant"]],
    }
    if "hub" in model:
        facts["base_model"] = model["hub"]
    details = {
        key: config[key] for key in ("variant", "d_in", "d_sae", "options", "hook_point", "seed", "training")
        if key in config
    }  # fmt: skip
    made = {
        "digest": record["digest"], "code": record["code"], "versions": record["versions"],
        "started": record["started"], "inputs": record["inputs"],
    }  # fmt: skip
    parts = [
        f"---\n{_yaml(facts)}---\n",
        f"# {config.get('name', config['variant'])}\n",
        f"A sparse autoencoder ({config['variant']}) with {config['d_sae']} latents for activations of width "
        f"{config['d_in']} at `{config.get('hook_point', 'an unknown hook point')}`. It takes and returns raw "
        "activations.\n",
        "```python\nimport saeflow\n\nsae = saeflow.load(folder)  # this repository, downloaded\n"
        "latents = sae.encode(x)  # (rows, d_in) to (rows, d_sae)\nx_hat = sae.decode(latents)\n```\n",
        _section("The autoencoder", details),
        _section("Trained on activations of", source) if source else "",
        _table(metrics) if metrics else "",
        _section("Provenance", made),
    ]
    return "\n".join(filter(None, parts))


def _section(title: str, facts: Mapping[str, Any]) -> str:
    text = _yaml(facts)
    fence = "```"
    while fence in text:
        fence += "`"
    return f"## {title}\n\n{fence}yaml\n{text}{fence}\n"


def _yaml(facts: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True)
    return text


def _table(metrics: list[tuple[str, str]]) -> str:
    rows = []
    for name, value in metrics:
        metric = METRICS[name]
        source = f" Source: {metric.source}." if metric.source else ""
        rows.append([heading(name), metric.text(float(value)), metric.definition + source])
    table = Printed(["metric", "value", "definition"], 3, rows, "")
    return f"## Held-out activations\n\n{table.markdown()}\n"
