"""The report: one HTML page with tables, figures, schedules and where everything came from.

The page holds everything it shows (figures as data URIs, styles inline) and forbids itself to load anything; only its
links to the data beside it point outside. Its one script sorts tables; without it nothing is missing.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from saeflow.figures.report.records import (
    duration,
    job_times,
    read_record,
    record_order,
    saes,
    sources,
    versions,
)
from saeflow.figures.report.results import sections
from saeflow.figures.report.shown import href, numbered, schedules, shown_figure
from saeflow.tables.files import read_csv, write_text
from saeflow.tables.load import load_tables
from saeflow.tables.verdict import sentences


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
    found = sorted((read_record(path, out.parent) for path in records), key=record_order)
    summary, loaded = read_csv(tables / "summary.csv"), load_tables(tables)
    page = template("report.html.j2").render(
        mark=mark,
        headline=sentences(loaded),
        sources=sources(found),
        saes=saes(found),
        sections=sections(summary, read_csv(tables / "unmeasured.csv"), loaded.tuning),
        figures=numbered([shown_figure(folder, out.parent) for folder in figures]),
        script_hash="SCRIPT",
        pages=[
            {"run": run, "href": href(folder / "latents.html", out.parent)}
            for run, folder in (pages or {}).items()
        ],
        schedules=schedules(loaded.training),
        records=found,
        jobs=job_times(found),
        total=duration(sum(record["seconds"] for record in found)),
        versions=versions(found),
        commits=sorted({record["commit"] for record in found}),
        latest=max((record["started"] for record in found), default=""),
    )
    write_text(out, with_script(page))


def with_script(page: str) -> str:
    """Return a page whose policy allows its last script and no other, by its digest in the place of SCRIPT."""
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.replace("'SCRIPT'", f"'sha256-{digest}'", 1)


def template(name: str) -> Any:
    """A page's template; what is put in is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
