"""The device that a job runs on: `runtime.device`, decided on the machine where the job runs.

Imports torch only when it is asked, so that the workflow can be planned without it.
"""

import logging
import os
from pathlib import Path

from saeflow.errors import UserError

AUTO, CPU, CUDA = "auto", "cpu", "cuda"

logger = logging.getLogger(__name__)


def resolve(asked: str) -> str:
    """Return the device of `runtime.device`; `auto` is a GPU where torch sees one that works, else the CPU.

    Args:
        asked: auto, cpu, cuda or cuda:N.

    Returns:
        cpu, cuda or cuda:N. The choice is logged with the name of the card.

    Raises:
        UserError: a GPU is asked for by name, and there is none that works.
    """
    if asked == CPU:
        return CPU
    device = CUDA if asked == AUTO else asked
    problem = _problem(device)
    if problem is None:
        logger.info("device: %s", label(device))
        return device
    if asked == AUTO:
        logger.info("device: cpu (%s)", problem)
        return CPU
    raise UserError(refusal(asked, problem))


def missing(asked: str, ranks: int = 1) -> str | None:
    """Return why this machine cannot have the GPUs that are asked for, or None; touches none of them.

    Args:
        asked: auto, cpu, cuda or cuda:N.
        ranks: processes that train together, each on a GPU of its own.
    """
    if asked in (AUTO, CPU):
        return None
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    found = torch.cuda.device_count()
    if not found or not torch.cuda.is_available():
        return "torch sees no GPU"
    index = int(asked.partition(":")[2] or 0)
    if index >= found:
        return f"torch sees {found}, counted from cuda:0"
    if ranks > found:
        return f"torch sees {found}, for {ranks} ranks"
    return None


def refusal(asked: str, problem: str) -> str:
    """Say in one line that a GPU is asked for by name and cannot be had."""
    return (
        f"runtime.device: expected a GPU for {asked}, found none that works ({problem}). Set it to auto or cpu, or "
        "run where there is a GPU."
    )


def _problem(device: str) -> str | None:
    """Return why a GPU cannot be used, or None."""
    import torch

    if problem := missing(device):
        return problem
    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError) as error:  # another index, a driver that does not fit
        return str(error).splitlines()[0]
    return None


def label(device: str) -> str:
    """Return a device as logs and records name it: of a GPU, with the name of the card."""
    if not device.startswith(CUDA):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def has_gpu() -> bool:
    """Tell whether this machine shows a GPU to its programs, without loading torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
