"""The command line: each command reads files, calls one function of the package, writes one result.

Exit codes: 0 done, 1 failed, 2 the user's input is at fault (a line on stderr for each mistake).
"""

import errno
import logging
import re
import sys
from collections.abc import Callable

import typer

from saeflow.cli import (
    complexity,
    evaluation,
    exchange,
    figures,
    parameters,
    results,
    sources,
    starting,
    stores,
    training,
)
from saeflow.errors import UserError

Command = Callable[..., None]

COMMANDS: dict[str, Command] = {
    "init": starting.init,
    "run": starting.run,
    "validate": parameters.validate,
    "parameters": parameters.parameters,
    "plan": parameters.plan,
    "rehearse": parameters.rehearse,
    "trace": results.trace,
    "verify": results.verify,
    "export": exchange.export,
    "push": exchange.push,
    "import": exchange.import_,
}
"""Commands that a user types."""
JOBS: dict[str, Command] = {
    "import": exchange.import_,
    "fetch": sources.fetch,
    "prepare": sources.prepare,
    "label": sources.label,
    "merge": stores.merge,
    "score": complexity.score,
    "probe": complexity.probe,
    "train": training.train,
    "clean": evaluation.clean,
    "dimension": evaluation.dimension,
    "evaluate": evaluation.evaluate,
    "latents": evaluation.latents,
    "interpret": evaluation.interpret_,
    "baselines": evaluation.baselines,
    "stability": evaluation.stability,
    "rivals": evaluation.rivals,
    "choose": evaluation.choose,
    "collect": evaluation.collect,
    "draw": figures.draw,
    "report": figures.report,
}
"""The command of each job (saeflow.jobs.declared): the code that its key digests starts here."""
PANELS: dict[str, dict[str, Command]] = {
    "Commands": COMMANDS,
    "Jobs, which the workflow's rules call": {
        "extract": stores.extract,
        **{name: command for name, command in JOBS.items() if name not in COMMANDS},
    },
}
"""Every command by its name, under the panel of `saeflow --help` that shows it."""

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for _panel, _commands in PANELS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)


def main() -> None:
    """Run the command line with saeflow's exit codes."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("saeflow").setLevel(logging.INFO)
    try:
        app()
    except UserError as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        for line in error.lines:
            sys.stderr.write("error: " + " ".join(line.split()) + "\n")
        sys.exit(2)
    except Exception as error:
        number = _os_error(error)
        where = getattr(error, "filename", None)
        if number in _NO_RIGHT and where:
            sys.stderr.write(
                f"error: {where}: permission denied. Change its permissions, or name another place.\n"
            )
            sys.exit(2)
        if number not in _NO_ROOM:
            raise
        sys.stderr.write(
            f"error: {where or 'a file'}: {_NO_ROOM[number]}; nothing half-written is kept for whole. Make "
            "room and run the same command again: it goes on from what is complete.\n"
        )
        sys.exit(1)


def _os_error(error: Exception) -> int | None:
    """The operating system's error number, which safetensors only writes into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)$", str(error))
    return int(found[1]) if found else None


_NO_RIGHT = (errno.EACCES, errno.EPERM)
_NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system cannot be written to",
}
