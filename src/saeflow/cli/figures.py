"""Jobs that draw figures and write the report."""

import logging
from pathlib import Path

from saeflow import provenance
from saeflow.cli.arguments import Task, job_of
from saeflow.jobs import read_task
from saeflow.trace import trace

logger = logging.getLogger(__name__)


def draw(task: Task) -> None:
    """Draw one figure from the tables, or write one of the papers' tables."""
    from saeflow.figures import draw as draw_figure

    asked = read_task(task)
    with job_of(asked, "draw") as job:
        draw_figure(asked.params["figure"], asked.one("tables"), asked.params["options"], job.path)


def report(task: Task) -> None:
    """Write the report: tables, figures and where everything came from."""
    from saeflow.figures.report import write_report

    asked = read_task(task)
    folders, mark = asked.many("figures"), asked.params["mark"]
    pages = dict(zip(asked.params["pages"], asked.many("pages"), strict=True))
    for other in _left_out(folders):
        logger.warning(
            "%s: figures.names does not name it, so that the report leaves it out; it may be of an earlier run.",
            other,
        )
    write_report(asked.one("tables"), folders, _records(folders), asked.out, pages, mark)
    provenance.record_file(
        asked.out, name="report", inputs=asked.inputs, params=asked.params, key=asked.key
    )


def _left_out(figures: list[Path]) -> list[Path]:
    """Finished figures beside those of the report."""
    places = {folder.parent for folder in figures}
    drawn = {path.parent for place in places for path in place.glob("*/provenance.json")}
    return sorted(drawn - set(figures))


def _records(figures: list[Path]) -> list[Path]:
    """The records of everything that the figures were made from."""
    seen: set[str] = set()
    links = (link for folder in figures for link in trace(folder, lambda _: None, seen))
    return sorted({provenance.record_path(Path(link.result)) for link in links})
