"""The model and the data that the user asked a first parameter file for."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """The model and the data that a first file is for: one of text, images and dataset."""

    model: str
    """A folder that `save_pretrained` wrote, or the hub's OWNER/NAME: @COMMIT after it, or its newest commit."""
    text: tuple[Path, ...] = ()
    images: Path | None = None
    dataset: str = ""
    column: str = ""
    hook_point: str = ""
    encoding: str = ""
    """The encoding of files of text; where empty UTF-8, or what a byte order mark says."""
