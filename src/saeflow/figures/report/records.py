"""The report's sections on jobs: what was run, its duration, the versions used."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saeflow.config.variants import with_defaults
from saeflow.errors import UserError
from saeflow.figures import style
from saeflow.files import read_json
from saeflow.tables.numbers import natural

JOBS = {
    "fetch": "fetch the model", "prepare": "prepare inputs", "extract": "extract activations",
    "merge": "merge stores", "score": "score complexity", "probe": "fit complexity probes", "train": "train SAEs", "import": "take over SAEs", "clean": "run the clean model",
    "label": "prepare labelled sets", "dimension": "estimate local dimension",
    "evaluate": "evaluate SAEs", "interpret": "probe latents", "latents": "show latents", "baselines": "evaluate baselines", "stability": "compare seeds", "rivals": "compare rivals", "choose": "choose trials", "collect": "collect tables",
    "draw": "draw figures", "report": "write the report",
}  # fmt: skip


def read_record(path: Path, root: Path) -> dict[str, Any]:
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
            "read": values.get("read", {}),
            "notes": values.get("notes", {}),
            "versions": values["versions"],
        }
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected a provenance record, found one without {error}. Delete the result and "
            "rerun its step."
        ) from None


def record_order(record: Mapping[str, Any]) -> tuple[int, Any]:
    known = list(JOBS)
    name = record["name"]
    return (known.index(name) if name in known else len(known), natural(record["result"]))


_SOME = 4
"""Files that are named one by one in a line of the report; the record names all."""


def sources(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name and parameters of every source whose inputs were prepared, and of labelled sets; what was read of each."""
    notes = {record["result"]: record["notes"] for record in records if record["name"] == "fetch"}
    unmeasured: dict[str, dict[str, str]] = {}
    for record in records:
        if record["name"] == "clean":  # results/evaluations/SOURCE/HOOK_POINT/clean
            unmeasured.setdefault(Path(record["result"]).parts[-3], {}).update(record["notes"])
    found = []
    whole = {  # with hook points, which inputs do not depend on
        record["params"].get("name"): record["params"].get("source")
        for record in records
        if record["name"] == "merge"
    }
    for record in records:
        params, place = record["params"], Path(record["result"])
        if record["name"] == "prepare" and params.get("source"):
            name = place.parent.name
            values = whole.get(name, params["source"])
        elif record["name"] == "label" and params.get("labelled"):
            name, values = f"{place.name} (labelled, for {place.parts[-3]})", params["labelled"]
        else:
            continue
        facts = [(key.replace("_", " "), plain(value)) for key, value in values.items()]
        rows = params.get("rows")
        facts += [("rows", plain(rows))] if rows else []
        facts += list(notes.get((place.parent / "model").as_posix(), {}).items())
        facts += list(unmeasured.get(place.parent.name, {}).items())
        found.append({"name": name, "facts": facts + _read(record["read"])})
    return found


def _read(read: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was read of a source, file by file, and what was left out."""
    facts = []
    if files := read.get("files"):
        counts = [
            f"{name}: {plain(of['documents'])} documents, {plain(of['tokens'])} tokens"
            for name, of in files.items()
        ]
        if len(counts) > _SOME:
            rest = list(files.values())[_SOME:]
            documents, tokens = (sum(of[what] for of in rest) for what in ("documents", "tokens"))
            counts[_SOME:] = [
                f"{len(rest)} other files: {plain(documents)} documents, {plain(tokens)} tokens"
            ]
        facts.append(("read", "; ".join(counts)))
    if images := read.get("images"):
        facts.append(
            ("read", ", ".join(f"{split} {plain(n)} images" for split, n in images.items()))
        )
    if read:
        left_out = read.get("left_out", {})
        reasons = "; ".join(f"{plain(count)}: {reason}" for reason, count in left_out.items())
        facts.append(("left out", reasons or "nothing"))
    if read.get("in_both"):
        facts.append(("in both splits", f"{plain(read['in_both'])} images of test"))
    for split, of in read.get("splits", {}).items():
        text = f"{plain(of['contexts'])} contexts of {plain(of['documents'])} documents, {plain(of['tokens'])} tokens"
        if split == "evaluation" and read["shared_run"]:
            text += (
                f"; {plain(of['shared'])} contexts left out for a run of {read['shared_run']} tokens that stands in "
                "train too"
            )
        facts.append((split, text))
    return facts


def saes(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per entry of `saes`, each parameter with all its values; options at their defaults are left out.

    What another library trained has no training, and its origin for options.
    """
    entries: dict[str, list[Mapping[str, Any]]] = {}
    lines = []
    for record in records:
        run = record["params"].get("run")
        if record["name"] == "train" and run:
            entries.setdefault(run["entry"], []).append(run)
        elif record["name"] == "import":
            lines.append(_imported(record))
    for entry, runs in entries.items():
        look = style.look(runs[0]["variant"], entry)
        usual = with_defaults(runs[0]["variant"], {})
        options = {
            key: values_of(run["options"].get(key) for run in runs)
            for key in runs[0]["options"]
            if any(key not in usual or run["options"].get(key) != usual[key] for run in runs)
        }
        training = [run["training"] for run in runs]
        lines.append(
            {
                "color": look.color,
                "rank": style.rank(runs[0]["variant"], entry),
                "entry": entry,
                "label": look.label,
                "stores": values_of(f"{run['source']}/{run['hook_point']}" for run in runs),
                "d_sae": values_of(run["d_sae"] for run in runs),
                "options": [f"{key} = {text}" for key, text in options.items()],
                "seeds": values_of(run["seed"] for run in runs),
                "tokens": values_of(values["tokens"] for values in training),
                "batch": values_of(values["batch_size"] for values in training),
                "input_scale": values_of(values["input_scale"] for values in training),
                "lr": values_of(values["lr"] for values in training),
                "runs": len(runs),
            }
        )
    return sorted(lines, key=lambda line: (line["rank"], natural(line["entry"])))


def _imported(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of an SAE of another library; its result is results/saes/SOURCE/HOOK_POINT/ENTRY/RUN."""
    entry = Path(record["result"]).parts[-2]
    params, sae = record["params"], record["notes"]
    look = style.look(sae["variant"], entry)
    folder = Path(min(record["external"])).parent.as_posix()
    options = [] if sae["k"] is None else [f"k = {plain(sae['k'])}"]
    untrained = dict.fromkeys(("seeds", "tokens", "batch", "input_scale", "lr"), "")
    return {
        "color": look.color,
        "rank": style.rank(sae["variant"], entry),
        "entry": entry,
        "label": look.label,
        "stores": params["store"],
        "d_sae": plain(sae["d_sae"]),
        "options": [*options, f"taken over from {params['library']}: {folder}"],
        **untrained,
        "runs": 1,
    }


def values_of(values: Iterable[Any]) -> str:
    """All the values of a parameter in natural order, each once."""
    return ", ".join(sorted({plain(value) for value in values}, key=natural))


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


def job_times(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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


def versions(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record["versions"].items():
            found.setdefault(package, set()).add(version)
    return [(package, ", ".join(sorted(found[package], key=natural))) for package in sorted(found)]
