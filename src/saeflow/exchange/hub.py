"""A folder for the Hugging Face hub: the SAE as `saeflow.load` reads it, and a model card from its records."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from saeflow.errors import UserError
from saeflow.files import atomic_file
from saeflow.provenance import check, read_record
from saeflow.saes.files import CONFIG, WEIGHTS, read_config
from saeflow.sources.hub import hub_errors
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


def push(folder: Path, repository: str, *, is_private: bool) -> str:
    """Upload a folder that `write` made, as one commit; the token is the hub client's own (HF_TOKEN or `hf auth login`).

    Args:
        folder: with weights, config and card.
        repository: OWNER/NAME, which is made where it is not there.
        is_private: of one that is made.

    Returns:
        The address of the commit.

    Raises:
        UserError: the folder is another, its files are not as they were made, or the hub refuses.
    """
    from huggingface_hub import HfApi

    if missing := [name for name in (WEIGHTS, CONFIG, CARD) if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: expected the folder that `saeflow export SAE --library hub` writes, found no {', '.join(missing)}. "
            "Export the SAE first."
        )
    check(folder)
    config = read_config(folder)
    advice = "Set HF_TOKEN to a token that may write (or `hf auth login`), or fix the name."
    with hub_errors(f"{repository}: cannot be written on the hub", advice):
        api = HfApi()
        api.create_repo(repository, private=is_private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            commit_message=f"{config.get('name', folder.name)}, by saeflow",
        )
    return str(done.commit_url)


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
