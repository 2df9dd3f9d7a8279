"""Logs of training to watch while it runs: TensorBoard's event files, and Weights & Biases if asked.

They lie beside the results, not in them: with or without them a run ends in the same bytes.
"""

import dataclasses
import importlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeflow.config import SAEConfig
from saeflow.errors import UserError

TENSORBOARD, WANDB = "tensorboard", "wandb"
_FLUSH_S = 5


class Live:
    """The logs that every logged step of one run is sent to.

    Args:
        config: the run.
        settings: `runtime.logging`: tensorboard (bool) and, if asked, wandb ({project, mode}); and `folder`,
            which gets tensorboard/RUN and wandb/.
        step: steps that are done already, 0 for a new run; a resumed run's points after it are drawn again.

    Raises:
        UserError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, config: SAEConfig, settings: Mapping[str, Any], step: int) -> None:
        self.writer: Any = None
        self.wandb: Any = None
        root = Path(settings["folder"])
        if settings.get("tensorboard", True):
            from torch.utils.tensorboard import SummaryWriter

            folder = root / TENSORBOARD / config.name
            if step == 0:
                shutil.rmtree(folder, ignore_errors=True)
            _wait_for_a_later_second(folder)
            self.writer = SummaryWriter(
                folder, purge_step=step + 1 if step else None, flush_secs=_FLUSH_S
            )
        if chosen := settings.get("wandb"):
            self.wandb = _wandb(config, chosen, root / WANDB)

    def add(self, row: Mapping[str, float]) -> None:
        """Send one line of steps.csv."""
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name != "step"}
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        """Write what is still in memory; more can be added after it."""
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def _wait_for_a_later_second(folder: Path) -> None:
    """Wait, one second at most, until a new event file is named after those in the folder.

    TensorBoard reads files in the order of their names, which hold the second that they were opened in
    and then numbers without leading zeros: of two files of one second it may read the later one first,
    and then drops its points.
    """
    files = folder.glob("events.out.tfevents.*")
    newest = max((int(file.name.split(".")[3]) for file in files), default=0)
    now = time.time()
    if int(now) == newest:
        time.sleep(newest + 1 - now)


def _wandb(config: SAEConfig, chosen: Mapping[str, str], folder: Path) -> Any:
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "runtime.logging.wandb: expected the package wandb, which is not installed. Run pip install "
            "'saeflow[wandb]', or set it to null."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=chosen["project"], mode=chosen.get("mode", "offline"), name=config.name, dir=folder,
        group=config.entry, config=dataclasses.asdict(config), reinit="create_new",
    )  # fmt: skip
